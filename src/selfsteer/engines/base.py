"""The seam for generation: requests in, completions out as they finish.

Left out on purpose: anything about principles, pairs or files. An engine is opened inside a stage and closed with it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from selfsteer.records import FinishReason, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. Field names follow vLLM's SamplingParams."""

    temperature: float = 0.7
    """0 takes the most probable token."""
    top_p: float = 0.8
    max_new_tokens: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be answered once."""

    key: str
    """Content key of the wanted sample; comes back with the completion."""
    messages: tuple[Message, ...]
    sampling: Sampling
    seed: int
    prompt_ids: tuple[int, ...] = ()
    """The rendered prompt as token ids, for engines that hold the tokenizer's model. An engine is given them; a request that
    is only wanted has none: most are answered in the journal, and rendering costs more than all else about them."""
    adapter: str | None = None
    """Name of the adapter to apply, of those that the engine was opened with; None for the model as it is."""
    top_logps: int = 0
    """Report so many of the most probable first tokens (`Completion.first_logps`), where the engine can."""


class TokenLogp(NamedTuple):
    """A token that might have come next."""

    text: str
    """Several tokens may have the same text."""
    logp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one request."""

    key: str
    text: str
    token_ids: tuple[int, ...]
    """As they were sampled, without the end token."""
    finish_reason: FinishReason
    end_id: int | None = None
    """The end token that was sampled; None of a response that was cut off, and where an engine does not tell."""
    reencoded: bool = False
    """The engine was told only the text: `token_ids` is that text encoded again, good for its length and nothing else."""
    thought: bool = False
    """A thought stood before it, which the engine keeps apart: it was not sampled behind the prompt alone."""
    first_logps: tuple[TokenLogp, ...] | None = None
    """The most probable first tokens, before temperature and top-p, where `Request.top_logps` asked for them; None of an
    engine that does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A request that was not and will not be answered; the others go on."""

    key: str
    reason: str
    """Short and the same for all requests that failed alike, so that it can be counted."""
    detail: str = ""
    """What is particular to this request."""


class Engine(Protocol):
    """Answers requests; yields each completion as soon as it is finished, in any order.

    A request that cannot be answered for a reason of its own is yielded as `Failed`: it becomes a dropped row. What
    concerns all requests is raised.

    An engine looks at `runtime.stop_requested()` before it admits a further request: once it is true, the engine
    finishes what is under way and returns.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion | Failed]:
        """Pull the requests lazily and answer each once."""
        ...
