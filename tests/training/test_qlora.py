"""Adapters on weights in 4 bits: what is held so, the reference, stops and continuations, what is delivered, refusals."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import (
    FLOAT32,
    curve,
    file_rows,
    manifest,
    plain_logps,
    run,
    samples,
    steering_group,
    training_job,
    write_pairs,
)
from peft import PeftModel
from safetensors.torch import load_file
from tiny import other_model_dir, tiny_model_dir
from transformers import AutoConfig

from selfsteer import models, runtime
from selfsteer.models import checkpoint, end_ids, load_configuration, load_model, tokenizer_of
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Launcher, Lora, Policy, Recipe, Training
from selfsteer.stages import essentials
from selfsteer.stages.costs import Counts, Lengths, Rates, Size, stage_costs, training_state
from selfsteer.store import columns
from selfsteer.training import checkpoints
from selfsteer.training import train as training
from selfsteer.training.launch import launch
from selfsteer.training.scoring import Scorer, tokenize
from selfsteer.training.train import TrainingJob, identity_of, train
from selfsteer.training.trainer import PreferenceTrainer, read_history

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra selfsteer[qlora]")

QLORA = FLOAT32.model_copy(update={"lora": Lora(rank=4, quantize="nf4")})

GROUPS = [steering_group(number) for number in range(4)]

RecipeOf = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model of width 64, a block of bitsandbytes."""
    return tiny_model_dir(tmp_path_factory.mktemp("wide") / "tiny", max_positions=2048, width=64)


@pytest.fixture
def job(folder: str, tmp_path: Path) -> TrainingJob:
    """Four queries in batches of two, three epochs: six steps, a checkpoint at every second one."""
    policy = Policy(model=folder)
    pairs = write_pairs(tmp_path / "pairs.parquet", policy, QLORA, GROUPS)
    return replace(training_job(policy, pairs, tmp_path / "run"), training=QLORA, sft_weight=0.0, batch_size=2)


# --- the weights -----------------------------------------------------------------------------------------------------------


def in_four_bits(folder: str) -> Any:
    return load_model(folder, dtype=torch.float32, quantize="nf4")


def read_back(folder: str) -> Any:
    """The plain model with the weights that are in 4 bits read back."""
    from bitsandbytes.functional import dequantize_4bit

    plain = load_model(folder, dtype=torch.float32)
    for name, layer in in_four_bits(folder).named_modules():
        if hasattr(layer, "quant_state"):
            plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return plain


