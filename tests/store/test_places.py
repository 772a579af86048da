"""The index of a journal against a dictionary."""

import random

import pytest

from selfsteer.store import journal
from selfsteer.store.journal import Places


def test_like_a_dictionary_that_keeps_the_first(monkeypatch: pytest.MonkeyPatch):
    """Slots that begin alike and end in zero bytes among them, settled after every eighth or so; many are added twice."""
    monkeypatch.setattr(journal, "_RECENT", 7)
    draw = random.Random(0)
    index, expected = Places(), dict[bytes, int]()
    for place in range(3000):
        slot = draw.randbytes(16) if place % 2 else bytes(draw.choice((0, 0, 1, 127, 128, 255)) for _ in range(16))
        if place % 5 == 0 and expected:
            slot = draw.choice(list(expected)[-40:])
        index.add(slot, place << 40)
        expected.setdefault(slot, place << 40)
    assert len(index) == len(expected) < 3000
    assert all(index[slot] == place for slot, place in expected.items())
    assert not any(draw.randbytes(16) in index for _ in range(1000))
    with pytest.raises(KeyError):
        index[bytes(range(16))]
