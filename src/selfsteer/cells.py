"""Cells, rows and tables, and how numbers and their intervals read. What stands in them is in `report.py`."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from selfsteer.estimates import Estimate
from selfsteer.metrics import GateResult

Json = Mapping[str, Any]
Form = Literal["number", "share"]


class Cell(NamedTuple):
    """One number of a table with its interval, both as text; "" where it was not measured."""

    value: str
    interval: str = ""


class Row(NamedTuple):
    """A line of a table; without cells, a heading of the lines below."""

    label: str
    cells: tuple[Cell, ...] = ()


class Table(NamedTuple):
    """A table, ready to be drawn."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    left: bool = False
    """The last column is text."""


def plain(value: object) -> Any:
    """The same as JSON values: an `Estimate` becomes {"mean", "low", "high", "n"}, a `GateResult` likewise."""
    if isinstance(value, Estimate | GateResult):
        return {key: plain(item) for key, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("list[object]", value)]
    return value


def find(node: Json, path: str) -> Any:
    """The value at a dotted path, or None where it was not measured."""
    found: Any = node
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = cast(Json, found)[key]
    return found


def cell(value: Any, form: Form, *, signed: bool = False) -> Cell:
    """An estimate, a number or None as text. The interval has as many decimals as the mean."""
    if value is None:
        return Cell("")
    if isinstance(value, int):
        return Cell(f"{value:,}")
    if isinstance(value, float):
        return Cell(_number(value, form, signed=signed))
    mean, low, high = value["mean"], value["low"], value["high"]
    text = _number(mean, form, signed=signed)
    if low is None or high is None:
        return Cell(text)
    decimals = _decimals(mean, form)
    scale, sign = (100 if form == "share" else 1), ("+" if signed else "")
    return Cell(text, f"[{low * scale:{sign}.{decimals}f}, {high * scale:{sign}.{decimals}f}]")


def _number(value: float, form: Form, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    decimals = _decimals(value, form)
    return f"{100 * value:{sign}.{decimals}f}%" if form == "share" else f"{value:{sign},.{decimals}f}"


def _decimals(value: float, form: Form) -> int:
    if form == "share" or abs(value) >= 100:
        return 1
    return 2 if abs(value) >= 10 else 3


def duration(seconds: float) -> str:
    """Seconds as people read them: 8.4 s, 3 min 20 s, 2 h 05 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
