from dataclasses import replace

import pytest

from selfsteer.measures.verdicts import Orders, by_margin, by_orders, failure
from selfsteer.recipe.sections import Selection
from selfsteer.records import Message, Pair, Principles, Side, side
from selfsteer.stages.selection import (
    Picked,
    Ranked,
    Sample,
    best_and_near_worst,
    is_near,
    prefer_shorter,
    reject_reason,
    top_share,
)

LONG, SHORT = side("a longer answer", "length"), side("short")


def pair(chosen: Side = LONG, rejected: Side = SHORT) -> Pair:
    prompt = (Message(role="user", content="Why?"),)
    return Pair(query_id="q", kind="alignment", prompt=prompt, chosen=chosen, rejected=rejected, principles=PRINCIPLES)


PRINCIPLES = Principles(good="Be thorough.", bad="Be curt.", quality="detail", source="library")


def test_pairs_that_the_judge_reverses_are_dropped_with_the_reason():
    """Both orders for rejected: reversed. Orders that disagree are a tie, and an error is no verdict: both are kept."""
    verdicts = [
        by_orders(pair(), Orders(0.9, 0.8)),
        by_orders(pair(), Orders(0.2, 0.1)),
        by_orders(pair(), Orders(0.9, 0.1)),
        failure(pair(), "unreadable"),
    ]
    reasons = [reject_reason(Ranked(pair(), verdict), Selection(drop_reversed=True), None) for verdict in verdicts]
    assert reasons == [None, "order reversed", None, None]


def test_why_a_pair_is_not_selected():
    """An LLM's probabilities 0.2 and 0.1 make a margin of 2 * 0.15 - 1 = -0.7; within 0.7, the lengths decide instead."""
    ranked = Ranked(pair(), by_orders(pair(), Orders(0.2, 0.1)))
    assert ranked.margin == pytest.approx(-0.7)
    assert reject_reason(ranked, Selection(drop_reversed=True), None) == "order reversed"
    assert reject_reason(ranked, Selection(), None) is None
    assert reject_reason(ranked, Selection(drop_reversed=True, shorter_within=0.71), None) is None
    assert is_near(ranked, Selection(shorter_within=0.71))
    assert not is_near(ranked, Selection(shorter_within=0.69))
    assert reject_reason(ranked, Selection(min_margin=-0.8), -0.8) is None
    assert reject_reason(ranked, Selection(min_margin=0.0), 0.0) == "small margin"
    unjudged = Ranked(pair(), failure(pair(), "unreadable"))
    assert reject_reason(unjudged, Selection(drop_reversed=True), None) is None
    assert reject_reason(unjudged, Selection(min_margin=0.0), 0.0) == "no verdict"


def test_pairs_are_kept_by_margin():
    """The top half of 4, 1, 3, 2 begins at 3."""
    margins = [4.0, 1.0, 3.0, 2.0]
    bound = top_share(margins, 0.5)
    assert bound == 3.0
    ranked = [Ranked(pair(), by_margin(pair(), margin)) for margin in margins]
    reasons = [reject_reason(each, Selection(top_share=0.5), bound) for each in ranked]
    assert reasons == [None, "small margin", None, "small margin"]


@pytest.mark.parametrize(("share", "n", "kept"), [(0.1, 30, 3), (0.1, 31, 4), (1.0, 7, 7), (0.01, 5, 1)])
def test_top_share_rounds_up(share: float, n: int, kept: int):
    margins = [float(number) for number in range(n)]
    assert sum(margin >= top_share(margins, share) for margin in margins) == kept


@pytest.mark.parametrize(("margins", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.5)])
def test_impossible_shares_are_refused(margins: list[float], share: float):
    with pytest.raises(ValueError, match="share"):
        top_share(margins, share)


def test_turning_exchanges_the_responses_and_nothing_else():
    made = pair(replace(LONG, logps=-1.0, tokens=9, seed=7), replace(SHORT, logps=-2.0, tokens=3, seed=8))
    assert made.turned() == pair(made.rejected, made.chosen)
    assert made.turned().turned() == made


def test_the_shorter_of_near_equal_responses_is_chosen():
    assert prefer_shorter(pair()).chosen == SHORT
    in_tokens = pair(replace(LONG, tokens=2), replace(SHORT, tokens=5))
    assert prefer_shorter(in_tokens) == in_tokens


def samples(*scores: float) -> list[Sample]:
    return [Sample(score, 10) for score in scores]


def test_of_few_bad_samples_the_worst_is_rejected():
    """Bad scores 1, 4, 2: mean 2.33, deviation 1.25, so 2.33 - 2 * 1.25 = -0.16 lies below all."""
    assert best_and_near_worst(samples(3.0, 5.0), samples(4.0, 1.0, 2.0)) == Picked(chosen=1, rejected=1)


def test_of_many_bad_samples_the_near_worst_is_rejected():
    """A wreck of -10 and 49 of 0 or 1: mean 0.28, deviation 1.55, target -2.81; nearer to 0 than to -10."""
    scores = [-10.0, *(number % 2 for number in range(49))]
    picked = best_and_near_worst(samples(2.0), samples(*scores))
    assert picked is not None
    assert picked.chosen == 0
    assert scores[picked.rejected] == 0.0
    assert best_and_near_worst(samples(2.0), samples(*scores), deviations=5.0) == Picked(0, 0)


def test_the_shortest_of_the_near_best_is_chosen_and_nothing_near_it_rejected():
    good = [Sample(1.0, 50), Sample(0.95, 20), Sample(0.5, 5)]
    assert best_and_near_worst(good, samples(0.95, 0.5), within=0.1) == Picked(chosen=1, rejected=1)
    assert best_and_near_worst(good, samples(0.95), within=0.1) is None
    assert best_and_near_worst(good, samples(1.0, 1.5)) is None
    assert best_and_near_worst([], []) is None
