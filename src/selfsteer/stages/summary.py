"""What a run folder holds, as metrics and as a status: read from sealed stages, without a model."""

import logging
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, cast

from selfsteer.measures.estimates import Estimate
from selfsteer.measures.gates import drift, evaluate, why_not_aligned
from selfsteer.measures.metrics import (
    Measures,
    Method,
    Metrics,
    RoundMetrics,
    RunFacts,
    StageSummary,
    TrainingSummary,
    plain,
)
from selfsteer.measures.quality import compare, measure
from selfsteer.models import hardware
from selfsteer.recipe.gates import parse
from selfsteer.recipe.sections import Recipe, load
from selfsteer.records import Pair
from selfsteer.stages.base import sealed
from selfsteer.stages.passes import PASSES, read_answers
from selfsteer.stages.quality import QUALITY, measured, read_checks, read_contamination, read_reports
from selfsteer.stages.selection import SELECTION
from selfsteer.stages.steering import POLICY_PAIRS
from selfsteer.stages.training import BAD_GENERATOR, GOOD_GENERATOR, HISTORY, MEASURES, MODEL
from selfsteer.store import columns
from selfsteer.store.durable import canonical_json, digest, read_json, replacing
from selfsteer.store.folder import RunFolder, Stage
from selfsteer.training.trainer import read_history

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 1
"""Version of what is measured; to be raised with every change of a number in `quality.py`."""


