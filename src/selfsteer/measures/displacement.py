"""How far a training has moved responses that it was about, and such that it was not: estimates, and when to say so.

Left out on purpose: the readings (`training/displacement.py`).
"""

from collections.abc import Mapping, Sequence
from typing import cast

from selfsteer.measures.estimates import Estimate, known, mean_estimate
from selfsteer.measures.metrics import Displacement

DISPLACED = 0.005
"""Nats a token that unrelated responses may lose before a warning says so: about what steering wins in a good case."""


def displacement(moved: Mapping[str, Sequence[tuple[float, int]]]) -> Displacement:
    """The means of a reading (`training.displacement.Moved`) over its responses; a kind without responses is absent."""
    found: dict[str, Estimate | None] = {}
    for name, responses in moved.items():
        found[name] = mean_estimate([nats for nats, _ in responses])
        found[f"{name}_token"] = mean_estimate([nats / tokens for nats, tokens in responses])
    found["lost"] = mean_estimate([-nats for nats, _ in moved["unrelated"]])
    return cast(Displacement, known(found))


def displaced(found: Displacement) -> str | None:
    """The warning, where unrelated responses have lost more than DISPLACED a token, with their whole interval below zero."""
    if "unrelated" not in found or "unrelated_token" not in found:
        return None
    nats, token = found["unrelated"], found["unrelated_token"]
    if token.mean > -DISPLACED or (token.high is not None and token.high >= 0):
        return None
    return f"displaced: unrelated answers lost {-nats.mean:.2g} nats ({-token.mean:.2g} a token; {nats.n:,} measured)"
