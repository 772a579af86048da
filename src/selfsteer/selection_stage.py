"""Between the measures of a round's pairs and the alignment: which of the pairs align the policy, where the recipe selects.

    5-selection/data.parquet    those kept, some turned round or put together of several samples; dropped.jsonl the others

Wanted are the pairs of stage 5 that are not held out. Left out on purpose: the rules (`selection.py`), and measuring.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, cast

from selfsteer import schemas
from selfsteer.judging import RecipeJudge, ask, find_judge
from selfsteer.models import checkpoint
from selfsteer.pairs import similarity
from selfsteer.quality import ScoredPair, reference_scores
from selfsteer.records import Dropped, PairRow
from selfsteer.reference import Group, score_missing, scores
from selfsteer.selection import Ranked, Sample, best_and_near_worst, is_near, prefer_shorter, reject_reason, top_share
from selfsteer.sharing import borrow
from selfsteer.stages import Round, Work, arithmetic, held_out, inputs_of, make_stage, policy_as_judge
from selfsteer.store import Contents, Origin, Stage
from selfsteer.training_stages import MODEL, Generators
from selfsteer.verdicts import by_margin

SELECTION = "5-selection"


class Candidates(NamedTuple):
    """A round's pairs, and what they can be scored with."""

    preferences: Stage
    quality: Stage | None = None
    """The judge's verdicts on some of them."""
    generators: Generators | None = None
    """What made them; None of the policy's own pairs and of given ones."""


def selection_stage(round: Round, candidates: Candidates) -> Stage:
    """The pairs that align the policy: those of stage 5 as they are, where the recipe selects none."""
    section = round.recipe.selection
    if not section.active:
        return candidates.preferences
    inputs = inputs_of(round, preferences=candidates.preferences)
    settings: dict[str, Any] = {
        "selection": section.model_dump(),
        "filters": round.recipe.filters.model_dump(include={"near_identical", "max_length_ratio"}),
        "holdout": round.recipe.queries.holdout,
        **arithmetic(round.recipe.training),
    }
    rank = _by_generator(round, candidates)
    if section.by == "judge":
        judge = find_judge(round.recipe.judge, round.recipe.policy)
        assert judge is not None, "checked when the recipe was read"
        inputs |= judge.inputs()
        settings["judge"] = judge.settings()
        rank = _by_judge(candidates, judge, held_out(round))
        if candidates.quality is not None:  # what it has said already
            borrow(round.folder.stage(round.number, SELECTION), [candidates.quality])
    else:
        assert candidates.generators is not None, "checked at the start"
        inputs |= inputs_of(round, generator=candidates.generators.good)
        settings["beta"] = round.recipe.generator.beta
    origin = Origin(settings=settings, inputs=inputs)
    return make_stage(round, SELECTION, origin, lambda work: _selected(round, work, candidates, lambda: rank(work)))


Rank = Callable[[Work], Iterator[Ranked | Dropped]]
"""Each pair with its verdict, in order, or why it can't have one; of several samples, the pair that was made of them."""


def _selected(
    round: Round, work: Work, candidates: Candidates, ranked: Callable[[], Iterator[Ranked | Dropped]]
) -> Contents:
    section = round.recipe.selection
    bound = section.min_margin
    if section.top_share is not None:
        margins = [item.margin for item in ranked() if isinstance(item, Ranked) and item.margin is not None]
        bound = top_share(margins, section.top_share) if margins else None
    dropped: list[Dropped] = []

    def rows() -> Iterator[PairRow]:
        for item in ranked():
            if isinstance(item, Dropped):
                dropped.append(item)
            elif (reason := reject_reason(item, section, bound)) is not None:
                dropped.append(Dropped(id=item.row["query_id"], reason=reason))
            elif is_near(item, section):
                yield prefer_shorter(item.row)
            else:
                yield item.row

    wanted = sum(1 for _ in _lessons(candidates.preferences, held_out(round)))
    return Contents(wanted=wanted, rows=rows(), dropped=dropped, schema=schemas.PAIRS)


def _lessons(preferences: Stage, spared: frozenset[str]) -> Iterator[dict[str, Any]]:
    return (row for row in preferences.rows() if row["query_id"] not in spared)


