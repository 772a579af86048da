"""Stage 5: the preference data, from the generator, from the policy itself (PBAA), or from a file made elsewhere.

Left out on purpose: how responses are sampled, pairs built and scored: the modules of that name.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from selfsteer.data.exchange import drop_reason, read_pairs
from selfsteer.data.files import say_once, source_digest
from selfsteer.engines.base import Request
from selfsteer.engines.sampling import sample
from selfsteer.measures.metrics import Comparison
from selfsteer.measures.quality import compare
from selfsteer.models import positions_of
from selfsteer.pairs import alignment_pair, item_key, pair_reject_reason, special_token_reason, usable
from selfsteer.prompts import Prompts, behind_thought
from selfsteer.recipe.engines import sampling_identity
from selfsteer.recipe.sections import Share
from selfsteer.records import Checkpoint, Dropped, Message, Pair, PairRow, Responses, Side
from selfsteer.stages.base import (
    TOO_LONG,
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
from selfsteer.stages.drawing import held_out
from selfsteer.stages.responses import answers_to, note_texts, requests_of, sampler_of
from selfsteer.stages.status import PREFERENCES, SELECTION
from selfsteer.stages.steering import policy_pairs
from selfsteer.stages.training import Generators, samplers
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage
from selfsteer.training.scoring import Group, score_missing, scores, tokenize

log = logging.getLogger(__name__)

# --- 5: preference data ----------------------------------------------------------------------------------------------------


def preferences_stage(
    round: Round, principles: Stage, responses: Stage, steering: Stage | None, generators: Generators | None
) -> Stage:
    """Step 4: chosen and rejected for every bare query, from the generator; from the policy where there is none (PBAA).

    steering: holds the policy's own pairs, which those of the generator are compared with.
    """
    recipe = round.recipe
    settings = {
        "responses": recipe.of_pairs.model_dump(),
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
    if recipe.queries.shard is not None:
        settings[SHARD] = recipe.queries.shard
    if generators is None or steering is None:
        origin = Origin(settings=settings, inputs=inputs_of(round, responses=responses))

        def answered() -> Iterator[Responses]:
            return map(columns.responses, responses.rows())

        return make_stage(round, PREFERENCES, origin, lambda work: _preference_pairs(round, work, answered, kept(responses)))

    inputs = inputs_of(round, principles=principles, steering=steering, generator=generators.good)
    if generators.bad != generators.good:
        inputs |= inputs_of(round, bad_generator=generators.bad)
    origin = Origin(settings=settings, inputs=inputs)

    def make(work: Work) -> Contents:
        spared = held_out(round)
        return replace(
            _preferences(round, work, principles, generators), measures=pair_measures(work.stage, steering, spared)
        )

    return make_stage(round, PREFERENCES, origin, make, models=generators)


SHARD = "shard"
"""Among the settings of a stage that holds the pairs of a share of the queries."""


def pair_measures(stage: Stage, steering: Stage, spared: frozenset[str]) -> Callable[[], dict[str, Any]]:
    """Takes the measures of a generator's pairs once they are written, beside those of the policy.

    spared: the queries held out, on which the two are compared.
    """
    return taking(
        pairs=lambda: measured(stage.written(columns.TEXTS)), comparison=lambda: _compared(stage, steering, spared)
    )


def _compared(stage: Stage, steering: Stage, spared: frozenset[str]) -> Comparison:
    """The generator's pairs with those of the policy: of the held-out queries, where there are any.

    To those that trained it the generator has seen the policy's own answers.
    """
    of = spared or None
    both = stage.written(columns.TEXTS, of=of), policy_pairs(steering, columns.TEXTS, of=of)
    found = compare(*(map(columns.pair, rows) for rows in both))
    found["held_out"] = bool(spared)
    return found


def _preferences(round: Round, work: Work, principles: Stage, generators: Generators) -> Contents:
    spared, samples = held_out(round), round.recipe.selection.samples
    wanted_ids = spared if round.held_out_only else None
    share = round.recipe.queries.share or Share(1, 1)
    places = share.places(kept(principles))
    once = len(spared)
    if spared and share.of > 1:
        once = len(spared.intersection(principles.column("query_id")[places.start :: places.step]))
    total = samples * len(places) - (samples - 1) * once if wanted_ids is None else len(wanted_ids)
    groups, drawn = samplers(round, generators), round.recipe.of_pairs

    def wanted() -> Iterator[tuple[dict[str, Any], int]]:
        """A query and the number of the sample; held-out ones are answered once."""
        for row in principles.picked(places) if share.of > 1 else principles.rows():
            if wanted_ids is None or row["query_id"] in wanted_ids:
                yield from ((row, number) for number in range(1 if row["query_id"] in spared else samples))

    def asked(models: Mapping[str, Checkpoint]) -> Iterator[tuple[dict[str, Any], dict[str, Request]]]:
        for row, number in wanted():
            yield row, requests_of(round, models, row, drawn, stage=PREFERENCES, number=number)

    for models in groups:
        # One role after the other: the embedded engine switches adapters for all that it has under way.
        of_roles = (asked({role: model}) for role, model in models.items())
        sample(
            sampler_of(round, models),
            (item for each in of_roles for _, requests in each for item in requests.values()),
            work.journal,
            description="responses of the generator",
            total=len(work.journal) + len(models) * total,
        )

    def answered() -> Iterator[Responses | Dropped]:
        for row, requests in asked({role: model for models in groups for role, model in models.items()}):
            answers = answers_to(work.journal, row["query_id"], requests)
            if isinstance(answers, Dropped):
                yield answers
                continue
            yield Responses(query=columns.query(row), principles=columns.principles(row), **answers, original=None)

    return _preference_pairs(round, work, answered, total)


def _preference_pairs(
    round: Round, work: Work, answered: Callable[[], Iterator[Responses | Dropped]], total: int
) -> Contents:
    """Filtered alignment pairs with their log-probabilities under the policy: reference and on-policy measure in one."""
    scorer = policy_scorer(round)
    reasons: dict[tuple[str, int], str] = {}

    def reason(item: Responses) -> str | None:
        return pair_reject_reason(item, round.recipe.filters, round.prompts)

    def group(item: Responses) -> Group:
        return scorer.group((alignment_pair(item),))

    every_group = map(group, usable((item for item in answered() if isinstance(item, Responses)), reason, reasons))
    score_missing(scorer, every_group, work.journal, description="log-probabilities of the pairs", total=total)

    def rows() -> Iterator[dict[str, Any] | Dropped]:
        texts = 0
        for item in answered():
            if isinstance(item, Dropped):
                yield item
            elif item_key(item) in reasons:
                yield Dropped(id=item.query.id, reason=reasons[item_key(item)])
            else:
                texts += item.good.reencoded + item.bad.reencoded
                yield from map(columns.pair_row, scores(work.journal, group(item)))
        note_texts(log, texts)

    return _pairs(work, wanted=total, rows=rows())


def _pairs(work: Work, *, wanted: int, rows: Iterator[dict[str, Any] | Dropped]) -> Contents:
    measures = taking(pairs=lambda: measured(work.stage.written(columns.TEXTS)))
    return Contents(wanted=wanted, rows=rows, schema=columns.PAIRS, measures=measures)


def given_stage(round: Round, pairs: Path) -> Stage:
    """Stage 5 filled from a file: checked pairs with their reference log-probabilities under the policy."""
    settings = {"max_prompt_tokens": round.recipe.queries.max_prompt_tokens, **arithmetic(round.recipe.training)}
    if was_sampled(pairs, round.prompts):
        settings["ids"] = "as sampled"
    elif any("chosen_ids" in row for row in islice(read_pairs(pairs), 1) if not isinstance(row, Dropped)):
        settings["ids"] = "where they spell the text"
    origin = Origin(settings=settings, inputs={**inputs_of(round), "pairs": source_digest(pairs)})
    return make_stage(round, PREFERENCES, origin, lambda work: _given(round, work, pairs))


def _given(round: Round, work: Work, path: Path) -> Contents:
    scorer = policy_scorer(round)
    limit = round.recipe.queries.max_prompt_tokens
    positions = positions_of(round.policy.path, trust_remote_code=round.recipe.policy.trust_remote_code)

    def groups() -> Iterator[Group | Dropped]:
        for item in usable_pairs(path, round.prompts, limit, positions):
            yield item if isinstance(item, Dropped) else scorer.group((item,))

    wanted = sum(1 for _ in usable_pairs(path, round.prompts, limit, positions))
    to_score = (group for group in groups() if isinstance(group, Group))
    score_missing(scorer, to_score, work.journal, description="log-probabilities of the pairs", total=wanted)

    def rows() -> Iterator[dict[str, Any] | Dropped]:
        for item in groups():
            if isinstance(item, Dropped):
                yield item
            else:
                yield from map(columns.pair_row, scores(work.journal, item))

    return _pairs(work, wanted=wanted, rows=rows())


def usable_pairs(
    path: Path, prompts: Prompts, max_prompt_tokens: int | None, positions: int | None
) -> Iterator[Pair | Dropped]:
    """The pairs of a file that can be tokenised as they are, and the others with the reason why not.

    Of a run's own pairs, behind the prompts that they were sampled for, the ids are those that were sampled; so are those of
    a file that has ids, where they spell its text.
    positions: the most tokens that the model takes, of prompt and response together.
    Raises ValueError, naming file and row, for a malformed file.
    """
    number = 0
    sampled = was_sampled(path, prompts)
    for number, row in enumerate(read_pairs(path), 1):  # noqa: B007 (counts the rows)
        if isinstance(row, Dropped):
            yield row
            continue
        _take_off(row, prompts, path)
        pair = columns.pair(row)
        if not sampled:
            pair = replace(pair, chosen=_checked(pair.chosen, prompts), rejected=_checked(pair.rejected, prompts))
        reason = drop_reason(row) or _why_not(pair, prompts, max_prompt_tokens, positions)
        yield pair if reason is None else Dropped(id=pair.query_id, reason=reason)
    if number == 0:
        raise ValueError(f"{path}: no rows")


def _take_off(row: PairRow, prompts: Prompts, path: Path) -> None:
    """What stands around the responses and is no part of them: an end token behind, a thought before."""
    for side, ids in (("chosen", "chosen_ids"), ("rejected", "rejected_ids")):
        text = row[side][-1]["content"]
        bare = prompts.without_end(text)
        if bare != text:
            say_once(
                f"{path}: responses end in a special token; it is taken off, as the end of a response is trained anyway"
            )
        said = behind_thought(bare) or ""
        if said != bare:
            say_once(f"{path}: responses begin with a thought; what stands behind it is taken")
        row[side] = [Message(role="assistant", content=said)]
        if said != text:
            row[ids] = None


def _why_not(pair: Pair, prompts: Prompts, max_prompt_tokens: int | None, positions: int | None) -> str | None:
    """Why this pair can't be tokenised as it is, or is too long; None where it can."""
    reason = prompts.quarantine_reason(pair.prompt)
    reason = reason or special_token_reason((pair.chosen.text, pair.rejected.text), prompts)
    if reason is not None:
        return reason
    if max_prompt_tokens is not None and len(prompts.prompt_ids(pair.prompt)) > max_prompt_tokens:
        return "prompt too long"
    return TOO_LONG if positions is not None and _length(pair, prompts) > positions else None


def _checked(side: Side, prompts: Prompts) -> Side:
    """The response without ids that are not those of its text."""
    known = side.token_ids is None or prompts.spells(side.token_ids, side)
    return side if known else replace(side, token_ids=None)


def was_sampled(path: Path, prompts: Prompts) -> bool:
    """Whether these are the pairs that a run has sealed, its prompts rendered and tokenised as these are."""
    if path.name != "data.parquet" or path.parent.name not in (PREFERENCES, SELECTION):
        return False
    made = Stage(path.parent).manifest()
    return made is not None and made.inputs.get("prompts") == prompts.digest


def _length(pair: Pair, prompts: Prompts) -> int:
    """The tokens of the prompt with the longer of its responses."""
    tokens = tokenize(pair, prompts)
    return len(tokens.prompt) + max(len(tokens.chosen), len(tokens.rejected))
