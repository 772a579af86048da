"""Which of a round's queries: those that are held out, those set aside for the displacement, a number drawn with the seed.

What is drawn depends on the seed and the queries' ids, never on their order.
"""

from collections.abc import Collection, Iterable
from functools import lru_cache

from selfsteer.engines.sampling import seed_for
from selfsteer.recipe.sections import load
from selfsteer.stages.base import Round, kept, sealed
from selfsteer.stages.status import PREFERENCES, PRINCIPLES
from selfsteer.store.folder import Stage
from selfsteer.training.displacement import LARGEST


def draw_queries(round: Round, stage: Stage, count: int | None, *, without: Collection[str] = ()) -> set[str] | None:
    """The ids of `count` of a stage's queries other than those of `without`, drawn with the seed; None for all of them."""
    if not without and (count is None or count >= kept(stage)):
        return None
    return draw(round, set(stage.column("query_id")).difference(without), count)


def draw(round: Round, ids: Iterable[str], count: int | None) -> set[str]:
    """At most `count` of these queries, drawn with the seed; all of them for None."""
    return _drawn(round.recipe.seed, ids, count)


def _drawn(seed: int, ids: Iterable[str], count: int | None) -> set[str]:
    return set(sorted(ids, key=lambda query_id: seed_for(seed, "drawn", query_id))[:count])


def held_out(round: Round) -> frozenset[str]:
    """The queries that neither training sees: the same ones whatever the seed, so that runs compare on them."""
    begun = round.folder.has_stage(round.number, PRINCIPLES)  # not where the pairs were made elsewhere
    source = round.folder.stage(round.number, PRINCIPLES if begun else PREFERENCES)
    return _of_queries(source, round.recipe.queries.holdout)


def held_out_of(pairs: Stage) -> frozenset[str]:
    """The same of a run folder, by a sealed stage of it that holds pairs."""
    principles = Stage(pairs.path.with_name(PRINCIPLES))
    source = principles if principles.manifest() is not None else Stage(pairs.path.with_name(PREFERENCES))
    return _of_queries(source, load(pairs.path.parents[1] / "recipe.yaml").queries.holdout)


def _of_queries(source: Stage, count: int) -> frozenset[str]:
    return _held_out(source, sealed(source).digest, count) if count else frozenset()


@lru_cache(maxsize=4)
def _held_out(source: Stage, _digest: str, count: int) -> frozenset[str]:
    """Of the queries of a stage as it is now: asked for by most stages of a round, and read once."""
    return hold_out(set(source.column("query_id")), count)


def hold_out(ids: Collection[str], count: int) -> frozenset[str]:
    """`count` of these queries; ValueError where none is left."""
    if reason := none_left(count, len(ids)):
        raise ValueError(reason)
    return frozenset(sorted(ids, key=lambda query_id: seed_for("held out", query_id))[:count])


def none_left(held_out: int, queries: int) -> str | None:
    """Why so many of the queries can't be held out; None where some are left."""
    return f"queries.holdout: {held_out} of {queries} queries; leave some to train on." if held_out >= queries else None


def set_aside(round: Round) -> frozenset[str]:
    """The queries whose bare answers show what a training does to answers that it is not about: no training sees them.

    Some of those that are held out; where none are, one query of 32, up to 16, that the round could have trained on. Of
    pairs made elsewhere only those held out.
    """
    if round.recipe.training.displacement_steps == 0 or round.held_out_only:
        return frozenset()
    if spared := held_out(round):
        return frozenset(draw(round, spared, LARGEST))
    if not round.folder.has_stage(round.number, PRINCIPLES):
        return frozenset()
    source = round.folder.stage(round.number, PRINCIPLES)
    return _set_aside(source, sealed(source).digest, round.recipe.seed)


@lru_cache(maxsize=4)
def _set_aside(source: Stage, _digest: str, seed: int) -> frozenset[str]:
    """As in `_held_out`."""
    ids = set(source.column("query_id"))
    return frozenset(_drawn(seed, ids, min(LARGEST, len(ids) // 32)))


def share_of_round(round: Round, ids: Collection[str]) -> frozenset[str]:
    """Of all queries, this round's where rounds split them: an equal share, drawn with the seed, and the held-out ones.

    Raises ValueError where there are fewer queries than rounds.
    """
    count, rounds = round.recipe.queries.holdout, round.recipe.rounds
    spared = hold_out(ids, count) if count else frozenset[str]()
    others = sorted(set(ids) - spared, key=lambda query_id: seed_for(round.recipe.seed, "round", query_id))
    if len(others) < rounds:
        raise ValueError(f"queries.split_rounds: {len(others)} queries to train on are too few for {rounds} rounds.")
    return spared | set(others[round.number - 1 :: rounds])
