"""What an evaluation asks, and what it gets back; who answers is the caller's."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from selfsteer.engines.base import Sampling
from selfsteer.records import Message


class Asked(NamedTuple):
    """An item to answer."""

    messages: tuple[Message, ...]
    sampling: Sampling
    repeat: int = 0
    """Which of several answers to the same item."""


class Answer(NamedTuple):
    """What came back."""

    text: str
    cut: bool = False
    """It reached the limit of new tokens."""
    error: str | None = None
    """Why there is none; the text is empty then."""


class Choices(NamedTuple):
    """An item whose answers are given."""

    messages: tuple[Message, ...]
    continuations: tuple[str, ...]


Ask = Callable[[Sequence[Asked]], Sequence[Answer]]
"""Answers, in the order of what was asked."""

Score = Callable[[Sequence[Choices]], Sequence[Sequence[float]]]
"""The log-probability of each continuation, summed over its tokens."""
