"""Headroom: measured before the generator is trained, against plain forwards; a gate on it, and where it is shown."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.pipeline import GateFailed
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.text import RecipeError
from selfsteer.stages.status import status

RecipeOf = Callable[..., dict[str, Any]]
SHORT = {"generator.max_steps": 1, "alignment.max_steps": 1, "responses.max_new_tokens": 12}
BELOW, ABOVE = "<= -1", ">= -1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf) -> Path:
    folder = tmp_path_factory.mktemp("headroom") / "run"
    run(recipe_of(folder, {**SHORT, "quality.gates": {"headroom": ABOVE}}))
    return folder


def prefixes(folder: Path) -> dict[str, dict[str, Any]]:
    table = pq.read_table(folder / "round-1/3-steering/headroom.parquet")
    return {row["query_id"]: row for row in table.to_pylist()}


def test_every_prefix_is_scored_given_the_bare_query(finished: Path, tiny_folder: str):
    """By one forward a response; the whole responses are the pairs that PBAA is measured on."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    found = prefixes(finished)
    steering = pq.read_table(finished / "round-1/3-steering/data.parquet").to_pylist()
    assert found.keys() == {row["query_id"] for row in steering}
    for row in pq.read_table(finished / "round-1/2-responses/data.parquet").to_pylist():
        if row["query_id"] not in found:
            continue
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for role in ("original", "good", "bad"):
            response = row[role]
            ids = response["token_ids"] + ([response["end_id"]] if response["finish_reason"] == "stop" else [])
            with torch.no_grad():
                log_probs = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
            each = [log_probs[len(prompt_ids) + i - 1, token].item() for i, token in enumerate(ids)]
            scored = found[row["query_id"]][role]
            assert [part["tokens"] for part in scored] == ([8] if len(ids) > 8 else []) + [len(ids)]
            for part in scored:
                assert part["logps"] == pytest.approx(sum(each[: part["tokens"]]), rel=1e-5)


def test_it_is_in_the_metrics_and_on_the_page(finished: Path):
    this = json.loads((finished / "metrics.json").read_text())["rounds"][0]
    assert this["headroom"]["queries"] == len(prefixes(finished))
    means = {
        role: [math.exp(row[role][-1]["logps"] / row[role][-1]["tokens"]) for row in prefixes(finished).values()]
        for role in ("original", "good", "bad")
    }
    for role, values in means.items():
        assert this["headroom"][role]["mean"] == pytest.approx(sum(values) / len(values))
    assert this["pbaa"]["on_policy"]["chosen"]["mean"] == pytest.approx(this["headroom"]["good"]["mean"], rel=1e-5)
    assert this["stages"]["3-steering"]["kept"] == this["headroom"]["queries"]
    page = (finished / "report.html").read_text()
    assert "Headroom before the generator" in page
    assert "On-policy probability y_o 0." in page
    assert "tokens 9 to 32" in page
    assert [gate["passed"] for gate in this["gates"]] == [True]


def test_a_gate_on_it_stops_before_the_generator_is_trained(recipe_of: RecipeOf, tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(GateFailed, match=r"headroom_rejected[^\n]*FAILED") as caught:
        run(recipe_of(folder, {**SHORT, "quality.gates": {"headroom_rejected": BELOW}}))
    assert "On-policy probability y_o" in str(caught.value), "it says what there is to win"
    assert not (folder / "round-1/4-generator").exists()
    found = status(folder)
    assert found["next"].startswith("nothing: round 1 did not align the policy: headroom_rejected")
    assert [stage["name"] for stage in found["stages"]] == ["1-principles", "2-responses", "3-steering"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [(gate["name"], gate["passed"]) for gate in metrics["rounds"][0]["gates"]] == [("headroom_rejected", False)]
    assert "headroom_rejected" in metrics["run"]["ended"]
    assert "pairs" not in metrics["run"], "none were made"
    assert "Headroom before the generator" in (folder / "report.html").read_text()
    before = (folder / "round-1/3-steering/MANIFEST.json").read_bytes()
    run(recipe_of(folder, {**SHORT, "quality.gates": {"headroom_rejected": ABOVE}}))
    assert (folder / "round-1/3-steering/MANIFEST.json").read_bytes() == before, "with another bound it goes on from there"


def test_what_lies_behind_a_failed_gate_is_of_an_earlier_try(finished: Path, recipe_of: RecipeOf, tmp_path: Path):
    """Whether it was finished, under other settings, or broken off; the metrics have the stages of this one alone."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = recipe_of(folder, {**SHORT, "seed": 1, "quality.gates": {"headroom": BELOW, "kept_share": ">= 0"}})
    for _ in range(2):
        with pytest.raises(GateFailed, match=r"headroom [^\n]*FAILED"):
            run(recipe, replace=True)
        (this,) = json.loads((folder / "metrics.json").read_text())["rounds"]
        assert list(this["stages"]) == ["1-principles", "2-responses", "3-steering"]
        assert [gate["name"] for gate in this["gates"]] == ["headroom"]
        (folder / "round-1/4-generator/MANIFEST.json").unlink(missing_ok=True)


def test_in_a_later_round_the_policy_of_the_one_before_is_the_result(recipe_of: RecipeOf, tmp_path: Path):
    """The bound lies between the two rounds' headroom, whichever is the larger."""
    folder, rounds = tmp_path / "run", {**SHORT, "rounds": 2}
    measured = [each["headroom"]["all"].mean for each in run(recipe_of(folder, rounds))["rounds"]]
    bound = f"{'>=' if measured[0] > measured[1] else '<='} {sum(measured) / 2:.9f}"
    again = tmp_path / "again"
    with pytest.raises(GateFailed, match=r"headroom [^\n]*FAILED"):
        run(recipe_of(again, {**rounds, "quality.gates": {"headroom": bound}}))
    facts = json.loads((again / "metrics.json").read_text())["run"]
    assert facts["policy_round"] == 1
    assert facts["ended"].startswith("round 2 did not align the policy: headroom")
    assert (again / "round-1/6-policy/model/README.md").exists()
    assert not (again / "round-2/4-generator").exists()


def test_a_gate_that_warns_goes_on(recipe_of: RecipeOf, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    changes = {"quality.gates": {"headroom": BELOW}, "quality.on_failure": "warn"}
    found = run(recipe_of(tmp_path / "run", {**SHORT, **changes}))
    assert [gate.passed for gate in found["rounds"][0]["gates"]] == [False]
    assert "the generator is trained all the same" in caplog.text


@pytest.mark.parametrize("changes", [{"generator.objective": "equation_3"}, {"generator.kind": "none"}])
def test_without_a_bare_answer_there_is_no_headroom(recipe_of: RecipeOf, tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"gate headroom: needs a generator that trains on y_o"):
        Recipe.model_validate(recipe_of(tmp_path / "run", {**changes, "quality.gates": {"headroom": "> 0"}}))
    assert "headroom" not in run(recipe_of(tmp_path / "run", {**SHORT, **changes}))["rounds"][0]
    assert not list((tmp_path / "run").rglob("headroom.parquet"))
