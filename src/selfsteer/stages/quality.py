"""What judges say about a round's pairs, sealed before the policy is aligned on them.

    5-quality/verdicts.parquet      a row a judge and pair     5-quality/contamination.json     overlap of the queries
    5-quality/checks.parquet        with judge.kind checks, a row a pair: why either response does not pass

Judged are the alignment pairs and, beside a generator, the policy's own pairs (PBAA), on at most `quality.sample` queries
each; by checks the steering pairs, too. Left out on purpose: how judges judge (`judges/`), and what follows.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast

from selfsteer.judges.base import RecipeJudge
from selfsteer.judges.checks import checks_of, checks_verdicts
from selfsteer.judges.find import ask
from selfsteer.judges.implicit import consistency_verdicts
from selfsteer.measures.checks import CheckReport, Outcome, Passes, check_report, why_not
from selfsteer.measures.contamination import contamination, overlaps, read_evaluation
from selfsteer.measures.estimates import Estimate, share_of
from selfsteer.measures.metrics import Contamination, plain
from selfsteer.measures.verdicts import (
    JudgedComparison,
    JudgeReport,
    Orders,
    Verdict,
    judge_report,
    judged_comparison,
    unanswered,
)
from selfsteer.recipe.sections import Recipe
from selfsteer.records import Pair, Principles, Query
from selfsteer.stages.base import (
    Round,
    Work,
    arithmetic,
    inputs_of,
    kept,
    make_stage,
    policy_scorer,
    read_measures,
    sealed,
    write_measures,
)
from selfsteer.stages.drawing import draw, held_out
from selfsteer.stages.principles import concision_pairs, load_pool
from selfsteer.stages.status import QUALITY, by_checks, is_judged
from selfsteer.stages.steering import POLICY_PAIRS, policy_pairs
from selfsteer.store import columns
from selfsteer.store.durable import canonical_json, file_digest, read_json, write
from selfsteer.store.folder import Contents, Origin, Stage

log = logging.getLogger(__name__)

VERDICTS, CHECKS, _CONTAMINATION = "verdicts.parquet", "checks.parquet", "contamination.json"

DataSet = Literal["pbaa", "steering", "alignment"]
"""As in `RoundMetrics`."""

JudgeName = Literal["judge", "principle_consistency"]
"""As in `Measures`."""


class Reports(TypedDict):
    """What the stage has measured."""

    reports: dict[DataSet, dict[JudgeName, JudgeReport]]
    comparisons: dict[JudgeName, JudgedComparison | None]
    """The alignment pairs' verdicts against PBAA's; None where they have no query in common."""
    checks: dict[DataSet, CheckReport]
    """Empty where the recipe's judge is another."""


Rows = Callable[[], Iterator[dict[str, Any]]]
"""The rows that are judged, each time from the beginning."""


class Pairs(NamedTuple):
    """A set of pairs of which some are judged."""

    queries: Callable[[], Iterable[str]]
    """The ids of all."""
    rows: Callable[..., Iterator[dict[str, Any]]]
    """Their rows; with `of`, those of these queries."""


def require_checks(recipe: Recipe, *, principles: bool) -> None:
    """Raises ValueError, before anything is sampled, where code is to judge and has nothing to go by.

    principles: the pairs will come with the principles they were sampled under.
    """
    if recipe.judge.kind != "checks":
        return
    need = "judge.kind: checks needs principles that carry checks"
    if not principles:
        raise ValueError(
            f"{need}, and pairs made elsewhere carry no principles; set judge.kind to none, llm or reward_model"
        )
    if recipe.principles.source == "generate":
        raise ValueError(f"{need}, and a model writes none; set principles.source=file and principles.path (docs/checks.md)")
    pool = load_pool(recipe.principles)
    if not any(pair.checks for pair in (*pool.pairs, *pool.own.values())):
        where = recipe.principles.path or "the library"
        raise ValueError(
            f'{need}, and none of {where} does; add "check" to its pairs (docs/checks.md), or set judge.kind=none'
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
        "judge": "checks" if by_checks(recipe, principles=principles) else None if judge is None else judge.settings(),
        "sample": recipe.quality.sample,
        "holdout": recipe.queries.holdout,
        "seed": recipe.seed,
        **arithmetic(recipe.training),
    }
    # In stage 5 of a run without a generator stand the policy's own pairs.
    sets: dict[DataSet, Pairs] = {}
    if steering is not None:
        own = partial(columns.column, steering.path / POLICY_PAIRS, "query_id")
        sets["pbaa"] = Pairs(own, partial(policy_pairs, steering))
    name = "pbaa" if recipe.generator.kind == "none" and principles else "alignment"
    sets[name] = Pairs(partial(preferences.column, "query_id"), preferences.rows)
    task = _Task(judge, bool(settings["principle_consistency"]), by_checks(recipe, principles=principles), sets)
    if task.checks and steering is not None and recipe.generator.objective != "l_minus":
        original = recipe.generator.objective == "sso"
        rows = partial(_steering_rows, steering, original=original)
        sets["steering"] = Pairs(partial(steering.column, "query_id"), rows)
    origin = Origin(settings=settings, inputs=inputs)
    reopen_unanswered(round.folder.stage(round.number, QUALITY), origin)
    stage = make_stage(round, QUALITY, origin, lambda work: _quality(round, work, preferences, task))
    if task.checks:
        _warn_of_useless(read_reports(stage)["checks"])
    return stage


