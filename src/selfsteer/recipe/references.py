"""What names a model: a folder, a .gguf file, package:NAME, or a hub id; told apart by the name and a look at the disk."""

import re
from pathlib import Path

PACKAGE = "package:"
"""Before the name of an installed package that holds one .gguf file."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def is_hub_id(reference: str) -> bool:
    """Whether this can only be a model of the hub: owner/name, and nothing of that name lies here."""
    return _HUB_ID.fullmatch(reference) is not None and not reference.endswith(".gguf") and not Path(reference).exists()


def check_model(reference: str, setting: str = "policy.model") -> None:
    """Raises ValueError (FileNotFoundError for a .gguf file) for what is not on this machine and can't be on the hub.

    setting: who named it. Whether a package is installed and whether the hub has it, only looking there can tell.
    """
    path = Path(reference)
    if path.suffix == ".gguf" and not path.is_file():
        raise FileNotFoundError(f"{setting}: {reference}: there is no such file")
    if path.exists() or reference.startswith(PACKAGE) or _HUB_ID.fullmatch(reference):
        return
    raise ValueError(
        f"{setting}: {reference!r}: there is no such folder or .gguf file, and it is not a hub id (owner/name). "
        "Give a local folder in Hugging Face format, a hub id, a .gguf file, or package:NAME."
    )
