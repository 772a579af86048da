"""Judges, gates, contamination and dual generators in the pipeline, on the tiny model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import file_rows, rows, run
from conftest import QUERIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.pipeline import GateFailed
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.text import RecipeError

RecipeOf = Callable[..., dict[str, Any]]


def steered_logps(folder: str, principle: str, row: dict[str, Any], side: str) -> float:
    """log pi(response | principle as system message, query), by one plain forward."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "system", "content": principle}, *row["prompt"]]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = row[f"{side}_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf, tiny_folder: str) -> Path:
    """A run without a generator, judged by the tiny model itself, with an evaluation file that holds one of the queries."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    evaluation = folder.parent / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"question": QUERIES[0]}) + "\n")
    changes = {
        "generator.kind": "none",
        "alignment.max_steps": 1,
        "judge": {"kind": "llm", "model": tiny_folder},
        "quality.evaluation_files": [str(evaluation)],
        "quality.gates": {"contamination": "<= 0.5", "ties": ">= 0"},
    }
    run(recipe_of(folder, changes))
    return folder


def test_principle_consistency_is_the_difference_under_both_principles(judged: Path, tiny_folder: str):
    """Margin = [log pi(y+|x+) - log pi(y+|x-)] - [log pi(y-|x+) - log pi(y-|x-)], by plain forwards."""
    found = {row["query_id"]: row for row in file_rows(judged, "5-quality/verdicts.parquet") if row["by"] != "judge"}
    pairs = rows(judged, "5-preferences")
    assert found.keys() == {pair["query_id"] for pair in pairs}
    pair = pairs[0]
    good, bad = (
        [steered_logps(tiny_folder, pair["principles"][side], pair, answer) for side in ("good", "bad")]
        for answer in ("chosen", "rejected")
    )
    expected = (good[0] - good[1]) - (bad[0] - bad[1])
    assert found[pair["query_id"]]["margin"] == pytest.approx(expected, abs=1e-3)


def test_reports_contamination_and_gates_are_in_the_metrics(judged: Path):
    (this,) = json.loads((judged / "metrics.json").read_text())["rounds"]
    for by in ("judge", "principle_consistency"):
        assert this["pbaa"][by]["pairs"] == this["pbaa"]["pairs"]
    verdicts = [row for row in file_rows(judged, "5-quality/verdicts.parquet") if row["by"] == "judge"]
    points = [{"chosen": 1, "tie": 0.5, "rejected": 0}[row["preferred"]] for row in verdicts]
    assert this["pbaa"]["judge"]["accuracy"]["mean"] == pytest.approx(sum(points) / len(points))
    assert this["contamination"]["share"]["mean"] == pytest.approx(1 / this["pbaa"]["pairs"])
    overlaps = json.loads((judged / "round-1/5-quality/contamination.json").read_text())["overlaps"]
    assert [Path(overlap["file"]).name for overlap in overlaps] == ["evaluation.jsonl"]
    assert [(gate["name"], gate["passed"]) for gate in this["gates"]] == [("contamination", True), ("ties", True)]


def test_a_failed_gate_stops_before_alignment_and_a_looser_one_goes_on(recipe_of: RecipeOf, tmp_path: Path):
    changes = {"generator.kind": "none", "alignment.max_steps": 1, "quality.gates": {"length_chosen": ">= 1000"}}
    with pytest.raises(GateFailed, match="length_chosen"):
        run(recipe_of(tmp_path / "run", changes))
    folder = tmp_path / "run/round-1"
    assert (folder / "5-preferences/data.parquet").exists(), "the data stays"
    assert not (folder / "6-policy").exists() or not any((folder / "6-policy").iterdir())
    (this,) = json.loads((tmp_path / "run/metrics.json").read_text())["rounds"]
    assert [gate["passed"] for gate in this["gates"]] == [False]
    samples = (folder / "2-responses/MANIFEST.json").read_bytes()
    (this,) = run(recipe_of(tmp_path / "run", {**changes, "quality.gates": {"length_chosen": "<= 1000"}}))["rounds"]
    assert this["gates"][0].passed
    assert (folder / "6-policy/MANIFEST.json").exists()
    assert (folder / "2-responses/MANIFEST.json").read_bytes() == samples


def test_a_failed_gate_ends_the_command_with_2_and_the_table(recipe_of: RecipeOf, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    changes = {"generator.kind": "none", "quality.gates": {"length_chosen": ">= 1000"}}
    recipe.write_text(json.dumps(recipe_of(tmp_path / "run", changes)))
    ended = subprocess.run(
        [sys.executable, "-m", "selfsteer", "run", str(recipe)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "1 of 1 gates failed" in ended.stderr
    assert "FAILED: is not >= 1000" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_gate_that_only_warns(recipe_of: RecipeOf, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    quality = {"gates": {"length_chosen": ">= 1000"}, "on_failure": "warn", "principle_consistency": False}
    changes = {"generator.kind": "none", "alignment.max_steps": 1, "quality": quality}
    (this,) = run(recipe_of(tmp_path / "run", changes))["rounds"]
    assert not this["gates"][0].passed
    assert "aligned on these pairs all the same" in caplog.text
    assert not (tmp_path / "run/round-1/5-quality").exists(), "nothing to judge"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality.gates": {"acuracy": ">= 0.6"}}, "did you mean accuracy"),
        ({"quality.gates": {"overlap": "60"}}, "expected an operator and a number"),
        ({"quality.gates": {"accuracy": ">= 0.6"}}, "gate accuracy: needs a judge; set judge.kind"),
        ({"quality.gates": {"drift_accuracy": ">= 0"}}, "gate drift_accuracy: needs a judge"),
        (
            {"quality.gates": {"flips": "<= 0.3"}, "judge": {"kind": "reward_model", "model": "some/model"}},
            "gate flips: needs an LLM judge",
        ),
        (
            {
                "quality.gates": {"displacement_bad": "<= 20"},
                "generator.kind": "dual",
                "training": {"lora": {}, "displacement_steps": 0},
            },
            "gate displacement_bad: needs readings",
        ),
        ({"quality.gates": {"contamination": "<= 0"}}, "set quality.evaluation_files"),
        ({"quality.gates": {"on_policy_gain": "> 0"}, "generator.kind": "none"}, "needs a generator"),
        ({"judge.kind": "llm"}, "needs judge.model"),
        ({"judge.model": "some/model"}, "set judge.kind"),
        ({"generator.kind": "dual"}, "needs training.lora"),
        ({"generator.kind": "dual", "generator.objective": "l_plus", "training.lora": {}}, "one half alone"),
    ],
)
def test_what_cannot_be_held_is_refused_at_load(recipe_of: RecipeOf, tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        Recipe.model_validate(recipe_of(tmp_path / "run", changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": {"kind": "llm", "model": "/nowhere/judge"}}, "judge.model: '/nowhere/judge'"),
        (
            {"quality.evaluation_files": ["/nowhere/eval.jsonl"]},
            r"/nowhere/eval\.jsonl: no such file",
        ),
    ],
)
def test_a_missing_judge_or_file_leaves_no_trace(recipe_of: RecipeOf, tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(recipe_of(tmp_path / "run", changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"), [("\n\n", "no rows"), ('{"q": "one"}\n{"q": ', r"line 2.*JSON"), ("\x00\x01", "zero bytes")]
)
def test_a_damaged_evaluation_file_is_found_before_anything_is_sampled(
    recipe_of: RecipeOf, tmp_path: Path, content: str, says: str
):
    file = tmp_path / "evaluation.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"{file}.*{says}"):
        run(recipe_of(tmp_path / "run", {"quality.evaluation_files": [str(file)]}))
    assert not (tmp_path / "run").exists()


# --- two generators, queries held out --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf) -> Path:
    folder = tmp_path_factory.mktemp("dual") / "run"
    lora = {"rank": 4, "alpha": 64.0}
    changes = {"generator.kind": "dual", "training.lora": lora, "queries.holdout": 2, "alignment.max_steps": 1}
    run(recipe_of(folder, {**changes, "generator.learning_rate": 1e-2, "responses.temperature": 0}))
    return folder


def test_each_generator_of_two_is_trained_on_its_half(dual: Path, tiny_folder: str):
    """The margins after training are measured on the stage's own pairs: as many as there are trained queries."""
    trained = {row["query_id"] for row in rows(dual, "3-steering")}
    weights = set()
    for stage in ("4-generator-good", "4-generator-bad"):
        manifest = json.loads((dual / f"round-1/{stage}/MANIFEST.json").read_text())
        assert manifest["kept"] == len(trained) > 0
        measures = json.loads((dual / f"round-1/{stage}/measures.json").read_text())
        assert measures["reward"]["pairs"] == len(trained)
        weights.add((dual / f"round-1/{stage}/model/model.safetensors").read_bytes())
        settings = (dual / f"round-1/{stage}/adapter/adapter_config.json").read_text()
        assert tiny_folder not in settings, "the adapter's files say nothing of where it was trained"
    assert len(weights) == 2
    assert (Path(tiny_folder) / "model.safetensors").read_bytes() not in weights


