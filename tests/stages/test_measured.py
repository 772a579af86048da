"""Measures taken once: read back as they were, by the digests of what was measured; damage is noticed."""

from pathlib import Path

import pytest

from selfsteer.measures.estimates import Estimate
from selfsteer.stages import summary
from selfsteer.stages.summary import Measured

VALUE = {
    "pairs": 3,
    "margin": {"nats": Estimate(0.1, None, None, 1), "curve": [1.5, 2.0]},
    "share": Estimate(0.5, 0.1, 0.9, 4),
}


def never() -> object:
    pytest.fail("measured again")


def test_what_was_measured_is_read_back_as_it_was(tmp_path: Path):
    path = tmp_path / "measured.json"
    assert Measured(path).get("pairs", ["a"], lambda: VALUE) == VALUE
    again = Measured(path).get("pairs", ["a"], never)
    assert again == VALUE
    assert isinstance(again["share"], Estimate)  # type: ignore[index]
    assert Measured(path).get("pairs", ["b"], lambda: {"pairs": 4}) == {"pairs": 4}, "other data"
    assert Measured(path).get("others", ["a"], lambda: {"pairs": 5}) == {"pairs": 5}
    assert Measured(path).get("pairs", ["a"], never) == VALUE


def test_other_measures_are_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Measured(tmp_path / "measured.json").get("pairs", ["a"], lambda: {"pairs": 1})
    monkeypatch.setattr(summary, "SCHEMA", summary.SCHEMA + 1)
    assert Measured(tmp_path / "measured.json").get("pairs", ["a"], lambda: {"pairs": 2}) == {"pairs": 2}


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_a_flipped_bit_is_measured_again(place: int, tmp_path: Path):
    path = tmp_path / "measured.json"
    Measured(path).get("pairs", ["a"], lambda: VALUE)
    content = bytearray(path.read_bytes())
    content[len(content) * place // 100] ^= 1
    path.write_bytes(content)
    assert Measured(path).get("pairs", ["a"], lambda: {"pairs": 9}) == {"pairs": 9}
