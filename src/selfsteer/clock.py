"""Where the seconds of this process go: named parts, each without those inside it; and what memory it holds at most.

    with part("score"): ...                      # what is loaded within it counts as "load"
    for answer in timed("sample", answers): ...  # the time that the iterator takes, not what is done with an answer

Always on: a part costs about a microsecond. Only the main thread has parts; what it waits for elsewhere (a server) is of
the part in which it waits, and processes that work for this one tell what they spent (`take_in`). A GPU computes behind the
calls that start it: there `exact` makes the ends of parts wait for it, which `selfsteer run --profile` asks for; without,
the seconds of a part are those until Python went on.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

Part = Literal[
    "load", "render", "sample", "score", "forward", "backward", "optimizer", "measure", "checkpoint", "journal", "seal"
]
PARTS: tuple[Part, ...] = get_args(Part)
"""load: models and servers. render: messages to token ids. score: log-probabilities without gradient. measure: what a user
reads and training does not need. checkpoint: of trainings, and models that are delivered. journal: samples made durable.
seal: finished stages written, forced to the disk, hashed; and hashed again where they are reused."""

PRODUCTS: frozenset[Part] = frozenset(("sample", "score", "forward", "backward", "optimizer"))
"""The work itself: what a model computes for the data and the policy."""

Item = TypeVar("Item")


class Spent(NamedTuple):
    """What a part took."""

    seconds: float = 0.0
    tokens: int = 0
    """Of responses: sampled, scored or trained on; 0 of parts that have none."""


class Taken(NamedTuple):
    """What a piece of work took, all sessions together."""

    seconds: float = 0.0
    parts: Mapping[str, Spent] = {}
    memory: Mapping[str, int] = {}
    """Bytes at the peak of any session: of this process in "ram", of what it allocated on "gpu"; absent where not known."""


@dataclass(slots=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    tokens: dict[str, int] = field(default_factory=dict[str, int])
    held: Mapping[str, int] = field(default_factory=dict[str, int])
    """By processes that worked for this one, since `begin_peaks`."""
    now: Part | None = None
    since: float = 0.0
    finish: Callable[[], None] | None = None

    def switch(self, to: Part | None) -> Part | None:
        """End the part under way, begin another; returns the former."""
        if self.finish is not None:
            self.finish()
        was, at = self.now, time.perf_counter()
        if was is not None:
            self.seconds[was] = self.seconds.get(was, 0.0) + at - self.since
        self.now, self.since = to, at
        return was


_clock = _Clock()


@contextmanager
def part(name: Part) -> Generator[None]:
    """The time of the block, less that of parts within it; a decorator as well. Not around a `yield`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = _clock.switch(name)
    try:
        yield
    finally:
        _clock.switch(outer)


def timed(name: Part, items: Iterable[Item]) -> Iterator[Item]:
    """The items; what it takes to get each is of this part."""
    iterator = iter(items)
    nothing = object()
    while True:
        with part(name):
            item = next(iterator, nothing)
        if item is nothing:
            return
        yield item  # pyright: ignore[reportReturnType]


def count(name: Part, tokens: int) -> None:
    """So many more tokens of this part."""
    _clock.tokens[name] = _clock.tokens.get(name, 0) + tokens


def tokens() -> int:
    """Tokens of all parts so far."""
    return sum(_clock.tokens.values())


def spent() -> dict[str, Spent]:
    """What each part of this process took so far, the one under way included."""
    seconds, now, began = dict(_clock.seconds), _clock.now, _clock.since
    if now is not None:
        seconds[now] = seconds.get(now, 0.0) + time.perf_counter() - began
    tokens = dict(_clock.tokens)
    return {name: Spent(seconds.get(name, 0.0), tokens.get(name, 0)) for name in PARTS if name in seconds or name in tokens}


def since(before: Mapping[str, Spent], earlier: Mapping[str, Spent]) -> dict[str, Spent]:
    """What was spent since `before`, added to what `earlier` sessions spent."""
    now = spent()
    found: dict[str, Spent] = {}
    for name in PARTS:
        then, one, other = (each.get(name, Spent()) for each in (before, now, earlier))
        both = Spent(round(one.seconds - then.seconds + other.seconds, 3), one.tokens - then.tokens + other.tokens)
        if both.seconds > 0 or both.tokens > 0:
            found[name] = both
    return found


def take_in(seconds: Mapping[str, float], tokens: Mapping[str, int], held: Mapping[str, int]) -> None:
    """What processes spent that this one has waited for, outside of any part, and bytes that they held at most."""
    for name, spent in seconds.items():
        _clock.seconds[name] = _clock.seconds.get(name, 0.0) + spent
    for name, spent in tokens.items():
        _clock.tokens[name] = _clock.tokens.get(name, 0) + spent
    _clock.held = most(_clock.held, held)


_OF_PROCESS = Path("/proc/self")


def begin_peaks() -> bool:
    """Forget what memory was held before; False where this system can't, and `peaks` would tell of the whole process."""
    _clock.held = {}
    if (cuda := _cuda()) is not None:
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)
    try:
        (_OF_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peaks() -> dict[str, int]:
    """Bytes held at most since `begin_peaks`, as in `Taken`: by this process, or by those that worked for it together."""
    found: dict[str, int] = {}
    if (ram := _status("VmHWM")) is not None:
        found["ram"] = ram
    if (cuda := _cuda()) is not None:
        found["gpu"] = sum(cuda.max_memory_allocated(device) for device in range(cuda.device_count()))
    return most(found, _clock.held)


def held() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not tell."""
    return _status("VmRSS")


def _status(name: str) -> int | None:
    status = _OF_PROCESS / "status"
    kilobytes = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    return None if kilobytes is None else int(kilobytes[1]) * 1024


def most(*held: Mapping[str, int]) -> dict[str, int]:
    """The largest of several peaks, each of its kind."""
    return {where: max(each.get(where, 0) for each in held) for where in {name for each in held for name in each}}


def _cuda() -> Any:
    """torch.cuda, where this process uses it: to look must not load it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


@contextmanager
def exact(finish: Callable[[], None]) -> Generator[None]:
    """Every part that begins or ends in the block waits for the device first, with `finish`."""
    _clock.finish = finish
    try:
        yield
    finally:
        _clock.finish = None
