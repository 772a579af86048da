"""What a run folder holds, as metrics: read from what its stages have sealed, without a model and without their rows."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from selfsteer.measures.gates import drift, evaluate
from selfsteer.measures.metrics import (
    Measures,
    Method,
    Metrics,
    PartSummary,
    RoundMetrics,
    RunFacts,
    StageSummary,
    TrainingSummary,
)
from selfsteer.models import hardware
from selfsteer.recipe.gates import before_generator, parse
from selfsteer.recipe.sections import Recipe, load
from selfsteer.stages.base import read_measures, sealed
from selfsteer.stages.quality import read_contamination, read_reports
from selfsteer.stages.status import (
    BAD_GENERATOR,
    GAIN,
    GENERATOR,
    GOOD_GENERATOR,
    MODEL,
    PASSES,
    POLICY,
    PREFERENCES,
    QUALITY,
    SELECTION,
    STEERING,
    method_in,
    stage_names,
)
from selfsteer.store.folder import HISTORY, RunFolder, Stage
from selfsteer.training.trainer import read_history

_LIBRARIES = ("selfsteer", "torch", "transformers", "peft", "accelerate", "datasets", "pyarrow")


def session(recipe: Recipe) -> dict[str, Any]:
    """What this process runs with, and the day that templates are told, for run.json."""
    versions = {name: version(name) for name in _LIBRARIES}
    python, commit = platform.python_version(), _commit()
    return {"versions": versions, "python": python, "commit": commit, "hardware": hardware(), "date": recipe.policy.date}


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def metrics(folder: RunFolder, recipe: Recipe, rounds: list[RoundMetrics], *, ended: str | None = None) -> Metrics:
    """The measures of every round, and what identifies the run.

    ended: why the last of the rounds did not align the policy on its data; the result is then that of the one before.
    """
    facts = _facts(folder, recipe, rounds)
    last = len(rounds) - (ended is not None)
    if last > 0:
        facts["policy_folder"] = str(folder.stage(last, POLICY).path / MODEL)
        facts["policy_round"] = last
    if ended is not None:
        facts["ended"] = ended
    return Metrics(run=facts, rounds=rounds)


def unaligned(folder: RunFolder, recipe: Recipe, method: Method) -> Metrics:
    """The same of a run whose only round has its data, and is not to align the policy on it."""
    rounds = round_metrics(folder, recipe, method, unaligned=1)
    return Metrics(run=_facts(folder, recipe, rounds), rounds=rounds)


def so_far(folder: RunFolder) -> Metrics:
    """The same of a run under way: what its sealed stages say by now, without gates and drift, which are of whole rounds."""
    recipe = load(folder.path / "recipe.yaml")
    method = method_in(folder, recipe)
    names = stage_names(recipe, method)
    rounds: list[RoundMetrics] = []
    for number in range(1, recipe.rounds + 1):
        begun = {name: folder.stage(number, name) for name in names if folder.has_stage(number, name)}
        sealed_now = {name: stage for name, stage in begun.items() if stage.manifest() is not None}
        if sealed_now:
            rounds.append(_round(sealed_now, method))
    facts = _facts(folder, recipe, rounds)
    facts["under_way"] = True
    return Metrics(run=facts, rounds=rounds)


def _facts(folder: RunFolder, recipe: Recipe, rounds: Sequence[RoundMetrics]) -> RunFacts:
    with_what = folder.sessions()[-1]
    facts = RunFacts(
        name=folder.path.name,
        folder=str(folder.path),
        model=recipe.policy.model,
        seed=recipe.seed,
        seconds=sum(stage["seconds"] for each in rounds for stage in each.get("stages", {}).values()),
        versions=with_what["versions"],
        hardware=", ".join(
            str(value) if name in ("device", "dtype") else f"{value} {name if value != 1 else name.removesuffix('s')}"
            for name, value in with_what["hardware"].items()
        ),
    )
    if recipe.queries.shard is not None:
        facts["shard"] = recipe.queries.shard
    last = rounds[-1] if rounds else RoundMetrics()
    pairs = SELECTION if "selected" in last else PREFERENCES
    if pairs in last.get("stages", {}):
        facts["pairs"] = str(folder.stage(len(rounds), pairs).path / "data.parquet")
    return facts


def round_metrics(
    folder: RunFolder, recipe: Recipe, method: Method, *, unaligned: int | None = None, until: str | None = None
) -> list[RoundMetrics]:
    """The measures of all rounds, drift and gates among them; or up to round `unaligned`, which ends with its data.

    until: the stage that this round ended with, before its data was made; what lies behind it is of an earlier try.
    """
    gates, stops = parse(recipe.quality.gates), parse(recipe.quality.stop_when)
    rounds: list[RoundMetrics] = []
    for number in range(1, (unaligned or recipe.rounds) + 1):
        names = stage_names(recipe, method, aligned=number != unaligned)
        if number == unaligned and until is not None:
            names = names[: names.index(until) + 1]
        found = _round({name: folder.stage(number, name) for name in names}, method)
        if rounds:
            found["drift"] = drift(rounds[-1], found)
        if gates:
            whole = PREFERENCES in names and recipe.queries.shard is None
            held = gates if whole else [gate for gate in gates if before_generator(gate)]
            found["gates"] = evaluate(held, found, number=number)
        if stops and rounds:
            found["stop_when"] = evaluate(stops, found, number=number)
        rounds.append(found)
    return rounds


def _round(stages: dict[str, Stage], method: Method) -> RoundMetrics:
    manifests = {name: sealed(stage) for name, stage in stages.items()}
    found = RoundMetrics(
        stages={
            name: StageSummary(
                wanted=each.wanted,
                kept=each.kept,
                dropped=each.dropped,
                seconds=each.seconds,
                parts={part: PartSummary(seconds=took, tokens=int(tokens)) for part, (took, tokens) in each.parts.items()},
                disk=stages[name].size(),
                memory=each.memory,
            )
            for name, each in manifests.items()
        }
    )
    if STEERING in stages:
        steering = read_measures(stages[STEERING])
        found["steering"], found["pbaa"] = steering["pairs"], steering["policy_pairs"]
        if steering["headroom"] is not None:
            found["headroom"] = steering["headroom"]
    if PREFERENCES in stages:
        measures = read_measures(stages[PREFERENCES])
        found["alignment" if method != "pbaa" else "pbaa"] = measures["pairs"]
        if "comparison" in measures:
            found["comparison"] = measures["comparison"]
    if GAIN in stages and (gained := read_measures(stages[GAIN])["gain"]) is not None:
        found["gain"] = gained
    if SELECTION in stages:
        found["selected"] = read_measures(stages[SELECTION])["pairs"]
    if QUALITY in stages:
        _add_quality(found, stages[QUALITY])
    if PASSES in stages:
        found["answers"] = read_measures(stages[PASSES])["answers"]
    for key, name in _TRAININGS:
        if name in stages:
            found[key] = _training(stages[name])
    return found


_TRAININGS = (
    ("generator", GENERATOR),
    ("generator", GOOD_GENERATOR),
    ("bad_generator", BAD_GENERATOR),
    ("policy", POLICY),
)


def _add_quality(found: RoundMetrics, stage: Stage) -> None:
    said = read_reports(stage)
    for name, reports in said["reports"].items():
        for by, report in reports.items():
            found.setdefault(name, Measures())[by] = report
    if comparisons := {by: each for by, each in said["comparisons"].items() if each is not None}:
        found["judged_comparison"] = {**comparisons}
    for name, report in said["checks"].items():
        found.setdefault(name, Measures())["checks"] = report
    overlap = read_contamination(stage)
    if overlap is not None:
        found["contamination"] = overlap


def _training(stage: Stage) -> TrainingSummary:
    steps = read_history(stage.path / HISTORY)
    measures = read_measures(stage)
    if not steps:
        way_out = f"delete {stage.path / 'MANIFEST.json'} and run the same command again"
        raise ValueError(f"{stage.path / HISTORY}: empty; {way_out}")
    seconds = sum(step["seconds"] for step in steps)
    found = TrainingSummary(
        steps=measures["steps"],
        seconds=seconds,
        tokens_per_second=sum(step["tokens"] for step in steps) / seconds,
        curve=cast("list[dict[str, float]]", steps),
        reward=measures["reward"],
        saving=measures["saving"],
    )
    if "displacement" in measures:
        found["displacement"] = measures["displacement"]
    return found
