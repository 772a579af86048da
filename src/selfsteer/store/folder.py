"""The run folder: one owner, stages that are sealed whole, and nothing that was paid for is lost.

    runs/<name>/
      recipe.yaml   run.json (one entry a session)   LOCK
      round-1/2-responses/
        parts/<writer>-<n>.jsonl    finished samples, as they come (journal.py)
        data.parquet                what the stage hands on
        dropped.jsonl               what it does not, each row with its reason
        MANIFEST.json               written last: the stage is sealed when this file is there

Guarantees
- One process owns a run folder, by a kernel lock that ends with the process: nothing stale to clean up after a kill.
  Reading needs no lock: use `RunFolder.view` or a plain `Stage(path)`.
- A kill or a power cut at any moment leaves each stage either sealed, with every output as its manifest says, or unsealed,
  with all its finished samples in the journal: files are written aside, forced to the disk and renamed, the manifest last.
- Every output's digest is in the manifest; `verify` names the file that changed. The manifest carries its own.
- kept + dropped = wanted, or the stage is not sealed. Memory stays flat while rows are written and read.
- Reopening a stage for other settings keeps its journal, so samples whose keys are still wanted are not made again.

Left out on purpose: what a stage does and which follows which (`pipeline.py`), keeping the outputs of earlier settings,
locks across machines beyond what the file system's flock gives.
"""

import fcntl
import json
import logging
import math
import os
import re
import shlex
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Self

import pyarrow as pa

from selfsteer import clock
from selfsteer.clock import Spent, Taken
from selfsteer.recipe.sections import RUN_NAME
from selfsteer.records import Dropped
from selfsteer.store import columns
from selfsteer.store.durable import (
    canonical_json,
    digest,
    file_digest,
    make_folder,
    read_json,
    regular_file,
    replacing,
    sync,
    write,
    write_failed,
)
from selfsteer.store.journal import Journal

log = logging.getLogger(__name__)

_ELAPSED = "elapsed.json"

_EVERY_SECONDS = 5.0


@contextmanager
def elapsed(folder: Path) -> Generator[Callable[[], Taken]]:
    """Yields a function that returns what was spent in `folder` so far, earlier sessions included.

    The sum is kept in elapsed.json every five seconds: a kill loses at most that much.
    """
    file = folder / _ELAPSED
    earlier, before = read_taken(file, "counting from zero"), clock.spent()
    fresh = clock.begin_peaks()
    started = time.monotonic()
    finished = threading.Event()

    def taken() -> Taken:
        memory = clock.most(clock.peaks() if fresh else {}, earlier.memory)
        return Taken(earlier.seconds + time.monotonic() - started, clock.since(before, earlier.parts), memory)

    def keep() -> None:
        while not finished.wait(_EVERY_SECONDS):
            with suppress(OSError):  # the last time it is told
                write_taken(file, taken())

    def end() -> None:
        finished.set()
        keeper.join()
        write_taken(file, taken())

    keeper = threading.Thread(target=keep, daemon=True, name="selfsteer-clock")
    keeper.start()
    try:
        yield taken
    except BaseException:
        with suppress(OSError):  # what came first is told
            end()
        raise
    end()


def read_taken(file: Path, otherwise: str) -> Taken:
    """What was written down as taken; nothing where there is no such file, or, with a warning, a damaged one.

    otherwise: what happens then, for the warning.
    """
    if not file.exists():
        return Taken()
    try:
        found = read_json(file, {"seconds": (int, float)}, way_out=otherwise)
        seconds = float(found["seconds"])
        if not 0 <= seconds < math.inf:
            raise ValueError(f"{file}: damaged, {seconds} seconds are no time; {otherwise}")
        parts = {name: Spent(float(took), int(tokens)) for name, (took, tokens) in found.get("parts", {}).items()}
        memory = {name: int(held) for name, held in found.get("memory", {}).items()}
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
        log.warning("%s", error if str(file) in str(error) else f"{file}: damaged ({error}); {otherwise}")
        return Taken()
    return Taken(seconds, parts, memory)


def write_taken(file: Path, taken: Taken) -> None:
    """Write it down, whole or not at all; raises as `replacing`."""
    write(file, json.dumps({**taken._asdict(), "seconds": round(taken.seconds, 3)}).encode())


SCHEMA_VERSION = 5
"""Of the files in a run folder: part of every fingerprint and of the key of everything in a journal."""

