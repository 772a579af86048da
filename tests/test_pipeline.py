"""The whole method on a model of 31,000 weights: what is on disk, what is measured, what is reused and what is made anew."""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from builders import manifest, plain_logps, rows, run, samples, training_job
from conftest import QUERIES
from tiny import CHAT_TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.data.exchange import export
from selfsteer.given import measure_pairs, train_pairs
from selfsteer.measures.metrics import read_metrics
from selfsteer.models import load_tokenizer
from selfsteer.pipeline import write_report
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Policy, Recipe
from selfsteer.records import Pair
from selfsteer.stages.preferences import usable_pairs
from selfsteer.stages.status import status
from selfsteer.store.folder import RunFolder
from selfsteer.training.objective import LOSSES
from selfsteer.training.train import train
from selfsteer.training.trainer import read_history

STAGES = ("1-principles", "2-responses", "3-steering", "4-generator", "5-preferences", "6-policy")
RecipeOf = Callable[..., dict[str, Any]]


def contents(folder: Path) -> dict[str, str]:
    """Every file of the stages with its digest."""
    files = sorted(file for file in folder.glob("round-*/**/*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf) -> Path:
    """One run from beginning to end; tests that go on with it take a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe_of(folder))
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def metrics(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "metrics.json").read_text())


# --- what is on disk -------------------------------------------------------------------------------------------------------


def test_all_six_stages_are_sealed_and_whole(finished: Path):
    folder = RunFolder.view(finished)
    for name in STAGES:
        assert folder.stage(1, name).verify().stage
    assert {"recipe.yaml", "run.json", "LOCK", "metrics.json", "report.html"} <= {file.name for file in finished.iterdir()}
    session = json.dumps(folder.sessions())
    assert "transformers" in session
    assert "2.13.0" in session


def test_counts_add_up(finished: Path, metrics: dict[str, Any]):
    for name in STAGES:
        sealed = manifest(finished, name)
        assert sealed["wanted"] == sealed["kept"] + sum(sealed["dropped"].values())
        lines = (finished / "round-1" / name / "dropped.jsonl").read_text().splitlines()
        assert Counter(json.loads(line)["reason"] for line in lines) == sealed["dropped"]
        shown = metrics["rounds"][0]["stages"][name]
        assert (shown["wanted"], shown["kept"], shown["dropped"]) == (sealed["wanted"], sealed["kept"], sealed["dropped"])


def test_every_stage_says_where_its_time_went(finished: Path, metrics: dict[str, Any]):
    """Each part in the stages that have it, no more than the stage took; tokens are those of the responses."""
    stages = metrics["rounds"][0]["stages"]
    for name, stage in stages.items():
        assert sum(part["seconds"] for part in stage["parts"].values()) <= stage["seconds"] + 0.01, name
        files = [file for file in (finished / "round-1" / name).rglob("*") if file.is_file()]
        records = {"MANIFEST.json", "elapsed.json", "README.md", "history.jsonl"}
        least = sum(file.stat().st_size for file in files if file.name not in records)
        assert least <= stage["disk"] <= sum(file.stat().st_size for file in files), name
    assert {"load", "render", "sample", "journal"} <= stages["2-responses"]["parts"].keys()
    assert {"load", "score"} <= stages["3-steering"]["parts"].keys()
    trained = {"load", "forward", "backward", "optimizer", "checkpoint"}
    assert trained <= stages["4-generator"]["parts"].keys() & stages["6-policy"]["parts"].keys()
    answered = rows(finished, "2-responses")
    sampled = sum(len(row[role]["token_ids"]) for row in answered for role in ("good", "bad", "original"))
    assert stages["2-responses"]["parts"]["sample"]["tokens"] >= sampled > 0
    learned = sum(row["chosen_tokens"] + row["rejected_tokens"] for row in rows(finished, "3-steering"))
    assert stages["4-generator"]["parts"]["forward"]["tokens"] % learned == 0, "whole epochs"


def test_responses_are_kept_with_tokens_reasons_and_seeds(finished: Path):
    found = rows(finished, "2-responses")
    assert [row["messages"][-1]["content"] for row in found] == list(QUERIES), "in the order of the input"
    seeds = [row[role]["seed"] for row in found for role in ("good", "bad", "original")]
    assert len(set(seeds)) == len(seeds)
    tokenizer = AutoTokenizer.from_pretrained(finished / "round-1/6-policy/model")
    for row in found:
        for role in ("good", "bad", "original"):
            response = row[role]
            assert response["finish_reason"] in ("stop", "length")
            assert 0 < len(response["token_ids"]) <= 8 or response["finish_reason"] == "stop"
            assert response["text"] == tokenizer.decode(response["token_ids"])


def test_steering_pairs_are_the_table_of_the_method(finished: Path):
    """x+: y+ above y-; x-: y_o above y+; both of a query together."""
    answered = {row["query_id"]: row for row in rows(finished, "2-responses")}
    steering = rows(finished, "3-steering")
    assert len(steering) == 2 * manifest(finished, "3-steering")["kept"] > 0
    for plus, minus in zip(steering[::2], steering[1::2], strict=True):
        source = answered[plus["query_id"]]
        assert minus["query_id"] == plus["query_id"]
        assert (plus["kind"], minus["kind"]) == ("l_plus", "l_minus")
        assert [turn["content"] for turn in plus["prompt"]] == [
            source["principles"]["good"],
            source["messages"][0]["content"],
        ]
        assert [turn["content"] for turn in minus["prompt"]] == [
            source["principles"]["bad"],
            source["messages"][0]["content"],
        ]
        texts = [pair[side][0]["content"] for pair in (plus, minus) for side in ("chosen", "rejected")]
        assert texts == [source[role]["text"] for role in ("good", "bad", "original", "good")]


def test_preferences_are_the_generator_s_on_the_bare_query(finished: Path):
    found = rows(finished, "5-preferences")
    asked = {row["query_id"]: row for row in rows(finished, "1-principles")}
    policy = {row["query_id"]: row["good"]["text"] for row in rows(finished, "2-responses")}
    assert len(found) == manifest(finished, "5-preferences")["kept"] > 0
    assert [row["query_id"] for row in found] == [key for key in asked if key in {row["query_id"] for row in found}]
    for row in found:
        assert row["prompt"] == asked[row["query_id"]]["messages"]
        assert row["principles"] == asked[row["query_id"]]["principles"]
        assert {turn["role"] for turn in row["chosen"] + row["rejected"]} == {"assistant"}
        assert row["kind"] == "alignment"
        assert row["chosen_seed"] != row["rejected_seed"]
        assert row["ref_chosen_logps"] < 0
        assert row["ref_rejected_logps"] < 0
    assert any(row["chosen"][0]["content"] != policy[row["query_id"]] for row in found), "sampled from the generator"


def test_what_was_sampled_is_what_is_scored(finished: Path):
    """The very ids of stage 2, and the end token behind those that the model finished; random numbers are used once."""
    answered = {row["query_id"]: row for row in rows(finished, "2-responses")}
    found = pq.read_table(finished / "round-1/3-steering/policy-pairs.parquet").to_pylist()
    assert found
    for row in found:
        for side, role in (("chosen", "good"), ("rejected", "bad")):
            response = answered[row["query_id"]][role]
            ended = [response["end_id"]] if response["finish_reason"] == "stop" else []
            assert None not in ended
            assert row[f"{side}_ids"] == response["token_ids"] + ended
            assert row[f"{side}_tokens"] == len(row[f"{side}_ids"])
    policy = {row[role]["seed"] for row in answered.values() for role in ("good", "bad", "original")}
    generator = {row[f"{side}_seed"] for row in rows(finished, "5-preferences") for side in ("chosen", "rejected")}
    assert generator
    assert policy.isdisjoint(generator)


def test_log_probabilities_are_the_policy_s_given_the_bare_query(finished: Path, tiny_folder: str, metrics: dict[str, Any]):
    """By plain forwards, and the on-policy probability from them: exp(mean log pi), averaged over all responses."""
    found = rows(finished, "5-preferences")
    probabilities: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in found:
        for side, values in probabilities.items():
            logps, tokens = plain_logps(tiny_folder, row, side)
            assert row[f"ref_{side}_logps"] == pytest.approx(logps, rel=1e-5)
            assert row[f"{side}_tokens"] == tokens
            values.append(math.exp(logps / tokens))
    measured = metrics["rounds"][0]["alignment"]["on_policy"]
    for side, values in probabilities.items():
        assert measured[side]["mean"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    both = probabilities["chosen"] + probabilities["rejected"]
    assert measured["all"]["mean"] == pytest.approx(sum(both) / len(both), rel=1e-4)


def test_metrics_compare_pbaa_and_sso_data(metrics: dict[str, Any]):
    (this,) = metrics["rounds"]
    for name in ("pbaa", "alignment", "steering"):
        assert 0 < this[name]["on_policy"]["all"]["mean"] < 1
        assert this[name]["pairs"] > 0
        assert {"margin", "length", "variety", "overlap"} <= this[name].keys()
    expected = this["alignment"]["on_policy"]["all"]["mean"] - this["pbaa"]["on_policy"]["all"]["mean"]
    assert this["comparison"]["all"]["mean"] == pytest.approx(expected, abs=1e-6)
    for training in ("generator", "policy"):
        reward = this[training]["reward"]
        assert {"before", "after", "reward"} <= reward.keys()
        assert 0 <= reward["reward"]["accuracy"]["mean"] <= 1
        assert len(this[training]["curve"]) == this[training]["steps"] > 0
        assert this[training]["curve"][0]["margin"] == 0.0, "before the first update policy and reference are one"


def test_the_aligned_model_is_an_ordinary_folder(finished: Path, tiny_folder: str):
    folder = finished / "round-1/6-policy/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert any(not torch.equal(one, other) for one, other in zip(model.parameters(), start.parameters(), strict=True))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.isfinite(model(**ids).logits).all()
    configs = [json.loads((Path(each) / "config.json").read_text()) for each in (folder, tiny_folder)]
    assert configs[0] == configs[1], "training leaves nothing of its own behind"
    card = (folder / "README.md").read_text()
    assert all(text in card for text in ("2410.17131", "learning_rate: 0.001", "sft_weight: 0.1")), "how it was made"


# TRL and peft ask for gradient checkpointing by its old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")


@OLD_NAME
def test_trl_trains_on_the_parquet(finished: Path, tiny_folder: str, tmp_path: Path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    file = str(finished / "round-1/5-preferences/data.parquet")
    dataset = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert trl.is_conversational(dataset[0])
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder),
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, report_to=[], max_length=None, bf16=False),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    first = trainer.train_dataset[0]
    assert tokenizer.decode(first["prompt_ids"]) == tokenizer.apply_chat_template(
        dataset[0]["prompt"], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(first["chosen_ids"]).startswith(dataset[0]["chosen"][0]["content"])


# --- what is reused --------------------------------------------------------------------------------------------------------


def test_a_second_call_does_nothing_new(finished: Path, recipe_of: RecipeOf):
    before = contents(finished)
    run(recipe_of(finished))
    assert contents(finished) == before


def test_a_page_of_other_numbers_is_gone_before_new_ones_are_written(copy: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed while the page is drawn, a run would otherwise keep the page of before beside the metrics of now."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    page, folder, metrics = copy / "report.html", RunFolder.view(copy), read_metrics(copy)
    metrics["run"]["seconds"] += 1
    with monkeypatch.context() as patched:
        patched.setattr("selfsteer.pipeline.write_page", killed)
        with pytest.raises(KeyboardInterrupt):
            write_report(folder, metrics, 0)
    assert not page.exists()
    write_report(folder, metrics, 0)
    assert page.exists()


def test_the_same_seed_gives_identical_data(finished: Path, recipe_of: RecipeOf, tmp_path: Path):
    run(recipe_of(tmp_path / "same"))
    for stage in ("1-principles", "2-responses", "3-steering", "5-preferences"):
        assert rows(tmp_path / "same", stage) == rows(finished, stage)
    assert (tmp_path / "same/round-1/6-policy/model/model.safetensors").read_bytes() == (
        finished / "round-1/6-policy/model/model.safetensors"
    ).read_bytes()
    run(recipe_of(tmp_path / "other", {"seed": 1, "generator.kind": "none", "alignment.max_steps": 1}))
    pairs = zip(rows(tmp_path / "other", "2-responses"), rows(finished, "2-responses"), strict=True)
    assert all(one["good"]["seed"] != two["good"]["seed"] for one, two in pairs)


def test_a_changed_temperature_makes_new_samples_and_keeps_the_old(copy: Path, recipe_of: RecipeOf, caplog: Any):
    caplog.set_level("INFO")
    old = {stage: samples(copy, stage) for stage in ("2-responses", "5-preferences")}
    principles = manifest(copy, "1-principles")
    run(recipe_of(copy, {"responses.temperature": 1.3}), replace=True)
    assert manifest(copy, "1-principles") == principles
    for stage, earlier in old.items():
        now = samples(copy, stage)
        assert now[: len(earlier)] == earlier, "nothing that was paid for is thrown away"
        assert len(now) == len(set(now)) > len(earlier)
    assert "responses" in caplog.text, "a changed setting is said"
    again = {stage: samples(copy, stage) for stage in old}
    run(recipe_of(copy), replace=True)
    assert samples(copy, "2-responses") == again["2-responses"], "and back: the first samples are still there"


def test_the_original_response_has_a_sampling_of_its_own(copy: Path, recipe_of: RecipeOf, tiny_folder: str):
    """Greedily: y_o is what the policy finds most probable, token by token; y+ and y- are those of before."""
    before, old = rows(copy, "2-responses"), samples(copy, "2-responses")
    run(
        recipe_of(copy, {"responses.original": {"temperature": 0}, "generator.max_steps": 1, "alignment.max_steps": 1}),
        replace=True,
    )
    now = rows(copy, "2-responses")
    assert len(samples(copy, "2-responses")) == len(old) + len(QUERIES), "one new sample a query"
    assert [[row["good"], row["bad"]] for row in now] == [[row["good"], row["bad"]] for row in before]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    for row in now:
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_tensors="pt")["input_ids"]
        greedy = model.generate(prompt, do_sample=False, max_new_tokens=8)[0, prompt.shape[1] :].tolist()
        sampled = row["original"]["token_ids"]
        assert greedy[: len(sampled)] == sampled
        assert row["original"]["finish_reason"] == "length" or greedy[len(sampled)] == row["original"]["end_id"]


def test_wrapped_principles_steer_and_are_shown_bare(copy: Path, recipe_of: RecipeOf):
    """Every steered prompt has the sentence, of the samples and of the training; the principles stay as they are."""
    before = {row["query_id"]: row["principles"] for row in rows(copy, "1-principles")}
    old = samples(copy, "2-responses")
    run(recipe_of(copy, {"principles.wrap": True, "generator.max_steps": 1, "alignment.max_steps": 1}), replace=True)
    for row in rows(copy, "1-principles"):
        wrapped = row["principles"]
        assert wrapped == {**before[row["query_id"]], "wrap": wrapped["wrap"]}
        assert "{principle}" in wrapped["wrap"]
    assert len(samples(copy, "2-responses")) == len(old) + 2 * len(QUERIES), "y+ and y- anew, y_o as it was"
    for row in rows(copy, "3-steering"):
        side = "good" if row["kind"] == "l_plus" else "bad"
        system = row["prompt"][0]["content"]
        assert system == row["principles"]["wrap"].replace("{principle}", row["principles"][side])


def test_without_an_original_response_its_sampling_changes_nothing(recipe_of: RecipeOf, tmp_path: Path):
    changes = {"generator.kind": "none", "alignment.max_steps": 1}
    run(recipe_of(tmp_path / "run", changes))
    made = ("2-responses", "5-preferences", "6-policy")
    before = [manifest(tmp_path / "run", stage) for stage in made]
    run(recipe_of(tmp_path / "run", {**changes, "responses.original": {"temperature": 0}}))
    assert [manifest(tmp_path / "run", stage) for stage in made] == before


def test_a_changed_alignment_rate_reuses_everything_before_it(copy: Path, recipe_of: RecipeOf):
    before = contents(copy)
    run(recipe_of(copy, {"alignment.learning_rate": 2e-3}), replace=True)
    after = contents(copy)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed
    assert {name.split("/")[1] for name in changed} == {"6-policy"}
    assert "round-1/6-policy/model/model.safetensors" in changed


def test_reordered_and_inserted_queries_reuse_their_samples(copy: Path, recipe_of: RecipeOf, tmp_path: Path):
    """A sample depends on its query, never on where that one stands: one new query costs three responses."""
    path = tmp_path / "more.jsonl"
    texts = ["Is it raining?", *reversed(QUERIES)]
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    before = {row["query_id"]: row for row in rows(copy, "2-responses")}
    old = samples(copy, "2-responses")
    run(recipe_of(copy, {"queries.path": str(path)}), replace=True)
    now = samples(copy, "2-responses")
    assert now[: len(old)] == old
    assert len(now) == len(old) + 3
    found = rows(copy, "2-responses")
    assert [row["messages"][0]["content"] for row in found] == texts
    assert {row["query_id"]: row for row in found[1:]} == before


# --- variants of the method ------------------------------------------------------------------------------------------------


def test_without_a_generator_the_policy_s_own_pairs_align_it(recipe_of: RecipeOf, tmp_path: Path):
    """PBAA, the paper's baseline."""
    found = run(recipe_of(tmp_path / "run", {"generator.kind": "none"}))
    answered = {row["query_id"]: row for row in rows(tmp_path / "run", "2-responses")}
    assert {row["original"] for row in answered.values()} == {None}, "nothing trains on y_o, so it is not paid for"
    preferences = rows(tmp_path / "run", "5-preferences")
    assert len(preferences) > 0
    for row in preferences:
        source = answered[row["query_id"]]
        assert row["chosen"][0]["content"] == source["good"]["text"]
        assert row["rejected"][0]["content"] == source["bad"]["text"]
    assert not (tmp_path / "run/round-1/4-generator/MANIFEST.json").exists()
    (this,) = found["rounds"]
    assert this["pbaa"]["on_policy"]["all"].mean > 0
    assert "alignment" not in this, "metrics.py: these pairs are called pbaa here"
    assert (tmp_path / "run/round-1/6-policy/model/model.safetensors").exists()


def test_a_run_that_gives_up_its_generator_shows_nothing_of_it(copy: Path, recipe_of: RecipeOf):
    """The folder still has the stages of before; the metrics are those of this recipe."""
    (this,) = run(recipe_of(copy, {"generator.kind": "none", "alignment.max_steps": 1}), replace=True)["rounds"]
    assert not {"generator", "steering", "comparison"} & this.keys()
    assert not {"3-steering", "4-generator"} & this["stages"].keys()


@pytest.mark.parametrize(("loss", "objective"), [("dpo", "equation_3"), ("ipo", "l_plus"), ("hinge", "l_minus")])
def test_every_objective_trains_on_its_pairs_of_the_same_responses(
    loss: str, objective: str, copy: Path, recipe_of: RecipeOf
):
    changes = {"generator.loss": loss, "alignment.loss": loss, "generator.objective": objective, "generator.max_steps": 2}
    before = samples(copy, "2-responses")
    found = run(recipe_of(copy, {**changes, "alignment.max_steps": 2, "quality.sample": 1}), replace=True)
    assert samples(copy, "2-responses") == before
    kinds = {"equation_3": ["l_plus", "l_minus"]}.get(objective, [objective])
    steering = rows(copy, "3-steering")
    assert [row["kind"] for row in steering] == kinds * (len(steering) // len(kinds))
    for training in ("generator", "policy"):
        curve = found["rounds"][0][training]["curve"]
        assert len(curve) == 2
        assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in curve)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_on_what_a_run_made(loss: Any, finished: Path, tiny_folder: str, tmp_path: Path):
    """Two steps on the pairs of the generator, and two on those of the policy."""
    for stage in ("3-steering", "5-preferences"):
        pairs = finished / "round-1" / stage / "data.parquet"
        job = replace(training_job(Policy(model=tiny_folder), pairs, tmp_path / stage), loss=loss, batch_size=2, max_steps=2)
        train(job)
        steps = read_history(tmp_path / stage / "history.jsonl")
        assert len(steps) == 2
        assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)


@OLD_NAME
def test_lora_ends_in_a_merged_folder(copy: Path, recipe_of: RecipeOf, tiny_folder: str):
    found = run(
        recipe_of(copy, {"training.lora": {"rank": 4}, "generator.max_steps": 2, "alignment.max_steps": 2}), replace=True
    )
    for stage in ("4-generator", "6-policy"):
        folder = copy / "round-1" / stage / "model"
        assert not [file.name for file in folder.iterdir() if "adapter" in file.name]
        names = AutoModelForCausalLM.from_pretrained(folder).state_dict().keys()
        assert names == AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict().keys()
    assert found["rounds"][0]["policy"]["curve"][0]["margin"] == 0.0


def test_a_second_round_starts_from_the_first_one_s_policy(copy: Path, recipe_of: RecipeOf):
    before = contents(copy)
    found = run(recipe_of(copy, {"rounds": 2}), replace=True)
    assert before.items() <= contents(copy).items(), "the first round is reused"
    assert len(found["rounds"]) == 2
    first, second = ([row["good"]["text"] for row in rows(copy, "2-responses", number)] for number in (1, 2))
    assert first != second
    row = rows(copy, "5-preferences", 2)[0]
    logps, _ = plain_logps(str(copy / "round-1/6-policy/model"), row, "chosen")
    assert row["ref_chosen_logps"] == pytest.approx(logps, rel=1e-5), "the reference of round 2 is the policy of round 1"
    assert found["run"]["policy_folder"].endswith("round-2/6-policy/model")


# --- rows that go no further -----------------------------------------------------------------------------------------------


def test_every_row_is_kept_or_dropped_with_a_reason(recipe_of: RecipeOf, tmp_path: Path):
    queries = [
        {"query": "Why is the brown fox quick?"},
        {"query": "Why is the brown fox quick?"},
        {"query": "  "},
        {"query": "Say <|im_end|> now."},
        {"query": "Explain the fox. " * 200},
        {"query": "Explain how rainbows form."},
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in queries))
    changes = {"queries.path": str(path), "queries.max_prompt_tokens": 900, "generator.kind": "none"}
    run(recipe_of(tmp_path / "run", {**changes, "alignment.max_steps": 1}))
    sealed = manifest(tmp_path / "run", "1-principles")
    assert (sealed["wanted"], sealed["kept"]) == (6, 2)
    assert sorted(sealed["dropped"].values()) == [1, 1, 1, 1]
    reasons = " ".join(sealed["dropped"])
    assert all(word in reasons for word in ("duplicate", "empty", "special tokens", "too long"))
    assert [row["messages"][0]["content"] for row in rows(tmp_path / "run", "1-principles")] == [
        "Why is the brown fox quick?",
        "Explain how rainbows form.",
    ]


