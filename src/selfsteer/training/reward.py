"""A Bradley-Terry reward model (arXiv 2203.02155, equation 1) from tokenised pairs, by TRL's RewardTrainer.

    loss = -log sigmoid(r(chosen) - r(rejected) - margin) + center * (r(chosen) + r(rejected))^2

    output/checkpoint-N/   complete or not there (checkpoints.py); a stopped training continues from the newest
    output/history.jsonl   one line an optimizer step
    output/model/          the result: AutoModelForSequenceClassification with one label, adapter merged, and its tokenizer

Left out on purpose: rendering conversations, measuring the model, and several processes.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig, PeftModel, TaskType
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from selfsteer import runtime
from selfsteer.models import compute_dtype, pick_device
from selfsteer.recipe.engines import DTypeName
from selfsteer.store.durable import digest, make_folder
from selfsteer.training import checkpoints
from selfsteer.training.export import whole_folder
from selfsteer.training.trainer import Keeper, TrainingDiverged, WholeSteps, history_of, on_one_device, write_history

if TYPE_CHECKING:
    from trl.trainer.reward_config import RewardConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTraining:
    """How a reward model is trained. All but `micro_batch_size` and `save_steps` determines the result."""

    epochs: float = 1.0
    learning_rate: float = 1e-5
    batch_size: int = 32
    """Pairs an optimizer step."""
    micro_batch_size: int = 4
    """Pairs a forward pass; memory, not mathematics."""
    lora_rank: int | None = None
    """Train adapters of this rank and the head; all weights when None."""
    margin: bool = False
    """Chosen must be better by the pair's own margin."""
    center: float | None = None
    """Pulls the mean of both rewards to zero (arXiv 2312.09244)."""
    dtype: DTypeName = "auto"
    seed: int = 0
    save_steps: int = 50

    def digest(self) -> str:
        """Of what determines the result."""
        return digest({k: v for k, v in asdict(self).items() if k not in ("micro_batch_size", "save_steps")})


def check_trl() -> None:
    """Raise ValueError where TRL is not installed; an extra, it is imported only when a reward model is trained."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("reward models are trained by TRL, which is not installed: pip install 'selfsteer[reward]'")


class RewardJob(NamedTuple):
    """What is trained on, and where."""

    model: str
    """Folder of the model to start from: a chat model (its head is new), or a reward model."""
    tokens: Path
    """JSONL of {"chosen_ids", "rejected_ids"}, and "margin" where it is used."""
    output: Path
    identity: str
    """Digest of everything that determines the result."""


def train_reward(job: RewardJob, tokenizer: PreTrainedTokenizerBase, settings: RewardTraining) -> Path:
    """Train, or continue where it stopped; returns the folder of the model.

    Raises `runtime.Interrupted` when asked to stop, with a complete checkpoint on the disk.
    """
    from trl.trainer.reward_trainer import RewardTrainer

    class _Trainer(WholeSteps, RewardTrainer):
        pass

    make_folder(job.output)
    resume = checkpoints.resume_point(job.output, job.identity)
    write_history(job.output / "history.jsonl", history_of(resume) if resume else [])
    cache = job.output / ".cache"
    what = {"file": str(job.tokens), "identity": job.identity}
    with checkpoints.writing(cache):
        try:
            data = Dataset.from_generator(_rows, gen_kwargs=what, cache_dir=str(cache))
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
    trainer = _Trainer(
        model=job.model,
        args=_arguments(job, settings),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=_adapter(settings),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Finite())
    trainer.add_callback(Keeper(job.output, job.identity, resume))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    runtime.raise_if_stopped()
    folder = job.output / "model"
    _export(cast(PreTrainedModel | PeftModel, trainer.model), tokenizer, folder)
    shutil.rmtree(cache, ignore_errors=True)
    return folder


def _rows(file: str, identity: str) -> Iterator[dict[str, Any]]:
    """identity: part of what the library remembers rows by."""
    del identity
    with Path(file).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


class _Finite(TrainerCallback):
    """Ends a training whose loss is no number, before it is saved."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the loss of the step."""
        loss = kwargs["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"step {state.global_step}: the loss is {loss}; lower the learning rate")


def _adapter(settings: RewardTraining) -> LoraConfig | None:
    if settings.lora_rank is None:
        return None
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules="all-linear",
        modules_to_save=["score"],
        task_type=TaskType.SEQ_CLS,
    )


def _arguments(job: RewardJob, settings: RewardTraining) -> "RewardConfig":
    from trl.trainer.reward_config import RewardConfig

    device = pick_device()
    dtype = compute_dtype(settings.dtype, device)
    micro = max(n for n in range(1, min(settings.batch_size, settings.micro_batch_size) + 1) if settings.batch_size % n == 0)
    args = RewardConfig(
        output_dir=str(job.output),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        save_steps=settings.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        seed=settings.seed,
        data_seed=settings.seed,
        max_length=None,
        center_rewards_coefficient=settings.center,
        model_init_kwargs={"dtype": torch.float32, "use_safetensors": True},
    )
    on_one_device(args)
    return args


def _export(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    plain = cast(PreTrainedModel, model.merge_and_unload()) if isinstance(model, PeftModel) else model
    with whole_folder(folder) as unfinished:
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
