"""What became of the data from one round to the next: shrinking margins, growing lengths, growing refusals.

Read from the measures of both rounds alone. Left out on purpose: pairing by query; rounds may use different queries.
"""

import math
from collections.abc import Mapping
from typing import cast

from selfsteer.cells import find
from selfsteer.estimates import Estimate
from selfsteer.metrics import Drift, Measures, RoundMetrics

_PATHS: Mapping[str, str] = {
    "margin": "margin.per_token",
    "on_policy": "on_policy.all",
    "length_chosen": "length.chosen",
    "length_rejected": "length.rejected",
    "refusals_chosen": "refusals.chosen",
    "refusals_rejected": "refusals.rejected",
    "repetition_chosen": "variety.chosen.repetition",
    "accuracy": "judge.accuracy",
    "principle_consistency": "principle_consistency.accuracy",
}
"""Where in `Measures` each key of `Drift` is taken from."""


def drift(previous: RoundMetrics, current: RoundMetrics) -> Drift:
    """Current - previous for the pairs of stage 5, before any selection; a key that either round lacks is absent."""
    before, after = made_pairs(previous), made_pairs(current)
    found = Drift()
    same_unit = before.get("length", {}).get("unit") == after.get("length", {}).get("unit")
    for key, path in _PATHS.items():
        first: Estimate | None = find(before, path)
        second: Estimate | None = find(after, path)
        if first is not None and second is not None and (same_unit or not path.startswith("length")):
            cast("dict[str, Estimate]", found)[key] = difference(second, first)
    return found


def made_pairs(this: RoundMetrics) -> Measures:
    """The measures of a round's preference data, before any selection; empty where none were taken."""
    return this.get("alignment") or this.get("pbaa") or Measures()


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b with an interval made of both intervals (MOVER; R. Newcombe, 1998, method 10).

    Made for independent samples. Rounds that answer the same queries are positively correlated: then it is too wide.
    n is that of the smaller sample.
    """
    mean, n = a.mean - b.mean, min(a.n, b.n)
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(mean, None, None, n)
    down = math.hypot(a.mean - a.low, b.high - b.mean)
    up = math.hypot(a.high - a.mean, b.mean - b.low)
    return Estimate(mean, mean - down, mean + up, n)
