"""Faults that reach the whole pipeline, with every request to the engine counted; README.md says which test shows what.

After each fault: every wanted key is good or dropped with a reason, no key is there twice, no durable sample is gone, sealed
digests are what they were, and no more was asked than was wanted plus what was in flight.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import selfsteer
from faults.scripted import IN_FLIGHT, ScriptedEngine, calls
from selfsteer.engines import open as opening
from selfsteer.recipe.sections import Recipe
from selfsteer.store import folder
from selfsteer.store.folder import RunFolder, StageDamaged
from selfsteer.store.journal import _DURABLE_EVERY
from selfsteer.training import checkpoints
from selfsteer.training.trainer import Keeper

RecipeOf = Callable[..., dict[str, Any]]
STAGES = ("1-principles", "2-responses", "5-preferences", "6-policy")
TEXTS = [f"What is the sum of {number} and {number + 1}?" for number in range(20)]
WANTED = 2 * len(TEXTS)
"""y+ and y- of every query: without a generator (PBAA) every sample is the engine's, and a run takes a second."""


def write_queries(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def recipe(recipe_of: RecipeOf, tmp_path: Path) -> dict[str, Any]:
    return small(recipe_of, tmp_path)


def small(recipe_of: RecipeOf, folder: Path) -> dict[str, Any]:
    changes = {
        "generator.kind": "none",
        "alignment.max_steps": 2,
        "queries.path": write_queries(folder / "queries.jsonl", TEXTS),
    }
    return recipe_of(folder / "run", changes)


@pytest.fixture(scope="module")
def undisturbed(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_engine", lambda *_, **__: ScriptedEngine(folder / "log"))
        selfsteer.run(Recipe.model_validate(small(recipe_of, folder)))
    assert len(calls(folder / "log")) == WANTED
    return folder / "run"


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(changes)` runs on a finished copy and returns the keys that were asked for."""
    shutil.copytree(undisturbed, tmp_path / "run")
    log = tmp_path / "log"
    monkeypatch.setattr(opening, "open_engine", lambda *_, **__: ScriptedEngine(log))

    def again(**changes: Any) -> list[str]:
        log.unlink(missing_ok=True)
        selfsteer.run(Recipe.model_validate(recipe | changes), replace=True)
        return calls(log)

    return again


def keys(run_folder: Path, stage: str) -> list[str]:
    """Of what a stage sampled, not of what it scored."""
    parts = sorted((run_folder / "round-1" / stage / "parts").glob("*.jsonl"))
    entries = (json.loads(line) for part in parts for line in part.read_text().splitlines() if line.endswith("}"))
    return [entry["key"] for entry in entries if "scores" not in entry["data"]]


def digests(run_folder: Path) -> dict[str, str]:
    """The digest of every sealed output, which must be what the manifests say."""
    found: dict[str, str] = {}
    for stage in STAGES:
        manifest = RunFolder.view(run_folder).stage(1, stage).verify()
        found |= {f"{stage}/{name}": value for name, value in manifest.outputs.items() if name != "measures.json"}
        assert manifest.wanted == manifest.kept + sum(manifest.dropped.values())
    # Of the history, all but the seconds is repeated.
    return {name: value for name, value in found.items() if not name.endswith("history.jsonl")}


def scripted(folder: Path, recipe: dict[str, Any], *moments: str) -> tuple[list[int], str]:
    """The exit status of every child, and what they said."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "faults.scripted", str(folder / "recipe.yaml"), str(folder / "log"), *moments]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines() if line.startswith("child ")]
    return [int(status) for _, status in lines], ended.stderr


# --- kills and full disks --------------------------------------------------------------------------------------------------


def test_a_kill_costs_what_was_in_flight_and_no_more(recipe: dict[str, Any], undisturbed: Path, tmp_path: Path):
    """Killed at the 3rd, 19th, 21st and 5th request of four sessions. What had been finished but not yet written counts as
    in flight: completions are made durable 16 at a time."""
    moments = ["kill:3", "kill:19", "kill:21", "kill:5"]
    found, said = scripted(tmp_path, recipe, *moments, "through:0")
    assert found == [-9] * len(moments) + [0], said
    asked = Counter(calls(tmp_path / "log"))
    assert set(asked) == set(keys(undisturbed, "2-responses")), "every wanted key, and no other"
    assert asked.total() <= WANTED + len(moments) * (IN_FLIGHT + _DURABLE_EVERY - 1)
    durable = keys(tmp_path / "run", "2-responses")
    assert len(durable) == len(set(durable)) == WANTED
    assert digests(tmp_path / "run") == digests(undisturbed)


def test_a_kill_among_held_out_answers_costs_what_was_in_flight(recipe_of: RecipeOf, tmp_path: Path):
    """After 2 x 20 responses, 2 x 10 answers of the first policy and 10 of the aligned one; killed at the 18th and, in the
    session after, the 6th request of those."""
    principle = {"good": "Say little.", "bad": "Say much.", "check": "punctuation:no_comma"}
    (tmp_path / "principles.jsonl").write_text(json.dumps(principle) + "\n")
    changes = {
        "principles": {"source": "file", "path": str(tmp_path / "principles.jsonl")},
        "judge": {"kind": "checks"},
        "queries.holdout": 10,
        "quality.answers": 10,
        "training.warmup_ratio": 0,
    }
    recipe = small(recipe_of, tmp_path) | {"quality": {"principle_consistency": False}}
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (recipe.setdefault(section, {}) if section else recipe)[last] = value
    found, said = scripted(tmp_path, recipe, f"kill:{WANTED + 18}", "kill:6", "through:0")
    assert found == [-9, -9, 0], said
    asked = Counter(calls(tmp_path / "log"))
    answers = keys(tmp_path / "run", "7-checks")
    assert len(answers) == len(set(answers)) == 30
    assert set(asked) == set(answers) | set(keys(tmp_path / "run", "2-responses"))
    assert asked.total() <= WANTED + 30 + 2 * (IN_FLIGHT + _DURABLE_EVERY - 1)
    manifest = RunFolder.view(tmp_path / "run").stage(1, "7-checks").verify()
    assert (manifest.wanted, manifest.kept) == (10, 10)


def test_a_full_disk_stops_with_a_name_and_loses_nothing(recipe: dict[str, Any], undisturbed: Path, tmp_path: Path):
    """No file may grow beyond 8,000 bytes: the journal of the responses fails first. Then there is room again."""
    found, said = scripted(tmp_path, recipe, "full:8000", "full:8000", "through:0")
    assert found == [2, 2, 0], said
    assert "2-responses/parts/" in said
    assert "make room or repair the disk" in said
    assert "Traceback" not in said
    durable = keys(tmp_path / "run", "2-responses")
    assert len(durable) == len(set(durable)) == WANTED
    assert digests(tmp_path / "run") == digests(undisturbed)


def test_a_disk_that_fills_up_in_training_stops_with_a_name(recipe: dict[str, Any], undisturbed: Path, tmp_path: Path):
    """The samples and pairs fit into 60,000 bytes a file, the first checkpoint's weights do not."""
    found, said = scripted(tmp_path, recipe, "full:60000", "through:0")
    assert found == [2, 0], said
    assert "6-policy/training-" in said
    assert "make room or repair the disk" in said
    assert "Traceback" not in said
    assert digests(tmp_path / "run") == digests(undisturbed)


# --- damage ----------------------------------------------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def unseal(stage: Path) -> None:
    for name in ("MANIFEST.json", "data.parquet"):
        (stage / name).unlink()


def test_a_flipped_bit_in_a_part_costs_its_record(run: Any, undisturbed: Path, tmp_path: Path):
    """One request, and the stage comes out as it was; those behind it are reused."""
    stage = tmp_path / "run" / "round-1" / "2-responses"
    unseal(stage)
    (part,) = (stage / "parts").glob("*.jsonl")
    flip(part, 0.5)
    assert len(run()) == 1
    assert digests(tmp_path / "run") == digests(undisturbed)


def test_a_deleted_part_is_sampled_again(run: Any, undisturbed: Path, tmp_path: Path):
    stage = tmp_path / "run" / "round-1" / "2-responses"
    unseal(stage)
    (part,) = (stage / "parts").glob("*.jsonl")
    part.unlink()
    assert sorted(run()) == sorted(keys(undisturbed, "2-responses"))
    assert digests(tmp_path / "run") == digests(undisturbed)


def test_the_part_of_a_sealed_stage_is_not_missed(run: Any, undisturbed: Path, tmp_path: Path):
    for part in (tmp_path / "run").rglob("parts/*.jsonl"):
        part.unlink()
    assert run() == []
    assert digests(tmp_path / "run") == digests(undisturbed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_deleted_manifest_is_made_again_from_the_journal(stage: str, run: Any, undisturbed: Path, tmp_path: Path):
    """Nothing is asked of the engine again; the outputs are the same, and so is everything behind them."""
    (tmp_path / "run" / "round-1" / stage / "MANIFEST.json").unlink()
    assert run() == []
    assert digests(tmp_path / "run") == digests(undisturbed)


@pytest.mark.parametrize(
    "file",
    [
        "1-principles/data.parquet",
        "2-responses/data.parquet",
        "2-responses/MANIFEST.json",
        "5-preferences/data.parquet",
        "6-policy/model/model.safetensors",
    ],
)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_flipped_bit_in_what_is_sealed_stops_the_run(file: str, place: float, run: Any, tmp_path: Path):
    flip(tmp_path / "run" / "round-1" / file, place)
    with pytest.raises(StageDamaged, match=file.rpartition("/")[2]):
        run()
    assert calls(tmp_path / "log") == []


# --- changed minds ---------------------------------------------------------------------------------------------------------


def test_a_changed_temperature_asks_again_and_back_asks_nothing(run: Any, undisturbed: Path, recipe: Any, tmp_path: Path):
    before = keys(undisturbed, "2-responses")
    asked = run(responses=recipe["responses"] | {"temperature": 1.1})
    assert len(asked) == len(set(asked)) == WANTED
    assert set(asked).isdisjoint(before)
    assert keys(tmp_path / "run", "2-responses")[:WANTED] == before, "what was paid for stays"
    assert run() == []
    assert digests(tmp_path / "run") == digests(undisturbed)


def test_reordered_inserted_and_duplicated_queries(run: Any, recipe: Any, tmp_path: Path):
    """One new query costs two requests, whatever else happens to the file; what is there twice is dropped with a reason."""
    texts = [*reversed(TEXTS), TEXTS[3], "Is it raining?", *TEXTS[:5]]
    path = write_queries(tmp_path / "more.jsonl", texts)
    assert len(run(queries=recipe["queries"] | {"path": path})) == 2
    durable = keys(tmp_path / "run", "2-responses")
    assert len(durable) == len(set(durable)) == WANTED + 2
    sealed = RunFolder.view(tmp_path / "run").stage(1, "1-principles").verify()
    assert (sealed.wanted, sealed.kept, sealed.dropped) == (len(texts), len(TEXTS) + 1, {"duplicate": 6})


# --- time ------------------------------------------------------------------------------------------------------------------


def test_a_clock_set_back_changes_nothing(
    recipe: dict[str, Any], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every look at the clock, and the time of every checkpoint, is a day before the one before."""
    days = iter(range(10**6))
    monkeypatch.setattr("time.time", lambda: 1.8e9 - 86400 * next(days))
    monkeypatch.setattr(folder, "_now", lambda: f"2026-01-01T00:00:{59 - next(days) % 60:02}+00:00")
    monkeypatch.setattr(opening, "open_engine", lambda *_, **__: ScriptedEngine(tmp_path / "log"))
    original = Keeper.on_save

    def on_save(self: Keeper, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        time = 1.7e9 - 86400 * state.global_step
        os.utime(folder, (time, time))
        original(self, args, state, control, **kwargs)
        kept.append(sorted(checkpoints.step_of(each) for each in Path(args.output_dir).glob("checkpoint-*")))

    kept: list[list[int]] = []
    monkeypatch.setattr(Keeper, "on_save", on_save)
    selfsteer.run(Recipe.model_validate(recipe | {"alignment": recipe["alignment"] | {"max_steps": 4}}))
    assert kept == [[1], [1, 2], [2, 3], [3, 4]], "the newest two by their steps, not by their times"
    assert len(calls(tmp_path / "log")) == WANTED
    assert keys(tmp_path / "run", "2-responses") == keys(undisturbed, "2-responses")
    selfsteer.run(Recipe.model_validate(recipe), replace=True)
    assert digests(tmp_path / "run") == digests(undisturbed)
