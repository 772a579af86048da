"""Choosing pairs: drop reversed ones, keep clear ones, prefer short ones, pick two of n samples. All off by default.

`reject_reason` answers for one pair why not to keep it. The papers do not agree on what to keep, so measure
(`quality.measure`, a judge) before and after. Left out on purpose: judging and scoring (`selection_stage.py`).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from selfsteer.recipe_selection import Selection
from selfsteer.records import PairRow
from selfsteer.shingles import words
from selfsteer.verdicts import Verdict


class Ranked(NamedTuple):
    """A pair, and how its responses were scored."""

    row: PairRow
    verdict: Verdict

    @property
    def margin(self) -> float | None:
        """The chosen response's score above the rejected one's; None where there is no verdict."""
        if self.verdict.margin is not None:
            return self.verdict.margin
        probability = self.verdict.probability
        return None if probability is None else 2 * probability - 1


def is_near(ranked: Ranked, section: Selection) -> bool:
    """Whether the two score so alike that their lengths decide."""
    return section.shorter_within is not None and ranked.margin is not None and abs(ranked.margin) <= section.shorter_within


def reject_reason(ranked: Ranked, section: Selection, bound: float | None) -> str | None:
    """Why this pair must not align the policy, or None to keep it. bound: `min_margin`, or that of `top_share`."""
    if section.drop_reversed and not is_near(ranked, section) and (reason := reversed_reason(ranked.verdict)) is not None:
        return reason
    if bound is None:
        return None
    return "no verdict" if ranked.margin is None else margin_reason(ranked.margin, at_least=bound)


def reversed_reason(verdict: Verdict) -> str | None:
    """Why not a pair whose order the judge reverses; ties and pairs that it could not judge are kept.

    Filtering by a reward model's verdict: arXiv 2404.09824, which finds a tenth more noise in the labels to cost up to
    30 points of win rate. The judge's own errors go with the pairs: see its accuracy on pairs that people have labelled.
    """
    return "order reversed" if verdict.preferred == "rejected" else None


def margin_reason(margin: float, *, at_least: float) -> str | None:
    """Why not a pair whose implicit reward margin is small; `top_share` gives the bound that keeps a share.

    Large margins: arXiv 2502.14560 (10% of UltraFeedback did better than all of it), and arXiv 2501.15109 with the
    reference model's own log-probabilities. arXiv 2508.04149 keeps the small ones, as the harder lessons: for that, pass
    margins with their sign turned.
    """
    return "small margin" if margin < at_least else None


def top_share(margins: Sequence[float], share: float) -> float:
    """The margin that `share` of `margins` reach: the smallest of the ceil(share * n) largest.

    Raises ValueError without margins or for a share outside (0, 1].
    """
    if not margins or not 0 < share <= 1:
        raise ValueError(f"cannot keep a share of {share} of {len(margins)} margins; give a share above 0 and at most 1")
    # Less a rounding error: 0.1 of 30 is 3, though 0.1 * 30 is more than 3.
    kept = int(np.ceil(share * len(margins) - 1e-9))
    return sorted(margins, reverse=True)[kept - 1]


def prefer_shorter(row: PairRow) -> PairRow:
    """The row of two responses with close scores, turned round where the rejected one is the shorter one.

    The length control of Meta-Rewarding (arXiv 2407.19594): of close responses the shorter one is chosen. Lengths are tokens
    where the row knows them, else words. In a turned row everything about the two responses has changed sides; its
    principles have not: the good one still names the steering of what is now rejected.
    """
    return turned(row) if _length(row, "rejected") < _length(row, "chosen") else row


def turned(row: PairRow) -> PairRow:
    """The pair with chosen and rejected exchanged, in all columns that are about either."""
    sides = {"chosen": "rejected", "rejected": "chosen"}

    def counterpart(key: str) -> str:
        return "_".join(sides.get(part, part) for part in key.split("_"))

    values = cast("dict[str, Any]", row)
    return cast(PairRow, {key: values[counterpart(key)] for key in values})


class Sample(NamedTuple):
    """One of several responses to a query."""

    score: float
    """Of a judge or a reward model; higher is better."""
    tokens: int


class Picked(NamedTuple):
    """A good and a bad sample, as indices."""

    chosen: int
    rejected: int


def best_and_near_worst(
    good: Sequence[Sample], bad: Sequence[Sample], *, within: float = 0.0, deviations: float = 2.0
) -> Picked | None:
    """The best good sample, and of the bad ones that score lower the nearest to their mean - `deviations` deviations.

    arXiv 2502.16825: with many samples the very worst is too easy, and mean - 2 deviations did best; with few, that lies
    below them all and the worst is taken. (There all samples answer one prompt; here they were asked for in two ways.) Of
    the good samples at most `within` below the best one, the shortest is chosen (arXiv 2407.19594). None where no bad sample
    scores lower than the best good one by more than `within`.
    """
    best = max((sample.score for sample in good), default=-np.inf)
    lower = [index for index, sample in enumerate(bad) if sample.score < best - within]
    if not lower:
        return None
    near_best = [index for index, sample in enumerate(good) if sample.score >= best - within]
    scores = np.array([sample.score for sample in bad])
    target = scores.mean() - deviations * scores.std()
    return Picked(
        chosen=min(near_best, key=lambda index: good[index].tokens),
        rejected=min(lower, key=lambda index: abs(scores[index] - target)),
    )


def _length(row: PairRow, side: Literal["chosen", "rejected"]) -> int:
    tokens = (row.get("chosen_tokens"), row.get("rejected_tokens"))
    if tokens[0] is None or tokens[1] is None:
        return len(words(row[side][-1]["content"]))
    return tokens[0] if side == "chosen" else tokens[1]
