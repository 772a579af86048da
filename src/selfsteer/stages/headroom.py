"""Headroom, measured before the generator is trained: how probable y_o, y+ and y- are to the policy, given the bare query.

    3-headroom/headroom.parquet    a row a query: of each response, tokens and log-probability up to several positions

Left out on purpose: what it says (`measures/headroom.py`); whether the generator is trained all the same (`pipeline.py`).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice, zip_longest
from typing import Any, NamedTuple

from selfsteer.measures.headroom import Answers, headroom, prefix_lengths
from selfsteer.pairs import response_side
from selfsteer.prompts import Prompts
from selfsteer.records import Pair, Query, Response, Side
from selfsteer.stages.base import (
    Round,
    Work,
    arithmetic,
    draw,
    inputs_of,
    make_stage,
    policy_scorer,
    write_measures,
)
from selfsteer.stages.status import HEADROOM
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage
from selfsteer.training.scoring import Group, score_missing, scores

PREFIXES = "headroom.parquet"

QUERIES = 512
"""At most so many are scored, drawn with the seed."""


def headroom_stage(round: Round, responses: Stage, steering: Stage) -> Stage | None:
    """The three responses of the queries that train the generator, scored; None where y_o is not among them."""
    if not round.recipe.generator.uses_original:
        return None
    settings = {"queries": QUERIES, "seed": round.recipe.seed, **arithmetic(round.recipe.training)}
    origin = Origin(settings=settings, inputs=inputs_of(round, responses=responses, steering=steering))
    return make_stage(round, HEADROOM, origin, lambda work: _headroom(round, work, responses, steering))


class _Asked(NamedTuple):
    """What is scored for a query."""

    query_id: str
    lengths: tuple[int, ...]
    """How many beginnings there are of y_o, y+ and y-, as in `Answers`."""
    group: Group


def _headroom(round: Round, work: Work, responses: Stage, steering: Stage) -> Contents:
    drawn = draw(round, set(steering.column("query_id")), QUERIES)
    scorer = policy_scorer(round)
    found: list[Answers] = []

    def asked() -> Iterator[_Asked]:
        for row in responses.rows():
            if row["query_id"] in drawn:
                item = columns.responses(row)
                assert item.original is not None, "the generator trains on y_o"
                three = [_prefixes(each, item.query, round.prompts) for each in (item.original, item.good, item.bad)]
                group = scorer.group(_two_by_two(item.query, list(chain(*three))))
                yield _Asked(item.query.id, tuple(map(len, three)), group)

    def rows() -> Iterator[dict[str, Any]]:
        for query_id, lengths, group in asked():
            scored = (each.score for pair in scores(work.journal, group) for each in (pair.chosen, pair.rejected))
            answers = Answers(*(list(islice(scored, length)) for length in lengths))
            found.append(answers)
            yield {"query_id": query_id} | {
                name: [prefix._asdict() for prefix in prefixes] for name, prefixes in answers._asdict().items()
            }

    groups = (each.group for each in asked())
    score_missing(scorer, groups, work.journal, description="headroom", total=len(drawn))
    columns.write_rows(work.stage.path / PREFIXES, rows(), columns.HEADROOM)
    measures = write_measures(work.stage, {"headroom": headroom(found)})
    return Contents(wanted=len(found), files=(PREFIXES, measures))


def _prefixes(response: Response, query: Query, prompts: Prompts) -> list[Side]:
    """The beginnings of a response that are scored, the whole of it last."""
    whole = response_side(response)
    ids = prompts.response_ids(whole, query.messages)
    return [replace(whole, token_ids=ids[:length]) for length in prefix_lengths(len(ids))]


def _two_by_two(query: Query, sides: list[Side]) -> list[Pair]:
    """As pairs, because those are what is scored; under one prompt, which is computed once."""
    return [
        Pair(query_id=query.id, kind="alignment", prompt=query.messages, chosen=one, rejected=other)
        for one, other in zip_longest(sides[::2], sides[1::2], fillvalue=sides[-1])
    ]