DATA, _DROPPED, _MANIFEST, _REOPENED = "data.parquet", "dropped.jsonl", "MANIFEST.json", "REOPENED.json"

_PARTS = "parts"

PREFERENCES, SELECTION, POLICY = "5-preferences", "5-selection", "6-policy"
"""The stages that hold pairs, and what is aligned on them; of the others `stages/status.py` knows."""

MEASURES = "measures.json"
"""What a stage seals beside its rows or its model: numbers about them."""

HISTORY = "history.jsonl"
"""A line an optimizer step, its seconds among the rest: what a training seals beside its model."""

Row = Mapping[str, Any]


class RunFolderBusy(ValueError):
    """Another process owns the run folder."""


class RunFolderGone(ValueError):
    """The run folder is no longer where it was when this process became its owner."""


class WouldReplace(ValueError):
    """Going on would destroy what other settings made in the run folder."""


class StageDamaged(ValueError):
    """A sealed file is not what the manifest says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Everything that determines the outputs of a stage. No paths, times or endpoints."""

    settings: Mapping[str, Any]
    """JSON values."""
    inputs: Mapping[str, str]
    """Digest of each input: files, models, `Manifest.digest` of earlier stages."""

    @property
    def fingerprint(self) -> str:
        """Same fingerprint, same outputs; 64 hex digits."""
        return digest({"schema_version": SCHEMA_VERSION, "settings": self.settings, "inputs": self.inputs})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a stage seals."""

    wanted: int
    """Items the stage set out to make."""
    rows: Iterable[Row | Dropped] | None = None
    """Rows of data.parquet in the order of the queries, each item that is not kept in its place; None for stages that make a
    model. Consumed once."""
    schema: pa.Schema | None = None
    """Columns of the rows, missing values null; inferred from the first 256 rows when absent."""
    rows_each: int = 1
    """Rows of one kept item: 2 where a query makes two pairs."""
    measures: Callable[[], Mapping[str, Any]] | None = None
    """Takes what MEASURES is to hold (JSON values), when the rows are written: they can be read with `Stage.written`."""
    files: tuple[str, ...] = ()
    """Files and folders that the stage wrote itself, relative to its folder; a folder counts with all it holds."""
    known: Mapping[str, str] = field(default_factory=dict[str, str])
    """Digests of such files, by path relative to the stage, where they were taken already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a sealed stage holds and where it came from."""

    stage: str
    schema_version: int
    fingerprint: str
    wanted: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    """Items not kept, by reason."""
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    """sha256 of each output, by path relative to the stage."""
    seconds: float
    parts: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Seconds and tokens of each part of the work (`clock.py`)."""
    memory: dict[str, int] = field(default_factory=dict[str, int])
    """Bytes held at the peak, as in `clock.Taken`."""
    cleaned: list[str] = field(default_factory=list[str])
    """Outputs that are gone because nothing reads them any more (`Stage.clean`)."""
    created: str
    """UTC, ISO 8601."""

    @property
    def digest(self) -> str:
        """One digest of all outputs but HISTORY, for the `inputs` of later stages: what steps took changes nothing there."""
        return digest({name: each for name, each in self.outputs.items() if name != HISTORY})

    @property
    def origin(self) -> Origin:
        """What it was made from."""
        return Origin(settings=self.settings, inputs=self.inputs)

    @property
    def present(self) -> dict[str, str]:
        """The outputs that were not cleaned."""
        return {name: each for name, each in self.outputs.items() if name not in self.cleaned}


