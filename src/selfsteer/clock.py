"""Wall-clock time of a stage over all its sessions, so that a killed and continued run still says what it cost."""

import json
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

_FILE = "elapsed.json"
_EVERY_SECONDS = 5.0


@contextmanager
def elapsed(folder: Path) -> Generator[Callable[[], float]]:
    """Yields a function that returns the seconds spent in `folder` so far, earlier sessions included.

    The sum is kept in elapsed.json every five seconds: a kill loses at most that much.
    """
    file = folder / _FILE
    earlier = _read(file)
    started = time.monotonic()
    finished = threading.Event()

    def seconds() -> float:
        return earlier + time.monotonic() - started

    def keep() -> None:
        while not finished.wait(_EVERY_SECONDS):
            _write(file, seconds())

    keeper = threading.Thread(target=keep, daemon=True, name="selfsteer-clock")
    keeper.start()
    try:
        yield seconds
    finally:
        finished.set()
        keeper.join()
        _write(file, seconds())


def _read(file: Path) -> float:
    try:
        return float(json.loads(file.read_text())["seconds"])
    except (FileNotFoundError, ValueError, KeyError):
        return 0.0


def _write(file: Path, seconds: float) -> None:
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"seconds": round(seconds, 3)}))
    unfinished.replace(file)
