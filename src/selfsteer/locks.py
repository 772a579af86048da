"""Kernel locks by which a process and the group of processes that it starts know of each other's life.

A lock ends with its holder, kill -9 included, so there is nothing stale to clean up.
"""

import fcntl
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from selfsteer import interrupt

LOOK_SECONDS = 0.2


@contextmanager
def held(path: Path) -> Generator[Callable[[], None]]:
    """Holds a lock; yields what lets it go early."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lambda: fcntl.flock(file, fcntl.LOCK_UN)


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_until_free(path: Path, say: Callable[[], None]) -> None:
    """Wait for whoever holds the lock; say is called once, if there is someone. Raises Interrupted when asked to stop."""
    said = False
    while not is_free(path):
        interrupt.raise_if_stopped()
        if not said:
            say()
            said = True
        time.sleep(LOOK_SECONDS)


def stop_when_free(path: Path) -> None:
    """Ask this process to stop when the holder of the lock lets it go, or is gone."""

    def wait() -> None:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        interrupt.request_stop()

    threading.Thread(target=wait, daemon=True).start()
