"""One model on every task: asked through the recipe's engines, journalled like any other sample, counted once.

    task                                who says what is right
    alpaca_eval, mt_bench, arena_hard   a judge
    any other name                      lm-evaluation-harness (`harness.py`, which is imported only for these)

An item that can't be asked (special tokens in its text, longer than the model's context) or gets no answer counts as wrong
and is counted by its reason beside every figure; one with given answers, of which no probability can be had, ends the
evaluation with its reason. Left out on purpose: which judge, and where results are kept.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfsteer.engines import open as opening
from selfsteer.engines.base import Engine, Failed, Request
from selfsteer.engines.open import prompts_of, sampler_digest
from selfsteer.engines.sampling import Sampler, kept_open, request, sample, seed_for, spoken
from selfsteer.evaluations.asking import Answer, Ask, Asked, Choices, Score
from selfsteer.evaluations.judged import JUDGED, JudgedTask, Verdicts
from selfsteer.evaluations.results import Evaluation, TaskResult
from selfsteer.models import end_ids, positions_of, resolve, tell_of_other_sampling
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import DTypeName, EngineSection, runs_already
from selfsteer.recipe.sections import EvaluationSection, Policy, Training
from selfsteer.records import Checkpoint, Message, Pair, side
from selfsteer.store.journal import Journal
from selfsteer.training.scoring import Group, Scorer, score_missing, scores

log = logging.getLogger(__name__)

_SHOWN = 2000
"""Characters of a first prompt that are logged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """A model that answers; `answering` makes it."""

    name: str
    policy: Policy
    model: Checkpoint
    engine: EngineSection
    prompts: Prompts
    context: int | None
    """Tokens that its context holds; None where nobody says."""

    def request(self, asked: Asked) -> Request | str:
        """The engine's request for an item, or why it must not be asked."""
        messages = self.prompts.fold(asked.messages)
        ids = self.prompts.checked_ids(messages)
        if isinstance(ids, str):
            return ids
        sampling = asked.sampling
        if self.context is not None:
            room = self.context - len(ids)
            if room < 1:
                return "longer than the model's context"
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        identity = sampler_digest(self.engine, self.model)
        seed = seed_for("evaluation", asked.repeat)
        return request(self.prompts, messages, model_digest=identity, sampling=sampling, seed=seed)

    def open(self) -> Engine:
        """Its engine; raises ValueError, before anything is started, for what the engine lacks."""
        trust = self.policy.trust_remote_code
        return opening.open_engine(self.engine, self.model, self.prompts, trust_remote_code=trust)


def answering(policy: Policy, engine: EngineSection, *, name: str | None = None) -> Answering:
    """The model that a policy section names, behind an engine. name: what people call it, where that is not its reference.

    Raises ValueError for a model that is not there or has no chat template, and for what the engine lacks.
    """
    model = resolve(policy)
    found = Answering(
        name=name or policy.model,
        policy=policy,
        model=model,
        engine=engine,
        prompts=prompts_of(policy, model),
        context=positions_of(model.path, trust_remote_code=policy.trust_remote_code),
    )
    found.open()  # and never entered
    if not runs_already(engine):
        tell_of_other_sampling(model.path)
    return found


# --- answers and scores ----------------------------------------------------------------------------------------------------


def ask_with(sampler: Sampler, request: Callable[[Asked], Request | str], journal: Journal, description: str) -> Ask:
    """`Ask` through an engine and a journal: what was answered before is not asked again.

    request: an item as the engine is asked it, or why it must not be.
    """

    def ask(items: Sequence[Asked]) -> Sequence[Answer]:
        requests = [request(item) for item in items]
        wanted = [each for each in requests if not isinstance(each, str)]
        sample(sampler, wanted, journal, description=description, total=len(journal) + len(wanted))
        return [Answer("", error=each) if isinstance(each, str) else _answer(journal, each) for each in requests]

    return ask


def _answer(journal: Journal, wanted: Request) -> Answer:
    said = spoken(journal, wanted)
    if isinstance(said, Failed):
        return Answer("", error=said.reason)
    return Answer(said.text, cut=said.finish_reason == "length")


def score_with(model: Answering, training: Training, journal: Journal) -> Score:
    """`Score` through the forward pass that training takes, each prompt computed once for two continuations."""
    scorer = Scorer(model.model, model.policy, model.prompts, training)

    def score(items: Sequence[Choices]) -> list[list[float]]:
        groups = [_group(scorer, model.prompts, item) for item in items]
        score_missing(scorer, iter(groups), journal, description="given answers", total=len(groups))
        return [_scored(journal, group, len(item.continuations)) for group, item in zip(groups, items, strict=True)]

    return score


def _group(scorer: Scorer, prompts: Prompts, item: Choices) -> Group:
    """An item with its continuations. ValueError where it must not or can't be scored."""
    messages = prompts.fold(item.messages)
    try:
        reason = prompts.quarantine_reason(messages)
        if reason is not None:
            raise ValueError(reason)
        return scorer.group(list(_pairs(messages, item.continuations)))
    except ValueError as error:
        said = f"an item can't be scored ({error}): {messages[-1]['content'][:80]!r}"
        raise ValueError(f"{said}; leave this task out, or set fewshot lower where it is too long") from error


