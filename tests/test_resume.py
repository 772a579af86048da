"""kill -9 of the whole pipeline, again and again, until it is through: the data is that of a run that nobody disturbed.

A child is killed before its n-th fsync of a file below a given place; every durable step of the run folder is one, so that
place and n pick the moment: while sampling, while scoring, while a checkpoint is written, between the files of a seal. The
children are forks of one process that has imported everything, because importing takes longer than the work.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from builders import THROUGH, Child, children
from safetensors.torch import load_file

import selfsteer

RecipeOf = Callable[..., dict[str, Any]]
STAGES = ("1-principles", "2-responses", "3-steering", "4-generator", "5-preferences", "6-policy")

# Arguments: a recipe, then "n:SIGNAL:PLACE" for every child: what it gets before its n-th fsync of a path with PLACE in it.
# Prints for each child its exit status (negative: the signal that killed it) and how many stages are sealed then.


def parts(run: Path, stage: str) -> list[str]:
    """The keys of the whole records of a stage."""
    keys: list[str] = []
    for part in sorted((run / "round-1" / stage / "parts").glob("*.jsonl")):
        keys += [json.loads(line)["key"] for line in part.read_text().splitlines() if line.endswith("}")]
    return keys


def data(run: Path, stage: str) -> Any:
    return pq.read_table(run / "round-1" / stage / "data.parquet").to_pylist()


@pytest.fixture
def recipe(recipe_of: RecipeOf, tmp_path: Path) -> Path:
    return write(tmp_path, recipe_of)


def write(folder: Path, recipe_of: RecipeOf) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder / "run", {"training.save_steps": 1})))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(tmp_path_factory.mktemp("undisturbed"), recipe_of)
    selfsteer.run(path)
    return path.parent / "run"


def same_result(run: Path, undisturbed: Path) -> None:
    """Data, weights and histories; no sample made twice and none more than without a kill."""
    for stage in ("1-principles", "2-responses", "3-steering", "5-preferences"):
        assert data(run, stage) == data(undisturbed, stage), stage
    for stage in STAGES[1:]:
        keys = parts(run, stage)
        assert len(keys) == len(set(keys)), f"{stage}: a sample was made twice"
        assert set(keys) == set(parts(undisturbed, stage)), stage
    for stage in ("4-generator", "6-policy"):
        ours, theirs = (load_file(each / "round-1" / stage / "model/model.safetensors") for each in (run, undisturbed))
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours), f"{stage}: other weights"
        steps, expected = (
            [json.loads(line) for line in (each / "round-1" / stage / "history.jsonl").read_text().splitlines()]
            for each in (run, undisturbed)
        )
        assert [(step["step"], step["loss"]) for step in steps] == [(step["step"], step["loss"]) for step in expected]
        assert not list((run / "round-1" / stage).glob("training-*")), "the checkpoints are gone with the finished training"


KILLS = (
    "1:SIGKILL:1-principles/data.parquet",
    "1:SIGKILL:2-responses/parts/",
    "1:SIGKILL:2-responses/parts/",
    "1:SIGKILL:2-responses/data.parquet",
    "1:SIGKILL:2-responses/MANIFEST",
    "1:SIGKILL:3-steering/parts/",
    "1:SIGKILL:3-steering/dropped",
    "1:SIGKILL:3-steering/headroom",
    "1:SIGKILL:checkpoint-1/",
    "1:SIGKILL:checkpoint-2/COMPLETE",
    "1:SIGKILL:4-generator/model/",
    "1:SIGKILL:4-generator/MANIFEST",
    "1:SIGKILL:5-preferences/parts/",
    "1:SIGKILL:5-preferences/MANIFEST",
    "3:SIGKILL:6-policy/training-",
    "1:SIGKILL:6-policy/MANIFEST",
    "1:SIGKILL:metrics.json",
)
"""In the order of the pipeline, each behind the one before."""


def test_killed_in_every_stage(recipe: Path, undisturbed: Path):
    """One folder, seventeen kills on the way through: sampling, scoring, checkpoints, seals."""
    found, said = children(recipe, *KILLS, THROUGH)
    survivors = [moment for moment, child in zip(KILLS, found, strict=False) if child.status != -signal.SIGKILL]
    assert survivors == [], said
    assert found[-1] == Child(0, 7), said
    same_result(recipe.parent / "run", undisturbed)


def test_killed_at_moments_drawn(recipe: Path, undisturbed: Path):
    """Wherever between the 5th and the 60th durable step of each child; what was durable stays."""
    draw = random.Random(4)
    moments = [f"{draw.randint(5, 60)}:SIGKILL:" for _ in range(5)]
    found, said = children(recipe, *moments, THROUGH)
    assert {child.status for child in found} == {0, -signal.SIGKILL}, said
    assert [child.sealed for child in found] == sorted(child.sealed for child in found), "a sealed stage was lost"
    assert found[-1] == Child(0, 7), said
    same_result(recipe.parent / "run", undisturbed)


def test_a_training_goes_on_with_a_library_that_writes_other_bytes(
    recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Of the pairs that are not held out a file is written for the training; its checkpoints know it by its bytes."""
    changes = {"training.save_steps": 1, "generator.kind": "none", "queries.holdout": 2, "quality.sample": 2}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path / "run", changes)))
    [child], said = children(recipe, "1:SIGKILL:checkpoint-2/COMPLETE")
    assert child.status == -signal.SIGKILL, said
    monkeypatch.setattr(pq, "ParquetWriter", partial(pq.ParquetWriter, version="1.0"))
    selfsteer.run(recipe)
    assert "checkpoint-2: it is incomplete" in caplog.text
    assert "checkpoint-1: it was trained with other" not in caplog.text


def test_stopped_by_a_signal_in_every_stage(recipe: Path, undisturbed: Path):
    """What is under way is finished and kept, in training as a complete checkpoint; the message says how to go on."""
    moments = (
        "1:SIGTERM:2-responses/parts/",
        "1:SIGINT:3-steering/parts/",
        "1:SIGTERM:checkpoint-1/",
        "1:SIGINT:checkpoint-2/",
        "1:SIGTERM:5-preferences/parts/",
    )
    found, said = children(recipe, *moments, THROUGH)
    assert [child.status for child in found] == [143, 130, 143, 130, 143, 0], said
    assert [child.sealed for child in found] == [1, 2, 3, 3, 4, 7], said
    for name, times in (("SIGTERM", 3), ("SIGINT", 2)):
        assert said.count(f"stopped by {name}; the same command continues:\n  selfsteer run {recipe}\n") == times
    same_result(recipe.parent / "run", undisturbed)


def test_a_second_process_names_the_holder(recipe: Path, command: Callable[..., Any]):
    """It ends with 2 and leaves the folder as it is; the first one does not notice."""
    arguments = ["run", str(recipe), "generator.epochs=5000"]
    folder = recipe.parent / "run"
    holding = [sys.executable, "-m", "selfsteer", *arguments]
    with subprocess.Popen(holding, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        try:
            until(lambda: (folder / "run.json").exists(), first)
            second = command(*arguments)
            assert first.poll() is None, "the first one was to be at work still"
        finally:
            first.kill()
        assert first.stderr is not None
        assert "Traceback" not in first.stderr.read()
    assert second.status == 2, second.err
    assert str(folder) in second.err
    assert str(first.pid) in second.err
    assert "Traceback" not in second.err


def until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
