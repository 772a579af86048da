"""As many threads as there are free cores, while a model computes on the CPU.

The threads of a matrix product wait for the slowest of them, and spin while they wait. Where another process wants one of
the cores, two threads on two cores are not a little slower than one but up to ten times and more (docs/log.md): each product
waits until the system gives the late thread its turn. So every ten seconds it is looked at what other processes took, and as
many cores are left to them. Where OMP_NUM_THREADS is set, its word holds.

Another number of threads adds up in another order: responses sampled beside other work are other draws, as on another
machine. Who wants the same digits sets OMP_NUM_THREADS.
"""

import logging
import math
import os
import time
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two looks."""

_SPARE = 0.25
"""Of a core that others may take before it is left to them: two threads are faster than one by about so much."""


class Usage(NamedTuple):
    """Seconds since some moment in the past."""

    now: float
    """Of the clock on the wall."""
    busy: float
    """For which the cores of this process worked, for whomever; those that a hypervisor took away are among them."""
    own: float
    """For which they worked for this process."""


def usage() -> Usage:
    """As it stands, of the cores that this process may run on."""
    allowed = _cores()
    cores = psutil.cpu_times(percpu=True)
    times = [cores[core] for core in allowed if core < len(cores)]
    # Guests' seconds are among those of users already.
    busy = sum(sum(each) - each.idle - _of(each, "iowait", "guest", "guest_nice") for each in times)
    own = psutil.Process().cpu_times()
    return Usage(time.monotonic(), busy, own.user + own.system)


def _of(times: Any, *names: str) -> float:
    """Of kinds that not every system tells."""
    return sum(getattr(times, name, 0.0) for name in names)


def _cores() -> list[int]:
    allowed = getattr(os, "sched_getaffinity", None)  # of Linux alone
    return sorted(allowed(0)) if allowed else list(range(os.cpu_count() or 1))


def free_threads(before: Usage, after: Usage, *, cores: int, most: int) -> int:
    """How many threads leave others what they took between two looks: at least one, at most `most`."""
    others = max(0.0, (after.busy - before.busy) - (after.own - before.own)) / (after.now - before.now)
    return max(1, min(most, math.floor(cores - others + _SPARE)))


class _Follower:
    """Sets the number of threads of this process; called before every forward pass, it looks every few seconds."""

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._seen = usage()
        self._told = False

    def __call__(self, *_: object) -> None:
        if time.monotonic() - self._seen.now < EVERY:
            return
        seen = usage()
        wanted = free_threads(self._seen, seen, cores=len(_cores()), most=self._most)
        self._seen = seen
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)
            if not self._told:
                log.info("%d of %d threads: other processes are at work; looked at again and again", wanted, self._most)
                self._told = True


_follower = None if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1 else _Follower()


def follow(model: PreTrainedModel) -> None:
    """Let this model compute with as many threads as cores are free, from its next forward pass on."""
    if _follower is not None and model.device.type == "cpu":
        # Whatever wraps the model calls its embedding; adapters call its own `forward`, past its hooks.
        embedding = next((each for each in model.modules() if isinstance(each, torch.nn.Embedding)), model)
        embedding.register_forward_pre_hook(_follower)
