"""The one trainer: L_base + gamma * L_sft over the pairs of each query, on `transformers.Trainer`.

The loss of an optimizer step is the mean over its queries of the sum over each query's pairs, whatever the micro-batches.
Overridden are only the loss, its normaliser, what is logged, and steps that transformers takes at rate 0 or too many (those
of reward models, too).
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selfsteer.clock import count, part
from selfsteer.prompts import Prompts
from selfsteer.records import Pair
from selfsteer.store import columns
from selfsteer.store.durable import read_object, write
from selfsteer.training import checkpoints, parallel
from selfsteer.training.displacement import Meter, averages
from selfsteer.training.logps import Packing, casting_once, to_device
from selfsteer.training.objective import PairLogps, chosen_pulls, pair_weights, sft
from selfsteer.training.packing import Batch, TokenPair, balanced, row_tokens, share_prompts
from selfsteer.training.scoring import tokenize

log = logging.getLogger(__name__)

_REQUIRED = ("prompt", "chosen", "rejected", "query_id", "kind", "chosen_finish", "rejected_finish")

_MORE = ("chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", "chosen_tokens", "rejected_tokens")

_IDS = pa.list_(pa.int32())

_SCHEMA = pa.schema(
    [("prompt", _IDS), ("chosen", _IDS), ("rejected", _IDS), ("ref_chosen", pa.float64()), ("ref_rejected", pa.float64())]
)


class Group(NamedTuple):
    """The pairs of one query, with their reference log-probabilities."""

    pairs: tuple[TokenPair, ...]
    ref_chosen: tuple[float, ...]
    ref_rejected: tuple[float, ...]
    counts: bool = True
    """False for what only keeps a process busy while others have one query more: computed, but no part of the loss."""


class TokenGroups(Dataset[Group]):
    """All groups of a training, in the order of the pairs file; memory does not grow with their number.

    The one behind the last is the first again, not counting.
    """

    def __init__(self, file: Path) -> None:
        self.epoch = 0
        self._source = pa.memory_map(str(file))
        self._reader = pa.ipc.open_file(self._source)

    def __len__(self) -> int:
        return self._reader.num_record_batches

    def set_epoch(self, epoch: int) -> None:
        """Accelerate calls this before every epoch. (It would not reach `Order` where several processes go on mid-epoch.)"""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Group:
        counts = index < len(self)
        rows = self._reader.get_batch(index if counts else 0).to_pylist()
        return Group(
            pairs=tuple(TokenPair(tuple(row["prompt"]), tuple(row["chosen"]), tuple(row["rejected"])) for row in rows),
            ref_chosen=tuple(row["ref_chosen"] for row in rows),
            ref_rejected=tuple(row["ref_rejected"] for row in rows),
            counts=counts,
        )


class Order(Sampler[list[int]]):
    """Every query once an epoch, shuffled anew from seed and epoch, as the micro-batches of all processes in turn.

    An optimizer step has `each` of them a process, the last of an epoch perhaps fewer. Where the last ones are fewer than
    the processes, the group that does not count fills up. (accelerate would fill up with queries of the epoch's beginning,
    which would then count twice.)
    """

    def __init__(self, data: TokenGroups, batch_size: int, *, processes: int, seed: int, micro: int) -> None:
        """batch_size: queries an optimizer step, of all processes; micro: queries a micro-batch, which divides its share."""
        self.each = batch_size // processes // micro
        self._data, self._batch_size, self._processes, self._seed, self._micro = data, batch_size, processes, seed, micro
        self._tokens: Sequence[int] = ()

    def pack(self, budget: int, *, epochs: int) -> None:
        """Take micro-batches of at most so many tokens instead, or of a single query: as few a step as all steps allow.

        epochs: how many will be trained, begun ones counted.
        """
        groups = map(self._data.__getitem__, range(len(self._data)))
        self._tokens = [row_tokens(share_prompts(group.pairs).rows) for group in groups]
        self.each = 1
        for step in (step for epoch in range(epochs) for step in self._steps(epoch)):
            while self.each * self._processes < len(step) and self._largest(step) > budget:
                self.each += 1

    def _largest(self, step: Sequence[int]) -> int:
        return max(sum(self._tokens[index] for index in part) for part in self._split(step))

    def __len__(self) -> int:
        full, rest = divmod(len(self._data), self._batch_size)
        last = len(self._filled(self._split(range(rest)))) if rest else 0
        return full * self.each * self._processes + last

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps(self._data.epoch):
            yield from self._filled(self._split(step))

    def _steps(self, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(len(self._data), generator=generator).tolist()
        return (order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size))

    def _split(self, step: Sequence[int]) -> list[list[int]]:
        if self._tokens:
            return balanced(step, self._tokens, min(len(step), self.each * self._processes))
        return [list(step[start : start + self._micro]) for start in range(0, len(step), self._micro)]

    def _filled(self, parts: list[list[int]]) -> list[list[int]]:
        return parts + [[len(self._data)]] * (-len(parts) % self._processes)


def token_groups(
    path: Path, prompts: Prompts, scratch: Path, *, needs_reference: bool, positions: int | None = None
) -> TokenGroups:
    """Tokenise a pairs file (Parquet with the columns of `columns.PAIRS`, rows of one query together).

    scratch: where the first process makes the file of token ids, for all; it is gone once they have it open.
    positions: of the model; what is longer can't be trained on. Raises ValueError for such pairs, for missing columns, for
    missing reference log-probabilities where they are needed, and for those that belong to another tokenization.
    """
    row = partial(_token_row, prompts=prompts, path=path, needs_reference=needs_reference, positions=positions)
    file = parallel.agree(lambda: _write(path, row, scratch))
    groups = TokenGroups(file)
    parallel.wait()
    if parallel.is_first():
        file.unlink()  # the maps keep it; nothing is left behind when the processes are killed
    if not len(groups):
        raise ValueError(f"{path}: no pairs to train on")
    return groups


def _write(path: Path, token_row: Callable[[Pair], dict[str, Any]], scratch: Path) -> Path:
    with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for pairs in _query_pairs(path):
            writer.write_batch(pa.RecordBatch.from_pylist([token_row(pair) for pair in pairs], schema=_SCHEMA))
    return scratch


def _query_pairs(path: Path) -> Iterator[Sequence[Pair]]:
    file = pq.ParquetFile(path)
    found = file.schema_arrow.names
    missing = [name for name in _REQUIRED if name not in found]
    if missing:
        raise ValueError(f"{path}: the columns {missing} are missing; found {found}. Expected the columns of a pairs file.")
    names = [*_REQUIRED, *(name for name in _MORE if name in found)]
    pairs = (columns.pair(row) for batch in file.iter_batches(batch_size=256, columns=names) for row in batch.to_pylist())
    for _, group in groupby(pairs, key=lambda pair: pair.query_id):
        yield list(group)


def _token_row(pair: Pair, *, prompts: Prompts, path: Path, needs_reference: bool, positions: int | None) -> dict[str, Any]:
    tokens = tokenize(pair, prompts, positions)
    references = (pair.chosen.logps, pair.rejected.logps)
    if needs_reference and None in references:
        raise ValueError(
            f"{path}: query {pair.query_id} has no reference log-probabilities (ref_chosen_logps, ref_rejected_logps). "
            "Score the pairs first, or take a loss without a reference (simpo, orpo)."
        )
    recorded = (pair.chosen.tokens, pair.rejected.tokens)
    if None not in recorded and recorded != (len(tokens.chosen), len(tokens.rejected)):
        raise ValueError(
            f"{path}: query {pair.query_id} was scored with {recorded} completion tokens, this tokenizer gives "
            f"{(len(tokens.chosen), len(tokens.rejected))}. Score the pairs again with the policy to be trained."
        )
    return {
        "prompt": tokens.prompt,
        "chosen": tokens.chosen,
        "rejected": tokens.rejected,
        "ref_chosen": references[0] or 0.0,
        "ref_rejected": references[1] or 0.0,
    }


class Step(TypedDict):
    """An optimizer step, measured before its update; means are over the step's pairs."""

    step: int
    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    margin: float
    """beta * (chosen log-ratio - rejected log-ratio); of the log-probabilities alone where pairs carry no reference."""
    accuracy: float
    """Share of pairs with a margin above 0."""
    chosen_logps: float
    rejected_logps: float
    sft: float
    weight: NotRequired[float]
    """What L_base of a pair counts, where pairs are weighted."""
    sft_share: NotRequired[float]
    """Of what pulls at the chosen responses, the share of the SFT term (`objective.chosen_pulls`), where there is one."""
    chosen_moved: NotRequired[float]
    """At the steps that the meter reads, behind their update: how many nats a few responses have moved since the training's
    start (`displacement.py`), a response and a token; unrelated ones are those that it is not about."""
    chosen_moved_token: NotRequired[float]
    rejected_moved: NotRequired[float]
    rejected_moved_token: NotRequired[float]
    unrelated_moved: NotRequired[float]
    unrelated_moved_token: NotRequired[float]
    tokens: int
    """Completion tokens that were trained on."""
    seconds: float


