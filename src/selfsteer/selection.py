"""Choosing pairs: drop reversed ones, keep clear ones, prefer short ones, pick two of n samples. All off by default.

Each answers for one row why not to keep it, or None to keep it; `select` applies the answers to a stream. The papers do not
agree on what to keep, so measure (`quality.measure`, a judge) before and after. Left out on purpose: judging and scoring.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from selfsteer.records import Dropped, PairRow
from selfsteer.shingles import words
from selfsteer.verdicts import Verdict


def select(rows: Iterable[PairRow], reasons: Iterable[str | None]) -> Iterator[PairRow | Dropped]:
    """Each row, or a `Dropped` where its reason is given, in order. ValueError where there is no reason for each row."""
    for row, reason in zip(rows, reasons, strict=True):
        yield row if reason is None else Dropped(id=row["query_id"], reason=reason)


def reversed_reason(verdict: Verdict) -> str | None:
    """Why not a pair whose order the judge reverses; ties and pairs that it could not judge are kept.

    Filtering by a reward model's verdict: arXiv 2404.09824, which finds a tenth more noise in the labels to cost up to
    30 points of win rate. The judge's own errors go with the pairs: see its accuracy on pairs that people have labelled.
    """
    return "order reversed by the judge" if verdict.preferred == "rejected" else None


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


def prefer_shorter(row: PairRow, margin: float, *, within: float) -> PairRow:
    """The row, turned round where its scores differ by at most `within` and the rejected response is the shorter one.

    margin: a judge's score, or the implicit reward, of chosen - that of rejected.

    The length control of Meta-Rewarding (arXiv 2407.19594): of close responses the shorter one is chosen. Lengths are tokens
    where the row knows them, else words. In a turned row everything about the two responses has changed sides; its
    principles have not: the good one still names the steering of what is now rejected.
    """
    return turned(row) if abs(margin) <= within and _length(row, "rejected") < _length(row, "chosen") else row


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
    """Two of the samples, as indices."""

    chosen: int
    rejected: int


def best_and_near_worst(samples: Sequence[Sample], *, within: float = 0.0, deviations: float = 2.0) -> Picked | None:
    """The best sample, and as rejected the one whose score is nearest to mean - `deviations` standard deviations.

    arXiv 2502.16825: with many samples the very worst is too easy, and mean - 2 deviations did best; with few, that lies
    below them all and the worst is taken. Of the samples at most `within` below the best score, the shortest is chosen
    (arXiv 2407.19594), and none of them is rejected. None where no sample is left to reject.
    """
    scores = np.array([sample.score for sample in samples])
    best = scores.max(initial=-np.inf)
    lower = [index for index, score in enumerate(scores) if score < best - within]
    if not lower:
        return None
    near_best = [index for index, score in enumerate(scores) if score >= best - within]
    target = scores.mean() - deviations * scores.std()
    return Picked(
        chosen=min(near_best, key=lambda index: samples[index].tokens),
        rejected=min(lower, key=lambda index: abs(scores[index] - target)),
    )


def _length(row: PairRow, side: Literal["chosen", "rejected"]) -> int:
    tokens = (row.get("chosen_tokens"), row.get("rejected_tokens"))
    if tokens[0] is None or tokens[1] is None:
        return len(words(row[side][-1]["content"]))
    return tokens[0] if side == "chosen" else tokens[1]