@installed
def test_linear_layers_are_in_four_bits_and_nothing_else_is(folder: str):
    """NF4 with quantized scales. Of normal numbers in blocks of 64 the error is 9 % of them (arXiv 2305.14314, table 2)."""
    model, plain, back = in_four_bits(folder), load_model(folder, dtype=torch.float32), read_back(folder)
    for name, weights in plain.named_parameters():
        held, read = model.get_parameter(name), back.get_parameter(name)
        if "_proj" not in name:
            assert torch.equal(held, weights), name
            continue
        assert (held.dtype, held.numel()) == (torch.uint8, weights.numel() // 2)
        assert held.quant_state.nested
        assert held.quant_state.quant_type == "nf4"
        assert 0.07 < ((read - weights).norm() / weights.norm()).item() < 0.11, name


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_like_torch_with_a_gradient_and_without(dtype: torch.dtype, folder: str):
    """In eval mode as well, in which bitsandbytes exchanges the weights on CPUs with AVX512-BF16 and loses the gradient."""
    model, plain = in_four_bits(folder), read_back(folder)
    ids = torch.arange(5, 30)[None]
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for each in (model, plain):
        embedded = each.get_input_embeddings()(ids).detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                without = each(inputs_embeds=embedded).logits
            logits = each(inputs_embeds=embedded).logits
        logits[0, -1].float().logsumexp(-1).backward()
        found.append((without, logits.detach(), embedded.grad))
    assert torch.equal(found[0][0], found[0][1])
    assert found[0][0].dtype == found[1][0].dtype
    assert torch.allclose(found[0][1].float(), found[1][1].float(), atol=1e-5)
    assert torch.allclose(found[0][2], found[1][2], atol=1e-5 if dtype == torch.float32 else 0.02)


# --- the training ----------------------------------------------------------------------------------------------------------


@installed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_loss_is_log_two_and_falls(dtype: Any, folder: str, tmp_path: Path):
    """DPO at a margin of exactly zero is log 2 = 0.693147 a pair, of which a query has two."""
    training = QLORA.model_copy(update={"dtype": dtype})
    policy = Policy(model=folder)
    pairs = write_pairs(tmp_path / "pairs.parquet", policy, training, GROUPS)
    job = replace(training_job(policy, pairs, tmp_path / "run"), training=training, sft_weight=0.0, batch_size=4)
    result = train(job)
    assert result.shared
    assert result.first["margin"] == 0.0
    assert result.first["loss"] == pytest.approx(2 * math.log(2), abs=1e-6)
    losses = [step["loss"] for step in read_history(Path(result.history))]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


@installed
def test_against_the_full_weights_the_first_margin_would_be_the_error_of_rounding(job: TrainingJob, tmp_path: Path):
    pairs = write_pairs(tmp_path / "full.parquet", job.policy, FLOAT32, GROUPS)
    result = train(replace(job, pairs=str(pairs), max_steps=1, batch_size=4))
    assert abs(result.first["margin"]) > 0.01


@installed
def test_what_is_frozen_stays_and_what_is_saved_is_the_adapter(job: TrainingJob, monkeypatch: pytest.MonkeyPatch):
    """The weights in 4 bits after the training are, bit for bit, those that the policy rounds to."""
    held: dict[str, Any] = {}
    original = PreferenceTrainer.train

    def trained(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        ended = original(self, *args, **kwargs)
        held.update({name: weights.detach().clone() for name, weights in self.model.named_parameters()})
        return ended

    monkeypatch.setattr(PreferenceTrainer, "train", trained)
    train(job)
    fresh = in_four_bits(job.policy.model)
    frozen = {name: weights for name, weights in held.items() if "base_layer" in name}
    assert len(frozen) == 14
    for name, weights in frozen.items():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert weights.dtype == torch.uint8
        assert torch.equal(weights, fresh.get_parameter(own)), name
    kept = Path(job.output) / "checkpoint-6"
    assert not list(kept.glob("model*.safetensors")), "of frozen weights no checkpoint has a copy"
    assert all("lora_" in name for name in load_file(kept / "adapter_model.safetensors"))


@installed
def test_what_is_delivered_is_the_adapter_on_the_full_weights(job: TrainingJob):
    result = train(job)
    ids = torch.arange(5, 40)[None]
    adapter = str(Path(job.output) / "adapter")
    with torch.no_grad():
        upon = PeftModel.from_pretrained(load_model(job.policy.model, dtype=torch.float32), adapter).eval()(ids).logits
        delivered = load_model(result.model, dtype=torch.float32)(ids).logits
        rounded = PeftModel.from_pretrained(in_four_bits(job.policy.model), adapter).eval()(ids).logits
    assert torch.allclose(upon, delivered, atol=1e-4)
    assert not torch.allclose(upon, rounded, atol=0.1)
    assert not hasattr(AutoConfig.from_pretrained(result.model), "quantization_config")
    saving = result.saving
    assert saving is not None
    assert saving["trained"] is not None
    assert saving["trained"] == pytest.approx(saving["delivered"], rel=1e-3)
    assert saving["quantized"] > 0.02 < saving["trained"]
    assert saving["quantized"] != pytest.approx(saving["trained"], rel=1e-3), "each is of its own weights"
    assert saving["quantized"] == pytest.approx(margin_in_four_bits(job), rel=1e-3)


def margin_in_four_bits(job: TrainingJob) -> float:
    """The mean margin of the pairs under the adapter, by plain forward passes."""
    model = PeftModel.from_pretrained(in_four_bits(job.policy.model), str(Path(job.output) / "adapter")).eval()
    tokenizer = tokenizer_of(job.policy)
    prompts = Prompts.of(job.policy, tokenizer, end_ids(job.policy.model, tokenizer))

    def logps(prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        return sum(found[len(prompt) + place - 1, token].item() for place, token in enumerate(completion))

    gaps: list[float] = []
    for row in pq.read_table(job.pairs).to_pylist():
        prompt, chosen, rejected = tokenize(columns.pair(row), prompts)
        gaps.append(logps(prompt, chosen) - row["ref_chosen_logps"] - logps(prompt, rejected) + row["ref_rejected_logps"])
    return job.beta * sum(gaps) / len(gaps)


@installed
def test_the_weights_in_four_bits_are_gone_when_the_full_ones_are_there(job: TrainingJob, monkeypatch: pytest.MonkeyPatch):
    trainers: list[PreferenceTrainer] = []
    original, deliver = PreferenceTrainer.train, training.deliver

    def trained(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        trainers.append(self)
        return original(self, *args, **kwargs)

    def delivered(*args: Any) -> Any:
        [trainer] = trainers
        assert sum(weights.numel() for weights in trainer.model.parameters()) == 0
        return deliver(*args)

    monkeypatch.setattr(PreferenceTrainer, "train", trained)
    monkeypatch.setattr(training, "deliver", delivered)
    assert train(job).saving is not None


@installed
def test_a_stopped_training_ends_like_one_that_was_not(job: TrainingJob, monkeypatch: pytest.MonkeyPatch):
    whole = train(replace(job, output=job.output + "-whole"))
    compute, calls = PreferenceTrainer.compute_loss, iter(range(10**6))

    def interrupted(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 7:  # in step 4: two queries a step, one a forward pass
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", interrupted)
    with pytest.raises(runtime.Interrupted), runtime.graceful_stop():
        train(job)
    last = checkpoints.latest(Path(job.output))
    assert last is not None
    assert 0 < checkpoints.step_of(last) < 6
    result = train(job)
    assert curve(job) == curve(replace(job, output=job.output + "-whole"))
    ours, theirs = (
        load_file(Path(each.model).with_name("adapter") / "adapter_model.safetensors") for each in (result, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@installed
@pytest.mark.usefixtures("forked")
def test_two_processes_train_as_one(job: TrainingJob):
    launch(job, Launcher(kind="accelerate", processes=2))
    train(alone := replace(job, output=job.output + "-alone"))
    assert curve(job) == [pytest.approx(step, rel=1e-4) for step in curve(alone)]


def test_the_setting_is_part_of_what_a_training_is(folder: str, tmp_path: Path):
    """And where it is not used, nothing is told apart from a training of before it was there."""
    (tmp_path / "pairs.parquet").write_bytes(b"")
    plain = replace(
        training_job(Policy(model=folder), tmp_path / "pairs.parquet", tmp_path / "run"), training=Training(lora=Lora())
    )
    quantized = replace(plain, training=Training(lora=Lora(quantize="nf4")))
    assert plain.digest() != quantized.digest()
    assert identity_of(quantized.training)["lora"]["quantize"] == "nf4"
    assert identity_of(plain.training)["lora"] == Lora().model_dump(exclude={"quantize"})
    tokenizer = tokenizer_of(plain.policy)
    prompts = Prompts.of(plain.policy, tokenizer, end_ids(folder, tokenizer))
    scorer = Scorer(checkpoint(Path(folder)), plain.policy, prompts, FLOAT32)
    assert scorer.group(GROUPS[0]).key != scorer._replace(quantize="nf4").group(GROUPS[0]).key, "a score of the one is none"


# --- a whole run -----------------------------------------------------------------------------------------------------------


@installed
@pytest.mark.parametrize("kind", ["single", "dual"])
def test_a_run_trains_against_the_policy_in_four_bits_and_measures_the_full_one(
    kind: str, folder: str, recipe_of: RecipeOf, tmp_path: Path
):
    lora = {"rank": 4, "quantize": "nf4"}
    recipe = recipe_of(tmp_path / "run", {"policy.model": folder, "training.lora": lora, "generator.kind": kind})
    run(recipe)
    trainings = ["4-generator-good", "4-generator-bad"] if kind == "dual" else ["4-generator"]
    for stage in (*trainings, "6-policy"):
        [first, *_] = read_history(tmp_path / "run/round-1" / stage / "history.jsonl")
        assert first["margin"] == 0.0
        assert manifest(tmp_path / "run", stage)["settings"]["training"]["lora"]["quantize"] == "nf4"
        assert (tmp_path / "run/round-1" / stage / "adapter/adapter_model.safetensors").is_file()
        measures = json.loads((tmp_path / "run/round-1" / stage / "measures.json").read_text())
        assert {"quantized", "trained", "delivered"} <= measures["saving"].keys()
    [row, *_] = file_rows(tmp_path / "run", "5-preferences/data.parquet")
    assert row["ref_chosen_logps"] == pytest.approx(plain_logps(folder, row, "chosen")[0], rel=1e-4), "of the full weights"
    before = samples(tmp_path / "run", "6-policy")
    run(recipe)
    assert samples(tmp_path / "run", "6-policy") == before, "sealed stages are taken as they are"


# --- what it takes ---------------------------------------------------------------------------------------------------------


def test_weights_in_four_bits_take_an_eighth(folder: str, recipe_of: RecipeOf, tmp_path: Path):
    """Of two layers of width 64: queries and outputs 64², keys and values 64 * 32, three of 64 * 128."""
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"training.lora": {"rank": 4, "quantize": "nf4"}}))
    size = essentials.size_of(checkpoint(Path(folder)), recipe)
    assert size.linear == 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 128)
    size = Size(1_000_000, 1000, 2, 8, 32, linear=800_000)
    whole, plain, quantized = (Training(lora=lora) for lora in (None, Lora(), Lora(quantize="nf4")))
    assert training_state(whole, size, half=True) == 6_000_000 + 12_000
    assert training_state(plain, size, half=False) == 4_000_000 + 12_000
    assert training_state(plain, size, half=True) == 800_000 + 1_600_000 + 12_000
    for half in (False, True):
        assert training_state(quantized, size, half=half) == 800_000 + round(800_000 * 4.127 / 8) + 12_000


def test_the_plan_counts_the_reference_and_the_full_weights_that_are_delivered(recipe_of: RecipeOf, tmp_path: Path):
    """One pass more over six queries; of a large model the memory is that of the full weights, as for scoring."""
    counts = Counts(6, Lengths(10, 10), Lengths(20, 20), 5.0)
    recipes = [
        Recipe.model_validate(recipe_of(tmp_path / "run", {"training.lora": {"quantize": each}})) for each in (None, "nf4")
    ]
    size = Size(10**9, 1000, 2, 8, 32, linear=10**9)
    plain, quantized = (
        {each["stage"]: each for each in stage_costs(recipe, counts, size, Rates(), half=False)} for recipe in recipes
    )
    assert quantized["6-policy"]["scored"] - plain["6-policy"]["scored"] == 6 * (10 + 2 * 5)
    assert quantized["6-policy"]["memory"] == quantized["3-steering"]["memory"]


# --- refusals --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda _: True)


def test_without_bitsandbytes_it_is_refused_before_anything_is_sampled(
    folder: str, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda _: False)
    changes = {"policy.model": folder, "training.lora": {"quantize": "nf4"}}
    with pytest.raises(
        ValueError, match=r"training\.lora\.quantize: needs bitsandbytes 0\.50 .*pip install 'selfsteer\[qlora\]'"
    ):
        run(recipe_of(tmp_path / "run", changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("as_if_installed")
def test_what_can_t_be_held_in_four_bits_is_refused_before_anything_is_sampled(
    tiny_folder: str, folder: str, recipe_of: RecipeOf, tmp_path: Path
):
    """Layers that bitsandbytes reads back wrongly on CPUs, none at all, FSDP, weights that are in 4 bits already."""
    lora = {"training.lora": {"quantize": "nf4"}}
    with pytest.raises(ValueError, match="layers of a multiple of 64 inputs, and this model has some of 32; set it to null"):
        run(recipe_of(tmp_path / "run", lora))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layers to hold in 4 bits"):
        run(recipe_of(tmp_path / "run", {**lora, "policy.model": other_model_dir(tmp_path / "gpt2", "gpt2")}))
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP")
    sharded = {"launcher": {"kind": "accelerate", "config": str(tmp_path / "fsdp.yaml")}}
    with pytest.raises(ValueError, match=r"FSDP can't shard weights in 4 bits; set training\.lora\.quantize=null"):
        run(recipe_of(tmp_path / "run", {**lora, **sharded, "policy.model": folder}))
    assert not (tmp_path / "run").exists()
    configuration = load_configuration(folder)
    configuration.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(ValueError, match="are quantized already"):
        models.check_quantization(configuration, "cpu")
    models.check_quantization(load_configuration(tiny_folder), "cuda")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("training.lora", {"quantize": "int3"}),
        ("training", {"quantize": "nf4"}),
    ],
)
def test_it_is_a_setting_of_adapters(key: str, said: dict[str, str], recipe_of: RecipeOf, tmp_path: Path):
    """Full weights can't be trained in 4 bits, and nothing can say so."""
    with pytest.raises(ValueError, match=r"training(\.lora)?\.quantize: (given 'int3', expected 'nf4'|unknown key)"):
        Recipe.model_validate(recipe_of(tmp_path / "run", {key: said}))
