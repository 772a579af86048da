"""Starting a training: in this process, in several that accelerate and torch start, or on a Ray cluster.

Files are the contract:

    output/job.json       the training (`TrainingJob.as_json`)
    output/outcome.json   what the first process says at the end: its result, or why there is none
    output/PARENT, GROUP  who lives (`parallel.py`); a group that nobody wants any more saves a complete checkpoint and ends

The parent writes the job and waits; `python -m selfsteer.training.launch OUTPUT` is one process of a group that accelerate
starts. On a Ray cluster, Ray Train's TorchTrainer runs the same function: Ray places the processes, connects them (gloo on
CPUs, nccl on GPUs), and starts the group again when it has lost one; the training itself goes on from its last complete
checkpoint, never from one of Ray's.

Left out on purpose: the training (`train.py`); machines: an accelerate configuration or the Ray cluster names them, and the
folder of the run has to be on storage that all of them see; sharded weights on Ray.
"""

import importlib
import json
import logging
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfsteer import runtime
from selfsteer.cluster import SharedFolder, check_room, joined, launcher_plan, load_ray
from selfsteer.models import let_go
from selfsteer.recipe.sections import Launcher
from selfsteer.store.durable import make_folder, write
from selfsteer.training import parallel
from selfsteer.training.parallel import LOOK_SECONDS
from selfsteer.training.train import TrainingJob, TrainingResult, train
from selfsteer.training.trainer import TrainingDiverged

log = logging.getLogger(__name__)

JOB, OUTCOME = "job.json", "outcome.json"


def launch(job: TrainingJob, launcher: Launcher) -> TrainingResult:
    """Run a training as the recipe's launcher says; what it raises, `training.train` explains.

    Raises ChildProcessError when the processes ended without a word, killed for memory for example.
    """
    if launcher.kind == "local":
        try:
            return train(job)
        finally:
            let_go()
    output = Path(job.output)
    make_folder(output)
    write(output / JOB, json.dumps(job.as_json()).encode())
    parallel.wait_for_group(output)
    parallel.take_in(output)  # of an earlier session
    (output / OUTCOME).unlink(missing_ok=True)
    if launcher.kind == "ray":
        how = _run_on_ray(job, launcher)
    else:
        how = f"status {parallel.run_group(launcher, 'selfsteer.training.launch', output)}"
    parallel.take_in(output)
    return _read_outcome(output, how)


def _read_outcome(output: Path, how: str) -> TrainingResult:
    try:
        outcome: dict[str, Any] = json.loads((output / OUTCOME).read_bytes())
    except FileNotFoundError:
        outcome = {}
    if "result" in outcome:
        return TrainingResult(**outcome["result"])
    runtime.raise_if_stopped()
    if "diverged" in outcome:
        raise TrainingDiverged(outcome["diverged"])
    if "refused" in outcome:
        raise ValueError(outcome["refused"])
    raise ChildProcessError(
        f"{output}: the processes of the training ended early ({how}); what they said is above. The same command"
        " continues from the last complete checkpoint."
    )


# --- one process of the group ----------------------------------------------------------------------------------------------


def speaks() -> bool:
    """Whether this is the process that speaks for the group; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def take_part(job: TrainingJob) -> None:
    """Train; the first process leaves the outcome. Raises ValueError, in every process, for a job that can't be done."""
    output, first = Path(job.output), speaks()
    with parallel.taking_part(output):
        # Agreed on by all processes, these end without torch's report of a failed process.
        try:
            outcome: dict[str, Any] = {"result": train(job)._asdict()}
        except runtime.Interrupted:
            outcome = {"stopped": True}
        except TrainingDiverged as error:
            outcome = {"diverged": str(error)}
        except ValueError as error:
            if first:
                _say(output, {"refused": str(error)})
            raise
        if first:
            _say(output, outcome)
        parallel.end()


def _say(output: Path, outcome: dict[str, Any]) -> None:
    write(output / OUTCOME, json.dumps(outcome).encode())


# --- on a Ray cluster ------------------------------------------------------------------------------------------------------

_OWN_FILES = ".ray"
"""What Ray Train writes about the training, below its output; nothing of it is read."""


def _run_on_ray(job: TrainingJob, launcher: Launcher) -> str:
    """Train on the cluster; returns how it ended, in Ray's words where it failed.

    Raises ValueError for a cluster that is refused.
    """
    load_ray()
    with joined(launcher.address) as nodes:
        check_room(launcher_plan(launcher), nodes)
        train: Any = importlib.import_module("ray.train")
        torch: Any = importlib.import_module("ray.train.torch")
        output = Path(job.output).absolute()
        shutil.rmtree(output / _OWN_FILES, ignore_errors=True)  # of a run that was killed
        policy = job.policy.model_copy(update={"model": str(Path(job.policy.model).absolute())})
        there = replace(job, output=str(output), pairs=str(Path(job.pairs).absolute()), policy=policy)
        trainer = torch.TorchTrainer(
            _take_part,
            train_loop_config={"job": there.as_json(), "weights": SharedFolder.of(policy.model)},
            scaling_config=train.ScalingConfig(
                num_workers=launcher.processes,
                use_gpu=launcher.gpus > 0,
                resources_per_worker={"CPU": launcher.cpus} | ({"GPU": launcher.gpus} if launcher.gpus else {}),
            ),
            run_config=train.RunConfig(
                name="group",
                storage_path=str(output / _OWN_FILES),
                failure_config=train.FailureConfig(max_failures=launcher.restarts),
            ),
        )
        # In a thread: in the main one Ray would take SIGINT for itself.
        with parallel.wanted(output) as let_go, ThreadPoolExecutor(1) as executor:
            fitting = executor.submit(trainer.fit)
            while not fitting.done():
                if runtime.stop_requested():
                    let_go()
                time.sleep(LOOK_SECONDS)
        shutil.rmtree(output / _OWN_FILES, ignore_errors=True)
        error = fitting.exception()
        if error is not None and not isinstance(error, train.TrainingFailedError):
            raise error
        return "ended" if error is None else str(error)


def _take_part(config: dict[str, Any]) -> None:
    """One process of the group, on some node."""
    weights: SharedFolder = config["weights"]
    weights.check()
    job = TrainingJob.from_json(config["job"])
    output = Path(job.output)
    if not (output / JOB).exists():
        raise ValueError(f"{output}: this node does not see the run folder; it has to be on storage that all nodes share")
    # A refusal fails the group, and Ray starts it again; what was said once holds.
    if not parallel.agree((output / OUTCOME).exists):
        take_part(job)


def main() -> None:
    """Train as one process of a group that accelerate starts."""
    job = TrainingJob.from_json(json.loads((Path(sys.argv[1]) / JOB).read_bytes()))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("selfsteer").setLevel(logging.INFO if speaks() else logging.ERROR)
    with runtime.graceful_stop():
        take_part(job)


if __name__ == "__main__":
    main()
