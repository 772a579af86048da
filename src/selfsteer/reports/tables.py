"""From metrics to metrics.json and to tables. The shape is in `measures/metrics.py`.

The tables are built once (`tables`), and drawn by `print_tables` here and by `page.py` as HTML; what the terminal shows at
the end of a run is in `verdict.py`. Left out on purpose: measuring; a number that is not in the metrics is not in the
report.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from selfsteer.clock import PARTS, PRODUCTS, Part, most
from selfsteer.evaluations.length_controlled import WinRate
from selfsteer.measures.checks import PrincipleChecks, parse
from selfsteer.measures.displacement import displaced
from selfsteer.measures.estimates import METHOD, Estimate, share_estimate
from selfsteer.measures.gain import in_words as gain_in_words
from selfsteer.measures.headroom import in_words
from selfsteer.measures.metrics import (
    CheckedAnswers,
    ComparedAnswers,
    Contamination,
    Drift,
    Gain,
    GateResult,
    Headroom,
    HeadroomAt,
    Json,
    Measures,
    Metrics,
    PartSummary,
    RoundMetrics,
    RunFacts,
    StageSummary,
    find,
    from_plain,
    plain,
)
from selfsteer.runtime import counted, duration
from selfsteer.store.durable import read_object, write

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


DIRT = (
    ("cut off", "truncated"),
    ("refusal", "refusals"),
    ("leakage", "leakage"),
    ("other script", "language_mismatch"),
    ("near repeat", "near_repeated"),
)
"""Labels and keys of the measures of dirt that both sides have."""

JUDGES = (
    ("judge", "the judge"),
    ("implicit_reward", "implicit reward"),
    ("likelihood", "mean log-probability"),
    ("principle_consistency", "principle consistency"),
)
"""Keys of the judges' reports in `Measures`, and their names."""

VERDICTS = (
    ("accuracy", "accuracy"),
    ("of averaged orders", "averaged_accuracy"),
    ("ties", "ties"),
    ("orders disagree", "flips"),
    ("first shown preferred", "prefers_first"),
    ("the longer one wins", "longer_wins"),
    ("... of a perfect judge", "chosen_longer"),
    ("answers A or B", "mass"),
)
"""Labels and keys of what a judge's report tells."""

PRINCIPLES = 20
"""Of principles with checks, so many are listed; metrics.json has all."""

PBAA, GENERATOR, ALIGNMENT, SELECTED = "PBAA pairs", "generator pairs", "alignment pairs", "selected pairs"