def reopen_unanswered(stage: Stage, origin: Origin) -> None:
    """Unseal judged pairs of which the judge has not answered some: it is asked again for those, and for no others."""
    if not stage.is_current(origin.fingerprint):
        return
    stage.verify()
    if any(unanswered(report) for judges in read_reports(stage)["reports"].values() for report in judges.values()):
        log.info("%s: the judge left pairs unanswered; it is asked again for those", stage.path.name)
        stage.reopen()


class _Task(NamedTuple):
    judge: RecipeJudge | None
    consistency: bool
    checks: bool
    sets: Mapping[DataSet, Pairs]


def _quality(round: Round, work: Work, preferences: Stage, task: _Task) -> Contents:
    drawn: dict[DataSet, Rows] = {name: _drawn(round, pairs) for name, pairs in task.sets.items()}
    found = (
        verdict_row(name, by, verdict)
        for name, rows in drawn.items()
        for by, verdicts in _judged(round, work, name, rows, task)
        for verdict in verdicts
    )
    files: list[str] = []
    if task.checks:
        checked = (check_row(name, row) for name, rows in drawn.items() for row in rows())
        columns.write_rows(work.stage.path / CHECKS, checked, columns.CHECKS)
        files.append(CHECKS)
    files += write_verdicts(work.stage, found, checks=_checked(work.stage) if task.checks else {})
    if round.recipe.quality.evaluation_files:
        _write_contamination(work.stage.path / _CONTAMINATION, round.recipe.quality.evaluation_files, preferences)
        files.append(_CONTAMINATION)
    return Contents(wanted=kept(preferences), files=tuple(files))


def _drawn(round: Round, pairs: Pairs) -> Rows:
    """Those that are judged."""
    ids = set(pairs.queries())
    # Of the steering pairs, and where nothing is held out, all are of queries that were trained on.
    drawn = draw(round, ids & held_out(round) or ids, round.recipe.quality.sample)
    return partial(pairs.rows, of=drawn)


def _judged(
    round: Round, work: Work, name: DataSet, rows: Rows, task: _Task
) -> Iterator[tuple[JudgeName, Iterator[Verdict]]]:
    """The verdicts of every judge on one set of pairs."""

    def pairs() -> Iterator[Pair]:
        return map(columns.pair, rows())

    total = sum(1 for _ in rows())
    if task.checks:
        yield "judge", checks_verdicts(pairs())
    if task.consistency and name != "steering":
        yield "principle_consistency", consistency_verdicts(policy_scorer(round), pairs, work.journal, total=total)
    if task.judge is not None:
        yield "judge", ask(task.judge, pairs, work.journal, total=total)


def verdict_row(name: DataSet, by: JudgeName, verdict: Verdict) -> dict[str, Any]:
    """A row of `columns.VERDICTS`."""
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


def write_verdicts(stage: Stage, rows: Iterator[dict[str, Any]], **more: object) -> tuple[str, ...]:
    """The verdicts and what they say, as files to be sealed. more: what else the stage measured, by name."""
    columns.write_rows(stage.path / VERDICTS, rows, columns.VERDICTS)
    found = read_verdicts(stage)
    reports = {name: {by: judge_report(verdicts) for by, verdicts in judges.items()} for name, judges in found.items()}
    ours, theirs = found.get("alignment", {}), found.get("pbaa", {})
    comparisons = {by: judged_comparison(verdicts, theirs.get(by, ())) for by, verdicts in ours.items()}
    measures = {"reports": reports, "comparisons": comparisons, **more}
    return (VERDICTS, write_measures(stage, measures))


