"""What the processes of one training agree on; where there is only one, nothing is asked.

Left out on purpose: starting them (`launch.py`), and gradients, which accelerate and torch synchronise.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from torch import distributed

from selfsteer import interrupt

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
    return int(max(everyones(interrupt.signal_number())))


def wait() -> None:
    """Go on only when all processes have come here."""
    if several():
        distributed.barrier()


def end() -> None:
    """Leave the group, when nothing more will be asked of it."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
