"""The first stage of a round: every usable query with its pair of opposing principles.

Left out on purpose: how queries are read (`queries.py`), and what a principle is (`principles.py`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from selfsteer import queries as reading
from selfsteer import schemas
from selfsteer.durable import digest, file_digest
from selfsteer.engines.base import Request, Sampling
from selfsteer.models import load_tokenizer, resolve
from selfsteer.principles import Attempt, Pool, choose_principles, generate_principles, load_pool, principle_messages
from selfsteer.prompts import Prompts
from selfsteer.recipe import Policy, Recipe
from selfsteer.recipe_engines import sampling_identity
from selfsteer.records import Dropped, Principles, Query
from selfsteer.responses import kept_open, open_engine, request, sample, sampler_digest
from selfsteer.stages import (
    Round,
    Work,
    inputs_of,
    make_stage,
    share_of_round,
)
from selfsteer.store import Contents, Origin, Stage


def principles_stage(round: Round) -> Stage:
    """Step 1: every usable query with its pair of opposing principles."""
    section = round.recipe.principles
    inputs = inputs_of(round) | {"queries": reading.source_digest(round.recipe.queries)}
    if section.path is not None:
        inputs["principles"] = file_digest(Path(section.path))
    settings = {
        "queries": round.recipe.queries.model_dump(exclude={"path", "holdout", "split_rounds"}),
        "principles": section.model_dump(exclude={"path", "engine", "limit"}),
        **(sampling_identity(section.engine or round.recipe.engine) if section.source == "generate" else {}),
        "system_role": round.prompts.system_role,
        "library": digest([list(pair) for pair in load_pool(section).pairs]),
        "seed": round.recipe.seed,
        "round": round.number,
    }
    if _splits(round.recipe):
        settings["split"] = {"rounds": round.recipe.rounds, "holdout": round.recipe.queries.holdout}
    return make_stage(round, "1-principles", Origin(settings=settings, inputs=inputs), lambda work: _principles(round, work))


def _principles(round: Round, work: Work) -> Contents:
    section = round.recipe.principles
    pool = load_pool(section)
    queries = _queries_of(round)
    wanted = sum(1 for _ in queries())
    assign: Callable[[Query], Principles] = partial(choose_principles, pool=pool, seed=round.recipe.seed)
    if section.source == "generate":
        assign = _generated_principles(round, work, pool, wanted)
    dropped: list[Dropped] = []

    def rows() -> Iterator[dict[str, Any]]:
        for item in queries():
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


def _splits(recipe: Recipe) -> bool:
    return recipe.queries.split_rounds and recipe.rounds > 1


def _queries_of(round: Round) -> Callable[[], Iterator[Query | Dropped]]:
    """What iterates over the round's checked queries; where rounds split them, the first one names the unusable ones."""
    if not _splits(round.recipe):
        return lambda: _checked_queries(round)
    share = share_of_round(round, {item.id for item in _checked_queries(round) if isinstance(item, Query)})

    def own() -> Iterator[Query | Dropped]:
        for item in _checked_queries(round):
            if item.id in share if isinstance(item, Query) else round.number == 1:
                yield item

    return own


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


def _generated_principles(round: Round, work: Work, pool: Pool, wanted: int) -> Callable[[Query], Principles]:
    """Sample what the journal lacks; returns a function that reads a query's principles back from it."""
    section, recipe = round.recipe.principles, round.recipe
    writer, prompts = round.policy, round.prompts
    if section.model is not None:
        writer = resolve(Policy(model=section.model, trust_remote_code=recipe.policy.trust_remote_code))
        prompts = Prompts(load_tokenizer(writer.path))
    engine_section = section.engine or recipe.engine
    model_digest = sampler_digest(engine_section, writer)
    engine = partial(open_engine, engine_section, writer, prompts, trust_remote_code=recipe.policy.trust_remote_code)
    sampling = Sampling(temperature=section.temperature, top_p=recipe.responses.top_p, max_new_tokens=section.max_new_tokens)

    def ask(attempt: Attempt) -> Request:
        messages = principle_messages(attempt.query)
        return request(prompts, messages, model_digest=model_digest, sampling=sampling, seed=attempt.seed)

    def answer_to(key: str) -> str:
        return work.journal.get(key).get("text", "")  # of one that failed there is none

    def read_back(attempts: Iterable[Attempt]) -> Iterator[tuple[Attempt, str]]:
        return ((attempt, answer_to(ask(attempt).key)) for attempt in attempts)

    queries = (item for item in _queries_of(round)() if isinstance(item, Query))
    with kept_open(engine) as opened:  # over all tries

        def answer(attempts: Iterable[Attempt]) -> Iterator[tuple[Attempt, str]]:
            tried: list[tuple[Attempt, str]] = []  # keys, not requests: a prompt of 450 tokens takes 15 KB

            def asked() -> Iterator[Request]:
                for attempt in attempts:
                    item = ask(attempt)
                    tried.append((attempt, item.key))
                    yield item

            sample(opened, asked(), work.journal, description="principles", total=wanted)
            return ((attempt, answer_to(key)) for attempt, key in tried)

        for _ in generate_principles(queries, answer, section, pool, recipe.seed):
            pass
    return lambda query: next(generate_principles([query], read_back, section, pool, recipe.seed))[1]


def _steered_prompts(prompts: Prompts, query: Query, principles: Principles) -> tuple[tuple[int, ...], ...]:
    return tuple(prompts.prompt_ids(prompts.steer(query.messages, text)) for text in (principles.good, principles.bad))
