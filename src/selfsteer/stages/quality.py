"""What judges say about a round's pairs, sealed before the policy is aligned on them.

    5-quality/verdicts.parquet      a row a judge and pair     5-quality/contamination.json     overlap of the queries

Judged are the alignment pairs and, beside a generator, the policy's own pairs (PBAA), on at most `quality.sample` queries
each. Left out on purpose: how judges judge (`judges.py`, `self_judges.py`), and what follows (`gates.py`, `summary.py`).
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pyarrow as pa

from selfsteer.judges.find import RecipeJudge, ask
from selfsteer.judges.implicit import consistency_verdicts
from selfsteer.measures.contamination import contamination, overlaps, read_evaluation
from selfsteer.measures.estimates import Estimate
from selfsteer.measures.metrics import Contamination, plain
from selfsteer.measures.verdicts import JudgeReport, Orders, Verdict, judge_report, unanswered
from selfsteer.records import Pair, Query
from selfsteer.stages.base import (
    Round,
    Work,
    arithmetic,
    draw,
    held_out,
    inputs_of,
    kept,
    make_stage,
    policy_as_judge,
    read_measures,
    write_measures,
)
from selfsteer.stages.status import QUALITY, is_judged
from selfsteer.stages.steering import policy_pairs
from selfsteer.store import columns
from selfsteer.store.durable import canonical_json, file_digest, replacing
from selfsteer.store.folder import Contents, Origin, Stage

log = logging.getLogger(__name__)

VERDICTS, _CONTAMINATION = "verdicts.parquet", "contamination.json"

DataSet = Literal["pbaa", "alignment"]
"""As in `RoundMetrics`."""

JudgeName = Literal["judge", "principle_consistency"]
"""As in `Measures`."""

VERDICT_SCHEMA = pa.schema(
    [
        ("pairs", pa.string()),
        ("by", pa.string()),
        ("query_id", pa.string()),
        ("preferred", pa.string()),
        ("longer", pa.string()),
        ("chosen_first", pa.float64()),
        ("chosen_second", pa.float64()),
        ("mass", pa.float64()),
        ("margin", pa.float64()),
        ("error", pa.string()),
    ]
)


def quality_stage(
    round: Round, preferences: Stage, steering: Stage | None = None, *, principles: bool = True
) -> Stage | None:
    """Verdicts on the pairs of stage 5, and of stage 3 where there is one; None where the recipe asks for none."""
    recipe = round.recipe
    if not is_judged(recipe, principles=principles):
        return None
    judge = round.judge
    files = {f"evaluation {number}": file_digest(Path(file)) for number, file in enumerate(recipe.quality.evaluation_files)}
    inputs = inputs_of(round, preferences=preferences) | files
    if steering is not None:
        inputs |= inputs_of(round, steering=steering)
    if judge is not None:
        inputs |= judge.inputs()
    settings = {
        "principle_consistency": recipe.quality.principle_consistency and principles,
        "judge": None if judge is None else judge.settings(),
        "sample": recipe.quality.sample,
        "holdout": recipe.queries.holdout,
        "seed": recipe.seed,
        **arithmetic(recipe.training),
    }
    # In stage 5 of a run without a generator stand the policy's own pairs.
    sets: dict[DataSet, Callable[[], Iterator[dict[str, Any]]]] = {}
    if steering is not None:
        sets["pbaa"] = lambda: policy_pairs(steering)
    sets["pbaa" if recipe.generator.kind == "none" and principles else "alignment"] = preferences.rows
    task = _Task(judge, bool(settings["principle_consistency"]), sets)
    origin = Origin(settings=settings, inputs=inputs)
    reopen_unanswered(round.folder.stage(round.number, QUALITY), origin)
    return make_stage(round, QUALITY, origin, lambda work: _quality(round, work, preferences, task))


def reopen_unanswered(stage: Stage, origin: Origin) -> None:
    """Unseal judged pairs of which the judge has not answered some: it is asked again for those, and for no others."""
    if not stage.is_current(origin.fingerprint):
        return
    stage.verify()
    if any(unanswered(report) for judges in read_reports(stage).values() for report in judges.values()):
        log.info("%s: the judge left pairs unanswered; it is asked again for those", stage.path.name)
        stage.reopen()


class _Task(NamedTuple):
    judge: RecipeJudge | None
    consistency: bool
    sets: Mapping[DataSet, Callable[[], Iterator[dict[str, Any]]]]


def _quality(round: Round, work: Work, preferences: Stage, task: _Task) -> Contents:
    found = (
        verdict_row(name, by, verdict)
        for name, rows in task.sets.items()
        for by, verdicts in _judged(round, work, rows, task)
        for verdict in verdicts
    )
    files = [*write_verdicts(work.stage, found)]
    if round.recipe.quality.evaluation_files:
        _write_contamination(work.stage.path / _CONTAMINATION, round.recipe.quality.evaluation_files, preferences)
        files.append(_CONTAMINATION)
    return Contents(wanted=kept(preferences), files=tuple(files))


def _judged(
    round: Round, work: Work, rows: Callable[[], Iterator[dict[str, Any]]], task: _Task
) -> Iterator[tuple[JudgeName, Iterator[Verdict]]]:
    """The verdicts of every judge on one set of pairs."""
    ids = {row["query_id"] for row in rows()}
    # Beside a generator the policy's own pairs are of the queries that trained it: of those none is held out.
    drawn = draw(round, ids & held_out(round) or ids, round.recipe.quality.sample)

    def chosen() -> Iterator[dict[str, Any]]:
        return (row for row in rows() if row["query_id"] in drawn)

    def pairs() -> Iterator[Pair]:
        return map(columns.pair, chosen())

    total = sum(1 for _ in chosen())
    if task.consistency:
        both = consistency_verdicts(policy_as_judge(round), pairs, work.journal, total=total)
        yield "principle_consistency", (each.summed for each in both)
    if task.judge is not None:
        yield "judge", ask(task.judge, pairs, work.journal, total=total)


def verdict_row(name: DataSet, by: JudgeName, verdict: Verdict) -> dict[str, Any]:
    """A row of `VERDICT_SCHEMA`."""
    orders = verdict.orders
    return {
        "pairs": name,
        "by": by,
        "query_id": verdict.query_id,
        "preferred": verdict.preferred,
        "longer": verdict.longer,
        "chosen_first": None if orders is None else orders.chosen_first,
        "chosen_second": None if orders is None else orders.chosen_second,
        "mass": verdict.mass,
        "margin": verdict.margin,
        "error": verdict.error,
    }


def write_verdicts(stage: Stage, rows: Iterator[dict[str, Any]]) -> tuple[str, ...]:
    """The verdicts and what they say, as files to be sealed."""
    columns.write_rows(stage.path / VERDICTS, rows, VERDICT_SCHEMA)
    found = read_verdicts(stage).items()
    reports = {name: {by: judge_report(verdicts) for by, verdicts in judges.items()} for name, judges in found}
    return (VERDICTS, write_measures(stage, {"reports": reports}))


def read_verdicts(stage: Stage) -> dict[DataSet, dict[JudgeName, list[Verdict]]]:
    """The sealed verdicts, by set of pairs and judge."""
    found: defaultdict[DataSet, defaultdict[JudgeName, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    for row in columns.file_rows(stage.path / VERDICTS):
        orders = None if row["chosen_first"] is None else Orders(row["chosen_first"], row["chosen_second"])
        fields = {key: row[key] for key in ("query_id", "preferred", "longer", "mass", "margin", "error")}
        found[row["pairs"]][row["by"]].append(Verdict(orders=orders, **fields))
    return {name: dict(judges) for name, judges in found.items()}


def read_reports(stage: Stage) -> dict[DataSet, dict[JudgeName, JudgeReport]]:
    """What the sealed verdicts say."""
    return read_measures(stage)["reports"]


# --- contamination ---------------------------------------------------------------------------------------------------------


def _write_contamination(path: Path, files: Iterable[str], preferences: Stage) -> None:
    evaluation = read_evaluation([Path(file) for file in files])
    pairs = map(columns.pair, preferences.rows())
    found = [list(overlaps(Query(id=pair.query_id, messages=pair.prompt), evaluation)) for pair in pairs]
    measure = contamination(found)
    assert measure is not None, "a sealed stage 5 has rows"
    rows_named = [overlap._asdict() for each in found for overlap in each]
    with replacing(path) as file:
        file.write(canonical_json({**plain(measure), "overlaps": rows_named}))


def read_contamination(stage: Stage) -> Contamination | None:
    """The sealed measure, None where the recipe names no evaluation files."""
    path = stage.path / _CONTAMINATION
    if not path.exists():
        return None
    found = json.loads(path.read_bytes())
    return Contamination(share=Estimate(**found["share"]), files=cast("dict[str, int]", found["files"]))
