"""What a run needs and can be known before anything is sampled: trackers, processes, plain weights, disk, memory.

Each is refused in one line with its way out. Left out on purpose: models, files, templates and what engines lack, which
`pipeline.prepare` and `check_engines` say; whether a server answers, which may change at any time; and everything that is an
estimate (`plan.py`): only what can't do is refused.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from selfsteer.adapters import with_adapter
from selfsteer.data.named import check_launcher
from selfsteer.models import (
    available_memory,
    check_quantization,
    compute_dtype,
    load_configuration,
    pick_device,
    quantizable,
)
from selfsteer.recipe.sections import Recipe
from selfsteer.records import Checkpoint
from selfsteer.stages.costs import Size, checkpoints_disk, loaded_weights, model_disk, training_state
from selfsteer.stages.status import TRAININGS
from selfsteer.store.folder import POLICY, Stage


def check_essentials(recipe: Recipe, policy: Checkpoint, stages: Sequence[str]) -> None:
    """Raises ValueError for the first thing without which a run of these stages, or what is left of it, would fail later."""
    check_trackers(recipe.training.report_to)
    trainings = unsealed_trainings(recipe, stages)
    if trainings:
        check_processes(recipe, trainings)
        check_plain(recipe, policy)
        check_four_bits(recipe, policy)
        size = size_of(policy, recipe)
        check_memory(recipe, size)
        check_disk(recipe, size, trainings)


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that transformers does not know, or that is not installed."""
    installed = {*get_available_reporting_integrations(), "flyte", "all", "none"}  # of flyte transformers can't tell
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK and name not in ("all", "none"):
            raise ValueError(f"training.report_to: {name!r} is no tracker; there are {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in installed:
            raise ValueError(
                f"training.report_to: {name} is not installed; pip install {name.replace('_', '-')}, or leave it out"
            )


def check_processes(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raises ValueError for a configuration of accelerate that will not do, and for processes that can't share a batch or
    outnumber the devices."""
    launcher = recipe.launcher
    if launcher.config is not None:
        check_launcher(Path(launcher.config), quantize=recipe.training.quantize is not None)
    if launcher.processes is None:
        return
    for stage in stages:
        section, batch = ("alignment", recipe.alignment) if stage.endswith(POLICY) else ("generator", recipe.generator)
        if batch.batch_size % launcher.processes:
            raise ValueError(
                f"{section}.batch_size: {batch.batch_size} can't be shared by {launcher.processes} processes"
                " (launcher.processes); take a multiple"
            )
    if launcher.kind == "accelerate" and launcher.config is None and pick_device().type == "cuda":
        devices = torch.cuda.device_count()
        if launcher.processes > devices:
            raise ValueError(f"launcher.processes: {launcher.processes}, but CUDA devices here: {devices}; take no more")


def check_plain(recipe: Recipe, policy: Checkpoint) -> None:
    """Raises ValueError for quantized weights but those that transformers loads as plain ones."""
    configuration = load_configuration(policy.path, trust_remote_code=recipe.policy.trust_remote_code)
    method = (configuration.to_dict().get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        raise ValueError(
            f"policy.model: its weights are quantized ({method}), which can't be trained here; name the model that it was"
            " made from"
        )


def check_four_bits(recipe: Recipe, policy: Checkpoint) -> None:
    """Raises ValueError where the policy is to be held in 4 bits and can't be."""
    if recipe.training.quantize is not None:
        trust = recipe.policy.trust_remote_code
        check_quantization(load_configuration(policy.path, trust_remote_code=trust), pick_device(), trust_remote_code=trust)


def check_memory(recipe: Recipe, size: Size) -> None:
    """Raises ValueError where weights, gradients and optimizer of a training in this process can't fit its device."""
    if recipe.launcher.kind != "local":
        return
    device = pick_device()
    room = device_memory(device)
    half = compute_dtype(recipe.training.dtype, device) != torch.float32
    need = max(training_state(recipe.training, size, half=half), loaded_weights(size))
    if need <= room:
        return
    way_out = (
        "set training.lora.rank=16" if recipe.training.lora is None else "take a smaller model"
    ) + ", or share the training among several devices (launcher, docs/scaling.md)"
    raise ValueError(
        f"memory: training {size.parameters / 1e9:.2g} billion weights takes {need / 1e9:.3g} GB for weights, gradients and"
        f" optimizer, and {device.type} has {room / 1e9:.3g} GB; {way_out}"
    )


def device_memory(device: torch.device) -> int:
    """Bytes that this process can have on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def check_disk(recipe: Recipe, size: Size, stages: Sequence[str]) -> None:
    """Raises ValueError where the models and checkpoints of these training stages don't fit the disk of the run folder."""
    saved = (file for stage in stages for file in Path(recipe.output, stage).glob("training-*/checkpoint-*/**/*"))
    there = sum(file.stat().st_size for file in saved if file.is_file())
    need = len(stages) * model_disk(recipe, size) + max(0, checkpoints_disk(size) - there)
    free = shutil.disk_usage(existing(Path(recipe.output))).free
    if need > free:
        raise ValueError(
            f"disk: {', '.join(stages)} need up to {need / 1e9:.3g} GB for models and checkpoints, and {recipe.output} has"
            f" {free / 1e9:.3g} GB free; make room, or name another output"
        )


def existing(path: Path) -> Path:
    """The folder itself, or the first above it that is there."""
    whole = path.absolute()
    return next(each for each in (whole, *whole.parents) if each.exists())


def unsealed_trainings(recipe: Recipe, stages: Sequence[str]) -> list[str]:
    """Those of a run's stages that train and are still to be made, as round-N/STAGE; shard 1 alone trains the generator."""
    if recipe.queries.share is not None and recipe.queries.share.number > 1:
        return []
    names = [name for name in stages if name in TRAININGS]
    places = [f"round-{number}/{name}" for number in range(1, recipe.rounds + 1) for name in names]
    return [place for place in places if Stage(Path(recipe.output) / place).manifest() is None]


def size_of(model: Checkpoint, recipe: Recipe) -> Size:
    """From its configuration alone; no weight is read."""
    trust = recipe.policy.trust_remote_code
    configuration = load_configuration(model.path, trust_remote_code=trust)
    with torch.device("meta"):
        empty = cast(PreTrainedModel, AutoModelForCausalLM.from_config(configuration, trust_remote_code=trust))
        parameters, output = sum(part.numel() for part in empty.parameters()), empty.get_output_embeddings()
        weights = 0 if output is None else sum(part.numel() for part in output.parameters())
        linear = sum(layer.weight.numel() for layer in quantizable(empty))
        if recipe.training.lora is not None:
            with_adapter(empty, recipe.training.lora)  # in place
    trained = sum(part.numel() for part in empty.parameters() if part.requires_grad)
    text: dict[str, Any] = configuration.get_text_config().to_dict()
    layers, width, heads = (int(text.get(name) or 1) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    each = int(text.get("head_dim") or width // heads)
    cached = 2 * layers * int(text.get("num_key_value_heads") or heads) * each
    return Size(parameters, trained, layers, width, cached, weights, linear)
