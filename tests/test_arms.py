"""The arms of a comparison that `test_comparison.py` does not run, from beginning to end on the tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import QUERIES
from tiny import CHAT_TEMPLATE

from selfsteer import comparing, run
from selfsteer.recipe.sections import Recipe
from selfsteer.reports.comparison import ComparisonResult, write_comparison, write_comparison_page

RecipeOf = Callable[..., dict[str, Any]]
ARMS = ["pbaa", "rlcd", "weak_principles", "ipo", "given"]


def rows(folder: Path, arm: str, stage: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{arm}-seed0/round-1/{stage}/data.parquet").to_pylist()


def manifest(folder: Path, arm: str, stage: str) -> dict[str, Any]:
    return json.loads((folder / f"{arm}-seed0/round-1/{stage}/MANIFEST.json").read_text())


@pytest.fixture(scope="module")
def recipe(recipe_of: RecipeOf, tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("arms")
    (folder / "judge.jinja").write_text(CHAT_TEMPLATE)
    pairs = [{"prompt": query, "chosen": f"Here is {query}", "rejected": "A fox, I think."} for query in QUERIES]
    (folder / "given.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = {
        "queries.holdout": 2,
        "generator.max_steps": 1,
        "alignment.max_steps": 1,
        "training.displacement_steps": 1,
        "principles.max_new_tokens": 8,
        "principles.retries": 0,
        "compare": {"align": True, "given": str(folder / "given.jsonl")},
        "judge": {"kind": "llm", "model": tiny_folder, "chat_template": str(folder / "judge.jinja")},
    }
    return Recipe.model_validate(recipe_of(folder / "all", changes))


@pytest.fixture(scope="module")
def result(recipe: Recipe) -> ComparisonResult:
    return comparing.compare(recipe, ARMS, [0])


def test_every_arm_is_measured_and_aligned(recipe: Recipe, result: ComparisonResult):
    for arm in ARMS:
        found = result["arms"][arm]
        assert {"on_policy_all", "accuracy"} <= found["measures"].keys()
        assert ("principle_consistency" in found["measures"]) is (arm != "given"), "given pairs have no principles"
        assert (Path(recipe.output) / f"{arm}-seed0/round-1/6-policy/model/model.safetensors").exists()
        assert ("wins" in found) is (arm != "given")
        assert ("generator" in found) is (arm in ("weak_principles", "ipo"))


def test_rlcd_has_one_fixed_pair_of_principles(recipe: Recipe, result: ComparisonResult):
    found = rows(Path(recipe.output), "rlcd", "1-principles")
    assert len(found) == len(QUERIES)
    assert len({(row["principles"]["good"], row["principles"]["bad"]) for row in found}) == 1
    assert {row["principles"]["concision"] for row in found} == {False}
    assert len({row["principles"]["good"] for row in rows(Path(recipe.output), "pbaa", "1-principles")}) > 1


def test_weak_principles_are_asked_of_the_policy(recipe: Recipe, result: ComparisonResult):
    """Random weights write none: each query was asked once, and a library pair stands in, with the reason."""
    found = rows(Path(recipe.output), "weak_principles", "1-principles")
    assert all(row["principles"]["fallback"] for row in found)
    parts = (Path(recipe.output) / "weak_principles-seed0/round-1/1-principles/parts").glob("*.jsonl")
    assert sum(len(part.read_text().splitlines()) for part in parts) == len(QUERIES)


def test_ipo_trains_both_models_with_ipo(result: ComparisonResult):
    """(0 - 1 / (2 * 0.1))^2 = 25 at first, of one pair in the alignment, of two (and an SFT term) in the generator."""
    arm = result["arms"]["ipo"]
    assert arm["policy"]["first"] == pytest.approx(25.0)
    assert 50.0 < arm["generator"]["first"] < 55.0
    assert result["arms"]["pbaa"]["policy"]["first"] == pytest.approx(0.693147, abs=1e-5)


def test_headroom_and_displacement_stand_beside_the_gains(recipe: Recipe, result: ComparisonResult):
    """What each arm's own run measured."""
    folder = Path(recipe.output)
    (round,) = json.loads((folder / "ipo-seed0" / "metrics.json").read_text())["rounds"]
    arm = result["arms"]["ipo"]
    moved = {key: round[key]["displacement"]["unrelated_token"]["mean"] for key in ("generator", "policy")}
    assert arm["headroom"] == pytest.approx(round["headroom"]["all"]["mean"])
    assert [arm["generator"]["unrelated_token"], arm["policy"]["unrelated_token"]] == pytest.approx([*moved.values()])
    assert "headroom" not in result["arms"]["pbaa"]
    write_comparison(folder, result)
    write_comparison_page(folder)
    trainings = (folder / "comparison.md").read_text().split("### Training")[1]
    (row,) = (line.split(" | ") for line in trainings.splitlines() if line.startswith("| ipo |"))
    assert [row[at] for at in (1, 4, 6)] == [f"{value:+.3f}" for value in (arm["headroom"], *moved.values())]


