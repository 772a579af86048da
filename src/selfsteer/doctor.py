"""Is this machine ready: interpreter, libraries, devices, memory, disk, engines, each with what to do where it is not.

Nothing is changed and nothing fetched. Left out on purpose: whether one recipe fits.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

State = Literal["ok", "missing", "broken"]
"""missing: an option that is not there, which is no fault."""

_ROOM = 10
"""GB of free disk below which a run of a 1B model has no room for its weights, optimizer state and result."""

_NEEDED_FOR = {
    "report": "plots on the page",
    "evaluate": "benchmarks of lm-evaluation-harness",
    "reward": "training reward models",
    "qlora": "adapters on weights in 4 bits (training.lora.quantize)",
    "ray": "engines and trainings on a Ray cluster",
}
"""The extras, by what they are for."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: State
    found: str
    fix: str = ""
    """What to do, where something is to be done."""


def examine(engine_python: str | None = None) -> list[Finding]:
    """Everything, in the order of what a run needs first. engine_python: the interpreter of vLLM's environment."""
    interpreter = Finding("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.prefix}")
    findings = [interpreter, *_libraries(), *_devices()]
    if broken(findings):
        return [*findings, _disk("disk, here", Path())]  # what comes now imports what is broken
    return [*findings, _disk("disk, here", Path()), _cache(), *_extras(), _vllm(engine_python), _ray()]


def broken(findings: list[Finding]) -> bool:
    """Whether a run as it comes would fail."""
    return any(each.state == "broken" for each in findings)


def _libraries() -> Iterator[Finding]:
    """What the package itself requires, within its bounds; the faults one by one, the rest in a line."""
    fine: list[str] = []
    for requirement in _requirements(None):
        fault = _fault(requirement)
        if fault is None:
            fine.append(f"{requirement.name} {version(requirement.name)}")
        else:
            yield Finding(requirement.name, "broken", fault, f"pip install '{requirement.name}{requirement.specifier}'")
    yield Finding("libraries", "ok", ", ".join(fine))


def _requirements(extra: str | None) -> list[Requirement]:
    """Those of an extra alone, or for None those of the package."""

    def wanted(requirement: Requirement, name: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": name})

    parsed = list(map(Requirement, requires("selfsteer") or ()))
    if extra is None:
        return [each for each in parsed if wanted(each, "")]
    return [each for each in parsed if wanted(each, extra) and not wanted(each, "")]


def _fault(requirement: Requirement) -> str | None:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"version {found}, wanted {requirement.specifier}"
    return None


def _devices() -> Iterator[Finding]:
    try:  # here and not above: where one of them is broken, that is what is to be said
        import torch

        from selfsteer.models import available_memory, hardware
    except (ImportError, OSError) as error:
        yield Finding("torch", "broken", str(error), "install a torch build for this machine: https://pytorch.org")
        return
    yield Finding("device", "ok", ", ".join(f"{name} {value}" for name, value in hardware().items()))
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(number)
            try:
                free, total = torch.cuda.mem_get_info(number)
            except RuntimeError as error:
                said, fix = f"{name}: {str(error).splitlines()[0]}", "see nvidia-smi: another process may hold it"
                yield Finding(f"GPU {number}", "broken", said, fix)
            else:
                yield Finding(f"GPU {number}", "ok", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
    elif shutil.which("nvidia-smi"):
        fix = (
            "this torch is built for CPUs, or for another driver: install the build for your driver from https://pytorch.org"
        )
        yield Finding("GPU", "broken", f"there is one, but torch {torch.__version__} does not see it", fix)
    yield Finding("memory", "ok", f"{available_memory() / 1e9:.0f} GB available")


def _disk(what: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    if free < _ROOM:
        return Finding(what, "broken", f"{free:.1f} GB free", f"make room, or name an output elsewhere: {_ROOM} GB and more")
    return Finding(what, "ok", f"{free:.0f} GB free")


def _cache() -> Finding:
    from selfsteer.models import cache_folder

    folder = cache_folder()
    above = next(each for each in (folder, *folder.parents) if each.exists())
    if not os.access(above, os.W_OK):
        return Finding("cache", "broken", f"{folder} can't be written", "set SELFSTEER_CACHE to a folder of yours")
    return _disk("cache", above)._replace(found=f"{folder}, {shutil.disk_usage(above).free / 1e9:.0f} GB free")


def _extras() -> Iterator[Finding]:
    for extra, purpose in _NEEDED_FOR.items():
        if extra == "ray":  # has a line of its own
            continue
        faults = [f"{each.name} {fault}" for each in _requirements(extra) if (fault := _fault(each)) is not None]
        fix = f"pip install 'selfsteer[{extra}]', for {purpose}"
        yield Finding(extra, "missing", ", ".join(faults), fix) if faults else Finding(extra, "ok", purpose)


def _vllm(python: str | None) -> Finding:
    from selfsteer.engines.serving import find_vllm

    try:
        found = find_vllm(python or sys.executable)
    except ValueError as error:
        fix = "for engine.kind vllm: an environment of its own with vllm, named by engine.python (docs/engines.md)"
        if python is None:
            return Finding("vLLM", "missing", "not in this environment", fix)
        return Finding("vLLM", "broken", str(error), fix)
    return Finding("vLLM", "ok", f"{found.version}, for {'CPUs' if found.on_cpu else 'GPUs'}")


def _ray() -> Finding:
    from selfsteer.cluster import load_ray

    try:
        load_ray()
    except ValueError as error:
        return Finding("Ray", "missing", str(error).partition(";")[0].partition(":")[0], "pip install 'selfsteer[ray]'")
    return Finding("Ray", "ok", version("ray"))
