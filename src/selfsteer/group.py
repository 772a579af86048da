"""One process of a group that trains, and the files by which it and its parent (`launch.py`) know of each other.

    output/job.json       the training (`TrainingJob.as_json`)
    output/outcome.json   what the first process says at the end: its result, or why there is none
    output/PARENT         locked while the parent lives and wants the training: when the lock goes (a signal, kill -9), the
                          group saves a complete checkpoint and ends
    output/GROUP          locked while a group trains here: the next parent waits until it is gone

Left out on purpose: who starts the processes, and the training.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from selfsteer import interrupt, processes
from selfsteer.durable import replacing
from selfsteer.locks import stop_when_free
from selfsteer.trainer import TrainingDiverged
from selfsteer.training import TrainingJob, train

JOB, OUTCOME, PARENT, GROUP = "job.json", "outcome.json", "PARENT", "GROUP"


def is_first() -> bool:
    """Whether this is the process that speaks for the group; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def take_part(job: TrainingJob) -> None:
    """Train; the first process leaves the outcome. Raises ValueError, in every process, for a job that can't be done."""
    output, first = Path(job.output), is_first()
    with (output / GROUP).open("ab") as group:
        if first:
            fcntl.flock(group, fcntl.LOCK_EX)
            stop_when_free(output / PARENT)
        # Agreed on by all processes, these end without torch's report of a failed process.
        try:
            outcome: dict[str, Any] = {"result": train(job)._asdict()}
        except interrupt.Interrupted:
            outcome = {"stopped": True}
        except TrainingDiverged as error:
            outcome = {"diverged": str(error)}
        except ValueError as error:
            if first:
                _say(output, {"refused": str(error)})
            raise
        if first:
            _say(output, outcome)
        processes.end()


def _say(output: Path, outcome: dict[str, Any]) -> None:
    with replacing(output / OUTCOME) as file:
        file.write(json.dumps(outcome).encode())
