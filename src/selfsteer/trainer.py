"""The one trainer: L_base + gamma * L_sft over the pairs of each query, on `transformers.Trainer`.

The loss of an optimizer step is the mean over its queries of the sum over each query's pairs, whatever the micro-batches.
Overridden is only the loss, its normaliser, and what is logged.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selfsteer import checkpoints, processes
from selfsteer.logps import Packing
from selfsteer.objective import PairLogps, sft
from selfsteer.packing import Batch, share_prompts
from selfsteer.tokens import Group, Order, TokenGroups
from selfsteer.weighting import pair_weights


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


_MEANS = ("margin", "accuracy", "chosen_logps", "rejected_logps", "sft", "weight")
"""Of a `Step`, the means over its pairs."""


class PreferenceTrainer(Trainer):
    """transformers' Trainer with the loss of preference pairs, exact under gradient accumulation and over processes."""

    loss_is_scaled_for_ga = True

    def __init__(
        self, model: PreTrainedModel | PeftModel, args: TrainingArguments, data: TokenGroups, job: "JobParts"
    ) -> None:
        super().__init__(model=cast(Any, model), args=args, data_collator=cast(Any, job.collator), train_dataset=data)
        self._job = job
        self._sums = torch.zeros(len(_MEANS) + 2, dtype=torch.float64)
        self._since = time.perf_counter()

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        """Every query once an epoch, whatever the number of processes."""
        at_once = self.args.world_size * self.args.per_device_train_batch_size if self.args.world_size > 1 else 1
        return Order(cast(TokenGroups, self.train_dataset), multiple=at_once, seed=cast(int, self.args.data_seed))

    def _get_num_items_in_batch(self, batch_samples: list[TrainBatch], device: torch.device) -> Tensor:
        """The queries of an optimizer step, over all its micro-batches and processes."""
        queries = torch.stack([batch["queries"] for batch in batch_samples]).sum().to(device)
        return cast(Tensor, self.accelerator.gather(queries)).sum() if self.args.world_size > 1 else queries

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
        self._job.advance(int(batch["queries"].item()) * self.args.world_size)
        return loss

    def _measure(self, pairs: PairLogps) -> None:
        margin = self._job.beta * pairs.ratio_gap.detach()
        tokens = (pairs.chosen_tokens + pairs.rejected_tokens).sum()
        weights = torch.ones_like(margin) if pairs.weights is None else pairs.weights
        means = (margin, margin > 0, pairs.chosen, pairs.rejected, sft(pairs), weights)
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
        value = next((one for one in processes.everyones(value) if not math.isfinite(one)), value)
        if math.isfinite(value):
            return
        kept = checkpoints.latest(Path(cast(str, self.args.output_dir)))
        raise TrainingDiverged(
            f"step {self.state.global_step + 1}: the {what} is {value}. "
            + (f"The last complete checkpoint is {kept}. " if kept else "There is no complete checkpoint yet. ")
            + "Lower the learning rate, or compute in float32 (training.dtype)."
        )

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """As transformers does; a full disk is told like everywhere else."""
        with checkpoints.writing(Path(cast(str, self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's measures to what transformers logs."""
        if "loss" in logs:
            sums = self._sums.to(self.args.device) if self.args.world_size > 1 else self._sums
            count, *means, tokens = cast(Tensor, self.accelerator.reduce(sums, "sum")).tolist()
            logs |= {name: value / count for name, value in zip(_MEANS, means, strict=True)}
            if not self._job.weighted:
                del logs["weight"]
            now = time.perf_counter()
            logs |= {"tokens": int(tokens), "seconds": round(now - self._since, 3)}
            self._sums.zero_()
            self._since = now
        super().log(logs, start_time)


@dataclass(frozen=True, kw_only=True)
class JobParts:
    """What the trainer needs of a job."""

    collator: Collator
    loss: Callable[[PairLogps], Tensor]
    beta: float
    weighted: bool = False
    """The model gives the weights of completions beside their log-probabilities (`logps.teach`)."""
    advance: Callable[[int], None] = field(default=lambda _: None)
    """Told how many queries were finished."""


class Keeper(TrainerCallback):
    """Makes the training durable: history, sealed checkpoints, a checkpoint when asked to stop."""

    def __init__(self, output: Path, training: str, saved: int) -> None:
        """saved: the step of the checkpoint that the training goes on from; 0 where there is none."""
        self._output = output
        self._training = training
        self._saved = saved

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the step to the history."""
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            line = {"step": state.global_step} | {name: logs[name] for name in Step.__annotations__ if name in logs}
            path = self._output / "history.jsonl"
            with checkpoints.writing(path), path.open("a", encoding="utf-8") as history:
                history.write(json.dumps(line) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal what transformers has just written, when every process has written its part."""
        self._saved = state.global_step
        processes.wait()
        if processes.is_first():
            checkpoints.seal(self._output / f"checkpoint-{state.global_step}", self._training)
            checkpoints.rotate(self._output)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop when asked to."""
        if processes.stop_signal():
            control.should_save = control.should_training_stop = True

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop between micro-batches too; the weights are still those of the last step, saved now unless they are."""
        if processes.stop_signal():
            control.should_training_stop = True
            control.should_save = state.global_step > self._saved


def read_history(path: Path) -> list[Step]:
    """The steps of a training, oldest first; a torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_history(path: Path, steps: int) -> None:
    """Forget the steps that will be trained again."""
    kept = [step for step in read_history(path) if step["step"] <= steps]
    path.write_text("".join(json.dumps(step) + "\n" for step in kept), encoding="utf-8")
