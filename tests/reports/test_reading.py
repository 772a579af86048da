"""What the page shows of a run's rows: from a real run, and drawn where there are too many."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfsteer import cli
from selfsteer.measures.metrics import read_metrics
from selfsteer.pipeline import run
from selfsteer.recipe.sections import Recipe
from selfsteer.records import Message, Pair, side
from selfsteer.reports import reading
from selfsteer.reports.reading import Draw, entry, reading_of
from selfsteer.store.columns import file_rows
from selfsteer.store.folder import RunFolder

RecipeOf = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf) -> Path:
    """Six queries, two of them held out and answered; the principle has one check."""
    folder = tmp_path_factory.mktemp("reading")
    check = {"name": "selfsteer:number_characters", "relation": "at most", "num_characters": 20}
    principle = {"quality": "brevity", "good": "Use one word.", "bad": "Be long.", "check": check}
    (folder / "principles.jsonl").write_text(json.dumps(principle) + "\n")
    changes = {
        "principles": {"path": str(folder / "principles.jsonl"), "source": "file", "concision": 0.0},
        "judge": {"kind": "checks"},
        "queries.holdout": 2,
        "quality.answers": 2,
    }
    run(Recipe.model_validate(recipe_of(folder / "run", changes)))
    return folder / "run"


def test_pairs_come_with_what_the_stages_know_of_them(finished: Path):
    found = reading_of(RunFolder.view(finished), read_metrics(finished), 0)
    assert [(each.name, each.prefix) for each in found.sets] == [("generator pairs", "pair"), ("PBAA pairs", "pbaa")]
    rows = list(file_rows(finished / "round-1/5-preferences/data.parquet"))
    generator = found.sets[0]
    assert generator.of == len(rows) > 0
    assert [pair["id"] for pair in generator.pairs] == [row["query_id"] for row in rows]
    verdicts = {
        row["query_id"]: row["preferred"]
        for row in file_rows(finished / "round-1/5-quality/verdicts.parquet")
        if row["pairs"] == "alignment" and row["by"] == "judge"
    }
    checks = {
        row["query_id"]: row
        for row in file_rows(finished / "round-1/5-quality/checks.parquet")
        if row["pairs"] == "alignment"
    }
    assert verdicts
    for pair, row in zip(generator.pairs, rows, strict=True):
        assert pair["chosen"]["text"] == row["chosen"][0]["content"]
        assert pair["rejected"]["length"] == row["rejected_tokens"]
        assert pair.get("verdict") == verdicts.get(pair["id"])
        why_not = checks[pair["id"]]["chosen_why_not"] if pair["id"] in checks else None
        assert pair["chosen"].get("why_not") == ((why_not or "") if pair["id"] in checks else None)
        assert pair.get("good") == "Use one word."


def test_the_page_of_a_run_holds_its_pairs_answers_and_recipe(finished: Path):
    text = (finished / "report.html").read_text(encoding="utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    held = json.loads(data)
    assert [len(each["pairs"]) for each in held["sets"]] == [each["of"] for each in held["sets"]]
    assert held["principles"] == [{"quality": "brevity", "good": "Use one word.", "bad": "Be long."}]
    assert ">What changed</h2>" in text
    [recipe] = re.findall(r'Recipe: .*?<pre tabindex="0">(.*?)</pre>', text, flags=re.DOTALL)
    assert "judge:\n  kind: checks\n" in recipe
    assert "beta" not in recipe, "a default"
    order = ["Verdict", "What changed", "Pairs to read", "Stages", "All numbers", "Made with"]
    assert sorted(order, key=lambda title: text.index(f">{title}<" if title != "Verdict" else title)) == order


def pair(number: int, query: int | None = None, text: str = "a b c") -> Pair:
    return Pair(
        query_id=f"q{number if query is None else query}",
        kind="given",
        prompt=(Message(role="user", content="?"),),
        chosen=side(text),
        rejected=side("a"),
    )


def drawn(pairs: list[Pair], seed: int = 0) -> Draw:
    draw = Draw(seed)
    for each in pairs:
        draw.add("alignment", each.query_id, lambda each=each: entry(each))
    return draw


def test_of_many_pairs_as_many_are_drawn_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MOST", 20)
    many = [pair(n) for n in range(200)]
    draws = [drawn(many, seed) for seed in range(50)]
    ids = [[int(each["id"][1:]) for each in draw.entries("alignment")] for draw in draws]
    assert all(len(each) == 20 and each == sorted(each) for each in ids)
    assert draws[0].seen["alignment"] == 200
    # Each of 200 is drawn in a tenth of 50 draws. Of the 1,000 numbers drawn half are below 100, give or take 15.
    assert abs(sum(number < 100 for each in ids for number in each) - 500) < 75


def test_long_pairs_are_fewer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "ROOM", 20_000)
    found = drawn([pair(n, text="word " * 200) for n in range(100)]).entries("alignment")
    assert 0 < len(json.dumps(found)) < 20_000
    assert len(found) > 10


def test_the_same_queries_are_drawn_in_both_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MOST", 5)
    draw = drawn([pair(n) for n in range(50)])
    for n in range(0, 50, 2):
        draw.add("pbaa", f"q{n}", lambda n=n: entry(pair(n)))
    ids = [each["id"] for each in draw.entries("alignment")]
    assert [each["id"] for each in draw.entries("pbaa")] == [name for name in ids if int(name[1:]) % 2 == 0]


def test_pairs_of_one_query_have_links_of_their_own():
    found = drawn([pair(0), pair(1, query=0), pair(2)]).entries("alignment")
    assert [each["id"] for each in found] == ["q0", "q0-2", "q2"]
    assert found[0]["chosen"] == {"text": "a b c", "cut": False, "length": 3}


def test_plots_as_files(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    cli.print_report(finished, tmp_path / "plots")
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert {"figure-3.svg", "figure-3.png", "loss-1.svg", "margin-2.png"} <= names
    assert capsys.readouterr().out.splitlines()[0].endswith("plots/figure-3.svg")
    assert (tmp_path / "plots/figure-3.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "plots/figure-3.svg").read_text()
    assert "var(" not in svg
    assert "accuracy by the checks" in svg
