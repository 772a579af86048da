"""AlpacaEval 2's length-controlled win rate (arXiv 2404.04475): what the win rate would be at equal lengths.

A logistic regression of the judge's preference q (0: the baseline's answer, 1: the model's), fitted to all answers:

    q = sigmoid(w_length tanh(d) + w_difficulty difficulty + w_model)        d = (len_baseline - len_model) / std

Lengths are characters. The answer is the mean over all instructions of sigmoid(w_difficulty difficulty + w_model), which is
the fitted preference with d set to 0. The published version ("length_controlled_v1") has each instruction's difficulty from
a fit over all models of the leaderboard, and adds the answers of two models that were told to be long or short, at a tenth
of the weight each and without w_model; both are in a file that AlpacaEval publishes (df_gamed.csv). Without that file the
same model is fitted without difficulty ("length_controlled_minimal" there). Both as in the package alpaca_eval 0.6.6: an L1
penalty whose strength is chosen by 5-fold cross-validation, no intercept. That package downloads the file at every call,
wants an API client, and finds an instruction by its place in the list alone, so that a shorter list is silently mistaken
for the first instructions; it is this module's oracle (tests), not its import. Its solver stops early: on made-up verdicts
the two differ by up to 0.04 percentage points, and by nothing that five decimals show once that solver's tolerance is
1e-10.

Left out on purpose: the judge, and reading files of answers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfsteer.data.files import rows_with
from selfsteer.measures.estimates import SHARE, Estimate, mean_of

Floats = NDArray[np.float64]
Formula = Literal["length_controlled_v1", "length_controlled_minimal"]

GAMED_WEIGHT = 0.2
"""Of both gamed models together, against 1 of the model under test."""
FOLDS = 5
STRENGTHS = tuple(float(strength) for strength in np.logspace(-4, 4, 10))
"""Inverse penalties to choose from."""
RESAMPLES = 400
_GAMED_COLUMNS = ("index", "instruction_difficulty", "std_delta_len", "preference", "not_gamed_baseline")


class Judged(NamedTuple):
    """What a judge said of two answers to one instruction."""

    instruction: str
    baseline_length: int
    """In characters."""
    model_length: int
    preference: float | None
    """0: the baseline's answer, 1: the model's, between them what an unsure judge says; None: no verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamed:
    """AlpacaEval's table of difficulties and of the answers of two models that gamed its lengths; `read_gamed` reads it."""

    difficulty: Mapping[int, float]
    """By the instruction's place in the published list."""
    rows: Floats
    """tanh(d), difficulty, 0 of each gamed answer, shape (answers, 3)."""
    preferences: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """A model against the baseline, in shares (not percent)."""

    win_rate: Estimate
    """Mean preference; a tie counts one half."""
    length_controlled: Estimate
    """Its interval is the bootstrap's over instructions, at the chosen strength."""
    published_error: float
    """The standard error that AlpacaEval's leaderboard prints beside the rate: of the fitted preferences' mean. It leaves
    out the uncertainty of the fit itself."""
    wins: int
    baseline_wins: int
    draws: int
    no_verdict: int
    formula: Formula
    weights: Mapping[str, float]


def read_gamed(path: Path) -> Gamed:
    """Read AlpacaEval's df_gamed.csv (data set tatsu-lab/alpaca_eval). ValueError for other columns, or no number in one."""
    difficulty: dict[int, float] = {}
    rows: list[tuple[float, float, float]] = []
    preferences: list[float] = []
    for number, row in enumerate(rows_with(path, *_GAMED_COLUMNS), start=1):
        try:
            index, hardness, length = int(row["index"]), float(row["instruction_difficulty"]), float(row["std_delta_len"])
            preferred = float(row["preference"] or "nan")
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
        difficulty.setdefault(index, hardness)
        if math.isfinite(preferred):
            rows.append((math.tanh(length), hardness, float(row["not_gamed_baseline"].lower() in ("true", "1", "1.0"))))
            preferences.append(preferred)
    return Gamed(difficulty=difficulty, rows=np.array(rows).reshape(-1, 3), preferences=np.array(preferences))


