"""What a run folder holds, as metrics and as a status: read from sealed stages, without a model."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import pyarrow.parquet as pq

from selfsteer.cards import Method
from selfsteer.data_stages import POLICY_PAIRS
from selfsteer.metrics import Metrics, RoundMetrics, RunFacts, StageSummary, TrainingSummary
from selfsteer.models import hardware
from selfsteer.quality import compare, measure
from selfsteer.recipe import Recipe, load
from selfsteer.records import PairRow
from selfsteer.stages import sealed
from selfsteer.store import RunFolder, Stage
from selfsteer.training_stages import HISTORY, MEASURES, MODEL

STAGES: dict[Method, tuple[str, ...]] = {
    "sso": ("1-principles", "2-responses", "3-steering", "4-generator", "5-preferences", "6-policy"),
    "pbaa": ("1-principles", "2-responses", "5-preferences", "6-policy"),
    "given": ("5-preferences", "6-policy"),
}
"""What a run consists of, by where its pairs come from."""

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


def metrics(folder: RunFolder, recipe: Recipe, method: Method) -> Metrics:
    """The measures of every round, and what identifies the run."""
    rounds = [_round(folder, number, method) for number in range(1, recipe.rounds + 1)]
    seconds = sum(stage["seconds"] for each in rounds for stage in each.get("stages", {}).values())
    last = folder.stage(recipe.rounds, "6-policy").path / MODEL
    facts = RunFacts(
        name=folder.path.name,
        folder=str(folder.path),
        model=recipe.policy.model,
        seed=recipe.seed,
        seconds=seconds,
        policy_folder=str(last),
        pairs=str(folder.stage(recipe.rounds, "5-preferences").path / "data.parquet"),
        versions=_versions(),
        hardware=", ".join(f"{value} {name}" if name != "device" else str(value) for name, value in hardware().items()),
    )
    return Metrics(run=facts, rounds=rounds)


def _round(folder: RunFolder, number: int, method: Method) -> RoundMetrics:
    stages = {name: folder.stage(number, name) for name in STAGES[method]}
    manifests = {name: sealed(stage) for name, stage in stages.items()}
    found = RoundMetrics(
        stages={
            name: StageSummary(wanted=each.wanted, kept=each.kept, dropped=each.dropped, seconds=each.seconds)
            for name, each in manifests.items()
        }
    )
    found["alignment" if method != "pbaa" else "pbaa"] = measure(cast("Iterator[PairRow]", stages["5-preferences"].rows()))
    if method == "sso":
        own = stages["3-steering"].path / POLICY_PAIRS
        found["steering"] = measure(cast("Iterator[PairRow]", stages["3-steering"].rows()))
        found["pbaa"] = measure(_rows(own))
        found["comparison"] = compare(cast("Iterator[PairRow]", stages["5-preferences"].rows()), _rows(own))
        found["generator"] = _training(stages["4-generator"])
    found["policy"] = _training(stages["6-policy"])
    return found


def _training(stage: Stage) -> TrainingSummary:
    steps = [json.loads(line) for line in (stage.path / HISTORY).read_text().splitlines()]
    measures = json.loads((stage.path / MEASURES).read_text())
    seconds = sum(step["seconds"] for step in steps)
    return TrainingSummary(
        steps=measures["steps"],
        seconds=seconds,
        tokens_per_second=sum(step["tokens"] for step in steps) / seconds,
        curve=steps,
        reward=measures["reward"],
    )


def _rows(path: Path) -> Iterator[PairRow]:
    for batch in pq.ParquetFile(path).iter_batches(256):
        yield from cast("list[PairRow]", batch.to_pylist())


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
    names = STAGES[_method(folder, recipe)]
    stages = [_stage_status(folder.stage(number, name), number) for number in range(1, recipe.rounds + 1) for name in names]
    following = next((each for each in stages if each["state"] != "sealed"), None)
    if following is None:
        return Status(run=str(path), stages=stages, next="nothing: the run is complete")
    verb = "continue" if following["state"] == "partial" else "begin"
    return Status(run=str(path), stages=stages, next=f"{verb} round {following['round']}, {following['name']}")


def _method(folder: RunFolder, recipe: Recipe) -> Method:
    """Where the pairs of this run come from; those of `selfsteer train` were made elsewhere."""
    if not folder.stage(1, "1-principles").path.is_dir() and folder.stage(1, "5-preferences").path.is_dir():
        return "given"
    return "pbaa" if recipe.generator.kind == "none" else "sso"


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
