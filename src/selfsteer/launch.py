"""Starting a training: in this process, or in several that accelerate and torch start.

Files are the contract. The parent writes the job and waits; `python -m selfsteer.launch JOB` is one process of the group.

    output/job.json       the training (`TrainingJob.as_json`)
    output/outcome.json   what the first process says at the end: its result, or why there is none
    output/PARENT         locked while the parent lives and wants the training: when the lock goes (a signal, kill -9), the
                          group saves a complete checkpoint and ends
    output/GROUP          locked while a group trains here: the next parent waits until it is gone

Left out on purpose: the training (`training.py`), and machines: an accelerate configuration names them, and the folder of
the run has to be on storage that all of them see.
"""

import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from selfsteer import interrupt, processes
from selfsteer.durable import make_folder, replacing
from selfsteer.locks import LOOK_SECONDS, held, stop_when_free, wait_until_free
from selfsteer.recipe import Launcher
from selfsteer.trainer import TrainingDiverged
from selfsteer.training import TrainingJob, TrainingResult, train

log = logging.getLogger(__name__)

_JOB, _OUTCOME, _PARENT, _GROUP = "job.json", "outcome.json", "PARENT", "GROUP"


def launch(job: TrainingJob, launcher: Launcher) -> TrainingResult:
    """Run a training as the recipe's launcher says; what it raises, `training.train` explains.

    Raises ChildProcessError when the processes ended without a word, killed for memory for example.
    """
    if launcher.kind == "local":
        return train(job)
    output = Path(job.output)
    make_folder(output)
    with replacing(output / _JOB) as file:
        file.write(json.dumps(job.as_json()).encode())
    # A parent that was killed leaves a group behind that is still saving.
    wait_until_free(output / _GROUP, lambda: log.info("%s: an earlier training is still ending; waiting for it", output))
    (output / _OUTCOME).unlink(missing_ok=True)
    # A session of its own: Ctrl-C in a terminal reaches this process, which asks the group to stop.
    with (
        held(output / _PARENT) as let_go,
        subprocess.Popen([*_command(launcher), str(output / _JOB)], start_new_session=True) as group,
    ):
        while group.poll() is None:
            if interrupt.stop_requested():
                let_go()
            time.sleep(LOOK_SECONDS)
    return _read_outcome(output, group.returncode)


def _command(launcher: Launcher) -> list[str]:
    return accelerate_command(launcher, "selfsteer.launch")


def accelerate_command(launcher: Launcher, module: str) -> list[str]:
    """What starts a module in the processes that the recipe asks for; its arguments go behind."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if launcher.config is not None:
        command += ["--config_file", launcher.config]
    else:
        command += ["--multi_gpu", "--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no"]
    if launcher.processes is not None:
        command += ["--num_processes", str(launcher.processes)]
    return [*command, "--module", module]


def _read_outcome(output: Path, status: int) -> TrainingResult:
    try:
        outcome: dict[str, Any] = json.loads((output / _OUTCOME).read_bytes())
    except FileNotFoundError:
        outcome = {}
    if "result" in outcome:
        return TrainingResult(**outcome["result"])
    interrupt.raise_if_stopped()
    if "diverged" in outcome:
        raise TrainingDiverged(outcome["diverged"])
    if "refused" in outcome:
        raise ValueError(outcome["refused"])
    raise ChildProcessError(
        f"{output}: the processes of the training ended early (status {status}); what they said is above. The same command"
        " continues from the last complete checkpoint."
    )


# --- one process of the group ----------------------------------------------------------------------------------------------


def main() -> None:
    """Train as one process of a group; the first one leaves its outcome."""
    job = TrainingJob.from_json(json.loads(Path(sys.argv[1]).read_bytes()))
    output = Path(job.output)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("selfsteer").setLevel(logging.INFO if first else logging.ERROR)
    with interrupt.graceful_stop(), (output / _GROUP).open("ab") as group:
        if first:
            fcntl.flock(group, fcntl.LOCK_EX)
            stop_when_free(output / _PARENT)
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
    with replacing(output / _OUTCOME) as file:
        file.write(json.dumps(outcome).encode())


if __name__ == "__main__":
    main()
