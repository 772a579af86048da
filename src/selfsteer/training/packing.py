"""Prefix-shared batches: one prompt, its completions behind it, no padding.

A micro-batch is one sequence (1, T): the rows of its queries back to back, each row a prompt and then its completions, with
position ids that restart behind the prompt for every completion. The prompt attends causally to itself, each completion to
the prompt and itself. No mask of T x T exists: attention runs segment by segment, or on a GPU in half precision over all
segments in one kernel. The last token of a completion predicts nothing and is not computed.

Left out on purpose: sliding windows and recurrent layers. `logps.choose_packing` finds out whether a model can be packed.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "selfsteer"
"""The name of our attention function in transformers' registry."""

_WIDEST_HEAD = 256
"""What FlashAttention computes."""

_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 takes fewer key-value heads than query heads without being told, 2.13 wants to be told."""

_AMPERE = (8, 0)
"""The compute capability from which on FlashAttention runs."""

TokenIds = tuple[int, ...]

Unit = TypeVar("Unit")


class TokenPair(NamedTuple):
    """A preference pair as token ids."""

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds


class Row(NamedTuple):
    """A prompt and the completions that follow it."""

    prompt: TokenIds
    completions: tuple[TokenIds, ...]


class Rows(NamedTuple):
    """The pairs of one query with every prompt once, and every completion once under its prompt."""

    rows: tuple[Row, ...]
    chosen: tuple[int, ...]
    """For each pair, its chosen completion: an index into all completions of `rows`, in their order."""
    rejected: tuple[int, ...]


class Span(NamedTuple):
    """Where a row stands in the packed sequence, as lengths: the prompt's and, of each completion, the computed tokens'."""

    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the tensors of a batch don't say."""

    tokens: tuple[int, ...]
    """Tokens of each completion."""
    spans: tuple[Span, ...] | None
    """The rows of a packed batch; None for a padded one."""
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict[tuple[int, int, int], Tensor], compare=False)
    """Masks of completions over prompts, made by the first layer and used by all: (prompt, completion, heads per group)."""
    segments: "dict[torch.device, Segments]" = field(default_factory=dict[torch.device, "Segments"], compare=False)
    """For `_in_one_kernel`, made by the first layer and used by all."""


class Segments(NamedTuple):
    """The prompts and completions of a packed sequence, S in all, as a kernel for sequences of many lengths takes them."""

    keys: Tensor
    """(K,) what each segment attends to, one after the other: positions in the packed sequence; a prompt comes once for
    itself and once before each of its completions."""
    query_ends: Tensor
    """(S + 1,) where the queries of each segment end, 0 before the first."""
    key_ends: Tensor
    """(S + 1,) the same of `keys`."""
    longest_query: int
    longest_key: int


class Batch(TypedDict):
    """The arguments of a model taught by `logps.teach`; C completions with N tokens in all."""

    input_ids: Tensor
    """(1, T) packed, (C, L) padded."""
    position_ids: Tensor | None
    """(1, T) packed."""
    attention_mask: Tensor | None
    """(C, L) padded."""
    sources: Tensor
    """(N,) flat positions of the hidden states that predict `targets`."""
    targets: Tensor
    """(N,) the tokens of all completions."""
    layout: Layout


def row_tokens(rows: Sequence[Row]) -> int:
    """Tokens that a forward pass over these rows computes."""
    return sum(len(row.prompt) + sum(map(len, row.completions)) for row in rows)


