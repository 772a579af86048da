"""Intervals over queries and training seeds: by hand, against tables, and by simulation."""

import math

import numpy as np
import pytest

from selfsteer.measures.estimates import SHARE, crossed_estimate, mean_estimate, paired_difference, share_estimate

Z = 1.959964
"""The 97.5% quantile of the normal distribution."""

T = {1: 12.706, 2: 4.303, 10: 2.228, 30: 2.042}
"""97.5% quantiles of Student's t, from any table."""


def table(values: list[list[float]]) -> list[dict[str, float]]:
    return [{str(query): value for query, value in enumerate(of_seed)} for of_seed in values]


def test_seeds_alone_differ():
    """Seeds at 1, 2 and 3, queries alike: MS of seeds is 4 times the variance 1, so 2 +- t(2) * sqrt(4 / 12)."""
    found = crossed_estimate(table([[1.0] * 4, [2.0] * 4, [3.0] * 4]))
    assert found is not None
    assert (found.mean, found.n) == (2.0, 4)
    assert found.high == pytest.approx(2 + T[2] * math.sqrt(4 / 12), abs=1e-3)


def test_queries_alone_differ():
    """As of one seed: the variance of 11 values over 11, with t(10)."""
    values = [float(number) for number in range(11)]
    found = crossed_estimate(table([values, values]))
    assert found is not None
    assert found.mean == 5
    assert found.high == pytest.approx(5 + T[10] * math.sqrt(np.var(values, ddof=1) / 11), abs=1e-3)


def test_both_differ():
    """Seed effects -1 and 1, query effects -3, 0 and 3, no rest: MS 6 and 18, variance (6 + 18) / 6, freedom 576 / 198."""
    found = crossed_estimate(table([[-4.0, -1.0, 2.0], [-2.0, 1.0, 4.0]]))
    assert found is not None
    assert found.mean == 0
    freedom = 24**2 / (6**2 / 1 + 18**2 / 2)
    assert found.high is not None
    assert T[10] < found.high / math.sqrt(24 / 6) < T[2], f"t of {freedom:.2f}"
    assert found.high / 2 == pytest.approx(3.24, abs=0.03)


def test_of_one_seed_it_is_the_interval_over_queries():
    values = [0.1, 0.4, 0.2, 0.9]
    assert crossed_estimate(table([values])) == mean_estimate(values)


def test_only_queries_that_all_seeds_have():
    found = crossed_estimate([{"a": 1.0, "b": 3.0, "c": 100.0}, {"b": 5.0, "a": 3.0}])
    assert found is not None
    assert (found.mean, found.n) == (3.0, 2)
    assert crossed_estimate([{"a": 1.0}, {"b": 1.0}]) is None
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        crossed_estimate([{"a": 1.0, "b": math.nan}, {"a": 1.0, "b": 1.0}])


def test_it_covers_what_it_says():
    """500 made-up experiments of 3 seeds and 30 queries, both with an effect: about 95% of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        values = rng.normal(size=(3, 1)) * 0.3 + rng.normal(size=(1, 30)) + rng.normal(size=(3, 30))
        found = crossed_estimate(table(values.tolist()))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert 0.93 <= hits / 500 <= 0.99


@pytest.mark.parametrize(("value", "low", "high"), [(1.0, 24 / (24 + Z**2), 1.0), (0.0, 0.0, Z**2 / (24 + Z**2))])
def test_values_that_are_all_the_same_leave_room_for_others_as_shares_do(value: float, low: float, high: float):
    """Wilson's interval of 24 of 24, or of none: the bootstrap, which only draws what is there, would say [1, 1]."""
    found = mean_estimate([value] * 24, within=SHARE)
    assert found == pytest.approx((value, low, high, 24))
    assert found == pytest.approx(share_estimate(int(24 * value), 24))
    assert mean_estimate([value] * 24) == (value, value, value, 24), "nothing is known of what has no bounds"


def test_so_do_differences_of_shares():
    """Each of 24 queries is won: as many as z^2 / (24 + z^2) others may go to the other side."""
    won, lost = {str(n): 1.0 for n in range(24)}, {str(n): 0.0 for n in range(24)}
    others = Z**2 / (24 + Z**2)
    assert paired_difference(won, lost, shares=True) == pytest.approx((1.0, 1 - 2 * others, 1.0, 24))
    assert paired_difference(won, won, shares=True) == pytest.approx((0.0, -others, others, 24))
    assert paired_difference(won, {**lost, "0": 1.0}, shares=True) == paired_difference(won, {**lost, "0": 1.0})
