"""Waiting for what other processes do, and stopping them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from selfsteer import runtime
from selfsteer.recipe.sections import Launcher
from selfsteer.training import checkpoints
from selfsteer.training.launch import launch
from selfsteer.training.train import TrainingJob
from selfsteer.training.trainer import read_history

T = TypeVar("T")


def until(true: Callable[[], T], what: str, *, seconds: float) -> T:
    """The first true value, for which it waits so long and no longer."""
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def stop_amid_training(job: TrainingJob, launcher: Launcher, *, seconds: float) -> None:
    """SIGTERM to this process after the first step of a long training, which ends it in a complete checkpoint."""
    history = Path(job.output) / "history.jsonl"

    def stop() -> None:
        until(lambda: read_history(history), "the first step", seconds=seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    with runtime.graceful_stop():
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(runtime.Interrupted) as stopped:
            launch(job, launcher)
    assert stopped.value.exit_status == 143
    last = checkpoints.latest(Path(job.output))
    assert last is not None
    assert checkpoints.step_of(last) == len(read_history(history)) < 600
