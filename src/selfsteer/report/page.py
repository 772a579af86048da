"""report.html: one self-contained page with the tables, the plots and some pairs to read. No scripts, no external assets.

Everything that a model or a user wrote is escaped. The frame and its style are `templates/report.html`.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, TypeVar, cast

from selfsteer.measures.metrics import Metrics, RoundMetrics, find, plain
from selfsteer.records import Message, Pair
from selfsteer.report import tables
from selfsteer.report.tables import Form, Table, cell, duration
from selfsteer.store.durable import replacing

EXAMPLES = 10

T = TypeVar("T")


def pick_examples(items: Iterable[T], *, n: int = EXAMPLES, seed: int = 0) -> list[T]:
    """n items drawn evenly from a stream (reservoir sampling, Vitter 1985), in its order."""
    rng = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for number, item in enumerate(items):
        if number < n:
            kept.append((number, item))
        elif (place := rng.randrange(number + 1)) < n:
            kept[place] = (number, item)
    return [item for _, item in sorted(kept, key=lambda numbered: numbered[0])]


def write_page(
    path: Path, metrics: Metrics, examples: Sequence[Pair] = (), answers: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write report.html, whole or not at all; without matplotlib, without plots.

    answers: rows of `columns.ANSWERS` to read.
    """
    run = metrics["run"]
    facts = [f"from {run['model']}", f"seed {run['seed']}", duration(run["seconds"]), run.get("hardware", "")]
    facts += [f"{name} {number}" for name, number in run.get("versions", {}).items()]
    plots = "\n".join(_plots(metrics))
    template = Template(files("selfsteer").joinpath("templates/report.html").read_text(encoding="utf-8"))
    text = template.substitute(
        name=escape(run["name"]),
        facts=" · ".join(escape(fact) for fact in facts if fact),
        figures=_figures(metrics["rounds"][-1]) if metrics["rounds"] else "",
        tables="\n".join(map(table_html, tables.run_tables(metrics))),
        plots=f"<section><h2>Distributions</h2>{plots}</section>" if plots else "",
        examples=_answers(answers) + _examples(examples),
        closing=escape(tables.closing_line(metrics)),
    )
    with replacing(path) as file:
        file.write(text.encode(errors="replace"))


def _figures(this: RoundMetrics) -> str:
    """The few numbers to see first."""
    data = cast("Mapping[str, Any]", plain(this))
    shown: tuple[tuple[str, str, Form, bool], ...] = (
        ("held-out answers follow the principle before", "answers.passing.before", "share", False),
        ("after", "answers.passing.after", "share", False),
        ("told to", "answers.passing.prompted", "share", False),
        ("preference pairs", "alignment.pairs", "number", False),
        ("on-policy probability", "alignment.on_policy.all", "number", False),
        ("more on-policy than PBAA", "comparison.all", "number", True),
        ("reward accuracy after alignment", "policy.reward.reward.accuracy", "share", False),
    )
    cells = ((label, cell(find(data, path), form, signed=signed)) for label, path, form, signed in shown)
    return "\n".join(
        f'<div class="figure"><b>{escape(cell.value)}</b><i>{escape(cell.interval)}</i><span>{escape(label)}</span></div>'
        for label, cell in cells
        if cell.value
    )


def table_html(table: Table) -> str:
    """The table as a section of a page."""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body: list[str] = []
    for row in table.rows:
        if not row.cells:
            body.append(f'<tr class="group"><th colspan="{len(table.columns) + 1}">{escape(row.label)}</th></tr>')
            continue
        cells = (
            f"<td>{escape(cell.value)}" + (f" <i>{escape(cell.interval)}</i>" if cell.interval else "") + "</td>"
            for cell in row.cells
        )
        body.append(f"<tr><th>{escape(row.label)}</th>{''.join(cells)}</tr>")
    kind = ' class="last-is-text"' if table.left else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="wide"><table{kind}><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{note}</section>"
    )


def _plots(metrics: Metrics) -> Iterable[str]:
    try:
        from selfsteer.report import plots
    except ModuleNotFoundError:
        yield '<p class="note">Install matplotlib (pip install "selfsteer[report]") to see plots here.</p>'
        return
    for this in metrics["rounds"]:
        for plot in plots.plots(this, tables.data_sets(this)):
            yield f"<figure>{plot.svg}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _answers(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    drawn = "\n".join(map(_answer, rows))
    about = f"{len(rows)} held-out queries, drawn at random, without their principle."
    return f"<section><h2>Answers before and after the alignment</h2><p>{about}</p>{drawn}</section>"


def _answer(row: Mapping[str, Any]) -> str:
    sides: list[str] = []
    for which, kind in (("before", "rejected"), ("after", "chosen")):
        reasons = [reason for reason in row[f"{which}_why_not"] if reason is not None]
        facts = [which, "; ".join(reasons) or "passes"]
        if row[which]["finish_reason"] == "length":
            facts.append("cut off")
        text = escape(row[which]["text"])
        sides.append(f'<div class="{kind}"><h3>{escape(" · ".join(facts))}</h3><div class="text">{text}</div></div>')
    principle = f"<dl><dt>good principle</dt><dd>{escape(row['principles']['good'])}</dd></dl>"
    return f'<article>{_turns(row["messages"])}{principle}<div class="pair">{"".join(sides)}</div></article>'


def _turns(messages: Iterable[Message]) -> str:
    return "".join(
        f'<div class="turn"><h3>{escape(turn["role"])}</h3><div class="text">{escape(turn["content"])}</div></div>'
        for turn in messages
    )


def _examples(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    drawn = "\n".join(map(_example, pairs))
    return f"<section><h2>Pairs to read</h2><p>{len(pairs)} preference pairs, drawn at random.</p>{drawn}</section>"


def _example(pair: Pair) -> str:
    counts = pair.scored
    sides: list[str] = []
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        facts = [name]
        if counts:
            facts.append(f"{side.score.tokens:,} tokens, on-policy probability {math.exp(side.score.mean_logps):.3f}")
        if side.finish == "length":
            facts.append("cut off")
        text = f'<div class="text">{escape(side.text)}</div>'
        sides.append(f'<div class="{name}"><h3>{escape(" · ".join(facts))}</h3>{text}</div>')
    extra = ""
    if pair.principles is not None:
        named = (("good", pair.principles.good), ("bad", pair.principles.bad))
        extra = "".join(f"<dt>{name} principle</dt><dd>{escape(text)}</dd>" for name, text in named)
    known = f"<dl>{extra}</dl>" if extra else ""
    return f'<article>{_turns(pair.prompt)}{known}<div class="pair">{"".join(sides)}</div></article>'
