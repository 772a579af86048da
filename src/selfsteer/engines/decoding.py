"""What the embedded engine computes beside the model: the choice of a token, and attention over slots of a shared cache.

A batch of B sequences lives in B slots of one preallocated cache. A forward pass takes one flat row of tokens, (1, T):
first the newest token of each of the n active sequences (slots 0 .. n-1), then whole new prompts, which fill the slots from
n on. So nothing is ever padded, a new prompt needs no pass of its own, and a finished sequence gives its slot away at once.

Left out on purpose: sliding windows, soft-capping and attention sinks (`UnsupportedAttentionError`; the engine then falls
back to `model.generate`), prefix sharing between prompts, paging.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "selfsteer_slots"
"""Under this name the attention function is known to transformers."""

CANDIDATES = (64, 2048)
"""Numbers of top tokens that are tried, in turn, before a row's whole vocabulary is sorted."""

_GROWTH = 128
"""Tokens by which the slots grow; a multiple of 16, which keeps attention masks aligned for the CUDA kernels."""

_ALIGNMENT = 16

_CPU_ROWS = 8
"""Slots that attend together on a CPU: the fewer, the less of their span is masked, for a call each. Elsewhere all do."""


class UnsupportedAttentionError(ValueError):
    """The model's attention does more than plain causal attention."""


def choose(logits: Tensor, *, temperature: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row from the nucleus (arXiv 1904.09751), by the inverse of its cumulative distribution.

    The nucleus is the smallest set of most probable tokens whose probability is at least top_p; probabilities are those of
    the whole vocabulary at this temperature, in float32. It is exact, but only rows whose nucleus exceeds `CANDIDATES` are
    sorted whole. Among tokens of equal probability at its edge, which one belongs to it is open.

    logits: (rows, vocabulary); temperature (0 takes the most probable token), top_p, uniforms in [0, 1): (rows,).
    Returns token ids, (rows,).
    """
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    norm = scaled.logsumexp(-1)  # (rows,)
    chosen = torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
    rows = torch.arange(logits.shape[0], device=logits.device)
    top_p = torch.where(temperature > 0, top_p, 0.0)
    for count in (*(c for c in CANDIDATES if c < logits.shape[1]), logits.shape[1]):
        values, ids = scaled[rows].topk(count) if len(rows) < len(scaled) else scaled.topk(count)
        cumulative = (values - norm[rows, None]).exp().cumsum(-1)  # (rows, count)
        size = (cumulative < top_p[rows, None]).sum(-1, keepdim=True) + 1
        complete = size[:, 0] <= count
        size = size.clamp(max=count)
        goal = uniforms[rows, None] * cumulative.gather(-1, size - 1)
        index = torch.minimum((cumulative <= goal).sum(-1, keepdim=True), size - 1)
        chosen[rows] = ids.gather(-1, index)[:, 0]
        rows = rows[~complete]
        if len(rows) == 0:
            break
    greedy = temperature <= 0
    if greedy.any():  # searches the whole vocabulary
        chosen[greedy] = logits[greedy].argmax(-1)
    return chosen


class Block(NamedTuple):
    """Neighbouring active slots that attend together."""

    start: int
    stop: int
    mask: Tensor
    """0 up to each sequence's newest token, -inf beyond it, up to the longest of the block: (stop - start, 1, 1, span)."""


class Segment(NamedTuple):
    """A whole prompt inside the flat row of tokens."""

    slot: int
    start: int
    stop: int


class SlotCache:
    """Keys and values of every layer, each (slots, key-value heads, length, head dimension); grows in length as needed.

    Values beyond a slot's own length are whatever a former sequence left there: always finite, never attended to.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def reserve(self, length: int) -> None:
        """Make room for sequences of this many tokens."""
        if length <= self.length:
            return
        self.length = -(-length // _GROWTH) * _GROWTH
        for index, (keys, values) in self.layers.items():
            self.layers[index] = (self._grown(keys), self._grown(values))

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of one layer, made on first sight of its keys and values, (1, heads, tokens, dimension)."""
        if index not in self.layers:
            shape = (self.slots, keys.shape[1], self.length)
            self.layers[index] = (keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3]))
        return self.layers[index]

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot over another."""
        for keys, values in self.layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(old.shape[0], old.shape[1], self.length, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where the tokens of one forward pass stand; handed through the model to `slot_attention`."""

    cache: SlotCache
    positions: Tensor
    """Position of the newest token of each active sequence, (n,)."""
    blocks: tuple[Block, ...]
    prompts: tuple[Segment, ...]


def plan_step(cache: SlotCache, lengths: list[int], prompts: tuple[Segment, ...], like: Tensor) -> Step:
    """The step in which n sequences of these lengths (newest token included) go on and the prompts begin.

    like: any tensor with the device and dtype of the model.
    """
    cache.reserve(max([*lengths, *(p.stop - p.start for p in prompts)]))
    positions = torch.tensor(lengths, dtype=torch.long, device=like.device) - 1
    rows = _CPU_ROWS if like.device.type == "cpu" else cache.slots
    blocks: list[Block] = []
    for start in range(0, len(lengths), rows):
        inside = lengths[start : start + rows]
        span = -(-max(inside) // _ALIGNMENT) * _ALIGNMENT
        stop = start + len(inside)
        beyond = torch.arange(span, device=like.device) > positions[start:stop, None]
        mask = torch.zeros_like(beyond, dtype=like.dtype).masked_fill_(beyond, -torch.inf)
        blocks.append(Block(start, stop, mask[:, None, None]))
    return Step(cache=cache, positions=positions, blocks=tuple(blocks), prompts=prompts)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,  # (1, H_kv, T, D_v)
    attention_mask: Tensor | None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; also writes the new keys and values to their slots. Returns (1, T, H, D_v)."""
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UnsupportedAttentionError(f"{type(module).__name__} attends with {name}")
    step, scale, index = options["step"], options.get("scaling"), module.layer_idx
    assert isinstance(step, Step)
    assert isinstance(index, int)
    assert scale is None or isinstance(scale, float)
    keys, values = step.cache.layer(index, key, value)
    n, (_, heads, tokens, _) = len(step.positions), query.shape
    output = value.new_empty(1, tokens, heads, value.shape[-1])
    if n:
        slots = torch.arange(n, device=key.device)
        keys[slots, :, step.positions] = key[0, :, :n].transpose(0, 1)
        values[slots, :, step.positions] = value[0, :, :n].transpose(0, 1)
    # The query heads that share a key-value head are positions of one attention over it: nothing is repeated.
    grouped = query[0, :, :n].transpose(0, 1).reshape(n, keys.shape[1], heads // keys.shape[1], query.shape[-1])
    for start, stop, mask in step.blocks:
        span = mask.shape[-1]
        k, v = keys[start:stop, :, :span], values[start:stop, :, :span]
        attended = scaled_dot_product_attention(grouped[start:stop], k, v, attn_mask=mask, scale=scale)
        output[0, start:stop] = attended.reshape(stop - start, heads, -1)
    for slot, start, stop in step.prompts:
        keys[slot, :, : stop - start] = key[0, :, start:stop]
        values[slot, :, : stop - start] = value[0, :, start:stop]
        q, k, v = (states[:, :, start:stop] for states in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        output[0, start:stop] = attended[0].transpose(0, 1)
    return output, None


AttentionInterface.register(ATTENTION_NAME, slot_attention)
