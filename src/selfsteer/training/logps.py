"""Log-probabilities of completions from a causal language model, without ever holding tokens x vocabulary.

`teach` gives a model's own `forward` a second way to be called, so that wrappers (PEFT, DDP, FSDP) need not know; a batch
from `packing` then returns the summed log-probability of each completion. Training and scoring share this one path, which
is why the first reward margins are exactly zero.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfsteer.recipe.sections import Weighting
from selfsteer.training.objective import expected_logps, response_weights
from selfsteer.training.packing import ATTENTION, Batch, Layout, Row, pack, packed_mask, pad

log = logging.getLogger(__name__)

Packing = Callable[[Sequence[Row]], Batch]
"""How rows become a batch: `packing.pack` or `packing.pad`."""

CHUNK_ELEMENTS = 2**24
"""Logits alive at a time: 64 MB in float32."""

TOLERANCE = 1e-5
"""Largest difference of a summed log-probability between packed and plain, in float32, relative to it (at least 1 nat)."""


class TokenScores(NamedTuple):
    """Of every completion token of a batch, shape (N,) each, float32."""

    logps: Tensor
    expected: Tensor
    """See `objective.expected_logps`; no gradient."""


def teach(model: PreTrainedModel, dtype: torch.dtype, weighting: Weighting = "none") -> None:
    """Let `model(**batch)` return the summed log-probabilities of a `Batch`, shape (completions,), float32.

    With a weighting, shape (2, completions): below them the weights of the completions, which have no gradient. Matrix
    products run in `dtype` (autocast) whatever the weights are kept in. Other calls are answered as before. Call it before
    wrapping the model (PEFT, DDP, ...).
    """
    plain = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            return plain(*args, **kwargs)
        batch = cast(Batch, {name: kwargs[name] for name in Batch.__annotations__ if name != "layout"} | {"layout": layout})
        device = batch["input_ids"].device.type
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            scores = (
                _plain_scores(plain, batch, weighting) if layout.spans is None else _shared_scores(self, batch, weighting)
            )
        sums = _sums(scores.logps, layout)
        return sums if weighting == "none" else torch.stack([sums, response_weights(*scores, layout.tokens)])

    model.forward = MethodType(forward, model)


def choose_packing(model: PreTrainedModel, rows: Sequence[Row], *, sharing: bool = True) -> Packing:
    """`pack` where the model gives the same log-probabilities packed as plain, checked on `rows`; else `pad` and a warning.

    model: with float32 weights, not yet wrapped. Its attention function is exchanged when packing holds.
    """
    if not sharing:
        return pad
    reason = _why_not_shared(model, rows)
    if reason is None:
        return pack
    log.warning(
        "%s does not allow prefix sharing (%s): every completion is computed behind its own prompt, which is slower",
        type(model).__name__,
        reason,
    )
    return pad


def _why_not_shared(model: PreTrainedModel, rows: Sequence[Row]) -> str | None:
    """Why packing does not hold, or None where it does; then the model's attention is `ATTENTION`."""
    if not model._supports_attention_backend:  # pyright: ignore[reportPrivateUsage]
        return "it takes no attention function"
    before = cast(str, model.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]
    training = model.training
    model.eval()
    try:
        # In float32 whatever training computes in: rounding must not hide a completion that sees its neighbour.
        with torch.no_grad():
            alone = [
                to_device(pad([Row(prompt, (one,))]), model.device) for prompt, completions in rows for one in completions
            ]
            plain = torch.stack([_plain_scores(model.forward, batch, "none").logps.sum() for batch in alone])
            model.set_attn_implementation(ATTENTION)
            together = to_device(pack(rows), model.device)
            shared = _sums(_shared_scores(model, together, "none").logps, together["layout"])
    except (NotImplementedError, TypeError) as error:  # a model's own code that takes no layout, or attention we don't redo
        reason = str(error)
    else:
        difference = ((shared - plain).abs() / plain.abs().clamp(min=1)).nan_to_num(nan=float("inf")).max().item()
        if difference <= TOLERANCE:
            return None
        reason = f"relative difference {difference:.1g}, allowed {TOLERANCE:.1g}"
    finally:
        model.train(training)
    model.set_attn_implementation(before)
    return reason


def _sums(tokens: Tensor, layout: Layout) -> Tensor:
    # Not index_add: its order of summation is not fixed on GPUs, and equal models must give equal sums.
    return torch.stack([completion.sum() for completion in tokens.split(layout.tokens)])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return cast(Batch, {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})


def _plain_scores(forward: Callable[..., Any], batch: Batch, weighting: Weighting) -> TokenScores:
    """From the model's own logits."""
    logits: Tensor = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    chosen = logits.flatten(0, 1)[batch["sources"]].float()
    # Not log_softmax: over large vocabularies its float32 sum is off by some 1e-6 a token, always to one side.
    logps = chosen.gather(1, batch["targets"][:, None])[:, 0] - chosen.logsumexp(-1)
    return TokenScores(logps, _plain_expected(chosen.detach(), weighting))


