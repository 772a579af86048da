"""Whole trainings of a tiny model: exact zeros, L_SSO against an oracle, golden numbers, stops and continuations."""

import hashlib
import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import FLOAT32, curve, steering_group, training_job, write_pairs
from tiny import tiny_model_dir
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from selfsteer import runtime
from selfsteer.recipe.sections import Lora, Policy
from selfsteer.records import Pair
from selfsteer.store.columns import pair_row
from selfsteer.training import checkpoints
from selfsteer.training.packing import TokenPair, balanced
from selfsteer.training.scoring import open_scorer, tokenize
from selfsteer.training.train import TrainingJob, train
from selfsteer.training.trainer import (
    Group,
    Order,
    PreferenceTrainer,
    Step,
    TokenGroups,
    TrainingDiverged,
    on_one_device,
    read_history,
)

# peft 0.21 asks transformers 5.23 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy(model=tiny_model_dir(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def groups() -> list[list[Pair]]:
    return [steering_group(number) for number in range(6)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, policy: Policy, groups: list[list[Pair]]) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", policy, FLOAT32, groups)


@pytest.fixture
def job(tmp_path: Path, policy: Policy, pairs: Path) -> TrainingJob:
    """Six queries in batches of four: steps of four and two queries, three epochs."""
    return training_job(policy, pairs, tmp_path / "run")


def changed(job: TrainingJob, folder: str, **training: Any) -> TrainingJob:
    return replace(job, output=str(Path(job.output).parent / folder), training=job.training.model_copy(update=training))


# --- the mathematics -------------------------------------------------------------------------------------------------------


