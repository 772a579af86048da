"""The four stages that make data: principles, responses, steering pairs, preference data, in the order of the run folder.

Left out on purpose: how queries are read, prompts rendered, responses sampled, pairs built and scored: the modules of that
name; and the trainings (`training_stages.py`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from selfsteer import queries as reading
from selfsteer import schemas
from selfsteer.durable import digest, file_digest
from selfsteer.engines.base import Engine, Failed, Request, Sampling
from selfsteer.journal import Journal
from selfsteer.models import checkpoint, load_tokenizer, resolve
from selfsteer.pairs import (
    alignment_pair,
    reject_reason,
    special_token_reason,
    steering_pairs,
    steering_reject_reason,
)
from selfsteer.principles import Attempt, Pool, choose_principles, generate_principles, load_pool, principle_messages
from selfsteer.prompts import Prompts
from selfsteer.recipe import Generator, Policy, Recipe
from selfsteer.recipe_engines import sampling_identity
from selfsteer.records import Checkpoint, Dropped, PairRow, Principles, Query, Response, Responses
from selfsteer.reference import Group, score_missing, scores
from selfsteer.responses import open_engine, request, response, sample, sampler_digest, seed_for
from selfsteer.schemas import NO_SEEDS, Seeds
from selfsteer.stages import Round, Work, arithmetic, draw_queries, held_out, inputs_of, kept, make_stage, policy_as_judge
from selfsteer.store import Contents, Origin, Stage
from selfsteer.training_stages import MODEL, Generators

# --- 1: principles ---------------------------------------------------------------------------------------------------------


def principles_stage(round: Round) -> Stage:
    """Step 1: every usable query with its pair of opposing principles."""
    section = round.recipe.principles
    inputs = {"policy": round.policy.digest, "prompts": round.prompts.digest, "queries": _source_digest(round.recipe)}
    if section.path is not None:
        inputs["principles"] = file_digest(Path(section.path))
    settings = {
        "queries": round.recipe.queries.model_dump(exclude={"path", "holdout"}),
        "principles": section.model_dump(exclude={"path", "engine"}),
        **(sampling_identity(section.engine or round.recipe.engine) if section.source == "generate" else {}),
        "system_role": round.prompts.system_role,
        "library": digest([list(pair) for pair in load_pool(section).pairs]),
        "seed": round.recipe.seed,
        "round": round.number,
    }
    return make_stage(round, "1-principles", Origin(settings=settings, inputs=inputs), lambda work: _principles(round, work))


def _principles(round: Round, work: Work) -> Contents:
    section = round.recipe.principles
    pool = load_pool(section)
    wanted = sum(1 for _ in _checked_queries(round))
    assign: Callable[[Query], Principles] = partial(choose_principles, pool=pool, seed=round.recipe.seed)
    if section.source == "generate":
        assign = _generated_principles(round, work, pool)
    dropped: list[Dropped] = []

    def rows() -> Iterator[dict[str, Any]]:
        for item in _checked_queries(round):
            if isinstance(item, Dropped):
                dropped.append(item)
                continue
            principles = assign(item)
            length = max(len(prompt) for prompt in _steered_prompts(round.prompts, item, principles))
            limit = round.recipe.queries.max_prompt_tokens
            if length > limit:
                detail = f"{length} tokens with its principle, limit {limit}"
                dropped.append(Dropped(id=item.id, reason="prompt too long", detail=detail))
                continue
            yield {"query_id": item.id, "messages": list(item.messages), "principles": asdict(principles)}

    return Contents(wanted=wanted, rows=rows(), dropped=dropped, schema=schemas.PRINCIPLES)


def _checked_queries(round: Round) -> Iterator[Query | Dropped]:
    """The recipe's queries that can be rendered, up to queries.limit of them, and those that were dropped on the way."""
    section = round.recipe.queries
    kept = 0
    for item in reading.read_queries(section.model_copy(update={"limit": None})):
        if isinstance(item, Query):
            item = replace(item, messages=round.prompts.fold(item.messages))
            found = round.prompts.checked_ids(item.messages)
            if isinstance(found, str):
                item = Dropped(id=item.id, reason=found)
            elif len(found) > section.max_prompt_tokens:
                detail = f"{len(found)} tokens, limit {section.max_prompt_tokens}"
                item = Dropped(id=item.id, reason="prompt too long", detail=detail)
            else:
                kept += 1
        yield item
        if section.limit is not None and kept == section.limit:
            return


