"""report.html: one self-contained page, the verdict first, with plots, answers before and after, and all pairs to read.

Everything that a model or a user wrote is escaped, or stands in the page as JSON that its one script puts in as text; no
other script can run, and nothing is loaded. The frame and its style are `templates/report.html`, the script
`templates/report.js`.
"""

import base64
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from hashlib import sha256
from html import escape
from itertools import count
from pathlib import Path
from string import Template
from typing import Any

import yaml

from selfsteer.measures.metrics import Metrics, RoundMetrics
from selfsteer.recipe.shipped import template
from selfsteer.reports import costs, tables
from selfsteer.reports.drawing import Table
from selfsteer.reports.reading import Entry, PairSet, Reading, SideEntry, pick_examples
from selfsteer.reports.verdict import answer_lines, headline, measure_rows, places, result_of, warnings
from selfsteer.stages.status import PRINCIPLES
from selfsteer.store.durable import write

PLOTS_NEED = 'plots need matplotlib: pip install "selfsteer[report]"'

NO_PLOTS = '<p class="note">Install matplotlib (pip install "selfsteer[report]") to see plots here.</p>'

_LONG = 2_500
"""Characters of a text that scrolls inside itself; as in report.js."""

_UNFOLDED = 3
"""Answers before and after that are seen at once; the others open."""

_MOST_WORDS = 3_000
"""Of a text whose words are compared: the time grows with the square."""


def write_page(path: Path, metrics: Metrics, reading: Reading | None = None) -> None:
    """Write report.html, whole or not at all; without matplotlib, without plots."""
    write_html(path, page(metrics, reading or Reading()))


def page(metrics: Metrics, reading: Reading) -> str:
    """The page of a run."""
    run = metrics["run"]
    this = tables.last_round(metrics)
    facts = [f"from {run['model']}", f"seed {run['seed']}", run.get("hardware", "")]
    body = (
        _verdict(metrics, this),
        _figure_three(this),
        _answers(reading),
        _browser(reading, run["seed"]),
        _funnel(metrics),
        _tables(metrics),
        _made_with(metrics, reading),
    )
    return frame(run["name"], facts, _with_contents(list(filter(None, body))), data=_data(reading))


def _with_contents(sections: Sequence[str]) -> str:
    """The sections, each heading with an id; behind the first, which has none, links to them."""
    first, *rest = sections
    titles = re.findall("<h2>(.*?)</h2>", "\n".join(rest))
    links = " · ".join(f'<a href="#part-{number}">{title}</a>' for number, title in enumerate(titles, 1))
    numbers = count(1)
    body = re.sub("<h2>", lambda _: f'<h2 id="part-{next(numbers)}">', "\n".join(rest))
    return "\n".join((first, f'<nav class="facts" aria-label="On this page">{links}</nav>' if links else "", body))


def write_html(path: Path, text: str) -> None:
    """Write a page, whole or not at all."""
    write(path, text.encode(errors="replace"))


def frame(name: str, facts: Iterable[str], body: str, *, data: object = None) -> str:
    """A page of the report's style.

    name, facts: escaped here. data: JSON values for the script; without, there is none.
    """
    script, policy = "", ""
    if data is not None:
        code = template("report.js")
        policy = f"; script-src 'sha256-{base64.b64encode(sha256(code.encode()).digest()).decode()}'"
        script = f'<script type="application/json" id="data">{json_text(data)}</script>\n<script>{code}</script>\n'
    return Template(template("report.html")).substitute(
        name=escape(name),
        facts=" · ".join(escape(fact) for fact in facts if fact),
        script_policy=policy,
        body=body,
        script=script,
    )