class TrainingDiverged(ValueError):
    """The loss or the gradient is no finite number; the last complete checkpoint stays."""


class TrainBatch(Batch):
    """A micro-batch: the rows of its queries, and which completions make a pair; P pairs."""

    chosen: Tensor
    """(P,) index into the completions."""
    rejected: Tensor
    ref_chosen: Tensor
    """(P,) float32."""
    ref_rejected: Tensor
    queries: Tensor
    """(1,) how many queries."""


@dataclass
class Collator:
    """Groups to a micro-batch."""

    packing: Packing

    def __call__(self, groups: Sequence[Group]) -> TrainBatch:
        """Rows of all groups, and the pairs of those that count, in their order."""
        shared = [share_prompts(group.pairs) for group in groups]
        starts = [0]
        for group in shared:
            starts.append(starts[-1] + sum(len(row.completions) for row in group.rows))
        counting = [group for group in groups if group.counts]
        offsets = [(start, rows) for start, rows, group in zip(starts, shared, groups, strict=False) if group.counts]
        batch = self.packing([row for group in shared for row in group.rows])
        return TrainBatch(
            **batch,
            chosen=torch.tensor([start + index for start, rows in offsets for index in rows.chosen], dtype=torch.int64),
            rejected=torch.tensor([start + index for start, rows in offsets for index in rows.rejected], dtype=torch.int64),
            ref_chosen=torch.tensor([value for group in counting for value in group.ref_chosen]),
            ref_rejected=torch.tensor([value for group in counting for value in group.ref_rejected]),
            queries=torch.tensor([len(counting)]),
        )