def test_without_a_group_one_device_trains(tmp_path: Path):
    """With several GPUs there transformers would wrap the model in DataParallel, which cuts packed batches in pieces."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.n_gpu == 0, "counted now, and not again"
    args._n_gpu = 2  # pyright: ignore[reportPrivateUsage]
    on_one_device(args)
    assert args.n_gpu == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_first_margins_are_exactly_zero(dtype: Any, lora: Lora | None, job: TrainingJob, groups: Any, tmp_path: Path):
    training = FLOAT32.model_copy(update={"dtype": dtype, "lora": lora})
    pairs = write_pairs(tmp_path / "pairs.parquet", job.policy, training, groups)
    result = train(replace(job, pairs=str(pairs), training=training, batch_size=6, epochs=2))
    assert result.shared
    assert result.first["margin"] == 0.0
    assert result.first["accuracy"] == 0.0
    assert result.last["margin"] > 0.0


def test_an_adapter_is_trained_on_frozen_weights_in_half_precision(
    job: TrainingJob, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As autocast uses them; it is delivered on those in float32. Every number is that of a training on these."""
    training = FLOAT32.model_copy(update={"dtype": "bfloat16", "lora": Lora(rank=4)})
    pairs = write_pairs(tmp_path / "pairs.parquet", job.policy, training, groups)
    job = replace(job, pairs=str(pairs), training=training)
    held: dict[str, torch.dtype] = {}
    step = PreferenceTrainer.training_step

    def noting(trainer: Any, *given: Any, **more: Any) -> torch.Tensor:
        held.update({name: weights.dtype for name, weights in trainer.model.named_parameters()})
        return step(trainer, *given, **more)

    monkeypatch.setattr(PreferenceTrainer, "training_step", noting)
    result = train(job)
    in_half = {name for name, dtype in held.items() if dtype == torch.bfloat16}
    assert in_half == {name for name in held if "base_layer" in name}
    assert len(in_half) == 2 * 7
    monkeypatch.setattr("selfsteer.training.train.hold_in_half", lambda *_: None)
    other = replace(job, output=str(tmp_path / "plain"))
    plain = train(other)
    assert torch.float32 in {held[name] for name in in_half}, "the second training did not hold them so"
    assert curve(job) == curve(other)
    assert result.saving == plain.saving
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert Path(job.output, name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_in_half_precision_a_young_adapter_counts_as_much_as_merged(job: TrainingJob, groups: Any, tmp_path: Path):
    """A first step of 1e-4: below what bfloat16 tells apart from a layer's output, to which peft adds it rounded."""
    training = FLOAT32.model_copy(update={"lora": Lora(rank=4)})
    margins: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        training = training.model_copy(update={"dtype": dtype})
        pairs = write_pairs(tmp_path / f"{dtype}.parquet", job.policy, training, groups)
        one = replace(
            job, output=str(tmp_path / dtype), pairs=str(pairs), training=training, learning_rate=1e-4, max_steps=2
        )
        saving = train(one).saving
        assert saving is not None
        assert saving["trained"] is not None
        margins[dtype] = saving["trained"]
    assert margins["bfloat16"] == pytest.approx(margins["float32"], rel=0.25)


def test_the_share_of_the_sft_term_is_in_the_history(job: TrainingJob, pairs: Path):
    """At the first step every margin is zero: the sum of 0.1 / |y_w| over the pairs, against that and 0.05 a pair."""
    result = train(replace(job, batch_size=6, epochs=1))
    pulls = [0.1 / tokens for tokens in pq.read_table(pairs).column("chosen_tokens").to_pylist()]
    assert result.first["sft_share"] == pytest.approx(sum(pulls) / (sum(pulls) + 0.05 * len(pulls)), rel=1e-4)
    without = train(replace(changed(job, "without"), sft_weight=0.0, max_steps=1))
    assert "sft_share" not in without.first


def test_l_sso_equals_an_oracle_written_out(job: TrainingJob, groups: Any):
    """Equations 1, 2 and 4 with plain forwards of a second model: mean over queries of L+ + L-, at step 2."""
    result = train(replace(job, batch_size=6, epochs=2))
    before = AutoModelForCausalLM.from_pretrained(job.policy.model, dtype=torch.float32)
    now = AutoModelForCausalLM.from_pretrained(train(replace(job, batch_size=6, epochs=1, output=job.output + "-1")).model)
    with open_scorer(job.policy, FLOAT32) as scorer:
        tokens = [[tokenize(pair, scorer.prompts) for pair in group] for group in groups]

    def logps(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        return torch.stack([log_probs[len(prompt) + i - 1, token] for i, token in enumerate(completion)]).sum()

    total = 0.0
    for group in tokens:
        for prompt, chosen, rejected in group:
            ratio_w = logps(now, prompt, chosen) - logps(before, prompt, chosen)
            ratio_l = logps(now, prompt, rejected) - logps(before, prompt, rejected)
            total += -F.logsigmoid(0.1 * (ratio_w - ratio_l)).item() - 0.1 * logps(now, prompt, chosen).item() / len(chosen)
    assert result.last["loss"] == pytest.approx(total / len(groups), rel=1e-5)


@pytest.mark.parametrize(
    "mechanics",
    [
        {"micro_batch_size": 2},
        {"micro_batch_size": 3},
        {"tokens_per_batch": 150},
        {"tokens_per_batch": 10_000},
        {"prefix_sharing": False},
        {"gradient_checkpointing": True},
    ],
    ids=["micro 2", "micro 3 (no divisor: 2)", "packed", "a step at once", "unshared", "checkpointed"],
)
def test_mechanics_do_not_change_the_mathematics(mechanics: dict[str, Any], job: TrainingJob):
    """Six steps, two of them over a smaller batch: losses and gradient norms stay."""
    train(job)
    other = changed(job, "other", **mechanics)
    train(other)
    assert curve(other) == [(pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3)) for loss, norm in curve(job)]


class Lengths(TokenGroups):
    """Groups of which nothing but their number of tokens is known."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.epoch = tokens, 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Group:
        ids = tuple(range(self.tokens[index] - 2))
        return Group(pairs=(TokenPair(ids, (1,), (2,)),), ref_chosen=(0.0,), ref_rejected=(0.0,))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("queries", [5, 24, 31, 49])
@pytest.mark.parametrize("budget", [1, 40, 90, 10_000])
def test_packed_micro_batches_hold_every_query_once_within_the_budget(processes: int, queries: int, budget: int):
    """Over three epochs; steps of twelve queries, of equally many micro-batches a process but for the last of an epoch."""
    tokens = [3 + 37 * number % 50 for number in range(queries)]
    data = Lengths(tokens)
    order = Order(data, 12, processes=processes, seed=7, micro=1)
    plain = Order(data, 12, processes=1, seed=7, micro=12)
    order.pack(budget, epochs=3)
    a_step = order.each * processes
    tightest = 0
    for epoch in range(3):
        data.epoch = epoch
        parts, steps = list(order), list(plain)
        assert len(parts) == len(order)
        assert len(parts) % processes == 0
        for number, step in enumerate(steps):
            mine = parts[number * a_step : (number + 1) * a_step]
            assert sorted(index for part in mine for index in part if index < queries) == sorted(step)
            assert all(part and (len(part) == 1 or sum(tokens[index] for index in part) <= budget) for part in mine)
            if len(step) > a_step - processes > 0:
                with_fewer = balanced(step, tokens, a_step - processes)
                tightest = max(tightest, *(sum(tokens[index] for index in part) for part in with_fewer))
    assert order.each == 1 or tightest > budget, "no step would have needed as many"


def test_order_of_the_queries_does_not_matter_within_a_batch(job: TrainingJob, groups: Any, tmp_path: Path):
    pairs = write_pairs(tmp_path / "reversed.parquet", job.policy, FLOAT32, groups[::-1])
    first, second = (
        replace(job, batch_size=6, epochs=2),
        replace(job, batch_size=6, epochs=2, pairs=str(pairs), output=job.output + "-2"),
    )
    train(first)
    train(second)
    assert [loss for loss, _ in curve(second)] == [pytest.approx(loss, rel=1e-5) for loss, _ in curve(first)]


GOLDEN = [(2.70468, 7.39675), (2.24465, 6.39855), (1.88513, 3.89679), (1.56545, 4.26109)]
"""Loss and gradient norm of the four steps of two epochs, as measured when the mathematics above was first verified."""


def test_golden_trajectory(job: TrainingJob):
    train(replace(job, epochs=2))
    assert curve(job) == [(pytest.approx(loss, rel=1e-3), pytest.approx(norm, rel=1e-2)) for loss, norm in GOLDEN]


# --- what comes out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_the_result_is_an_ordinary_folder(lora: Lora | None, job: TrainingJob):
    result = train(changed(job, "run", lora=lora))
    folder = Path(result.model)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not {name for name in names if "adapter" in name}
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    start = AutoModelForCausalLM.from_pretrained(job.policy.model).state_dict()
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(job.policy.model).chat_template
    )
    assert (result.steps, result.queries) == (6, 6)


def test_a_loss_without_reference_needs_no_scores(job: TrainingJob, groups: Any, tmp_path: Path):
    rows = [pair_row(pair) for group in groups for pair in group]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "unscored.parquet")
    unscored = replace(job, pairs=str(tmp_path / "unscored.parquet"), epochs=1)
    assert train(replace(unscored, loss="simpo", beta=2.0)).steps == 2
    with pytest.raises(ValueError, match="query 0 has no reference log-probabilities"):
        train(replace(unscored, output=job.output + "-2"))


def test_scores_of_another_tokenizer_are_refused(job: TrainingJob, pairs: Path, tmp_path: Path):
    rows = pq.read_table(pairs).to_pylist()
    rows[3]["chosen_tokens"] += 1
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="query 1 was scored with"):
        train(replace(job, pairs=str(tmp_path / "other.parquet")))


def test_missing_columns_are_named(job: TrainingJob, pairs: Path, tmp_path: Path):
    pq.write_table(pq.read_table(pairs).drop_columns(["query_id"]), tmp_path / "short.parquet")
    with pytest.raises(ValueError, match=r"the columns \['query_id'\] are missing"):
        train(replace(job, pairs=str(tmp_path / "short.parquet")))


def test_a_job_is_json(job: TrainingJob):
    assert json.loads(json.dumps(job.as_json()))["training"]["dtype"] == "float32"


# --- stops, kills, continuations -------------------------------------------------------------------------------------------


def stop_after(monkeypatch: pytest.MonkeyPatch, micro_batches: int) -> None:
    """Send this process a SIGTERM while the given micro-batch is computed."""
    computed = 0
    original = PreferenceTrainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        nonlocal computed
        computed += 1
        if computed == micro_batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(
    ("micro_batches", "saved"), [(4, 1), (9, 2), (11, 3)], ids=["end of step 1", "inside step 3", "start of step 4"]
)
@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_stopped_and_continued_is_the_same_training(
    lora: Lora | None, micro_batches: int, saved: int, job: TrainingJob, monkeypatch: pytest.MonkeyPatch
):
    """Steps are 4, 2, 4, 2, ... micro-batches. The curve of the two parts equals that of the whole, exactly."""
    whole, parts = changed(job, "whole", lora=lora), changed(job, "parts", lora=lora)
    train(whole)
    with monkeypatch.context() as patched, runtime.graceful_stop():
        stop_after(patched, micro_batches)
        with pytest.raises(runtime.Interrupted):
            train(parts)
    newest = checkpoints.latest(Path(parts.output))
    assert newest is not None
    assert checkpoints.step_of(newest) == saved
    assert not (Path(parts.output) / "model").exists()
    train(parts)
    assert curve(parts) == curve(whole)
    steps = [step["step"] for step in read_history(Path(parts.output) / "history.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_only_complete_checkpoints_count(job: TrainingJob, caplog: pytest.LogCaptureFixture):
    """After six steps, 4 and 6 are kept. 6 loses its marker, then all lose a byte of their weights: none of them counts."""
    train(job)
    output = Path(job.output)
    whole = curve(job)
    assert sorted(folder.name for folder in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    (output / "checkpoint-6" / checkpoints.MARKER).unlink()
    assert checkpoints.latest(output) == output / "checkpoint-4"
    with caplog.at_level(logging.WARNING, "selfsteer"):
        train(job)
    assert "checkpoint-6: it is incomplete" in caplog.text
    assert curve(job) == whole
    for folder in output.glob("checkpoint-*"):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoints.latest(output) is None
    train(job)
    assert curve(job) == whole


@pytest.mark.parametrize("marker", ["", "null", "[]", '{"training": "a"', '{"sizes": 3}'])
def test_a_damaged_marker_marks_nothing(tmp_path: Path, marker: str):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"12345")
    checkpoints.seal(folder, "a")
    digest = hashlib.sha256(b"12345").hexdigest()
    written = f'{{"digests":{{"model.safetensors":"{digest}"}},"sizes":{{"model.safetensors":5}},"training":"a"}}'
    assert (folder / "COMPLETE").read_text() == written
    assert checkpoints.latest(tmp_path) == folder
    (folder / "COMPLETE").write_text(marker)
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.resume_point(tmp_path, "a") is None


@pytest.mark.parametrize("large", [2**20, 8])
@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_file_that_was_damaged_since_then_marks_its_checkpoint_down(
    large: int, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As long as it was: libraries would end in tracebacks, or train other weights. Of a large file the ends count."""
    monkeypatch.setattr(checkpoints, "_LARGE", large)
    monkeypatch.setattr(checkpoints, "_END", 4)
    for step in (1, 2):
        folder = checkpoints.at_step(tmp_path, step)
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(bytes(16))
        checkpoints.seal(folder, "a")
    damaged = bytearray(16)
    damaged[place] = 4
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(damaged)
    seen = large > 16 or place != 7
    assert checkpoints.latest(tmp_path) == tmp_path / ("checkpoint-1" if seen else "checkpoint-2")
    marker = json.loads((tmp_path / "checkpoint-2" / "COMPLETE").read_text())
    del marker["digests"]
    (tmp_path / "checkpoint-2" / "COMPLETE").write_text(json.dumps(marker))
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-1"


def test_checkpoints_of_other_settings_are_not_continued(job: TrainingJob, caplog: pytest.LogCaptureFixture):
    train(replace(job, epochs=1))
    with caplog.at_level(logging.WARNING, "selfsteer"):
        train(replace(job, epochs=1, learning_rate=2e-3))
    assert "trained with other settings or data" in caplog.text
    assert [step["step"] for step in read_history(Path(job.output) / "history.jsonl")] == [1, 2]


def test_divergence_stops_and_names_the_last_checkpoint(job: TrainingJob, monkeypatch: pytest.MonkeyPatch):
    original = PreferenceTrainer.compute_loss

    def compute_loss(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", compute_loss)
    with pytest.raises(TrainingDiverged, match=r"step 4: the gradient norm is nan.*checkpoint-2"):
        train(job)
    assert checkpoints.latest(Path(job.output)) == Path(job.output) / "checkpoint-2"


def test_an_infinite_loss_is_found_before_its_gradient(job: TrainingJob):
    with pytest.raises(TrainingDiverged, match=r"step \d: the loss is (nan|inf).*Lower the learning rate"):
        train(replace(job, loss="sppo", beta=1e-30))


def test_history_survives_a_torn_line(tmp_path: Path):
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"st')
    assert read_history(tmp_path / "history.jsonl") == [Step(step=1)]  # pyright: ignore
