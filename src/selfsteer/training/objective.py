"""Preference losses (L_base) and L_SSO, as pure functions of log-probabilities.

Every loss takes the same record and returns one loss a pair, shape (pairs,); means are the trainer's business. Left out on
purpose: models, tokens, batches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsteer.recipe.sections import LossName, Weighting


def expected_logps(sums: Tensor, squares: Tensor, weighting: Weighting) -> Tensor:
    """What the weight of each token is measured against, shape (tokens,).

    sums, squares: over the vocabulary, of exp(logit - the token's largest) and of its square, shape (tokens,).

    wpo            log sum_v pi(v)^2, the expected probability of a sampled token; the paper's choice (its equation 2)
    wpo_greedy     max_v log pi(v), the token that greedy decoding takes
    wpo_unaligned  0
    """
    if weighting == "wpo":
        return squares.log() - 2 * sums.log()
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


SIMPO_MARGIN_RATIO = 0.5
"""SimPO's target margin gamma as a share of its beta (arXiv 2405.14734: beta 2.0, gamma 1.0 for Llama-3-Base)."""

FLIP_RATE = 0.1
"""Robust DPO's epsilon: the assumed share of pairs whose labels are the wrong way round (arXiv 2403.00409)."""

CHOSEN_PENALTY = 50.0
"""DPO-positive's lambda: how much a nat that the chosen response lost counts (arXiv 2402.13228, which trained with 50)."""

MIXTURE = 0.5
"""Bounded DPO's lambda: the share of the policy in the mixture (arXiv 2506.12725, best of those that it tried)."""

REFERENCE_FREE: frozenset[LossName] = frozenset({"simpo", "orpo", "sft"})
"""Losses that never look at the reference model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """What a loss may know of a batch of pairs; every field has shape (pairs,)."""

    chosen: Tensor
    """log pi(y_w | x), summed over the completion."""
    rejected: Tensor
    """log pi(y_l | x), summed over the completion."""
    ref_chosen: Tensor
    """log pi_ref(y_w | x); no gradient."""
    ref_rejected: Tensor
    """log pi_ref(y_l | x); no gradient."""
    chosen_tokens: Tensor
    """|y_w|, the end token included."""
    rejected_tokens: Tensor
    """|y_l|, the end token included."""
    weights: Tensor | None = None
    """What L_base of each pair counts; no gradient (`pair_weights`). None: each counts alike."""

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(y_w | x) / pi_ref(y_w | x)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi(y_l | x) / pi_ref(y_l | x)."""
        return self.rejected - self.ref_rejected

    @property
    def ratio_gap(self) -> Tensor:
        """The chosen log-ratio above the rejected one; times beta, the reward margin."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_chosen(self) -> Tensor:
        """log pi(y_w | x) / |y_w|."""
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Tensor:
        """log pi(y_l | x) / |y_l|."""
        return self.rejected / self.rejected_tokens


class PreferenceLoss(Protocol):
    """A loss of each pair, shape (pairs,)."""

    def __call__(self, pairs: PairLogps, *, beta: float) -> Tensor:
        """Losses of the pairs under one strength of the tie to the reference."""
        ...


def dpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta * gap of the log-ratios)."""
    return -F.logsigmoid(beta * pairs.ratio_gap)


def ipo(pairs: PairLogps, *, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17): (h - 1 / (2 tau))^2, tau = beta, h the gap of the log-ratios.

    The log-ratios are means per token, as in TRL, whose authors had that confirmed by the paper's. The equation on its face
    has sums, with which the loss would grow with the length of the responses.
    """
    gap = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    return (gap - 1 / (2 * beta)).square()


def hinge(pairs: PairLogps, *, beta: float) -> Tensor:
    """SLiC-HF's hinge (arXiv 2305.10425) on normalised log-ratios (RSO, arXiv 2309.06657): max(0, 1 - beta * gap)."""
    return F.relu(1 - beta * pairs.ratio_gap)


def simpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): -log sigmoid(beta * gap of the mean log-probabilities - gamma).

    No reference model. gamma is SIMPO_MARGIN_RATIO * beta. The paper's beta is 2 to 10.
    """
    return -F.logsigmoid(beta * (pairs.mean_chosen - pairs.mean_rejected - SIMPO_MARGIN_RATIO))


def orpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691, equations 6 and 7): L_sft - lambda * log sigmoid(log odds ratio), lambda = beta.

    No reference model; P(y|x) is the geometric mean over the tokens. L_sft belongs to the loss and counts beside sft_weight.
    """
    log_odds_ratio = _log_odds(pairs.mean_chosen) - _log_odds(pairs.mean_rejected)
    return sft(pairs) - beta * F.logsigmoid(log_odds_ratio)


def apo_zero(pairs: PairLogps, *, beta: float) -> Tensor:
    """APO-zero (arXiv 2408.06266, equation 7): chosen up and rejected down, each against its own zero.

    1 - sigmoid(beta * chosen log-ratio) + sigmoid(beta * rejected log-ratio).
    """
    return F.sigmoid(-beta * pairs.chosen_ratio) + F.sigmoid(beta * pairs.rejected_ratio)


