"""The journal of a stage: every finished sample on disk before anything else sees it.

    parts/<writer>-<n>.jsonl    {"data":{...},"key":"...","sha256":"..."}    one record a line

Guarantees
- `append` returns only when its records are on the disk; a kill or a power cut loses only what was in flight.
- A line is canonical JSON; its checksum is that of the line without the checksum. Opening checks every line: a wrong one is
  counted, logged and skipped, so its key is missing and the sample is made again.
- A torn last line is cut off and kept in `<part>.torn`, unless its writer is still alive (it holds a lock on its part).
- Nobody appends to a part that another process began, so a torn line never swallows the next record.
- The first record of a key wins, the run's own before those of other runs; appending a key again writes nothing.
- Memory holds about 40 bytes a record, whatever its size: a hash of the key and where the line begins (`Places`).

Left out on purpose: seeing what other processes append while this one is open, unless it is told to (`reread`); deleting or
compacting records; threads.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from selfsteer import clock
from selfsteer.store.durable import canonical_json, make_folder, sync, write_failed

SLOT = 16
"""Bytes of a slot."""

_RECENT = 2**16


class Places:
    """Slots to places: sorted arrays, 24 bytes a record, and a dictionary of the recent ones, a sixteenth at most."""

    def __init__(self) -> None:
        self._slots: NDArray[np.bytes_] = np.empty(0, f"S{SLOT}")  # (records,) ascending
        self._places: NDArray[np.int64] = np.empty(0, np.int64)  # (records,)
        self._recent: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._slots) + len(self._recent)

    def __contains__(self, slot: bytes) -> bool:
        return self.find(slot) is not None

    def __getitem__(self, slot: bytes) -> int:
        place = self.find(slot)
        if place is None:
            raise KeyError(slot)
        return place

    def find(self, slot: bytes) -> int | None:
        """The place of a slot, or None."""
        place = self._recent.get(slot)
        if place is None and len(self._slots):
            # numpy leaves zero bytes at the end out, on both sides alike.
            at = int(np.searchsorted(self._slots, np.bytes_(slot)))
            if at < len(self._slots) and self._slots[at] == np.bytes_(slot).rstrip(b"\0"):
                place = int(self._places[at])
        return place

    def add(self, slot: bytes, place: int) -> None:
        """Note the place of a slot; the first one stays."""
        if slot in self:
            return
        self._recent[slot] = place
        if len(self._recent) > max(_RECENT, len(self._slots) // 16):
            self._settle()

    def _settle(self) -> None:
        recent = sorted(self._recent.items())
        slots = np.array([slot for slot, _ in recent], f"S{SLOT}")
        at = np.searchsorted(self._slots, slots)
        self._slots = np.insert(self._slots, at, slots)
        self._places = np.insert(self._places, at, np.array([place for _, place in recent], np.int64))
        self._recent = {}


log = logging.getLogger(__name__)

Record = tuple[str, Mapping[str, Any]]
"""Key and data."""

Item = TypeVar("Item")

_DURABLE_EVERY = 16
"""Records that `fill` appends at once: one fsync for so many."""

# Place of a line in the index: part number * _PART + offset.
_PART = 1 << 44

_PART_NAME = re.compile(r"(.+)-([0-9]+)\.jsonl")


def _checksum(body: bytes) -> bytes:
    return b',"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()


_CHECKSUM_LENGTH = len(_checksum(b""))


def _line(key: str, data: Mapping[str, Any]) -> bytes:
    body = canonical_json({"data": data, "key": key})
    return body[:-1] + _checksum(body)


def _body(line: bytes) -> bytes | None:
    """The record without its checksum, or None when that is wrong. Parses nothing: token ids make JSON slow to read."""
    body = line[:-_CHECKSUM_LENGTH] + b"}"
    return body if line[-_CHECKSUM_LENGTH:] == _checksum(body) else None


def _key(body: bytes) -> str:
    # Sorted keys put "key" last, and quotes inside JSON strings are escaped: the last match is the record's own.
    before, _, key = body.rpartition(b',"key":')
    assert before.startswith(b'{"data":')
    return json.loads(key[:-1])


def _slot(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=SLOT).digest()


def _take(file: BinaryIO) -> bool:
    """Lock a part; False when its writer is alive. The lock goes when the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parts_in(folder: Path) -> list[tuple[str, int, Path]]:
    """Writer, n and path of every part, in the order in which records win: own parts, then those that were lent."""
    found = ((_PART_NAME.fullmatch(path.name), path) for path in folder.glob("*.jsonl"))
    parts = ((match[1], int(match[2]), path) for match, path in found if match)
    return sorted(parts, key=lambda part: (not part[0].startswith("main"), *part))


