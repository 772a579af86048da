"""Measures of sealed data, taken once: measured.json in the run folder, by the digests of what was measured.

A finished run that is run again, and a run whose gates were looked at before, are reported without reading their pairs.
Left out on purpose: the measures (`quality.py`).
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from selfsteer.cells import plain
from selfsteer.durable import canonical_json, digest, replacing
from selfsteer.estimates import Estimate

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 1
"""Version of what is measured; to be raised with every change of a number in `quality.py`."""


class Measured:
    """What was measured in one run folder; for its owner."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = _read(path)

    def get(self, name: str, digests: list[str], take: Callable[[], T]) -> T:
        """What `take` returns for the data of these digests; it is called only where that is not known yet.

        The value: dictionaries, lists, texts, numbers and `Estimate`s.
        """
        key = digest({"schema": SCHEMA, "name": name, "digests": digests})
        if key not in self._values:
            self._values[key] = plain(take())
            with replacing(self._path) as file:
                file.write(canonical_json({"values": self._values, "sha256": digest(self._values)}))
        return cast(T, _with_estimates(self._values[key]))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        values, claimed = cast("dict[str, Any]", content["values"]), content["sha256"]
    except (ValueError, KeyError, TypeError):
        values, claimed = {}, None
    if claimed != digest(values):
        log.warning("%s: not as it was written; measuring again", path)
        return {}
    return values


def _with_estimates(value: Any) -> Any:
    """The inverse of `cells.plain`."""
    if isinstance(value, list):
        return [_with_estimates(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        fields = {str(key): _with_estimates(item) for key, item in cast("dict[str, Any]", value).items()}
        return Estimate(**fields) if tuple(sorted(fields)) == _ESTIMATE else fields
    return value


_ESTIMATE = tuple(sorted(Estimate._fields))
