"""What judges say about pairs, and the arithmetic of their reports. No model runs here; `judges/` makes verdicts.

Conventions. A pair whose two orders disagree is a tie, and a tie counts one half in the accuracy, as it does in the win
rates of MT-bench and AlpacaEval. A pair without a verdict (an error) is never a win: it stays out of every share and is
counted by its reason. Means, the accuracy among them, get bootstrap intervals, plain shares Wilson's (`estimates.py`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict, cast

from selfsteer.measures.estimates import SHARE, Estimate, known, mean_estimate, mean_of, paired_difference, share_estimate
from selfsteer.records import Pair

Name = Literal["chosen", "rejected"]
"""Of a side of a pair."""


class Orders(NamedTuple):
    """How probable it is that chosen is the better response: 1 or 0 of a judge that only says which."""

    chosen_first: float
    """With the chosen response shown first."""
    chosen_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a judge orders one pair; `by_orders`, `by_margin` and `failure` make it."""

    query_id: str
    preferred: Name | Literal["tie"] | None
    """None is an error."""
    longer: Name | None
    """The response with more characters; None where both have equally many."""
    orders: Orders | None = None
    """Of judges that see both responses at once."""
    mass: float | None = None
    """Probability of an answer within the closed set, averaged over both orders; low where a judge does not understand."""
    margin: float | None = None
    """Of judges that score: the chosen response's score above the rejected one's."""
    error: str | None = None
    """Why there is no verdict; the same for all that failed alike."""

    @property
    def probability(self) -> float | None:
        """That chosen is better, averaged over both orders, which cancels a preference for a position (arXiv 2305.17926)."""
        return None if self.orders is None else sum(self.orders) / 2


def by_orders(pair: Pair, orders: Orders, *, mass: float | None = None) -> Verdict:
    """The response that both orders prefer; a tie where they disagree or one of them prefers neither."""
    preferred: Name | Literal["tie"] = "tie"
    if min(orders) > 0.5:
        preferred = "chosen"
    elif max(orders) < 0.5:
        preferred = "rejected"
    return Verdict(query_id=pair.query_id, preferred=preferred, longer=_longer(pair), orders=orders, mass=mass)


def by_margin(pair: Pair, margin: float) -> Verdict:
    """Chosen above zero, rejected below, a tie at zero; no verdict of a margin that is not finite."""
    if not math.isfinite(margin):
        return failure(pair, "margin is not finite")
    preferred = "chosen" if margin > 0 else "rejected" if margin < 0 else "tie"
    return Verdict(query_id=pair.query_id, preferred=preferred, longer=_longer(pair), margin=margin)


def failure(pair: Pair, reason: str) -> Verdict:
    """No verdict, for this reason."""
    return Verdict(query_id=pair.query_id, preferred=None, longer=_longer(pair), error=reason)


_NO_ANSWER = "no answer"


def no_answer(reason: str | None = None) -> str:
    """The error of a pair that the judge did not answer; unlike others, the next run asks again.

    reason: of a request that failed for itself; without one, the judge has gone.
    """
    return f"{_NO_ANSWER} ({reason})" if reason else _NO_ANSWER


def _longer(pair: Pair) -> Name | None:
    chosen, rejected = len(pair.chosen.text), len(pair.rejected.text)
    return "chosen" if chosen > rejected else "rejected" if rejected > chosen else None