def write_metrics(path: Path, metrics: Metrics) -> bool:
    """Write metrics.json, whole or not at all. Returns whether it says something new.

    Raises ValueError where a number is not finite.
    """
    content = json.dumps(plain(metrics), indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    if path.is_file() and path.read_bytes() == content:
        return False
    write(path, content)
    return True


def read_metrics(folder: Path) -> Metrics:
    """What `write_metrics` wrote into a run folder; what the run has made is where the folder is now.

    Raises FileNotFoundError where there is nothing to report, ValueError where the file is damaged.
    """
    path = folder / "metrics.json"
    if not path.exists():
        what = (
            "its run is not finished: selfsteer status shows where it is"
            if (folder / "run.json").exists()
            else "neither a run nor a comparison is there"
        )
        raise FileNotFoundError(f"{path} is missing: {what}")
    found = read_object(path)
    if any(not isinstance(found.get(key), kind) for key, kind in (("run", dict), ("rounds", list))):
        raise ValueError(f"{path}: not the metrics of a run; delete it and run the same command again")
    metrics = cast(Metrics, from_plain(found))
    for this in metrics["rounds"]:
        for key in ("gates", "stop_when"):
            if key in this:
                this[key] = [GateResult(**each) for each in cast("dict[str, list[dict[str, Any]]]", this)[key]]
    run, before = metrics["run"], Path(metrics["run"]["folder"])
    run["folder"] = str(folder)
    for key in ("policy_folder", "pairs"):
        if (made := run.get(key)) is not None and Path(made).is_relative_to(before):
            run[key] = str(folder / Path(made).relative_to(before))
    return metrics


def last_round(metrics: Metrics) -> RoundMetrics:
    """The round that a reader is told of first; empty where there is none."""
    return metrics["rounds"][-1] if metrics["rounds"] else RoundMetrics()


def print_tables(metrics: Metrics, console: Console) -> None:
    """Print all tables of a run."""
    for table in run_tables(metrics):
        _print(table, console)


def print_costs(metrics: Metrics, *, session: float, console: Console | None = None) -> None:
    """Print where the time of a run went. session: seconds of the command that ends now."""
    console = console or console_of()
    rounds = metrics["rounds"]
    for table in costs(metrics):
        _print(table, console)
    stages = sum(stage["seconds"] for this in rounds for stage in this.get("stages", {}).values())
    said = f"stages {duration(stages)}, over all sessions; this command {duration(session)}, with libraries, checks and page"
    console.print(Text(said), soft_wrap=True)


def costs(metrics: Metrics) -> Iterator[Table]:
    """What every round took (`cost_tables`)."""
    rounds = metrics["rounds"]
    for number, this in enumerate(rounds, 1):
        yield from cost_tables(this, f", round {number}" if len(rounds) > 1 else "")


def cost_line(metrics: Metrics) -> str:
    """What the stages of all rounds took: time, tokens, memory at the peak, disk."""
    stages = [stage for this in metrics["rounds"] for stage in this.get("stages", {}).values()]
    said = [f"Cost: {duration(sum(stage['seconds'] for stage in stages))}"]
    for part, name in (("sample", "sampled"), ("score", "scored"), ("forward", "trained")):
        tokens = sum(stage.get("parts", {}).get(part, _NOTHING)["tokens"] for stage in stages)
        said += [f"{tokens:,} tokens {name}"] if tokens else []
    peaks = most(*(stage.get("memory", {}) for stage in stages))
    said += [f"{peaks[where] / 1e9:.1f} GB of {where.upper()}" for where in ("ram", "gpu") if peaks.get(where)]
    return ", ".join([*said, f"{sum(stage.get('disk', 0) for stage in stages) / 1e9:.1f} GB of disk"])


def run_tables(metrics: Metrics) -> Iterator[Table]:
    """All tables of a run."""
    yield from tables(metrics["rounds"])
    if "evaluation" in metrics:
        yield evaluation_table(metrics["evaluation"])


def print_evaluation(found: Json, title: str, console: Console | None = None) -> None:
    """Print what an evaluation found."""
    _print(evaluation_table(found, title), console or console_of())


def print_annotated(found: WinRate, who: str, console: Console | None = None) -> None:
    """Print the win rates of recorded judgements."""
    controlled = "published" if found.formula == "length_controlled_v1" else "without difficulty, not the leaderboard's"
    rows = (
        Row("win rate", (cell(found.win_rate, "share"), Cell(f"{found.win_rate.n:,}"))),
        Row("length-controlled win rate", (cell(found.length_controlled, "share"), Cell(f"formula: {controlled}"))),
        Row("... its published standard error", (cell(found.published_error, "share"), Cell(""))),
        Row("wins, losses, draws", (Cell(f"{found.wins:,}, {found.baseline_wins:,}, {found.draws:,}"), Cell(""))),
        Row("no verdict", (cell(found.no_verdict, "number"), Cell(""))),
    )
    _print(Table(who, ("", "items"), rows, METHOD, left=True), console or console_of())


def print_judged(reports: Mapping[str, Json], title: str, console: Console | None = None) -> None:
    """Print what a judge or a reward model says of several sets of pairs."""
    found: list[Json] = list(map(from_plain, reports.values()))
    rows = [Row("pairs", tuple(cell(report.get("pairs"), "number") for report in found))]
    rows += [Row(label, tuple(cell(report.get(key), "share") for report in found)) for label, key in VERDICTS]
    kept = tuple(row for row in rows if any(cell.value for cell in row.cells))
    _print(Table(title, tuple(reports), kept, METHOD), console or console_of())


def print_reward_bench(found: Json, name: str, console: Console | None = None) -> None:
    """Print a reward model's numbers on one benchmark."""
    found = from_plain(found)
    if found["format"] == "pairs":
        print_judged({name: found}, "Labelled pairs", console)
        return
    rows = [Row(subset, (cell(value, "share"), cell(value.n, "number"))) for subset, value in found["subsets"].items()]
    rows += [Row(section, (cell(value, "share"), Cell(""))) for section, value in found["sections"].items()]
    if found["score"] is not None:
        rows.append(Row("score", (cell(found["score"], "share"), Cell(""))))
    if found["kappa"] is not None:
        rows.append(Row("Cohen's kappa", (cell(found["kappa"], "number"), Cell(""))))
    said = [f"{found['items']:,} of {found['of']:,} items scored", f"{found['ties']:,} ties"]
    said += [f"{count:,} not scored ({reason})" for reason, count in found["refused"].items()]
    said += [f"no score: {len(found['missing'])} subsets are missing"] if found["missing"] else []
    title = f"{name} ({found['format']})"
    _print(Table(title, ("", "items"), tuple(rows), f"{METHOD} {'; '.join(said)}."), console or console_of())


def print_measures(measures: Measures, console: Console | None = None) -> None:
    """Print the measures of one set of pairs."""
    _print(measures_table({"pairs": measures}), console or console_of())


def table_text(table: Table) -> str:
    """The table as plain text of 100 columns."""
    text = io.StringIO()
    _print(table, Console(file=text, width=100))
    return text.getvalue().rstrip()


def markdown(table: Table) -> str:
    """The table as Markdown, under a heading."""

    def cells(values: Iterator[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    alignments = ["---:"] * len(table.columns)
    if table.left:
        alignments[-1] = ":---"
    lines = [cells(iter(("", *table.columns))), cells(iter((":---", *alignments)))]
    for row in table.rows:
        if row.cells:
            lines.append(cells(iter((row.label, *(" ".join(filter(None, cell)) for cell in row.cells)))))
        else:
            lines.append(cells(iter((f"**{row.label}**", *[""] * len(table.columns)))))
    note = f"\n\n{table.note}" if table.note else ""
    return f"### {table.title}\n\n" + "\n".join(lines) + note


def result_of(run: RunFacts) -> str:
    """Whose policy the result of a run is that ended early."""
    return (
        f"the result is the policy of round {run['policy_round']}" if "policy_round" in run else "there is no aligned policy"
    )


def tables(rounds: Sequence[RoundMetrics]) -> Iterator[Table]:
    """All tables of a run, round by round."""
    for number, this in enumerate(rounds, 1):
        suffix = f", round {number}" if len(rounds) > 1 else ""
        if "stages" in this:
            yield _stages(this, f"Stages{suffix}")
            yield from cost_tables(this, suffix)
        if "headroom" in this:
            yield _headroom(this["headroom"], f"Headroom before the generator{suffix}")
        if "gain" in this:
            yield _gain(this["gain"], f"What the generator's training changed{suffix}")
        columns = data_sets(this)
        if columns:
            yield measures_table(columns, _differences(this), title=f"Preference data{suffix}")
        yield from _checks(this, suffix)
        if "contamination" in this:
            yield _contamination(this["contamination"], f"Overlap of the queries with evaluation files{suffix}")
        if "drift" in this:
            yield _drift(this["drift"], f"Drift since round {number - 1}")
        if "gates" in this:
            yield gates_table(this["gates"], title=f"Gates{suffix}")
        if "stop_when" in this:
            yield _stops_table(this["stop_when"], f"What would end the rounds{suffix}")
        if "generator" in this or "policy" in this:
            yield _trainings(this, f"Training{suffix}")
        if "answers" in this:
            yield _answers(this["answers"], f"Answers to held-out queries that follow their principle{suffix}")


def data_sets(this: RoundMetrics) -> dict[str, Measures]:
    """The sets of alignment pairs that a round measured, by the name they have in tables and plots."""
    columns: dict[str, Measures] = {}
    if "pbaa" in this:
        columns[PBAA] = this["pbaa"]
    if "alignment" in this:
        columns[GENERATOR if "generator" in this else ALIGNMENT] = this["alignment"]
    if "selected" in this:
        columns[SELECTED] = this["selected"]
    return columns


def gates_table(results: Sequence[GateResult], *, title: str = "Gates") -> Table:
    """What each gate of the recipe measured, and whether that is within its bound."""
    return _bounds_table(results, title, "bound", lambda found: "passed" if found.passed else f"FAILED: {found.reason}")


def evaluation_table(found: Json, title: str = "Evaluation") -> Table:
    """Benchmarks of one model, or of two side by side; parts of a task (MMLU's subjects) are in the JSON alone."""
    found = from_plain(found)
    both = "before" in found["models"]
    rows: list[Row] = []
    for row in found["rows"]:
        if row["part_of"] is not None:
            continue
        form = cast(Form, row["form"])
        items = f"{row['items']:,}" + (f" of {row['of']:,}" if row["limited"] else "")
        remarks = [*row["remarks"], *([f"judge: {row['judge']}"] if row["judge"] else [])]
        figures = (cell(row["before"], form), cell(row["after"], form), cell(row["difference"], form, signed=True))
        cells = (*(figures if both else figures[1:2]), Cell(items), Cell("; ".join(remarks)))
        rows.append(Row(f"{row['task']}, {row['metric']}", cells))
    seconds = ", ".join(f"{when} {duration(model['seconds'])}" for when, model in found["models"].items())
    notes = dict.fromkeys(
        note
        for model in found["models"].values()
        for task in model["tasks"]
        if not task["part_of"]
        for note in task["notes"]
    )
    said = f"{'; '.join(notes)}. " if notes else ""
    note = f"{METHOD} Differences are of the same items. {said}Time: {seconds}."
    columns = ("before", "after", "after - before") if both else ("",)
    return Table(title, (*columns, "items", "remarks"), tuple(rows), note, left=True)


def _stops_table(results: Sequence[GateResult], title: str) -> Table:
    return _bounds_table(results, title, "condition", lambda found: "HOLDS" if found.passed else "does not hold")


def _bounds_table(results: Sequence[GateResult], title: str, bound: str, said: Callable[[GateResult], str]) -> Table:
    rows = [Row(each.name, (cell(each.value, "number"), Cell(each.bound), Cell(said(each)))) for each in results]
    return Table(title, ("measured", bound, ""), tuple(rows), METHOD, left=True)


def _differences(this: RoundMetrics) -> Json | None:
    """How far the alignment pairs are above PBAA's, by measure as in `measures_table`; of the queries that both have."""
    compared = this.get("comparison")
    judged = {judge: found["difference"] for judge, found in this.get("judged_comparison", {}).items()}
    if compared is None or not compared.get("queries"):
        return None
    return {**compared, **judged}


def measures_table(columns: Mapping[str, Measures], differences: Json | None = None, *, title: str = "Pairs") -> Table:
    """Sets of pairs side by side and, with `differences`, how far the last is above the first."""
    sets = list(columns.values())

    def line(label: str, path: str, form: Form = "number", difference: str = "") -> Row:
        cells = tuple(cell(find(measures, path), form) for measures in sets)
        if differences is not None:
            cells += (cell(find(differences, difference), form, signed=True) if difference else Cell(""),)
        return Row(label, cells)

    names = {"judge": "checks"} if any("checks" in measures for measures in sets) else {}
    unit = next((found for found in (find(measures, "length.unit") for measures in sets) if found), "words")
    groups = (
        ("", [line("pairs", "pairs")]),
        (
            "on-policy probability",
            [line(side, f"on_policy.{side}", difference=side) for side in ("chosen", "rejected", "all")],
        ),
        (
            "log-probability margin",
            [
                line("summed", "margin.sum"),
                line("per token", "margin.per_token", difference="margin_per_token"),
                line("chosen more probable", "margin.chosen_above", "share"),
                line("correlation with length", "margin.length_correlation"),
            ],
        ),
        (
            f"length in {unit}",
            [
                line("chosen", "length.chosen"),
                line("rejected", "length.rejected"),
                line("chosen / rejected", "length.ratio"),
                line("chosen longer", "length.chosen_longer", "share"),
            ],
        ),
        *(
            (
                f"judged by {names.get(key, name)}",
                [*_verdicts(line, key), *_unjudged(sets, key, blank=bool(differences))],
            )
            for key, name in JUDGES
        ),
        (
            "variety",
            [
                line("distinct-2 chosen", "variety.chosen.distinct_2"),
                line("distinct-2 rejected", "variety.rejected.distinct_2"),
                line("repetition chosen", "variety.chosen.repetition", "share"),
                line("repetition rejected", "variety.rejected.repetition", "share"),
                line("overlap in a pair", "overlap", "share"),
            ],
        ),
        (
            "dirt",
            [line(f"{name} {side}", f"{key}.{side}", "share") for name, key in DIRT for side in ("chosen", "rejected")]
            + [line("nearly identical", "near_identical", "share"), line("repeated pairs", "repeated_pairs")],
        ),
    )
    rows: list[Row] = []
    for heading, lines in groups:
        measured = [row for row in lines if any(cell.value for cell in row.cells)]
        if measured and heading:
            rows.append(Row(heading))
        rows += measured
    note = METHOD
    if GENERATOR in columns:
        note = f"PBAA: from the policy, steered by principle only; generator: from the policy trained with L_SSO. {note}"
    if differences:
        said = (
            "held-out queries that both have"
            if differences.get("held_out")
            else ("queries that both have; the generator was trained on some of them")
        )
        note += (
            f" Difference: generator - PBAA, per query, over the {differences['queries']:,} {said}; the columns beside"
            " it are over all pairs."
        )
    if SELECTED in columns:
        note += " The policy is aligned on the selected pairs; judges have seen those before the selection."
    return Table(title, (*columns, "difference") if differences is not None else tuple(columns), tuple(rows), note)


def _verdicts(line: Callable[[str, str, Form, str], Row], judge: str) -> list[Row]:
    counted = line("pairs judged", f"{judge}.pairs", "number", "")
    return [
        counted,
        *(line(label, f"{judge}.{key}", "share", judge if key == "accuracy" else "") for label, key in VERDICTS),
    ]


def _unjudged(sets: Sequence[Measures], judge: str, *, blank: bool) -> list[Row]:
    """Pairs without a verdict, by reason."""
    found = [cast("Mapping[str, int]", find(measures, f"{judge}.errors") or {}) for measures in sets]
    reasons = dict.fromkeys(reason for errors in found for reason in errors)
    return [
        Row(f"no verdict: {reason}", (*(cell(errors.get(reason), "number") for errors in found), *[Cell("")] * blank))
        for reason in reasons
    ]


def _stages(this: RoundMetrics, title: str) -> Table:
    rows: list[Row] = []
    for name, stage in this.get("stages", {}).items():
        dropped = counted(stage["dropped"]) or "none"
        texts = (f"{stage['wanted']:,}", f"{stage['kept']:,}", duration(stage["seconds"]), dropped)
        rows.append(Row(name, tuple(map(Cell, texts))))
    return Table(title, ("wanted", "kept", "time", "dropped"), tuple(rows), _spared(this), left=True, funnel=True)


def _spared(this: RoundMetrics) -> str:
    """Why stage 2 answers fewer queries than there are; "" where it answers all."""
    stages = this.get("stages", {})
    if "1-principles" not in stages or "2-responses" not in stages:
        return ""
    queries, answered = stages["1-principles"]["kept"], stages["2-responses"]["wanted"]
    if answered >= queries:
        return ""
    return (
        f"2-responses has the {answered:,} queries that the generator is trained on; the {queries - answered:,} others are"
        " there to measure (queries.holdout, the displacement meter), or more than generator.queries."
    )


def cost_tables(this: RoundMetrics, suffix: str = "") -> Iterator[Table]:
    """What each part of the work took, over all stages and in each; nothing where it was not recorded."""
    stages = this.get("stages", {})
    known = {name: stage.get("parts", {}) for name, stage in stages.items()}
    found = [part for part in PARTS if any(part in parts for parts in known.values())]
    whole = sum(stage["seconds"] for stage in stages.values())
    if not found or not whole:
        return
    seconds = {part: sum(parts.get(part, _NOTHING)["seconds"] for parts in known.values()) for part in found}
    tokens = {part: sum(parts.get(part, _NOTHING)["tokens"] for parts in known.values()) for part in found}

    def line(label: str, took: float, counted: int = 0) -> Row:
        rate = f"{counted / took:,.0f}" if counted and took else ""
        return Row(label, tuple(map(Cell, (duration(took), f"{took / whole:.1%}", f"{counted:,}" if counted else "", rate))))

    rows = [line(part, seconds[part], tokens[part]) for part in found]
    rows += [line("all else", max(0.0, whole - sum(seconds.values()))), line("all", whole)]
    products = [part for part in found if part in PRODUCTS]
    share = sum(seconds[part] for part in products) / whole
    note = f"{share:.0%} in model products: {', '.join(products)}. Tokens are of responses."
    yield Table(f"Where the time went{suffix}", ("time", "share", "tokens", "tokens a second"), tuple(rows), note)

    def of_stage(name: str, stage: StageSummary) -> Row:
        took = {group: sum(known[name].get(part, _NOTHING)["seconds"] for part in parts) for group, parts in _COSTS.items()}
        took |= {"else": max(0.0, stage["seconds"] - sum(took.values())), "all": stage["seconds"]}
        held = {"disk": stage.get("disk", 0), **stage.get("memory", {})}
        sizes = (_megabytes(held[where]) if held.get(where) else "" for where in places)
        return Row(name, tuple(map(Cell, (*(f"{each:.1f}" if each >= 0.05 else "" for each in took.values()), *sizes))))

    known_places = {"disk"}.union(*(stage.get("memory", {}) for stage in stages.values()))
    places = [each for each in _PLACES if each in known_places]
    rows = [of_stage(name, stage) for name, stage in stages.items()]
    note = "Memory: at the peak, without servers." if len(places) > 1 else ""
    columns = (*_COSTS, "else", "all", *(f"MB {where}" for where in places))
    yield Table(f"{BY_STAGE}{suffix}", columns, tuple(rows), note)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.{0 if size >= 100e6 else 1}f}"


BY_STAGE = "Seconds and megabytes by stage"
"""How the title of that table begins."""

_PLACES = ("disk", "ram", "gpu")


_NOTHING = PartSummary(seconds=0.0, tokens=0)

_COSTS: Mapping[str, tuple[Part, ...]] = {
    "load": ("load", "render"),
    "sample": ("sample",),
    "score": ("score",),
    "train": ("forward", "backward", "optimizer"),
    "measure": ("measure",),
    "save": ("checkpoint", "journal", "seal"),
}


def _headroom(found: Headroom, title: str) -> Table:
    def line(label: str, part: Headroom | HeadroomAt) -> Row:
        figures = (cell(part[key], "number", signed=key == "all") for key in ("original", "good", "bad", "all"))
        return Row(label, (*figures, cell(part["all"].n, "number")))

    rows = [
        line("whole responses", found),
        *(line(f"tokens {each['first']} to {each['last'] or 'the end'}", each) for each in found["positions"]),
    ]
    return Table(title, ("y_o", "y+", "y-", "y_o - mean of both", "queries"), tuple(rows), f"{in_words(found)} {METHOD}")


def _gain(found: Gain, title: str) -> Table:
    rows = [
        Row(label, (cell(find(found, key), "number", signed=key != "following_before"),))
        for label, key in (
            ("on-policy log-probability", "gain"),
            ("of it shown without a principle: sharpening, displacement", "same_prompt"),
            ("of it steering", "steering"),
            ("own principle above the opposite one", "following"),
            ("the same of the policy, no change", "following_before"),
            ("entropy of what is sampled from", "entropy"),
            ("log-probability of the policy's answers to bare queries", "displacement"),
        )
    ]
    note = (
        f"{gain_in_words(found).capitalize()}. Expectations over the whole vocabulary at {found['contexts']:,} contexts of"
        f" {found['queries']:,} held-out queries, nats a token, generator - policy. {METHOD}"
    )
    return Table(title, ("change",), tuple(rows), note)


def _checks(this: RoundMetrics, suffix: str) -> Iterator[Table]:
    """What checks say of each set of pairs, and of each principle."""
    sets = {name: measures for name, measures in data_sets(this).items() if "checks" in measures}
    if not sets:
        return
    original = this.get("steering", Measures()).get("checks")
    reports = [measures["checks"] for measures in sets.values() if "checks" in measures]

    def line(label: str, key: str, form: Form = "share") -> Row:
        return Row(label, tuple(cell(report.get(key), form) for report in reports))

    rows = [
        line("pairs", "pairs", "number"),
        *(
            [line("pairs without a check", "unchecked", "number")]
            if any(report.get("unchecked") for report in reports)
            else []
        ),
        line("chosen passes", "chosen"),
        line("rejected passes", "rejected"),
        line("chosen passes, rejected does not", "win"),
        line("the reverse", "loss"),
        line("both pass", "both_pass"),
        line("neither passes", "both_fail"),
    ]
    note = METHOD
    if original is not None and "original" in original:
        bare = cell(original["original"], "share")
        note = f"Of the policy's answers to the bare queries {bare.value} {bare.interval} pass. {note}"
    yield Table(f"Responses that pass the checks of their principle{suffix}", tuple(sets), tuple(rows), note)
    last = next(reversed(sets))
    listed = reports[-1].get("principles", [])[:PRINCIPLES]
    if listed:
        yield _principles(listed, f"{last[0].upper()}{last[1:]} by principle{suffix}")


def _principles(listed: Sequence[PrincipleChecks], title: str) -> Table:
    rows = (
        Row(
            _short(each["principle"]),
            (
                Cell(f"{each['pairs']:,}"),
                cell(share_estimate(each["chosen"], each["pairs"]), "share"),
                cell(share_estimate(each["rejected"], each["pairs"]), "share"),
                Cell(f"USELESS: {each['useless']}" if "useless" in each else ""),
            ),
        )
        for each in listed
    )
    return Table(title, ("pairs", "chosen passes", "rejected passes", ""), tuple(rows), METHOD, left=True)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _answers(found: CheckedAnswers, title: str) -> Table:
    columns = ("before", "after", "change", "prompted")

    def line(label: str, compared: ComparedAnswers, form: Form = "share") -> Row:
        return Row(label, tuple(cell(find(compared, key), form, signed=key == "change") for key in columns))

    rows = [line("all checks" if len(found["checks"]) > 1 else "its check", found["passing"])]
    if len(found["checks"]) > 1:
        rows += (line(f"  {check_label(each['check'])}", each) for each in found["checks"][:PRINCIPLES] if "check" in each)
    rows.append(line("cut off", found["truncated"]))
    likely = ""
    if "told" in found:
        rows.append(line("log-probability when told to", found["told"], "number"))
        likely = (
            " Log-probability: of a token of the answer, on average (nats), for that policy told to. What it would hardly"
            " say keeps to the principle in form only."
        )
    note = (
        f"{found['queries']:,} queries that trained nothing. Before and after the alignment: the bare query, without the"
        " principle. Told to: the first policy with the principle as its system message, which is what there is to win."
        f"{likely} {METHOD}"
    )
    return Table(title, ("before alignment", "after", "change", "told to"), tuple(rows), note)


def check_label(text: str) -> str:
    """A check, given as canonical JSON, for people."""
    return parse(json.loads(text), "a sealed row").label


def _contamination(found: Contamination, title: str) -> Table:
    rows = [Row("share of the queries", (cell(found["share"], "share"),))]
    rows += (Row(file, (Cell(f"{count:,}"),)) for file, count in found["files"].items())
    return Table(
        title, ("overlapping",), tuple(rows), "Queries that share 13 words in a row, or the whole of a shorter text."
    )


def _drift(drift: Drift, title: str) -> Table:
    changes = cast("dict[str, Estimate]", drift)
    rows = tuple(Row(key.replace("_", " "), (cell(value, "number", signed=True),)) for key, value in changes.items())
    note = "This round - the round before. The intervals take the rounds as independent samples (MOVER, Newcombe 1998)."
    return Table(title, ("change",), rows, note)


def _saved(side: Json) -> str:
    saving = side.get("saving", {})
    margins = saving.get("trained"), saving.get("delivered")
    return "" if None in margins else " -> ".join(f"{margin:.3f}" for margin in margins)


def _moved(side: Json, name: str) -> Cell:
    nats, token = (find(side, f"displacement.{key}") for key in (name, f"{name}_token"))
    return (
        Cell("")
        if nats is None
        else Cell(f"{nats.mean:+.3f} ({token.mean:+.5f})", cell(nats, "number", signed=True).interval)
    )


def _measured(side: Json) -> str:
    found = find(side, "displacement.unrelated")
    return "" if found is None else f"{found.n:,}"


def _trainings(this: RoundMetrics, title: str) -> Table:
    dual = "bad_generator" in this
    trainings = (
        ("generator of chosen" if dual else "data generator", "generator"),
        ("generator of rejected", "bad_generator"),
        ("policy", "policy"),
    )
    names = [(column, this[key]) for column, key in trainings if key in this]
    sides = [cast(Json, summary) for _, summary in names]

    def line(label: str, path: str, form: Form = "number") -> Row:
        return Row(label, tuple(cell(find(side, path), form) for side in sides))

    def texts(label: str, values: Iterator[str]) -> Row:
        return Row(label, tuple(map(Cell, values)))

    def ends(name: str, places: int) -> Iterator[str]:
        """A value of the first and of the last step that has it."""
        for side in sides:
            values = [entry[name] for entry in side.get("curve", []) if name in entry]
            yield " -> ".join(f"{values[i]:.{places}f}" for i in (0, -1)) if values else ""

    rows = (
        line("optimizer steps", "steps"),
        texts("time", (duration(side["seconds"]) if "seconds" in side else "" for side in sides)),
        line("tokens a second", "tokens_per_second"),
        texts("loss, first -> last", ends("loss", 4)),
        texts("weight of a pair", ends("weight", 3)),
        texts("share of the SFT term", ends("sft_share", 3)),
        Row("on its own pairs"),
        line("pairs measured", "reward.pairs"),
        line("accuracy before", "reward.before.accuracy", "share"),
        line("accuracy after", "reward.after.accuracy", "share"),
        line("log-prob. margin before", "reward.before.margin"),
        line("log-prob. margin after", "reward.after.margin"),
        line("reward margin", "reward.reward.margin"),
        line("reward accuracy", "reward.reward.accuracy", "share"),
        line("reward of chosen", "reward.reward.chosen"),
        line("reward of rejected", "reward.reward.rejected"),
        Row("moved in training, nats (a token)"),
        *(
            Row(f"{name} responses", tuple(_moved(side, name) for side in sides))
            for name in ("chosen", "rejected", "unrelated")
        ),
        texts("unrelated ones measured", (_measured(side) for side in sides)),
        line("too far at step", "displacement.crossed"),
        Row("as delivered"),
        texts("saved in", (side["saving"]["dtype"] if "saving" in side else "" for side in sides)),
        texts("margin in training -> as saved", (_saved(side) for side in sides)),
    )
    warnings = [
        f"{name} {warning}. "
        for name, summary in names
        if "displacement" in summary and (warning := displaced(summary["displacement"])) is not None
    ]
    note = "".join(warnings) + (
        "Reward: beta * log(pi / pi_ref), zero before training. "
        f"Accuracy before and after: share of pairs whose chosen response is the more probable one. {METHOD}"
    )
    return _filled(Table(title, tuple(name for name, _ in names), rows, note))


def print_plan(found: Mapping[str, Any]) -> None:
    """Print what a run will take (`plan.Plan`)."""

    def size(number: int) -> Cell:
        return Cell(f"{number / 1e9:.2f}" if number else "")

    def row(stage: Mapping[str, Any]) -> Row:
        counts = (Cell(f"{stage[name]:,}" if stage[name] else "") for name in ("samples", "sampled", "scored", "trained"))
        time = "" if stage["seconds"] is None else duration(stage["seconds"])
        disk = stage["disk"] + stage["passing_disk"]
        return Row(stage["stage"], (*counts, size(stage["memory"]), size(disk), Cell(time)))

    rates = ", ".join(f"{rate:,.0f} {name}" for name, rate in found["rates"].items() if rate is not None)
    whole = "not known" if found["seconds"] is None else duration(found["seconds"])
    free = "not known" if found["memory_free"] is None else f"{found['memory_free'] / 1e9:.1f}"
    shard = "" if found["shard"] is None else f"shard {found['shard']} of "
    note = (
        "Responses; tokens sampled, scored and trained on; memory and disk in GB.\n"
        f"{shard}{found['queries']:,} queries, responses of {found['response']:.0f} tokens; tokens a second:"
        f" {rates or 'not measured'}. Memory at the peak {found['memory'] / 1e9:.1f} GB"
        f" ({found['memory_most'] / 1e9:.1f} GB if every response is as long as it may be) of {free} free, disk"
        f" {found['disk'] / 1e9:.1f} GB of {found['disk_free'] / 1e9:.0f} free. Time of {found['rounds']} round(s): {whole},"
        " on this machine as busy as it was while these rates were measured; judges, benchmarks, 4-gain and 5-quality are"
        " not in it."
    )
    columns = ("responses", "sampled", "scored", "trained", "memory", "disk", "time")
    console = console_of()
    _print(Table(f"Plan for {found['model']}", columns, tuple(map(row, found["stages"])), note), console)
    for warning in found["warnings"]:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)
    for problem in found["problems"]:
        console.print(Text(f"! {problem}", style="bold red"), soft_wrap=True)


def console_of() -> Console:
    """Standard output; where it is no terminal, of 100 columns unless COLUMNS says otherwise."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=100)


def _print(table: Table, console: Console) -> None:
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
            rest = _filled(_columns(table, slice(count, None)))
            yield from _fitting(rest._replace(title=f"{table.title.removesuffix(_MORE)}{_MORE}"), console)


_MORE = ", continued"


def _columns(table: Table, columns: slice) -> Table:
    rows = tuple(Row(row.label, row.cells[columns]) for row in table.rows)
    return table._replace(columns=table.columns[columns], rows=rows)


def _filled(table: Table) -> Table:
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
