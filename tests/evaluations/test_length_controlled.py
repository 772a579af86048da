"""The length-controlled win rate: by hand, against figures of alpaca_eval 0.6.6, and what is refused.

The figures: alpaca_eval.metrics.glm_winrate on these same verdicts, its download replaced by the same table, scikit-learn
1.9.1, with the tolerance of its solver (liblinear) at 1e-10, and as it is (1e-4).
"""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from selfsteer.evaluations.length_controlled import Gamed, Judged, fit, length_controlled, read_gamed

N = 300


def table(folder: Path, *, seed: int) -> Path:
    """A made-up df_gamed.csv: a model that is too short and one that is too long."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=N)
    path = folder / "df_gamed.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "index", "instruction_difficulty", "std_delta_len", "preference", "not_gamed_baseline"])
        for model, middle in (("concise", -1.2), ("verbose", 1.1)):
            delta = rng.normal(middle, 0.5, size=N)
            preference = 1 / (1 + np.exp(np.tanh(delta) - 0.3 * difficulty - rng.normal(size=N)))
            for i in range(N):
                writer.writerow([model, i, difficulty[i], delta[i], preference[i], False])
    return path


def verdicts(gamed: Gamed, *, seed: int, effect: float) -> list[Judged]:
    """Made-up verdicts that depend on length, difficulty and `effect`; one is missing, one is a tie."""
    rng = np.random.default_rng(seed)
    baseline, model = rng.integers(50, 4000, size=N), rng.integers(50, 2500, size=N)
    delta = (baseline - model) / (baseline - model).std(ddof=1)
    difficulty = np.array([gamed.difficulty[i] for i in range(N)])
    logits = effect - 0.9 * np.tanh(delta) + 0.4 * difficulty + rng.normal(0, 1.5, N)
    preferences: list[float | None] = (1 / (1 + np.exp(-3 * logits))).tolist()
    preferences[7], preferences[100] = None, 0.5
    return [
        Judged(f"instruction {i}", int(baseline[i]), int(model[i]), preference) for i, preference in enumerate(preferences)
    ]


@pytest.mark.parametrize(
    ("seed", "effect", "published", "rate", "exact", "error", "as_it_is"),
    [
        (0, -2.0, True, 8.84645, 10.55446, 0.29048, 10.55506),
        (0, -2.0, False, 8.84645, 10.61443, 0.00000, 10.61469),
        (1, 0.0, True, 41.94105, 48.88977, 0.52845, 48.88941),
        (1, 0.0, False, 41.94105, 49.17470, 0.00000, 49.17365),
        (2, 1.0, True, 60.77067, 69.79931, 0.57955, 69.79754),
        (2, 1.0, False, 60.77067, 70.61485, 0.00000, 70.61414),
    ],
)
def test_figures_of_alpaca_eval(seed, effect, published, rate, exact, error, as_it_is, tmp_path: Path):
    gamed = read_gamed(table(tmp_path, seed=seed))
    found = length_controlled(verdicts(gamed, seed=seed, effect=effect), gamed=gamed if published else None)
    assert 100 * found.win_rate.mean == pytest.approx(rate, abs=1e-5)
    assert 100 * found.length_controlled.mean == pytest.approx(exact, abs=1e-4)
    assert 100 * found.published_error == pytest.approx(error, abs=1e-4)
    assert 100 * found.length_controlled.mean == pytest.approx(as_it_is, abs=0.1), "shares agree to 1e-3"
    low, high = found.length_controlled.low, found.length_controlled.high
    assert low is not None
    assert high is not None
    assert low < found.length_controlled.mean < high
    assert found.no_verdict == 1
    assert found.draws == 1


def test_fit_by_hand():
    """One feature that is 1, 4 answers of preference 3/4, strength 1: |w| + sum of log losses is least where
    4 (sigmoid(w) - 3/4) = -1, so sigmoid(w) = 1/2 and w = 0; at strength 2, 8 (sigmoid(w) - 3/4) = -1: w = logit(5/8)."""
    ones = np.ones((4, 1))
    preferences = np.full(4, 0.75)
    assert fit(ones, preferences, np.ones(4), strength=1.0) == pytest.approx([0.0], abs=1e-9)
    assert fit(ones, preferences, np.ones(4), strength=2.0) == pytest.approx([math.log(5 / 3)], abs=1e-9)


def test_equal_lengths_change_nothing():
    """Without a length to control for the rate is the win rate, but for the penalty of one 10,000th."""
    judged = [Judged(str(i), 100, 100, preference) for i, preference in enumerate([1.0, 0.0, 1.0, 1.0] * 25)]
    found = length_controlled(judged)
    assert found.win_rate.mean == 0.75
    assert found.length_controlled.mean == pytest.approx(0.75, abs=1e-3)


def test_a_judge_of_lengths_alone_finds_no_difference():
    """The model is longer in two thirds of the answers, and the longer answer wins by the same: at equal lengths, 1/2."""
    judged = [Judged(str(i), 100, 200 if i % 3 else 50, 0.8 if i % 3 else 0.2) for i in range(90)]
    found = length_controlled(judged)
    assert found.win_rate.mean == pytest.approx(0.6)
    assert found.length_controlled.mean < 0.57


def test_a_missing_instruction_is_named(tmp_path: Path):
    gamed = read_gamed(table(tmp_path, seed=0))
    judged = verdicts(gamed, seed=0, effect=0.0)
    order = [each.instruction for each in judged]
    with pytest.raises(ValueError, match="1 instructions have no answer, first 'instruction 41'"):
        length_controlled(judged[:41] + judged[42:], gamed=gamed, order=order)
    with pytest.raises(ValueError, match="300 instructions, the list has 299"):
        length_controlled(judged[:41] + judged[42:], gamed=gamed)
    with pytest.raises(ValueError, match="not in the published list, first 'other'"):
        length_controlled([*judged, judged[0]._replace(instruction="other")], gamed=gamed, order=order)
    with pytest.raises(ValueError, match="answered twice"):
        length_controlled([*judged, judged[0]], gamed=gamed, order=order)


def test_order_does_not_matter_where_the_list_is_given(tmp_path: Path):
    gamed = read_gamed(table(tmp_path, seed=0))
    judged = verdicts(gamed, seed=0, effect=0.0)
    order = [each.instruction for each in judged]
    turned = length_controlled(judged[::-1], gamed=gamed, order=order)
    assert turned.length_controlled.mean == pytest.approx(
        length_controlled(judged, gamed=gamed).length_controlled.mean, abs=1e-6
    )


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="4 of 6 answers have a verdict"):
        length_controlled([Judged(str(i), 1, 2, 1.0 if i < 4 else None) for i in range(6)])
    with pytest.raises(ValueError, match="outside 0 to 1"):
        length_controlled([Judged(str(i), 1, 2, 2.0) for i in range(6)])
    (tmp_path / "other.csv").write_text("index,difficulty\n0,1\n")
    with pytest.raises(ValueError, match=r"other.csv: line 2 has no \['instruction_difficulty'"):
        read_gamed(tmp_path / "other.csv")
    whole = table(tmp_path, seed=0)
    whole.write_text(whole.read_text().rpartition(",")[0])
    with pytest.raises(ValueError, match=rf"df_gamed.csv: line {2 * N + 1}: 5 fields under a header of 6"):
        read_gamed(whole)
