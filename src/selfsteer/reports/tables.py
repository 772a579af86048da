"""What was measured, as tables. The shape of the metrics is in `measures/metrics.py`.

The tables are built once (`tables`), and drawn by `drawing.py` and by `page.py` as HTML; what the terminal shows at the end
of a run is in `verdict.py`. Left out on purpose: measuring; a number that is not in the metrics is not in the report.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

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
    RoundMetrics,
    TrainingSummary,
    find,
    from_plain,
)
from selfsteer.reports.costs import cost_tables, round_suffix
from selfsteer.reports.drawing import Cell, Form, Row, Table, cell, figures, filled, print_table
from selfsteer.runtime import counted, duration
from selfsteer.stages.status import PRINCIPLES, RESPONSES

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

LISTED = 20
"""Of principles with checks, so many are listed; metrics.json has all."""

PBAA, GENERATOR, ALIGNMENT, SELECTED = "PBAA pairs", "generator pairs", "alignment pairs", "selected pairs"


def last_round(metrics: Metrics) -> RoundMetrics:
    """The round that a reader is told of first; empty where there is none."""
    return metrics["rounds"][-1] if metrics["rounds"] else RoundMetrics()


def run_tables(metrics: Metrics) -> Iterator[Table]:
    """All tables of a run."""
    yield from tables(metrics["rounds"])
    if "evaluation" in metrics:
        yield evaluation_table(metrics["evaluation"])


def print_evaluation(found: Json, title: str) -> None:
    """Print what an evaluation found."""
    print_table(evaluation_table(found, title))


def print_annotated(found: WinRate, who: str) -> None:
    """Print the win rates of recorded judgements."""
    controlled = "published" if found.formula == "length_controlled_v1" else "without difficulty, not the leaderboard's"
    rows = (
        Row("win rate", (cell(found.win_rate, "share"), Cell(f"{found.win_rate.n:,}"))),
        Row("length-controlled win rate", (cell(found.length_controlled, "share"), Cell(f"formula: {controlled}"))),
        Row("... its published standard error", (cell(found.published_error, "share"), Cell(""))),
        Row("wins, losses, draws", (Cell(f"{found.wins:,}, {found.baseline_wins:,}, {found.draws:,}"), Cell(""))),
        Row("no verdict", (cell(found.no_verdict, "number"), Cell(""))),
    )
    print_table(Table(who, ("", "items"), rows, METHOD, left=True))


def print_judged(reports: Mapping[str, Json], title: str) -> None:
    """Print what a judge or a reward model says of several sets of pairs."""
    found: list[Json] = list(map(from_plain, reports.values()))
    rows = (figures("pairs", found, "pairs"), *(figures(label, found, key, "share") for label, key in VERDICTS))
    print_table(filled(Table(title, tuple(reports), rows, METHOD)))


def print_reward_bench(found: Json, name: str) -> None:
    """Print a reward model's numbers on one benchmark."""
    found = from_plain(found)
    if found["format"] == "pairs":
        left_out = f" ({counted(found['dropped'])} dropped)" if found["dropped"] else ""
        print_judged({name: found}, f"Labelled pairs{left_out}")
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
    print_table(Table(title, ("", "items"), tuple(rows), f"{METHOD} {'; '.join(said)}."))


def print_measures(measures: Measures) -> None:
    """Print the measures of one set of pairs."""
    print_table(measures_table({"pairs": measures}))


def tables(rounds: Sequence[RoundMetrics]) -> Iterator[Table]:
    """All tables of a run, round by round."""
    for number, this in enumerate(rounds, 1):
        suffix = round_suffix(number, rounds)
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
    """Sets of pairs side by side and, with `differences`, how far the generator's are above PBAA's."""
    sets = list(columns.values())

    def line(label: str, path: str, form: Form = "number", difference: str = "") -> Row:
        row = figures(label, sets, path, form)
        if differences is None:
            return row
        return Row(label, (*row.cells, cell(find(differences, difference), form, signed=True)))

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
    rows = tuple(row for heading, lines in groups for row in ([Row(heading)] if heading else []) + lines)
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
    return filled(Table(title, (*columns, "difference") if differences is not None else tuple(columns), rows, note))


def _verdicts(line: Callable[[str, str, Form, str], Row], judge: str) -> list[Row]:
    counted = line("pairs judged", f"{judge}.pairs", "number", "")
    shares = (line(label, f"{judge}.{key}", "share", judge if key == "accuracy" else "") for label, key in VERDICTS)
    return [counted, *shares]


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
    if PRINCIPLES not in stages or RESPONSES not in stages:
        return ""
    queries, answered = stages[PRINCIPLES]["kept"], stages[RESPONSES]["wanted"]
    if answered >= queries:
        return ""
    return (
        f"{RESPONSES} has the {answered:,} queries that the generator is trained on; the {queries - answered:,} others are"
        " there to measure (queries.holdout, the displacement meter), or more than generator.queries."
    )


