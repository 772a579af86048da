"""What a process hears and says while it works: requests to stop, and progress.

SIGTERM and SIGINT: stop submitting, drain, make durable, exit with 128 + signal number. The first signal only raises a flag
that long loops look at; a second one of the same kind ends the process at once, and says so (what is durable stays
durable).

Progress of long work: a bar with count and rate on a terminal, a log line every half minute elsewhere.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfsteer import clock

log = logging.getLogger(__name__)

_received: int | None = None


class Interrupted(Exception):
    """Work stopped on request; everything finished is on disk."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command continues")
        self.exit_status = 128 + signum


def stop_requested() -> bool:
    """Whether a signal asked this process to stop."""
    return _received is not None


def signal_number() -> int:
    """The signal that asked this process to stop; 0 while none did."""
    return _received or 0


def raise_if_stopped() -> None:
    """Raise `Interrupted` when a signal asked this process to stop."""
    if _received is not None:
        raise Interrupted(_received)


def request_stop() -> None:
    """Ask this process to stop as a signal would, in processes whose signals are not ours (Ray's workers)."""
    global _received
    _received = signal.SIGTERM


def _request_stop(signum: int, _frame: FrameType | None) -> None:
    global _received
    if _received != signum:
        log.warning("%s: finishing what is under way; once more ends it at once: %s", signal.Signals(signum).name, _SAFE)
    _received = signum


_SAFE = "finished samples and complete checkpoints are safe, and the same command goes on from them"


def _end_at_the_second(signals: int) -> None:
    """End the process at the second signal of a kind. signals: a pipe of their numbers.

    A thread of its own: the main one may be within one long native call (a backward pass), where Python hears no signal.
    """
    heard: set[int] = set()
    while number := os.read(signals, 1):
        if (signum := number[0]) in (signal.SIGINT, signal.SIGTERM):
            if signum in heard:
                said = f"{signal.Signals(signum).name} once more: ended at once; {_SAFE}\n"
                os.write(2, said.encode())
                os._exit(128 + signum)
            heard.add(signum)
    os.close(signals)


@contextmanager
def graceful_stop() -> Generator[None]:
    """Turn SIGINT and SIGTERM into a request to stop while the block runs (main thread only)."""
    global _received
    _received = None
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(heard,), daemon=True).start()
    previous = {signum: signal.signal(signum, _request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(tell)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        _received = None


_LOG_SECONDS = 30.0


def duration(seconds: float) -> str:
    """Seconds as people read them: 8.4 s, 3 min 20 s, 2 h 05 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def counted(reasons: Mapping[str, int]) -> str:
    """How often each reason was met, the most frequent first: 12 too long, 3 empty."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


@contextmanager
def progress(description: str, total: int, *, unit: str, side_by_side: bool = False) -> Generator[Callable[[int], None]]:
    """Yields `advance(n)`; call it with the number of units finished since the last call.

    total: how many are expected at most; one that turns out too small (samples that other runs lent) is not shown.
    side_by_side: many units are under way at a time. What is done of them is not counted, so that the time left is told as
    what it is, too long, the more so the earlier.
    """
    started = last = time.monotonic()
    done, computed = 0, clock.tokens()

    def speed() -> str:
        seconds = max(1e-9, time.monotonic() - started)
        tokens = clock.tokens() - computed
        return f"{_rate(done / seconds)}{f', {tokens / seconds:,.0f} tokens a second' if tokens else ''}"

    if sys.stderr.isatty():
        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total or None, rate="")

            def advance_bar(count: int) -> None:
                nonlocal done
                done += count
                bar.update(task, advance=count, rate=speed())

            yield advance_bar
    else:

        def advance_log(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= _LOG_SECONDS:
                last = now
                of = f" of {total}" if done <= total else ""
                left = duration((total - done) * (now - started) / done) if of and done else ""
                left = f", {'at most ' * side_by_side}{left} left" if left else ""
                log.info("%s: %d%s %s, %s%s", description, done, of, unit, speed(), left)

        yield advance_log
    if done:
        log.info("%s: %d %s in %.0f s, %s", description, done, unit, time.monotonic() - started, speed())


def _rate(units: float) -> str:
    """units: a second."""
    return f"{units:.1f} a second" if units >= 0.1 or units == 0 else f"{60 * units:.1f} a minute"