_MEANS = ("margin", "accuracy", "chosen_logps", "rejected_logps", "sft", "weight", "base_pull", "sft_pull")
"""The means over a step's pairs: those of a `Step`, and what its `sft_share` is made of."""


def on_one_device(args: TrainingArguments) -> None:
    """Train on one device where no group was launched: transformers would cut our batches up for all (DataParallel)."""
    if args.n_gpu > 1:
        args._n_gpu = 1  # pyright: ignore[reportPrivateUsage]


class WholeSteps(Trainer):
    """transformers' Trainer, which takes its first step at rate 0 and, continued behind its last one, one too many."""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As transformers, but for the warm-up, which reaches the full rate a step earlier."""
        made = cast(Any, self.lr_scheduler)
        if made is not None:
            return made
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if not isinstance(scheduler, LambdaLR) or scheduler.lr_lambdas[0](0) > 0:
            return scheduler
        rates = [_without_zero(rate, max(1, warmup)) for rate in scheduler.lr_lambdas]
        self.lr_scheduler = LambdaLR(scheduler.optimizer, rates)
        if 3 * warmup > num_training_steps and parallel.is_first():
            log.warning(
                "the learning rate rises in %d of %d steps (in a recipe training.warmup_ratio); take more queries or"
                " epochs, or a smaller batch",
                *(warmup, num_training_steps),
            )
        return self.lr_scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A training that was stopped behind its last step has nothing left to do; transformers would go on with a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @part("checkpoint")
    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """As transformers does; a full disk is told like everywhere else."""
        with checkpoints.writing(checkpoints.at_step(Path(cast(str, self.args.output_dir)), self.state.global_step)):
            super()._save_checkpoint(model, trial)


def _without_zero(rate: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    return lambda step: (step + 1) / warmup if step < warmup else rate(step)


class PreferenceTrainer(WholeSteps):
    """transformers' Trainer with the loss of preference pairs, exact under gradient accumulation and over processes."""

    loss_is_scaled_for_ga = True

    def __init__(
        self, model: PreTrainedModel | PeftModel, args: TrainingArguments, data: TokenGroups, job: "JobParts"
    ) -> None:
        super().__init__(model=cast(Any, model), args=args, data_collator=cast(Any, job.collator), train_dataset=data)
        self._job = job
        self._sums = torch.zeros(len(_MEANS) + 2, dtype=torch.float64)
        self._since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every query once an epoch, whatever the number of processes, in micro-batches of our own."""
        data = cast(TokenGroups, self.train_dataset)
        pin = self.args.dataloader_pin_memory
        loader = DataLoader(data, batch_sampler=self._job.order, collate_fn=self._job.collator, pin_memory=pin)
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list[TrainBatch], device: torch.device) -> Tensor:
        """The queries of an optimizer step, over all its micro-batches and processes."""
        queries = torch.stack([batch["queries"] for batch in batch_samples]).sum().to(device)
        return cast(Tensor, self.accelerator.gather(queries)).sum() if self.args.world_size > 1 else queries

    @part("forward")
    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's loss."""
        batch = cast(TrainBatch, inputs)
        assert num_items_in_batch is not None
        assert not return_outputs
        found: Tensor = model(**{name: batch[name] for name in Batch.__annotations__})
        logps, weights = (found[0], found[1].detach()) if self._job.weighted else (found, None)
        tokens = torch.tensor(batch["layout"].tokens, device=logps.device)
        pairs = PairLogps(
            chosen=logps[batch["chosen"]],
            rejected=logps[batch["rejected"]],
            ref_chosen=batch["ref_chosen"],
            ref_rejected=batch["ref_rejected"],
            chosen_tokens=tokens[batch["chosen"]],
            rejected_tokens=tokens[batch["rejected"]],
            weights=None if weights is None else pair_weights(weights[batch["chosen"]], weights[batch["rejected"]]),
        )
        # Processes average their gradients; the loss is a sum over all of them.
        loss = self._job.loss(pairs).sum() * (self.args.world_size / num_items_in_batch)
        self._check_finite("loss", loss.item())
        self._measure(pairs)
        count("forward", int(tokens[batch["chosen"]].sum() + tokens[batch["rejected"]].sum()))
        self._job.advance(int(batch["queries"].item()) * self.args.world_size)
        return loss

    @part("backward")
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch; what of its time is no `compute_loss` is the way back."""
        return super().training_step(*args, **kwargs)

    def _measure(self, pairs: PairLogps) -> None:
        margin = self._job.beta * pairs.ratio_gap.detach()
        tokens = (pairs.chosen_tokens + pairs.rejected_tokens).sum()
        weights = torch.ones_like(margin) if pairs.weights is None else pairs.weights
        nothing = torch.zeros_like(margin)
        with_sft = self._job.sft_weight > 0  # else nobody asks for its share, which costs a gradient
        pulls = chosen_pulls(self._job.loss, pairs, self._job.sft_weight) if with_sft else (nothing, nothing)
        means = (margin, margin > 0, pairs.chosen, pairs.rejected, sft(pairs), weights, *pulls)
        sums = [torch.tensor(float(len(margin))), *(values.detach().double().sum().cpu() for values in means), tokens.cpu()]
        self._sums += torch.stack([value.double() for value in sums])

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With float16, overflowing gradients are part of the loss scaler's search; it skips the step itself.
        if norm is not None and self.accelerator.scaler is None:
            self._check_finite("gradient norm", float(norm))
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        """All processes stop when one of them has to."""
        value = next((one for one in parallel.everyones(value) if not math.isfinite(one)), value)
        if math.isfinite(value):
            return
        kept = checkpoints.latest(Path(cast(str, self.args.output_dir)))
        raise TrainingDiverged(
            f"step {self.state.global_step + 1}: the {what} is {value}. "
            + (f"The last complete checkpoint is {kept}. " if kept else "There is no complete checkpoint yet. ")
            + "Lower the learning rate, or compute in float32 (training.dtype)."
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; a package that an optimizer needs is told as what is asked for."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except ImportError as error:
            raise ValueError(f"training.optimizer: {error}") from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's measures to what transformers logs."""
        if "loss" in logs:
            sums = self._sums.to(self.args.device) if self.args.world_size > 1 else self._sums
            count, *means, tokens = cast(Tensor, self.accelerator.reduce(sums, "sum")).tolist()
            logs |= {name: value / count for name, value in zip(_MEANS, means, strict=True)}
            base, of_sft = logs.pop("base_pull"), logs.pop("sft_pull")
            if self._job.sft_weight > 0:
                logs["sft_share"] = of_sft / (base + of_sft)
            if not self._job.weighted:
                del logs["weight"]
            step, meter = self.state.global_step, self._job.meter
            if meter is not None and (step % meter.every == 0 or step == self.state.max_steps):
                with part("measure"):
                    logs |= averages(meter.moved(cast(torch.nn.Module, self.model_wrapped)))
            now = time.perf_counter()
            logs |= {"tokens": int(tokens), "seconds": round(now - self._since, 3)}
            self._sums.zero_()
            self._since = now
        super().log(logs, start_time)