def test_filters_are_counted_and_named(copy: Path, recipe_of: RecipeOf):
    """Of 300 tokens some responses are cut off: their queries go no further, each with that reason."""
    run(
        recipe_of(copy, {"responses.max_new_tokens": 300, "filters.truncated": "drop", "generator.max_steps": 1}),
        replace=True,
    )
    cut = {
        row["query_id"]
        for row in rows(copy, "2-responses")
        if "length" in {row[role]["finish_reason"] for role in ("good", "bad", "original")}
    }
    dropped = (copy / "round-1/3-steering/dropped.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in dropped} == cut
    assert {json.loads(line)["reason"] for line in dropped} == {"cut off by the length limit"}
    kept = {row["query_id"] for row in rows(copy, "3-steering")}
    assert kept
    assert kept == {row["query_id"] for row in rows(copy, "1-principles")} - cut


def test_a_damaged_stage_is_refused(copy: Path, recipe_of: RecipeOf):
    file = copy / "round-1/2-responses/data.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"2-responses/data\.parquet"):
        run(recipe_of(copy))


def test_the_generator_trains_on_a_part_and_answers_all(recipe_of: RecipeOf, tmp_path: Path):
    changes = {"generator.queries": 3, "generator.max_steps": 1, "alignment.max_steps": 1, "quality.sample": 2}
    run(recipe_of(tmp_path / "run", changes))
    drawn = [row["query_id"] for row in rows(tmp_path / "run", "2-responses")]
    every = [row["query_id"] for row in rows(tmp_path / "run", "1-principles")]
    assert len(drawn) == 3
    assert drawn == [key for key in every if key in drawn]
    assert len(samples(tmp_path / "run", "2-responses")) == 9
    assert [row["query_id"] for row in rows(tmp_path / "run", "5-preferences")] == every


def test_conversations_with_a_system_message(recipe_of: RecipeOf, tmp_path: Path):
    """The system message stays in the bare query and comes before the principle."""
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Arr."},
        {"role": "user", "content": "How so?"},
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    changes = {"queries.path": str(path), "queries.column": "messages"}
    run(recipe_of(tmp_path / "run", {**changes, "generator.max_steps": 1, "alignment.max_steps": 1}))
    (row,) = rows(tmp_path / "run", "5-preferences")
    assert row["prompt"] == messages
    (plus, _) = rows(tmp_path / "run", "3-steering")
    assert plus["prompt"][0]["content"] == f"You are a pirate.\n\n{plus['principles']['good']}"
    assert plus["prompt"][1:] == messages[1:]


def test_principles_that_the_model_cannot_write(recipe_of: RecipeOf, tmp_path: Path):
    """Random weights write no principles: a library pair stands in, with the reason, and nothing is asked twice."""
    changes = {
        "principles.source": "generate",
        "principles.retries": 1,
        "principles.max_new_tokens": 8,
        "generator.kind": "none",
        "alignment.max_steps": 1,
    }
    run(recipe_of(tmp_path / "run", changes))
    found = rows(tmp_path / "run", "1-principles")
    assert len(found) == len(QUERIES)
    assert all(row["principles"]["fallback"] and row["principles"]["source"] == "library" for row in found)
    asked = samples(tmp_path / "run", "1-principles")
    assert len(asked) == len(set(asked)) == 2 * len(QUERIES)


# --- pairs made elsewhere, export, status ----------------------------------------------------------------------------------


def test_train_pairs(given: Path, recipe_of: RecipeOf, tmp_path: Path):
    found = train_pairs(given, Recipe.model_validate(recipe_of(tmp_path / "run")))
    sealed = manifest(tmp_path / "run", "5-preferences")
    assert (sealed["wanted"], sealed["kept"]) == (3, 2)
    assert rows(tmp_path / "run", "5-preferences")[0]["chosen"][0]["content"] == "The capital of France is Paris."
    assert found["rounds"][0]["alignment"]["pairs"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/round-1/6-policy/model")
    before = contents(tmp_path / "run")
    train_pairs(given, Recipe.model_validate(recipe_of(tmp_path / "run")))
    assert contents(tmp_path / "run") == before


def test_given_pairs_train_once_whatever_the_rounds(given: Path, recipe_of: RecipeOf, tmp_path: Path):
    changes = {"rounds": 2, "alignment.max_steps": 1}
    found = train_pairs(given, Recipe.model_validate(recipe_of(tmp_path / "run", changes)))
    assert len(found["rounds"]) == 1
    assert found["run"]["policy_round"] == 1
    assert status(tmp_path / "run")["next"] == "nothing: the run is complete"


def test_margins_are_measured_on_as_many_queries_as_are_asked_for(recipe_of: RecipeOf, tmp_path: Path):
    """Of six queries three are held out, and three are to be drawn of those that align the policy."""
    pairs = [{"prompt": query, "chosen": f"Here is {query}", "rejected": "A fox, I think."} for query in QUERIES[:6]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = {"queries.holdout": 3, "quality.sample": 3, "alignment.max_steps": 1}
    found = train_pairs(tmp_path / "pairs.jsonl", Recipe.model_validate(recipe_of(tmp_path / "run", changes)))
    assert found["rounds"][0]["policy"]["reward"]["pairs"] == 3


def test_scores_follow_the_chat_template_not_its_path(given: Path, recipe_of: RecipeOf, tmp_path: Path):
    """Another text in the same template file: the same pairs have other log-probabilities."""
    template = tmp_path / "own.jinja"
    recipe = Recipe.model_validate(
        recipe_of(tmp_path / "run", {"policy.chat_template": str(template), "alignment.max_steps": 1})
    )
    found: list[list[float]] = []
    for greeting in ("Hi.", "Write a story."):
        template.write_text(greeting + CHAT_TEMPLATE)
        train_pairs(given, recipe, replace=True)
        found.append([row["ref_chosen_logps"] for row in rows(tmp_path / "run", "5-preferences")])
    assert all(one != two for one, two in zip(*found, strict=True))
    moved = tmp_path / "moved.jinja"
    template.rename(moved)
    before = samples(tmp_path / "run", "5-preferences")
    elsewhere = recipe.policy.model_copy(update={"chat_template": str(moved)})
    train_pairs(given, recipe.model_copy(update={"policy": elsewhere}))
    assert samples(tmp_path / "run", "5-preferences") == before, "a path is no part of what determines a score"


def test_measure_pairs_writes_nothing(given: Path, tiny_folder: str, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    measures = measure_pairs(given, tiny_folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert measures["pairs"] == 2
    row = {
        "prompt": [{"role": "user", "content": "How do rainbows form?"}],
        "chosen": [{"role": "assistant", "content": "Sunlight passes through drops."}],
        "chosen_finish": "stop",
    }
    other = {
        "prompt": [{"role": "user", "content": "What is the capital of France?"}],
        "chosen": [{"role": "assistant", "content": "The capital of France is Paris."}],
        "chosen_finish": "stop",
    }
    means = [
        math.exp(logps / tokens) for logps, tokens in (plain_logps(tiny_folder, each, "chosen") for each in (row, other))
    ]
    # Of its own accord it measures in bfloat16 where the CPU is fast at it, hence the tolerance.
    assert measures["on_policy"]["chosen"].mean == pytest.approx(sum(means) / 2, rel=2e-2)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_what_was_sampled_survives_export(form: Any, finished: Path, tiny_folder: str, tmp_path: Path):
    """The ids come back where they are tokens of the text, and the measures are those of the run."""
    export(finished, tmp_path / "out", form, keep_truncated=True)
    [file] = (tmp_path / "out").glob("pairs.*")
    prompts = Prompts(load_tokenizer(tiny_folder))
    pairs = [pair for pair in usable_pairs(file, prompts, None, None) if isinstance(pair, Pair)]
    sealed = rows(finished, "5-preferences")
    assert [pair.chosen.token_ids for pair in pairs] == [tuple(row["chosen_ids"]) for row in sealed]
    assert any(prompts.completion_ids(pair.chosen.text, pair.chosen.finish) != pair.chosen.token_ids for pair in pairs)
    of_file, of_run = (measure_pairs(each, tiny_folder)["on_policy"] for each in (file, finished))
    assert of_file["all"].mean == pytest.approx(of_run["all"].mean)

    changed = tmp_path / "changed.jsonl"
    spoilt = ({**row, "chosen_ids": [7, *row["chosen_ids"][1:]], "rejected_ids": "none"} for row in sealed)
    changed.write_text("".join(json.dumps(row) + "\n" for row in spoilt))
    pairs = [pair for pair in usable_pairs(changed, prompts, None, None) if isinstance(pair, Pair)]
    assert len(pairs) == len(sealed)
    assert all(side.token_ids is None for pair in pairs for side in (pair.chosen, pair.rejected))


@pytest.mark.parametrize("form", ["trl", "llamafactory", "parquet", "jsonl"])
def test_export(form: Any, finished: Path, tmp_path: Path):
    expected = rows(finished, "5-preferences")
    assert export(finished, tmp_path / "out", form, keep_truncated=True).written == len(expected)
    text = "".join(
        file.read_text() if file.suffix != ".parquet" else json.dumps(pq.read_table(file).to_pylist(), ensure_ascii=False)
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    )
    assert all(json.dumps(row["chosen"][0]["content"], ensure_ascii=False) in text for row in expected)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]) -> Callable[..., str]:
    """Call the command; returns what it prints."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> str:
        ended = command(*arguments)
        assert ended.status == 0
        return ended.out

    return call


def test_the_summary_and_the_measures_are_printed(
    given: Path, recipe_of: RecipeOf, tiny_folder: str, tmp_path: Path, shown: Callable[..., str]
):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path / "run")))
    trained = shown("train", str(given), str(tmp_path / "recipe.yaml"))
    assert "6-policy" in trained
    assert str(tmp_path / "run/round-1/6-policy/model") in trained.replace("\n", "")
    assert "on-policy" in shown("measure", str(given), "--policy", tiny_folder).lower()


@pytest.fixture
def _half(copy: Path) -> None:
    for name in (*STAGES[STAGES.index("5-preferences") :], "5-quality"):
        shutil.rmtree(copy / "round-1" / name)


def test_status_of_a_complete_run(copy: Path, shown: Callable[..., str]):
    found = shown("status", str(copy))
    assert all(name in found for name in STAGES)
    assert found.count("sealed") == len({*STAGES, "5-quality"})
    assert "complete" in found


@pytest.mark.usefixtures("_half")
def test_status_of_a_run_that_was_stopped(copy: Path, shown: Callable[..., str]):
    found = shown("status", str(copy))
    assert found.count("sealed") == STAGES.index("5-preferences")
    assert "next: begin round 1, 5-preferences" in found
