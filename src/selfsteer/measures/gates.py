"""A round's measures against its gates, and what became of the data since the round before.

A gate whose measure is absent fails: data of unknown quality is not good data. Drift (shrinking margins, growing lengths,
growing refusals) is read from the measures of both rounds alone. Left out on purpose: measuring, refusing, weighing one gate
against another, and pairing by query; rounds may use different queries.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from selfsteer.measures.estimates import Estimate, share_estimate
from selfsteer.measures.metrics import Drift, GateResult, Measures, RoundMetrics, find
from selfsteer.recipe.gates import MEASURES, Gate
from selfsteer.runtime import counted

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


_HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


def evaluate(gates: Sequence[Gate], metrics: RoundMetrics, *, number: int) -> list[GateResult]:
    """Every gate against the measures of round `number`, counted from 1; gates on drift wait for the second round."""
    return [_result(gate, metrics) for gate in gates if number > 1 or not gate.name.startswith("drift_")]


def _result(gate: Gate, metrics: RoundMetrics) -> GateResult:
    value = _value(MEASURES[gate.name].path, metrics)
    reason = _absent(gate, metrics) if value is None else _reason(gate, value)
    return GateResult(gate.name, gate.bound, value, passed=not reason, reason=reason)


def _absent(gate: Gate, metrics: RoundMetrics) -> str:
    """Why there is no value: of a judge, what became of its verdicts."""
    measure = MEASURES[gate.name]
    errors: Mapping[str, int] = find(_node(metrics), f"{measure.path.rpartition('.')[0]}.errors") or {}
    return f"not measured ({measure.description})" + (f"; no verdict: {counted(errors)}" if errors else "")


def _reason(gate: Gate, value: Estimate) -> str:
    """Why the value fails the gate; "" where it passes."""
    for condition in gate.conditions:
        holds = _HOLDS[condition.operator]
        if not holds(value.mean, condition.number):
            return f"is not {condition.operator} {condition.number:g} ({MEASURES[gate.name].description})"
        if condition.whole_interval:
            end = value.low if condition.operator.startswith(">") else value.high
            if end is None:
                return "has no interval: too few rows"
            if not holds(end, condition.number):
                return f"its interval is not {condition.operator} {condition.number:g} throughout"
    return ""


def _node(metrics: RoundMetrics) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", {**metrics, "pairs": made_pairs(metrics)})


def _value(path: str, metrics: RoundMetrics) -> Estimate | None:
    node = _node(metrics)
    count, slash, total = path.partition(" / ")
    found, of = find(node, count), find(node, total)
    if slash:
        return None if found is None or of is None else share_estimate(found, of)
    if found is None or isinstance(found, Estimate):
        return found
    return Estimate(float(found), None, None, find(node, "pairs.pairs") or 0)
