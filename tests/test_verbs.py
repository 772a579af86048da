"""The public functions of the package: each does what the command of its name does."""

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import selfsteer
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.text import RecipeError
from selfsteer.store.folder import began

RecipeOf = Callable[..., dict[str, Any]]

SHORT = {"generator.max_steps": 1, "alignment.max_steps": 1, "queries.holdout": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf) -> Path:
    folder = tmp_path_factory.mktemp("verbs") / "run"
    selfsteer.run(Recipe.model_validate(recipe_of(folder, SHORT)))
    return folder


def test_no_module_takes_the_name_of_a_function():
    """A module of the package becomes an attribute of it as soon as anything imports it."""
    names = {module.name for module in pkgutil.iter_modules(selfsteer.__path__)}
    assert names.isdisjoint(selfsteer.__all__)
    for name in names - {"__main__"}:
        importlib.import_module(f"selfsteer.{name}")
    assert all(callable(getattr(selfsteer, name)) for name in selfsteer.__all__)


def test_a_recipe_is_loaded_with_overrides_and_errors_name_the_key():
    assert selfsteer.load("quickstart", "queries.limit=48").queries.limit == 48
    with pytest.raises(RecipeError, match=r"queries\.limit") as error:
        selfsteer.load("quickstart", "queries.limit=0")
    assert "command line" not in str(error.value)


def test_a_finished_run_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = selfsteer.status(folder)
    assert {stage["state"] for stage in found["stages"]} == {"sealed"}
    metrics = json.loads((folder / "metrics.json").read_text())
    text = selfsteer.report(str(folder))
    assert f"{metrics['rounds'][0]['alignment']['on_policy']['all']['mean']:.3f}" in text
    assert str(folder / "report.html") in text.replace("\n", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert selfsteer.report(str(folder)) == text, "plain text wherever it is asked for"


def test_the_pairs_of_a_run_are_measured(folder: Path):
    metrics = json.loads((folder / "metrics.json").read_text())["rounds"][0]
    found = selfsteer.measure(folder)
    assert found["pairs"] == metrics["alignment"]["pairs"]
    assert found["overlap"].mean == pytest.approx(metrics["alignment"]["overlap"]["mean"])
    sampled = metrics["alignment"]["on_policy"]["all"]["mean"]
    assert found["on_policy"]["all"].mean == pytest.approx(sampled, rel=0.01), "of the ids that were sampled"


def test_pairs_are_exported_and_trained_on(folder: Path, tmp_path: Path):
    found = selfsteer.export(folder, tmp_path / "pairs", "trl", keep_truncated=True)
    pairs = json.loads((folder / "metrics.json").read_text())["rounds"][0]["alignment"]["pairs"]
    assert (found.written, found.dropped) == (pairs - 2, {"held out": 2})
    whole = selfsteer.export(folder, tmp_path / "whole", "trl", keep_truncated=True, keep_held_out=True)
    assert whole.written == pairs
    trained = selfsteer.train(
        folder,
        folder / "recipe.yaml",
        f"output={tmp_path / 'trained'}",
        "quality.principle_consistency=false",
        "policy.date=2025-01-31",
    )
    assert trained["rounds"][0]["policy"]["steps"] == 1
    assert began(tmp_path / "trained") == "2025-01-31", "the day that its template was told"
    ids = [
        pq.read_table(each / "round-1/5-preferences/data.parquet", columns=["query_id", "chosen_ids"]).to_pylist()
        for each in (folder, tmp_path / "trained")
    ]
    assert ids[0] == ids[1], "trained on what was sampled, not on what its text would be"
    exported = selfsteer.measure(tmp_path / "pairs", selfsteer.load(folder / "recipe.yaml").policy.model)
    assert exported["pairs"] == found.written, "the folder that export wrote, as well as the file in it"


def test_pairs_and_recipe_in_the_wrong_order_are_named(folder: Path):
    with pytest.raises(ValueError, match=r"recipe\.yaml is a recipe, and the pairs come first"):
        selfsteer.train(folder / "recipe.yaml", folder)


def test_arms_are_compared(tmp_path: Path, recipe_of: RecipeOf):
    changes = SHORT | {"generator.kind": "none", "policy.date": "2025-01-31"}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "all", changes))
    found = selfsteer.compare(recipe, arms=["pbaa"], seeds=[3])
    assert (list(found["arms"]), found["seeds"]) == (["pbaa"], [3])
    assert began(tmp_path / "all") == "2025-01-31", "the day that its templates were told"
    assert "pbaa" in selfsteer.report(tmp_path / "all")


def test_what_will_not_do_is_refused_in_words(tiny_folder: str, tmp_path: Path):
    with pytest.raises(ValueError, match="ifeval"):
        selfsteer.evaluate(tiny_folder, ["ifevla"], output=tmp_path / "evaluations")
    with pytest.raises(ValueError, match="no run"):
        selfsteer.status(tmp_path)
    with pytest.raises(ValueError, match="overrides go with the path"):
        selfsteer.run(selfsteer.load("quickstart"), "seed=1")


def test_a_program_that_sets_up_no_logging_hears_nothing(folder: Path):
    program = f"import selfsteer; selfsteer.run({str(folder / 'recipe.yaml')!r})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")
