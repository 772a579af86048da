"""What is delivered is what was trained: half precision, tied layers, dropout, warm-up, stops behind the last step."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import FLOAT32, steering_group, training_job, write_pairs
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_model_dir, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from selfsteer import runtime
from selfsteer.models import EXACT, load_model
from selfsteer.recipe.sections import Lora, Policy, Training
from selfsteer.records import Saving
from selfsteer.training import checkpoints, export
from selfsteer.training.export import Delivery, deliver
from selfsteer.training.scoring import open_scorer, score
from selfsteer.training.train import TrainingJob, train
from selfsteer.training.trainer import Keeper, read_history

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

GROUPS = [steering_group(number) for number in range(4)]


def job_of(model: Path, folder: Path, **training: Any) -> TrainingJob:
    """Four queries in batches of two."""
    policy, section = Policy(model=str(model)), FLOAT32.model_copy(update=training)
    pairs = write_pairs(folder / "pairs.parquet", policy, section, GROUPS)
    return replace(training_job(policy, pairs, folder / "run"), training=section, batch_size=2)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(tiny_model_dir(tmp_path / "tiny"))


@pytest.fixture
def bfloat16(tiny: Path) -> Path:
    """The tiny model stored as nearly all published models are."""
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tiny)
    return tiny


def margin(job: TrainingJob, model: str) -> float:
    """The mean margin of the training pairs, from log-probabilities that `scoring` takes of the folder, in float32."""
    rows = pq.read_table(job.pairs).to_pylist()
    with open_scorer(Policy(model=model), Training(dtype="float32")) as scorer:
        scored = [pair for group in score(scorer, GROUPS) for pair in group]
    gaps = [
        pair.chosen.logps - row["ref_chosen_logps"] - pair.rejected.logps + row["ref_rejected_logps"]
        for pair, row in zip(scored, rows, strict=True)
    ]
    return job.beta * sum(gaps) / len(gaps)


# --- saving ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_an_update_below_the_grid_of_bfloat16_is_delivered(lora: Lora | None, bfloat16: Path, tmp_path: Path):
    """Twenty steps of 5e-7 on weights of about 0.2, whose neighbours in bfloat16 are 1e-3 away."""
    rate = 5e-7 if lora is None else 2e-5
    job = replace(job_of(bfloat16, tmp_path, lora=lora), learning_rate=rate, epochs=10)
    result = train(job)
    saving = result.saving
    assert saving is not None
    assert saving["dtype"] == "float32"
    assert saving["trained"] == pytest.approx(saving["delivered"], rel=0.02)
    assert saving["rounded"] is not None
    assert saving["trained"] is not None
    assert abs(saving["rounded"] - saving["trained"]) > 0.05 * abs(saving["trained"])
    assert AutoConfig.from_pretrained(result.model).dtype == torch.float32
    assert margin(job, result.model) == pytest.approx(saving["delivered"], rel=1e-3)
    assert getattr(AutoConfig.from_pretrained(result.model), EXACT) is True


@pytest.mark.parametrize(("rate", "exact"), [(5e-7, True), (1e-2, False)])
def test_a_float32_model_says_whether_half_precision_would_undo_it(rate: float, exact: bool, tiny: Path, tmp_path: Path):
    """A policy of float32 is delivered so whatever was learned; an engine in bfloat16 would sample the rounded one."""
    told = json.loads((tiny / "config.json").read_text()) | {EXACT: True}  # of an earlier training: no matter
    (tiny / "config.json").write_text(json.dumps(told))
    job = replace(job_of(tiny, tmp_path), learning_rate=rate, epochs=5)
    result = train(job)
    saving = result.saving
    assert saving is not None
    assert saving["trained"] is not None
    assert saving["rounded"] is not None
    assert (abs(saving["rounded"] - saving["trained"]) > 0.05 * abs(saving["trained"])) == exact
    assert hasattr(AutoConfig.from_pretrained(result.model), EXACT) == exact
    model = load_model(result.model, dtype=torch.float32)
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(weights.bfloat16())
    model.save_pretrained(tmp_path / "rounded")
    tiny_tokenizer().save_pretrained(tmp_path / "rounded")
    assert margin(job, str(tmp_path / "rounded")) == pytest.approx(saving["rounded"], abs=1e-5)


def test_a_margin_is_what_the_training_added_whatever_the_reference(tiny: Path, tmp_path: Path):
    """The reference is another model, as with alignment.reference: first; the margin of this one begins at beta * 10."""
    job = replace(job_of(tiny, tmp_path), learning_rate=1e-3)
    rows = pq.read_table(job.pairs).to_pylist()
    pq.write_table(
        pa.Table.from_pylist([row | {"ref_chosen_logps": row["ref_chosen_logps"] - 10} for row in rows]), job.pairs
    )
    result = train(job)
    before = margin(job, str(tiny))
    assert before == pytest.approx(1.0, abs=1e-3)
    assert result.saving is not None
    assert result.saving["trained"] == pytest.approx(margin(job, result.model) - before, rel=1e-2)


def test_margins_of_sharded_weights_are_told_to_be_unknown(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Kept in float32, and sampled so; where the recipe wants the policy's dtype, a warning."""
    given = AutoConfig.from_pretrained(tiny)
    given.dtype = torch.bfloat16
    with caplog.at_level(logging.INFO, "selfsteer"):
        for save_dtype in ("auto", "policy"):
            to = Delivery(tmp_path / save_dtype, given, save_dtype, tiny_tokenizer())
            deliver(load_model(str(tiny), dtype=torch.float32), to, None)
    kept, rounded = (AutoConfig.from_pretrained(tmp_path / name) for name in ("auto", "policy"))
    assert (kept.dtype, getattr(kept, EXACT)) == (torch.float32, True)
    assert (rounded.dtype, hasattr(rounded, EXACT)) == (torch.bfloat16, False)
    said = [(each.levelname, "not measured on sharded weights" in each.message) for each in caplog.records]
    assert said == [("INFO", True), ("WARNING", True)]


