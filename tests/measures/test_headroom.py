"""What there is to win, by hand."""

import math

import pytest

from selfsteer.measures.estimates import Estimate
from selfsteer.measures.headroom import Answers, headroom, in_words
from selfsteer.measures.metrics import Headroom
from selfsteer.records import Scored


def short(logps: float) -> list[Scored]:
    """A response of four tokens."""
    return [Scored(logps, 4)]


def test_headroom_by_hand():
    """Two queries: exp(-4 / 4) = e^-1 for y_o, e^-2 for y+ and e^-3 for y-; then all three alike."""
    queries = [Answers(short(-4), short(-8), short(-12)), Answers(short(-4), short(-4), short(-4))]
    found = headroom(queries)
    assert found is not None
    first, second, third = (math.exp(-n) for n in (1, 2, 3))
    assert found["queries"] == 2
    assert found["original"].mean == pytest.approx(first)
    assert found["good"].mean == pytest.approx((second + first) / 2)
    assert found["bad"].mean == pytest.approx((third + first) / 2)
    assert found["chosen"].mean == pytest.approx((first - second) / 2)
    assert found["rejected"].mean == pytest.approx((first - third) / 2)
    assert found["all"].mean == pytest.approx((first - (second + third) / 2) / 2)
    assert found["distribution"]["counts"] == {"original": [0, 2, 0]}, "both at -1, in the middle"
    (only,) = found["positions"]
    assert (only["first"], only["last"]) == (1, 8)
    assert only["all"] == found["all"], "no response goes beyond the first range"


def test_by_position_only_what_all_three_responses_reach():
    """y_o: -8 over 8 tokens, then -4 over 2: e^-1 and e^-2; y+ e^-1 and e^-3; y- e^-1, in one of the queries alone e^-1."""
    original, good = [Scored(-8, 8), Scored(-12, 10)], [Scored(-8, 8), Scored(-14, 10)]
    queries = [Answers(original, good, [Scored(-8, 8), Scored(-10, 10)]), Answers(original, good, [Scored(-8, 8)])]
    found = headroom(queries)
    assert found is not None
    start, rest = found["positions"]
    assert (start["first"], start["last"], start["all"].n) == (1, 8, 2)
    assert start["all"].mean == pytest.approx(0)
    assert (rest["first"], rest["last"], rest["all"].n) == (9, 32, 1)
    assert rest["original"].mean == pytest.approx(math.exp(-2))
    assert rest["good"].mean == pytest.approx(math.exp(-3))
    assert rest["bad"].mean == pytest.approx(math.exp(-1))
    assert headroom([]) is None


def measured(low: float | None, high: float | None, n: int = 40) -> Headroom:
    mean = 0.018 if low is None or high is None else (low + high) / 2
    each = Estimate(0.4, 0.3, 0.5, n)
    both = Estimate(mean, low, high, n)
    return Headroom(queries=n, original=each, good=each, bad=each, chosen=both, rejected=both, all=both, positions=[])


@pytest.mark.parametrize(
    ("low", "high", "n", "expected"),
    [
        (0.01, 0.03, 40, "(+0.020 [+0.010, +0.030] for y_o against the mean of y+ and y-): there is 0.020 to win at most"),
        (-0.01, 0.03, 40, "nothing to win that these queries could show, the interval includes zero"),
        (0.0, 0.03, 40, "includes zero"),
        (-0.03, -0.01, 40, "nothing to win: the steered responses are more on-policy"),
        (None, None, 1, "1 query is too few"),
    ],
)
def test_in_words(low: float | None, high: float | None, n: int, expected: str):
    text = in_words(measured(low, high, n))
    assert "y_o 0.400, y+ 0.400, y- 0.400" in text
    assert expected in text
