"""Stage 3: the pairs that train the data generator, those that it is compared with, and what there is to win.

    3-steering/data.parquet            the pairs of L_SSO
    3-steering/policy-pairs.parquet    the policy's own responses as alignment pairs (PBAA)
    3-steering/held-out-dropped.jsonl  what of the held-out queries is not among those, and why
    3-steering/headroom.parquet        a row a query: y_o, y+ and y- given the bare query, up to several positions

All that is scored of a response given one prompt is scored in one forward pass. Left out on purpose: how pairs are built
(`pairs.py`) and scored (`training/scoring.py`), what the headroom says (`measures/headroom.py`), and whether the generator
is trained all the same (`pipeline.py`).
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any

from selfsteer.measures.headroom import EDGES, Answers, headroom
from selfsteer.pairs import (
    alignment_pair,
    answer_pair,
    item_key,
    pair_reject_reason,
    steering_pairs,
    steering_reject_reason,
    usable,
)
from selfsteer.records import Dropped, Pair, Responses
from selfsteer.runtime import counted
from selfsteer.stages.base import (
    Round,
    Work,
    arithmetic,
    inputs_of,
    kept,
    make_stage,
    measured,
    policy_scorer,
    sealed,
    taking,
)
from selfsteer.stages.drawing import draw
from selfsteer.stages.responses import HELD_OUT, HELD_OUT_DROPPED
from selfsteer.stages.status import STEERING
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage, write_dropped
from selfsteer.training.scoring import Group, prefixes, score_missing, scores

log = logging.getLogger(__name__)

POLICY_PAIRS = "policy-pairs.parquet"
"""The policy's own responses as alignment pairs (PBAA), scored: what the generator's pairs are compared with.

Of the queries that train the generator, and of those held out, which the comparison is made on."""

HEADROOM = "headroom.parquet"

HEADROOM_QUERIES = 512
"""The headroom is measured on at most so many, drawn with the seed."""


def policy_pairs(
    stage: Stage, only: list[str] | None = None, *, of: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Their rows, or those of these queries; of all columns, or of these alone."""
    return columns.file_rows(stage.path / POLICY_PAIRS, only, of=of)


def steering_stage(round: Round, responses: Stage) -> Stage:
    """Step 3, first half: the pairs of L_SSO with reference log-probabilities, and the PBAA pairs of the same queries.

    Its headroom is None where the objective does not train on y_o.
    """
    settings = {
        "filters": round.recipe.filters.model_dump(),
        "objective": round.recipe.generator.objective,
        "headroom": {"queries": HEADROOM_QUERIES, "seed": round.recipe.seed},
        **arithmetic(round.recipe.training),
    }
    origin = Origin(settings=settings, inputs=inputs_of(round, responses=responses))
    return make_stage(round, STEERING, origin, lambda work: _steering(round, work, responses))


def _held_out(round: Round, work: Work, responses: Stage) -> list[Responses]:
    """What the policy answered to held-out queries, as far as it would become a pair of PBAA; the rest is written down."""
    dropped: list[Dropped] = []
    found: list[Responses] = []
    rows = columns.file_rows(responses.path / HELD_OUT) if HELD_OUT in sealed(responses).outputs else ()
    for item in map(columns.responses, rows):
        reason = pair_reject_reason(item, round.recipe.filters, round.prompts)
        if reason is None:
            found.append(item)
        else:
            dropped.append(Dropped(id=item.query.id, reason=reason))
    reasons = write_dropped(work.stage.path / HELD_OUT_DROPPED, dropped)
    if reasons:
        log.info("the policy's own pairs of held-out queries that are not compared: %s", counted(reasons))
    return found


def _steering(round: Round, work: Work, responses: Stage) -> Contents:
    objective, scorer = round.recipe.generator.objective, policy_scorer(round)
    drawn = draw(round, set(responses.column("query_id")), HEADROOM_QUERIES) if round.recipe.generator.uses_original else ()
    reasons: dict[tuple[str, int], str] = {}

    def answered() -> Iterator[Responses]:
        return map(columns.responses, responses.rows())

    def lessons(item: Responses) -> Group:
        return scorer.group(steering_pairs(item, round.prompts, objective))

    def own(item: Responses) -> Group:
        if item.query.id in drawn:
            return scorer.group(_beside_original(item), EDGES)
        return scorer.group((alignment_pair(item),))

    wanted = kept(responses)
    good = usable(answered(), lambda item: steering_reject_reason(item, round.recipe.filters, round.prompts), reasons)
    of_both = (group(item) for item in good for group in (lessons, own))
    spared = _held_out(round, work, responses)
    score_missing(
        scorer,
        chain(of_both, map(own, spared)),
        work.journal,
        description="log-probabilities of the steering pairs",
        total=2 * wanted + len(spared),
    )

    found: dict[str, Answers] = {}

    def own_rows() -> Iterator[dict[str, Any]]:
        trained_on = (item for item in answered() if item_key(item) not in reasons)
        for item in chain(trained_on, spared):
            group = own(item)
            if group.edges:
                found[item.query.id] = _answers(work, group)
            yield columns.pair_row(scores(work.journal, group)[0])

    columns.write_rows(work.stage.path / POLICY_PAIRS, own_rows(), columns.PAIRS)
    files = [POLICY_PAIRS, HELD_OUT_DROPPED]
    if drawn:
        columns.write_rows(work.stage.path / HEADROOM, _rows(found), columns.HEADROOM)
        files.append(HEADROOM)

    def rows() -> Iterator[dict[str, Any] | Dropped]:
        for item in answered():
            if item_key(item) in reasons:
                yield Dropped(id=item.query.id, reason=reasons[item_key(item)])
            else:
                yield from map(columns.pair_row, scores(work.journal, lessons(item)))

    return Contents(
        wanted=wanted,
        rows=rows(),
        schema=columns.PAIRS,
        rows_each=2 if objective in ("sso", "equation_3") else 1,
        measures=taking(
            pairs=lambda: measured(work.stage.written(columns.TEXTS)),
            policy_pairs=lambda: measured(policy_pairs(work.stage, columns.TEXTS)),
            headroom=lambda: headroom(list(found.values())),
        ),
        files=tuple(files),
    )


def _beside_original(item: Responses) -> tuple[Pair, Pair]:
    """The pair of PBAA, and y_o with y-, because pairs are what is scored; under one prompt each is computed once."""
    assert item.original is not None, "the generator trains on y_o"
    return alignment_pair(item), answer_pair(item.query, item.original, item.bad)


def _answers(work: Work, group: Group) -> Answers:
    steered, beside = prefixes(work.journal, group)
    return Answers(original=beside.chosen, good=steered.chosen, bad=steered.rejected)


def _rows(found: Mapping[str, Answers]) -> Iterator[dict[str, Any]]:
    for query_id, answers in found.items():
        yield {"query_id": query_id} | {
            name: [prefix._asdict() for prefix in each] for name, each in answers._asdict().items()
        }