def _generated_principles(round: Round, work: Work, pool: Pool) -> Callable[[Query], Principles]:
    """Sample what the journal lacks; returns a function that reads a query's principles back from it."""
    section, recipe = round.recipe.principles, round.recipe
    writer, prompts = round.policy, round.prompts
    if section.model is not None:
        writer = resolve(Policy(model=section.model, trust_remote_code=recipe.policy.trust_remote_code))
        prompts = Prompts(load_tokenizer(writer.path))
    engine_section = section.engine or recipe.engine
    model_digest = sampler_digest(engine_section, writer)
    sampling = Sampling(temperature=section.temperature, top_p=recipe.responses.top_p, max_new_tokens=section.max_new_tokens)

    def ask(attempt: Attempt) -> Request:
        messages = principle_messages(attempt.query)
        return request(prompts, messages, model_digest=model_digest, sampling=sampling, seed=attempt.seed)

    def answer_to(asked: Request) -> str:
        answered = response(work.journal, asked)
        return "" if isinstance(answered, Failed) else answered.text

    def answer(attempts: Iterable[Attempt]) -> Iterator[tuple[Attempt, str]]:
        tried = [(attempt, ask(attempt)) for attempt in attempts]
        engine = partial(open_engine, engine_section, writer, prompts, trust_remote_code=recipe.policy.trust_remote_code)
        sample(engine, (item for _, item in tried), work.journal, description="principles", total=len(tried))
        return ((attempt, answer_to(item)) for attempt, item in tried)

    def read_back(attempts: Iterable[Attempt]) -> Iterator[tuple[Attempt, str]]:
        return ((attempt, answer_to(ask(attempt))) for attempt in attempts)

    usable = (item for item in _checked_queries(round) if isinstance(item, Query))
    for _ in generate_principles(usable, answer, section, pool, recipe.seed):
        pass
    return lambda query: next(generate_principles([query], read_back, section, pool, recipe.seed))[1]


def _source_digest(recipe: Recipe) -> str:
    path = recipe.queries.path
    return digest(path) if path.startswith("hub:") else file_digest(Path(path))


# --- 2: responses ----------------------------------------------------------------------------------------------------------


def responses_stage(round: Round, principles: Stage) -> Stage:
    """Step 2: y+, y- and y_o from the policy, for the queries that train the generator (for all, where there is none)."""
    generator = round.recipe.generator
    settings = {
        "responses": round.recipe.responses.model_dump(),
        "dtype": None if round.recipe.engine.kind == "openai" else round.recipe.engine.dtype,
        **sampling_identity(round.recipe.engine),
        "queries": None if generator.kind == "none" else generator.queries,
        "original": _needs_original(generator),
        "seed": round.recipe.seed,
        "round": round.number,
    }
    if round.recipe.queries.holdout and generator.kind != "none":
        settings["holdout"] = round.recipe.queries.holdout
    elif round.held_out_only:
        settings["only"] = round.recipe.queries.holdout
    origin = Origin(settings=settings, inputs=inputs_of(round, principles=principles))
    return make_stage(round, "2-responses", origin, lambda work: _responses(round, work, principles))


def _responses(round: Round, work: Work, principles: Stage) -> Contents:
    generator = round.recipe.generator
    wanted_ids = None
    if generator.kind != "none":
        wanted_ids = draw_queries(round, principles, generator.queries, without=held_out(round))
    elif round.held_out_only:
        wanted_ids = set(held_out(round))
    roles = ("good", "bad", "original") if _needs_original(generator) else ("good", "bad")

    def asked() -> Iterator[tuple[dict[str, Any], dict[str, Request]]]:
        for row in principles.rows():
            if wanted_ids is None or row["query_id"] in wanted_ids:
                yield row, _requests(round, round.policy, row, roles)

    total = kept(principles) if wanted_ids is None else len(wanted_ids)
    sample(
        _engine(round, round.policy),
        (item for _, requests in asked() for item in requests.values()),
        work.journal,
        description="responses of the policy",
        total=total * len(roles),
    )
    dropped: list[Dropped] = []

    def rows() -> Iterator[dict[str, Any]]:
        for row, requests in asked():
            answers = _answers(work.journal, row["query_id"], requests)
            if isinstance(answers, Dropped):
                dropped.append(answers)
            else:
                yield {**row, "original": None} | {role: asdict(answer) for role, answer in answers.items()}

    return Contents(wanted=total, rows=rows(), dropped=dropped, schema=schemas.RESPONSES)