def test_chosen_come_from_one_and_rejected_from_the_other(dual: Path):
    """At temperature 0 each is, to the last token, what its own model writes, and somewhere not what the other one does."""
    folders = {name: dual / f"round-1/4-generator-{name}/model" for name in ("good", "bad")}
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
    tokenizer = AutoTokenizer.from_pretrained(folders["good"])

    def greedy(name: str, row: dict[str, Any], principle: str) -> str:
        """Eight tokens, by one forward each."""
        messages = [{"role": "system", "content": row["principles"][principle]}, *row["prompt"]]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = len(ids)
        while len(ids) < begin + 8:
            with torch.no_grad():
                token = int(models[name](torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        return tokenizer.decode(ids[begin:])

    pairs = rows(dual, "5-preferences")
    assert pairs
    for side, own, other in (("chosen", "good", "bad"), ("rejected", "bad", "good")):
        written = [row[side][0]["content"] for row in pairs]
        assert written == [greedy(own, row, own) for row in pairs]
        assert written != [greedy(other, row, own) for row in pairs], "the models are told apart"
    (this,) = json.loads((dual / "metrics.json").read_text())["rounds"]
    assert {"generator", "bad_generator", "policy"} <= this.keys()


def test_held_out_queries_train_nothing_and_are_the_ones_judged(dual: Path):
    asked = {row["query_id"] for row in rows(dual, "1-principles")}
    trained = {row["query_id"] for row in rows(dual, "2-responses")}
    held_out = asked - trained
    assert len(held_out) == 2
    made = {row["query_id"] for row in rows(dual, "5-preferences")}
    assert held_out <= made, "pairs are made on them"
    judged = {row["query_id"] for row in file_rows(dual, "5-quality/verdicts.parquet") if row["pairs"] == "alignment"}
    assert judged == held_out
    assert json.loads((dual / "round-1/6-policy/MANIFEST.json").read_text())["kept"] == len(made - held_out)
