"""Whether the files of a model folder are whole, and whether they are the weights that its configuration speaks of.

transformers fills what a file lacks with random numbers and goes on; here everything missing, superfluous or of another
shape is refused with its name. Headers only: the weights themselves are not read.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open

from selfsteer.store.durable import read_object

_POINTER = b"version https://git-lfs"
_SHOWN = 4
"""Names in a message, of each kind."""


class Stored(NamedTuple):
    """What the files of a folder hold."""

    tensors: int
    elements: int


def check_files(folder: Path) -> Stored:
    """The weights of a model folder, by the headers of their files.

    Raises ValueError, with the file, for what is damaged, cut off, missing, was not fetched, there twice, or holds what is
    no number (integers, truth values) as weights that no configuration says how to scale.
    """
    tensors = elements = 0
    for file in _files(folder):
        refuse_pointer(file)
        for name, shape, dtype in _headers(file):
            coded = name.endswith("weight") and dtype not in _NUMBERS
            if coded and not read_object(folder / "config.json").get("quantization_config"):
                raise ValueError(
                    f"{file}: {name} is kept in {dtype}, and config.json has no quantization_config that says what its"
                    " numbers mean; save the model in float32, bfloat16 or float16, or fetch the whole config.json"
                )
            tensors += 1
            elements += math.prod(shape)
    return Stored(tensors, elements)


def refuse_pointer(file: Path) -> None:
    """Raises ValueError for what Git leaves in place of a large file that it was not asked to fetch."""
    with file.open("rb") as content:
        if content.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{file}: only a Git LFS pointer to the file; fetch the file itself (git lfs pull)")


_LEFTOVERS = re.compile(
    r"\.(?:(?:attn|attention)\.(?:bias|masked_bias|causal_mask)|rotary_emb\.(?:inv_freq|cos_cached|sin_cached)|position_ids)$"
)
"""Names of constants that earlier versions of transformers kept beside the weights (old files of GPT-2 have causal masks).

A model makes them from its configuration. A layer of such a name would have a weight as well, which is told.
"""


def check_fit(path: str, information: Mapping[str, Any], *, said_by: str = "config.json") -> None:
    """What transformers tells about loading: raises ValueError with the names that do not fit what `said_by` says."""
    shapes = [
        f"{name} ({_shape(file)} in the file, {_shape(said)} by {said_by})"
        for name, file, said in cast("Collection[tuple[str, Any, Any]]", information["mismatched_keys"])
    ]
    unexpected = [name for name in cast("Collection[str]", information["unexpected_keys"]) if not _LEFTOVERS.search(name)]
    found = [
        _named("missing", cast("Collection[str]", information["missing_keys"])),
        _named("not of this model", unexpected),
        _named("of another shape", shapes),
    ]
    if any(found):
        what = "; ".join(part for part in found if part)
        raise ValueError(
            f"{path}: the weights do not fit the {said_by}. {what}. Save the model again "
            f"with save_pretrained, or take the {said_by} that belongs to these weights."
        )


def _named(what: str, names: Collection[str]) -> str:
    if not names:
        return ""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"{len(ordered)} {what}: {', '.join(ordered[:_SHOWN])}{more}"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _files(folder: Path) -> list[Path]:
    """The files that transformers will read."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        if single.is_file():
            return [single]
        if others := sorted(file.name for file in folder.glob("*.safetensors")):
            raise ValueError(
                f"{folder}: neither {single.name} nor {index.name}, only {others[0]}; fetch the index of the shards, or give"
                " the file that name"
            )
        raise ValueError(
            f"{folder}: no .safetensors weights by the names that are looked for, {single.name} or {index.name} (pickled "
            "weights are refused); convert them with save_pretrained"
        )
    refuse_pointer(index)
    content = read_object(index)
    if type(content.get("metadata")) is not dict:  # transformers wants one, be it empty
        raise ValueError(f"{index}: 'metadata' is missing or no object; fetch it again, or add \"metadata\": {{}}")
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in cast("dict[str, Any]", shards).values()):
        raise ValueError(f"{index}: 'weight_map' names no files; fetch or make it again")
    names = sorted(set(cast("dict[str, str]", shards).values()))
    if single.is_file() and names != [single.name]:
        raise ValueError(
            f"{folder}: the weights are there twice, {single.name} and the shards of {index.name}, and nothing says which "
            "are meant (transformers takes the former, vLLM the latter); take one of them away"
        )
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index}: names {name!r}, which is not in the folder; fetch the missing file")
    return [folder / name for name in names]


_NUMBERS = frozenset(("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"))
"""Dtypes that say themselves what a weight is, by their names in safetensors."""


def _headers(file: Path) -> list[tuple[str, list[int], str]]:
    """Name, shape and dtype of every tensor."""
    try:
        with safe_open(file, framework="numpy") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 (it is no dictionary)
            return [(name, each.get_shape(), each.get_dtype()) for name, each in slices.items()]
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file}: damaged or cut off ({error}); fetch it again") from error
