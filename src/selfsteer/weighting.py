"""Weights of preference pairs by their probability under the current policy (WPO, arXiv 2406.11827).

w(x, y_w) * w(x, y_l) scales the loss of a pair, so that off-policy pairs count less. The plain weight of a response is its
on-policy probability, which also falls where the policy is merely unsure; alignment divides that out, so that what the
policy itself would say weighs the same everywhere. Left out on purpose: losses and models.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

WeightAlignment = Literal["none", "greedy", "sampled"]


def expected_logps(logits: Tensor, alignment: WeightAlignment) -> Tensor:
    """What the weight of a token is measured against; its logits, shape (tokens, vocabulary); returns (tokens,).

    none:     0
    greedy:   max_v log pi(v), the token that greedy decoding takes
    sampled:  log sum_v pi(v)^2, the expected probability of a sampled token; the paper's choice (its equation 2)

    Call it on chunks of tokens: it holds a second tensor of the size of the logits.
    """
    if alignment == "none":
        return logits.new_zeros(len(logits), dtype=torch.float32)
    logps = logits.detach().float().log_softmax(-1)
    return logps.amax(-1) if alignment == "greedy" else (2 * logps).logsumexp(-1)


def response_weights(logps: Tensor, expected: Tensor, lengths: Sequence[int]) -> Tensor:
    """exp of the mean over a response's tokens of log pi(token) - expected; no gradient.

    logps, expected: shape (tokens,), responses one behind the other with `lengths` tokens each; returns (responses,).
    """
    differences = (logps - expected).detach().float().split(list(lengths))
    return torch.stack([response.mean() for response in differences]).exp()


def pair_weights(chosen: Tensor, rejected: Tensor) -> Tensor:
    """w(x, y_w) * w(x, y_l), at most 1, shape (pairs,); to be multiplied with the losses of the pairs.

    Sampled alignment can exceed 1, for a response of tokens more probable than expected; the authors' code cuts there.
    """
    return (chosen * rejected).clamp(max=1)
