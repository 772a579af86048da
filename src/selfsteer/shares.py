"""Scoring shared out over the launcher's processes: each scores every n-th group, into parts of its own of the journal.

    <stage>/scoring/groups.jsonl   what is to be scored: a key and its pairs a line
    <stage>/scoring/job.json       the model, and how it computes
    <stage>/scoring/PARENT         locked while the parent lives and wants the scores
    <stage>/scoring/GROUP          locked, by all of them, while one process of the group lives

Nothing has to be agreed on, so nothing is: a process that is killed leaves what it had finished, and the same command scores
the rest, with as many processes as the recipe then says. Left out on purpose: the scoring (`scoring.py`), and machines that
do not see the folder of the run.
"""

import fcntl
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from selfsteer import interrupt, schemas
from selfsteer.durable import canonical_json, make_folder
from selfsteer.journal import Journal
from selfsteer.launch import accelerate_command, run_processes
from selfsteer.locks import held, stop_when_free, wait_until_free
from selfsteer.pairs import pair_row
from selfsteer.progress import progress
from selfsteer.recipe import Launcher, Policy, Training
from selfsteer.scoring import KeyedPairs, score_into

log = logging.getLogger(__name__)

_FOLDER, _GROUPS, _JOB, _PARENT, _GROUP = "scoring", "groups.jsonl", "job.json", "PARENT", "GROUP"


class Scoring(NamedTuple):
    """What is scored with, and what is said meanwhile."""

    policy: Policy
    """`policy.model` is a local folder."""
    training: Training
    description: str


def settle(journal: Journal) -> None:
    """Wait for processes that a killed parent left behind, and take in what they scored; before asking what is missing."""
    folder = _folder(journal)
    if not folder.is_dir():
        return
    wait_until_free(folder / _GROUP, lambda: log.info("%s: an earlier scoring is still ending; waiting for it", folder))
    journal.reread()
    shutil.rmtree(folder)


def score_shared(groups: Iterable[KeyedPairs], journal: Journal, scoring: Scoring, launcher: Launcher) -> None:
    """Score groups that the journal lacks, each key once; returns, or raises, with all that was finished in the journal.

    Raises ChildProcessError when a process ended early, and leaves a stop that was asked for to the caller.
    """
    folder = _folder(journal)
    make_folder(folder)
    with (folder / _GROUPS).open("wb") as file:
        for key, pairs in groups:
            file.write(canonical_json({"key": key, "pairs": [pair_row(pair) for pair in pairs]}) + b"\n")
    job = {
        "policy": scoring.policy.model_dump(mode="json"),
        "training": scoring.training.model_dump(mode="json"),
        "description": scoring.description,
        "parts": str(journal.folder),
    }
    (folder / _JOB).write_bytes(canonical_json(job))
    command = [*accelerate_command(launcher, "selfsteer.shares"), str(folder)]
    with held(folder / _PARENT) as let_go, (folder / _GROUP).open("ab") as group:
        # Handed on to the launcher: processes that have not come to take the lock themselves are waited for, too.
        fcntl.flock(group, fcntl.LOCK_SH)
        status = run_processes(command, let_go, pass_fds=[group.fileno()])
    settle(journal)
    if status and not interrupt.stop_requested():
        raise ChildProcessError(
            f"{folder.parent}: the processes that score ended early (status {status}); what they said is"
            " above. The same command scores the rest."
        )


def _folder(journal: Journal) -> Path:
    return journal.folder.with_name(_FOLDER)


# --- one process of the group ----------------------------------------------------------------------------------------------


def main() -> None:
    """Score this process's share."""
    folder = Path(sys.argv[1])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job: dict[str, Any] = json.loads((folder / _JOB).read_bytes())
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("selfsteer").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    total = sum(1 for _ in _share(folder, rank, count))
    description = f"{job['description']} (1 of {count} processes)"
    with interrupt.graceful_stop(), (folder / _GROUP).open("ab") as group:
        fcntl.flock(group, fcntl.LOCK_SH)
        stop_when_free(folder / _PARENT)
        # What is asked for is what the parent did not find: the other parts need not be read.
        with (
            Journal(Path(job["parts"]), writer=f"main-{rank}", read=False) as journal,
            progress(description, total, unit="queries") as advance,
        ):
            policy, training = Policy.model_validate(job["policy"]), Training.model_validate(job["training"])
            score_into(journal, _share(folder, rank, count), (policy, training), advance)


def _share(folder: Path, rank: int, count: int) -> Iterator[KeyedPairs]:
    with (folder / _GROUPS).open("rb") as lines:
        for number, line in enumerate(lines):
            if number % count == rank:
                group = json.loads(line)
                yield group["key"], [schemas.pair(row) for row in group["pairs"]]


if __name__ == "__main__":
    main()