_SAMPLE, _FEWEST, _SHARE = 32, 4, 24
"""Queries whose margins are taken when a model is saved: at most, at least, and as a share of all. That takes up to four
forward passes, which cost little more than a training step of these queries."""


def margin_queries(count: int) -> int:
    """How many of so many queries that are trained on."""
    return min(_SAMPLE, max(_FEWEST, count // _SHARE))


def reward_queries(count: int, sample: int | None) -> int:
    """How many of so many queries that were trained on are scored afterwards, of at most `sample`.

    A quarter, which costs a twelfth of an epoch; of few queries 16, and of fewer all.
    """
    return min(count, max(16, count // 4), count if sample is None else sample)


def spread(count: int, most: int) -> range:
    """At most so many of the numbers below `count`, as far apart as they can be."""
    return range(0, count, -(-count // most))


def margins(data: TokenGroups, collator: Collator, *, beta: float, weighted: bool) -> Callable[[torch.nn.Module], float]:
    """The mean margin of the pairs of a few queries, spread over the data, under a taught model; without dropout."""
    indices = spread(len(data), margin_queries(len(data)))

    @part("measure")
    def mean(model: torch.nn.Module) -> float:
        training = model.training
        model.eval()
        gaps: list[Tensor] = []
        device = next(model.parameters()).device
        with torch.no_grad(), casting_once(device):
            for index in indices:
                batch = collator([data[index]])
                found: Tensor = model(
                    **to_device(cast(Batch, {name: batch[name] for name in Batch.__annotations__}), device)
                )
                logps = (found[0] if weighted else found).double().cpu()
                gaps.append(logps[batch["chosen"]] - batch["ref_chosen"] - logps[batch["rejected"]] + batch["ref_rejected"])
        model.train(training)
        return beta * torch.cat(gaps).mean().item()

    return mean


@dataclass(frozen=True, kw_only=True)
class JobParts:
    """What the trainer needs of a job."""

    order: Order
    collator: Collator
    loss: Callable[[PairLogps], Tensor]
    beta: float
    sft_weight: float
    """That `loss` was made with."""
    weighted: bool = False
    """The model gives the weights of completions beside their log-probabilities (`logps.teach`)."""
    meter: Meter | None = None
    """The last step has a reading in any case."""
    advance: Callable[[int], None] = field(default=lambda _: None)
    """Told how many queries were finished."""


class Keeper(TrainerCallback):
    """Makes the training durable: history, sealed checkpoints, a checkpoint when asked to stop."""

    def __init__(self, output: Path, training: str, resume: Path | None, bound: float | None = None) -> None:
        """resume: the checkpoint that the training goes on from.

        bound: nats that unrelated responses may lose. Every step that is found within it is saved; the first beyond it ends
        the training.
        """
        self._output = output
        self.training = training
        self._saved = 0 if resume is None else checkpoints.step_of(resume)
        self._bound = bound
        self.within = None if resume is None or bound is None else _last_within(history_of(resume), bound)
        """The last step that was found within the bound."""
        self._update = ExitStack()
        self.crossed = False
        """The bound was crossed behind `within`."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The distance between checkpoints is that of now; transformers goes on with the one that the checkpoint has."""
        state.save_steps = int(args.save_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the step to the history."""
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            line = _step({"step": state.global_step, **logs})
            path = self._output / "history.jsonl"
            with checkpoints.writing(path), path.open("a", encoding="utf-8") as history:
                history.write(json.dumps(line) + "\n")
        if self._bound is None or "unrelated_moved" not in logs:
            return
        self.crossed = not _is_within(logs["unrelated_moved"], self._bound)
        control.should_save = not self.crossed
        if self.crossed:
            control.should_training_stop = True
        else:
            self.within = state.global_step

    @part("checkpoint")
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal what transformers has just written, when every process has written its part."""
        self._saved = state.global_step
        parallel.wait()
        if parallel.is_first():
            checkpoints.seal(checkpoints.at_step(self._output, state.global_step), self.training)
            checkpoints.rotate(self._output, spare=self.within)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The update begins."""
        self._update.enter_context(part("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The update is done."""
        self._update.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop when asked to."""
        if parallel.stop_signal():
            control.should_save = control.should_training_stop = True

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop between micro-batches too; the weights are still those of the last step, saved now unless they are."""
        if parallel.stop_signal():
            control.should_training_stop = True
            control.should_save = state.global_step > self._saved


def _is_within(moved: float, bound: float) -> bool:
    return -moved <= bound


def _last_within(steps: Sequence[Step], bound: float) -> int | None:
    """The last step whose unrelated responses were found to have lost no more than the bound."""
    found = (step["step"] for step in reversed(steps) if _is_within(step.get("unrelated_moved", -math.inf), bound))
    return next(found, None)


def _step(logs: dict[str, Any]) -> Step:
    return cast(Step, {name: logs[name] for name in Step.__annotations__ if name in logs})


_LARGEST_STATE = 2**30


def history_of(checkpoint: Path) -> list[Step]:
    """The steps up to a complete checkpoint; transformers keeps what was logged in its own state as well.

    So a history that was damaged since then is made again.
    """
    state = read_object(checkpoint / "trainer_state.json", at_most=_LARGEST_STATE)
    return [_step(logs) for logs in cast("list[dict[str, Any]]", state["log_history"]) if "loss" in logs]


def read_history(path: Path) -> list[Step]:
    """The steps of a training, oldest first; a torn last line is left out."""
    if not path.exists():
        return []
    steps: list[Step] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            step = json.loads(line)
        except ValueError:
            step = None
        if type(step) is not dict:
            raise ValueError(f"{path}:{number}: damaged; run the training again, which makes it anew from its checkpoint")
        steps.append(cast(Step, step))
    return steps


def write_history(path: Path, steps: Sequence[Step]) -> None:
    """The history of a training up to the checkpoint that it goes on from."""
    write(path, "".join(json.dumps(step) + "\n" for step in steps).encode())
