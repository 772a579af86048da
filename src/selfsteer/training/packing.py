"""Prefix-shared batches: one prompt, its completions behind it, no padding.

A micro-batch is one sequence (1, T): the rows of its queries back to back, each row a prompt and then its completions, with
position ids that restart behind the prompt for every completion. The prompt attends causally to itself, each completion to
the prompt and itself. No mask of T x T exists: attention runs segment by segment. The last token of a completion predicts
nothing and is not computed.

Left out on purpose: sliding windows and recurrent layers. `logps.choose_packing` finds out whether a model can be packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "selfsteer"
"""The name of our attention function in transformers' registry."""

TokenIds = tuple[int, ...]


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


def _tokens(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(len(completion) for row in rows for completion in row.completions)


AttentionInterface.register(ATTENTION, attention)

AttentionMaskInterface.register(ATTENTION, sdpa_mask)
