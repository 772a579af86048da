"""Several processes on one job: how they are started, how they know of each other's life, what they agree on.

    job/PARENT   locked while the parent lives and wants the job done: when the lock goes (a signal, kill -9), its processes
                 make durable what they have and end
    job/GROUP    locked, by all of them, while one of the processes lives: the next parent waits until it is gone
    job/spent-N.json    what process N spent, when it has ended, for the parent's clock

A lock ends with its holder, kill -9 included, so there is nothing stale to clean up. Where there is only one process,
nothing is asked. Left out on purpose: gradients, which accelerate and torch synchronise; and what the job is (`launch.py`
trains, `scoring.py` scores).
"""

import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from torch import distributed

from selfsteer import clock, runtime
from selfsteer.clock import Taken
from selfsteer.recipe.sections import Launcher
from selfsteer.store.folder import read_taken, write_taken

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2

PARENT, GROUP = "PARENT", "GROUP"


# --- the parent ------------------------------------------------------------------------------------------------------------


def wait_for_group(job: Path) -> None:
    """Wait for processes that a killed parent left at this job. Raises Interrupted when asked to stop."""
    said = False
    while not is_free(job / GROUP):
        runtime.raise_if_stopped()
        if not said:
            log.info("%s: earlier processes are still ending; waiting for them", job)
            said = True
        time.sleep(LOOK_SECONDS)


@contextmanager
def wanted(job: Path) -> Generator[Callable[[], None]]:
    """While the block runs the job is wanted; yields what says earlier that it is not."""
    with (job / PARENT).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lambda: fcntl.flock(file, fcntl.LOCK_UN)


def run_group(launcher: Launcher, module: str, job: Path) -> int:
    """Run `module` with the job's folder in the launcher's processes, to their end; returns the exit status.

    A signal that asks this process to stop is handed on.
    """
    command = [*accelerate_command(launcher, module), str(job)]
    with wanted(job) as let_go, (job / GROUP).open("ab") as group:
        # Handed on to the launcher: processes that have not come to take the lock themselves are waited for, too.
        fcntl.flock(group, fcntl.LOCK_SH)
        # A session of its own: Ctrl-C in a terminal reaches this process, which asks the group to stop.
        with subprocess.Popen(command, start_new_session=True, pass_fds=[group.fileno()]) as processes:
            while processes.poll() is None:
                if runtime.stop_requested():
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


def take_in(job: Path) -> None:
    """Add what the processes of a job spent to this one's clock, once they have ended; those that were killed said nothing.

    They worked side by side: the seconds are those of the first, tokens and memory of all.
    """
    told: list[Taken] = []
    for file in sorted(job.glob("spent-*.json"), key=_rank):
        taken = read_taken(file, "the time of this process is not counted")
        told += [taken] if taken.parts else []
        if not file.is_dir():
            file.unlink()
    if not told:
        return
    tokens, held = Counter[str](), Counter[str]()
    for each in told:
        tokens.update({name: spent.tokens for name, spent in each.parts.items()})
        held.update(each.memory)
    clock.take_in({name: spent.seconds for name, spent in told[0].parts.items()}, tokens, held)


def _rank(file: Path) -> tuple[int, str]:
    number = file.stem.removeprefix("spent-")
    return len(number), number


# --- one of the processes --------------------------------------------------------------------------------------------------


@contextmanager
def taking_part(job: Path) -> Generator[None]:
    """This process is one of the group while the block runs, and is asked to stop when nobody wants the job any more."""
    with (job / GROUP).open("ab") as group:
        fcntl.flock(group, fcntl.LOCK_SH)
        stop_when_free(job / PARENT)
        try:
            yield
        finally:
            write_taken(job / f"spent-{os.environ.get('RANK', '0')}.json", Taken(0.0, clock.spent(), clock.peaks()))


# --- locks -----------------------------------------------------------------------------------------------------------------


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def stop_when_free(path: Path) -> None:
    """Ask this process to stop when the holder of the lock lets it go, or is gone."""

    def wait() -> None:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        runtime.request_stop()

    threading.Thread(target=wait, daemon=True).start()


# --- agreement -------------------------------------------------------------------------------------------------------------

T = TypeVar("T")


def several() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return not several() or distributed.get_rank() == 0


def agree(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, for all of them; it runs only there."""
    if not several():
        return make()
    values = [make() if is_first() else None]
    distributed.broadcast_object_list(values)
    return cast(T, values[0])


def everyones(value: float) -> list[float]:
    """The value of every process, in the order of their ranks."""
    if not several():
        return [value]
    mine = torch.tensor([value], dtype=torch.float64, device=PartialState().device)
    gathered = [torch.zeros_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, mine)
    return torch.cat(gathered).tolist()


def place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if several() else (0, 1)


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of every process's values, shape (n,), on the CPU."""
    if not several():
        return values
    total = values.to(PartialState().device)
    distributed.all_reduce(total)
    return total.cpu()


def stop_signal() -> int:
    """The signal that asked any of the processes to stop; 0 while none did."""
    return int(max(everyones(runtime.signal_number())))


def wait() -> None:
    """Go on only when all processes have come here."""
    if several():
        distributed.barrier()


def end() -> None:
    """Leave the group, when nothing more will be asked of it."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
