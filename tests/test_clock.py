"""Where the seconds go, on a clock that is set by hand."""

import threading
from collections.abc import Iterator

import pytest

from selfsteer import clock
from selfsteer.clock import Spent, Taken, count, exact, part, since, spent, timed


class Hand:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(clock.time, "perf_counter", hand)
    monkeypatch.setattr(clock, "_clock", clock._Clock())
    return hand


def test_a_part_is_without_those_inside_it(hand: Hand):
    with part("measure"):
        hand.passes(1)
        with part("load"):
            hand.passes(10)
        hand.passes(2)
        with part("score"):
            hand.passes(20)
            with part("load"):
                hand.passes(40)
    hand.passes(1000)
    assert spent() == {"load": Spent(50, 0), "score": Spent(20, 0), "measure": Spent(3, 0)}


def test_the_part_under_way_counts(hand: Hand):
    with part("sample"):
        hand.passes(3)
        assert spent()["sample"].seconds == 3
        hand.passes(1)
    assert spent()["sample"].seconds == 4


def test_an_error_ends_a_part(hand: Hand):
    @part("score")
    @part("load")
    def fails() -> None:
        hand.passes(1)
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    hand.passes(5)
    assert spent() == {"load": Spent(1, 0), "score": Spent(0, 0)}


def test_what_is_done_with_an_item_is_not_of_getting_it(hand: Hand):
    def slowly() -> Iterator[int]:
        for number in range(3):
            hand.passes(2)
            yield number
        hand.passes(1)

    for _ in timed("sample", slowly()):
        hand.passes(100)
    assert spent() == {"sample": Spent(7, 0)}


def test_as_a_decorator_each_call_counts(hand: Hand):
    @part("render")
    def work() -> int:
        hand.passes(2)
        return 7

    assert work() + work() == 14
    assert spent()["render"].seconds == 4


def test_other_threads_have_no_parts(hand: Hand):
    def other() -> None:
        with part("load"):
            hand.passes(5)

    with part("sample"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert spent() == {"sample": Spent(5, 0)}


def test_what_was_spent_since_is_added_to_what_earlier_sessions_spent(hand: Hand):
    with part("score"):
        hand.passes(9)
    count("score", 90)
    before = spent()
    with part("score"):
        hand.passes(1)
    count("score", 10)
    assert since(before, {"score": Spent(2, 20), "load": Spent(3, 0)}) == {"load": Spent(3, 0), "score": Spent(3, 30)}
    assert since(spent(), {}) == {}, "what took nothing is not listed"


def test_exact_waits_at_every_end(hand: Hand):
    """The device works on while Python goes on; its time is of the part that asked for it."""
    asked = [0.0]

    def finish() -> None:
        hand.passes(asked[0])
        asked[0] = 0.0

    with exact(finish):
        with part("forward"):
            asked[0] = 6.0
        with part("backward"):
            asked[0] = 11.0
    assert spent() == {"forward": Spent(6, 0), "backward": Spent(11, 0)}
    with part("backward"):
        asked[0] = 5.0
    assert spent()["backward"].seconds == 11, "only there"


def test_nothing_was_taken_by_default():
    assert Taken() == (0.0, {}, {})
