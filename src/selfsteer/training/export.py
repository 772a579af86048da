"""What a training delivers: an ordinary Hugging Face folder, with training.lora the adapter too, and what saving cost.

    output/model/     adapter merged; in the dtype of the policy, or in float32 where rounding would undo the training
    output/adapter/   in peft's format

An update of 5e-7 lies below the grid of bfloat16: a policy that is stored so would be delivered as it was before, whatever
its history says. So the margin of a few pairs is taken from what was trained and from what is delivered, every time, and of
what is not delivered in bfloat16 once more as bfloat16 would round it, in which engines compute: where that undoes the
training, the configuration says it (`models.EXACT`), and engines with dtype auto sample in float32.
Left out on purpose: margins of sharded weights; with save_dtype auto these are kept, and sampled, in float32.
"""

import logging
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from selfsteer.clock import part
from selfsteer.models import mark_exact, restore_dropout
from selfsteer.records import Saving
from selfsteer.store.durable import open_to_others, sync
from selfsteer.training import checkpoints

log = logging.getLogger(__name__)

LOST = 0.05
"""Of the margin; where saving changes it by more, auto keeps float32, and a warning says it."""

Margin = Callable[[torch.nn.Module], float]
"""The mean reward margin of a few training pairs under a model, over what it was before the training."""

SaveDType = Literal["auto", "float32", "policy"]


class Delivery(NamedTuple):
    """Where a model goes, and how."""

    folder: Path
    given: PreTrainedConfig
    """The configuration of the policy that was trained."""
    save_dtype: SaveDType
    tokenizer: PreTrainedTokenizerBase


@part("checkpoint")
def deliver(model: PreTrainedModel | PeftModel, to: Delivery, margin: Margin | None) -> Saving:
    """Write the trained model, and its adapter before it; each is there as a whole or not at all.

    margin: None where it can't be taken.
    """
    trained = None if margin is None else margin(model)
    if isinstance(model, PeftModel):
        with whole_folder(to.folder.with_name("adapter")) as unfinished:
            _save_adapter(model, unfinished)
        plain = cast(PreTrainedModel, model.merge_and_unload())
    else:
        plain = model
    saving = _in_its_dtype(plain, to, trained, margin, merged=plain is not model)
    mark_exact(plain.config, exact=_undone_by_rounding(saving))
    plain.config.use_cache = to.given.use_cache  # switched off for training
    restore_dropout(plain.config, to.given)
    with whole_folder(to.folder) as unfinished:
        plain.save_pretrained(unfinished)
        to.tokenizer.save_pretrained(unfinished)
    return saving


def _in_its_dtype(
    plain: PreTrainedModel, to: Delivery, trained: float | None, margin: Margin | None, *, merged: bool
) -> Saving:
    """Bring the weights into the dtype that they are delivered in."""
    own = cast("torch.dtype | None", to.given.dtype) or torch.float32
    dtype = torch.float32 if to.save_dtype == "float32" or (to.save_dtype == "auto" and margin is None) else own
    delivered = rounded = None
    if margin is not None:
        assert trained is not None
        exact = {name: weights.detach().to("cpu", copy=True) for name, weights in plain.named_parameters()}
        half = torch.bfloat16 if own == torch.float32 else own
        delivered = rounded = margin(_filled(plain, exact, half))
        if to.save_dtype == "auto" and lost(trained, delivered) > LOST:
            dtype = torch.float32
        if half != torch.bfloat16:
            rounded = margin(_filled(plain, exact, dtype, torch.bfloat16))
        _filled(plain, exact)
        if dtype == torch.float32:
            delivered = margin(plain) if merged else trained
        if dtype == torch.bfloat16:
            rounded = None
    cast(torch.nn.Module, plain).to(dtype)
    saving = Saving(dtype=str(dtype).removeprefix("torch."), trained=trained, delivered=delivered, rounded=rounded)
    _tell(saving, own, merged=merged)
    return saving


def _filled(plain: PreTrainedModel, weights: Mapping[str, Tensor], *dtypes: torch.dtype) -> PreTrainedModel:
    """The model, still in float32, with these weights rounded to one dtype after the other."""
    with torch.no_grad():
        for name, own in plain.named_parameters():
            own.copy_(reduce(Tensor.to, dtypes, weights[name]))
    return plain


def _undone_by_rounding(saving: Saving) -> bool:
    """Whether bfloat16, in which engines compute, would undo what is delivered; also where nobody knows."""
    trained, rounded = saving["trained"], saving["rounded"]
    if saving["dtype"] == "bfloat16":
        return False
    return trained is None or rounded is None or lost(trained, rounded) > LOST


def lost(trained: float, delivered: float) -> float:
    """The share of the margin by which saving changed it."""
    return 0.0 if trained == delivered else abs(trained - delivered) / max(abs(trained), 1e-12)


def _tell(saving: Saving, own: torch.dtype, *, merged: bool) -> None:
    trained, delivered, rounded = saving["trained"], saving["delivered"], saving["rounded"]
    policy = str(own).removeprefix("torch.")
    if trained is None or delivered is None:
        unknown = "what rounding costs is not measured on sharded weights"
        if saving["dtype"] == "float32":
            log.info("the model is saved in float32: %s; engine.dtype: auto samples it in float32", unknown)
        else:
            log.warning("the model is saved in %s: %s. Set training.save_dtype: auto to keep float32", policy, unknown)
        return
    if rounded is not None and lost(trained, rounded) > LOST:
        log.info(
            "the model is saved in %s, and sampled by engine.dtype: auto in float32: in bfloat16 its margin would be %.3g,"
            " not %.3g",
            *(saving["dtype"], rounded, trained),
        )
    if lost(trained, delivered) > LOST:
        ways = "Raise the learning rate"
        if saving["dtype"] != "float32":
            ways += ", or set training.save_dtype: float32"
        if merged:
            ways += ", or use the adapter as it was trained"
        log.warning(
            "update lost in saving: the margin is %.3g in training and %.3g in the model as it is delivered (%s). %s",
            *(trained, delivered, saving["dtype"], ways),
        )


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """In peft's format, and the same files wherever it was trained: no path of the base, names in order."""
    for settings in model.peft_config.values():
        assert isinstance(settings, LoraConfig)
        settings.base_model_name_or_path = ""
        if isinstance(settings.target_modules, set):
            settings.target_modules = sorted(settings.target_modules)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """A folder to fill, which takes the place of `folder` when the block ends."""
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with checkpoints.writing(unfinished):
        yield unfinished
    open_to_others(unfinished)
    for file in unfinished.iterdir():
        sync(file)
    sync(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    sync(folder.parent)
