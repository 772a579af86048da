"""What there is to win: the policy's own answer y_o beside the steered ones, y+ and y-, before any generator is trained.

L- pulls the bad response towards y_o because y_o is on-policy (arXiv 2410.17131, equation 2). Where the steered responses
are as probable as y_o already, there is nothing to pull, and a gain in on-policy probability could only be sharpening. A y_o
that is drawn at a lower temperature than y+ and y- is more probable for that alone.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from selfsteer.measures.estimates import distribution, mean_of
from selfsteer.measures.metrics import Headroom, HeadroomAt
from selfsteer.records import Scored

EDGES = (8, 32, 128, 512)
"""Ranges of token positions end here: 1 to 8, 9 to 32, ... and what is behind the last."""

Prefixes = Sequence[Scored]
"""A response scored up to each of EDGES that it goes beyond, and as a whole."""


class Answers(NamedTuple):
    """The three responses to a query, scored given the bare query."""

    original: Prefixes
    good: Prefixes
    bad: Prefixes


class _Probabilities(NamedTuple):
    """exp(mean log pi(token)) of the three, or of a part of them."""

    original: float
    good: float
    bad: float


def headroom(queries: Sequence[Answers]) -> Headroom | None:
    """Over all queries, as a whole and by position; None of no query."""
    if not queries:
        return None
    whole = [_Probabilities(*(math.exp(prefixes[-1].mean_logps) for prefixes in query)) for query in queries]
    return Headroom(
        queries=len(queries),
        original=mean_of([each.original for each in whole]),
        good=mean_of([each.good for each in whole]),
        bad=mean_of([each.bad for each in whole]),
        chosen=mean_of([each.original - each.good for each in whole]),
        rejected=mean_of([each.original - each.bad for each in whole]),
        all=mean_of([_above(each) for each in whole]),
        positions=[found for number in range(len(EDGES) + 1) if (found := _at(queries, number)) is not None],
        distribution=distribution(original=[query.original[-1].mean_logps for query in queries]),
    )


def _at(queries: Sequence[Answers], number: int) -> HeadroomAt | None:
    parts = [
        _Probabilities(*(_part(prefixes, number) for prefixes in query))
        for query in queries
        if all(len(prefixes) > number for prefixes in query)
    ]
    if not parts:
        return None
    return HeadroomAt(
        first=1 if number == 0 else EDGES[number - 1] + 1,
        last=EDGES[number] if number < len(EDGES) else None,
        original=mean_of([each.original for each in parts]),
        good=mean_of([each.good for each in parts]),
        bad=mean_of([each.bad for each in parts]),
        all=mean_of([_above(each) for each in parts]),
    )


def _part(prefixes: Prefixes, number: int) -> float:
    """On-policy probability of the tokens that this prefix has and the one before has not."""
    end, start = prefixes[number], prefixes[number - 1] if number else Scored(0.0, 0)
    return math.exp((end.logps - start.logps) / (end.tokens - start.tokens))


def _above(each: _Probabilities) -> float:
    return each.original - (each.good + each.bad) / 2


def in_words(found: Headroom) -> str:
    """How much there is to win, in a sentence."""
    probabilities = f"y_o {found['original'].mean:.3f}, y+ {found['good'].mean:.3f}, y- {found['bad'].mean:.3f}"
    mean, low, high, n = found["all"]
    if low is None or high is None:
        return f"On-policy probability {probabilities}: {n} query is too few to say what there is to win."
    interval = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] for y_o against the mean of y+ and y-"
    if low > 0:
        said = f"there is {mean:.3f} to win at most, if steering cost the pairs nothing"
    elif high < 0:
        said = "there is nothing to win: the steered responses are more on-policy than the policy's own answer"
    else:
        said = "there is nothing to win that these queries could show, the interval includes zero"
    return f"On-policy probability {probabilities} ({interval}): {said}."