def _headroom(found: Headroom, title: str) -> Table:
    def line(label: str, part: Headroom | HeadroomAt) -> Row:
        means = (cell(part[key], "number", signed=key == "all") for key in ("original", "good", "bad", "all"))
        return Row(label, (*means, cell(part["all"].n, "number")))

    rows = [
        line("whole responses", found),
        *(line(f"tokens {each['first']} to {each['last'] or 'the end'}", each) for each in found["positions"]),
    ]
    return Table(title, ("y_o", "y+", "y-", "y_o - mean of both", "queries"), tuple(rows), f"{in_words(found)} {METHOD}")


def _gain(found: Gain, title: str) -> Table:
    rows = tuple(
        figures(label, [found], key, signed=key != "following_before")
        for label, key in (
            ("on-policy log-probability", "gain"),
            ("of it shown without a principle: sharpening, displacement", "same_prompt"),
            ("of it steering", "steering"),
            ("own principle above the opposite one", "following"),
            ("the same of the policy, no change", "following_before"),
            ("entropy of what is sampled from", "entropy"),
            ("log-probability of the policy's answers to bare queries", "displacement"),
        )
    )
    note = (
        f"{gain_in_words(found).capitalize()}. Expectations over the whole vocabulary at {found['contexts']:,} contexts of"
        f" {found['queries']:,} held-out queries, nats a token, generator - policy. {METHOD}"
    )
    return Table(title, ("change",), rows, note)


def _checks(this: RoundMetrics, suffix: str) -> Iterator[Table]:
    """What checks say of each set of pairs, and of each principle."""
    sets = {name: measures for name, measures in data_sets(this).items() if "checks" in measures}
    if not sets:
        return
    original = this.get("steering", Measures()).get("checks")
    reports = [measures["checks"] for measures in sets.values() if "checks" in measures]

    rows = [figures("pairs", reports, "pairs")]
    if any(report.get("unchecked") for report in reports):
        rows.append(figures("pairs without a check", reports, "unchecked"))
    rows += (
        figures(label, reports, key, "share")
        for label, key in (
            ("chosen passes", "chosen"),
            ("rejected passes", "rejected"),
            ("chosen passes, rejected does not", "win"),
            ("the reverse", "loss"),
            ("both pass", "both_pass"),
            ("neither passes", "both_fail"),
        )
    )
    note = METHOD
    if original is not None and "original" in original:
        bare = cell(original["original"], "share")
        note = f"Of the policy's answers to the bare queries {bare.value} {bare.interval} pass. {note}"
    yield Table(f"Responses that pass the checks of their principle{suffix}", tuple(sets), tuple(rows), note)
    last = next(reversed(sets))
    listed = reports[-1].get("principles", [])[:LISTED]
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
        rows += (line(f"  {check_label(each['check'])}", each) for each in found["checks"][:LISTED] if "check" in each)
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
    rows = tuple(figures(key.replace("_", " "), [changes], key, signed=True) for key in changes)
    note = "This round - the round before. The intervals take the rounds as independent samples (MOVER, Newcombe 1998)."
    return Table(title, ("change",), rows, note)


def _saved(side: Json) -> str:
    saving = side.get("saving", {})
    margins = saving.get("trained"), saving.get("delivered")
    if "quantized" in saving:
        margins = saving["quantized"], *margins
    return "" if None in margins else " -> ".join(f"{margin:.3f}" for margin in margins)


def _moved(side: Json, name: str) -> Cell:
    nats, token = (find(side, f"displacement.{key}") for key in (name, f"{name}_token"))
    return (
        Cell("")
        if nats is None
        else Cell(f"{nats.mean:+.3f} ({token.mean:+.5f})", cell(nats, "number", signed=True).interval)
    )


def trainings_of(this: RoundMetrics) -> dict[str, TrainingSummary]:
    """Each training of a round, by what people call it."""
    generator = "generator of chosen" if "bad_generator" in this else "data generator"
    named = ((generator, "generator"), ("generator of rejected", "bad_generator"), ("policy", "policy"))
    return {name: this[key] for name, key in named if key in this}


def _trainings(this: RoundMetrics, title: str) -> Table:
    names = list(trainings_of(this).items())
    sides = [cast(Json, summary) for _, summary in names]

    def line(label: str, path: str, form: Form = "number") -> Row:
        return figures(label, sides, path, form)

    def texts(label: str, values: Iterator[str]) -> Row:
        return Row(label, tuple(map(Cell, values)))

    def ends(name: str, places: int) -> Iterator[str]:
        """A value of the first and of the last step that has it."""
        for side in sides:
            values = [entry[name] for entry in side.get("curve", []) if name in entry]
            yield " -> ".join(f"{values[i]:.{places}f}" for i in (0, -1)) if values else ""

    unrelated: list[Estimate | None] = [find(side, "displacement.unrelated") for side in sides]
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
        Row("unrelated ones measured", tuple(cell(found and found.n, "number") for found in unrelated)),
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
    return filled(Table(title, tuple(name for name, _ in names), rows, note))