def _answers(journal: Journal, query_id: str, requests: dict[str, Request]) -> dict[str, Response] | Dropped:
    """The responses to a query by role, or why one of them is missing."""
    answers: dict[str, Response] = {}
    for role, item in requests.items():
        answer = response(journal, item)
        if isinstance(answer, Failed):
            return Dropped(id=query_id, reason=answer.reason, detail=f"{role}: {answer.detail}")
        answers[role] = answer
    return answers


def _needs_original(generator: Generator) -> bool:
    return generator.kind != "none" and generator.objective in ("sso", "l_minus")


def _engine(round: Round, model: Checkpoint) -> Callable[[], Engine]:
    recipe = round.recipe
    return partial(open_engine, recipe.engine, model, round.prompts, trust_remote_code=recipe.policy.trust_remote_code)


def _requests(round: Round, model: Checkpoint, row: dict[str, Any], roles: Iterable[str]) -> dict[str, Request]:
    """The prompts x+ (good), x- (bad) and x (original) of a query, to be answered by `model`."""
    query, principles = schemas.query(row), schemas.principles(row)
    messages = {
        "good": round.prompts.steer(query.messages, principles.good),
        "bad": round.prompts.steer(query.messages, principles.bad),
        "original": query.messages,
    }
    sampling = Sampling(**round.recipe.responses.model_dump())
    model_digest = sampler_digest(round.recipe.engine, model)
    return {
        role: request(
            round.prompts,
            messages[role],
            model_digest=model_digest,
            sampling=sampling,
            seed=seed_for(round.recipe.seed, round.number, query.id, role),
        )
        for role in roles
    }


def _steered_prompts(prompts: Prompts, query: Query, principles: Principles) -> tuple[tuple[int, ...], ...]:
    return tuple(prompts.prompt_ids(prompts.steer(query.messages, text)) for text in (principles.good, principles.bad))


# --- 3: steering pairs -----------------------------------------------------------------------------------------------------

POLICY_PAIRS = "policy-pairs.parquet"
"""The policy's own responses as alignment pairs (PBAA), scored: what the generator's pairs are compared with."""


def steering_stage(round: Round, responses: Stage) -> Stage:
    """Step 3, first half: the pairs of L_SSO with reference log-probabilities, and the PBAA pairs of the same queries."""
    settings = {
        "filters": round.recipe.filters.model_dump(),
        "objective": round.recipe.generator.objective,
        **arithmetic(round.recipe.training),
    }
    origin = Origin(settings=settings, inputs=inputs_of(round, responses=responses))
    return make_stage(round, "3-steering", origin, lambda work: _steering(round, work, responses))


def _steering(round: Round, work: Work, responses: Stage) -> Contents:
    objective, judge = round.recipe.generator.objective, policy_as_judge(round)
    dropped: list[Dropped] = []

    def judged() -> Iterator[tuple[Responses, str | None]]:
        for row in responses.rows():
            item = schemas.responses(row)
            yield item, steering_reject_reason(item, round.recipe.filters, round.prompts)

    def groups(item: Responses) -> tuple[Group, Group]:
        own = alignment_pair(item.query, item.good, item.bad)
        return judge.group(steering_pairs(item, round.prompts, objective)), judge.group((own,))

    wanted = kept(responses)
    every_group = (group for item, reason in judged() if reason is None for group in groups(item))
    score_missing(judge, every_group, work.journal, description="log-probabilities of the steering pairs", total=2 * wanted)
    own = (
        row
        for item, reason in judged()
        if reason is None
        for row in _scored_rows(work.journal, groups(item)[1], item.principles, _seeds(item))
    )
    schemas.write_rows(work.stage.path / POLICY_PAIRS, own, schemas.PAIRS)

    def rows() -> Iterator[PairRow]:
        for item, reason in judged():
            if reason is None:
                yield from _scored_rows(work.journal, groups(item)[0], item.principles, NO_SEEDS)
            else:
                dropped.append(Dropped(id=item.query.id, reason=reason))

    each = 2 if objective in ("sso", "equation_3") else 1
    return Contents(wanted=wanted, rows=rows(), dropped=dropped, schema=schemas.PAIRS, rows_each=each, files=(POLICY_PAIRS,))


# --- 5: preference data ----------------------------------------------------------------------------------------------------


