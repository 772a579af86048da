"""The gates of a recipe: which measures can be bounded, and what a bound may say.

Pure: names, spans and syntax. Holding a round's measures against them is in `measures/gates.py`.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

_CONDITION = re.compile(r"(>=|>|<=|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(\s+at\s+95\s*%)?")

_SYNTAX = 'expected an operator and a number, such as ">= 0.6", ">= 0.6 at 95%" (its whole interval) or ">= 0.8, <= 1.25"'


class Span(NamedTuple):
    """The values that a measure can have."""

    low: float
    high: float


_SHARE, _DIFFERENCE, _SIZE, _ANY = Span(0, 1), Span(-1, 1), Span(0, math.inf), Span(-math.inf, math.inf)


class Gateable(NamedTuple):
    """A measure that a gate can be set on."""

    path: str
    """Below `RoundMetrics`; "pairs" is the pairs that align the policy. "a / b" is a share of two counts."""
    span: Span
    description: str
    interval: bool = True
    """Whether it comes with an interval."""


MEASURES: Mapping[str, Gateable] = {
    "on_policy_chosen": Gateable("pairs.on_policy.chosen", _SHARE, "on-policy probability of the chosen responses"),
    "on_policy_rejected": Gateable("pairs.on_policy.rejected", _SHARE, "on-policy probability of the rejected responses"),
    "on_policy_all": Gateable("pairs.on_policy.all", _SHARE, "on-policy probability of chosen and rejected alike"),
    "on_policy_gain": Gateable("comparison.all", _DIFFERENCE, "on-policy probability above that of PBAA, query by query"),
    "headroom": Gateable("headroom.all", _DIFFERENCE, "on-policy probability of y_o above the mean of y+ and y-"),
    "headroom_chosen": Gateable("headroom.chosen", _DIFFERENCE, "on-policy probability of y_o above that of y+"),
    "headroom_rejected": Gateable("headroom.rejected", _DIFFERENCE, "on-policy probability of y_o above that of y-"),
    "accuracy": Gateable("pairs.judge.accuracy", _SHARE, "share of pairs whose order the judge confirms"),
    "judged": Gateable("pairs.judge.judged", _SHARE, "share of pairs on which the judge gave a verdict"),
    "ties": Gateable("pairs.judge.ties", _SHARE, "share of pairs that the judge calls a tie"),
    "flips": Gateable("pairs.judge.flips", _SHARE, "share of pairs on which the judge's two orders disagree"),
    "longer_wins": Gateable("pairs.judge.longer_wins", _SHARE, "share of decided pairs in which the longer response wins"),
    "passes_chosen": Gateable("pairs.checks.chosen", _SHARE, "share of chosen that pass the checks of their principle"),
    "passes_rejected": Gateable("pairs.checks.rejected", _SHARE, "share of rejected that pass them"),
    "check_wins": Gateable("pairs.checks.win", _SHARE, "share of pairs whose chosen response passes and rejected does not"),
    "principle_consistency": Gateable(
        "pairs.principle_consistency.accuracy", _SHARE, "share of pairs that their principles rank in this order"
    ),
    "margin": Gateable("pairs.margin.sum", _ANY, "log-probability of chosen - rejected, in nats"),
    "margin_per_token": Gateable("pairs.margin.per_token", _ANY, "the same of the means per token"),
    "chosen_above": Gateable("pairs.margin.chosen_above", _SHARE, "share of pairs whose chosen response is more probable"),
    "length_correlation": Gateable("pairs.margin.length_correlation", _DIFFERENCE, "Pearson, margin and length", False),
    "length_ratio": Gateable("pairs.length.ratio", _SIZE, "mean length of chosen / mean length of rejected", False),
    "length_chosen": Gateable("pairs.length.chosen", _SIZE, "mean length of the chosen responses"),
    "length_rejected": Gateable("pairs.length.rejected", _SIZE, "mean length of the rejected responses"),
    "chosen_longer": Gateable("pairs.length.chosen_longer", _SHARE, "share of pairs whose chosen response is longer"),
    "distinct_chosen": Gateable("pairs.variety.chosen.distinct_2", _SHARE, "distinct-2 of the chosen", False),
    "distinct_rejected": Gateable("pairs.variety.rejected.distinct_2", _SHARE, "distinct-2 of the rejected", False),
    "repetition_chosen": Gateable("pairs.variety.chosen.repetition", _SHARE, "3-grams said before, in chosen"),
    "repetition_rejected": Gateable("pairs.variety.rejected.repetition", _SHARE, "3-grams said before, in rejected"),
    "overlap": Gateable("pairs.overlap", _SHARE, "3-grams that chosen and rejected share"),
    "near_identical": Gateable("pairs.near_identical", _SHARE, "share of pairs whose responses hardly differ"),
    "repeated": Gateable("pairs.repeated_pairs / pairs.pairs", _SHARE, "share of pairs said before, word for word"),
    "near_repeated_chosen": Gateable("pairs.near_repeated.chosen", _SHARE, "share of chosen said before, nearly"),
    "near_repeated_rejected": Gateable("pairs.near_repeated.rejected", _SHARE, "share of rejected said before, nearly"),
    "truncated_chosen": Gateable("pairs.truncated.chosen", _SHARE, "share of chosen cut off"),
    "truncated_rejected": Gateable("pairs.truncated.rejected", _SHARE, "share of rejected cut off"),
    "refusals_chosen": Gateable("pairs.refusals.chosen", _SHARE, "share of chosen that decline to answer"),
    "refusals_rejected": Gateable("pairs.refusals.rejected", _SHARE, "share of rejected that decline to answer"),
    "leakage_chosen": Gateable("pairs.leakage.chosen", _SHARE, "share of chosen that speak of a principle"),
    "leakage_rejected": Gateable("pairs.leakage.rejected", _SHARE, "share of rejected that speak of a principle"),
    "language_mismatch_chosen": Gateable("pairs.language_mismatch.chosen", _SHARE, "share of chosen in another script"),
    "language_mismatch_rejected": Gateable("pairs.language_mismatch.rejected", _SHARE, "share of rejected, likewise"),
    "kept_share": Gateable(
        "stages.5-preferences.kept / stages.5-preferences.wanted", _SHARE, "share of pairs that the filters kept"
    ),
    "displacement": Gateable(
        "generator.displacement.lost", _ANY, "nats that unrelated answers lost in the generator's training"
    ),
    "displacement_bad": Gateable("bad_generator.displacement.lost", _ANY, "the same of the generator of rejected (dual)"),
    "gain": Gateable("gain.gain", _ANY, "nats a token by which the generator's next tokens are more on-policy"),
    "gain_steering": Gateable("gain.steering", _ANY, "what of it comes from the principles"),
    "gain_following": Gateable("gain.following", _ANY, "change of how much more they belong to their own principle"),
    "gain_entropy": Gateable("gain.entropy", _ANY, "change of the entropy of what the generator samples from"),
    "contamination": Gateable("contamination.share", _SHARE, "share of queries that overlap with an evaluation file"),
    "drift_margin": Gateable("drift.margin", _ANY, "change of the margin per token since the round before"),
    "drift_on_policy": Gateable("drift.on_policy", _DIFFERENCE, "change of the on-policy probability"),
    "drift_length_chosen": Gateable("drift.length_chosen", _ANY, "change of the chosen length"),
    "drift_length_rejected": Gateable("drift.length_rejected", _ANY, "change of the rejected length"),
    "drift_refusals_chosen": Gateable("drift.refusals_chosen", _DIFFERENCE, "change of the share of chosen refusals"),
    "drift_refusals_rejected": Gateable("drift.refusals_rejected", _DIFFERENCE, "change of the share of rejected refusals"),
    "drift_repetition_chosen": Gateable("drift.repetition_chosen", _DIFFERENCE, "change of the repetition in chosen"),
    "drift_accuracy": Gateable("drift.accuracy", _DIFFERENCE, "change of the judge's accuracy"),
    "drift_principle_consistency": Gateable(
        "drift.principle_consistency", _DIFFERENCE, "change of the principle consistency"
    ),
}
"""Every name that a gate may have. NAME without _chosen or _rejected, where both are here, bounds both."""


class Condition(NamedTuple):
    """One comparison of a bound."""

    operator: str
    number: float
    whole_interval: bool
    """The 95% interval must satisfy it up to its far end, not the mean alone."""


class Gate(NamedTuple):
    """A bound on one measure."""

    name: str
    bound: str
    """As the recipe says it."""
    conditions: tuple[Condition, ...]


def before_generator(gate: Gate) -> bool:
    """Whether it is held before the generator is trained."""
    return source_of(gate.name).startswith("headroom")


def parse(bounds: Mapping[str, str]) -> tuple[Gate, ...]:
    """The gates of a recipe, name -> bound. ValueError, naming every mistake, for unknown names and unreadable bounds."""
    mistakes: list[str] = []
    gates: list[Gate] = []
    for given, bound in bounds.items():
        names = _names(given)
        if not names:
            mistakes.append(_unknown(given))
            continue
        conditions = tuple(_conditions(bound))
        mistake = _mistake(names[0], bound, conditions)
        if mistake is None:
            gates += (Gate(name, bound, conditions) for name in names)
        else:
            mistakes.append(f"gate {given}: {mistake}")
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return tuple(gates)


def unmeasured(bounds: Mapping[str, str], missing: Mapping[str, str]) -> list[str]:
    """A complaint for each readable gate on a measure that will not be taken.

    missing: the beginnings of the paths of such measures, with what they need.
    """
    return [
        f"gate {gate.name}: needs {need}"
        for gate in parse(bounds)
        for path, need in missing.items()
        if source_of(gate.name).startswith(path)
    ]


def source_of(name: str) -> str:
    """The path of what is measured; of drift, that of the measure which drifts."""
    path = MEASURES[name].path
    drifting = MEASURES.get(name.removeprefix("drift_"))
    return drifting.path if drifting is not None and path.startswith("drift.") else path


def _names(given: str) -> tuple[str, ...]:
    if given in MEASURES:
        return (given,)
    sides = tuple(f"{given}_{side}" for side in ("chosen", "rejected"))
    return sides if all(name in MEASURES for name in sides) else ()


def _unknown(given: str) -> str:
    both = {name.removesuffix("_rejected") for name in MEASURES if name.endswith("_rejected")}
    near = difflib.get_close_matches(given, [*MEASURES, *sorted(both)], n=1)
    suggestion = f"did you mean {near[0]}? " if near else ""
    return f"there is no gate {given!r}; {suggestion}Gates: {', '.join(MEASURES)}"


def _conditions(bound: str) -> Iterator[Condition]:
    """The conditions between commas; none at all where one of them is unreadable."""
    matches = [_CONDITION.fullmatch(part.strip()) for part in bound.split(",")]
    if None not in matches:
        for match in cast("list[re.Match[str]]", matches):
            yield Condition(match[1], float(match[2]), match[3] is not None)


def _mistake(name: str, bound: str, conditions: Sequence[Condition]) -> str | None:
    low, high = MEASURES[name].span
    if not conditions:
        return f"given {bound!r}, {_SYNTAX}"
    for condition in conditions:
        # A bound that every value keeps, or none, is a slip such as 60 for 60%.
        if not low <= condition.number <= high:
            return f"given {bound!r}, but {name} lies between {low:g} and {high:g}"
        if condition.whole_interval and not MEASURES[name].interval:
            return f"given {bound!r}, but {name} has no interval; leave out 'at 95%'"
    return None
