"""One process of a group, with accelerate made to shard weights on a CPU: as it stands (1.15), it ignores FSDP there."""

import functools
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

original = state.AcceleratorState.__init__


@functools.wraps(original)
def init(self: Any, *args: Any, **kwargs: Any) -> None:
    """Every new instance takes its kind anew from what the processes are."""
    original(self, *args, **kwargs)
    if kwargs.get("fsdp_plugin") is not None:
        self.fsdp_plugin = kwargs["fsdp_plugin"]
        self.fsdp_plugin.set_mixed_precision("bf16")  # as on GPUs, where trainings compute in bfloat16
    if self.__dict__.get("fsdp_plugin") is not None:
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    state.AcceleratorState.__init__ = init
    from selfsteer.training.launch import main

    main()