def test_given_pairs_are_those_of_the_file(recipe: Recipe, result: ComparisonResult):
    found = rows(Path(recipe.output), "given", "5-preferences")
    assert [row["chosen"][0]["content"] for row in found] == [f"Here is {query}" for query in QUERIES]
    assert manifest(Path(recipe.output), "given", "6-policy")["kept"] == len(QUERIES) - 2
    assert result["arms"]["given"]["queries"] == 2


def test_another_chat_template_of_the_judge_decides_wins_anew(recipe: Recipe, result: ComparisonResult):
    """The text in its file counts; answers that were sampled are not sampled again."""
    before = {stage: manifest(Path(recipe.output), "rlcd", stage) for stage in ("6-policy", "7-answers")}
    parts = sorted((Path(recipe.output) / "rlcd-seed0/round-1/7-answers/parts").glob("*.jsonl"))
    answered = {json.loads(line)["key"] for part in parts for line in part.read_text().splitlines()}
    assert recipe.judge.chat_template is not None
    Path(recipe.judge.chat_template).write_text("Hello." + CHAT_TEMPLATE)
    comparing.compare(recipe, ["pbaa", "rlcd"], [0])
    after = {stage: manifest(Path(recipe.output), "rlcd", stage) for stage in before}
    assert after["6-policy"] == before["6-policy"]
    assert after["7-answers"]["inputs"] != before["7-answers"]["inputs"]
    parts = sorted((Path(recipe.output) / "rlcd-seed0/round-1/7-answers/parts").glob("*.jsonl"))
    records = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    new = [record for record in records if record["key"] not in answered]
    assert new
    assert not any("token_ids" in json.dumps(record) for record in new), "verdicts alone are new"


@pytest.fixture(scope="module")
def controls(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ComparisonResult]:
    folder = tmp_path_factory.mktemp("controls") / "all"
    changes = {"queries.holdout": 2, "generator.max_steps": 1, "generator.batch_size": 8, "compare.cooler": 0.3}
    recipe = Recipe.model_validate(recipe_of(folder, changes))
    return folder, comparing.compare(recipe, ["pbaa", "sso", "sft_only", "cooler"], [0])


def test_sft_only_trains_on_the_chosen_responses_alone(controls: tuple[Path, ComparisonResult]):
    """The first loss is the mean over the queries of -(log pi(y+ | x+) / |y+| + log pi(y_o | x-) / |y_o|)."""
    folder, result = controls
    steering = rows(folder, "sft_only", "3-steering")
    assert steering == rows(folder, "sso", "3-steering")
    losses = [-row["ref_chosen_logps"] / row["chosen_tokens"] for row in steering]
    assert result["arms"]["sft_only"]["generator"]["first"] == pytest.approx(2 * sum(losses) / len(losses), rel=1e-5)
    assert manifest(folder, "sft_only", "4-generator")["settings"]["objective"]["sft_weight"] == 0


def test_cooler_is_the_policy_at_another_temperature(controls: tuple[Path, ComparisonResult]):
    folder, result = controls
    settings = {arm: manifest(folder, arm, "2-responses")["settings"] for arm in ("pbaa", "sso", "cooler")}
    assert [each["responses"]["temperature"] for each in settings.values()] == [0.7, 0.7, 0.3]
    assert "generator" not in result["arms"]["cooler"]
    seeds = [[row["good"]["seed"] for row in rows(folder, arm, "2-responses")] for arm in ("pbaa", "cooler")]
    assert seeds[0] == seeds[1], "the same random numbers"
    texts = [[row["good"]["text"] for row in rows(folder, arm, "2-responses")] for arm in ("pbaa", "cooler")]
    assert texts[0] != texts[1]
    measures = {arm: result["arms"][arm]["measures"]["on_policy_all"].mean for arm in ("pbaa", "cooler")}
    assert measures["cooler"] > measures["pbaa"], "cooler is more probable, steered or not"
    assert "| cooler |" in (folder / "comparison.md").read_text()
    assert "Variety" in (folder / "comparison.md").read_text()


def test_a_generator_may_answer_at_another_temperature(recipe_of: RecipeOf, tmp_path: Path):
    """The policy's responses, and what is trained on them, are those of before."""
    folder = tmp_path / "run"
    changes = {"generator.max_steps": 1, "alignment.max_steps": 1}
    run(Recipe.model_validate(recipe_of(folder, changes)))
    before = {stage: (folder / f"round-1/{stage}/MANIFEST.json").read_text() for stage in ("2-responses", "4-generator")}
    pairs = (folder / "round-1/5-preferences/MANIFEST.json").read_text()
    run(Recipe.model_validate(recipe_of(folder, {**changes, "generator.temperature": 0.2})), replace=True)
    assert before == {stage: (folder / f"round-1/{stage}/MANIFEST.json").read_text() for stage in before}
    now = json.loads((folder / "round-1/5-preferences/MANIFEST.json").read_text())
    assert now["settings"]["responses"]["temperature"] == 0.2
    assert now["outputs"] != json.loads(pairs)["outputs"]
