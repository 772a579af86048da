"""Weights of preference pairs by their probability under the policy in training (WPO, arXiv 2406.11827).

w(x, y_w) * w(x, y_l) scales the loss of a pair, so that off-policy pairs count less. The plain weight of a response is its
on-policy probability, which also falls where the policy is merely unsure; alignment divides that out, so that what the
policy itself would say weighs the same everywhere. Left out on purpose: losses and models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfsteer.recipe_training import Weighting


def expected_logps(exponentials: Tensor, sums: Tensor, weighting: Weighting) -> Tensor:
    """What the weight of each token is measured against, shape (tokens,).

    exponentials: exp(logits - their largest), shape (tokens, vocabulary); sums: over the vocabulary, shape (tokens,).

    wpo            log sum_v pi(v)^2, the expected probability of a sampled token; the paper's choice (its equation 2)
    wpo_greedy     max_v log pi(v), the token that greedy decoding takes
    wpo_unaligned  0

    Makes nothing of the size of the vocabulary.
    """
    if weighting == "wpo":
        return 2 * (torch.linalg.vector_norm(exponentials, dim=-1) / sums).log()
    if weighting == "wpo_greedy":
        return -sums.log()
    return torch.zeros_like(sums)


def response_weights(logps: Tensor, expected: Tensor, lengths: Sequence[int]) -> Tensor:
    """exp of the mean over a response's tokens of log pi(token) - expected; no gradient.

    logps, expected: shape (tokens,), responses one behind the other with `lengths` tokens each; returns (responses,).
    """
    differences = (logps - expected).detach().float().split(list(lengths))
    return torch.stack([response.mean() for response in differences]).exp()


def pair_weights(chosen: Tensor, rejected: Tensor) -> Tensor:
    """w(x, y_w) * w(x, y_l), at most 1, shape (pairs,); to be multiplied with the losses of the pairs.

    Aligned weights can exceed 1, for a response of tokens more probable than expected; the authors' code cuts there.
    """
    return (chosen * rejected).clamp(max=1)
