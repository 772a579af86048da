"""What a run says of itself in at most twenty lines: what was made, what the numbers allow to say, and where it is.

All else is in the tables (`selfsteer report RUN`) and on the page. Left out on purpose: numbers that a model reaches on the
pairs that it was trained on; they say nothing of its answers.
"""

import shlex
from collections.abc import Iterator
from typing import cast

from rich.console import Console
from rich.text import Text

from selfsteer.measures.displacement import displaced
from selfsteer.measures.estimates import Estimate
from selfsteer.measures.gain import in_words as gain_in_words
from selfsteer.measures.metrics import Measures, Metrics, RoundMetrics, RunFacts, TrainingSummary
from selfsteer.measures.verdicts import JudgeReport
from selfsteer.reports.drawing import cell, console_of, print_table
from selfsteer.reports.tables import GENERATOR, PBAA, SELECTED, data_sets, last_round, run_tables
from selfsteer.runtime import duration
from selfsteer.stages.status import PRINCIPLES

FEW_ITEMS = 30
"""A measure of fewer items is named as such."""

FEW_PAIRS = 200
"""With fewer pairs, a difference of 0.02 in on-policy probability is within the interval (docs/log.md)."""

CUT_OFF = 1 / 3
"""Share of cut-off responses above which a run says so."""

UNLIKELY = 0.3
"""Nats a token by which answers are less likely than the policy's own when told to, above which a run says so."""


def print_verdict(metrics: Metrics) -> None:
    """Print the verdict on a run."""
    console = console_of()
    for line in verdict(metrics):
        console.print(Text(line), soft_wrap=True)


def print_run(metrics: Metrics, console: Console | None = None) -> None:
    """Print all tables of a run, what was made, and where it is. 100 columns where the output is no terminal."""
    console = console or console_of()
    for table in run_tables(metrics):
        print_table(table, console)
    for line in (f"{headline(metrics)}, seed {metrics['run']['seed']}", *closing_lines(metrics["run"])):
        console.print(Text(line), soft_wrap=True)


def verdict(metrics: Metrics) -> list[str]:
    """The lines of the verdict."""
    run, this = metrics["run"], last_round(metrics)
    rows = measure_rows(this)
    width = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    return [
        headline(metrics),
        *("  " + "  ".join(text.ljust(size) for text, size in zip(row, width, strict=True)).rstrip() for row in rows),
        *(f"  {line}" for line in answer_lines(this)),
        *(f"  ! {line}" for line in warnings(this)),
        *closing_lines(run),
    ]


def closing_lines(run: RunFacts) -> list[str]:
    """Why a run ended early, and where its results are."""
    ended = [f"  ! ended early: {run['ended']}", f"    {result_of(run)}"] if "ended" in run else []
    found = places(run)
    found["report"] = f"{run['folder']}/report.html, or: {found['report']}"
    return ended + [f"{name:6}  {place}" for name, place in found.items()]


def result_of(run: RunFacts) -> str:
    """Whose policy the result of a run is that ended early."""
    return (
        f"the result is the policy of round {run['policy_round']}" if "policy_round" in run else "there is no aligned policy"
    )


def places(run: RunFacts) -> dict[str, str]:
    """Where the results are, and the commands that go on from them, to be copied."""
    folder = shlex.quote(run["folder"])
    found = {"model": run.get("policy_folder", ""), "pairs": run.get("pairs", ""), "report": f"selfsteer report {folder}"}
    if "shard" in run:
        found["next"] = f"selfsteer merge {folder} ... --output RUN"
    elif "pairs" in run:
        found["next"] = f"selfsteer export {folder} --to pairs --format trl"
    return {name: place for name, place in found.items() if place}


def headline(metrics: Metrics) -> str:
    """What was made, in a sentence."""
    run, rounds, this = metrics["run"], len(metrics["rounds"]), last_round(metrics)
    sets = list(data_sets(this).values())
    made = f"{sets[-1]['pairs']:,} pairs" if sets and "pairs" in sets[-1] else "no pairs"
    stages = this.get("stages", {})
    if PRINCIPLES in stages:
        made += f" from {stages[PRINCIPLES]['kept']:,} queries"
    if rounds > 1:
        made += f" in the last of {rounds} rounds"
    done = "policy aligned" if "policy_folder" in run else "no policy aligned"
    if "under_way" in run:
        done = "still under way,"
    if "shard" in run:
        done = f"shard {run['shard']} of them made"
    return f"{run['name']}: {made}, {done} in {duration(run['seconds'])}"


