"""Progress of long work: a bar with count and rate on a terminal, a log line every half minute elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

_LOG_SECONDS = 30.0


@contextmanager
def progress(description: str, total: int, *, unit: str) -> Generator[Callable[[int], None]]:
    """Yields `advance(n)`; call it with the number of units finished since the last call.

    total: how many are expected at most; one that turns out too small (samples that other runs lent) is not shown.
    """
    started = last = time.monotonic()
    done = 0
    if sys.stderr.isatty():
        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total or None, rate="")

            def advance_bar(count: int) -> None:
                nonlocal done
                done += count
                bar.update(task, advance=count, rate=f"{done / max(1e-9, time.monotonic() - started):.1f} {unit}/s")

            yield advance_bar
    else:

        def advance_log(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= _LOG_SECONDS:
                last = now
                of = f" of {total}" if done <= total else ""
                log.info("%s: %d%s %s, %.1f a second", description, done, of, unit, done / (now - started))

        yield advance_log
    if done:
        seconds = time.monotonic() - started
        log.info("%s: %d %s in %.0f s, %.1f a second", description, done, unit, seconds, done / seconds)