def together(
    units: Iterable[Unit], tokens: Callable[[Unit], int], *, count: int, budget: int | None
) -> Iterator[list[Unit]]:
    """Units that share a forward pass, in their order: `count` of them, or with a budget those with at most so many tokens.

    A unit beyond the budget is alone.
    """
    batch: list[Unit] = []
    size = 0
    for unit in units:
        more = tokens(unit)
        if batch and budget is not None and size + more > budget:
            yield batch
            batch, size = [], 0
        batch.append(unit)
        size += more
        if budget is None and len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def balanced(units: Sequence[int], tokens: Sequence[int], parts: int) -> list[list[int]]:
    """Units, each an index into `tokens`, in so many parts of nearly as many tokens.

    The largest first, always to the part with the fewest (Graham 1969: at most a third above the best).
    """
    smallest = [(0, number) for number in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for unit in sorted(units, key=lambda unit: -tokens[unit]):
        size, number = heappop(smallest)
        found[number].append(unit)
        heappush(smallest, (size + tokens[unit], number))
    return found


def share_prompts(pairs: Sequence[TokenPair]) -> Rows:
    """Merge the pairs of one query so that no prompt, and no completion under a prompt, is computed twice."""
    prompts: dict[TokenIds, dict[TokenIds, None]] = {}
    for pair in pairs:
        completions = prompts.setdefault(pair.prompt, {})
        completions[pair.chosen] = None
        completions[pair.rejected] = None
    numbered = [(prompt, completion) for prompt, completions in prompts.items() for completion in completions]
    index = {key: number for number, key in enumerate(numbered)}
    return Rows(
        rows=tuple(Row(prompt, tuple(completions)) for prompt, completions in prompts.items()),
        chosen=tuple(index[pair.prompt, pair.chosen] for pair in pairs),
        rejected=tuple(index[pair.prompt, pair.rejected] for pair in pairs),
    )


def pack(rows: Sequence[Row]) -> Batch:
    """One sequence without padding, prompts shared.

    Row(prompt=(1, 2), completions=((3, 4, 5), (6, 7))) gives
    input_ids     1 2 3 4 6
    position_ids  0 1 2 3 2
    sources       1 2 3   1 4   (where the targets are predicted)
    targets       3 4 5   6 7
    """
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for prompt, completions in rows:
        ids += prompt
        positions += range(len(prompt))
        last = len(ids) - 1
        for completion in completions:
            start = len(ids)
            computed = completion[:-1]
            ids += computed
            positions += range(len(prompt), len(prompt) + len(computed))
            sources += (last, *range(start, start + len(computed)))
            targets += completion
    spans = tuple(Span(len(row.prompt), tuple(len(c) - 1 for c in row.completions)) for row in rows)
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=None,
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        layout=Layout(_tokens(rows), spans),
    )


def pad(rows: Sequence[Row]) -> Batch:
    """One padded sequence a completion, each behind its own prompt: what any causal model understands."""
    sequences = [(*row.prompt, *completion[:-1]) for row in rows for completion in row.completions]
    starts = [len(row.prompt) - 1 for row in rows for _ in row.completions]
    longest = max(map(len, sequences))
    sources = [
        n * longest + i for n, (ids, start) in enumerate(zip(sequences, starts, strict=True)) for i in range(start, len(ids))
    ]
    return Batch(
        input_ids=torch.tensor([ids + (0,) * (longest - len(ids)) for ids in sequences]),
        position_ids=None,
        attention_mask=torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]),
        sources=torch.tensor(sources),
        targets=torch.tensor([token for row in rows for completion in row.completions for token in completion]),
        layout=Layout(_tokens(rows), None),
    )


