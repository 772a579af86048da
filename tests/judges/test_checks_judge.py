"""Verdicts by checks, by hand."""

import json

import pytest

from selfsteer.judges.checks import NO_CHECK, checks_verdicts, passes
from selfsteer.measures.checks import Outcome, Passes, check_report
from selfsteer.records import Pair, Principles, side

NO_COMMA, SHORT = (
    '{"name":"punctuation:no_comma"}',
    json.dumps({"name": "selfsteer:number_lines", "num_lines": 1, "relation": "at most"}),
)


def pair(chosen: str, rejected: str, *checks: str) -> Pair:
    principles = Principles(good="G", bad="B", quality="style", source="file", checks=checks)
    return Pair(
        query_id="q", kind="alignment", prompt=(), chosen=side(chosen), rejected=side(rejected), principles=principles
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "preferred", "margin"),
    [
        ("plain", "one, two", "chosen", 1.0),
        ("one, two", "plain", "rejected", -1.0),
        ("plain", "simple", "tie", 0.0),
        ("one, two", "one,\ntwo", "tie", 0.0),
        ("plain\ntext", "plain", "rejected", -1.0),  # both checks must pass
        ("", "plain", "rejected", -1.0),
    ],
)
def test_the_response_that_passes_is_preferred(chosen: str, rejected: str, preferred: str, margin: float):
    [verdict] = checks_verdicts([pair(chosen, rejected, NO_COMMA, SHORT)])
    assert (verdict.preferred, verdict.margin, verdict.error) == (preferred, margin, None)


def test_without_a_check_there_is_no_verdict():
    [verdict] = checks_verdicts([pair("a", "b")])
    assert (verdict.preferred, verdict.error) == (None, NO_CHECK)
    assert passes(pair("a", "b")) is None


def test_a_report_by_hand():
    """G: 3 wins, 1 loss, 1 both pass, 1 both fail; H: 5 pairs whose chosen never passes; I: too few to be listed."""
    found = [(True, False)] * 3 + [(False, True), (True, True), (False, False)]
    outcomes = [Outcome("G", (SHORT,), Passes(*each)) for each in found]
    outcomes += [Outcome("H", (NO_COMMA,), Passes(False, True))] * 5
    outcomes += [Outcome("I", (NO_COMMA,), Passes(True, False)), Outcome("J", (), None)]
    report = check_report(outcomes)
    assert (report["pairs"], report["unchecked"]) == (12, 1)
    shares = {
        name: round(12 * report[name].mean) for name in ("chosen", "rejected", "win", "loss", "both_pass", "both_fail")
    }
    assert shares == {"chosen": 5, "rejected": 7, "win": 4, "loss": 6, "both_pass": 1, "both_fail": 1}
    assert report["principles"] == [
        {"principle": "G", "checks": [SHORT], "pairs": 6, "chosen": 4, "rejected": 2},
        {
            "principle": "H",
            "checks": [NO_COMMA],
            "pairs": 5,
            "chosen": 0,
            "rejected": 5,
            "useless": "no chosen response of 5 pairs passes",
        },
    ]
    assert "win" not in check_report([Outcome("J", (), None)])
