from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from selfsteer.measures.estimates import Estimate
from selfsteer.measures.gates import difference, drift, evaluate
from selfsteer.measures.metrics import GateResult, RoundMetrics, find, write_metrics
from selfsteer.pipeline import complaint
from selfsteer.recipe.gates import MEASURES, parse
from selfsteer.reports.tables import tables


def share(mean: float, width: float = 0.05, n: int = 100) -> Estimate:
    return Estimate(mean, mean - width, mean + width, n)


def this(accuracy: float = 0.62, **more: object) -> RoundMetrics:
    metrics = RoundMetrics(
        stages={"5-preferences": {"wanted": 10, "kept": 8, "dropped": {"empty response": 2}, "seconds": 1.0}},
        alignment={
            "pairs": 8,
            "judge": {"accuracy": share(accuracy)},
            "repeated_pairs": 2,
            "length": {"unit": "tokens", "ratio": 1.5, "chosen": share(30.0, 2.0), "rejected": share(20.0, 2.0)},
            "refusals": {"chosen": share(0.25), "rejected": share(0.5)},
            "margin": {"per_token": share(0.5, 0.25)},
        },
    )
    metrics.update(more)  # type: ignore[typeddict-item]
    return metrics


def results(bounds: dict[str, str], metrics: RoundMetrics | None = None, number: int = 1) -> list[GateResult]:
    return evaluate(parse(bounds), this() if metrics is None else metrics, number=number)


def passed(bound: str, name: str = "accuracy") -> bool:
    """Accuracy is 0.62 [0.57, 0.67], the length ratio 1.5."""
    [result] = results({name: bound})
    return result.passed


def test_bounds_hold_the_mean_against_the_number():
    assert passed(">= 0.62")
    assert not passed("> 0.62")
    assert passed("<= 0.62")
    assert not passed("<0.62")
    assert passed(" >  6e-1 ")
    assert passed(">= 0.6, <= 0.7")
    assert not passed(">= 0.6, < 0.61")


def test_at_95_percent_the_far_end_of_the_interval_counts():
    assert passed(">= 0.57 at 95%")
    assert not passed(">= 0.6 at 95%")
    assert passed("<= 0.67 at 95%")
    assert not passed("< 0.66 at 95 %")
    [one] = results(
        {"accuracy": "> 0.5 at 95%"}, RoundMetrics(alignment={"judge": {"accuracy": Estimate(1.0, None, None, 1)}})
    )
    assert (one.passed, one.reason) == (False, "has no interval: too few rows")


@pytest.mark.parametrize(
    "bound", ["", "0.6", ">= ", "=> 0.6", "== 0.6", ">= 0.6 0.7", ">= 0.6,", ">= nan", ">= inf", ">= 60%", ">= 0.6 at 90%"]
)
def test_unreadable_bounds_are_refused(bound: str):
    with pytest.raises(ValueError, match=r"gate accuracy: given '.*', expected an operator and a number"):
        parse({"accuracy": bound})


