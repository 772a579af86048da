"""The stages that sample: responses of the policy, and the preference data.

Left out on purpose: how queries are read, prompts rendered, responses sampled, pairs built and scored: the modules of that
name; principles (`principles_stage.py`), steering pairs (`steering_stage.py`) and trainings (`training_stages.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from selfsteer import schemas
from selfsteer.engines.base import Engine, Failed, Request, Sampling
from selfsteer.journal import Journal
from selfsteer.pairs import (
    alignment_pair,
    item_key,
    reject_reason,
    special_token_reason,
    usable,
)
from selfsteer.recipe import Generator
from selfsteer.recipe_engines import sampling_identity
from selfsteer.records import Checkpoint, Dropped, PairRow, Principles, Response, Responses
from selfsteer.reference import Group, score_missing, scores
from selfsteer.responses import open_engine, request, response, sample, sampler_digest, seed_for
from selfsteer.schemas import Seeds
from selfsteer.stages import (
    Round,
    Work,
    arithmetic,
    draw_queries,
    held_out,
    inputs_of,
    kept,
    make_stage,
    policy_as_judge,
)
from selfsteer.store import Contents, Origin, Stage
from selfsteer.training_stages import Generators, samplers

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
    roles = ["good", "bad", "original"] if _needs_original(generator) else ["good", "bad"]
    models = dict.fromkeys(roles, round.policy)

    def asked() -> Iterator[tuple[dict[str, Any], dict[str, Request]]]:
        for row in principles.rows():
            if wanted_ids is None or row["query_id"] in wanted_ids:
                yield row, _requests(round, models, row)

    total = kept(principles) if wanted_ids is None else len(wanted_ids)
    sample(
        _engine(round, models),
        (item for _, requests in asked() for item in requests.values()),
        work.journal,
        description="responses of the policy",
        total=total * len(models),
    )
    dropped: list[Dropped] = []

    def rows() -> Iterator[dict[str, Any]]:
        for row, requests in asked():
            answers = _answers(work.journal, row["query_id"], requests)
            if isinstance(answers, Dropped):
                dropped.append(answers)
            else:
                yield {**row, "original": None} | {
                    role: schemas.response_columns(answer) for role, answer in answers.items()
                }

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


def _engine(round: Round, models: Mapping[str, Checkpoint]) -> Callable[[], Engine]:
    """The engine that holds these: one model, or several adapters of one."""
    recipe, model = round.recipe, next(iter(models.values()))
    adapters = [each.adapter for each in models.values() if each.adapter is not None]
    trust = recipe.policy.trust_remote_code
    return partial(open_engine, recipe.engine, model, round.prompts, trust_remote_code=trust, adapters=adapters)


def _requests(round: Round, models: Mapping[str, Checkpoint], row: dict[str, Any], *, number: int = 0) -> dict[str, Request]:
    """The prompts x+ (good), x- (bad) and x (original) of a query, each answered by its model for the `number`-th time."""
    nth = (number,) if number else ()
    query, principles = schemas.query(row), schemas.principles(row)
    messages = {
        "good": round.prompts.steer(query.messages, principles.good),
        "bad": round.prompts.steer(query.messages, principles.bad),
        "original": query.messages,
    }
    sampling = Sampling(**round.recipe.responses.model_dump())
    found: dict[str, Request] = {}
    for role, model in models.items():
        item = request(
            round.prompts,
            messages[role],
            model_digest=sampler_digest(round.recipe.engine, model),
            sampling=sampling,
            seed=seed_for(round.recipe.seed, round.number, query.id, role, *nth),
        )
        found[role] = item if model.adapter is None else replace(item, adapter=model.adapter.name)
    return found


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
    if recipe.selection.samples > 1:
        settings["samples"] = [recipe.selection.samples, recipe.queries.holdout]
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
    spared, samples = held_out(round), round.recipe.selection.samples
    wanted_ids = spared if round.held_out_only else None
    total = kept(principles) + (samples - 1) * (kept(principles) - len(spared)) if wanted_ids is None else len(wanted_ids)
    groups = samplers(round, generators)

    def wanted() -> Iterator[tuple[dict[str, Any], int]]:
        """A query and the number of the sample; held-out ones are answered once."""
        for row in principles.rows():
            if wanted_ids is None or row["query_id"] in wanted_ids:
                yield from ((row, number) for number in range(1 if row["query_id"] in spared else samples))

    def asked() -> Iterator[tuple[dict[str, Any], dict[str, Request]]]:
        for row, number in wanted():
            asked_for = (_requests(round, models, row, number=number) for models in groups)
            yield row, {role: item for requests in asked_for for role, item in requests.items()}

    for models in groups:
        # One role after the other: the embedded engine switches adapters for all that it has under way.
        roles = ({role: model} for role, model in models.items())
        sample(
            _engine(round, models),
            (
                item
                for role in roles
                for row, number in wanted()
                for item in _requests(round, role, row, number=number).values()
            ),
            work.journal,
            description="responses of the generator",
            total=len(work.journal) + len(models) * total,
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
    reasons: dict[tuple[str, int], str] = {}

    def reason(item: Responses) -> str | None:
        found = reject_reason(item.good, item.bad, item.principles, round.recipe.filters)
        return found or special_token_reason((item.good.text, item.bad.text), round.prompts)

    def group(item: Responses) -> Group:
        return judge.group((alignment_pair(item.query, item.good, item.bad),))

    every_group = map(group, usable((item for item in answered() if isinstance(item, Responses)), reason, reasons))
    score_missing(judge, every_group, work.journal, description="log-probabilities of the pairs", total=total)

    def rows() -> Iterator[PairRow]:
        for item in answered():
            if isinstance(item, Dropped):
                dropped.append(item)
            elif item_key(item) in reasons:
                dropped.append(Dropped(id=item.query.id, reason=reasons[item_key(item)]))
            else:
                yield from scored_rows(work.journal, group(item), item.principles, seeds_of(item))

    return Contents(wanted=total, rows=rows(), dropped=dropped, schema=schemas.PAIRS)


# --- shared ----------------------------------------------------------------------------------------------------------------


def seeds_of(item: Responses) -> Seeds:
    """Of the good and of the bad response."""
    return Seeds(chosen=item.good.seed, rejected=item.bad.seed)


def scored_rows(journal: Journal, group: Group, principles: Principles, seeds: Seeds) -> Iterator[PairRow]:
    """The rows of a group's pairs, with the scores that the journal has of them."""
    for pair, scored in zip(group.pairs, scores(journal, group), strict=True):
        yield schemas.scored_row(pair, scored, principles, seeds)