@pytest.mark.parametrize(
    ("own", "save_dtype", "dtype", "margins", "exact"),
    [
        (torch.float32, "auto", "float32", (1.0, 0.0), True),
        (torch.bfloat16, "auto", "float32", (1.0, 0.0), True),
        (torch.bfloat16, "policy", "bfloat16", (0.0, None), False),
        (torch.float16, "auto", "float16", (1.0, 0.0), True),
        (torch.float16, "policy", "float16", (1.0, 0.0), True),
        (torch.float16, "float32", "float32", (1.0, 0.0), True),
    ],
)
def test_what_bfloat16_would_undo_is_marked_by_hand(
    own: torch.dtype,
    save_dtype: Any,
    dtype: str,
    margins: tuple[float, float | None],
    exact: bool,
    tiny: Path,
    tmp_path: Path,
):
    """A weight of 1 + 1/512, and 512 times what is above 1 as the margin.

    float16 holds it (steps of 1/1024 above 1), bfloat16 (1/128) makes 1 of it; an engine on a card holds float16 weights in
    bfloat16, too.
    """
    given = AutoConfig.from_pretrained(tiny)
    given.dtype = own
    model = load_model(str(tiny), dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = 1 + 1 / 512
    saving = deliver(
        model,
        Delivery(tmp_path / "model", given, save_dtype, tiny_tokenizer()),
        lambda taught: 512 * (taught.get_input_embeddings().weight[0, 0].item() - 1),
    )
    assert saving == {"dtype": dtype, "trained": 1.0, "delivered": margins[0], "rounded": margins[1]}
    configuration = AutoConfig.from_pretrained(tmp_path / "model")
    assert (str(configuration.dtype), hasattr(configuration, EXACT)) == (f"torch.{dtype}", exact)
    assert load_file(tmp_path / "model/model.safetensors")["model.embed_tokens.weight"][0, 0].item() == 1 + margins[0] / 512


def test_the_policy_s_own_dtype_is_kept_where_it_holds_the_update(bfloat16: Path, tmp_path: Path):
    saving = train(replace(job_of(bfloat16, tmp_path), learning_rate=1e-3)).saving
    assert saving is not None
    assert (saving["dtype"], saving["rounded"]) == ("bfloat16", None)
    assert saving["delivered"] == pytest.approx(saving["trained"], rel=0.05)
    assert saving["delivered"] != saving["trained"]


@pytest.mark.parametrize(
    ("dtype", "merged", "ways"),
    [
        ("bfloat16", False, "Raise the learning rate, or set training.save_dtype: float32"),
        (
            "bfloat16",
            True,
            "Raise the learning rate, or set training.save_dtype: float32, or use the adapter as it was trained",
        ),
        ("float32", True, "Raise the learning rate, or use the adapter as it was trained"),
    ],
)
def test_the_advice_is_what_was_not_done(dtype: str, merged: bool, ways: str, caplog: pytest.LogCaptureFixture):
    """An adapter merged after a step of 5e-7: float32 can lose it as well, and is then no way out."""
    saving = Saving(dtype=dtype, trained=3e-5, delivered=1e-5, rounded=None)
    export._tell(saving, torch.bfloat16, merged=merged)
    assert caplog.messages == [
        f"update lost in saving: the margin is 3e-05 in training and 1e-05 in the model as it is delivered ({dtype}). {ways}"
    ]


def test_what_was_asked_for_is_kept_and_the_loss_is_told(bfloat16: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    job = replace(job_of(bfloat16, tmp_path, save_dtype="policy"), learning_rate=5e-7, epochs=5)
    with caplog.at_level(logging.WARNING, "selfsteer"):
        result = train(job)
    saving = result.saving
    assert saving is not None
    assert saving["dtype"] == "bfloat16"
    assert margin(job, result.model) == pytest.approx(saving["delivered"], abs=1e-6)
    said = f"margin is {saving['trained']:.3g} in training and {saving['delivered']:.3g} in the model as it is delivered"
    assert "update lost in saving" in caplog.text
    assert said in caplog.text
    always = job.training.model_copy(update={"save_dtype": "float32"})
    saving = train(replace(job, training=always, output=job.output + "-2")).saving
    assert saving is not None
    assert (saving["dtype"], saving["delivered"]) == ("float32", saving["trained"])


def test_a_margin_without_a_reference_begins_at_zero(tiny: Path, tmp_path: Path):
    """simpo has no reference: what is told is the change of the margin."""
    job = replace(job_of(tiny, tmp_path), loss="simpo", beta=2.0, learning_rate=1e-9, epochs=1)
    rows = [
        {name: value for name, value in row.items() if "_logps" not in name} for row in pq.read_table(job.pairs).to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "unscored.parquet")
    saving = train(replace(job, pairs=str(tmp_path / "unscored.parquet"))).saving
    assert saving is not None
    assert saving["trained"] == pytest.approx(0.0, abs=1e-3)


# --- tied layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_embedding_is_refused(tiny: Path, tmp_path: Path):
    lora = Lora(rank=4, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"target_modules: model\.embed_tokens shares its weights.*Leave it out, or untie"):
        train(job_of(tiny, tmp_path, lora=lora))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_adapter_on_an_untied_embedding_is_merged_into_it_alone(tiny: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tiny)
    lora = Lora(rank=4, target_modules=["embed_tokens", "q_proj"])
    result = train(replace(job_of(tiny, tmp_path, lora=lora), learning_rate=0.05))
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        adapter = Path(result.model).with_name("adapter")
        trained = PeftModel.from_pretrained(load_model(str(tiny), dtype=torch.float32), str(adapter)).eval()(ids).logits
        delivered = load_model(result.model, dtype=torch.float32)(ids).logits
    assert torch.allclose(trained, delivered, atol=1e-3)
    assert not torch.allclose(trained, load_model(str(tiny), dtype=torch.float32)(ids).logits, atol=1.0)


# --- dropout ---------------------------------------------------------------------------------------------------------------


def test_a_model_s_own_dropout_is_off(tmp_path: Path):
    """GPT-2 with three kinds of it; the first margins are exactly zero, and the delivered configuration is the old one."""
    tokenizer = tiny_tokenizer()
    sizes = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1}
    dropout = {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **dropout, eos_token_id=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    result = train(replace(job_of(tmp_path / "gpt2", tmp_path), batch_size=4, epochs=1))
    assert result.first["margin"] == 0.0
    delivered = AutoConfig.from_pretrained(result.model)
    assert {name: getattr(delivered, name) for name in dropout} == dropout


def test_noise_in_the_routing_of_experts_is_off(tmp_path: Path):
    """router_jitter_noise multiplies what a router sees by random numbers, in training only."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=len(tiny_tokenizer()), **sizes, **heads, router_jitter_noise=0.3)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tiny_tokenizer().save_pretrained(tmp_path / "mixtral")
    result = train(replace(job_of(tmp_path / "mixtral", tmp_path), batch_size=4, epochs=1))
    assert result.first["margin"] == 0.0
    assert AutoConfig.from_pretrained(result.model).router_jitter_noise == 0.3


# --- warm-up ---------------------------------------------------------------------------------------------------------------


def rates(job: TrainingJob) -> list[float]:
    return [step["learning_rate"] for step in read_history(Path(job.output) / "history.jsonl")]


@pytest.mark.parametrize(
    ("steps", "ratio", "expected", "warned"),
    [
        (1, 0.1, [1.0], True),  # a warm-up of one step, in full
        (2, 0.1, [1.0, 1.0], True),  # transformers: 0, 1
        (4, 0.5, [0.5, 1.0, 1.0, 0.5], True),  # transformers: 0, 1/2, 1, 1/2
        (4, 0.25, [1.0, 1.0, 2 / 3, 1 / 3], False),  # transformers: 0, 1, 2/3, 1/3
        (4, 0.0, [1.0, 0.75, 0.5, 0.25], False),
    ],
)
def test_no_step_has_the_rate_zero(
    steps: int,
    ratio: float,
    expected: list[float],
    warned: bool,
    tiny: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    job = job_of(tiny, tmp_path, scheduler="linear", warmup_ratio=ratio)
    job = replace(job, learning_rate=1e-3, max_steps=steps)
    with caplog.at_level(logging.WARNING, "selfsteer"):
        result = train(job)
    assert rates(job) == [pytest.approx(1e-3 * rate) for rate in expected]
    assert ("the learning rate rises in" in caplog.text) == warned
    start, end = load_file(tiny / "model.safetensors"), load_file(Path(result.model) / "model.safetensors")
    assert all(not torch.equal(end[name], start[name]) for name in start)


def test_a_stopped_warm_up_goes_on_as_it_was(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = job_of(tiny, tmp_path, scheduler="cosine", warmup_ratio=0.5, save_steps=1)
    job = replace(job, max_steps=6)
    whole = replace(job, output=job.output + "-whole")
    train(whole)
    stop_at(monkeypatch, 2)
    with runtime.graceful_stop(), pytest.raises(runtime.Interrupted):
        train(job)
    monkeypatch.undo()
    train(job)
    assert rates(job) == rates(whole)


@pytest.mark.skipif(find_spec("lomo_optim") is not None, reason="the package is there")
def test_an_optimizer_whose_package_is_missing_says_so(tiny: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"training\.optimizer: .*lomo"):
        train(job_of(tiny, tmp_path, optimizer="lomo"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_may_read_the_model_as_the_umask_has_it(umask: int, mode: int, tiny: Path, tmp_path: Path):
    """safetensors itself writes for the owner alone."""
    before = os.umask(umask)
    try:
        model = Path(train(replace(job_of(tiny, tmp_path), max_steps=1)).model)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in model.iterdir()} == dict.fromkeys(
        (file.name for file in model.iterdir()), oct(mode)
    )
    assert model.stat().st_mode & 0o777 == 0o777 & ~umask


# --- stops behind the last step, damaged histories -------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGTERM when the step has been taken."""
    original = Keeper.on_step_end

    def on_step_end(self: Keeper, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Keeper, "on_step_end", on_step_end)


def delivered(job: TrainingJob) -> tuple[list[tuple[float, float]], dict[str, list[float]]]:
    history = read_history(Path(job.output) / "history.jsonl")
    weights = load_file(Path(job.output) / "model" / "model.safetensors")
    return [(step["step"], step["loss"]) for step in history], {
        name: value.flatten().tolist() for name, value in weights.items()
    }


ENDS = {
    "epochs": {"epochs": 2},  # 4 steps
    "part of an epoch": {"epochs": 1.5},  # 3 steps
    "max_steps": {"epochs": 9, "max_steps": 3},
    "max_steps at an epoch's end": {"epochs": 9, "max_steps": 4},
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_training_that_was_stopped_behind_its_last_step_only_delivers(
    how: str, end: dict[str, Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = replace(job_of(tiny, tmp_path), **end)
    whole = replace(job, output=job.output + "-whole")
    result = train(whole)
    if how == "killed":  # while it delivered
        train(job)
        shutil.rmtree(Path(job.output) / "model")
    else:
        stop_at(monkeypatch, result.steps)
        with runtime.graceful_stop(), pytest.raises(runtime.Interrupted):
            train(job)
        monkeypatch.undo()
    assert train(job).steps == result.steps
    assert delivered(job) == delivered(whole)


def test_a_continued_training_saves_as_often_as_it_is_told_now(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped at step 2 of 6, which is saved; then saved at every step, of which two are kept."""
    job = replace(job_of(tiny, tmp_path, save_steps=100), max_steps=6)
    stop_at(monkeypatch, 2)
    with runtime.graceful_stop(), pytest.raises(runtime.Interrupted):
        train(job)
    monkeypatch.undo()
    train(replace(job, training=job.training.model_copy(update={"save_steps": 1})))
    assert sorted(folder.name for folder in Path(job.output).glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_text(""),
    "cut off": lambda file: file.write_text(file.read_text()[:-30]),
    "not lines": lambda file: file.write_text("[]\nnull\n"),
    "not text": lambda file: file.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_history_is_made_again(damage: Callable[[Path], object], tiny: Path, tmp_path: Path, monkeypatch: Any):
    job = replace(job_of(tiny, tmp_path), max_steps=4)
    stop_at(monkeypatch, 2)
    with runtime.graceful_stop(), pytest.raises(runtime.Interrupted):
        train(job)
    monkeypatch.undo()
    file = Path(job.output) / "history.jsonl"
    before = file.read_text()
    damage(file)
    train(job)
    assert file.read_text().startswith(before)
    assert [step["step"] for step in read_history(file)] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"sizes": [], "training": 3}', "{", ""])
def test_a_damaged_marker_is_none(content: str, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    job = replace(job_of(tiny, tmp_path), max_steps=2)
    train(job)
    history = (Path(job.output) / "history.jsonl").read_text()
    marker = Path(job.output) / "checkpoint-2" / checkpoints.MARKER
    assert json.loads(marker.read_text())["sizes"]
    marker.write_text(content)
    with caplog.at_level(logging.WARNING, "selfsteer"):
        train(job)
    assert "checkpoint-2: it is incomplete" in caplog.text
    again = read_history(Path(job.output) / "history.jsonl")
    assert [step["loss"] for step in again] == [json.loads(line)["loss"] for line in history.splitlines()]