def json_text(data: object) -> str:
    """JSON that can stand inside a <script>: nothing in it ends the element or opens a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"})


# --- the verdict -----------------------------------------------------------------------------------------------------------


def _verdict(metrics: Metrics, this: RoundMetrics) -> str:
    run = metrics["run"]
    said = headline(metrics).removeprefix(f"{run['name']}: ")  # the title says it
    measures = ""
    for name, *cells, last in measure_rows(this):
        difference, _, words = last.rpartition("  ")
        lines = (*cells, f"difference {difference}" if difference else "", words)
        drawn = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
        measures += f'<div class="measure"><p class="name">{escape(name)}</p>{drawn}</div>'
    answers = "".join(f"<p>{escape(line.strip())}</p>" for line in answer_lines(this))
    warned = [*warnings(this)]
    if "ended" in run:
        warned += [f"ended early: {run['ended']}", result_of(run)]
    listed = "".join(f"<li>{escape(line)}</li>" for line in warned)
    commands = "".join(
        f'<div><span>{name}</span><code id="copied-{number}">{escape(text)}</code>'
        f'<button type="button" data-copies="copied-{number}" aria-label="copy {name}" hidden>copy</button></div>'
        for number, (name, text) in enumerate(places(run).items())
    )
    return (
        f'<section aria-label="Verdict"><p class="lead">{escape(said)}</p>'
        + (f'<div class="measures">{measures}</div>' if measures else "")
        + answers
        + (f'<ul class="warnings" aria-label="Warnings">{listed}</ul>' if listed else "")
        + f'<div class="commands">{commands}</div>'
        + _costs(metrics)
        + (template("report_words.html") if measures else "")
        + "</section>"
    )


def _costs(metrics: Metrics) -> str:
    """What the run took in a line, and by stage when opened."""
    said = costs.cost_line(metrics)
    listed = "".join(map(_table, (table for table in costs.costs(metrics) if table.title.startswith(costs.BY_STAGE))))
    return f"<details><summary>{escape(said)}</summary>{listed}</details>" if listed else ""


def _figure_three(this: RoundMetrics) -> str:
    try:
        from selfsteer.reports import plots
    except ModuleNotFoundError:
        return NO_PLOTS
    plot = plots.figure_three(this, tables.data_sets(this))
    return "" if plot is None else f"<section><h2>Accuracy and on-policy probability</h2>{_figure(plot)}</section>"


def _figure(plot: Any) -> str:
    return f'<figure><div class="panels">{"".join(plot.svgs)}</div><figcaption>{escape(plot.caption)}</figcaption></figure>'


# --- what changed ----------------------------------------------------------------------------------------------------------


def _answers(reading: Reading) -> str:
    if not reading.answers:
        return ""
    about = f"Shown: {len(reading.answers)}, drawn at random."
    if reading.turned is not None:
        about = f"{reading.turned[0]:,} pass only after the alignment, {reading.turned[1]:,} only before it. {about}"
    first, more = reading.answers[:_UNFOLDED], reading.answers[_UNFOLDED:]
    drawn = "\n".join(map(_answer, first))
    if more:
        drawn += f"\n<details><summary>{len(more)} more</summary>{''.join(map(_answer, more))}</details>"
    what = "Answers before and after the alignment to held-out queries, without their principle."
    return f"<section><h2>What changed</h2><p>{what} {about}</p>{drawn}</section>"


def _answer(row: Mapping[str, Any]) -> str:
    marked = dict(zip(("before", "after"), differences(row["before"]["text"], row["after"]["text"]), strict=True))
    sides: list[str] = []
    for which, html in marked.items():
        reasons = [reason for reason in row[f"{which}_why_not"] if reason is not None]
        facts = [which, "; ".join(reasons) or "passes"]
        if row[which]["finish_reason"] == "length":
            facts.append("cut off")
        if f"{which}_told" in row:
            facts.append(f"{row[f'{which}_told']:.2f} nats a token for the first policy told to")
        box = _box(row[which]["text"], html)
        sides.append(f'<div class="{which}"><h3>{escape(" · ".join(facts))}</h3>{box}</div>')
    turns = _turns((turn["role"], turn["content"]) for turn in row["messages"])
    principle = f"<dl><dt>good principle</dt><dd>{escape(row['principles']['good'])}</dd></dl>"
    return f'<article>{turns}{principle}<div class="pair">{"".join(sides)}</div></article>'


def differences(first: str, second: str) -> tuple[str, str]:
    """Both texts as HTML, with the words that only the first has in <del> and those that only the second has in <ins>."""
    sides = tuple(re.findall(r"\S+\s*|\A\s+", text) for text in (first, second))
    if max(map(len, sides)) > _MOST_WORDS:
        return escape(first), escape(second)
    compared = SequenceMatcher(None, *([word.strip() for word in side] for side in sides), autojunk=False)
    html = ["", ""]
    for kind, *spans in compared.get_opcodes():
        for number, (tag, side) in enumerate(zip(("del", "ins"), sides, strict=True)):
            text = "".join(side[slice(*spans[2 * number : 2 * number + 2])])
            word = text.rstrip() if kind != "equal" else ""
            html[number] += f"<{tag}>{escape(word)}</{tag}>{text[len(word) :]}" if word else escape(text)
    return html[0], html[1]


# --- pairs -----------------------------------------------------------------------------------------------------------------


def _browser(reading: Reading, seed: int) -> str:
    if not reading.sets:
        return ""
    counts = [(len(each.pairs), each.of, each.name) for each in reading.sets]
    if reading.dropped:
        counts.append((len(reading.dropped), reading.dropped_of, "dropped rows"))
    held = ", ".join(f"all {of:,} {name}" if here == of else f"{here:,} of {of:,} {name}" for here, of, name in counts)
    sampled = any(here < of for here, of, _ in counts)
    about = f"This page holds {held}{', drawn at random' if sampled else ''}."
    examples = pick_examples(reading.sets[0].pairs, seed=seed) if reading.sets else []
    drawn = "\n".join(map(_example, examples))
    controls = template("report_controls.html")
    plain = f"<noscript><p>Without its script it shows {len(examples)} pairs, drawn at random.</p></noscript>"
    return (
        f'<section><h2>Pairs to read</h2><p>{escape(about)}</p>{plain}{controls}<div id="list">{drawn}</div>'
        '<button type="button" id="more" hidden>show more</button></section>'
    )


def _data(reading: Reading) -> object:
    """What the script shows; prompts and principles, which many pairs share, once."""
    prompts: dict[str, int] = {}
    principles: dict[tuple[str, str, str], int] = {}

    def listed(pair: Entry) -> dict[str, Any]:
        found: dict[str, Any] = dict(pair)
        found["prompt"] = prompts.setdefault(json.dumps(pair["prompt"]), len(prompts))
        named = (found.pop("quality", ""), found.pop("good", ""), found.pop("bad", ""))
        if any(named):
            found["principles"] = principles.setdefault(named, len(principles))
        return found

    def of(each: PairSet) -> dict[str, Any]:
        return {"name": each.name, "prefix": each.prefix, "of": each.of, "pairs": list(map(listed, each.pairs))}

    sets = list(map(of, reading.sets))
    if not sets:
        return None
    return {
        "sets": sets,
        "prompts": list(map(json.loads, prompts)),
        "principles": [dict(zip(("quality", "good", "bad"), named, strict=True)) for named in principles],
        "dropped": list(reading.dropped),
        "dropped_of": reading.dropped_of,
    }


def _example(pair: Entry) -> str:
    known = [("good principle", pair["good"]), ("bad principle", pair["bad"])] if "good" in pair and "bad" in pair else []
    if "verdict" in pair:
        known.append(("verdict", pair["verdict"]))
    listed = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in known)
    sides = _example_side("chosen", pair["chosen"]) + _example_side("rejected", pair["rejected"])
    return (
        f'<article>{_turns(pair["prompt"])}{f"<dl>{listed}</dl>" if listed else ""}<div class="pair">{sides}</div></article>'
    )


def _example_side(name: str, side: SideEntry) -> str:
    facts = [name]
    if "probability" in side:
        facts.append(f"{side['length']:,} tokens, on-policy probability {side['probability']:.3f}")
    if side["cut"]:
        facts.append("cut off")
    if "why_not" in side:
        facts.append(f"fails: {side['why_not']}" if side["why_not"] else "passes")
    return f'<div class="{name}"><h3>{escape(" · ".join(facts))}</h3>{_box(side["text"], escape(side["text"]))}</div>'


def _turns(turns: Iterable[Sequence[str]]) -> str:
    return "".join(
        f'<div class="turn"><h3>{escape(role)}</h3>{_box(content, escape(content))}</div>' for role, content in turns
    )


def _box(text: str, html: str) -> str:
    """A text that was sampled or asked. A long one scrolls, by keyboard too."""
    return f'<div class="text{" long" if len(text) > _LONG else ""}"{" tabindex=0" * (len(text) > _LONG)}>{html}</div>'


# --- the funnel, plots, tables ---------------------------------------------------------------------------------------------


def _funnel(metrics: Metrics) -> str:
    """What became of the rows, and the plots of every round."""
    funnels = "\n".join(map(table_html, (table for table in tables.run_tables(metrics) if table.funnel)))
    return funnels + "\n".join(_plots(metrics))


def _plots(metrics: Metrics) -> Iterator[str]:
    try:
        from selfsteer.reports import plots
    except ModuleNotFoundError:
        return
    for number, this in enumerate(metrics["rounds"], 1):
        drawn = plots.plots(this, tables.data_sets(this))
        if drawn:
            suffix = costs.round_suffix(number, metrics["rounds"])
            yield f"<section><h2>Training and distributions{suffix}</h2>{''.join(map(_figure, drawn))}</section>"


def write_run_figures(metrics: Metrics, folder: Path) -> list[Path]:
    """The plots of the page as SVG and PNG files; returns them. Raises ValueError without matplotlib, or without a plot."""
    try:
        from selfsteer.reports import plots
    except ModuleNotFoundError as error:
        raise ValueError(PLOTS_NEED) from error
    written: list[Path] = []
    for number, this in enumerate(metrics["rounds"], 1):
        data = tables.data_sets(this)
        drawn = [*filter(None, [plots.figure_three(this, data)]), *plots.plots(this, data)]
        written += plots.write_figures(drawn, folder / f"round-{number}" if len(metrics["rounds"]) > 1 else folder)
    if not written:
        raise ValueError(f"{metrics['run']['folder']}: nothing was measured that could be drawn")
    return written


def _tables(metrics: Metrics) -> str:
    folded = "\n".join(
        f"<details><summary>{escape(table.title)}</summary>{_table(table)}</details>"
        for table in tables.run_tables(metrics)
        if not table.funnel and not table.title.startswith(costs.BY_STAGE)
    )
    return f"<section><h2>All numbers</h2>{folded}</section>" if folded else ""


def table_html(table: Table) -> str:
    """The table as a section of a page."""
    return f"<section><h2>{escape(table.title)}</h2>{_table(table)}</section>"


def _table(table: Table) -> str:
    """The table with its note. The roles stay when a narrow screen shows rows as cards."""
    head = "".join(
        f'<th role="columnheader">{escape(column)}</th>' if column else '<td role="cell"></td>' for column in table.columns
    )
    body: list[str] = []
    for row in table.rows:
        if not row.cells:
            body.append(
                f'<tr role="row" class="group"><th role="rowheader" colspan="{len(table.columns) + 1}">'
                f"{escape(row.label)}</th></tr>"
            )
            continue
        cells = (
            f'<td role="cell" data-label="{escape(column)}">'
            + (f"<span>{escape(cell.value)}" if cell.value else "")
            + (f" <i>{escape(cell.interval)}</i>" if cell.interval else "")
            + ("</span>" if cell.value else "")
            + "</td>"
            for column, cell in zip(table.columns, row.cells, strict=True)
        )
        body.append(f'<tr role="row"><th role="rowheader">{escape(row.label)}</th>{"".join(cells)}</tr>')
    kind = ' class="last-is-text"' if table.left else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    if terms := _terms(table):
        listed = "".join(f"<dt>{escape(label)}</dt><dd>{escape(said)}</dd>" for label, said in terms.items())
        note += f"<details><summary>What the lines say</summary><dl>{listed}</dl></details>"
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(table.title)}"><table role="table"{kind}>'
        f'<thead role="rowgroup"><tr role="row"><td role="cell"></td>{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table></div>{note}'
    )


def _terms(table: Table) -> dict[str, str]:
    """What of the table's labels is explained, in their order."""
    known: dict[str, str] = yaml.safe_load(template("report_terms.yaml"))
    labels = (re.sub(" (chosen|rejected)$", "", label) for label in (*table.columns, *(row.label for row in table.rows)))
    return {label: known[label] for label in labels if label in known}


def _made_with(metrics: Metrics, reading: Reading) -> str:
    versions = metrics["run"].get("versions", {})
    known = [f"{name} {number}" for name, number in versions.items()]
    known += [f"commit {reading.commit}"] if reading.commit else []
    listed = escape(" · ".join(known))
    recipe = ""
    if reading.recipe:
        summary = "Recipe: what differs from the defaults"
        recipe = f'<details><summary>{summary}</summary><pre tabindex="0">{escape(reading.recipe)}</pre></details>'
    again = f"selfsteer run {shlex.quote(metrics['run']['folder'] + '/recipe.yaml')} output=NEW"
    # One that trained on given pairs has another command.
    sampled = any(PRINCIPLES in this.get("stages", {}) for this in metrics["rounds"])
    command = f"<p>The same again: <code>{escape(again)}</code></p>" if sampled else ""
    return f'<section><h2>Made with</h2><p class="facts">{listed}</p>{command}{recipe}</section>'