def _by_judge(candidates: Candidates, judge: RecipeJudge, spared: frozenset[str]) -> Rank:
    def lessons() -> Iterator[dict[str, Any]]:
        return _lessons(candidates.preferences, spared)

    def rank(work: Work) -> Iterator[Ranked]:
        total = sum(1 for _ in lessons())
        verdicts = ask(judge, lambda: map(schemas.pair, lessons()), work.journal, total=total)
        return (Ranked(cast(PairRow, row), verdict) for row, verdict in zip(lessons(), verdicts, strict=True))

    return rank


def _by_generator(round: Round, candidates: Candidates) -> Rank:
    """By the implicit reward of the generator (of two, the one of the chosen responses)."""

    def rank(work: Work) -> Iterator[Ranked | Dropped]:
        assert candidates.generators is not None
        model = checkpoint(candidates.generators.good.path / MODEL)
        judge = policy_as_judge(round)._replace(model=model)
        spared = held_out(round)

        def groups() -> Iterator[tuple[list[PairRow], Group]]:
            for _, each in groupby(_lessons(candidates.preferences, spared), key=lambda row: row["query_id"]):
                rows = list(each)
                yield cast("list[PairRow]", rows), judge.group([schemas.pair(row) for row in rows])

        total = len({row["query_id"] for row in _lessons(candidates.preferences, spared)})
        every_group = (group for _, group in groups())
        score_missing(judge, every_group, work.journal, description="implicit rewards of the generator", total=total)
        for rows, group in groups():
            found = [_rewards(row, after, round.recipe.generator.beta) for row, after in _scored(rows, work, group)]
            if round.recipe.selection.samples > 1:
                yield from _of_samples(round, rows, found)
            else:
                for row, rewards in zip(rows, found, strict=True):
                    yield _ranked(row, rewards.chosen - rewards.rejected)

    return rank


def _scored(rows: list[PairRow], work: Work, group: Group) -> Iterator[tuple[PairRow, ScoredPair]]:
    return zip(rows, scores(work.journal, group), strict=True)


class _Rewards(NamedTuple):
    chosen: float
    rejected: float


def _rewards(row: PairRow, after: ScoredPair, beta: float) -> _Rewards:
    before = reference_scores(row)
    assert before is not None, "stage 5 has scored its pairs"
    return _Rewards(*(beta * (now.logps - then.logps) for now, then in zip(after, before, strict=True)))


def _ranked(row: PairRow, margin: float) -> Ranked:
    return Ranked(row, by_margin(schemas.pair(cast("dict[str, Any]", row)), margin))


def _of_samples(round: Round, rows: list[PairRow], rewards: list[_Rewards]) -> Iterator[Ranked | Dropped]:
    """The one pair of a query's samples, and a drop for each of the others."""
    query = rows[0]["query_id"]
    within = round.recipe.selection.shorter_within or 0.0
    good = [Sample(each.chosen, row.get("chosen_tokens") or 0) for row, each in zip(rows, rewards, strict=True)]
    bad = [Sample(each.rejected, row.get("rejected_tokens") or 0) for row, each in zip(rows, rewards, strict=True)]
    picked = best_and_near_worst(good, bad, within=within)
    if picked is None:
        reason = "no bad sample scores below the good ones"
    else:
        row = _joined(rows[picked.chosen], rows[picked.rejected])
        reason = _misfit(round, row)
        if reason is None:
            yield _ranked(row, good[picked.chosen].score - bad[picked.rejected].score)
    lost = "other samples were taken" if reason is None else reason
    for _ in rows if reason is not None else rows[1:]:
        yield Dropped(id=query, reason=lost)


def _joined(chosen: PairRow, rejected: PairRow) -> PairRow:
    """The chosen response of one pair and the rejected one of another."""
    values, others = cast("dict[str, Any]", chosen), cast("dict[str, Any]", rejected)
    return cast(PairRow, {key: others[key] if "rejected" in key else value for key, value in values.items()})


def _misfit(round: Round, row: PairRow) -> str | None:
    """What the filters have against these two together; each of them they have let pass."""
    filters = round.recipe.filters
    shorter, longer = sorted((row.get("chosen_tokens") or 1, row.get("rejected_tokens") or 1))
    if longer > filters.max_length_ratio * shorter:
        return "length ratio"
    texts = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
    return "near-identical responses" if similarity(*texts) >= filters.near_identical else None