@pytest.mark.parametrize(
    ("name", "bound", "says"),
    [
        ("accuracy", ">= 60", "accuracy lies between 0 and 1"),
        ("on_policy_gain", "> 2", "on_policy_gain lies between -1 and 1"),
        ("length_ratio", "<= 1.2 at 95%", "length_ratio has no interval"),
        ("acuracy", ">= 0.6", "no gate 'acuracy'; did you mean accuracy?"),
        ("refusal", "<= 0.1", "did you mean refusals?"),
        ("zzz", "<= 0.1", "no gate 'zzz'; Gates: on_policy_chosen, "),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(name: str, bound: str, says: str):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        parse({name: bound})
    assert says in str(error.value)


def test_every_mistake_is_named_at_once():
    with pytest.raises(ValueError, match=r"no gate 'acuracy'.*gate margin: given 'large'"):
        parse({"acuracy": ">= 0.6", "margin": "large"})


def test_values_come_from_where_the_table_says():
    found = {
        result.name: result.value for result in results({"repeated": "<= 1", "kept_share": "> 0", "length_ratio": "> 0"})
    }
    assert found["repeated"] is not None
    assert found["kept_share"] is not None
    assert (found["repeated"].mean, found["repeated"].n) == (0.25, 8)
    assert (found["kept_share"].mean, found["kept_share"].n) == (0.8, 10)
    assert found["length_ratio"] == Estimate(1.5, None, None, 8)


def test_a_name_without_a_side_bounds_both():
    both = results({"refusals": "<= 0.3"})
    assert [(result.name, result.passed) for result in both] == [("refusals_chosen", True), ("refusals_rejected", False)]


def test_an_absent_measure_fails():
    [gain] = results({"on_policy_gain": "> 0"})
    assert (gain.passed, gain.value) == (False, None)
    assert gain.reason == "not measured (on-policy probability above that of PBAA, query by query)"
    assert [result.passed for result in results({"accuracy": ">= 0"}, RoundMetrics())] == [False]
    unstarted = this(stages={"5-preferences": {"wanted": 0, "kept": 0, "dropped": {}, "seconds": 0.0}})
    assert [result.passed for result in results({"kept_share": ">= 0"}, unstarted)] == [False]


def test_pbaa_pairs_are_judged_where_there_is_no_generator():
    [result] = results({"accuracy": ">= 0.6"}, RoundMetrics(pbaa={"judge": {"accuracy": share(0.7)}}))
    assert result.value == share(0.7)


def test_gates_on_drift_wait_for_the_second_round():
    bounds = {"drift_margin": ">= -0.1"}
    assert results(bounds) == []
    [second] = results(bounds, this(drift={"margin": share(-0.2)}), number=2)
    assert not second.passed


def test_the_run_stops_with_a_table_of_what_failed():
    found = results({"accuracy": ">= 0.7", "length_ratio": "<= 2", "on_policy_gain": "> 0"})
    text = complaint(found)
    assert text is not None
    assert "2 of 3 gates failed" in text
    assert "0.620 [0.570, 0.670]" in text
    assert "is not >= 0.7" in text
    assert "not measured" in text
    assert "length_ratio" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_nothing_is_said_when_all_gates_pass():
    found = results({"accuracy": ">= 0.6"})
    assert complaint(found) is None


def test_results_stand_in_the_report_and_in_metrics_json(tmp_path: Path):
    metrics = this(gates=results({"accuracy": ">= 0.7"}), drift={"margin": share(-0.25)})
    metrics["contamination"] = {"share": share(0.125), "files": {"gsm8k.jsonl": 1250}}
    drawn = {table.title: table for table in tables([this(), metrics])}
    assert drawn["Gates, round 2"].rows[0].cells[2].value.startswith("FAILED: is not >= 0.7")
    overlap = drawn["Overlap of the queries with evaluation files, round 2"]
    assert [row.cells[0].value for row in overlap.rows] == ["12.5%", "1,250"]
    assert drawn["Drift since round 1"].rows[0].cells[0].value == "-0.250"
    run = {"name": "r", "folder": "f", "model": "m", "seed": 0, "seconds": 1.0}
    write_metrics(tmp_path / "metrics.json", {"run": run, "rounds": [metrics]})  # type: ignore[typeddict-item]
    assert '"bound": ">= 0.7"' in (tmp_path / "metrics.json").read_text()


def test_every_gate_points_into_the_shape_of_the_metrics():
    """Paths are followed through the annotations of RoundMetrics, so that a renamed measure breaks here."""

    def follow(node: object, path: str) -> object:
        for key in path.split("."):
            node = get_args(node)[1] if get_origin(node) is dict else get_type_hints(node)[key]  # type: ignore[arg-type]
        return node

    for name, measure in MEASURES.items():
        for path in measure.path.split(" / "):
            leaf = follow(RoundMetrics, path.replace("pairs.", "alignment.", 1) if path.startswith("pairs.") else path)
            counts = " / " in measure.path
            assert leaf is (int if counts else Estimate if measure.interval else float), name


def test_difference_by_hand():
    """0.5 [0.4, 0.7] - 0.3 [0.2, 0.35] = 0.2; down sqrt(0.1^2 + 0.05^2) = 0.111803, up sqrt(0.2^2 + 0.1^2) = 0.223607."""
    found = difference(Estimate(0.5, 0.4, 0.7, 20), Estimate(0.3, 0.2, 0.35, 10))
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - 0.1118034)
    assert found.high == pytest.approx(0.2 + 0.2236068)
    assert found.n == 10
    assert difference(Estimate(0.5, None, None, 1), share(0.25)).low is None


def test_drift_is_this_round_less_the_one_before():
    before, after = this(0.75), this(0.5)
    after["alignment"]["length"]["chosen"] = share(40.0, 2.0)
    found = drift(before, after)
    assert found["accuracy"].mean == -0.25
    assert found["length_chosen"].mean == 10.0
    assert found["length_rejected"].mean == 0.0
    assert "on_policy" not in found
    after["alignment"]["length"]["unit"] = "words"
    assert "length_chosen" not in drift(before, after)
    assert drift(RoundMetrics(), after) == {}


def test_measures_are_found_by_dotted_path():
    assert find(this(), "alignment.judge.accuracy") == share(0.62)


def test_bounds_as_the_documentation_has_them():
    assert parse(
        {"accuracy": ">= 0.6", "on_policy_gain": "> 0 at 95%", "length_ratio": ">= 0.8, <= 1.25", "refusals": "<= 0.05"}
    )
