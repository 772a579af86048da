"""What the terminal shows at the end of a run: at most twenty lines, and no more than the numbers allow."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfsteer.measures.estimates import Estimate
from selfsteer.measures.metrics import GateResult, Metrics, read_metrics, write_metrics
from selfsteer.reports.verdict import in_words, print_run, verdict


def estimate(mean: float, low: float | None = None, high: float | None = None, n: int = 40) -> Estimate:
    return Estimate(mean, mean if low is None else low, mean if high is None else high, n)


def metrics(**more: Any) -> Metrics:
    """A run with generator, checks and held-out answers."""
    return {
        "run": {
            "name": "demo",
            "folder": "runs/demo",
            "model": "package:x",
            "seed": 0,
            "seconds": 270.0,
            "policy_folder": "runs/demo/round-1/6-policy/model",
            "pairs": "runs/demo/round-1/5-preferences/data.parquet",
        },
        "rounds": [
            {
                "stages": {"1-principles": {"wanted": 64, "kept": 64, "dropped": {}, "seconds": 0.1}},
                "generator": {"steps": 5},
                "pbaa": {"pairs": 40, "judge": {"accuracy": estimate(0.775)}, "on_policy": {"all": estimate(0.386)}},
                "alignment": {
                    "pairs": 64,
                    "judge": {"accuracy": estimate(0.792, n=24)},
                    "checks": {},
                    "on_policy": {"all": estimate(0.393)},
                    "truncated": {"chosen": estimate(0.0), "rejected": estimate(0.4)},
                },
                "comparison": {
                    "queries": 40,
                    "held_out": True,
                    "all": estimate(0.004, -0.011, 0.019),
                    "both": {"pairs": estimate(0.390), "baseline": estimate(0.386)},
                },
                "answers": {
                    "queries": 24,
                    "passing": {
                        "before": estimate(0.0, n=24),
                        "after": estimate(0.958, n=24),
                        "prompted": estimate(0.333, n=24),
                        "change": estimate(0.958, 0.875, 1.0, n=24),
                    },
                    "checks": [],
                    "truncated": {},
                },
                **more,
            }
        ],
    }


def test_the_verdict_of_a_demo():
    assert verdict(metrics()) == [
        "demo: 64 pairs from 64 queries, policy aligned in 4 min 30 s",
        "  on-policy probability  PBAA 0.386 of 40  generator 0.390 of 40      +0.004 [-0.011, +0.019]  no difference shown",
        "  accuracy (checks)      PBAA 78% of 40    generator 79% of 24 (few)  different queries",
        "  24 held-out answers: 0% follow the principle before, 96% after, 33% when told to",
        "    change +96 [+88, +100] points: the policy follows it more",
        "  ! 40% of the rejected responses are cut off: raise responses.max_new_tokens",
        "  ! 64 pairs are too few to tell small differences in the data from chance",
        "model   runs/demo/round-1/6-policy/model",
        "pairs   runs/demo/round-1/5-preferences/data.parquet",
        "report  runs/demo/report.html, or: selfsteer report runs/demo",
        "next    selfsteer export runs/demo --to pairs --format trl",
    ]


def test_a_difference_of_the_same_queries_is_said_in_words():
    """The columns are of the queries that both have, whatever else either set was judged on."""
    both = {"pairs": estimate(0.7, n=22), "baseline": estimate(0.8, n=22)}
    found = metrics(judged_comparison={"judge": {"difference": estimate(-0.1, -0.18, -0.02), "both": both}})
    line = next(line for line in verdict(found) if "accuracy" in line)
    assert " ".join(line.split()) == (
        "accuracy (checks) PBAA 80% of 22 (few) generator 70% of 22 (few) -10 [-18, -2] points less accurate"
    )


def test_a_selection_leaves_the_difference_that_of_generator_and_pbaa():
    both = {"pairs": estimate(0.7, n=22), "baseline": estimate(0.8, n=22)}
    selected = {"pairs": 20, "judge": {"accuracy": estimate(0.95, n=20)}}
    found = metrics(
        judged_comparison={"judge": {"difference": estimate(-0.1, -0.18, -0.02), "both": both}}, selected=selected
    )
    line = next(line for line in verdict(found) if "accuracy" in line)
    assert "PBAA 80% of 22 (few)  generator 70% of 22 (few)" in line


def test_a_probability_of_few_queries_says_so():
    few = {"pairs": estimate(0.390, n=24), "baseline": estimate(0.386, n=24)}
    found = metrics()
    found["rounds"][0]["comparison"]["both"] = few
    line = next(line for line in verdict(found) if "on-policy probability" in line)
    assert "PBAA 0.386 of 24 (few)  generator 0.390 of 24 (few)" in line


def test_a_comparison_on_queries_that_were_trained_on_says_so():
    found = metrics()
    found["rounds"][0]["comparison"]["held_out"] = False
    line = next(line for line in verdict(found) if "on-policy probability" in line)
    assert line.endswith("no difference shown, on queries trained on")


def test_failed_gates_come_before_everything_else():
    gate = GateResult("accuracy", ">= 0.6", estimate(0.5), False, "0.500 is below 0.6")
    first = next(line for line in verdict(metrics(gates=[gate])) if line.startswith("  !"))
    assert first == "  ! gate accuracy >= 0.6: 0.500 is below 0.6"


def test_commands_can_be_copied_whatever_the_folder_is_called():
    found = metrics()
    found["run"]["folder"] = "my runs/demo"
    assert verdict(found)[-2:] == [
        "report  my runs/demo/report.html, or: selfsteer report 'my runs/demo'",
        "next    selfsteer export 'my runs/demo' --to pairs --format trl",
    ]


def test_a_displaced_policy_is_named():
    lost = {"lost": estimate(31.2, 25.0, 37.0), "unrelated": estimate(-31.2), "unrelated_token": estimate(-0.35, -0.4, -0.3)}
    lines = verdict(metrics(policy={"displacement": lost}))
    assert "  ! policy displaced: unrelated answers lost 31 nats (0.35 a token; 40 measured): read its answers" in lines


@pytest.mark.parametrize(
    ("gap", "warned"),
    [
        (estimate(0.56, 0.31, 0.83), True),
        (estimate(0.29, 0.1, 0.5), False),
        (estimate(0.6, -0.1, 1.3), False),
        (estimate(-0.4, -0.5, -0.3), False),
    ],
)
def test_answers_that_keep_to_the_form_only_are_told_by_the_policy_told_to(gap: Estimate, warned: bool):
    found = metrics()
    found["rounds"][0]["answers"]["told"] = {"after": estimate(-1.37), "prompted": estimate(-0.81), "gap": gap}
    lines = verdict(found)
    said = "    how likely the first policy, told to, finds them: -1.370 nats a token, its own answers -0.810"
    assert said in lines
    assert any("answers unlike the policy's own when told to" in line for line in lines) == warned


def test_all_that_can_be_there_fits_into_twenty_lines():
    gates = [GateResult(name, "> 0", None, False, "not measured") for name in ("headroom", "accuracy", "displacement")]
    room = {key: estimate(0.39) for key in ("original", "good", "bad", "chosen", "rejected", "all")}
    found = metrics(gates=gates, headroom={"queries": 40, "positions": [], **room})
    found["run"]["ended"] = "the gates failed"
    assert len(verdict(found)) <= 20


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (estimate(0.1, 0.01, 0.2), "above"),
        (estimate(-0.1, -0.2, -0.01), "below"),
        (estimate(0.1, -0.01, 0.2), "no difference shown"),
        (Estimate(0.1, None, None, 1), "one item: nothing can be said"),
    ],
)
def test_words_say_what_the_interval_allows(difference: Estimate, said: str):
    assert in_words(difference, "above", "below") == said


def test_metrics_of_a_folder_are_printed_as_they_were_measured(tmp_path: Path):
    gate = GateResult("accuracy", ">= 0.6", estimate(0.5), False, "0.500 is below 0.6")
    found = metrics(gates=[gate])
    found["rounds"][0]["alignment"].pop("checks")
    found["run"] |= {"folder": str(tmp_path), "policy_folder": str(tmp_path / "model"), "pairs": str(tmp_path / "pairs")}
    write_metrics(tmp_path / "metrics.json", found)
    texts: list[str] = []
    for each in (found, read_metrics(tmp_path)):
        console = Console(file=io.StringIO(), width=100)
        print_run(each, console)
        console.print(*verdict(each))
        assert isinstance(console.file, io.StringIO)
        texts.append(console.file.getvalue())
    assert texts[0] == texts[1]
    assert "FAILED: 0.500 is below 0.6" in texts[0]


def test_a_run_that_was_moved_is_found_where_it_is(tmp_path: Path):
    """Another run may lie in the old place by now; what is elsewhere stays there."""
    found = metrics()
    found["run"]["pairs"] = "elsewhere/pairs.parquet"
    write_metrics(tmp_path / "metrics.json", found)
    run = read_metrics(tmp_path)["run"]
    assert (run["folder"], run.get("pairs")) == (str(tmp_path), "elsewhere/pairs.parquet")
    assert run.get("policy_folder") == str(tmp_path / "round-1/6-policy/model")


def test_a_folder_without_metrics_is_named_with_the_way_out(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="neither a run nor a comparison"):
        read_metrics(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="selfsteer status"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"run": [], "rounds": []}))
    with pytest.raises(ValueError, match="run the same command again"):
        read_metrics(tmp_path)