def robust_dpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """Robust DPO (arXiv 2403.00409): DPO without bias when a share epsilon of the labels is flipped.

    ((1 - epsilon) * L(w, l) - epsilon * L(l, w)) / (1 - 2 * epsilon), epsilon = FLIP_RATE.
    """
    as_labelled = -F.logsigmoid(beta * pairs.ratio_gap)
    flipped = -F.logsigmoid(-beta * pairs.ratio_gap)
    return ((1 - FLIP_RATE) * as_labelled - FLIP_RATE * flipped) / (1 - 2 * FLIP_RATE)


def sppo(pairs: PairLogps, *, beta: float) -> Tensor:
    """SPPO (arXiv 2405.00675, equation 4.7) with hard preferences: the winner's probability of winning is 1.

    (chosen log-ratio - eta / 2)^2 + (rejected log-ratio + eta / 2)^2, eta = 1 / beta (the paper's eta is 1000: beta 0.001).
    """
    half = 0.5 / beta
    return (pairs.chosen_ratio - half).square() + (pairs.rejected_ratio + half).square()


def dpo_norm(pairs: PairLogps, *, beta: float) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124, section 5; open-instruct's dpo_norm): DPO of log-ratios a token.

    -log sigmoid(beta * (chosen log-ratio / |y_w| - rejected log-ratio / |y_l|)). Tulu 3's beta is 5: a gap a token is |y|
    times smaller than its sum. Here and in L_sft a token then pulls alike, so that sft_weight means the same at any length.
    """
    return -F.logsigmoid(beta * (pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens))


def dpop(pairs: PairLogps, *, beta: float) -> Tensor:
    """DPO-positive (Smaug, arXiv 2402.13228, equation 3): what the chosen response lost is taken off the gap.

    -log sigmoid(beta * (gap - lambda * max(0, -chosen log-ratio))), lambda = CHOSEN_PENALTY.
    """
    return -F.logsigmoid(beta * (pairs.ratio_gap - CHOSEN_PENALTY * F.relu(-pairs.chosen_ratio)))


def bdpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """Bounded DPO (arXiv 2506.12725): the rejected response's policy is mixed with the reference.

    -log sigmoid(beta * (chosen log-ratio - log(lambda * pi / pi_ref + 1 - lambda))), lambda = MIXTURE. The rejected term has
    the floor log(1 - lambda), so that pushing the rejected response down wins nothing more and its gradient fades.
    """
    mixed = torch.logaddexp(pairs.rejected_ratio + math.log(MIXTURE), torch.tensor(math.log(1 - MIXTURE)).to(pairs.rejected))
    return -F.logsigmoid(beta * (pairs.chosen_ratio - mixed))


def sft(pairs: PairLogps) -> Tensor:
    """L_sft: the mean negative log-likelihood per token of the chosen response, shape (pairs,)."""
    return -pairs.mean_chosen


def sft_only(pairs: PairLogps, *, beta: float) -> Tensor:
    """L_sft in place of a preference loss, as a control: it looks at no reference model and no rejected response."""
    return sft(pairs)


LOSSES: Mapping[LossName, PreferenceLoss] = {
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "orpo": orpo,
    "apo_zero": apo_zero,
    "robust_dpo": robust_dpo,
    "sppo": sppo,
    "dpo_norm": dpo_norm,
    "dpop": dpop,
    "bdpo": bdpo,
    "sft": sft_only,
}


def objective(loss: LossName, *, beta: float, sft_weight: float) -> Callable[[PairLogps], Tensor]:
    """L_base + gamma * L_sft of each pair (arXiv 2410.17131, equations 1 and 2); w * L_base where pairs are weighted.

    L_SSO (equation 4) of a query is the sum over its two steering pairs; that of a batch, the mean over its queries.
    """
    base = LOSSES[loss]

    def pair_losses(pairs: PairLogps) -> Tensor:
        losses = base(pairs, beta=beta)
        return (losses if pairs.weights is None else pairs.weights * losses) + sft_weight * sft(pairs)

    return pair_losses


def chosen_pulls(pair_losses: Callable[[PairLogps], Tensor], pairs: PairLogps, sft_weight: float) -> tuple[Tensor, Tensor]:
    """What pulls at the chosen response of each pair: |d L_base / d log pi(y_w)|, and gamma / |y_w| of L_sft; (pairs,) each.

    Both terms reach the weights through log pi(y_w), so their shares of its gradient are their shares of what the chosen
    responses do to the weights: at DPO's first step gamma / |y_w| against beta / 2. pair_losses: what `objective` made.
    """
    chosen = pairs.chosen.detach().requires_grad_()
    alone = replace(pairs, chosen=chosen, rejected=pairs.rejected.detach())
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(pair_losses(alone).sum(), chosen)
    of_sft = sft_weight / pairs.chosen_tokens
    return (slopes + of_sft).abs(), of_sft


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps) < 1."""
    return mean_logps - (-mean_logps.expm1()).log()
