"""What the generator's training changed, on held-out queries: more on-policy by steering, or by sharpening alone?

    4-gain/data.parquet    a row a query: of both responses, what policy and generator expect at their beginnings

The contexts are the policy's own responses under either principle, up to POSITIONS tokens; those of all arms of a comparison
are the same. Left out on purpose: what the numbers mean (`measures/gain.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import takewhile
from typing import Any, NamedTuple

from selfsteer.clock import timed
from selfsteer.engines.base import Request
from selfsteer.engines.sampling import sample
from selfsteer.measures.gain import gain, query_changes
from selfsteer.models import compute_dtype, let_go, pick_device
from selfsteer.pairs import response_side
from selfsteer.recipe.engines import sampling_identity
from selfsteer.records import Change, Checkpoint, Dropped, Expected
from selfsteer.runtime import progress, raise_if_stopped, stop_requested
from selfsteer.stages.base import Round, Work, arithmetic, inputs_of, make_stage, taking
from selfsteer.stages.drawing import draw, held_out
from selfsteer.stages.responses import answers_to, requests_of, sampler_of
from selfsteer.stages.status import GAIN
from selfsteer.stages.training import Generators, model_of
from selfsteer.store import columns
from selfsteer.store.durable import digest
from selfsteer.store.folder import SCHEMA_VERSION, Contents, Origin, Stage
from selfsteer.training.gain import Contexts, Sampler, expectations
from selfsteer.training.logps import casting_once
from selfsteer.training.scoring import OpenScorer, open_scorer

POSITIONS = 64
"""Of each response so many tokens are contexts, at most."""

ROLES = ("good", "bad")


def gain_stage(round: Round, principles: Stage, generators: Generators | None) -> Stage | None:
    """Policy and generator at the same contexts of quality.gain held-out queries; None where the recipe has none.

    generators: None where the policy itself answers, at a temperature of its own.
    """
    recipe = round.recipe
    if not recipe.measures_gain:
        return None
    settings = {
        "queries": recipe.quality.gain,
        "holdout": recipe.queries.holdout,
        "positions": POSITIONS,
        "seed": recipe.seed,
        "round": round.number,
        "policy": recipe.responses.steered.model_dump(),
        "generator": recipe.of_pairs.model_dump(),
        **sampling_identity(recipe.engine),
        **arithmetic(recipe.training),
    }
    inputs = inputs_of(round, principles=principles)
    if generators is not None:
        inputs |= inputs_of(round, good=generators.good, bad=generators.bad)
    origin = Origin(settings=settings, inputs=inputs)
    return make_stage(round, GAIN, origin, lambda work: _gain(round, work, principles, generators), models=generators or ())


class _Item(NamedTuple):
    """A response whose contexts are measured."""

    key: str
    contexts: Contexts


_Items = dict[str, _Item]
"""Of one query, by role."""


def _gain(round: Round, work: Work, principles: Stage, generators: Generators | None) -> Contents:
    drawn = draw(round, held_out(round), round.recipe.quality.gain)
    rows = [row for row in principles.rows() if row["query_id"] in drawn]
    models: dict[str, Checkpoint] = dict.fromkeys(ROLES, round.policy)
    requests = {row["query_id"]: requests_of(round, models, row, round.recipe.responses.steered, stage=GAIN) for row in rows}
    wanted = [item for of_query in requests.values() for item in of_query.values()]
    sample(sampler_of(round, models), wanted, work.journal, description="contexts", total=len(wanted))

    after = {role: round.policy if generators is None else model_of(getattr(generators, role)) for role in ROLES}
    found = {row["query_id"]: _items(round, work, row, requests[row["query_id"]], after) for row in rows}
    _measure_missing(round, work, [items for items in found.values() if not isinstance(items, Dropped)], after)

    def measured() -> Iterator[dict[str, Any] | Dropped]:
        for query_id, items in found.items():
            if isinstance(items, Dropped):
                yield items
            else:
                yield {"query_id": query_id} | {role: work.journal.get(item.key) for role, item in items.items()}

    measures = taking(gain=lambda: gain([_responses(row) for row in work.stage.written()]))
    return Contents(wanted=len(rows), rows=measured(), schema=columns.GAIN, measures=measures)


def _items(
    round: Round, work: Work, row: dict[str, Any], requests: dict[str, Request], after: dict[str, Checkpoint]
) -> _Items | Dropped:
    query, prompts = columns.query(row), round.prompts
    both = {role: prompts.prompt_ids(requests[role].messages) for role in ROLES}
    bare = prompts.prompt_ids(query.messages)
    answers = answers_to(work.journal, query.id, requests)
    if isinstance(answers, Dropped):
        return answers
    found: _Items = {}
    for role, opposite in (ROLES, ROLES[::-1]):
        ids = prompts.response_ids(response_side(answers[role]), requests[role].messages)[:POSITIONS]
        if not ids:
            return Dropped(id=query.id, reason="empty response", detail=role)
        contexts = Contexts(both[role], both[opposite], bare, ids)
        found[role] = _Item(_key(round, contexts, after[role]), contexts)
    return found


def _key(round: Round, contexts: Contexts, generator: Checkpoint) -> str:
    """Of what determines the numbers."""
    recipe = round.recipe
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "gain": [round.policy.digest, generator.digest],
            "sampled": [recipe.responses.steered.model_dump(), recipe.of_pairs.model_dump()],
            "dtype": str(compute_dtype(recipe.training.dtype, pick_device())),
            "contexts": contexts._asdict(),
        }
    )


def _measure_missing(round: Round, work: Work, queries: Sequence[_Items], after: dict[str, Checkpoint]) -> None:
    """Two models in memory at a time, opened only for what the journal lacks. Raises Interrupted on a signal."""
    for model in dict.fromkeys(after.values()):
        mine = [item for items in queries for role, item in items.items() if after[role] == model]
        lacking = list(work.journal.lacking(mine, key=lambda item: item.key) or ())
        if not lacking:
            continue
        _measure(round, work, model, lacking)
        let_go()
        raise_if_stopped()


def _measure(round: Round, work: Work, model: Checkpoint, lacking: Sequence[_Item]) -> None:
    recipe = round.recipe
    with ExitStack() as stack:

        def opened(of: Checkpoint) -> OpenScorer:
            policy = recipe.policy.model_copy(update={"model": of.path})
            return stack.enter_context(open_scorer(policy, recipe.training))

        before = Sampler(opened(round.policy), recipe.responses.steered)
        stack.enter_context(casting_once(before.scorer.model.device))
        trained = before.scorer if model == round.policy else opened(model)
        advance = stack.enter_context(progress("gain", len(lacking), unit="responses"))
        contexts = (item.contexts for item in takewhile(lambda _: not stop_requested(), lacking))
        numbers = timed("measure", expectations(before, Sampler(trained, recipe.of_pairs), contexts))
        records = ((item.key, _record(found)) for item, found in zip(lacking, numbers, strict=False))
        work.journal.fill(records, advance)


def _record(found: Change) -> dict[str, Any]:
    return {"tokens": found.tokens, "before": found.before._asdict(), "after": found.after._asdict()}


def _responses(row: dict[str, Any]) -> list[Change]:
    return [Change(row[role]["tokens"], Expected(**row[role]["before"]), Expected(**row[role]["after"])) for role in ROLES]


def gain_of_queries(stage: Stage) -> dict[str, dict[str, float]]:
    """The changes of each query, by measure."""
    found: dict[str, dict[str, float]] = {}
    for row in stage.rows():
        for name, value in query_changes(_responses(row)).items():
            found.setdefault(name, {})[row["query_id"]] = value
    return found
