"""The launcher section of a recipe: which processes train. What starts them is in `launch.py` and `launch_ray.py`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from selfsteer.recipe_text import Section


class Launcher(Section):
    """The processes of the trainings; where they run, not what they compute."""

    kind: Literal["local", "accelerate", "ray"] = "local"
    """local: this process. accelerate: several, started by `accelerate launch`, which score the pairs too. ray: several, on
    a Ray cluster; scoring stays in this process."""
    processes: int | None = Field(default=None, ge=1)
    """The number of processes over all machines; with kind: accelerate, the configuration's when empty."""
    config: str | None = None
    """With kind: accelerate, its configuration file (FSDP, DeepSpeed, machines); data parallelism here when empty."""
    address: str | None = None
    """With kind: ray, the cluster, as engine.address names it; one on this machine, for the run, when empty."""
    cpus: float = Field(default=1, gt=0)
    """With kind: ray, CPUs that each process takes."""
    gpus: int = Field(default=0, ge=0, le=1)
    """With kind: ray, GPUs that each process takes."""
    restarts: int = Field(default=3, ge=0)
    """With kind: ray, how often a group that lost a process is started again, from its last complete checkpoint."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        used = {
            "local": set[str](),
            "accelerate": {"processes", "config"},
            "ray": {"processes", "address", "cpus", "gpus", "restarts"},
        }[self.kind]
        fields = type(self).model_fields
        unused = [name for name in fields if name not in used | {"kind"} and getattr(self, name) != fields[name].default]
        if unused:
            kinds = "accelerate" if unused == ["config"] else "ray" if "processes" not in unused else "accelerate or ray"
            raise ValueError(f"launcher.{' and launcher.'.join(unused)} need launcher.kind: {kinds}")
        if self.kind == "accelerate" and self.processes is None and self.config is None:
            raise ValueError("kind: accelerate needs launcher.processes or launcher.config")
        if self.kind == "ray" and self.processes is None:
            raise ValueError("kind: ray needs launcher.processes")
        if self.kind == "ray" and self.address is not None and "://" in self.address:
            raise ValueError(
                "launcher.address: Ray Train does not run through a Ray client (ray://); start the run on a node of the"
                " cluster and name it auto"
            )
        return self
