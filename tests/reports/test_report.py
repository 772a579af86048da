import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_builders import HOSTILE, metrics, pairs
from rich.console import Console

from selfsteer.measures.displacement import displaced, displacement
from selfsteer.measures.estimates import Estimate
from selfsteer.measures.headroom import Answers, headroom
from selfsteer.measures.metrics import Measures, Metrics, write_metrics
from selfsteer.measures.quality import measure
from selfsteer.records import Pair, Principles, Scored
from selfsteer.reports import reading
from selfsteer.reports.costs import cost_line
from selfsteer.reports.drawing import Cell, Row, Table, console_of, print_table
from selfsteer.reports.page import table_html, write_page
from selfsteer.reports.reading import PairSet, Reading, pick_examples
from selfsteer.reports.tables import measures_table
from selfsteer.reports.verdict import print_run
from selfsteer.runtime import duration


def printed(found: Metrics, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_run(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_metrics_are_json_with_named_estimates(tmp_path: Path):
    write_metrics(tmp_path / "metrics.json", metrics())
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["rounds"][0]["alignment"]["on_policy"]["all"].keys() == {"mean", "low", "high", "n"}
    assert found["run"]["seed"] == 0


def test_metrics_that_are_no_number_are_refused_and_the_old_file_stays(tmp_path: Path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    broken = metrics()
    broken["run"]["seconds"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(path, broken)
    assert path.read_text() == "old"


def test_summary_says_what_became_of_the_rows():
    text = printed(metrics())
    assert re.search(r"3-steering\s+1,000\s+812\s+1 h 06 min\s+120 identical <responses>, 68 empty response", text)
    assert "quick<start>: 20 pairs from 1,000 queries, policy aligned in 2 min 05 s, seed 0\n" in text
    assert "model   runs/quickstart/round-1/6-policy/model\n" in text
    assert "pairs   runs/quickstart/round-1/5-preferences/data.parquet\n" in text


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_tables_fit_the_terminal_and_break_neither_a_label_nor_an_interval(width: int):
    text = printed(metrics(), width).partition("quick<start>: ")[0]
    drawn = [line for line in text.splitlines() if "  " in line.strip() or "─" in line]
    assert max(map(len, drawn)) <= width
    table = text[text.index("Preference data") :]
    for label in ("chosen more probable", "correlation with length"):
        assert re.search(rf"^   {label} +-?\d", table, re.MULTILINE)
    broken = [line for line in drawn if line.count("[") != line.count("]")]
    assert broken == []


def test_columns_that_do_not_fit_go_on_in_a_table_below():
    """Three values of 14 characters and their labels: two fit 40 columns, with the intervals below."""
    figures = Cell("1", "[10.00, 20.00]")
    rows = (Row("one", (figures,) * 3), Row("no"), Row("two", (figures, figures, Cell(""))))
    wide = Table("Wide", ("a", "b", "c"), rows)
    text = io.StringIO()
    print_table(wide, Console(file=text, width=40))
    lines = [line.split() for line in text.getvalue().splitlines() if line.strip() and "─" not in line]
    assert lines == [
        ["Wide"],
        ["a", "b"],
        ["one", "1", "1"],
        ["[10.00,", "20.00]"] * 2,
        ["no"],
        ["two", "1", "1"],
        ["[10.00,", "20.00]"] * 2,
        ["Wide,", "continued"],
        ["c"],
        ["one", "1", "[10.00,", "20.00]"],
    ]


@pytest.mark.parametrize(("columns", "width"), [("80", 80), (None, 100)])
def test_what_is_no_terminal_has_the_columns_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert console_of().width == width


def test_summary_says_where_the_time_went():
    """200 s, of which 150 s are accounted for and 110 s are model products."""
    found = metrics()
    found["rounds"][0]["stages"] = {
        "2-responses": {
            "wanted": 4,
            "kept": 4,
            "dropped": {},
            "seconds": 80.0,
            "parts": {"load": {"seconds": 10.0, "tokens": 0}, "sample": {"seconds": 50.0, "tokens": 5000}},
            "disk": 1_250_000,
        },
        "4-generator": {
            "wanted": 4,
            "kept": 4,
            "dropped": {},
            "seconds": 120.0,
            "parts": {
                "forward": {"seconds": 20.0, "tokens": 3000},
                "backward": {"seconds": 40.0, "tokens": 0},
                "measure": {"seconds": 30.0, "tokens": 0},
            },
        },
    }
    text = printed(found)
    assert re.search(r"sample\s+50\.0 s\s+25\.0%\s+5,000\s+100\b", text)
    assert re.search(r"forward\s+20\.0 s\s+10\.0%\s+3,000\s+150\b", text)
    assert re.search(r"all else\s+50\.0 s\s+25\.0%\s*\n\s+all\s+3 min 20 s\s+100\.0%", text)
    assert "55% in model products: sample, forward, backward." in text
    assert re.search(r"2-responses\s+10\.0\s+50\.0\s+20\.0\s+80\.0\s+1\.2\s*\n", text)
    assert re.search(r"4-generator\s+60\.0\s+30\.0\s+30\.0\s+120\.0\s*\n", text)
    assert max(map(len, text.splitlines())) <= 120


def test_runs_from_before_parts_were_timed_have_no_such_table():
    assert "Where the time went" not in printed(metrics())


def test_summary_compares_pbaa_with_the_generator():
    found = metrics()
    mean = found["rounds"][0]["comparison"]["all"].mean
    text = printed(found, 120)
    assert re.search(r"PBAA pairs\s+generator pairs\s+difference", text)
    assert f"+{mean:.3f} [+" in text
    assert "over the 20 queries that both have; the generator was trained on some of them" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


def test_the_funnel_says_why_the_generator_has_fewer_queries():
    """1,000 queries, of which 2-responses answers 936: 64 are held out."""
    found = metrics()
    assert "are there to measure" not in printed(found)
    found["rounds"][0]["stages"] |= {"2-responses": {"wanted": 936, "kept": 936, "dropped": {}, "seconds": 1.0}}
    text = " ".join(printed(found).split())
    assert "2-responses has the 936 queries that the generator is trained on; the 64 others are there to measure" in text
    assert "936 936 1.0 s none" in text


def test_a_judged_number_says_of_how_many_pairs_it_is():
    found = metrics()
    found["rounds"][0]["alignment"]["judge"] = {"pairs": 12, "accuracy": Estimate(0.5, 0.3, 0.7, 12)}
    assert re.search(r"pairs judged\s+12\s+accuracy\s+50\.0%", printed(found))


def test_summary_shows_only_what_was_measured():
    found = metrics()
    this = found["rounds"][0]
    for key in ("pbaa", "comparison", "generator", "policy"):
        this.pop(key)
    text = printed(found)
    assert "difference" not in text
    assert "alignment pairs" in text
    assert "Training" not in text
    assert "Stages" not in printed({"run": found["run"], "rounds": [{}]})


def test_rounds_are_numbered_when_there_are_several():
    found = metrics()
    found["rounds"] *= 2
    assert "Preference data, round 2" in printed(found)
    assert "round 1" not in printed(metrics())


def test_measures_of_one_data_set():
    console = Console(file=io.StringIO(), width=100)
    print_table(measures_table({"pairs": measure(pairs(-6.0))}), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert re.search(r"chosen longer\s+0\.0% \[0\.0, 16\.1\]", text)
    assert "difference" not in text


def test_what_judges_say_is_shown_where_they_were_asked():
    share = Estimate(0.625, 0.5, 0.75, 40)
    console = Console(file=io.StringIO(), width=100)
    found: Measures = {"pairs": 40, "judge": {"accuracy": share}, "principle_consistency": {"accuracy": share}}
    print_table(measures_table({"pairs": found}), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert re.search(r"judged by the judge\s+accuracy\s+62\.5% \[50\.0, 75\.0\]", text)
    assert re.search(r"judged by principle consistency\s+accuracy\s+62\.5% \[50\.0, 75\.0\]", text)
    assert "ties" not in text


def test_one_row_has_no_interval():
    console = Console(file=io.StringIO(), width=100)
    print_table(measures_table({"pairs": {"pairs": 1, "overlap": Estimate(0.25, None, None, 1)}}), console)
    assert isinstance(console.file, io.StringIO)
    assert re.search(r"overlap in a pair\s+25\.0%\s*\n", console.file.getvalue())


def test_durations():
    assert [duration(s) for s in (0.04, 59.94, 200, 7500)] == ["0.0 s", "59.9 s", "3 min 20 s", "2 h 05 min"]
    assert duration(59.97) == "1 min 00 s"
    assert duration(3599.9) == "1 h 00 min"


class Reader(HTMLParser):
    """Collects tags, text and every address that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def page(path: Path, found: Metrics, examples: list[Pair]) -> Reader:
    """What a reader without scripts has before them."""
    write_page(
        path, found, Reading(sets=[PairSet("alignment pairs", "pair", len(examples), list(map(reading.entry, examples)))])
    )
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_page_escapes_all_text_and_loads_nothing(tmp_path: Path):
    reader = page(tmp_path / "report.html", metrics(), pairs(-4.0)[:3])
    assert reader.tags.count("script") == 2
    assert reader.text.count(HOSTILE) == 9
    assert "quick<start>" in reader.text
    assert "120 identical <responses>" in reader.text
    assert all(address.startswith("#") for address in reader.addresses)
    assert "url(http" not in (tmp_path / "report.html").read_text()


def test_what_a_run_took_is_said_in_a_line_with_its_stages_behind(tmp_path: Path):
    """0.5 + 1.5 GB on disk, the larger of two peaks, tokens of both stages."""
    found = metrics()
    sampled, trained = ({"seconds": 30.0, "tokens": tokens} for tokens in (1500, 200))
    stage = {"wanted": 4, "kept": 4, "dropped": {}, "seconds": 60.0}
    found["rounds"][0]["stages"] = {
        "2-responses": {**stage, "parts": {"sample": sampled}, "disk": 500_000_000, "memory": {"ram": 1_000_000_000}},
        "4-generator": {
            **stage,
            "parts": {"sample": sampled, "forward": trained},
            "disk": 1_500_000_000,
            "memory": {"ram": 6_000_000_000},
        },
    }
    said = "Cost: 2 min 00 s, 3,000 tokens sampled, 200 tokens trained, 6.0 GB of RAM, 2.0 GB of disk"
    assert cost_line(found) == said
    page(tmp_path / "report.html", found, [])
    text = (tmp_path / "report.html").read_text()
    opened = text.partition(f"<summary>{said}</summary>")[2].partition("</details>")[0]
    assert "4-generator" in opened
    assert text.count("MB disk</th>") == 1, "not among all numbers once more"


def test_links_lead_to_every_heading(tmp_path: Path):
    reader = page(tmp_path / "report.html", metrics(), pairs(-4.0)[:3])
    text = (tmp_path / "report.html").read_text()
    links = dict(re.findall(r'<a href="#(part-\d+)">(.*?)</a>', text.partition("<nav")[2].partition("</nav>")[0]))
    assert links == dict(re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', text))
    assert {"Pairs to read", "Stages", "All numbers"} <= set(links.values())
    assert reader.text.count("What these words mean") == 1


def test_of_many_answers_the_first_are_seen_and_the_others_open(tmp_path: Path):
    def answer(number: int) -> dict[str, Any]:
        side = {"text": f"Answer {number}.", "finish_reason": "stop"}
        asked = {"messages": [{"role": "user", "content": f"Question {number}?"}], "principles": {"good": "Be short."}}
        return asked | {"before": side, "after": side, "before_why_not": [None], "after_why_not": [None]}

    write_page(tmp_path / "report.html", metrics(), Reading(answers=[answer(number) for number in range(5)]))
    seen, _, folded = (tmp_path / "report.html").read_text().partition("<summary>2 more</summary>")
    assert [number for number in range(5) if f"Question {number}?" in seen] == [0, 1, 2]
    assert [number for number in range(5) if f"Question {number}?" in folded] == [3, 4]


def test_no_heading_of_a_column_is_empty():
    """axe: empty-table-header."""
    found = table_html(Table("Checks", ("pairs", ""), (Row("Be short.", (Cell("4"), Cell(""))),), left=True))
    assert '<th role="columnheader">pairs</th><td role="cell"></td>' in found


def test_a_measure_is_a_card_of_labelled_lines_and_words(tmp_path: Path):
    page(tmp_path / "report.html", metrics(), [])
    text = (tmp_path / "report.html").read_text()
    (card,) = re.findall(r'<p class="name">on-policy probability</p>(.*?)</div>', text)
    lines = re.findall("<p>(.*?)</p>", card)
    assert [line.split()[0] for line in lines[:3]] == ["PBAA", "generator", "difference"]
    assert lines[3:] == ["more on-policy, on queries trained on"]


def test_below_each_table_stands_what_its_lines_say(tmp_path: Path):
    page(tmp_path / "report.html", metrics(), [])
    data = (tmp_path / "report.html").read_text().partition("<summary>Preference data</summary>")[2]
    told = re.findall("<dt>(.*?)</dt>", data.partition("</dl>")[0])
    assert "distinct-2" in told
    assert "chosen more probable" in told


def test_every_explained_line_is_one_of_some_table():
    terms = yaml.safe_load((files("selfsteer") / "templates" / "report_terms.yaml").read_text("utf-8"))
    source = "".join(
        (files("selfsteer") / file).read_text("utf-8") for file in ("reports/tables.py", "reports/costs.py", "clock.py")
    )
    assert [label for label in terms if label not in source] == []


def test_page_says_how_to_make_it_again(tmp_path: Path):
    found = metrics()
    page(tmp_path / "report.html", found, [])
    assert "selfsteer run runs/quickstart/recipe.yaml output=NEW" in (tmp_path / "report.html").read_text()
    del found["rounds"][0]["stages"]
    page(tmp_path / "report.html", found, [])
    assert "recipe.yaml output=NEW" not in (tmp_path / "report.html").read_text(), "its pairs were given"


def test_margins_over_steps_are_drawn(tmp_path: Path):
    plots = pytest.importorskip("selfsteer.reports.plots")
    curve = [{"step": 1.0, "loss": 0.7, "margin": 0.0}, {"step": 2.0, "loss": 0.6, "margin": 0.4}]
    (loss, margin) = plots.plots({"policy": {"curve": curve}}, {})
    assert (loss.name, margin.name) == ("loss", "reward-margin")
    (figure,) = margin.panels.values()
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.0, 0.4]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_nothing_is_drawn_beyond_a_panel_s_edge(scale: float):
    """The room for ticks and labels is fixed: large numbers, small ones and two hundred thousand responses fit in it."""
    plots = pytest.importorskip("selfsteer.reports.plots")
    curve = [{"step": step, "loss": scale * (1 + step / 300), "margin": -scale * step} for step in (1.0, 2.0, 250.0)]
    sets = {"PBAA pairs": measure(pairs(-4.0))}
    counts = sets["PBAA pairs"]["distributions"]["length"]["counts"]
    counts["chosen"] = [round(20 * scale) * count for count in counts["chosen"]]
    judged = {**sets["PBAA pairs"], "judge": {"accuracy": Estimate(0.4, 0.1, 0.9, 9)}}
    points = {"PBAA pairs": judged, "generator pairs": judged}
    drawn = [plots.figure_three({}, points), *plots.plots({"policy": {"curve": curve}}, sets)]
    assert {"figure-3", "loss", "reward-margin", "figure-1", "length"} <= {plot.name for plot in drawn}
    for figure in (figure for plot in drawn for figure in plot.panels.values()):
        with plots.mpl.rc_context(plots.STYLE):
            found, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= found.x0 < found.x1 <= width
        assert 0 <= found.y0 < found.y1 <= height


def test_page_has_plots_in_the_colours_of_the_page(tmp_path: Path):
    plots = pytest.importorskip("selfsteer.reports.plots")
    reader = page(tmp_path / "report.html", metrics(), [])
    text = (tmp_path / "report.html").read_text()
    assert reader.tags.count("svg") == 8  # two trainings, and three measures of two sets
    assert "var(--chosen)" in text.partition("<figure>")[2]
    assert not set(plots.COLOURS) & set(re.findall("#[0-9a-f]{6}", text.partition("<figure>")[2]))
    identifiers = re.findall(r'<(?:clipPath|path|g) id="(\w+)"', text)
    assert identifiers


def test_figure_three_is_of_the_held_out_queries_that_both_answered():
    """Its axes say what the verdict says, not what all pairs, those of the training among them, come to."""
    plots = pytest.importorskip("selfsteer.reports.plots")
    one, other, third = (Estimate(mean, mean - 0.05, mean + 0.05, 24) for mean in (0.42, 0.41, 0.75))
    sets = {name: {**measure(pairs(-4.0)), "judge": {"accuracy": third}} for name in ("PBAA pairs", "generator pairs")}
    compared = {"queries": 24, "held_out": True, "both": {"baseline": one, "pairs": other}}

    def places(this: object) -> list[tuple[float, float]]:
        (figure,) = plots.figure_three(this, sets).panels.values()
        points = [container.lines[0].get_xydata()[0] for container in figure.axes[0].containers]
        return [(float(x), float(y)) for x, y in points]

    assert places({"comparison": compared}) == [(0.42, 0.75), (0.41, 0.75)]
    assert "the 24 held-out queries" in plots.figure_three({"comparison": compared}, sets).caption
    judged = {"judge": {"both": {"baseline": Estimate(0.6, 0.5, 0.7, 22), "pairs": Estimate(0.8, 0.7, 0.9, 22)}}}
    assert places({"comparison": compared, "judged_comparison": judged}) == [(0.42, 0.6), (0.41, 0.8)]
    everything = sets["PBAA pairs"]["on_policy"]["all"].mean
    assert places({"comparison": {"queries": 0, "held_out": True}}) == [(everything, 0.75)] * 2, "no query has both"
    assert places({"comparison": {**compared, "held_out": False}}) == [(everything, 0.75)] * 2


def test_figure_one_has_what_was_before_what_came_after_and_the_unsteered_answers():
    plots = pytest.importorskip("selfsteer.reports.plots")
    sets = {"PBAA pairs": measure(pairs(-4.0)), "generator pairs": measure(pairs(-6.0))}
    found = headroom([Answers(*([Scored(-9.0, 4)] for _ in range(3)))] * 5)
    assert found is not None
    drawn = plots.figure_one({"headroom": found}, sets)
    assert list(drawn.panels) == list(sets)
    assert "y_o" in drawn.caption
    titles, limits = [], set()
    for name, figure in drawn.panels.items():
        (axes,) = figure.axes
        titles.append(axes.get_title(loc="left"))
        limits.add(axes.get_xlim())
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chosen", "rejected", "unsteered"]
        outlines = {patch.get_label(): patch.get_data() for patch in axes.patches}
        for side in ("chosen", "rejected", "unsteered"):
            heights, edges, _ = outlines[side]
            assert sum(heights) * (edges[1] - edges[0]) == pytest.approx(1), "whatever is counted, the area is one"
        heights, edges, _ = outlines["chosen"]
        assert [edges[0], edges[-1]] == sets[name]["distributions"]["log_probability"]["edges"][:: len(edges) - 1]
    assert titles == ["before: the policy's pairs", "after: the generator's pairs"]
    ((low, high),) = limits
    assert low <= -9 / 4 <= high, "one scale for both, which y_o is on"
    assert plots.figure_one({}, {"pairs": measure(pairs(-4.0))}).panels.keys() == {"pairs"}
    assert plots.figure_one({}, {}) is None


def test_page_without_matplotlib_says_how_to_get_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "selfsteer.reports.plots", raising=False)
    monkeypatch.delattr("selfsteer.reports.plots", raising=False)
    reader = page(tmp_path / "report.html", metrics(), [])
    assert "svg" not in reader.tags
    assert "selfsteer[report]" in reader.text
    assert "Preference data" in reader.text


def test_page_shows_principles_and_what_was_cut_off(tmp_path: Path):
    principles = Principles(good="Be <exact>.", bad="Be vague.", quality="accuracy", source="library")
    reader = page(tmp_path / "report.html", metrics(), [replace(pairs(-4.0)[0], principles=principles)])
    assert "good principleBe <exact>." in reader.text
    assert "rejected · 10 tokens, on-policy probability 0.449 · cut off" in reader.text


def test_page_of_a_run_without_measures(tmp_path: Path):
    reader = page(tmp_path / "report.html", {"run": metrics()["run"], "rounds": []}, [])
    assert "quick<start>" in reader.text


def test_examples_are_drawn_evenly_and_kept_in_order():
    rows = pairs(-4.0)
    drawn = [[pair.query_id for pair in pick_examples(rows, n=5, seed=seed)] for seed in range(400)]
    assert all(ids == sorted(ids, key=int) and len(set(ids)) == 5 for ids in drawn)
    counts = [sum(str(number) in ids for ids in drawn) for number in range(20)]
    # Each of 20 rows is among 5 in a quarter of 400 draws: 100, give or take 9.
    assert min(counts) > 65
    assert max(counts) < 135
    assert pick_examples(rows[:3], n=5) == rows[:3]


def test_what_is_said_of_a_run_without_results():
    run = metrics()["run"]
    run.pop("policy_folder")
    run.pop("pairs")
    assert printed({"run": run, "rounds": []}).splitlines() == [
        "quick<start>: no pairs, no policy aligned in 2 min 05 s, seed 0",
        "report  runs/quickstart/report.html, or: selfsteer report runs/quickstart",
    ]


def displaced_metrics(unrelated: float) -> Metrics:
    """A generator read at steps 2 and 4, and what it delivers: unrelated responses of 40 tokens moved alike."""
    found = metrics()
    generator = found["rounds"][0]["generator"]
    for entry in generator["curve"]:
        if entry["step"] in (2.0, 4.0):
            entry |= {"chosen_moved": entry["step"], "rejected_moved": -entry["step"], "unrelated_moved": unrelated}
    moved = {
        "chosen": [(5.7, 40)],
        "rejected": [(-10.7, 40)],
        "unrelated": [(unrelated + off, 40) for off in (-0.1, 0, 0.1)],
    }
    generator["displacement"] = displacement(moved)
    return found


def test_displacement_is_said_by_name(tmp_path: Path):
    """0.76 nats over 40 tokens: 0.019 a token."""
    found = displaced_metrics(-0.76)
    text = printed(found)
    assert re.search(r"unrelated responses\s+-0\.760 \(-0\.01900\) \[-0\.860, -0\.660\]", text)
    assert re.search(r"unrelated ones measured\s+3", text)
    assert "data generator displaced: unrelated answers lost 0.76 nats (0.019 a token; 3 measured)" in " ".join(text.split())
    write_page(tmp_path / "report.html", found)
    page = (tmp_path / "report.html").read_text()
    assert "displaced: unrelated answers lost 0.76 nats" in page
    assert "How far responses have moved" in page


@pytest.mark.parametrize("unrelated", [-0.12, 0.0, 0.5], ids=["0.003 a token", "none", "gained"])
def test_little_displacement_has_no_warning(unrelated: float):
    assert "displaced" not in printed(displaced_metrics(unrelated))


def test_a_loss_that_may_be_chance_has_no_warning():
    """One response lost 2 nats, another won 1: the interval reaches above zero."""
    found = displacement({"chosen": [], "rejected": [], "unrelated": [(-2.0, 40), (1.0, 40)]})
    assert found["unrelated"].mean == -0.5
    assert found["lost"].mean == 0.5
    assert displaced(found) is None
    assert displaced({}) is None
