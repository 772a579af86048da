"""Starting a training: in this process, in several that accelerate and torch start, or on a Ray cluster.

Files are the contract (`group.py`). The parent writes the job and waits; `python -m selfsteer.launch JOB` is one process of
a group that accelerate starts.

Left out on purpose: the training (`training.py`), and machines: an accelerate configuration or the Ray cluster names them,
and the folder of the run has to be on storage that all of them see.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfsteer import group, interrupt, launch_ray
from selfsteer.durable import make_folder, replacing
from selfsteer.group import GROUP, JOB, OUTCOME, PARENT
from selfsteer.locks import LOOK_SECONDS, held, wait_until_free
from selfsteer.recipe import Launcher
from selfsteer.trainer import TrainingDiverged
from selfsteer.training import TrainingJob, TrainingResult, train

log = logging.getLogger(__name__)


def launch(job: TrainingJob, launcher: Launcher) -> TrainingResult:
    """Run a training as the recipe's launcher says; what it raises, `training.train` explains.

    Raises ChildProcessError when the processes ended without a word, killed for memory for example.
    """
    if launcher.kind == "local":
        return train(job)
    output = Path(job.output)
    make_folder(output)
    with replacing(output / JOB) as file:
        file.write(json.dumps(job.as_json()).encode())
    # A parent that was killed leaves a group behind that is still saving.
    wait_until_free(output / GROUP, lambda: log.info("%s: an earlier training is still ending; waiting for it", output))
    (output / OUTCOME).unlink(missing_ok=True)
    with held(output / PARENT) as let_go:
        run_group = launch_ray.run_group if launcher.kind == "ray" else _run_group
        how = run_group(job, launcher, let_go)
    return _read_outcome(output, how)


def _run_group(job: TrainingJob, launcher: Launcher, let_go: Callable[[], None]) -> str:
    """Through accelerate; returns how it ended."""
    status = run_processes([*accelerate_command(launcher, "selfsteer.launch"), str(Path(job.output) / JOB)], let_go)
    return f"status {status}"


def run_processes(command: Sequence[str], let_go: Callable[[], None], *, pass_fds: Sequence[int] = ()) -> int:
    """Run a command to its end, and call let_go when a signal asks this process to stop; returns its exit status."""
    # A session of its own: Ctrl-C in a terminal reaches this process, which asks the group to stop.
    with subprocess.Popen(command, start_new_session=True, pass_fds=pass_fds) as processes:
        while processes.poll() is None:
            if interrupt.stop_requested():
                let_go()
            time.sleep(LOOK_SECONDS)
    return processes.returncode


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


def _read_outcome(output: Path, how: str) -> TrainingResult:
    try:
        outcome: dict[str, Any] = json.loads((output / OUTCOME).read_bytes())
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
        f"{output}: the processes of the training ended early ({how}); what they said is above. The same command"
        " continues from the last complete checkpoint."
    )


# --- one process of the group, as accelerate starts it -----------------------------------------------------------------


def main() -> None:
    """Train as one process of a group."""
    job = TrainingJob.from_json(json.loads(Path(sys.argv[1]).read_bytes()))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("selfsteer").setLevel(logging.INFO if group.is_first() else logging.ERROR)
    with interrupt.graceful_stop():
        group.take_part(job)


if __name__ == "__main__":
    main()
