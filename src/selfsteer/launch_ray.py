"""A training on a Ray cluster: Ray Train's TorchTrainer around the function that accelerate's processes run (`group.py`).

Ray places the processes, connects them (gloo on CPUs, nccl on GPUs), and starts the group again when it has lost one; the
training itself goes on from its last complete checkpoint (`checkpoints.py`), never from one of Ray's.

Left out on purpose: sharded weights; the processes are data-parallel.
"""

import importlib
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfsteer import group, interrupt, processes
from selfsteer.locks import LOOK_SECONDS
from selfsteer.ray_cluster import SharedFolder, check_room, joined, launcher_plan, load_ray
from selfsteer.recipe_launcher import Launcher
from selfsteer.training import TrainingJob

log = logging.getLogger(__name__)

_OWN_FILES = ".ray"
"""What Ray Train writes about the training, below its output; nothing of it is read."""


def run_group(job: TrainingJob, launcher: Launcher, let_go: Callable[[], None]) -> str:
    """Train on the cluster; returns how it ended, in Ray's words where it failed.

    let_go: called, perhaps more than once, when a signal asks this process to stop.
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
        with ThreadPoolExecutor(1) as executor:
            fitting = executor.submit(trainer.fit)
            while not fitting.done():
                if interrupt.stop_requested():
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
    if not (output / group.JOB).exists():
        raise ValueError(f"{output}: this node does not see the run folder; it has to be on storage that all nodes share")
    # A refusal fails the group, and Ray starts it again; what was said once holds.
    if not processes.agree((output / group.OUTCOME).exists):
        group.take_part(job)
