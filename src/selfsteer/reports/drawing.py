"""A table, and how it is drawn: in a terminal, as text, as Markdown. As HTML `page.py` draws it.

Left out on purpose: what the tables say.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from selfsteer.measures.estimates import Estimate
from selfsteer.measures.metrics import Json, find

Form = Literal["number", "share"]


class Cell(NamedTuple):
    """One number of a table with its interval, both as text; "" where it was not measured."""

    value: str
    interval: str = ""

    @property
    def text(self) -> str:
        """Both."""
        return " ".join(filter(None, self))


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
    funnel: bool = False
    """It says what became of the rows of the stages."""


def cell(value: Estimate | float | None, form: Form, *, signed: bool = False) -> Cell:
    """An estimate, a number or None as text. The interval has as many decimals as the mean.

    signed: it is a difference; that of shares is in percentage points.
    """
    if value is None:
        return Cell("")
    if isinstance(value, int):
        return Cell(f"{value:,}")
    if isinstance(value, float):
        return Cell(_number(value, form, signed=signed))
    mean, low, high = value.mean, value.low, value.high
    text = _number(mean, form, signed=signed)
    if low is None or high is None:
        return Cell(text)
    decimals = _decimals(mean, form)
    scale, sign = (100 if form == "share" else 1), ("+" if signed else "")
    return Cell(text, f"[{low * scale:{sign}.{decimals}f}, {high * scale:{sign}.{decimals}f}]")


def figures(label: str, sources: Sequence[Json], path: str, form: Form = "number", *, signed: bool = False) -> Row:
    """A line of what each source has at a dotted path."""
    return Row(label, tuple(cell(find(source, path), form, signed=signed) for source in sources))


def _number(value: float, form: Form, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    decimals = _decimals(value, form)
    if form == "share":
        return f"{100 * value:{sign}.{decimals}f}{' points' if signed else '%'}"
    return f"{value:{sign},.{decimals}f}"


def _decimals(value: float, form: Form) -> int:
    if form == "share" or abs(value) >= 100:
        return 1
    return 2 if abs(value) >= 10 else 3


def table_text(table: Table) -> str:
    """The table as plain text of 100 columns."""
    return as_text(lambda console: print_table(table, console))


def as_text(show: Callable[[Console], None]) -> str:
    """What is printed to a console, as plain text of 100 columns; in a notebook and under FORCE_COLOR, too."""
    text = io.StringIO()
    show(Console(file=text, width=100, force_terminal=False, force_jupyter=False))
    return text.getvalue().rstrip()


def markdown(table: Table) -> str:
    """The table as Markdown, under a heading."""

    def cells(values: Iterator[str]) -> str:
        return "| " + " | ".join(" ".join(value.split()).replace("|", "\\|") for value in values) + " |"

    alignments = ["---:"] * len(table.columns)
    if table.left:
        alignments[-1] = ":---"
    lines = [cells(iter(("", *table.columns))), cells(iter((":---", *alignments)))]
    for row in table.rows:
        if row.cells:
            lines.append(cells(iter((row.label, *(cell.text for cell in row.cells)))))
        else:
            lines.append(cells(iter((f"**{row.label}**", *[""] * len(table.columns)))))
    note = f"\n\n{table.note}" if table.note else ""
    return f"### {table.title}\n\n" + "\n".join(lines) + note


def console_of() -> Console:
    """Standard output; where it is no terminal, of 100 columns unless COLUMNS says otherwise."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=100)


def print_table(table: Table, console: Console | None = None) -> None:
    """Draw a table in a terminal."""
    console = console or console_of()
    for part in _fitting(table, console):
        console.print(part)
    if table.note:
        console.print(Text(table.note, style="dim"))
        console.print()


_ANY_WIDTH = 10_000

_TEXT = 24
"""Characters a line that a last column of text has at least; it is wrapped, numbers are not."""


def _fitting(table: Table, console: Console) -> Iterator[RichTable]:
    """In one piece; with intervals below their values where that is too wide; the columns beyond in a table below."""
    room = console.width - (_TEXT if table.left else 0)

    def fits(columns: int, between: str) -> bool:
        drawn = _drawn(_columns(table, slice(columns)), between)
        return console.measure(drawn, options=console.options.update(max_width=_ANY_WIDTH)).maximum <= room

    whole = len(table.columns)
    numbers = whole - table.left
    if fits(numbers, " "):
        yield _drawn(table, " ")
    elif table.left or fits(numbers, "\n"):
        yield _drawn(table, "\n")
    else:
        count = next((count for count in range(whole - 1, 1, -1) if fits(count, "\n")), 1)
        yield _drawn(_columns(table, slice(count)), "\n")
        if count < whole:
            rest = filled(_columns(table, slice(count, None)))
            yield from _fitting(rest._replace(title=f"{table.title.removesuffix(_MORE)}{_MORE}"), console)


_MORE = ", continued"


def _columns(table: Table, columns: slice) -> Table:
    rows = tuple(Row(row.label, row.cells[columns]) for row in table.rows)
    return table._replace(columns=table.columns[columns], rows=rows)


def filled(table: Table) -> Table:
    """Without lines that say nothing, and headings without a line."""
    rows = [row for row in table.rows if not row.cells or any(cell.value for cell in row.cells)]
    kept = (row for row, below in zip(rows, [*rows[1:], Row("")], strict=True) if row.cells or below.cells)
    return table._replace(rows=tuple(kept))


def _drawn(table: Table, between: str) -> RichTable:
    """between: a value and its interval."""
    drawn = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.collapse_padding = True
    drawn.add_column("")
    for index, name in enumerate(table.columns, 1):
        text = table.left and index == len(table.columns)
        drawn.add_column(Text(name), justify="left" if text else "right", overflow="fold")
    for row in table.rows:
        if row.cells:
            cells = (
                Text.assemble(cell.value, (f"{between}{cell.interval}" if cell.interval else "", "dim"))
                for cell in row.cells
            )
            # Padding: what is wrapped stays indented.
            drawn.add_row(Padding(Text(row.label), (0, 0, 0, 0 if table.left else 2)), *cells)
        else:
            drawn.add_row(Text(row.label, style="italic"))
    return drawn
