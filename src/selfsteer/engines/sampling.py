"""Sampling through an engine, into a journal: what is wanted, less what is there already.

Both samplings of the method (by the policy, by the data generator) and the generation of principles are this one loop. What
has to be read (principles, verdicts) is asked again until it can be: `unread`.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from selfsteer.clock import count, part, timed
from selfsteer.engines.base import Completion, Engine, Failed, Request, Sampling
from selfsteer.prompts import Prompts, behind_thought
from selfsteer.records import Message, Response
from selfsteer.runtime import progress, raise_if_stopped
from selfsteer.store import columns
from selfsteer.store.durable import digest
from selfsteer.store.folder import SCHEMA_VERSION
from selfsteer.store.journal import Journal


def seed_for(*parts: str | int) -> int:
    """A 32-bit seed that depends on its parts only: not on order, time or the number of others."""
    return int(digest(list(parts))[:8], 16)


def request(prompts: Prompts, messages: tuple[Message, ...], *, model_digest: str, sampling: Sampling, seed: int) -> Request:
    """A request whose key is the content that determines its completion (no paths, times or endpoints); not yet rendered."""
    key = digest(
        {
            "schema": SCHEMA_VERSION,
            "model": model_digest,
            "messages": messages,
            "prompts": prompts.digest,
            **{name: getattr(sampling, name) for name in Sampling.__dataclass_fields__},
            "seed": seed,
        }
    )
    return Request(key=key, messages=messages, sampling=sampling, seed=seed)


class Sampler(NamedTuple):
    """What answers requests."""

    open_engine: Callable[[], AbstractContextManager[Engine]]
    prompts: Prompts | None
    """How they are rendered for it; None of a server that renders messages itself."""


@contextmanager
def kept_open(open_engine: Callable[[], Engine]) -> Generator[Callable[[], AbstractContextManager[Engine]]]:
    """Gives `sample` an engine that stays open from its first use to the end of the block."""
    with ExitStack() as stack:
        opened = cache(lambda: stack.enter_context(open_engine()))
        yield lambda: nullcontext(opened())


def sample(sampler: Sampler, wanted: Iterable[Request], journal: Journal, *, description: str, total: int) -> None:
    """Answer every wanted request that the journal lacks; the engine is opened only when there is one.

    wanted is read lazily, once; what is sent is rendered here, and nothing else is. total, the number of wanted requests, is
    for the progress bar. Raises Interrupted, with all finished samples durable, when a signal asked to stop.
    """
    lacking = journal.lacking(wanted, key=lambda item: item.key)
    if lacking is None:
        return
    to_send = (_rendered(item, sampler.prompts) for item in lacking)
    left = max(0, total - len(journal))
    with (
        progress(description, left, unit="responses", side_by_side=True) as advance,
        _loaded(sampler.open_engine()) as engine,
    ):
        answers = map(_counted, timed("sample", engine.generate(to_send)))
        journal.fill(((answer.key, _data(answer)) for answer in answers), advance)
    raise_if_stopped()


Question = Callable[[int], Request]
"""The request of each try, from 0: the same question, under a key of its own."""


def unread(
    questions: Callable[[], Iterable[Sequence[Question]]], journal: Journal, readable: Callable[[str], bool], *, tries: int
) -> Iterator[Iterator[list[Request]]]:
    """Try by try, what is to be asked: the questions of which every earlier try was answered, and none readably.

    questions: in groups that are asked together, each time from the beginning. readable: of an answered request's key.
    The first try has all questions, a later one leaves out what it has answered already. Whoever takes a try sends it before
    the next.
    """

    def asked(question: Question, number: int) -> bool:
        earlier = (question(each).key for each in range(number))
        return all(key in journal and not readable(key) for key in earlier)

    def wanted(group: Sequence[Question], number: int) -> list[Request]:
        requests = [question(number) for question in group if asked(question, number)]
        return requests if number == 0 else [request for request in requests if request.key not in journal]

    for number in range(tries):
        yield (wanted(group, number) for group in questions())


@contextmanager
def _loaded(engine: AbstractContextManager[Engine]) -> Generator[Engine]:
    with ExitStack() as stack:
        with part("load"):
            opened = stack.enter_context(engine)
        yield opened


def _counted(answer: Completion | Failed) -> Completion | Failed:
    if isinstance(answer, Completion):
        count("sample", len(answer.token_ids))
    return answer


def response(journal: Journal, wanted: Request) -> Response | Failed:
    """The journalled answer to a request, or why there is none; one with a thought in it is none."""
    data = journal.get(wanted.key)
    found = _answer(data, wanted)
    if isinstance(found, Response) and ("thought" in data or behind_thought(found.text) != found.text):
        detail = "turn thinking off with policy.template_arguments"
        return Failed(key=wanted.key, reason="a thought in the response", detail=detail)
    return found


def spoken(journal: Journal, wanted: Request) -> Response | Failed:
    """The same for who reads its text alone: of one with a thought that which stands behind it."""
    found = _answer(journal.get(wanted.key), wanted)
    if isinstance(found, Failed):
        return found
    said = behind_thought(found.text)
    if said is None:
        return Failed(key=wanted.key, reason="a thought without an answer")
    return replace(found, text=said)


def _answer(data: dict[str, Any], wanted: Request) -> Response | Failed:
    """What the journal keeps of a request's answer."""
    if "failed" in data:
        return Failed(key=wanted.key, reason=data["failed"], detail=data["detail"])
    return columns.response({name: value for name, value in data.items() if name != "thought"} | {"seed": wanted.seed})


@part("render")
def _rendered(item: Request, prompts: Prompts | None) -> Request:
    if prompts is None:
        return item
    return replace(item, prompt_ids=prompts.prompt_ids(item.messages))


def _data(item: Completion | Failed) -> dict[str, object]:
    if isinstance(item, Failed):
        return {"failed": item.reason, "detail": item.detail}
    return {
        "text": item.text,
        "token_ids": list(item.token_ids),
        "finish_reason": item.finish_reason,
        "end_id": item.end_id,
        "reencoded": item.reencoded,
        **({"thought": True} if item.thought else {}),
    }
