"""comparison.html from comparison.json alone, and each seed by itself."""

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from selfsteer import cli
from selfsteer.comparing import ArmRun, summarize
from selfsteer.measures.metrics import RoundMetrics
from selfsteer.recipe.sections import Recipe
from selfsteer.reports.comparison import (
    ComparisonResult,
    write_comparison,
    write_comparison_figures,
    write_comparison_page,
)

RecipeOf = Callable[..., dict[str, Any]]


def compared(recipe_of: RecipeOf, folder: Path, seeds: list[int]) -> ComparisonResult:
    """PBAA at 0.2 and 0.4 on two queries; SSO 0.1 above it under seed 0 and 0.3 above it under seed 1."""
    recipe = Recipe.model_validate(recipe_of(folder, {"queries.holdout": 2, "policy.model": "<model>"}))
    base = {"a": 0.2, "b": 0.4}

    def run(*gains: float) -> list[ArmRun]:
        found: list[ArmRun] = []
        for gain in gains[: len(seeds)]:
            values = {query: value + gain for query, value in base.items()}
            found.append(ArmRun({"on_policy_all": values, "accuracy": values}, RoundMetrics(), []))
        return found

    return summarize(recipe, {"base": [], "pbaa": run(0.0, 0.0), "sso": run(0.1, 0.3)}, seeds)


def test_each_seed_by_itself(recipe_of: RecipeOf, tmp_path: Path):
    """0.1 and 0.3 apart, 0.2 on average: the spread that the average hides."""
    arms = compared(recipe_of, tmp_path / "all", [0, 1])["arms"]
    assert arms["sso"]["difference"]["on_policy_all"].mean == pytest.approx(0.2)
    by_seed = arms["sso"]["by_seed"]
    assert {seed: each["difference"]["on_policy_all"].mean for seed, each in by_seed.items()} == {
        "0": pytest.approx(0.1),
        "1": pytest.approx(0.3),
    }
    assert by_seed["1"]["measures"]["on_policy_all"].mean == pytest.approx(0.6)
    assert "difference" not in arms["pbaa"]["by_seed"]["0"]
    assert "by_seed" not in compared(recipe_of, tmp_path / "all", [0])["arms"]["sso"]


class _Tags(HTMLParser):
    """Which tags stand open at the end, and which were opened at all."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)


@pytest.fixture
def folder(recipe_of: RecipeOf, tmp_path: Path) -> Path:
    (tmp_path / "all").mkdir()
    write_comparison(tmp_path / "all", compared(recipe_of, tmp_path / "all", [0, 1]))
    return tmp_path / "all"


def test_the_page_has_a_forest_and_a_scatter_and_no_foreign_text(folder: Path):
    pytest.importorskip("matplotlib")
    write_comparison_page(folder)
    text = (folder / "comparison.html").read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.seen.count("svg") == 3, "on-policy, order, and one against the other"
    assert "script" not in tags.seen
    assert "&lt;model&gt;" in text
    assert "<model>" not in text
    assert not re.search(r"(src|href)=[\"']?https?:", text), "nothing is fetched"
    headlines = re.findall(r'<p class="name">(sso, [^<]*)</p><p>([^ <]+)', text)
    assert headlines == [
        ("sso, on-policy probability, less that of pbaa", "+0.200"),
        ("sso, accuracy of the pairs, less that of pbaa", "+20.0"),
    ], "what was not measured is left out"
    assert "Seed by seed" in text
    assert "| sso |" in (folder / "comparison.md").read_text()


def test_its_plots_are_files_too(folder: Path):
    pytest.importorskip("matplotlib")
    written = write_comparison_figures(folder, folder / "plots")
    names = ("differences-on_policy_all", "differences-accuracy", "against-on_policy_all")
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_the_command_makes_the_page_again(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """From a comparison.json alone, also one without seeds of before they were told apart."""
    result = json.loads((folder / "comparison.json").read_text())
    for arm in result["arms"].values():
        arm.pop("by_seed", None)
    (folder / "comparison.json").write_text(json.dumps(result))

    def command() -> int:
        monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)
        monkeypatch.setattr(sys, "argv", ["selfsteer", "report", str(folder)])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    assert command() == 0
    assert "comparison.html" in capsys.readouterr().out
    assert "Seed by seed" not in (folder / "comparison.html").read_text()
    (folder / "comparison.json").unlink()
    assert command() == 2
    assert "neither a run nor a comparison is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"baseline": "pbaa"',
        '{"baseline": "pbaa", "model": "m", "seeds": [0], "holdout": 2, "arms": {"sso": 3}}',
        '{"baseline": "pbaa", "model": "m", "seeds": [0], "holdout": 2, "arms": {"sso": {"measures": {"accuracy": [1]}}}}',
    ],
)
def test_a_damaged_comparison_is_named_with_the_way_out(tmp_path: Path, content: str):
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(ValueError, match=r"comparison\.json: damaged.*selfsteer compare"):
        write_comparison_page(tmp_path)