class Journal:
    """Records by key, append-only, in the JSONL parts of one folder. A context manager: leaving it closes the files."""

    def __init__(self, folder: Path, *, writer: str = "main", repair: bool = True, read: bool = True) -> None:
        """Index the parts of `folder`, which need not exist yet.

        writer: name of the parts that this process writes. repair: set torn lines aside; False changes nothing on disk.
        read: False leaves out what is there, for a writer that is given new keys only.
        """
        self.folder = folder
        self.writer = writer
        self._index = Places()
        self._parts: list[Path] = []
        self._readers: dict[int, BinaryIO] = {}
        self._written: int | None = None
        if read:
            self._read_parts(repair=repair)

    def reread(self) -> None:
        """Index the parts anew, with what other writers have appended meanwhile; the next record begins a new part."""
        self._close()
        self._index = Places()
        self._parts.clear()
        self._read_parts(repair=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        self._close_written()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return _slot(key) in self._index

    def lacking(self, items: Iterable[Item], key: Callable[[Item], str]) -> Iterator[Item] | None:
        """The items that have no good record, each key once, in their order and read lazily; None where there is none."""
        found = self._lacking(items, key)
        first = next(found, None)
        return None if first is None else chain([first], found)

    def _lacking(self, items: Iterable[Item], key: Callable[[Item], str]) -> Iterator[Item]:
        seen: set[str] = set()
        for item in items:
            its = key(item)
            if its not in self and its not in seen:
                seen.add(its)
                yield item

    def get(self, key: str) -> dict[str, Any]:
        """The data of a record, read back from disk. Raises KeyError, and ValueError when it was damaged since opening."""
        number, offset = divmod(self._index[_slot(key)], _PART)
        if number not in self._readers:
            self._readers[number] = self._parts[number].open("rb")
        reader = self._readers[number]
        reader.seek(offset)
        body = _body(reader.readline())
        if body is None:
            raise ValueError(
                f"{self._parts[number]}: the record at byte {offset} was damaged while in use."
                " Run the same command again: only that sample is made anew."
            )
        return json.loads(body)["data"]

    @clock.part("journal")
    def append(self, records: Sequence[Record]) -> None:
        """Write records and wait until they are on the disk, all in one go; keys that have a record are passed over.

        Raises ValueError before anything is written when a record is not JSON, and OSError when the disk is full or fails:
        then none of these records counts, and the next call begins a new part.
        """
        lines: dict[str, bytes] = {}
        for key, data in records:
            if key not in self and key not in lines:
                lines[key] = _line(key, data)
        if not lines:
            return
        written = self._open_written()
        start = os.fstat(written).st_size
        with ExitStack() as undo:
            undo.callback(self._abandon, start)
            rest = memoryview(b"".join(lines.values()))
            try:
                while rest:
                    rest = rest[os.write(written, rest) :]
                # Not fdatasync: macOS has none, and for a growing file both write the same.
                os.fsync(written)
            except OSError as error:
                raise write_failed(error, self._parts[-1]) from error
            undo.pop_all()
        place = (len(self._parts) - 1) * _PART + start
        for key, line in lines.items():
            self._index.add(_slot(key), place)
            place += len(line)

    def fill(self, records: Iterable[Record], advance: Callable[[int], None]) -> None:
        """Append records as they come, some at a time; also those that came before an error.

        advance: told how many more are durable.
        """
        batch: list[Record] = []

        def settle() -> None:
            self.append(batch)
            advance(len(batch))
            batch.clear()

        try:
            for record in records:
                batch.append(record)
                if len(batch) == _DURABLE_EVERY:
                    settle()
        finally:
            settle()

    def _read_parts(self, *, repair: bool) -> None:
        for _, _, part in _parts_in(self.folder):
            self._read_part(part, repair=repair)

    def _read_part(self, part: Path, *, repair: bool) -> None:
        place = len(self._parts) * _PART
        self._parts.append(part)
        corrupt = 0
        repair = repair and os.access(part, os.W_OK)  # lent by a run that is kept as it is
        with part.open("r+b" if repair else "rb") as file:
            # Taken before reading: a live writer may be about to complete the line that looks torn.
            ours = repair and _take(file)
            for line in file:
                if not line.endswith(b"\n"):
                    if ours:
                        _set_aside(part, file, line)
                    break
                body = _body(line)
                if body is None:
                    corrupt += 1
                else:
                    self._index.add(_slot(_key(body)), place)
                place += len(line)
        if corrupt:
            log.warning("%s: skipped %d damaged lines; samples missing because of it are made again", part, corrupt)

    def _open_written(self) -> int:
        if self._written is None:
            make_folder(self.folder)
            number = 1 + max((n for writer, n, _ in _parts_in(self.folder) if writer == self.writer), default=-1)
            while True:
                part = self.folder / f"{self.writer}-{number}.jsonl"
                try:
                    self._written = os.open(part, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
                    break
                except FileExistsError:
                    number += 1
            fcntl.flock(self._written, fcntl.LOCK_EX)
            sync(self.folder)
            self._parts.append(part)
        return self._written

    def _abandon(self, start: int) -> None:
        """After a failed write: take back what it left, and never write to this part again."""
        assert self._written is not None
        try:
            os.ftruncate(self._written, start)
        except OSError as error:
            log.warning("%s: a torn line stays until the journal is opened again (%s)", self._parts[-1], error.strerror)
        self._close_written()

    def _close_written(self) -> None:
        if self._written is not None:
            os.close(self._written)
            self._written = None


def _set_aside(part: Path, file: BinaryIO, line: bytes) -> None:
    with part.with_name(part.name + ".torn").open("ab") as aside:
        aside.write(line)
    file.truncate(os.fstat(file.fileno()).st_size - len(line))
    os.fsync(file.fileno())
    log.warning("%s: cut off a torn last line of %d bytes; its sample is made again", part, len(line))