class RunFolder:
    """The folder of one run; `with` makes this process its owner and creates it."""

    def __init__(self, path: Path | str) -> None:
        """Raises ValueError for a name that is not portable; touches nothing."""
        self.path = Path(path)
        self._lock: int | None = None
        self._before: dict[str, bytes | None] = {}
        if not RUN_NAME.fullmatch(self.path.name):
            raise ValueError(
                f"{str(path)!r}: a run folder's name must begin with a letter or digit and hold only letters, digits, '.',"
                " '_' and '-', at most 64 of them. Name another output folder, such as runs/NAME."
            )

    @classmethod
    def view(cls, path: Path | str) -> Self:
        """An existing run, to be read without owning it. Raises ValueError where there is none."""
        run = cls(path if Path(path).name.strip(".") else os.path.abspath(path))  # "." and ".." are no names
        if not (run.path / "run.json").is_file():
            raise ValueError(f"{path}: no run here (no run.json). Name the folder that the recipe's output gave.")
        run._check_version()
        return run

    def _check_version(self) -> None:
        """Nothing of another version is read, not even by half."""
        found = self._described().get("schema_version", 1)
        if found != SCHEMA_VERSION:
            raise ValueError(
                f"{self.path}: a run of version {found}, and this selfsteer reads version {SCHEMA_VERSION}. Take another"
                " output folder, or go on with the selfsteer that began it."
            )

    def __enter__(self) -> Self:
        self._check_version()
        standing = next((each for each in (self.path, *self.path.parents) if os.path.lexists(each)), self.path)
        if not standing.is_dir():
            raise ValueError(f"{self.path} can't be made: {standing} is no folder. Name another output folder.")
        if (self.path / "config.json").exists():  # the run's own files would be taken for the model's
            raise ValueError(f"{self.path} holds a model (config.json). Name another output folder.")
        make_folder(self.path)
        lock_file = self.path / "LOCK"
        if os.path.lexists(lock_file):  # what is no file can't be locked, and reading the holder out of a pipe would wait
            regular_file(lock_file, "remove it and run the same command again")
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 4096).decode(errors="replace").strip() or "another process"
            os.close(lock)
            raise RunFolderBusy(
                f"{self.path} is in use by {holder}. Wait for it, stop it (or, if it is gone, the processes it started),"
                " or name another output folder."
            ) from None
        os.ftruncate(lock, 0)
        holder = f"process {os.getpid()} on {socket.gethostname()} since {_now()}: {shlex.join(sys.argv)}\n"
        try:
            os.write(lock, os.fsencode(holder))
        except OSError as error:
            os.close(lock)
            raise write_failed(error, lock_file) from error
        self._lock = lock
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        gone = self._is_gone()
        if not gone and kind is not None and issubclass(kind, WouldReplace):
            self._describe_as_before()
        # The file stays: removing it would let two processes hold locks on two files of the same name.
        assert self._lock is not None
        os.ftruncate(self._lock, 0)
        os.close(self._lock)
        self._lock = None
        if gone and isinstance(error, Exception):  # whatever it says: it is about a file that is no longer there
            raise self._gone() from error

    def _is_gone(self) -> bool:
        """Whether the file that this process has locked lies elsewhere, or nowhere."""
        assert self._lock is not None
        try:
            return not os.path.samestat(os.fstat(self._lock), (self.path / "LOCK").stat())
        except (FileNotFoundError, NotADirectoryError):
            return True

    def _gone(self) -> RunFolderGone:
        return RunFolderGone(
            f"{self.path}: the run folder was moved, deleted or replaced while this process worked in it. What was finished"
            " is where the folder is now: name that as the output folder and run the same command again."
        )

    def describe(self, recipe_yaml: str, run_info: Mapping[str, Any]) -> None:
        """Write recipe.yaml; add this session to run.json: its start, the recipe's digest, and run_info (JSON values)."""
        assert self._lock is not None, "only the owner describes a run"
        self._before = {
            name: path.read_bytes() if (path := self.path / name).exists() else None for name in ("recipe.yaml", "run.json")
        }
        session = {"started": _now(), "recipe": digest(recipe_yaml), **run_info}
        sessions = [*self.sessions(), session]
        write(self.path / "recipe.yaml", recipe_yaml.encode())
        self._write_sessions(sessions)

    def begin(self, day: str) -> None:
        """Keep the day that templates are told (`day_of`), in a folder that has no recipe."""
        assert self._lock is not None, "only the owner describes a run"
        if not (self.path / "run.json").exists():
            self._write_sessions([{"started": _now(), "date": day}])

    def _write_sessions(self, sessions: list[dict[str, Any]]) -> None:
        write(self.path / "run.json", _pretty({"schema_version": SCHEMA_VERSION, "sessions": sessions}))

    @property
    def earlier(self) -> str | None:
        """The recipe of the session before this one, as YAML; None where there was none."""
        before = self._before.get("recipe.yaml")
        return None if before is None else before.decode()

    def _describe_as_before(self) -> None:
        """What is refused leaves no trace: recipe.yaml and run.json are of the sessions that made what is here."""
        for name, content in self._before.items():
            if content is not None:
                write(self.path / name, content)

    def sessions(self) -> list[dict[str, Any]]:
        """What run.json says of every session, oldest first."""
        return self._described()["sessions"]

    def _described(self) -> dict[str, Any]:
        path = self.path / "run.json"
        if not path.exists():
            return {"schema_version": SCHEMA_VERSION, "sessions": []}
        way_out = "move it away, the run continues without its history"
        found = read_json(path, {"sessions": list}, way_out=way_out)
        if not all(isinstance(session, dict) for session in found["sessions"]):
            raise ValueError(f"{path}: damaged, a session is no object; {way_out}")
        return found

    def stage(self, round: int, name: str) -> "Stage":
        """A stage such as (1, "2-responses"). The owner gets it ready for use: created, a broken-off reopening finished.

        Raises RunFolderGone where the owner's folder lies elsewhere by now.
        """
        stage = Stage(self._place(round, name))
        if self._lock is not None:
            if self._is_gone():  # else half a run would begin in its place
                raise self._gone()
            make_folder(stage.path)
            stage.finish_reopening()
        return stage

    def has_stage(self, round: int, name: str) -> bool:
        """Whether such a stage was ever begun; opening it would make it."""
        return self._place(round, name).is_dir()

    def _place(self, round: int, name: str) -> Path:
        return self.path / f"round-{round}" / name


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of one round, on disk."""

    path: Path

    def manifest(self) -> Manifest | None:
        """What the stage holds, or None when it is not sealed. Raises StageDamaged."""
        return _read_manifest(self.path / _MANIFEST)

    def is_current(self, fingerprint: str) -> bool:
        """Whether the stage is sealed and was made from just this origin."""
        manifest = self.manifest()
        return manifest is not None and manifest.fingerprint == fingerprint

    @clock.part("seal")
    def verify(self) -> Manifest:
        """Compare every output with its digest; returns the manifest. Raises StageDamaged naming the file that differs.

        What was cleaned is missing, and nothing is wrong with that.
        """
        manifest = self._sealed()
        for name, expected in manifest.present.items():
            path = self.path / name
            if not path.is_file():
                raise StageDamaged(f"{path}: missing, though sealed. {_way_out(self.path / _MANIFEST)}")
            if file_digest(path) != expected:
                raise StageDamaged(
                    f"{path}: changed since it was sealed (sha256 differs). {_way_out(self.path / _MANIFEST)}"
                )
        return manifest

    def size(self) -> int:
        """Bytes of what is sealed and of the journal."""
        files = [*(self.path / name for name in self._sealed().present), *(self.path / _PARTS).glob("*")]
        return sum(file.stat().st_size for file in files)

    def clean(self, folders: Collection[str]) -> None:
        """Delete these folders of a sealed stage, which the manifest goes on to name. For the owner of the run.

        A kill leaves files that the manifest calls cleaned: the same call deletes them.
        """
        manifest = self._sealed()
        gone = [name for name in manifest.outputs if PurePosixPath(name).parts[0] in folders]
        _write_manifest(self.path / _MANIFEST, replace(manifest, cleaned=sorted({*manifest.cleaned, *gone})))
        for folder in folders:
            shutil.rmtree(self.path / folder, ignore_errors=True)
        sync(self.path)

    def reopen(self) -> None:
        """Unseal, and delete the outputs; the journal stays. Does nothing to a stage that was never sealed."""
        if self.manifest() is not None:
            # Renamed, not deleted: its list says what to delete if this process is killed half-way.
            (self.path / _MANIFEST).replace(self.path / _REOPENED)
            sync(self.path)
        self.finish_reopening()

    def finish_reopening(self) -> None:
        """Delete what a `reopen` that was killed left behind."""
        reopened = _read_manifest(self.path / _REOPENED)
        if reopened is None:
            return
        for name in sorted({PurePosixPath(output).parts[0] for output in reopened.outputs}):
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.path / _REOPENED).unlink()
        sync(self.path)

    def journal(self) -> Journal:
        """The finished samples; to be used in a `with` block, by the owner of the run."""
        return Journal(self.path / _PARTS)

    def finished(self) -> int:
        """How many good records the journal holds; changes nothing on disk, so anyone may ask at any time."""
        with Journal(self.path / _PARTS, repair=False) as journal:
            return len(journal)

    @clock.part("seal")
    def seal(self, origin: Origin, contents: Contents, *, taken: Callable[[], Taken] = Taken) -> Manifest:
        """Write data.parquet and dropped.jsonl, force every output to the disk, then write the manifest.

        taken: what the stage took, all sessions together where the caller knows; asked last of all.
        Raises ValueError when rows do not fit the schema or kept + dropped is not wanted; the stage is then not sealed.
        """
        if self.manifest() is not None:
            raise ValueError(f"{self.path} is sealed already; reopen it first.")
        make_folder(self.path)
        names = [_DROPPED, *contents.files]
        rows = 0
        dropped: list[Dropped] = []
        if contents.rows is not None:
            names.append(DATA)
            rows = columns.write_rows(self.path / DATA, _without_dropped(contents.rows, dropped), contents.schema)
        if contents.measures is not None:
            names.append(MEASURES)
            with replacing(self.path / MEASURES) as file, clock.part("measure"):
                file.write(canonical_json(contents.measures()))
        reasons = write_dropped(self.path / _DROPPED, dropped)
        lost = reasons.total()
        kept = contents.wanted - lost
        if contents.rows is not None and rows != kept * contents.rows_each:
            raise ValueError(
                f"{self.path}: wanted {contents.wanted:,}, dropped {lost:,}, but wrote {rows:,} rows where"
                f" {kept:,} x {contents.rows_each} were due. Every item must be kept or dropped with a reason."
            )
        outputs = {path.relative_to(self.path).as_posix(): path for path in _files(self.path, names)}
        digests = {name: _settle(path, contents.known.get(name)) for name, path in outputs.items()}
        seconds, parts, memory = taken()
        manifest = Manifest(
            stage=f"{self.path.parent.name}/{self.path.name}",
            schema_version=SCHEMA_VERSION,
            fingerprint=origin.fingerprint,
            wanted=contents.wanted,
            kept=kept,
            dropped=dict(reasons.most_common()),
            settings=dict(origin.settings),
            inputs=dict(origin.inputs),
            outputs=digests,
            seconds=seconds,
            parts={name: list(each) for name, each in parts.items()},
            memory=dict(memory),
            created=_now(),
        )
        _write_manifest(self.path / _MANIFEST, manifest)
        return manifest

    def rows(self, *, of: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of a sealed stage, or those of these queries, in order, a row group in memory at a time."""
        self._sealed()
        return self.written(of=of)

    def written(self, only: list[str] | None = None, *, of: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The same rows for `Contents.measures`, just before the stage is sealed; of all columns, or of these alone."""
        with _damage_named(self.path):
            yield from columns.file_rows(self.path / DATA, only, of=of)

    def column(self, name: str) -> list[Any]:
        """One column of the rows of a sealed stage; nothing else is read."""
        self._sealed()
        with _damage_named(self.path):
            return columns.column(self.path / DATA, name)

    def picked(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The rows with these numbers, which ascend; row groups without one are not read."""
        self._sealed()
        with _damage_named(self.path):
            yield from columns.picked(self.path / DATA, numbers)

    def dropped(self) -> Iterator[Dropped]:
        """The items that a sealed stage did not keep."""
        self._sealed()
        return _read_dropped(self.path / _DROPPED)

    def _sealed(self) -> Manifest:
        manifest = self.manifest()
        if manifest is None:
            raise ValueError(
                f"{self.path} is not finished (no {_MANIFEST}). Continue the run with the command that began it."
            )
        return manifest


def lenders(paths: Iterable[Path]) -> tuple[RunFolder, ...]:
    """The runs in these folders: a run, or those of a comparison. Raises ValueError where there is none."""
    found: list[RunFolder] = []
    for path in paths:
        inner = [run.parent for run in sorted(path.glob("*/run.json"))]
        found += map(RunFolder.view, inner if inner and not (path / "run.json").exists() else [path])
    return tuple(found)


def began(path: Path) -> str | None:
    """The day of the run in a folder, or the first one of those below it; None where there is none.

    That on which it began (UTC), or which it was told (`date` of its first session).
    """
    days: list[str] = []
    for folder in (path, *path.glob("*")):
        if (folder / "run.json").is_file():
            days += [str(session.get("date", session.get("started")))[:10] for session in RunFolder(folder).sessions()[:1]]
    return min(filter(_DAY.fullmatch, days), default=None)


def day_of(*folders: Path) -> str:
    """The day on which what is in one of these folders began, today (UTC) where nothing is: what templates are told."""
    return next(filter(None, map(began, folders)), None) or datetime.now(UTC).date().isoformat()


_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _pretty(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _way_out(manifest: Path) -> str:
    return f"Bring it back from a copy, or delete {manifest} and run the same command again: finished samples are reused."


def _write_manifest(path: Path, manifest: Manifest) -> None:
    fields = asdict(manifest)
    write(path, _pretty({**fields, "sha256": digest(fields)}))


def _read_manifest(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    try:
        fields = read_json(path, {"sha256": str, "schema_version": int, "outputs": dict}, way_out=_way_out(path))
    except ValueError as error:
        raise StageDamaged(str(error)) from error
    claimed = fields.pop("sha256")
    if claimed != digest(fields):
        raise StageDamaged(f"{path}: not as it was written. {_way_out(path)}")
    if fields["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"{path}: of version {fields['schema_version']}, not {SCHEMA_VERSION}. Take another output folder.")
    names = [value for key in ("outputs", "inputs") for value in fields.get(key, {}).values()]
    if fields.keys() != Manifest.__dataclass_fields__.keys() or not all(isinstance(name, str) for name in names):
        raise StageDamaged(f"{path}: not written by this program. {_way_out(path)}")
    manifest = Manifest(**fields)
    # Reopening deletes by these names, and a run folder may come from a stranger.
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in manifest.outputs):
        raise StageDamaged(f"{path}: names files outside its own folder. Do not use this run folder.")
    return manifest


@contextmanager
def _damage_named(stage: Path) -> Generator[None]:
    """Rows of a sealed stage that can't be read: the file, and the way out."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise StageDamaged(f"{error}. {_way_out(stage / _MANIFEST)}") from error


def _without_dropped(items: Iterable[Row | Dropped], dropped: list[Dropped]) -> Iterator[Row]:
    """The rows; what is none of them goes into the list."""
    for item in items:
        if isinstance(item, Dropped):
            dropped.append(item)
        else:
            yield item


def write_dropped(path: Path, dropped: Iterable[Dropped]) -> Counter[str]:
    """Rows that were dropped, as a stage lists them; how many for each reason."""
    reasons: Counter[str] = Counter()
    with replacing(path) as file:
        for row in dropped:
            file.write(canonical_json(asdict(row)) + b"\n")
            reasons[row.reason] += 1
    return reasons


def _read_dropped(path: Path) -> Iterator[Dropped]:
    with path.open("rb") as file:
        for line in file:
            yield Dropped(**json.loads(line))


def _files(stage: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        path = stage / name
        if path.is_dir():
            yield from sorted(inner for inner in path.rglob("*") if inner.is_file())
        else:
            yield path


def _settle(path: Path, known: str | None) -> str:
    """Force an output to the disk, with its place in its folder; returns its digest."""
    sync(path)
    sync(path.parent)
    return known or file_digest(path)


def adopt(stage: Stage, lenders: Iterable[Stage], fingerprint: str) -> bool:
    """Take over the sealed stage of a lender that was made from the same origin; False where none has it whole."""
    for lender in lenders:
        if lender.is_current(fingerprint) and not (manifest := lender.verify()).cleaned:
            for name in manifest.outputs:
                _link(lender.path / name, stage.path / name)
            # Last, as in sealing: what is there without it counts for nothing.
            _link(lender.path / _MANIFEST, stage.path / _MANIFEST)
            return True
    return False


def borrow(stage: Stage, lenders: Iterable[Stage]) -> None:
    """Put the samples of lenders among the stage's own: those that they made, and those that were lent to them."""
    for lender in lenders:
        lend(lender, stage, lender.path.parent.parent.name)


def lend(lender: Stage, stage: Stage, name: str) -> None:
    """The samples of one lender; those that it made itself go by `name` there, and by what no other file has in common."""
    for part in sorted((lender.path / _PARTS).glob("*main-*.jsonl")):
        own = stage.path / _PARTS / part.name
        if part.name.startswith("main-"):
            own = own.with_name(f"{part.stat().st_ino:x}-{name}-{part.name}")
        if not own.exists() or own.stat().st_size < part.stat().st_size:  # a copy of what has grown since
            _link(part, own)


def _link(source: Path, target: Path) -> None:
    """`target` as `source` is, whole or not at all."""
    make_folder(target.parent)
    unfinished = target.with_name(f".{target.name}.tmp")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:  # another device, or a file system without links
        shutil.copyfile(source, unfinished)
        sync(unfinished)
    unfinished.replace(target)
    sync(target.parent)