class JudgeReport(TypedDict, total=False):
    """What one judge says about a set of pairs. Keys whose inputs were missing are absent."""

    pairs: int
    errors: dict[str, int]
    """Pairs without a verdict, by reason."""
    judged: Estimate
    """Share of pairs with a verdict."""
    accuracy: Estimate
    """Share of pairs whose chosen response is preferred, a tie counting one half."""
    ties: Estimate
    """Share of ties; of an LLM judge, mostly orders that disagree."""
    flips: Estimate
    """Share of pairs whose verdict turns with the order of the responses."""
    prefers_first: Estimate
    """Share of all answers (two a pair) for the response shown first: one half without position bias."""
    longer_wins: Estimate
    """Share of the decided pairs of unequal length whose longer response is preferred."""
    chosen_longer: Estimate
    """Share of the same pairs whose chosen response is the longer one: what `longer_wins` would be of a perfect judge."""
    probability: Estimate
    """Probability that chosen is better, averaged over both orders and all pairs."""
    averaged_accuracy: Estimate
    """Accuracy by the averaged probability instead of agreement: tells more of a judge with position bias."""
    mass: Estimate
    """Probability of an answer within the closed set."""
    margin: Estimate
    """Score of chosen above that of rejected."""


def judge_report(verdicts: Iterable[Verdict]) -> JudgeReport:
    """Every number that the verdicts allow."""
    every = list(verdicts)
    judged = [verdict for verdict in every if verdict.preferred is not None]
    report = JudgeReport(
        pairs=len(every), errors=dict(Counter(verdict.error for verdict in every if verdict.error is not None))
    )
    decided = [verdict for verdict in judged if verdict.preferred != "tie" and verdict.longer is not None]
    orders = [verdict.orders for verdict in judged if verdict.orders is not None]
    firsts = [order for both in orders for order in (both.chosen_first, 1 - both.chosen_second)]
    probabilities = [verdict.probability for verdict in judged if verdict.probability is not None]
    found: dict[str, Estimate | None] = {
        "judged": share_estimate(len(judged), len(every)),
        "accuracy": mean_estimate([points(verdict) for verdict in judged], within=SHARE),
        "ties": share_estimate(sum(verdict.preferred == "tie" for verdict in judged), len(judged)),
        "flips": share_estimate(sum(min(both) < 0.5 < max(both) for both in orders), len(orders)),
        "prefers_first": mean_estimate([_above_half(value) for value in firsts], within=SHARE),
        "longer_wins": share_estimate(sum(verdict.preferred == verdict.longer for verdict in decided), len(decided)),
        "chosen_longer": share_estimate(sum(verdict.longer == "chosen" for verdict in decided), len(decided)),
        "probability": mean_estimate(probabilities),
        "averaged_accuracy": mean_estimate([_above_half(value) for value in probabilities], within=SHARE),
        "mass": mean_estimate(_present([verdict.mass for verdict in judged])),
        "margin": mean_estimate(_present([verdict.margin for verdict in judged])),
    }
    return cast(JudgeReport, report | known(found))


class JudgedComparison(TypedDict):
    """What one judge says of one set of pairs against another, over the queries of which both have a verdict."""

    difference: Estimate
    """Accuracy of the first set - that of the second."""
    both: dict[str, Estimate]
    """Accuracy of "pairs" and of the "baseline"."""


def judged_comparison(verdicts: Iterable[Verdict], baseline: Iterable[Verdict]) -> JudgedComparison | None:
    """The first verdicts against the others; None when they share no query."""
    sides = {
        name: {verdict.query_id: points(verdict) for verdict in side if verdict.preferred is not None}
        for name, side in (("pairs", verdicts), ("baseline", baseline))
    }
    difference = paired_difference(sides["pairs"], sides["baseline"], shares=True)
    if difference is None:
        return None
    shared = sorted(sides["pairs"].keys() & sides["baseline"].keys())
    both = {name: mean_of([side[query] for query in shared], within=SHARE) for name, side in sides.items()}
    return JudgedComparison(difference=difference, both=both)


def points(verdict: Verdict) -> float:
    """1 for chosen, one half for a tie, 0 for rejected; the pair must have a verdict."""
    return {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}[str(verdict.preferred)]


def _above_half(value: float) -> float:
    return 0.5 if value == 0.5 else float(value > 0.5)


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def unanswered(report: JudgeReport) -> bool:
    """Whether there is anything that the next run should ask again."""
    return any(error.startswith(_NO_ANSWER) for error in report.get("errors", {}))
