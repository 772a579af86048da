"""Canonical JSON, digests, and files that are wholly there or not there at all.

Left out on purpose: locks, formats and resuming (`folder.py`, `journal.py`). POSIX only. What the disk itself promises for
an fsync is not checked (a macOS drive, for one, may still hold it in its cache).
"""

import hashlib
import json
import os
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast


def open_to_others(folder: Path) -> None:
    """Give a folder and the files in it the modes that the umask allows; some libraries write for their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: object) -> bytes:
    """The one UTF-8 JSON text of a value: sorted keys, no spaces. Mappings must have string keys.

    Raises ValueError for NaN, infinities and lone surrogates, which no other reader would take; TypeError for objects.
    """
    text = _CANONICAL.encode(value)
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
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SMALL = 16 * 2**20
"""What a template, a list of principles or a configuration takes at most, in bytes."""


def open_regular(path: Path) -> BufferedReader:
    """A file that somebody named, to read. Raises ValueError for a pipe or a device, OSError as `open` does."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to does not come back.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 (the caller closes it)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ValueError(f"{path}: not a regular file (a pipe or a device); name an ordinary file")


def read_small(path: Path, *, at_most: int = SMALL) -> bytes:
    """The bytes of a file that somebody named.

    Raises ValueError for what is no regular file (one would wait for a FIFO and never finish with a device) or is larger,
    OSError as `open` does.
    """
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise ValueError(f"{path}: larger than {at_most / 2**20:,.0f} MB, which no such file is; is it the right one?")
    return content


def read_small_text(path: Path) -> str:
    """The text of a file that somebody named; raises as `read_small`, and ValueError where it is not UTF-8."""
    try:
        return read_small(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start:,}); save it as UTF-8") from error


def read_object(path: Path, *, at_most: int = SMALL) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError naming the file for anything else, and as `read_small`."""
    written = read_small(path, at_most=at_most)
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:  # ValueError alone: a number of more digits than Python reads
        raise ValueError(f"{path}: damaged, it can't be read as JSON ({error}); fetch or make it again") from error
    other = _NO_OBJECTS.get(type(content))
    if other is not None:
        raise ValueError(f"{path}: holds {other}, not a JSON object; fetch or make it again")
    return cast("dict[str, Any]", content)


_NO_OBJECTS: Mapping[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "null",
}


def write_failed(error: OSError, path: Path) -> OSError:
    """The same error, naming the file and saying that the work is not lost."""
    reason = error.strerror or str(error)
    return OSError(
        error.errno,
        f"{reason}. What was finished before is safe: make room or repair the disk, then run the same command again",
        str(path),
    )


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, to the disk. Raises OSError naming `path` when the disk fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise write_failed(error, path) from error
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


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raises as `replacing`."""
    with replacing(path) as file:
        file.write(content)


# --- files that are read ---------------------------------------------------------------------------------------------------


def regular_file(path: Path, way_out: str = "name an ordinary file") -> None:
    """Raises ValueError, naming the path, unless there is an ordinary file behind it (links are followed).

    Whoever opens a pipe waits, whoever reads a device never ends, and a folder, a loop of links or a name that no file
    system takes would otherwise end in an error that names nothing.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; {way_out}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; {way_out}") from error
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"{path!r}: {error}; {way_out}") from error
    if not stat.S_ISREG(mode):
        kind = next((words for check, words in _KINDS if check(mode)), "no regular file")
        raise ValueError(f"{path}: {kind}, no regular file; {way_out}")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

OURS = 2**30
"""No JSON file of a run folder comes near this, in bytes."""

Shape = Mapping[str, type | tuple[type, ...]]
"""Keys that an object must have, and of which types; it may have others."""


def read_json(path: Path, shape: Shape, *, way_out: str) -> dict[str, Any]:
    """The JSON object in a file of ours. Raises ValueError, with the way out, where it is missing or damaged.

    Emptied, cut off, overwritten: a file that a kill, a full disk or a hand has touched is told by its name.
    """
    regular_file(path, way_out)
    try:
        content = json.loads(read_small(path, at_most=OURS))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, no JSON ({error}); {way_out}") from error
    found = _NO_OBJECTS.get(type(content))
    if found is not None:
        raise ValueError(f"{path}: damaged, it holds {found} instead of an object; {way_out}")
    fields = cast("dict[str, Any]", content)
    for key, kind in shape.items():
        # JSON's true and false are no numbers.
        if key not in fields or not isinstance(fields[key], kind) or (isinstance(fields[key], bool) and kind is not bool):
            raise ValueError(f"{path}: damaged, its {key!r} is missing or not what was written; {way_out}")
    return fields
