"""Headroom, measured before the generator is trained: how probable y_o, y+ and y- are to the policy, given the bare query.

    3-headroom/headroom.parquet    a row a query: of each response, tokens and log-probability up to several positions

Left out on purpose: what it says (`measures/headroom.py`); whether the generator is trained all the same (`pipeline.py`).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from selfsteer.measures.headroom import EDGES, Answers, headroom
from selfsteer.pairs import response_side
from selfsteer.prompts import Prompts
from selfsteer.records import Pair, Response, Responses, Side
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
from selfsteer.training.scoring import Group, prefixes, score_missing

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


def _headroom(round: Round, work: Work, responses: Stage, steering: Stage) -> Contents:
    drawn = draw(round, set(steering.column("query_id")), QUERIES)
    scorer = policy_scorer(round)
    found: list[Answers] = []

    def asked() -> Iterator[Group]:
        for row in responses.rows(of=drawn):
            yield scorer.group(_beside_original(columns.responses(row), round.prompts), EDGES)

    def rows() -> Iterator[dict[str, Any]]:
        for group in asked():
            good, bad = prefixes(work.journal, group)
            answers = Answers(original=good.chosen, good=good.rejected, bad=bad.rejected)
            found.append(answers)
            yield {"query_id": group.pairs[0].query_id} | {
                name: [prefix._asdict() for prefix in each] for name, each in answers._asdict().items()
            }

    score_missing(scorer, asked(), work.journal, description="headroom", total=len(drawn))
    columns.write_rows(work.stage.path / PREFIXES, rows(), columns.HEADROOM)
    measures = write_measures(work.stage, {"headroom": headroom(found)})
    return Contents(wanted=len(found), files=(PREFIXES, measures))


def _beside_original(item: Responses, prompts: Prompts) -> list[Pair]:
    """y_o with y+ and with y-, because pairs are what is scored; under one prompt, so that each is computed once."""
    assert item.original is not None, "the generator trains on y_o"
    query = item.query

    def sampled(response: Response) -> Side:
        whole = response_side(response)
        return replace(whole, token_ids=prompts.response_ids(whole, query.messages))

    original = sampled(item.original)
    return [
        Pair(query_id=query.id, kind="alignment", prompt=query.messages, chosen=original, rejected=sampled(other))
        for other in (item.good, item.bad)
    ]