def _pairs(messages: tuple[Message, ...], texts: Sequence[str]) -> Iterator[Pair]:
    """The continuations two by two, without an end token: their probability is the texts' own."""
    for first in range(0, len(texts), 2):
        # An odd one out goes with the first once more.
        second = texts[first + 1] if first + 1 < len(texts) else texts[0]
        yield Pair(
            query_id="evaluation",
            kind="given",
            prompt=messages,
            chosen=side(texts[first], "length"),
            rejected=side(second, "length"),
        )


def _scored(journal: Journal, group: Group, count: int) -> list[float]:
    found = [each.score.logps for pair in scores(journal, group) for each in (pair.chosen, pair.rejected)]
    return found[:count]


# --- all tasks -------------------------------------------------------------------------------------------------------------


class Plan:
    """The tasks, read and checked before anything is generated; `evaluate` asks them of one model after another."""

    def __init__(self, section: EvaluationSection, scratch: Path, judge: Verdicts | None, *, scores: bool) -> None:
        """scratch: where local data is laid out. scores: whether log-probabilities of the models are to be had.

        Raises ValueError for a task that is unknown, has no data, needs a judge where there is none, or can't be asked.
        """
        self.section, self.judge = section, judge
        names = list(section.tasks)
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"evaluation.tasks: {', '.join(names) or 'none'}; name each task once")
        self.data = None if section.data is None else Path(section.data)
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"evaluation.data: {self.data} is not a folder")
        self._judged = [self._judged_task(name) for name in names if name in JUDGED]
        plain = [name for name in names if name not in JUDGED]
        self._harness = None
        if plain:
            self._harness = _harness(section.model_copy(update={"tasks": plain}), scratch, scores=scores)

    def _judged_task(self, name: str) -> JudgedTask:
        if self.judge is None:
            raise ValueError(f"evaluation.tasks: {name} needs a judge; name one (--judge, or the recipe's judge section)")
        if self.data is None:
            raise ValueError(f"evaluation.tasks: {name} needs its files; set evaluation.data (--data DIR with DIR/{name})")
        return JUDGED[name](self.data / name, self.judge, self.section.limit)

    def evaluate(self, model: Answering, journal: Journal) -> Evaluation:
        """Every task, answered by this model."""
        started = time.monotonic()
        found: list[TaskResult] = []
        answers = f"answers of {Path(model.name).name}"
        if self._harness is not None:
            # The engine is open while answers are sampled: choices are scored by weights of their own.
            ask = ask_with(Sampler(model.open, model.prompts), model.request, journal, answers)
            found += self._harness(ask, score_with(model, Training(dtype=_dtype(model.engine)), journal))
        with kept_open(model.open) as engine:
            ask = ask_with(Sampler(engine, model.prompts), model.request, journal, answers)
            answered = [task(_capped(ask, self.section.max_new_tokens)) for task in self._judged]
        # The model's engine has let go of its memory before the judge's takes it.
        found += [judged() for judged in answered]
        named = {task.task: task for task in found if task.first is not None}
        firsts = {name: _rendered(model, task.first) for name, task in named.items() if task.first is not None}
        for name in self.section.tasks:
            if name in firsts:
                log.info("%s, the first item as %s reads it:\n%s", name, model.name, firsts[name][:_SHOWN])
        ends = sorted(end_ids(model.model.path, model.prompts.tokenizer))
        return Evaluation(
            model=model.name,
            digest=model.model.digest,
            tasks=found,
            seconds=time.monotonic() - started,
            first_prompts=firsts,
            ends=[str(model.prompts.tokenizer.convert_ids_to_tokens(end)) for end in ends],
        )


def _capped(ask: Ask, limit: int | None) -> Ask:
    """Answers of at most so many tokens, instead of the task's own limit."""
    if limit is None:
        return ask
    return lambda items: ask([item._replace(sampling=replace(item.sampling, max_new_tokens=limit)) for item in items])


def _dtype(engine: EngineSection) -> DTypeName:
    return engine.dtype if engine.kind == "transformers" or engine.kind == "vllm" else "auto"


def _rendered(model: Answering, messages: tuple[Message, ...]) -> str:
    ids = model.prompts.prompt_ids(model.prompts.fold(messages))
    return str(model.prompts.tokenizer.decode(list(ids)))


def _harness(section: EvaluationSection, scratch: Path, *, scores: bool) -> Callable[[Ask, Score], list[TaskResult]]:
    try:
        from selfsteer.evaluations.harness import Harness
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluation.tasks: {', '.join(section.tasks)} come from lm-evaluation-harness, and {error.name} is not"
            " installed: pip install 'selfsteer[evaluate]'"
        ) from error
    return Harness(section, scratch, scores=scores).evaluate