def packed_mask(batch: Batch) -> Tensor:
    """The 4-D mask to hand to a backbone along with a packed batch.

    transformers passes 4-D masks on untouched, so no mask of T x T is made; `attention` reads the layout instead.
    """
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch["input_ids"].device)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `sdpa` without a layout, segment by segment with one.

    query (1, heads, T, size), key and value (1, groups, T, size); returns (1, T, heads, size).
    Raises NotImplementedError for what segments don't reproduce: sliding windows, softcapping, position biases.
    """
    layout: Layout | None = kwargs.pop("layout", None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    for unsupported in ("sliding_window", "softcap", "position_bias", "s_aux"):
        if kwargs.get(unsupported) is not None:
            raise NotImplementedError(f"{unsupported} with shared prompts")
    assert layout.spans is not None
    options: dict[str, Any] = {"dropout_p": kwargs.get("dropout", 0.0), "scale": kwargs.get("scaling")}
    half = _half_precision(query)
    if half is not None and not options["dropout_p"]:
        return _in_one_kernel(query.to(half), key.to(half), value.to(half), layout, options["scale"]), None
    lengths = [length for span in layout.spans for length in (span.prompt, *span.completions)]
    # One split instead of slices: the gradient of a slice is a whole tensor of zeros, that of a split one concatenation.
    queries, keys, values = (iter(states.split(lengths, dim=2)) for states in (query, key, value))
    outputs: list[Tensor] = []
    for span in layout.spans:
        prompt_query, prompt_key, prompt_value = next(queries), next(keys), next(values)
        outputs.append(
            F.scaled_dot_product_attention(
                prompt_query, prompt_key, prompt_value, is_causal=True, enable_gqa=True, **options
            )
        )
        for length in span.completions:
            states = (next(queries), torch.cat((prompt_key, next(keys)), 2), torch.cat((prompt_value, next(values)), 2))
            if length:
                outputs.append(_behind_prompt(*states, layout, options))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _behind_prompt(query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: dict[str, Any]) -> Tensor:
    """A completion's attention to its prompt and itself; the heads of a group are folded into the query's length."""
    _, heads, length, size = query.shape
    _, groups, total, _ = key.shape
    shape = (total - length, length, heads // groups)
    if shape not in layout.masks:
        seen = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
        # Additive: the kernels would turn a Boolean mask into this in every layer.
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, float("-inf"))
        layout.masks[shape] = mask.repeat(heads // groups, 1)
    folded = query.reshape(1, groups, heads // groups * length, size)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=layout.masks[shape], **options)
    return output.reshape(1, heads, length, size)


def _half_precision(query: Tensor) -> torch.dtype | None:
    """The dtype in which a GPU's kernel takes these states, or None where it does not."""
    size = query.shape[-1]
    if not query.is_cuda or size > _WIDEST_HEAD or size % 8 or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(query.device) < _AMPERE:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def segments_of(spans: Sequence[Span], device: torch.device) -> Segments:
    """Every segment with queries of its own: prompts attend to themselves, completions to their prompt and themselves."""
    keys: list[int] = []
    queries: list[int] = []
    seen: list[int] = []
    start = 0
    for prompt, completions in spans:
        whole = range(start, start + prompt)
        start += prompt
        keys += whole
        queries.append(prompt)
        seen.append(prompt)
        for length in filter(None, completions):
            keys += (*whole, *range(start, start + length))
            queries.append(length)
            seen.append(prompt + length)
            start += length

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)

    return Segments(torch.tensor(keys, device=device), ends(queries), ends(seen), max(queries), max(seen))


def _in_one_kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """All segments at once, by FlashAttention-2 for sequences of many lengths (arXiv 2307.08691).

    Its causal mask ends with the last key of the last query, which is what a completion behind its prompt needs. The keys of
    a prompt are copied for each completion: K tokens instead of T, for the time of one layer.
    """
    assert layout.spans is not None
    if query.device not in layout.segments:
        layout.segments[query.device] = segments_of(layout.spans, query.device)
    segments = layout.segments[query.device]
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]  # (T, heads, size)
    keys, values = (states.index_select(0, segments.keys) for states in flat[1:])
    attended = varlen_attn(
        flat[0],
        keys,
        values,
        segments.query_ends,
        segments.key_ends,
        segments.longest_query,
        segments.longest_key,
        scale=scale,
        window_size=(-1, 0),  # causal
        **_GROUPED,
    )
    assert isinstance(attended, Tensor)
    return attended[None]


def _tokens(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(len(completion) for row in rows for completion in row.completions)


AttentionInterface.register(ATTENTION, attention)

AttentionMaskInterface.register(ATTENTION, sdpa_mask)
