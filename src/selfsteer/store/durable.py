"""Canonical JSON, digests, and files that are wholly there or not there at all.

Left out on purpose: locks, formats and resuming (`store.py`, `journal.py`). POSIX only. What the disk itself promises for
an fsync is not checked (a macOS drive, for one, may still hold it in its cache).
"""

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def canonical_json(value: object) -> bytes:
    """The one UTF-8 JSON text of a value: sorted keys, no spaces. Mappings must have string keys.

    Raises ValueError for NaN, infinities and lone surrogates, which no other reader would take; TypeError for objects.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(
            f"not valid Unicode: a lone surrogate {text[error.start]!a} in {around!a}. Repair the text, for example with"
            " text.encode('utf-8', 'replace').decode()."
        ) from error


def digest(value: object) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits; memory stays flat."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_failed(error: OSError, path: Path) -> OSError:
    """The same error, naming the file and saying that the work is not lost."""
    reason = error.strerror or str(error)
    return OSError(
        error.errno,
        f"{reason}. What was finished before is safe: make room or repair the disk, then run the same command again",
        str(path),
    )


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents so that they outlive a power cut."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(created):
        sync(folder.parent)


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """A file to write in place of `path`, which changes only when the block ends without an error, all at once.

    Raises OSError naming `path` when the disk is full or fails; the old file then stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        raise write_failed(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
