"""Measures are sealed with what was measured: read back as they were, damage is noticed, and no file time decides."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import selfsteer
from selfsteer.measures.estimates import Estimate
from selfsteer.measures.metrics import from_plain, plain
from selfsteer.measures.quality import compare, measure
from selfsteer.recipe.sections import Recipe
from selfsteer.stages.base import read_measures
from selfsteer.stages.status import read_end, record_end
from selfsteer.store import columns
from selfsteer.store.durable import canonical_json
from selfsteer.store.folder import Origin, RunFolder, Stage, StageDamaged

VALUE = {
    "pairs": 3,
    "margin": {"nats": Estimate(0.1, None, None, 1), "curve": [1.5, 2.0]},
    "share": Estimate(0.5, 0.1, 0.9, 4),
    "errors": {"mean": 1},
}


def test_values_are_read_back_as_they_were():
    found = from_plain(json.loads(canonical_json(plain(VALUE))))
    assert found == VALUE
    assert isinstance(found["share"], Estimate)


@pytest.fixture(scope="module")
def finished(recipe_of: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "run"
    selfsteer.run(Recipe.model_validate(recipe_of(folder, {"generator.max_steps": 1, "alignment.max_steps": 1})))
    return folder


def test_the_sealed_measures_are_those_of_the_sealed_pairs(finished: Path):
    def rows(file: str) -> Any:
        return list(map(columns.pair, pq.read_table(finished / "round-1" / file).to_pylist()))

    own, made = rows("3-steering/policy-pairs.parquet"), rows("5-preferences/data.parquet")
    steering = read_measures(Stage(finished / "round-1/3-steering"))
    expected = {"pairs": measure(rows("3-steering/data.parquet")), "policy_pairs": measure(own)}
    assert {name: steering[name] for name in expected} == from_plain(plain(expected))
    assert steering["headroom"]["queries"] == len(own)
    preferences = read_measures(Stage(finished / "round-1/5-preferences"))
    assert preferences == from_plain(
        plain({"pairs": measure(made), "comparison": {**compare(made, own), "held_out": False}})
    )
    metrics = json.loads((finished / "metrics.json").read_text())["rounds"][0]
    assert metrics["alignment"].items() >= plain(preferences["pairs"]).items()
    assert metrics["comparison"] == plain(preferences["comparison"])


@pytest.mark.parametrize("stage", ["3-steering", "5-preferences", "6-policy"])
def test_measures_that_changed_are_noticed(stage: str, finished: Path):
    path = finished / "round-1" / stage / "measures.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1", b"2", 1))
    with pytest.raises(StageDamaged, match=r"measures\.json"):
        selfsteer.run(finished / "recipe.yaml")
    path.write_bytes(content)


def test_the_end_of_a_run_holds_for_its_recipe_and_its_data(tmp_path: Path):
    from selfsteer.store.folder import Contents

    with RunFolder(tmp_path / "run") as folder:
        folder.describe("seed: 1\n", {})
        stage = folder.stage(1, "5-preferences")
        stage.seal(Origin(settings={}, inputs={}), Contents(wanted=1, rows=[{"a": 1}]))
        assert read_end(folder, 1) is None
        record_end(folder, 1, "enough")
        assert read_end(folder, 1) == "enough"
        os.utime(folder.path / "recipe.yaml", (2**32, 2**32))  # newer than all else, as a copy may be
        assert read_end(folder, 1) == "enough"
        folder.describe("seed: 2\n", {})
        assert read_end(folder, 1) is None, "another recipe may end elsewhere"
        folder.describe("seed: 1\n", {})
        assert read_end(folder, 1) == "enough"
        stage.reopen()
        assert read_end(folder, 1) is None, "the data is no longer what that was decided on"


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"reason":"never"}'])
def test_a_damaged_end_is_none(damage: bytes, tmp_path: Path):
    with RunFolder(tmp_path / "run") as folder:
        folder.describe("seed: 1\n", {})
        folder.stage(1, "5-preferences")
        record_end(folder, 1, "enough")
        (folder.path / "round-1/ENDED.json").write_bytes(damage)
        assert read_end(folder, 1) is None
