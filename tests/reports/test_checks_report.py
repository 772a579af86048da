"""What a person reads of checks: tables and page, from values worked out by hand."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from selfsteer.measures.checks import Outcome, Passes, check_report
from selfsteer.measures.estimates import mean_of, share_estimate
from selfsteer.measures.metrics import Metrics, RoundMetrics
from selfsteer.reports.page import write_page
from selfsteer.reports.reading import Reading
from selfsteer.reports.tables import check_label
from selfsteer.reports.verdict import print_run

SHORT = json.dumps({"name": "length_constraints:number_words", "relation": "at most", "num_words": 40})
PLAIN = json.dumps({"name": "selfsteer:no_markdown"})
HOSTILE = "<script>alert(1)</script>"


def metrics() -> Metrics:
    """8 pairs: 6 wins, 2 neither; 4 answers, of which 1 passed before and 3 after."""
    good = [Outcome(f"Be short {HOSTILE}", (SHORT,), Passes(True, False))] * 6
    bad = [Outcome("Be plain", (PLAIN,), Passes(False, False))] * 5
    report = check_report(good + bad + [Outcome("Be good", (), None)])

    def shares(before: int, after: int, prompted: int) -> Any:
        found = {"before": before, "after": after, "prompted": prompted, "change": after - before, "gap": prompted - after}
        return {key: share_estimate(hits, 4) for key, hits in found.items()}

    this = RoundMetrics(
        pbaa={"pairs": 12, "checks": report},
        answers={
            "queries": 4,
            "passing": shares(1, 3, 4),
            "checks": [{"check": SHORT, **shares(2, 4, 4)}, {"check": PLAIN, **shares(1, 3, 4)}],
            "truncated": shares(0, 1, 1),
            "told": {
                key: mean_of([value] * 4)
                for key, value in {
                    "before": -0.9,
                    "after": -1.375,
                    "prompted": -0.75,
                    "change": -0.475,
                    "gap": 0.625,
                }.items()
            },
        },
    )
    run: Any = {"name": "r", "folder": "f", "model": "m", "seed": 0, "seconds": 1.0}
    return Metrics(run=run, rounds=[this])


def summary() -> list[str]:
    text = io.StringIO()
    print_run(metrics(), Console(file=text, width=160))
    return text.getvalue().splitlines()


def line(start: str) -> str:
    [found] = [each for each in summary() if each.strip().startswith(start)]
    return " ".join(found.split())


def test_a_checks_label_says_what_it_asks_for():
    assert check_label(SHORT) == "length_constraints:number_words at most 40"
    assert check_label(PLAIN) == "selfsteer:no_markdown"
    listed = json.dumps({"name": "keywords:existence", "keywords": ["sun", "sea"]})
    assert check_label(listed) == "keywords:existence 'sun', 'sea'"


def test_shares_of_pairs_and_useless_principles_are_shown():
    assert line("chosen passes, rejected does not").startswith("chosen passes, rejected does not 54.5% [")  # 6 of 11
    assert line("neither passes").startswith("neither passes 45.5% [")
    assert line("pairs without a check") == "pairs without a check 1"
    assert "USELESS: no chosen response and no" in line("Be plain")
    assert "USELESS" not in line("Be short")


def test_answers_are_shown_before_and_after_with_each_check():
    assert line("all checks").startswith("all checks 25.0% [")
    assert " 75.0% [" in line("all checks")
    assert " +50.0 points [" in line("all checks")
    assert line("length_constraints:number_words at most 40").split(" at most 40 ")[1].startswith("50.0% [")
    assert line("cut off").startswith("cut off 0.0% [")
    assert line("log-probability when told to").split()[4::3] == ["-0.900", "-1.375", "-0.475", "-0.750"]


def test_the_page_shows_answers_to_read_and_no_foreign_markup(tmp_path: Path):
    def answer(text: str, finish: str = "stop") -> dict[str, Any]:
        return {"text": text, "finish_reason": finish}

    row = {
        "messages": [{"role": "user", "content": f"ask {HOSTILE}"}],
        "principles": {"good": f"Be short {HOSTILE}"},
        "before": answer(f"long {HOSTILE}", "length"),
        "after": answer(f"short {HOSTILE}"),
        "before_why_not": ["41 words instead of at most 40", None],
        "after_why_not": [None, None],
    }
    write_page(tmp_path / "report.html", metrics(), Reading(answers=[row]))
    page = (tmp_path / "report.html").read_text()
    assert "Answers before and after the alignment" in page
    assert "<del>long</del>" in page
    assert "<ins>short</ins>" in page
    assert "before · 41 words instead of at most 40 · cut off" in page
    assert "after · passes" in page
    assert HOSTILE not in page
    assert "4 held-out answers: 25% follow the principle before, 75% after" in page
