"""What processes that work on one thing together know of each other: kernel locks, agreement, starting and ending them.

A lock ends with its holder, kill -9 included, so there is nothing stale to clean up. Where there is only one process,
nothing is asked. Left out on purpose: gradients, which accelerate and torch synchronise.
"""

import fcntl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from torch import distributed

from selfsteer import runtime
from selfsteer.recipe.sections import Launcher

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
        runtime.raise_if_stopped()
        if not said:
            say()
            said = True
        time.sleep(LOOK_SECONDS)


def stop_when_free(path: Path) -> None:
    """Ask this process to stop when the holder of the lock lets it go, or is gone."""

    def wait() -> None:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        runtime.request_stop()

    threading.Thread(target=wait, daemon=True).start()


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


def run_processes(command: Sequence[str], let_go: Callable[[], None], *, pass_fds: Sequence[int] = ()) -> int:
    """Run a command to its end, and call let_go when a signal asks this process to stop; returns its exit status."""
    # A session of its own: Ctrl-C in a terminal reaches this process, which asks the group to stop.
    with subprocess.Popen(command, start_new_session=True, pass_fds=pass_fds) as processes:
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
