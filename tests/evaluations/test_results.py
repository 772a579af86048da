"""Two models side by side, by hand."""

import json
from dataclasses import replace

import pytest

from selfsteer.evaluations.results import Evaluation, Figure, TaskResult, estimate_of, side_by_side, summary
from selfsteer.measures.metrics import plain


def result(hits: list[int], **changes: object) -> TaskResult:
    by_item = {str(place): float(hit) for place, hit in enumerate(hits)}
    figure = Figure(
        task="t",
        metric="acc",
        value=sum(hits) / len(hits),
        estimate=estimate_of(by_item),
        by_item=by_item,
    )
    fields = {
        "task": "t",
        "figures": [figure],
        "items": len(hits),
        "of": len(hits),
        "fewshot": 0,
        "version": "1",
        "data": "d",
    }
    return TaskResult(**{**fields, **changes})  # type: ignore[arg-type]


def evaluation(task: TaskResult) -> Evaluation:
    return Evaluation(model="m", digest="x", tasks=[task], seconds=1.0)


def test_paired_difference_by_hand():
    """Right before 1 0 0 0, after 1 1 1 0: 1/4, 3/4, and two of four items gained: 1/2."""
    (row,) = side_by_side(evaluation(result([1, 1, 1, 0])), evaluation(result([1, 0, 0, 0])))
    assert row.before is not None
    assert row.difference is not None
    assert (row.before.mean, row.after.mean, row.difference.mean, row.difference.n) == (0.25, 0.75, 0.5, 4)
    assert not row.limited
    assert row.remarks == []


def test_pairing_narrows_the_interval():
    """Ninety items alike and ten gained: the difference is surely above zero, though both intervals overlap."""
    before, after = [1] * 45 + [0] * 55, [1] * 55 + [0] * 45
    (row,) = side_by_side(evaluation(result(after)), evaluation(result(before)))
    assert row.before is not None
    assert row.difference is not None
    assert row.before.high is not None
    assert row.after.low is not None
    assert row.difference.low is not None
    assert row.before.high > row.after.low
    assert row.difference.low > 0.03


def test_what_a_reader_must_know():
    after = result([1, 0], of=541, unanswered={"refused by the server": 1}, cut=2)
    (row,) = side_by_side(evaluation(after), evaluation(result([1, 0], of=541)))
    assert row.limited
    assert row.remarks == [
        "limited: 2 of 541 items",
        "after: 1 unanswered (refused by the server)",
        "after: 2 cut off",
    ]


def test_different_items_or_judges_are_not_compared():
    with pytest.raises(ValueError, match="the same items under the same judge"):
        side_by_side(evaluation(result([1, 0])), evaluation(result([1, 0, 1])))
    with pytest.raises(ValueError, match="the same items under the same judge"):
        side_by_side(evaluation(result([1, 0], judge="a")), evaluation(result([1, 0], judge="b")))


def test_a_metric_that_is_no_mean_has_no_difference():
    after = result([1, 0])
    figure = Figure(task="t", metric="f1", value=0.3, estimate=None, by_item=None)
    (row,) = side_by_side(*[evaluation(replace(after, figures=[figure]))] * 2)
    assert (row.after.mean, row.after.low, row.difference) == (0.3, None, None)


def test_everything_is_json():
    found = json.loads(json.dumps(plain(summary(evaluation(result([1, 0])), None, {"limit": None}))))
    assert found["rows"][0]["after"]["mean"] == 0.5
    assert found["models"]["after"]["tasks"][0]["figures"] == {"acc": 0.5}
    assert "before" not in found["models"]
