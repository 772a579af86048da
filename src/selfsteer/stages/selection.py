"""Between the measures of a round's pairs and the alignment: which of the pairs align the policy, where the recipe selects.

    5-selection/data.parquet    those kept, some turned round or put together of several samples; dropped.jsonl the others

Wanted are the pairs of stage 5 that are not held out. Left out on purpose: measuring.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from selfsteer.judges.checks import checks_verdicts
from selfsteer.judges.find import ask
from selfsteer.measures.quality import Rewards, rewards_of
from selfsteer.measures.text import similarity, words
from selfsteer.measures.verdicts import Verdict, by_margin, no_answer
from selfsteer.recipe.sections import Selection
from selfsteer.records import Dropped, Pair
from selfsteer.stages.base import Round, Work, arithmetic, inputs_of, make_stage, measured, policy_scorer, taking
from selfsteer.stages.drawing import held_out
from selfsteer.stages.status import SELECTION, by_checks
from selfsteer.stages.training import Generators, model_of
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage, borrow
from selfsteer.training.scoring import Group, score_missing, scores


class Ranked(NamedTuple):
    """A pair, and how its responses were scored."""

    pair: Pair
    verdict: Verdict

    @property
    def margin(self) -> float | None:
        """The chosen response's score above the rejected one's; None where there is no verdict."""
        if self.verdict.margin is not None:
            return self.verdict.margin
        probability = self.verdict.probability
        return None if probability is None else 2 * probability - 1


def is_near(ranked: Ranked, section: Selection) -> bool:
    """Whether the two score so alike that their lengths decide."""
    return section.shorter_within is not None and ranked.margin is not None and abs(ranked.margin) <= section.shorter_within


def reject_reason(ranked: Ranked, section: Selection, bound: float | None) -> str | None:
    """Why this pair must not align the policy, or None to keep it. bound: `min_margin`, or that of `top_share`.

    Filtering by a reward model's verdict: arXiv 2404.09824, which finds a tenth more noise in the labels to cost up to
    30 points of win rate. The judge's own errors go with the pairs: see its accuracy on pairs that people have labelled.
    Ties and pairs that it could not judge are kept. Large margins: arXiv 2502.14560 (10% of UltraFeedback did better than
    all of it), and arXiv 2501.15109 with the reference model's own log-probabilities; arXiv 2508.04149 keeps the small
    ones, as the harder lessons.
    """
    if section.drop_reversed and ranked.verdict.preferred == "rejected" and not is_near(ranked, section):
        return "order reversed"
    if bound is None:
        return None
    if ranked.margin is None:
        return "no verdict"
    return "small margin" if ranked.margin < bound else None


def top_share(margins: Sequence[float], share: float) -> float:
    """The margin that `share` of `margins` reach: the smallest of the ceil(share * n) largest.

    Raises ValueError without margins or for a share outside (0, 1].
    """
    if not margins or not 0 < share <= 1:
        raise ValueError(f"cannot keep a share of {share} of {len(margins)} margins; give a share above 0 and at most 1")
    # Less a rounding error: 0.1 of 30 is 3, though 0.1 * 30 is more than 3.
    kept = int(np.ceil(share * len(margins) - 1e-9))
    return sorted(margins, reverse=True)[kept - 1]


def prefer_shorter(pair: Pair) -> Pair:
    """A pair of two responses with close scores, turned round where the rejected one is the shorter one.

    The length control of Meta-Rewarding (arXiv 2407.19594): of close responses the shorter one is chosen. Lengths are tokens
    where the pair knows them, else words.
    """
    chosen, rejected = pair.chosen, pair.rejected
    if chosen.tokens is None or rejected.tokens is None:
        shorter = len(words(rejected.text)) < len(words(chosen.text))
    else:
        shorter = rejected.tokens < chosen.tokens
    return pair.turned() if shorter else pair


class Sample(NamedTuple):
    """One of several responses to a query."""

    score: float
    """Of a judge or a reward model; higher is better."""
    tokens: int


class Picked(NamedTuple):
    """A good and a bad sample, as indices."""

    chosen: int
    rejected: int


def best_and_near_worst(
    good: Sequence[Sample], bad: Sequence[Sample], *, within: float = 0.0, deviations: float = 2.0
) -> Picked | None:
    """The best good sample, and of the bad ones that score lower the nearest to their mean - `deviations` deviations.

    arXiv 2502.16825: with many samples the very worst is too easy, and mean - 2 deviations did best; with few, that lies
    below them all and the worst is taken. (There all samples answer one prompt; here they were asked for in two ways.) Of
    the good samples at most `within` below the best one, the shortest is chosen (arXiv 2407.19594). None where no bad sample
    scores lower than the best good one by more than `within`.
    """
    best = max((sample.score for sample in good), default=-np.inf)
    lower = [index for index, sample in enumerate(bad) if sample.score < best - within]
    if not lower:
        return None
    near_best = [index for index, sample in enumerate(good) if sample.score >= best - within]
    scores = np.array([sample.score for sample in bad])
    target = scores.mean() - deviations * scores.std()
    return Picked(
        chosen=min(near_best, key=lambda index: good[index].tokens),
        rejected=min(lower, key=lambda index: abs(scores[index] - target)),
    )


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
    rank, models = _by_generator(round, candidates), candidates.generators or ()
    lessons = partial(_lessons, candidates.preferences, held_out(round))
    if section.by == "judge" and by_checks(round.recipe):
        settings["judge"] = "checks"
        rank, models = _by_verdicts(lessons, lambda _: checks_verdicts(lessons())), ()
    elif section.by == "judge":
        judge = round.judge
        assert judge is not None, "checked when the recipe was read"
        inputs |= judge.inputs()
        settings["judge"] = judge.settings()

        def asked(work: Work) -> Iterator[Verdict]:
            for verdict in ask(judge, lessons, work.journal, total=sum(1 for _ in lessons())):
                if verdict.error == no_answer():
                    raise OSError(f"{work.stage.path}: the judge has gone; the same command asks it for the rest")
                yield verdict

        rank, models = _by_verdicts(lessons, asked), ()
    else:
        assert candidates.generators is not None, "checked at the start"
        inputs |= inputs_of(round, generator=candidates.generators.good)
        settings["beta"] = round.recipe.generator.beta
    origin = Origin(settings=settings, inputs=inputs)

    def make(work: Work) -> Contents:
        if section.by == "judge" and candidates.quality is not None:  # what it has said already
            borrow(work.stage, [candidates.quality])
            work.journal.reread()
        return _selected(round, work, candidates, lambda: rank(work))

    return make_stage(round, SELECTION, origin, make, models=models)


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

    def rows() -> Iterator[dict[str, Any] | Dropped]:
        for item in ranked():
            if isinstance(item, Dropped):
                yield item
            elif (reason := reject_reason(item, section, bound)) is not None:
                yield Dropped(id=item.pair.query_id, reason=reason)
            elif is_near(item, section):
                yield columns.pair_row(prefer_shorter(item.pair))
            else:
                yield columns.pair_row(item.pair)

    wanted = sum(1 for _ in _lessons(candidates.preferences, held_out(round)))
    measures = taking(pairs=lambda: measured(work.stage.written(columns.TEXTS)))
    return Contents(wanted=wanted, rows=rows(), schema=columns.PAIRS, measures=measures)


def _lessons(preferences: Stage, spared: frozenset[str]) -> Iterator[Pair]:
    return (pair for pair in map(columns.pair, preferences.rows()) if pair.query_id not in spared)


def _by_verdicts(lessons: Callable[[], Iterator[Pair]], judged: Callable[[Work], Iterator[Verdict]]) -> Rank:
    return lambda work: (Ranked(pair, verdict) for pair, verdict in zip(lessons(), judged(work), strict=True))


def _by_generator(round: Round, candidates: Candidates) -> Rank:
    """By the implicit reward of the generator (of two, the one of the chosen responses)."""

    def rank(work: Work) -> Iterator[Ranked | Dropped]:
        assert candidates.generators is not None
        model = model_of(candidates.generators.good)
        scorer = policy_scorer(round)._replace(model=model)
        spared = held_out(round)

        def groups() -> Iterator[Group]:
            return scorer.by_query(_lessons(candidates.preferences, spared))

        total = len({pair.query_id for pair in _lessons(candidates.preferences, spared)})
        score_missing(scorer, groups(), work.journal, description="implicit rewards of the generator", total=total)
        for group in groups():
            # Stage 5 has scored its pairs.
            both = zip(group.pairs, scores(work.journal, group), strict=True)
            found = [rewards_of(pair, after, beta=round.recipe.generator.beta) for pair, after in both]
            if round.recipe.selection.samples > 1:
                yield from _of_samples(round, group.pairs, found)
            else:
                for pair, rewards in zip(group.pairs, found, strict=True):
                    yield Ranked(pair, by_margin(pair, rewards.chosen - rewards.rejected))

    return rank


def _of_samples(round: Round, pairs: Sequence[Pair], rewards: Sequence[Rewards]) -> Iterator[Ranked | Dropped]:
    """The one pair of a query's samples, and a drop for each of the others."""
    query = pairs[0].query_id
    within = round.recipe.selection.shorter_within or 0.0
    good = [Sample(each.chosen, pair.chosen.score.tokens) for pair, each in zip(pairs, rewards, strict=True)]
    bad = [Sample(each.rejected, pair.rejected.score.tokens) for pair, each in zip(pairs, rewards, strict=True)]
    picked = best_and_near_worst(good, bad, within=within)
    if picked is None:
        reason = "no bad sample scores below the good ones"
    else:
        pair = replace(pairs[picked.chosen], rejected=pairs[picked.rejected].rejected)
        reason = _misfit(round, pair)
        if reason is None:
            yield Ranked(pair, by_margin(pair, good[picked.chosen].score - bad[picked.rejected].score))
    lost = "other samples were taken" if reason is None else reason
    for _ in pairs if reason is not None else pairs[1:]:
        yield Dropped(id=query, reason=lost)


def _misfit(round: Round, pair: Pair) -> str | None:
    """What the filters have against these two together; each of them they have let pass."""
    filters = round.recipe.filters
    shorter, longer = sorted((pair.chosen.score.tokens, pair.rejected.score.tokens))
    if longer > filters.max_length_ratio * shorter:
        return "length ratio"
    overlap = similarity(pair.chosen.text, pair.rejected.text)
    return "near-identical responses" if overlap >= filters.near_identical else None