def length_controlled(
    judged: Sequence[Judged], *, gamed: Gamed | None = None, order: Iterable[str] | None = None
) -> WinRate:
    """The win rate and the length-controlled win rate of a model whose answers were all judged against a baseline's.

    gamed: AlpacaEval's table, for the published figure. order: the instructions in their published order, which say where
    each one stands in that table; the order of `judged` when left out.
    Raises ValueError where an instruction is missing, unknown or judged twice, and where fewer than FOLDS have a verdict.
    """
    if gamed is None:
        difficulty = None
    else:
        instructions = [each.instruction for each in judged] if order is None else list(order)
        difficulty = difficulties([each.instruction for each in judged], instructions, gamed)
    said = np.array([math.nan if each.preference is None else each.preference for each in judged])
    with_verdict = np.isfinite(said)
    if with_verdict.sum() < FOLDS:
        raise ValueError(
            f"{int(with_verdict.sum())} of {len(judged)} answers have a verdict; a length-controlled win rate needs {FOLDS}"
        )
    if ((said[with_verdict] < 0) | (said[with_verdict] > 1)).any():
        raise ValueError("a preference is outside 0 to 1 (0: the baseline's answer is better, 1: the model's)")
    every = _Data(_features(judged, difficulty), said, np.ones(len(judged)))
    extra = _Data.of_gamed(gamed, every.features.shape[1])
    train = extra.plus(every.judged())
    strength = _choose(train)
    weights = fit(*train, strength=strength)
    # As published, the mean is over all instructions, those without a verdict among them.
    predicted = _sigmoid(_level(every.features) @ weights)
    interval = _interval(extra, every, strength, weights)
    preferred = said[with_verdict]
    names = ("length", "difficulty", "model") if difficulty is not None else ("length", "model")
    return WinRate(
        win_rate=mean_of(preferred, within=SHARE),
        length_controlled=Estimate(float(predicted.mean()), *interval, len(preferred)),
        published_error=float(predicted.std(ddof=1)) / math.sqrt(len(predicted)),
        wins=int((preferred > 0.5).sum()),
        baseline_wins=int((preferred < 0.5).sum()),
        draws=int((preferred == 0.5).sum()),
        no_verdict=int((~with_verdict).sum()),
        formula="length_controlled_minimal" if gamed is None else "length_controlled_v1",
        weights=dict(zip(names, weights.tolist(), strict=True)),
    )


def difficulties(given: Sequence[str], order: Sequence[str], gamed: Gamed) -> Floats:
    """Of each given instruction. ValueError naming instructions that are missing, unknown or given twice."""
    if sorted(gamed.difficulty) != list(range(len(order))):
        raise ValueError(
            f"the table of difficulties has {len(gamed.difficulty)} instructions, the list has {len(order)}: they belong to"
            " different versions, or answers are missing. Give the published list of instructions with the answers."
        )
    places: dict[str, int] = {}
    twice: set[int] = set()
    for place, instruction in enumerate(order):
        if places.setdefault(instruction, place) != place:
            twice.add(place)
    wanted, found = set(order), set(given)
    for problem, culprits in (("have no answer", wanted - found), ("are not in the published list", found - wanted)):
        if culprits:
            shown = ", ".join(repr(_short(culprit)) for culprit in sorted(culprits)[:3])
            raise ValueError(
                f"{len(culprits)} instructions {problem}, first {shown}. The published figure is over all {len(order)}:"
                " complete the answers; nothing is left out silently."
            )
    if twice or len(given) != len(order):
        # Published lists may repeat an instruction; then only the order can tell them apart.
        if list(given) != list(order):
            raise ValueError(
                f"{len(given)} answers to {len(order)} instructions of which {len(wanted)} differ: an instruction is"
                " answered twice. Give one answer to each, in the published order."
            )
        return np.array([gamed.difficulty[place] for place in range(len(order))])
    return np.array([gamed.difficulty[places[instruction]] for instruction in given])


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _features(judged: Sequence[Judged], difficulty: Floats | None) -> Floats:
    """tanh(d), difficulty where there is one, 1: shape (answers, 3 or 2)."""
    delta = np.array([each.baseline_length - each.model_length for each in judged], dtype=np.float64)
    spread = float(delta.std(ddof=1))
    length = np.tanh(delta / spread) if spread else np.zeros_like(delta)  # of equal lengths nothing can be learnt
    columns = [length, np.ones_like(delta)] if difficulty is None else [length, difficulty, np.ones_like(delta)]
    return np.column_stack(columns)


def _level(features: Floats) -> Floats:
    """The same instructions, answered at equal length."""
    level = features.copy()
    level[:, 0] = 0.0
    return level


# --- the regression --------------------------------------------------------------------------------------------------------


