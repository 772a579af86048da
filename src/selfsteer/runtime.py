"""What a process hears and says while it works: requests to stop, and progress.

SIGTERM and SIGINT: stop submitting, drain, make durable, exit with 128 + signal number. The first signal only raises a flag
that long loops look at; a second one of the same kind ends the process at once (what is durable stays durable).

Progress of long work: a bar with count and rate on a terminal, a log line every half minute elsewhere.
"""

import logging
import signal
import sys
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
    _received = signum
    signal.signal(signum, signal.SIG_DFL)
    log.warning(
        "%s: finishing what is under way; once more ends it at once: finished samples and complete checkpoints are safe,"
        " and the same command goes on from them",
        signal.Signals(signum).name,
    )


@contextmanager
def graceful_stop() -> Generator[None]:
    """Turn SIGINT and SIGTERM into a request to stop while the block runs (main thread only)."""
    global _received
    _received = None
    previous = {signum: signal.signal(signum, _request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
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
def progress(description: str, total: int, *, unit: str) -> Generator[Callable[[int], None]]:
    """Yields `advance(n)`; call it with the number of units finished since the last call.

    total: how many are expected at most; one that turns out too small (samples that other runs lent) is not shown.
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
                left = f", {duration((total - done) * (now - started) / done)} left" if of and done else ""
                log.info("%s: %d%s %s, %s%s", description, done, of, unit, speed(), left)

        yield advance_log
    if done:
        log.info("%s: %d %s in %.0f s, %s", description, done, unit, time.monotonic() - started, speed())


def _rate(units: float) -> str:
    """units: a second."""
    return f"{units:.1f} a second" if units >= 0.1 or units == 0 else f"{60 * units:.1f} a minute"
