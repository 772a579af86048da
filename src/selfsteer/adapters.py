"""Adapters (LoRA, arXiv 2106.09685) on a model: what they may stand on, and how they add to its layers.

An adapter adds little at first: less than half precision tells apart from the output of its layer, which peft rounds before
it adds. `add_before_rounding` adds first, as the merged weights do. Left out on purpose: layers with a bias and weights in
4 bits, which stay peft's.
"""

from collections import Counter
from types import MethodType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as lora_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from selfsteer.recipe.sections import Lora


def with_adapter(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """The model with the adapter that is trained, on all that training.lora.target_modules names.

    Raises ValueError where it would stand on weights that another layer has, too.
    """
    tied = _shared_weights(model)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    adapted = cast(PeftModel, get_peft_model(model, settings))
    _refuse_tied(model, tied)
    add_before_rounding(adapted)
    return adapted


def _shared_weights(model: PreTrainedModel) -> set[int]:
    """The weights that more than one module has; of most small models the embedding's, which is the output layer's too."""
    counts = Counter(id(weights) for module in model.modules() for weights in module.parameters(recurse=False))
    return {weights for weights, count in counts.items() if count > 1}


def _refuse_tied(model: PreTrainedModel, tied: set[int]) -> None:
    """An adapter on one module of several with the same weights would be merged into all of them."""
    wrong = sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(id(weights) in tied for weights in module.get_base_layer().parameters(recurse=False))
    )
    if wrong:
        raise ValueError(
            f"training.lora.target_modules: {', '.join(wrong)} shares its weights with another layer (tie_word_embeddings), "
            "and merging would change that one as well. Leave it out, or untie the model before."
        )


def add_before_rounding(model: PeftModel) -> None:
    """Let adapters on linear layers without a bias add to the layer's product before it is rounded to half precision.

    An adapter that adds nothing leaves the output as it is. In float32 all is as before.
    """
    for layer in model.modules():
        if type(layer) is lora_layers.Linear:
            base = layer.get_base_layer()
            if type(base) is torch.nn.Linear and cast("Tensor | None", base.bias) is None:
                layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of peft's for one plain adapter, x (..., inputs) -> (..., outputs)."""
    weight: Tensor = layer.get_base_layer().weight
    kind = x.device.type
    casting = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if casting else weight.dtype
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = len(active) == 1 and active[0] not in layer.lora_variant and not (args or kwargs)
    if dtype == torch.float32 or not plain or layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *args, **kwargs)
    (name,) = active
    down, up = layer.lora_A[name], layer.lora_B[name]
    given = x if casting else x.to(down.weight.dtype)
    added = up(down(layer.lora_dropout[name](given))) * layer.scaling[name]
    rows, added = x.to(dtype).flatten(0, -2), added.to(dtype).flatten(0, -2)
    return torch.addmm(added, rows, weight.to(dtype).T).unflatten(0, x.shape[:-1])