def preferences_stage(round: Round, principles: Stage, responses: Stage, generators: Generators | None) -> Stage:
    """Step 4: chosen and rejected for every bare query, from the generator; from the policy where there is none (PBAA)."""
    recipe = round.recipe
    settings = {
        "responses": recipe.responses.model_dump(),
        "filters": recipe.filters.model_dump(),
        "seed": recipe.seed,
        "round": round.number,
        **sampling_identity(recipe.engine),
        **arithmetic(recipe.training),
    }
    if round.held_out_only:
        settings["only"] = recipe.queries.holdout
    if generators is None:
        origin = Origin(settings=settings, inputs=inputs_of(round, responses=responses))
        return make_stage(round, "5-preferences", origin, lambda work: _own_preferences(round, work, responses))
    inputs = inputs_of(round, principles=principles, generator=generators.good)
    if generators.bad != generators.good:
        inputs |= inputs_of(round, bad_generator=generators.bad)
    origin = Origin(settings=settings, inputs=inputs)
    return make_stage(round, "5-preferences", origin, lambda work: _preferences(round, work, principles, generators))


def _own_preferences(round: Round, work: Work, responses: Stage) -> Contents:
    return _preference_pairs(round, work, lambda: map(schemas.responses, responses.rows()), kept(responses))


def _preferences(round: Round, work: Work, principles: Stage, generators: Generators) -> Contents:
    wanted_ids = held_out(round) if round.held_out_only else None
    total = kept(principles) if wanted_ids is None else len(wanted_ids)
    # The models that sample, one after the other, each with its roles.
    samplers = [(checkpoint(generators.good.path / MODEL), ("good", "bad"))]
    if generators.bad != generators.good:
        samplers = [(checkpoint(stage.path / MODEL), (role,)) for role, stage in generators._asdict().items()]

    def wanted() -> Iterator[dict[str, Any]]:
        return (row for row in principles.rows() if wanted_ids is None or row["query_id"] in wanted_ids)

    def asked() -> Iterator[tuple[dict[str, Any], dict[str, Request]]]:
        for row in wanted():
            yield (
                row,
                {role: item for model, roles in samplers for role, item in _requests(round, model, row, roles).items()},
            )

    for model, roles in samplers:
        sample(
            _engine(round, model),
            (item for row in wanted() for item in _requests(round, model, row, roles).values()),
            work.journal,
            description="responses of the generator",
            total=len(work.journal) + len(roles) * total,
        )

    def answered() -> Iterator[Responses | Dropped]:
        for row, requests in asked():
            answers = _answers(work.journal, row["query_id"], requests)
            if isinstance(answers, Dropped):
                yield answers
                continue
            yield Responses(query=schemas.query(row), principles=schemas.principles(row), **answers, original=None)

    return _preference_pairs(round, work, answered, total)


def _preference_pairs(
    round: Round, work: Work, answered: Callable[[], Iterator[Responses | Dropped]], total: int
) -> Contents:
    """Filtered alignment pairs with their log-probabilities under the policy: reference and on-policy measure in one."""
    judge = policy_as_judge(round)
    dropped: list[Dropped] = []

    def judged() -> Iterator[Responses | Dropped]:
        for item in answered():
            if isinstance(item, Dropped):
                yield item
                continue
            reason = reject_reason(item.good, item.bad, item.principles, round.recipe.filters)
            reason = reason or special_token_reason((item.good.text, item.bad.text), round.prompts)
            yield item if reason is None else Dropped(id=item.query.id, reason=reason)

    def group(item: Responses) -> Group:
        return judge.group((alignment_pair(item.query, item.good, item.bad),))

    every_group = (group(item) for item in judged() if isinstance(item, Responses))
    score_missing(judge, every_group, work.journal, description="log-probabilities of the pairs", total=total)

    def rows() -> Iterator[PairRow]:
        for item in judged():
            if isinstance(item, Dropped):
                dropped.append(item)
            else:
                yield from _scored_rows(work.journal, group(item), item.principles, _seeds(item))

    return Contents(wanted=total, rows=rows(), dropped=dropped, schema=schemas.PAIRS)


# --- shared ----------------------------------------------------------------------------------------------------------------


def _seeds(item: Responses) -> Seeds:
    return Seeds(chosen=item.good.seed, rejected=item.bad.seed)


def _scored_rows(journal: Journal, group: Group, principles: Principles, seeds: Seeds) -> Iterator[PairRow]:
    for pair, scored in zip(group.pairs, scores(journal, group), strict=True):
        yield schemas.scored_row(pair, scored, principles, seeds)