class _Data(NamedTuple):
    features: Floats
    preferences: Floats
    weights: Floats

    @classmethod
    def of_gamed(cls, gamed: Gamed | None, width: int) -> "_Data":
        if gamed is None:
            return cls(np.empty((0, width)), np.empty(0), np.empty(0))
        ours = gamed.rows[:, 2]
        return cls(gamed.rows, gamed.preferences, ours + (1 - ours) * GAMED_WEIGHT / 2)

    def plus(self, other: "_Data") -> "_Data":
        return _Data(*(np.concatenate(both) for both in zip(self, other, strict=True)))

    def judged(self) -> "_Data":
        return self.at(np.isfinite(self.preferences))

    def at(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> "_Data":
        return _Data(self.features[rows], self.preferences[rows], self.weights[rows])


def fit(features: Floats, preferences: Floats, weights: Floats, *, strength: float, start: Floats | None = None) -> Floats:
    """The minimum over w of |w|_1 + strength * sum of weight * log loss of (preference, sigmoid(feature . w)).

    Newton steps, each the exact minimum of the quadratic model with the L1 term, by coordinate descent; halved until the
    loss falls. Few features, so all of it is small.
    """
    at = np.zeros(features.shape[1]) if start is None else start
    loss = _penalised(features, preferences, weights, at, strength)
    for _ in range(200):
        fitted = _sigmoid(features @ at)
        gradient = strength * features.T @ (weights * (fitted - preferences))
        curvature = strength * (features * (weights * fitted * (1 - fitted))[:, None]).T @ features
        step = _quadratic_minimum(gradient, curvature + 1e-12 * np.eye(len(at)), at) - at
        scale, candidate = 1.0, loss
        while scale > 1e-10:
            candidate = _penalised(features, preferences, weights, at + scale * step, strength)
            if candidate < loss:
                break
            scale /= 2
        if candidate >= loss:
            break
        at, loss = at + scale * step, candidate
    return at


def _quadratic_minimum(gradient: Floats, curvature: Floats, start: Floats) -> Floats:
    """The w that minimises |w|_1 + gradient . (w - start) + (w - start)' curvature (w - start) / 2."""
    at = start.copy()
    for _ in range(1000):
        before = at.copy()
        for i in range(len(at)):
            slope = gradient[i] + curvature[i] @ (at - start) - curvature[i, i] * at[i]
            at[i] = -math.copysign(max(abs(slope) - 1.0, 0.0), slope) / curvature[i, i]
        if np.abs(at - before).max() < 1e-12:
            break
    return at


def _penalised(features: Floats, preferences: Floats, weights: Floats, at: Floats, strength: float) -> float:
    return float(np.abs(at).sum()) + strength * float(weights @ _log_loss(preferences, features @ at))


def _log_loss(preferences: Floats, logits: Floats) -> Floats:
    """-q log sigmoid(z) - (1 - q) log sigmoid(-z) = log(1 + e^z) - q z."""
    return np.logaddexp(0.0, logits) - preferences * logits


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -logits))


def _choose(data: _Data) -> float:
    """The strength with the least loss on held-out folds; of equal ones the smallest."""
    # Dealt from the last row to the first, as scikit-learn's GroupKFold deals groups of equal size.
    fold = (len(data.preferences) - 1 - np.arange(len(data.preferences))) % FOLDS
    losses = np.zeros(len(STRENGTHS))
    for number in range(FOLDS):
        train, test = data.at(fold != number), data.at(fold == number)
        for place, strength in enumerate(STRENGTHS):
            weights = fit(*train, strength=strength)
            losses[place] += float(np.mean(test.weights * _log_loss(test.preferences, test.features @ weights)))
    return STRENGTHS[int(np.argmin(losses))]


def _interval(gamed: _Data, data: _Data, strength: float, start: Floats) -> tuple[float, float]:
    """95% of the rate over drawings of the instructions with replacement; the gamed answers stay as they are."""
    rng = np.random.default_rng(0)
    rates = np.empty(RESAMPLES)
    n = len(data.preferences)
    for draw in range(RESAMPLES):
        drawn = data.at(rng.integers(n, size=n))
        weights = fit(*gamed.plus(drawn.judged()), strength=strength, start=start)
        rates[draw] = _sigmoid(_level(drawn.features) @ weights).mean()
    low, high = np.quantile(rates, (0.025, 0.975))
    return float(low), float(high)
