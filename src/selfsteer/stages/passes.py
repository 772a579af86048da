"""Does the aligned policy follow its principles unasked? Held-out queries are answered, and code checks the answers.

    7-checks/data.parquet    a query a row: three answers, and why they do not pass

    before      by the policy that the run began with, given the bare query
    after       by the aligned policy, given the bare query
    prompted    by the policy that the run began with, given the query under its good principle: what there is to win

A check counts words and does not read them: each answer is also scored by the policy that the run began with, given the
query under its good principle. What that model would hardly say when told to keeps to the principle in form only.

Only queries whose principle has checks are answered; a query's three answers share a sampling seed. Left out on purpose:
judges (`answers.py`), and benchmarks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

from selfsteer.engines.base import Request
from selfsteer.judges.checks import checks_of
from selfsteer.measures.estimates import known, mean_estimate, paired_difference, share_estimate
from selfsteer.measures.metrics import CheckedAnswers, ComparedAnswers
from selfsteer.pairs import answer_pair
from selfsteer.recipe.engines import sampling_identity
from selfsteer.records import Checkpoint, Dropped, Pair, Response
from selfsteer.stages.base import Round, Work, arithmetic, inputs_of, make_stage, policy_scorer, taking
from selfsteer.stages.drawing import draw, held_out
from selfsteer.stages.responses import answer_request, answers_to, sample_answers
from selfsteer.stages.status import PASSES, PRINCIPLES
from selfsteer.stages.training import model_of
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage, borrow
from selfsteer.training.scoring import score_missing, scores

Which = Literal["before", "after", "prompted"]
WHICH: tuple[Which, ...] = ("before", "after", "prompted")


def passes_stage(round: Round, policy: Stage) -> Stage | None:
    """Held-out queries answered by the first and the aligned policy, and checked; None where the recipe asks for none."""
    recipe = round.recipe
    if recipe.quality.answers == 0:
        return None
    principles = round.folder.stage(round.number, PRINCIPLES)
    settings = {
        "responses": recipe.responses.steered.model_dump(),
        "answers": recipe.quality.answers,
        "holdout": recipe.queries.holdout,
        "seed": recipe.seed,
        **sampling_identity(recipe.engine),
    }
    settings |= arithmetic(recipe.training)
    inputs = inputs_of(round, principles=principles, aligned=policy) | {"first policy": round.first.digest}
    if round.number > 1:  # what the first policy has answered already
        borrow(round.folder.stage(round.number, PASSES), [round.folder.stage(1, PASSES)])
    origin = Origin(settings=settings, inputs=inputs)
    return make_stage(round, PASSES, origin, lambda work: _answers(round, work, principles, model_of(policy)))


def require_answerable(round: Round, principles: Stage) -> None:
    """Raises ValueError, before anything is answered, where no held-out query has checks and the recipe asks for answers."""
    if round.recipe.quality.answers and not round.held_out_only:
        _held_out_rows(round, principles)


def _answers(round: Round, work: Work, principles: Stage, aligned: Checkpoint) -> Contents:
    rows = _held_out_rows(round, principles)
    asked = [_requests(round, row, aligned) for row in rows]
    first: tuple[Which, ...] = ("before", "prompted")
    sample_answers(round, work, round.first, [each[which] for which in first for each in asked], whose="first")
    sample_answers(round, work, aligned, [each["after"] for each in asked], whose="aligned")
    found = {row["query_id"]: answers_to(work.journal, row["query_id"], each) for row, each in zip(rows, asked, strict=True)}
    scorer = policy_scorer(round)._replace(model=round.first)
    groups = {
        row["query_id"]: scorer.group(_told(round, row, answers))
        for row in rows
        if not isinstance(answers := found[row["query_id"]], Dropped)
    }
    score_missing(scorer, groups.values(), work.journal, description="log-probabilities of the answers", total=len(groups))

    def answered() -> Iterator[dict[str, Any] | Dropped]:
        for row in rows:
            answers = found[row["query_id"]]
            if isinstance(answers, Dropped):
                yield Dropped(id=row["query_id"], reason="no answer")
                continue
            checks = checks_of(columns.principles(row).checks)
            why_not = {f"{which}_why_not": [check.why_not(answers[which].text) for check in checks] for which in WHICH}
            after, before = scores(work.journal, groups[row["query_id"]])
            sides = {"before": before.chosen, "after": after.chosen, "prompted": after.rejected}
            told = {f"{which}_told": side.score.mean_logps for which, side in sides.items()}
            yield {**row, **{which: columns.response_columns(answers[which]) for which in WHICH}, **why_not, **told}

    measures = taking(answers=lambda: _measured(list(work.stage.written())))
    return Contents(wanted=len(rows), rows=answered(), schema=columns.ANSWERS, measures=measures)


def _told(round: Round, row: dict[str, Any], found: Mapping[str, Response]) -> list[Pair]:
    """Given the principle, the bare answers each beside the prompted one, because pairs are what is scored."""
    query = columns.query(row)
    steered = round.prompts.steer(query.messages, columns.principles(row).good_message)
    return [replace(answer_pair(query, found[bare], found["prompted"]), prompt=steered) for bare in ("after", "before")]


def _requests(round: Round, row: dict[str, Any], aligned: Checkpoint) -> dict[str, Request]:
    query, good = columns.query(row), columns.principles(row).good_message
    return {
        "before": answer_request(round, round.first, query),
        "after": answer_request(round, aligned, query),
        "prompted": answer_request(round, round.first, query, good),
    }


def _held_out_rows(round: Round, principles: Stage) -> list[dict[str, Any]]:
    """The stage-1 rows to answer. Raises ValueError where no held-out query has a principle with checks."""
    spared = held_out(round)
    rows = [row for row in principles.rows() if row["query_id"] in spared and row["principles"]["checks"]]
    if not rows:
        raise ValueError(
            f"quality.answers: none of the {len(spared)} held-out queries has a principle with checks; raise"
            " queries.holdout, or give more principles checks"
        )
    drawn = draw(round, {row["query_id"] for row in rows}, round.recipe.quality.answers)
    return [row for row in rows if row["query_id"] in drawn]


# --- what they say ---------------------------------------------------------------------------------------------------------


def query_passes(stage: Stage) -> dict[Which, dict[str, float]]:
    """1 or 0 of each query whose answer passes all checks."""
    rows = list(stage.rows())
    return {which: {row["query_id"]: float(_passes(row[f"{which}_why_not"])) for row in rows} for which in WHICH}


def _measured(rows: list[dict[str, Any]]) -> CheckedAnswers:
    by_check: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for place, check in enumerate(row["principles"]["checks"]):
            by_check[check].append({**row, "place": place})
    frequent = Counter({check: len(found) for check, found in by_check.items()}).most_common()
    return CheckedAnswers(
        queries=len(rows),
        passing=_compared(rows, lambda row, which: _passes(row[f"{which}_why_not"])),
        told=_compared(rows, lambda row, which: row[f"{which}_told"], shares=False),
        checks=[
            {"check": check, **_compared(by_check[check], lambda row, which: _why_not(row, which) is None)}
            for check, _ in sorted(frequent, key=lambda item: (-item[1], item[0]))
        ],
        truncated=_compared(rows, lambda row, which: row[which]["finish_reason"] == "length"),
    )


def _passes(reasons: list[str | None]) -> bool:
    return all(reason is None for reason in reasons)


def _why_not(row: Mapping[str, Any], which: Which) -> str | None:
    return row[f"{which}_why_not"][row["place"]]


def _compared(
    rows: list[dict[str, Any]], value: Callable[[Mapping[str, Any], Which], float], *, shares: bool = True
) -> ComparedAnswers:
    """shares: each value is 1 or 0."""
    values = {which: {row["query_id"]: float(value(row, which)) for row in rows} for which in WHICH}
    each = {which: list(found.values()) for which, found in values.items()}
    found = {
        **{which: share_estimate(int(sum(own)), len(own)) if shares else mean_estimate(own) for which, own in each.items()},
        "change": paired_difference(values["after"], values["before"], shares=shares),
        "gap": paired_difference(values["prompted"], values["after"], shares=shares),
    }
    return cast(ComparedAnswers, known(found))