def read_verdicts(stage: Stage) -> dict[DataSet, dict[JudgeName, list[Verdict]]]:
    """The sealed verdicts, by set of pairs and judge."""
    found: defaultdict[DataSet, defaultdict[JudgeName, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    for row in columns.file_rows(stage.path / VERDICTS):
        orders = None if row["chosen_first"] is None else Orders(row["chosen_first"], row["chosen_second"])
        fields = {key: row[key] for key in ("query_id", "preferred", "longer", "mass", "margin", "error")}
        found[row["pairs"]][row["by"]].append(Verdict(orders=orders, **fields))
    return {name: dict(judges) for name, judges in found.items()}


def read_reports(stage: Stage) -> Reports:
    """What the sealed verdicts and checks say."""
    return cast(Reports, read_measures(stage))


# --- checks ----------------------------------------------------------------------------------------------------------------


def _steering_rows(steering: Stage, *, of: Collection[str], original: bool) -> Iterator[dict[str, Any]]:
    """The pairs of L+, y+ above y-; with `original`, y_o of the same query beside them, which L- has as its chosen one."""
    for _, rows in groupby(steering.rows(of=of), key=lambda row: row["query_id"]):
        halves = {row["kind"]: row for row in rows}
        row = halves["l_plus"]
        yield {**row, "original": halves["l_minus"]["chosen"][-1]["content"]} if original else row


def check_row(name: DataSet, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `columns.CHECKS`."""
    pair = columns.pair(row)
    assert pair.principles is not None, "pairs made elsewhere are not checked"
    checks = checks_of(pair.principles.checks)
    return {
        "pairs": name,
        "query_id": pair.query_id,
        "principle": _without_concision(pair.principles),
        "checks": list(pair.principles.checks),
        "chosen_why_not": why_not(checks, pair.chosen.text),
        "rejected_why_not": why_not(checks, pair.rejected.text),
        "original_passes": why_not(checks, row["original"]) is None if checks and "original" in row else None,
    }


def _without_concision(principles: Principles) -> str:
    """The good principle as its file has it."""
    added = [pair.good for pair in concision_pairs() if principles.concision and principles.good.endswith(pair.good)]
    return principles.good.removesuffix(added[0]).rstrip() if added else principles.good


def _checked(stage: Stage) -> dict[DataSet, CheckReport]:
    outcomes: defaultdict[DataSet, list[Outcome]] = defaultdict(list)
    originals: defaultdict[DataSet, list[bool]] = defaultdict(list)
    for row in columns.file_rows(stage.path / CHECKS):
        found = Passes(row["chosen_why_not"] is None, row["rejected_why_not"] is None) if row["checks"] else None
        outcomes[row["pairs"]].append(Outcome(row["principle"], tuple(row["checks"]), found))
        if row["original_passes"] is not None:
            originals[row["pairs"]].append(row["original_passes"])
    reports: dict[DataSet, CheckReport] = {name: check_report(each) for name, each in outcomes.items()}
    for name, each in originals.items():
        reports[name]["original"] = share_of(sum(each), len(each))
    return reports


def _warn_of_useless(reports: Mapping[DataSet, CheckReport]) -> None:
    for name, report in reports.items():
        for each in report.get("principles", []):
            if "useless" in each:
                log.warning(
                    "the checks of the principle %r tell nothing apart among the %s pairs: %s. Change the principle or its"
                    " check (%s), or leave it out.",
                    each["principle"],
                    name,
                    each["useless"],
                    ", ".join(each["checks"]),
                )


# --- contamination ---------------------------------------------------------------------------------------------------------


def _write_contamination(path: Path, files: Iterable[str], preferences: Stage) -> None:
    evaluation = read_evaluation([Path(file) for file in files])
    pairs = groupby(map(columns.pair, preferences.rows()), key=lambda pair: (pair.query_id, pair.prompt))
    found = [list(overlaps(Query(id=id, messages=prompt), evaluation)) for (id, prompt), _ in pairs]  # once a query
    measure = contamination(found)
    assert measure is not None, "a sealed stage 5 has rows"
    rows_named = [overlap._asdict() for each in found for overlap in each]
    write(path, canonical_json({**plain(measure), "overlaps": rows_named}))


def read_contamination(stage: Stage) -> Contamination | None:
    """The sealed measure, None where the recipe names no evaluation files."""
    if _CONTAMINATION not in sealed(stage).outputs:
        return None
    way_out = f"delete {stage.path / 'MANIFEST.json'} and run the same command again"
    found = read_json(stage.path / _CONTAMINATION, {"share": dict, "files": dict}, way_out=way_out)
    return Contamination(share=Estimate(**found["share"]), files=cast("dict[str, int]", found["files"]))
