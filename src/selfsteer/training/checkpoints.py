"""Checkpoints that count only when they are whole.

    output/checkpoint-N/        as transformers writes it: weights or adapter, optimizer, schedule, random states
    output/checkpoint-N/COMPLETE   written last: size and digest of every file, and the digest of the training it belongs to

A kill while a checkpoint is written leaves no COMPLETE, and the one before is still there; damage makes it incomplete again.
Of large files only both ends are digested: hashing a checkpoint of an 8B model with AdamW would read 128 GB at each save.
Left on purpose: what a disk turns within those; the model that training ends with is sealed by its digest.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from safetensors import SafetensorError

from selfsteer.store.durable import canonical_json, file_digest, sync, write, write_failed

log = logging.getLogger(__name__)

MARKER = "COMPLETE"

KEPT = 2
"""Complete checkpoints that stay on disk."""

_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turns what the model libraries raise where the disk is full into an OSError that names the path and the way out."""
    try:
        yield
    except OSError as error:
        raise write_failed(error, path) from error
    except (torch.OutOfMemoryError, torch.distributed.DistError):  # which are RuntimeErrors, and no fault of the disk
        raise
    except (SafetensorError, RuntimeError) as error:  # of safetensors and of torch.save; neither is an OSError
        raise write_failed(OSError(errno.EIO, str(error)), path) from error


def seal(folder: Path, training: str) -> None:
    """Force a checkpoint's files to the disk and mark it as complete; training is the digest of what made it."""
    files = _files(folder)
    for file in files:
        sync(file)
    for inner in {file.parent for file in files}:
        sync(inner)
    mark = {"training": training, "sizes": _sizes(folder), "digests": _digests(folder)}
    write(folder / MARKER, canonical_json(mark))
    sync(folder.parent)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint is whole: marked, and every file as it was when it was marked."""
    marker = _marker(folder)
    return marker.get("sizes") == _sizes(folder) and marker.get("digests") == _digests(folder)


def _marker(folder: Path) -> dict[str, Any]:
    """What the marker says; nothing where there is none, or none that can be read."""
    try:
        content = json.loads((folder / MARKER).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, by its place in the checkpoint."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}


_LARGE = 64 * 2**20
"""Bytes of a file beyond which only its ends are digested."""

_END = 2**20


def _digests(folder: Path) -> dict[str, str]:
    """Of each file, by its place in the checkpoint."""
    return {str(file.relative_to(folder)): _digest(file) for file in _files(folder)}


def _digest(file: Path) -> str:
    if file.stat().st_size <= _LARGE:
        return file_digest(file)
    with file.open("rb") as content:
        ends = hashlib.sha256(content.read(_END))
        content.seek(-_END, os.SEEK_END)
        ends.update(content.read())
        return ends.hexdigest()


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint, whoever made it."""
    return next((folder for folder in _newest_first(output) if is_complete(folder)), None)


def holds_another(output: Path, training: str) -> bool:
    """Whether a complete checkpoint of another training is there, which `resume_point` would remove."""
    return any(is_complete(folder) and _marker(folder).get("training") != training for folder in _newest_first(output))


def resume_point(output: Path, training: str) -> Path | None:
    """The newest complete checkpoint of this training; those that are incomplete or of another training are removed."""
    for folder in _newest_first(output):
        if not is_complete(folder):
            log.warning("removing %s: it is incomplete", folder)
            shutil.rmtree(folder)
        elif _marker(folder).get("training") != training:
            log.warning("removing %s: it was trained with other settings or data", folder)
            shutil.rmtree(folder)
    return next(iter(_newest_first(output)), None)


def rotate(output: Path, *, spare: int | None = None) -> None:
    """Remove all but the newest, by their steps: times of files go wrong with the clock. spare: of this step, kept too."""
    for folder in _newest_first(output)[KEPT:]:
        if step_of(folder) == spare:
            continue
        (folder / MARKER).unlink(missing_ok=True)  # a removal that is broken off leaves nothing that could count
        shutil.rmtree(folder)


def remove(output: Path) -> None:
    """Of a training that is finished."""
    for folder in _newest_first(output):
        shutil.rmtree(folder)


def at_step(output: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return output / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The optimizer step after which a checkpoint was taken."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _newest_first(output: Path) -> list[Path]:
    return sorted(
        (folder for folder in output.glob("checkpoint-*") if _NAME.fullmatch(folder.name)), key=step_of, reverse=True
    )


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in {MARKER, f"{MARKER}.tmp"})
