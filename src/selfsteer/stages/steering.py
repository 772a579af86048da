"""Stage 3: the pairs that train the data generator, and those that it is compared with.

Left out on purpose: how pairs are built (`pairs.py`) and scored (`training/scoring.py`).
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

from selfsteer.pairs import (
    alignment_pair,
    item_key,
    pair_reject_reason,
    steering_pairs,
    steering_reject_reason,
    usable,
)
from selfsteer.records import Dropped, Responses
from selfsteer.stages.base import (
    Round,
    Work,
    arithmetic,
    inputs_of,
    kept,
    make_stage,
    measured,
    policy_scorer,
    taking,
)
from selfsteer.stages.responses import HELD_OUT
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage
from selfsteer.training.scoring import Group, score_missing, scores

log = logging.getLogger(__name__)

POLICY_PAIRS = "policy-pairs.parquet"
"""The policy's own responses as alignment pairs (PBAA), scored: what the generator's pairs are compared with.

Of the queries that train the generator, and of those held out, which the comparison is made on."""


def policy_pairs(stage: Stage, *, of: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Their rows, or those of these queries."""
    return columns.file_rows(stage.path / POLICY_PAIRS, of=of)


def steering_stage(round: Round, responses: Stage) -> Stage:
    """Step 3, first half: the pairs of L_SSO with reference log-probabilities, and the PBAA pairs of the same queries."""
    settings = {
        "filters": round.recipe.filters.model_dump(),
        "objective": round.recipe.generator.objective,
        **arithmetic(round.recipe.training),
    }
    origin = Origin(settings=settings, inputs=inputs_of(round, responses=responses))
    return make_stage(round, "3-steering", origin, lambda work: _steering(round, work, responses))


def _held_out(round: Round, responses: Stage) -> Iterator[Responses]:
    """What the policy answered to held-out queries, as far as it would become a pair of PBAA."""
    file, reasons = responses.path / HELD_OUT, Counter[str]()
    if not file.exists():
        return
    for item in map(columns.responses, columns.file_rows(file)):
        reason = pair_reject_reason(item, round.recipe.filters, round.prompts)
        if reason is None:
            yield item
        else:
            reasons[reason] += 1
    if reasons:
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        log.info("the policy's own pairs of held-out queries that are not compared: %s", told)


def _steering(round: Round, work: Work, responses: Stage) -> Contents:
    objective, scorer = round.recipe.generator.objective, policy_scorer(round)
    dropped: list[Dropped] = []

    reasons: dict[tuple[str, int], str] = {}

    def answered() -> Iterator[Responses]:
        return map(columns.responses, responses.rows())

    def lessons(item: Responses) -> Group:
        return scorer.group(steering_pairs(item, round.prompts, objective))

    def own(item: Responses) -> Group:
        return scorer.group((alignment_pair(item),))

    wanted = kept(responses)
    good = usable(answered(), lambda item: steering_reject_reason(item, round.recipe.filters, round.prompts), reasons)
    of_both = (group(item) for item in good for group in (lessons, own))
    spared = list(_held_out(round, responses))
    score_missing(
        scorer,
        chain(of_both, map(own, spared)),
        work.journal,
        description="log-probabilities of the steering pairs",
        total=2 * wanted + len(spared),
    )
    trained_on = (item for item in answered() if item_key(item) not in reasons)
    own_rows = (columns.pair_row(pair) for item in chain(trained_on, spared) for pair in scores(work.journal, own(item)))
    columns.write_rows(work.stage.path / POLICY_PAIRS, own_rows, columns.PAIRS)

    def rows() -> Iterator[dict[str, Any]]:
        for item in answered():
            if item_key(item) in reasons:
                dropped.append(Dropped(id=item.query.id, reason=reasons[item_key(item)]))
            else:
                yield from map(columns.pair_row, scores(work.journal, lessons(item)))

    return Contents(
        wanted=wanted,
        rows=rows(),
        dropped=dropped,
        schema=columns.PAIRS,
        rows_each=2 if objective in ("sso", "equation_3") else 1,
        measures=taking(
            pairs=lambda: measured(work.stage.written()), policy_pairs=lambda: measured(policy_pairs(work.stage))
        ),
        files=(POLICY_PAIRS,),
    )
