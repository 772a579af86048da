"""The gain of a generator: against plain forwards and a loop over the vocabulary, and where it is shown."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import no_model_left, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.recipe.sections import Recipe, Sampled
from selfsteer.recipe.text import RecipeError
from selfsteer.records import Change, Expected
from selfsteer.stages import gain as stage
from selfsteer.stages.status import stage_names
from selfsteer.training.gain import nucleus

RecipeOf = Callable[..., dict[str, Any]]
CHANGES = {
    "generator.max_steps": 3,
    "generator.learning_rate": 3e-2,
    "alignment.max_steps": 1,
    "queries.holdout": 3,
    "quality.gain": 3,
    "quality.gates": {"gain_entropy": ">= -100"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf) -> Path:
    folder = tmp_path_factory.mktemp("gain") / "run"
    run(recipe_of(folder, CHANGES))
    return folder


def gained(folder: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(folder / "round-1/4-gain/data.parquet").to_pylist()
    return {row["query_id"]: row for row in rows}


# --- the nucleus -----------------------------------------------------------------------------------------------------------


def by_a_loop(logps: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """What is sampled from, token by token."""
    weights = [math.exp(each / temperature) for each in logps]
    ordered = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept: dict[int, float] = {}
    for token in ordered:
        if sum(kept.values()) >= top_p * sum(weights):
            break
        kept[token] = weights[token]
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize(("temperature", "top_p", "scale"), [(0.7, 0.8, 3.0), (1.0, 1.0, 1.0), (1.3, 0.999, 0.01)])
def test_the_nucleus_is_what_is_sampled_from(temperature: float, top_p: float, scale: float):
    """The last has a nucleus beyond the tokens that are tried first."""
    generator = torch.Generator().manual_seed(0)
    logps = (scale * torch.randn(3, 1500, generator=generator)).log_softmax(-1)
    found = nucleus(logps, Sampled(temperature=temperature, top_p=top_p))
    for row, ids, probabilities in zip(logps.tolist(), found.ids.tolist(), found.probabilities.tolist(), strict=True):
        ours = {token: each for token, each in zip(ids, probabilities, strict=True) if each > 0}
        assert ours == pytest.approx(by_a_loop(row, temperature, top_p), rel=1e-4)
    assert found.entropy() == pytest.approx(
        sum(-each * math.log(each) for row in logps.tolist() for each in by_a_loop(row, temperature, top_p).values()) / 3,
        rel=1e-4,
    )


def test_at_temperature_zero_the_most_probable_token_is_certain():
    logps = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]).log()
    found = nucleus(logps, Sampled(temperature=0))
    assert (found.ids.tolist(), found.probabilities.tolist()) == ([[1], [0]], [[1.0], [1.0]])
    assert found.entropy() == 0
    assert found.mean(torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])) == pytest.approx(3.5)


# --- a run -----------------------------------------------------------------------------------------------------------------


def test_every_expectation_is_that_of_plain_forwards(finished: Path, tiny_folder: str):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    policy = AutoModelForCausalLM.from_pretrained(tiny_folder)
    generator = AutoModelForCausalLM.from_pretrained(finished / "round-1/4-generator/model")
    principles = {row["query_id"]: row for row in pq.read_table(finished / "round-1/1-principles/data.parquet").to_pylist()}
    parts = (finished / "round-1/4-gain/parts").glob("*.jsonl")
    samples = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    sampled = {tuple(each["data"]["token_ids"]): each["data"] for each in samples if "token_ids" in each["data"]}
    found = gained(finished)
    assert len(found) == 3
    checked = 0
    for query_id, row in found.items():
        query, steer = principles[query_id]["messages"], principles[query_id]["principles"]

        def logps(model: Any, messages: list[dict[str, str]], ids: list[int]) -> torch.Tensor:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + ids])).logits[0]
            return logits[len(prompt_ids) - 1 : len(prompt_ids) - 1 + len(ids)].double().log_softmax(-1)

        prompts = {role: [{"role": "system", "content": steer[role]}, *query] for role in ("good", "bad")}
        for role, opposite in (("good", "bad"), ("bad", "good")):
            for ids, sample in sampled.items():
                whole = [*ids, *([sample["end_id"]] if sample["finish_reason"] == "stop" else [])]
                if len(whole) != row[role]["tokens"]:
                    continue
                own, other, bare = (logps(policy, each, whole) for each in (prompts[role], prompts[opposite], query))
                after_own, after_bare = logps(generator, prompts[role], whole), logps(generator, query, whole)

                def mean(choice: torch.Tensor, values: torch.Tensor) -> float:
                    chosen = [by_a_loop(each, 0.7, 0.8) for each in choice.tolist()]
                    return sum(
                        weight * values[place, token].item()
                        for place, weights in enumerate(chosen)
                        for token, weight in weights.items()
                    ) / len(chosen)

                if mean(own, bare) != pytest.approx(row[role]["before"]["on_policy"], rel=1e-4):
                    continue  # another response of as many tokens
                checked += 1
                assert mean(after_own, bare) == pytest.approx(row[role]["after"]["on_policy"], rel=1e-4)
                assert mean(bare, bare) == pytest.approx(row[role]["before"]["bare"], rel=1e-4)
                assert mean(after_bare, bare) == pytest.approx(row[role]["after"]["bare"], rel=1e-4)
                assert mean(own, own - other) == pytest.approx(row[role]["before"]["following"], abs=1e-4)
                assert mean(after_own, own - other) == pytest.approx(row[role]["after"]["following"], abs=1e-4)
                assert mean(bare, after_bare) == pytest.approx(row[role]["after"]["unrelated"], rel=1e-4)
    assert checked >= 6, "every response of every query"


def test_the_parts_add_up_and_are_shown(finished: Path):
    this = json.loads((finished / "metrics.json").read_text())["rounds"][0]
    found = this["gain"]
    assert found["gain"]["mean"] == pytest.approx(found["same_prompt"]["mean"] + found["steering"]["mean"])
    assert found["gain"]["mean"] != 0
    assert found["displacement"]["mean"] < 0, "a training at such a rate takes something away"
    by_hand = [
        sum(row[role]["after"]["on_policy"] - row[role]["before"]["on_policy"] for role in ("good", "bad")) / 2
        for row in gained(finished).values()
    ]
    assert found["gain"]["mean"] == pytest.approx(sum(by_hand) / 3)
    assert found["queries"] == 3
    assert found["contexts"] == sum(row[role]["tokens"] for row in gained(finished).values() for role in ("good", "bad"))
    assert [gate["name"] for gate in this["gates"] if gate["passed"]] == ["gain_entropy"]
    assert "training changed" in (finished / "report.html").read_text()


def test_it_is_measured_once(finished: Path, recipe_of: RecipeOf):
    before = (finished / "round-1/4-gain/MANIFEST.json").read_bytes()
    run(recipe_of(finished, CHANGES))
    assert (finished / "round-1/4-gain/MANIFEST.json").read_bytes() == before


def test_two_generators_answer_for_a_principle_each(recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One after the other, and none of them stays in memory."""
    measure = stage._measure_missing

    def watched(*args: Any) -> None:
        with no_model_left():
            measure(*args)

    monkeypatch.setattr(stage, "_measure_missing", watched)
    dual = {"generator.kind": "dual", "training.lora": {"rank": 2}}
    found = run(recipe_of(tmp_path / "run", {**CHANGES, **dual}))["rounds"][0]["gain"]
    assert found["queries"] == 3
    rows = gained(tmp_path / "run").values()
    both = [row[role] for row in rows for role in ("good", "bad")]
    assert all(each["after"]["unrelated"] != each["before"]["unrelated"] for each in both), "both were trained"


