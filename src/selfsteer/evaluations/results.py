"""What evaluations find, and two models' figures side by side.

A figure is a mean over items wherever it can be: then it has an interval, and two models that answered the same items
differ by the mean of what they differ item by item, which says far more than two intervals that overlap.

Left out on purpose: tables and pages, which are the report's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from selfsteer.measures.estimates import METHOD, Estimate, mean_estimate, paired_difference, share_estimate
from selfsteer.records import Message

Form = Literal["number", "share"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    estimate: Estimate | None
    """With its interval over items; None of a metric that is no mean over them."""
    by_item: Mapping[str, float] | None
    """What each item adds, so that their mean is the value; two models' differ item by item."""
    form: Form = "share"
    """How people write it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One task, answered by one model."""

    task: str
    figures: Sequence[Figure]
    items: int
    of: int
    """Items that the task has; more than `items` in a limited run."""
    fewshot: int | None = None
    version: str
    data: str
    """Where the items came from."""
    unanswered: Mapping[str, int] = field(default_factory=dict[str, int])
    """Items without an answer, or without a verdict, by reason."""
    cut: int = 0
    """Answers that reached the limit of new tokens."""
    judge: str | None = None
    """Who judged; figures of different judges are never compared."""
    notes: Sequence[str] = ()
    part_of: str | None = None
    """The task named that this is a part of, such as a subject of MMLU."""
    first: tuple[Message, ...] | None = None
    """What was asked first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One model, on all tasks."""

    model: str
    """As it was named."""
    digest: str
    tasks: Sequence[TaskResult]
    seconds: float
    """Of answering and scoring; what was journalled before took none."""
    first_prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    """The first item of each task, as the model read it."""
    ends: Sequence[str] = ()
    """The tokens that end an answer: with another end token the same model has other figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one task, before and after."""

    task: str
    metric: str
    before: Estimate | None
    after: Estimate
    difference: Estimate | None
    """After - before, over the items that both answered; None of metrics that are no mean over items."""
    items: int
    of: int
    judge: str | None
    remarks: Sequence[str]
    form: Form
    part_of: str | None

    @property
    def limited(self) -> bool:
        """Whether fewer items were asked than the task has."""
        return self.items < self.of


def estimate_of(by_item: Mapping[str, float] | None) -> Estimate | None:
    """The mean of what items add; Wilson's interval of plain shares."""
    if by_item is None:
        return None
    values = list(by_item.values())
    return share_estimate(int(sum(values)), len(values)) if set(values) <= {0.0, 1.0} else mean_estimate(values)


def side_by_side(after: Evaluation, before: Evaluation | None = None) -> list[Row]:
    """A row a figure. Raises ValueError where both answered different items, or were judged by different judges."""
    then = {} if before is None else {task.task: task for task in before.tasks}
    return [row for task in after.tasks for row in _rows(task, then.get(task.task))]


def _rows(after: TaskResult, before: TaskResult | None) -> list[Row]:
    if before is not None and (after.items, after.data, after.judge) != (before.items, before.data, before.judge):
        raise ValueError(
            f"{after.task}: both models must answer the same items under the same judge;"
            f" {(after.items, after.data, after.judge)} after, {(before.items, before.data, before.judge)} before"
        )
    rows: list[Row] = []
    for figure in after.figures:
        old = None if before is None else next((each for each in before.figures if each.metric == figure.metric), None)
        rows.append(
            Row(
                task=after.task,
                metric=figure.metric,
                before=None if old is None else _value(old),
                after=_value(figure),
                difference=_difference(figure, old),
                items=after.items,
                of=after.of,
                judge=after.judge,
                remarks=_remarks(after, before),
                form=figure.form,
                part_of=after.part_of,
            )
        )
    return rows


def _difference(after: Figure, before: Figure | None) -> Estimate | None:
    if before is None or before.by_item is None or after.by_item is None:
        return None
    return paired_difference(after.by_item, before.by_item, shares=after.form == "share")


def _value(figure: Figure) -> Estimate:
    return figure.estimate or Estimate(figure.value, None, None, 0)


def _remarks(after: TaskResult, before: TaskResult | None) -> list[str]:
    """What a reader must know beside the figure."""
    said: list[str] = []
    if after.items < after.of:
        said.append(f"limited: {after.items:,} of {after.of:,} items")
    for when, result in (("before", before), ("after", after)):
        if result is None:
            continue
        mark = "" if before is None else f"{when}: "
        said += [f"{mark}{count:,} unanswered ({reason})" for reason, count in result.unanswered.items()]
        if result.cut:
            said.append(f"{mark}{result.cut:,} cut off")
    return said


def summary(after: Evaluation, before: Evaluation | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, for metrics.json (`metrics.plain` makes JSON of it): both evaluations, the rows, the settings."""
    return {
        "settings": dict(settings),
        "method": METHOD,
        "models": {when: _evaluation(each) for when, each in (("before", before), ("after", after)) if each is not None},
        "rows": [_fields(row) | {"limited": row.limited} for row in side_by_side(after, before)],
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return _fields(evaluation) | {"seconds": round(evaluation.seconds, 1), "tasks": list(map(_task, evaluation.tasks))}


def _task(task: TaskResult) -> dict[str, Any]:
    """Without its items and what was asked first, which the evaluation has as the model read it."""
    told = _fields(task) | {"figures": {figure.metric: figure.value for figure in task.figures}}
    del told["first"]
    return told


def _fields(item: Row | TaskResult | Evaluation) -> dict[str, Any]:
    """Not asdict: that copies every item's figures."""
    return {name: getattr(item, name) for name in item.__dataclass_fields__}
