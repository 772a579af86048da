"""Log-probabilities of completions from a causal language model, without ever holding tokens x vocabulary.

`teach` gives a model's own `forward` a second way to be called, so that wrappers (PEFT, DDP, FSDP) need not know; a batch
from `packing` then returns the summed log-probability of each completion. Training and scoring share this one path, which
is why the first reward margins are exactly zero.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from selfsteer.models import let_go
from selfsteer.recipe.sections import Weighting
from selfsteer.training.objective import expected_logps, response_weights
from selfsteer.training.packing import ATTENTION, Batch, Layout, Row, pack, packed_mask, pad

log = logging.getLogger(__name__)

Packing = Callable[[Sequence[Row]], Batch]
"""How rows become a batch: `packing.pack` or `packing.pad`."""

CHUNK_ELEMENTS = 2**22
"""Logits alive at a time: 16 MB in float32, which the C library keeps for the next. What is above 32 MB it gives back, and
each page is faulted in anew. On a GPU four times as many."""

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


def casting_once(device: torch.device) -> AbstractContextManager[Any]:
    """While the block runs, weights are cast to the dtype of the products once instead of in every forward pass.

    Autocast keeps what it cast until the outermost of its contexts ends, and this is one that does nothing else. The weights
    must not change meanwhile, and nothing be trained.
    """
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def hold_in_half(model: PreTrainedModel, layers: Iterable[torch.nn.Linear], dtype: torch.dtype) -> None:
    """Keep weights of linear layers as autocast casts them at each use, and not in float32 beside that: the same bits.

    layers: of the model, and nothing trains them. Those that a pass does not call, or calls outside of autocast, stay.
    """
    if dtype == torch.float32:
        return
    device = model.device
    called: dict[torch.nn.Module, bool] = {}

    def note(layer: torch.nn.Module, _: Any) -> None:
        called[layer] = called.get(layer, True) and torch.is_autocast_enabled(device.type)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers if layer.weight.dtype == torch.float32]
    with torch.autocast(device.type, dtype=dtype):
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, under_autocast in called.items():
        if under_autocast:
            layer.to(dtype)
    let_go()  # of the weights in float32


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
    parts = [logits[part] for part in _parts(len(logits), max(1, CHUNK_ELEMENTS // logits.shape[-1]))]
    exponentials = ((part - part.amax(-1, keepdim=True)).exp_() for part in parts)
    squares = ((part.sum(-1), torch.linalg.vector_norm(part, dim=-1).square()) for part in exponentials)
    return torch.cat([expected_logps(*sums, weighting) for sums in squares])


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
    if isinstance(head, FSDPModule):  # which gathers weights when it is called, and it isn't
        head.unshard()
    states = hidden[0][batch["sources"]]
    return TokenScores(*cast(Any, TokenLogps.apply(states, head.weight, head.bias, batch["targets"], weighting)))


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target] for each token; float32 whatever the matrix products are in.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,); returns the fields of `TokenScores`. Of all N tokens the
    logits of one slice of the vocabulary are alive at a time, and the normaliser is carried from slice to slice (arXiv
    1805.02867). They are computed again in the backward pass, where a slice gives its rows of the weight's gradient whole;
    where the head is frozen (LoRA) the gradient's direction in `hidden` is taken in the forward pass instead.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weighting: Weighting
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        hidden_only = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        output = _Output(hidden.to(dtype), weight.to(dtype), bias, targets, _of_targets(hidden, weight, bias, targets))
        largest = torch.full_like(output.predicted, torch.finfo(torch.float32).min)  # not -inf: -inf - -inf is no number
        sums, squares = torch.zeros_like(largest), torch.zeros_like(largest)
        towards = hidden.new_zeros(hidden.shape, dtype=torch.float32) if hidden_only else None
        for part in _slices(output):
            logits = output.logits(part)
            before, largest = largest, torch.maximum(largest, logits.amax(-1))
            exponentials = logits.sub_(largest[:, None]).exp_()
            shrunk = (before - largest).exp_()
            sums = sums * shrunk + exponentials.sum(-1)
            if weighting == "wpo":
                squares = squares * shrunk.square() + torch.linalg.vector_norm(exponentials, dim=-1).square()
            if towards is not None:
                towards = towards.mul_(shrunk[:, None]).add_(exponentials.to(dtype) @ output.head[part])
        normalisers = largest + sums.log()
        ctx.dtype = dtype
        ctx.hidden_only = hidden_only
        if towards is not None:
            ctx.save_for_backward(weight[targets].float().sub_(towards.div_(sums[:, None])).to(hidden.dtype))
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, output.predicted, normalisers)
        expected = expected_logps(sums, squares, weighting)
        ctx.mark_non_differentiable(expected)
        return output.predicted - normalisers, expected

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        scale = grads[0][:, None]
        if ctx.hidden_only:
            (direction,) = ctx.saved_tensors
            return scale.to(direction.dtype) * direction, None, None, None, None
        hidden, weight, bias, targets, predicted, normalisers = ctx.saved_tensors
        output = _Output(hidden.to(ctx.dtype), weight.to(ctx.dtype), bias, targets, predicted)
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32)
        weight_grad = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        bias_grad = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for part in _slices(output):
            softmax = output.logits(part).sub_(normalisers[:, None]).exp_()
            gradient = output.less_targets(softmax, part).mul_(-scale)
            if bias_grad is not None:
                bias_grad[part] = gradient.sum(0)
            gradient = gradient.to(ctx.dtype)
            hidden_grad += gradient @ output.head[part]
            if weight_grad is not None:
                weight_grad[part] = gradient.T @ output.states
        return hidden_grad.to(hidden.dtype), weight_grad, bias_grad, None, None


class _Output(NamedTuple):
    """The output layer before the states that it is applied to."""

    states: Tensor
    """(N, H) in the dtype of the matrix products, as `head`."""
    head: Tensor
    """(V, H)."""
    bias: Tensor | None
    targets: Tensor
    predicted: Tensor
    """(N,) the logits of the targets, in float32."""

    def logits(self, part: slice) -> Tensor:
        """Of a slice of the vocabulary, (N, slice) in float32; those of the targets are `predicted`."""
        logits = (self.states @ self.head[part].T).float()
        if self.bias is not None:
            logits.add_(self.bias[part])
        index, inside = self._inside(part)
        return logits.scatter_(1, index, torch.where(inside, self.predicted[:, None], logits.gather(1, index)))

    def less_targets(self, softmax: Tensor, part: slice) -> Tensor:
        """softmax - onehot(target), written over the softmax of a slice."""
        index, inside = self._inside(part)
        return softmax.scatter_add_(1, index, -inside.to(softmax.dtype))

    def _inside(self, part: slice) -> tuple[Tensor, Tensor]:
        """Where in the slice each target stands, and whether it does; both (N, 1)."""
        index = self.targets[:, None] - part.start
        width = part.stop - part.start
        return index.clamp(0, width - 1), (index >= 0) & (index < width)


def _of_targets(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The logits of the targets, (N,), in float32 even where the matrix products round to 16 bits."""
    logits = (hidden.float() * weight[targets].float()).sum(-1)
    return logits if bias is None else logits + bias[targets]


def _slices(output: _Output) -> list[slice]:
    """Parts of the vocabulary with so many logits of all tokens as may be alive at a time."""
    alive = CHUNK_ELEMENTS if output.states.device.type == "cpu" else 4 * CHUNK_ELEMENTS
    return _parts(len(output.head), max(1, alive // max(1, len(output.states))))


def _parts(count: int, most: int) -> list[slice]:
    """So many things in as few parts of at most `most` as can be, of equal size: a short last product is a slow one."""
    size = -(-count // -(-count // most))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
