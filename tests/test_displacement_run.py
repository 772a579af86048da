"""The displacement meter in whole runs: whose answers it measures, that none of them trains, what is reported and gated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import QUERIES

import selfsteer
from selfsteer.given import train_pairs
from selfsteer.pipeline import GateFailed
from selfsteer.recipe.sections import Recipe, RecipeError
from selfsteer.training.trainer import read_history

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

RecipeOf = Callable[..., dict[str, Any]]


def run(recipe: dict[str, Any]) -> Any:
    return selfsteer.run(Recipe.model_validate(recipe))["rounds"][0]


def ids(run_folder: Path, file: str) -> set[str]:
    return set(pq.read_table(run_folder / "round-1" / file).column("query_id").to_pylist())


def readings(run_folder: Path, stage: str) -> list[int]:
    history = read_history(run_folder / "round-1" / stage / "history.jsonl")
    return [step["step"] for step in history if "unrelated_moved" in step]


def test_held_out_queries_are_measured_and_gated(recipe_of: RecipeOf, tmp_path: Path):
    changes = {
        "queries.holdout": 2,
        "training.displacement_steps": 2,
        "generator.max_steps": 3,
        "alignment.max_steps": 3,
        "quality.gates": {"displacement": "<= 1000"},
    }
    found = run(recipe_of(tmp_path / "run", changes))
    aside = ids(tmp_path / "run", "2-responses/unrelated.parquet")
    assert len(aside) == 2
    assert not aside & ids(tmp_path / "run", "2-responses/data.parquet")
    for training, stage in (("generator", "4-generator"), ("policy", "6-policy")):
        assert readings(tmp_path / "run", stage) == [2, 3]
        moved = found[training]["displacement"]
        assert moved["unrelated"].n == 2
        assert moved["lost"].mean == -moved["unrelated"].mean != 0
        assert moved["chosen"].mean == found[training]["curve"][-1]["chosen_moved"]
    (gate,) = found["gates"]
    assert gate.passed
    assert gate.value == found["generator"]["displacement"]["lost"]
    page = (tmp_path / "run/report.html").read_text()
    assert "How far responses have moved" in page
    assert "unrelated responses" in page
    with pytest.raises(GateFailed, match="displacement"):
        run(recipe_of(tmp_path / "run", changes | {"quality.gates": {"displacement": "<= -1000"}}))


def test_without_held_out_queries_one_of_32_is_set_aside(recipe_of: RecipeOf, tmp_path: Path):
    """Of 33 queries one: it is answered bare, its pair is made like all others, and neither training sees it."""
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"query": f"{QUERIES[n % 4]} Number {n}."}) + "\n" for n in range(33)))
    changes = {
        "queries.path": str(queries),
        "responses.max_new_tokens": 4,
        "generator.max_steps": 1,
        "alignment.epochs": 1,
        "alignment.batch_size": 64,
        "filters.near_identical": 1.0,
        "quality.sample": 1,
    }
    found = run(recipe_of(tmp_path / "run", changes))
    (aside,) = ids(tmp_path / "run", "2-responses/unrelated.parquet")
    assert aside not in ids(tmp_path / "run", "2-responses/data.parquet")
    assert found["generator"]["displacement"]["unrelated"].n == 1
    assert found["policy"]["displacement"]["unrelated"].n == 1
    made = pq.read_table(tmp_path / "run/round-1/5-preferences/data.parquet").to_pylist()
    tokens = sum(row["chosen_tokens"] + row["rejected_tokens"] for row in made if row["query_id"] != aside)
    assert found["policy"]["curve"][0]["tokens"] == tokens


def test_pbaa_answers_the_held_out_queries_bare(recipe_of: RecipeOf, tmp_path: Path):
    changes = {"queries.holdout": 2, "generator.kind": "none", "alignment.max_steps": 1}
    found = run(recipe_of(tmp_path / "run", changes))
    assert len(ids(tmp_path / "run", "2-responses/unrelated.parquet")) == 2
    assert found["policy"]["displacement"]["unrelated"].n >= 1


def test_it_can_be_switched_off(recipe_of: RecipeOf, tmp_path: Path):
    changes = {"queries.holdout": 2, "training.displacement_steps": 0, "generator.max_steps": 1, "alignment.max_steps": 1}
    found = run(recipe_of(tmp_path / "run", changes))
    assert not (tmp_path / "run/round-1/2-responses/unrelated.parquet").exists()
    assert "displacement" not in found["generator"]
    with pytest.raises(RecipeError, match=r"gate displacement: needs .*training.displacement_steps"):
        Recipe.model_validate(recipe_of(tmp_path / "run", changes | {"quality.gates": {"displacement": "<= 1"}}))


def test_given_pairs_are_measured_on_those_held_out(recipe_of: RecipeOf, tmp_path: Path):
    pairs = [{"prompt": query, "chosen": f"Here is {query}", "rejected": "A fox, I think."} for query in QUERIES[:6]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = {"queries.holdout": 3, "alignment.max_steps": 1, "training.displacement_steps": 1}
    found = train_pairs(tmp_path / "pairs.jsonl", Recipe.model_validate(recipe_of(tmp_path / "run", changes)))
    assert found["rounds"][0]["policy"]["displacement"]["unrelated"].n == 3
    changes = {"alignment.max_steps": 1, "training.stop_at_displacement": 0.1}
    with pytest.raises(ValueError, match=r"set queries\.holdout"):
        train_pairs(tmp_path / "pairs.jsonl", Recipe.model_validate(recipe_of(tmp_path / "other", changes)))