class Measured:
    """What was measured in one run folder; for its owner."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = _read_values(path)

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


def _read_values(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = read_json(path, {"values": dict, "sha256": str}, way_out="measuring again")
    except ValueError as error:
        log.warning("%s", error)
        return {}
    if content["sha256"] != digest(content["values"]):
        log.warning("%s: not as it was written; measuring again", path)
        return {}
    return content["values"]


def _with_estimates(value: Any) -> Any:
    """The inverse of `cells.plain`."""
    if isinstance(value, list):
        return [_with_estimates(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        fields = {str(key): _with_estimates(item) for key, item in cast("dict[str, Any]", value).items()}
        return Estimate(**fields) if tuple(sorted(fields)) == _ESTIMATE else fields
    return value


_ESTIMATE = tuple(sorted(Estimate._fields))

STAGES: dict[Method, tuple[str, ...]] = {
    "sso": ("1-principles", "2-responses", "3-steering", "4-generator", "5-preferences", "6-policy"),
    "dual": (
        "1-principles",
        "2-responses",
        "3-steering",
        GOOD_GENERATOR,
        BAD_GENERATOR,
        "5-preferences",
        "6-policy",
    ),
    "pbaa": ("1-principles", "2-responses", "5-preferences", "6-policy"),
    "given": ("5-preferences", "6-policy"),
}
"""What a run consists of, by where its pairs come from; `stage_names` adds the judgement of the pairs."""

_LIBRARIES = ("selfsteer", "torch", "transformers", "peft", "accelerate", "datasets", "pyarrow")


def session() -> dict[str, Any]:
    """What this process runs with, for run.json."""
    return {"versions": _versions(), "python": platform.python_version(), "commit": _commit(), "hardware": hardware()}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def method_of(recipe: Recipe) -> Method:
    """Where the pairs of a run of this recipe come from."""
    methods: dict[str, Method] = {"none": "pbaa", "single": "sso", "dual": "dual"}
    return methods[recipe.generator.kind]


def stage_names(recipe: Recipe, method: Method) -> tuple[str, ...]:
    """The stages of a round, in order."""
    *made, policy = STAGES[method]
    judged = [QUALITY] if measured(recipe, principles=method != "given") else []
    selected = [SELECTION] if recipe.selection.active else []
    answered = [PASSES] if recipe.quality.answers and method != "given" else []
    return (*made, *judged, *selected, policy, *answered)


def metrics(folder: RunFolder, recipe: Recipe, method: Method, *, ended: int | None = None) -> Metrics:
    """The measures of every round, and what identifies the run.

    ended: the round that made its data and then did not align the policy on it; the result is then that of the one before.
    """
    rounds = round_metrics(folder, recipe, method, unaligned=ended)
    facts = _facts(folder, recipe, rounds)
    last = recipe.rounds if ended is None else ended - 1
    if last > 0:
        facts["policy_folder"] = str(folder.stage(last, "6-policy").path / MODEL)
        facts["policy_round"] = last
    if ended is not None:
        reason = why_not_aligned(rounds[-1], number=ended, gates_stop=recipe.quality.on_failure == "stop")
        assert reason is not None, "a round ends without alignment for a reason"
        facts["ended"] = reason
    return Metrics(run=facts, rounds=rounds)


def unaligned(folder: RunFolder, recipe: Recipe, method: Method, number: int) -> Metrics:
    """The same of a run whose round `number` has its data, but has not aligned the policy on it."""
    rounds = round_metrics(folder, recipe, method, unaligned=number)
    return Metrics(run=_facts(folder, recipe, rounds), rounds=rounds)


def _facts(folder: RunFolder, recipe: Recipe, rounds: Sequence[RoundMetrics]) -> RunFacts:
    return RunFacts(
        name=folder.path.name,
        folder=str(folder.path),
        model=recipe.policy.model,
        seed=recipe.seed,
        seconds=sum(stage["seconds"] for each in rounds for stage in each.get("stages", {}).values()),
        pairs=str(folder.stage(len(rounds), _pairs_stage(rounds)).path / "data.parquet"),
        versions=_versions(),
        hardware=", ".join(f"{value} {name}" if name != "device" else str(value) for name, value in hardware().items()),
    )


def _pairs_stage(rounds: Sequence[RoundMetrics]) -> str:
    return SELECTION if "selected" in rounds[-1] else "5-preferences"


def round_metrics(folder: RunFolder, recipe: Recipe, method: Method, *, unaligned: int | None = None) -> list[RoundMetrics]:
    """The measures of all rounds, drift and gates among them; or up to round `unaligned`, which ends with its data."""
    gates, stops = parse(recipe.quality.gates), parse(recipe.quality.stop_when)
    rounds: list[RoundMetrics] = []
    for number in range(1, (unaligned or recipe.rounds) + 1):
        found = _round(folder, number, recipe, method, aligned=number != unaligned)
        if rounds:
            found["drift"] = drift(rounds[-1], found)
        if gates:
            found["gates"] = evaluate(gates, found, number=number)
        if stops and rounds:
            found["stop_when"] = evaluate(stops, found, number=number)
        rounds.append(found)
    return rounds


def _round(folder: RunFolder, number: int, recipe: Recipe, method: Method, *, aligned: bool) -> RoundMetrics:
    names = [name for name in stage_names(recipe, method) if aligned or name not in _ALIGNING]
    stages = {name: folder.stage(number, name) for name in names}
    manifests = {name: sealed(stage) for name, stage in stages.items()}
    found = RoundMetrics(
        stages={
            name: StageSummary(wanted=each.wanted, kept=each.kept, dropped=each.dropped, seconds=each.seconds)
            for name, each in manifests.items()
        }
    )
    known = Measured(folder.path / "measured.json")
    preferences = manifests["5-preferences"].digest
    found["alignment" if method != "pbaa" else "pbaa"] = known.get(
        "preferences", [preferences], lambda: measure(_pairs(stages["5-preferences"]))
    )
    if "3-steering" in stages:
        steering, own = manifests["3-steering"].digest, stages["3-steering"].path / POLICY_PAIRS
        found["steering"] = known.get("steering", [steering], lambda: measure(_pairs(stages["3-steering"])))
        found["pbaa"] = known.get("policy pairs", [steering], lambda: measure(_pairs_of(own)))
        found["comparison"] = known.get(
            "comparison", [preferences, steering], lambda: compare(_pairs(stages["5-preferences"]), _pairs_of(own))
        )
    if SELECTION in stages:
        selected = manifests[SELECTION].digest
        found["selected"] = known.get("selected", [selected], lambda: measure(_pairs(stages[SELECTION])))
    if QUALITY in stages:
        _add_quality(found, stages[QUALITY])
    if PASSES in stages:
        found["answers"] = read_answers(stages[PASSES])
    for key, name in _TRAININGS:
        if name in stages:
            found[key] = _training(stages[name])
    return found


_ALIGNING = (SELECTION, "6-policy", PASSES)
"""What a round that does not align the policy leaves out."""

_TRAININGS = (
    ("generator", "4-generator"),
    ("generator", GOOD_GENERATOR),
    ("bad_generator", BAD_GENERATOR),
    ("policy", "6-policy"),
)


def _add_quality(found: RoundMetrics, stage: Stage) -> None:
    for name, reports in read_reports(stage).items():
        for by, report in reports.items():
            found.setdefault(name, Measures())[by] = report
    for name, report in read_checks(stage).items():
        found.setdefault(name, Measures())["checks"] = report
    overlap = read_contamination(stage)
    if overlap is not None:
        found["contamination"] = overlap


def _training(stage: Stage) -> TrainingSummary:
    steps = read_history(stage.path / HISTORY)
    way_out = f"delete {stage.path / 'MANIFEST.json'} and run the same command again"
    measures = read_json(stage.path / MEASURES, {"steps": int, "reward": dict, "saving": dict}, way_out=way_out)
    if not steps:
        raise ValueError(f"{stage.path / HISTORY}: empty; {way_out}")
    seconds = sum(step["seconds"] for step in steps)
    return TrainingSummary(
        steps=measures["steps"],
        seconds=seconds,
        tokens_per_second=sum(step["tokens"] for step in steps) / seconds,
        curve=cast("list[dict[str, float]]", steps),
        reward=measures["reward"],
        saving=measures["saving"],
    )


def _pairs(stage: Stage) -> Iterator[Pair]:
    return map(columns.pair, stage.rows())


def _pairs_of(path: Path) -> Iterator[Pair]:
    return map(columns.pair, columns.file_rows(path))


# --- status ----------------------------------------------------------------------------------------------------------------


class StageStatus(TypedDict):
    """How far one stage is."""

    round: int
    name: str
    state: Literal["sealed", "partial", "waiting"]
    wanted: int | None
    kept: int | None
    """Of a partial stage, the finished samples in its journal."""
    dropped: dict[str, int]
    seconds: float | None


class Status(TypedDict):
    """How far a run is."""

    run: str
    stages: list[StageStatus]
    next: str


def status(path: Path) -> Status:
    """How far the run at `path` is; needs no lock. Raises ValueError where there is no run."""
    folder = RunFolder.view(path)
    recipe = load(folder.path / "recipe.yaml")
    names = stage_names(recipe, _method(folder, recipe))
    ended = _ended(folder)
    last = recipe.rounds if ended is None else ended.round
    stages = [_stage_status(folder.stage(number, name), number) for number in range(1, last + 1) for name in names]
    if ended is not None:
        made = [stage for stage in stages if stage["round"] < ended.round or stage["name"] not in _ALIGNING]
        return Status(run=str(path), stages=made, next=f"nothing: {ended.reason}")
    following = next((each for each in stages if each["state"] != "sealed"), None)
    if following is None:
        return Status(run=str(path), stages=stages, next="nothing: the run is complete")
    verb = "continue" if following["state"] == "partial" else "begin"
    return Status(run=str(path), stages=stages, next=f"{verb} round {following['round']}, {following['name']}")


class _Ended(NamedTuple):
    round: int
    reason: str


def _ended(folder: RunFolder) -> _Ended | None:
    """The round that ended the run before its time; None where none did, or a later session has begun."""
    found = folder.path / "metrics.json"
    if not found.exists() or found.stat().st_mtime_ns < (folder.path / "recipe.yaml").stat().st_mtime_ns:
        return None
    metrics = read_json(found, {"run": dict, "rounds": list}, way_out="delete it; `selfsteer run` writes it again")
    reason = metrics["run"].get("ended")
    return None if reason is None else _Ended(len(metrics["rounds"]), reason)


def _method(folder: RunFolder, recipe: Recipe) -> Method:
    """Where the pairs of this run come from; those of `selfsteer train` were made elsewhere."""
    if not folder.stage(1, "1-principles").path.is_dir() and folder.stage(1, "5-preferences").path.is_dir():
        return "given"
    return method_of(recipe)


def _stage_status(stage: Stage, number: int) -> StageStatus:
    name = stage.path.name
    manifest = stage.manifest()
    if manifest is not None:
        return StageStatus(
            round=number,
            name=name,
            state="sealed",
            wanted=manifest.wanted,
            kept=manifest.kept,
            dropped=manifest.dropped,
            seconds=manifest.seconds,
        )
    begun = stage.path.is_dir() and any(os.scandir(stage.path))
    return StageStatus(
        round=number,
        name=name,
        state="partial" if begun else "waiting",
        wanted=None,
        kept=stage.finished() if begun else None,
        dropped={},
        seconds=None,
    )