def measure_rows(this: RoundMetrics) -> list[tuple[str, str, str, str]]:
    """What can be said of the data, in the order of what a reader asks: a name, of PBAA, of the generator, in words."""
    sets = data_sets(this)
    names = {name: name.removesuffix(" pairs") for name in sets}
    rows: list[tuple[str, str, str, str]] = []
    compared = this.get("comparison")
    both = compared.get("both") if compared else None
    if compared and both and "all" in compared:
        difference = compared["all"]
        said = in_words(difference, "more on-policy", "less on-policy")
        rows.append(
            (
                "on-policy probability",
                f"PBAA {_mean(both['baseline'])} {_of(both['baseline'])}",
                f"generator {_mean(both['pairs'])} {_of(both['pairs'])}",
                f"{_signed(difference)}  {said}{'' if compared.get('held_out') else ', on queries trained on'}",
            )
        )
    elif sets:
        name, measures = list(sets.items())[-1]
        if "on_policy" in measures and "all" in measures["on_policy"]:
            rows.append(
                ("on-policy probability", f"{names[name]} {cell(measures['on_policy']['all'], 'number').text}", "", "")
            )
    if "headroom" in this:
        room = this["headroom"]
        said = in_words(room["all"], "to win", "nothing to win")
        steered = f"steered {cell((room['good'].mean + room['bad'].mean) / 2, 'number').value}"
        unsteered = f"unsteered {_mean(room['original'])} {_of(room['original'])}"
        rows.append(("headroom", unsteered, f"{steered} {_of(room['good'])}", f"{_signed(room['all'])}  {said}"))
    if "gain" in this:
        gained = this["gain"]
        parts = f"steering {cell(gained['steering'].mean, 'number', signed=True).value}"
        rows.append(("next token, nats", _signed(gained["gain"]), parts, gain_in_words(gained)))
    return [*rows, *_accuracy(this, sets)]


def answer_lines(this: RoundMetrics) -> Iterator[str]:
    """Held-out answers before and after."""
    if "answers" not in this:
        return
    found = this["answers"]
    passing = cast("dict[str, Estimate]", found["passing"])
    told = f", {_share(passing['prompted'])} when told to" if "prompted" in passing else ""
    yield (
        f"{found['queries']:,} held-out answers: {_share(passing['before'])} follow the principle before,"
        f" {_share(passing['after'])} after{told}"
    )
    change = passing["change"]
    said = in_words(change, "the policy follows it more", "the policy follows it less")
    yield f"  change {_signed(change, share=True)} points: {said}"
    if "told" in found:
        told = cast("dict[str, Estimate]", found["told"])
        yield (
            f"  how likely the first policy, told to, finds them: {_mean(told['after'])} nats a token, its own answers"
            f" {_mean(told['prompted'])}"
        )


def _accuracy(this: RoundMetrics, sets: dict[str, Measures]) -> Iterator[tuple[str, str, str, str]]:
    """By whoever judged: of PBAA and of the generator, with the difference where both have the same queries."""
    judge = "accuracy (checks)" if any("checks" in measures for measures in sets.values()) else "accuracy (judge)"
    for key, label in (("judge", judge), ("principle_consistency", "principle consistency")):
        compared = this.get("judged_comparison", {}).get(key)
        accuracies: dict[str, Estimate] = {}
        for name, measures in sets.items():
            report = cast("JudgeReport | None", measures.get(key))
            if report and "accuracy" in report:
                accuracies[name] = report["accuracy"]
        if not accuracies:
            continue
        said = "different queries" if GENERATOR in sets and len(accuracies) > 1 else ""
        if compared is not None:
            made = next(name for name in reversed(sets) if name != SELECTED)
            accuracies |= {PBAA: compared["both"]["baseline"], made: compared["both"]["pairs"]}
            difference = compared["difference"]
            said = f"{_signed(difference, share=True)} points  {in_words(difference, 'more accurate', 'less accurate')}"
        cells = [f"{name.removesuffix(' pairs')} {_share(found)} {_of(found)}" for name, found in accuracies.items()]
        first, second, *_ = [*cells, ""]
        yield label, first, second, said


def warnings(this: RoundMetrics) -> Iterator[str]:
    """What the reader has to know before trusting any of it, the most important first."""
    for gate in this.get("gates", ()):
        if not gate.passed:
            yield f"gate {gate.name} {gate.bound}: {gate.reason}"
    for key, name in (("generator", "generator"), ("bad_generator", "generator of rejected"), ("policy", "policy")):
        moved = this.get(key, TrainingSummary()).get("displacement")
        if moved is not None and (said := displaced(moved)) is not None:
            yield f"{name} {said}: read its answers"
    told = cast("dict[str, Estimate]", this["answers"].get("told", {})) if "answers" in this else {}
    if "gap" in told and told["gap"].above_zero and told["gap"].mean > UNLIKELY:
        yield f"answers unlike the policy's own when told to ({told['gap'].mean:.2f} nats a token less likely): read them"
    sets = data_sets(this)
    if not sets:
        return
    measures = list(sets.values())[-1]
    for side, found in cast("dict[str, Estimate]", measures.get("truncated", {})).items():
        if found.mean > CUT_OFF:
            yield f"{_share(found)} of the {side} responses are cut off: raise responses.max_new_tokens"
    pairs = measures.get("pairs", FEW_PAIRS)
    if pairs < FEW_PAIRS:
        yield f"{pairs:,} pairs are too few to tell small differences in the data from chance"


def in_words(difference: Estimate, above: str, below: str) -> str:
    """What the interval of a difference allows to say."""
    if difference.low is None or difference.high is None:
        return "one item: nothing can be said"
    if difference.above_zero:
        return above
    return below if difference.below_zero else "no difference shown"


def _of(value: Estimate) -> str:
    return f"of {value.n:,}{' (few)' if value.n < FEW_ITEMS else ''}"


def _mean(value: Estimate) -> str:
    return cell(value.mean, "number").value


def _share(value: Estimate) -> str:
    return f"{100 * value.mean:.0f}%"


def _signed(value: Estimate, *, share: bool = False) -> str:
    if not share:
        return cell(value, "number", signed=True).text
    interval = "" if value.low is None or value.high is None else f" [{100 * value.low:+.0f}, {100 * value.high:+.0f}]"
    return f"{100 * value.mean:+.0f}{interval}"