def _plain_expected(logits: Tensor, weighting: Weighting) -> Tensor:
    if weighting == "none":
        return logits.new_zeros(len(logits))
    parts = [logits[part] for part in _chunks(*logits.shape)]
    exponentials = ((part - part.amax(-1, keepdim=True)).exp_() for part in parts)
    return torch.cat([expected_logps(part, part.sum(-1), weighting) for part in exponentials])


def _shared_scores(model: PreTrainedModel, batch: Batch, weighting: Weighting) -> TokenScores:
    """From the backbone's hidden states, only where a completion's token is predicted."""
    hidden: Tensor = model.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=packed_mask(batch),
        layout=batch["layout"],
        use_cache=False,
    ).last_hidden_state
    head = cast(torch.nn.Linear, model.get_output_embeddings())
    states = hidden[0][batch["sources"]]
    return TokenScores(*cast(Any, TokenLogps.apply(states, head.weight, head.bias, batch["targets"], weighting)))


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target] for each token, in chunks; float32 whatever the matrix products are in.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,); returns the fields of `TokenScores`. The logits of a chunk
    are recomputed in the backward pass; where the head is frozen (LoRA) the gradient's direction in `hidden` is taken in the
    forward pass instead.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weighting: Weighting
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        dtype = (
            torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
        )
        hidden_only = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(logps)
        expected = torch.zeros_like(logps)
        direction = torch.empty_like(hidden) if hidden_only else None
        head = weight.to(dtype)
        for part in _chunks(len(targets), len(weight)):
            logits = _logits(hidden[part], (weight, head, bias), targets[part])
            predicted = logits.gather(1, targets[part, None])[:, 0]
            # log-sum-exp over the logits themselves: nothing else of their size is made.
            largest = logits.amax(-1)
            sums = logits.sub_(largest[:, None]).exp_().sum(-1)
            normalisers[part] = largest + sums.log()
            logps[part] = predicted - normalisers[part]
            if weighting != "none":
                expected[part] = expected_logps(logits, sums, weighting)
            if direction is not None:
                direction[part] = _logits_gradient(logits.div_(sums[:, None]), targets[part], 1.0).to(dtype) @ head
        ctx.dtype = dtype
        ctx.hidden_only = hidden_only
        if hidden_only:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.mark_non_differentiable(expected)
        return logps, expected

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        scale = grads[0][:, None]
        if ctx.hidden_only:
            (direction,) = ctx.saved_tensors
            return scale.to(direction.dtype) * direction, None, None, None, None
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        head = weight.to(ctx.dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for part in _chunks(len(targets), len(weight)):
            logits = _logits(hidden[part], (weight, head, bias), targets[part])
            softmax = logits.sub_(normalisers[part, None]).exp_()
            gradient = _logits_gradient(softmax, targets[part], scale[part])
            if bias_grad is not None:
                bias_grad += gradient.sum(0)
            gradient = gradient.to(ctx.dtype)
            hidden_grad[part] = gradient @ head
            if weight_grad is None:
                continue
            if weight_grad.dtype == ctx.dtype:
                weight_grad.addmm_(gradient.T, hidden[part].to(ctx.dtype))
            else:
                weight_grad += gradient.T @ hidden[part].to(ctx.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None


Head = tuple[Tensor, Tensor, Tensor | None]
"""The output layer: its weight as kept, the same in the dtype of the matrix products, its bias."""


def _logits(hidden: Tensor, output: Head, targets: Tensor) -> Tensor:
    """(chunk, V) in float32; those of the targets are exact even where the matrix product rounds to 16 bits."""
    weight, head, bias = output
    logits = (hidden.to(head.dtype) @ head.T).float()
    if head.dtype != torch.float32:
        exact = (hidden.float() * weight[targets].float()).sum(-1, keepdim=True)
        logits.scatter_(1, targets[:, None], exact)
    return logits if bias is None else logits.add_(bias)


def _logits_gradient(softmax: Tensor, targets: Tensor, scale: Tensor | float) -> Tensor:
    """scale * d logps / d logits = scale * (onehot(target) - softmax), (chunk, V), written over the softmax."""
    softmax.scatter_add_(1, targets[:, None], softmax.new_full((len(targets), 1), -1.0))
    return softmax.mul_(-scale)


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    # Chunks of equal size: a short last one would waste the matrix product.
    count = -(-tokens * vocabulary // CHUNK_ELEMENTS)
    size = -(-tokens // count)
    return [slice(start, start + size) for start in range(0, tokens, size)]
