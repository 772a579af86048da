"""SIGTERM and SIGINT: stop submitting, drain, make durable, exit with 128 + signal number.

The first signal only raises a flag that long loops look at; a second one of the same kind ends the process at once (what is
durable stays durable).
"""

import logging
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

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


def request_stop(signum: int = signal.SIGTERM) -> None:
    """Ask this process to stop as a signal would, in processes whose signals are not ours (Ray's workers)."""
    global _received
    _received = signum


def _request_stop(signum: int, _frame: FrameType | None) -> None:
    global _received
    _received = signum
    signal.signal(signum, signal.SIG_DFL)
    log.warning("%s: finishing what is under way; once more to abandon it", signal.Signals(signum).name)


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
