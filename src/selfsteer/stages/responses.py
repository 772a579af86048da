"""Stage 2: y+, y- and y_o, sampled from the policy; and what all stages that sample ask it.

    2-responses/data.parquet        of the queries that train the generator (of all, where there is none)
    2-responses/held-out.parquet    y+ and y- of those held out: what the generator's pairs are compared with
    2-responses/unrelated.parquet   y_o of those set aside: displacement is measured on them
    2-responses/held-out-dropped.jsonl   which of these are not there, and why

Left out on purpose: how prompts are rendered and responses sampled: the modules of that name.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from selfsteer.engines import open as opening
from selfsteer.engines.base import Failed, Request, Sampling
from selfsteer.engines.open import sampler_digest
from selfsteer.engines.sampling import Sampler, request, response, sample, seed_for
from selfsteer.recipe.engines import sampling_identity
from selfsteer.recipe.sections import Recipe, Sampled
from selfsteer.records import Checkpoint, Dropped, Message, Query, Response
from selfsteer.runtime import counted
from selfsteer.stages.base import Round, Work, inputs_of, kept, make_stage
from selfsteer.stages.drawing import draw_queries, held_out, set_aside
from selfsteer.stages.status import RESPONSES
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage, write_dropped
from selfsteer.store.journal import Journal

log = logging.getLogger(__name__)

HELD_OUT, UNRELATED, HELD_OUT_DROPPED = "held-out.parquet", "unrelated.parquet", "held-out-dropped.jsonl"

# --- 2: responses ----------------------------------------------------------------------------------------------------------


def responses_stage(round: Round, principles: Stage) -> Stage:
    """Step 2: y+, y- and y_o from the policy, for the queries that train the generator (for all, where there is none)."""
    generator = round.recipe.generator
    settings = {
        "responses": _steered(round.recipe).model_dump(),
        "dtype": None if round.recipe.engine.kind == "openai" else round.recipe.engine.dtype,
        **sampling_identity(round.recipe.engine),
        "queries": None if generator.kind == "none" else generator.queries,
        "original": round.recipe.responses.bare.model_dump() if generator.uses_original else None,
        "seed": round.recipe.seed,
        "round": round.number,
    }
    if round.recipe.queries.holdout and generator.kind != "none":
        settings["held out"] = round.recipe.queries.holdout
    elif round.held_out_only:
        settings["only"] = round.recipe.queries.holdout
    if aside := set_aside(round):
        settings["unrelated"] = [len(aside), round.recipe.responses.bare.model_dump()]
    origin = Origin(settings=settings, inputs=inputs_of(round, principles=principles))
    return make_stage(round, RESPONSES, origin, lambda work: _responses(round, work, principles))


_Asked = tuple[dict[str, Any], dict[str, Request]]
"""A row of stage 1, and what is asked about its query."""


def _responses(round: Round, work: Work, principles: Stage) -> Contents:
    generator, aside = round.recipe.generator, set_aside(round)
    wanted_ids = None
    if generator.kind != "none":
        wanted_ids = draw_queries(round, principles, generator.queries, without=held_out(round) | aside)
    elif round.held_out_only:
        wanted_ids = set(held_out(round))
    pair: dict[str, Checkpoint] = {"good": round.policy, "bad": round.policy}
    original: dict[str, Checkpoint] = {"original": round.policy}
    models = pair | original if generator.uses_original else pair
    spared = frozenset[str]() if generator.kind == "none" else held_out(round)
    drawn = _steered(round.recipe)

    def asking(models: Mapping[str, Checkpoint], of: Collection[str] | None) -> Iterator[_Asked]:
        return ((row, requests_of(round, models, row, drawn, stage=RESPONSES)) for row in principles.rows(of=of))

    own, bare = list(asking(pair, spared)), list(asking(original, aside))
    total = kept(principles) if wanted_ids is None else len(wanted_ids)
    sample(
        sampler_of(round, models),
        (item for _, requests in chain(asking(models, wanted_ids), own, bare) for item in requests.values()),
        work.journal,
        description="responses of the policy",
        total=total * len(models) + len(own) * len(pair) + len(bare),
    )
    failed: list[Dropped] = []
    if own:
        rows_own = (_row(row, found) for row, found in _answered(work, own, failed))
        columns.write_rows(work.stage.path / HELD_OUT, rows_own, columns.RESPONSES)
    if bare:
        unrelated = (
            {
                "query_id": row["query_id"],
                "messages": row["messages"],
                "original": columns.response_columns(found["original"]),
            }
            for row, found in _answered(work, bare, failed)
        )
        columns.write_rows(work.stage.path / UNRELATED, unrelated, columns.UNRELATED)
    if (own or bare) and (reasons := write_dropped(work.stage.path / HELD_OUT_DROPPED, failed)):
        log.info("queries held out or set aside that were not answered: %s", counted(reasons))

    def rows() -> Iterator[dict[str, Any] | Dropped]:
        texts = 0
        for row, requests in asking(models, wanted_ids):
            answers = answers_to(work.journal, row["query_id"], requests)
            if isinstance(answers, Dropped):
                yield answers
            else:
                texts += sum(answer.reencoded for answer in answers.values())
                yield _row(row, answers)
        note_texts(log, texts)

    files = tuple(name for name, there in ((HELD_OUT, own), (UNRELATED, bare), (HELD_OUT_DROPPED, own + bare)) if there)
    return Contents(wanted=total, rows=rows(), schema=columns.RESPONSES, files=files)


def _row(row: dict[str, Any], answers: Mapping[str, Response]) -> dict[str, Any]:
    """A row of `columns.RESPONSES`."""
    return {**row, "original": None} | {role: columns.response_columns(answer) for role, answer in answers.items()}


def _answered(
    work: Work, asked: Iterable[_Asked], failed: list[Dropped]
) -> Iterator[tuple[dict[str, Any], dict[str, Response]]]:
    """Those that were answered whole; the others are added to `failed`."""
    for row, requests in asked:
        found = answers_to(work.journal, row["query_id"], requests)
        if isinstance(found, Dropped):
            failed.append(found)
        else:
            yield row, found


def note_texts(log: logging.Logger, texts: int) -> None:
    """Say that responses came without ids, where some did."""
    if texts:
        log.warning(
            "%s responses came as text alone: they are scored and trained as that text is encoded behind its prompt, which"
            " may be other tokens than were sampled. Take engine.send=token_ids where the server can do that.",
            f"{texts:,}",
        )


def answers_to(journal: Journal, query_id: str, requests: dict[str, Request]) -> dict[str, Response] | Dropped:
    """The responses to a query by role, or why one of them is missing."""
    answers: dict[str, Response] = {}
    for role, item in requests.items():
        answer = response(journal, item)
        if isinstance(answer, Failed):
            return Dropped(id=query_id, reason=answer.reason, detail=f"{role}: {answer.detail}")
        answers[role] = answer
    return answers


def _steered(recipe: Recipe) -> Sampled:
    """How y+ and y- of stage 2 are drawn; without a generator they are the alignment pairs."""
    return recipe.of_pairs if recipe.generator.kind == "none" else recipe.responses.steered


def sampler_of(round: Round, models: Mapping[str, Checkpoint]) -> Sampler:
    """With the engine that holds these: one model, or several adapters of one."""
    recipe, model = round.recipe, next(iter(models.values()))
    adapters = list(dict.fromkeys(each.adapter for each in models.values() if each.adapter is not None))
    trust = recipe.policy.trust_remote_code
    engine = partial(opening.open_engine, recipe.engine, model, round.prompts, trust_remote_code=trust, adapters=adapters)
    return Sampler(engine, round.prompts)


def requests_of(
    round: Round, models: Mapping[str, Checkpoint], row: dict[str, Any], steered: Sampled, *, stage: str, number: int = 0
) -> dict[str, Request]:
    """The prompts x+ (good), x- (bad) and x (original) of a query, each answered by its model for the `number`-th time.

    steered: how the answers to x+ and x- are drawn.
    Every stage draws from random numbers of its own: a generator that met those behind the very y+ that it was trained on
    would be measured as more on-policy than it is.
    """
    query, principles = columns.query(row), columns.principles(row)
    messages = {
        "good": round.prompts.steer(query.messages, principles.good_message),
        "bad": round.prompts.steer(query.messages, principles.bad_message),
        "original": query.messages,
    }
    found: dict[str, Request] = {}
    for role, model in models.items():
        seed = seed_for(round.recipe.seed, round.number, stage, query.id, role, number)
        drawn = round.recipe.responses.bare if role == "original" else steered
        item = _request(round, model, messages[role], drawn, seed)
        found[role] = item if model.adapter is None else replace(item, adapter=model.adapter.name)
    return found


def answer_request(round: Round, model: Checkpoint, query: Query, principle: str | None = None) -> Request:
    """A held-out query, bare or under a principle, with one seed whichever policy answers it."""
    messages = query.messages if principle is None else round.prompts.steer(query.messages, principle)
    return _request(round, model, messages, round.recipe.responses.steered, seed_for(round.recipe.seed, "answer", query.id))


def sample_answers(round: Round, work: Work, model: Checkpoint, wanted: Sequence[Request], *, whose: str) -> None:
    """Answers of a policy, "first" or "aligned", into the stage's journal."""
    sample(
        sampler_of(round, {"answer": model}),
        wanted,
        work.journal,
        description=f"answers of the {whose} policy",
        total=len(work.journal) + len(wanted),
    )


def _request(round: Round, model: Checkpoint, messages: tuple[Message, ...], sampled: Sampled, seed: int) -> Request:
    return request(
        round.prompts,
        messages,
        model_digest=sampler_digest(round.recipe.engine, model),
        sampling=Sampling(**sampled.model_dump()),
        seed=seed,
    )
