"""The time that a run has left, by hand."""

import pytest

from selfsteer.stages.costs import Tokens
from selfsteer.stages.remaining import seconds_for
from selfsteer.store.folder import Manifest

PLANNED = {
    "2-responses": Tokens(1000, 0, 0),
    "3-steering": Tokens(0, 4000, 0),
    "4-generator": Tokens(0, 500, 1200),
    "5-preferences": Tokens(800, 2000, 0),
}


def done(seconds: float, **parts: float) -> Manifest:
    return Manifest(
        stage="",
        schema_version=1,
        fingerprint="",
        wanted=1,
        kept=1,
        settings={},
        inputs={},
        outputs={},
        seconds=seconds,
        parts={name: [spent, 0.0] for name, spent in parts.items()},
        created="",
    )


SAMPLED = done(10, sample=10)  # 100 tokens a second
SCORED = done(20, score=20)  # 200 tokens a second


def test_what_is_ahead_takes_as_long_as_the_same_took_before():
    ahead = [PLANNED["5-preferences"]]
    sealed = {"2-responses": SAMPLED, "3-steering": SCORED}
    assert seconds_for(ahead, PLANNED, sealed) == pytest.approx(800 / 100 + 2000 / 200)


def test_before_anything_is_trained_a_step_takes_three_forward_passes():
    sealed = {"2-responses": SAMPLED, "3-steering": SCORED}
    assert seconds_for([PLANNED["4-generator"]], PLANNED, sealed) == pytest.approx(500 / 200 + 1200 * 3 / 200)


def test_afterwards_as_long_as_it_took():
    trained = done(60, score=10, forward=10, backward=38, optimizer=2)
    sealed = {"2-responses": SAMPLED, "3-steering": SCORED, "4-generator": trained}
    assert seconds_for([Tokens(0, 0, 600)], PLANNED, sealed) == pytest.approx(25)


def test_work_beside_the_model_keeps_its_share():
    """Of 15 seconds 10 were sampling: what is ahead takes half as long again."""
    sealed = {"2-responses": done(15, sample=10), "3-steering": done(30, score=20)}
    assert seconds_for([Tokens(100, 200, 0)], PLANNED, sealed) == pytest.approx(1.5 * 2)


@pytest.mark.parametrize("sealed", [{}, {"2-responses": SAMPLED}, {"2-responses": done(3), "3-steering": SCORED}])
def test_nothing_is_said_before_something_was_sampled_and_scored(sealed: dict[str, Manifest]):
    assert seconds_for([PLANNED["4-generator"]], PLANNED, sealed) is None