@pytest.mark.parametrize(
    ("changes", "measured"),
    [({"generator.kind": "none"}, False), ({"generator.kind": "none", "generator.temperature": 0.4}, True)],
)
def test_a_cooler_policy_is_measured_like_a_generator(
    recipe_of: RecipeOf, tmp_path: Path, changes: dict[str, Any], measured: bool
):
    without_gates = {key: value for key, value in CHANGES.items() if key != "quality.gates"}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {**without_gates, **changes}))
    assert ("4-gain" in stage_names(recipe, "pbaa")) is measured
    if measured:
        found = run(recipe_of(tmp_path / "run", {**without_gates, **changes}))["rounds"][0]["gain"]
        assert found["entropy"].high < 0
        assert found["displacement"].mean == 0, "the weights are the same"


def test_it_needs_held_out_queries(recipe_of: RecipeOf, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"quality.gain: no query is kept out of the training; set queries.holdout"):
        Recipe.model_validate(recipe_of(tmp_path / "run", {"quality.gain": 4}))
    with pytest.raises(RecipeError, match=r"gate gain: needs a generator and held-out queries; set quality.gain=40"):
        Recipe.model_validate(recipe_of(tmp_path / "run", {"quality.gates": {"gain": "> 0"}}))


def test_what_the_numbers_say():
    """Of made-up changes: which part was the larger one, and whether one took what the other gave."""
    from selfsteer.measures.gain import gain, in_words

    def change(steered: float, bare: float, at: float) -> Change:
        before = Expected(on_policy=-1 - at, bare=-1 - at, following=0.1, entropy=0.5, unrelated=-1 - at)
        return Change(3, before, before._replace(on_policy=before.on_policy + steered, bare=before.bare + bare))

    def said(steered: float, bare: float) -> str:
        found = gain([[change(steered + 0.001 * at, bare, at)] for at in range(-4, 5)])
        assert found is not None
        return in_words(found)

    assert gain([]) is None
    assert said(0.1, 0.02) == "more on-policy, mostly by steering"
    assert said(0.1, 0.08) == "more on-policy, mostly by sharpening, the rest by steering"
    assert said(0.1, 0.2).startswith("more on-policy, but not by steering")
    assert said(-0.1, -0.3) == "less on-policy: what steering gained, displacement took"
    assert said(-0.3, -0.1) == "less on-policy"
    assert said(0.0, -0.2) == "steering gained, and displacement took it"
    assert said(0.0, 0.0) == "no change shown"
