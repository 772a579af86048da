"""Benchmarks from files on this machine, laid out as lm-evaluation-harness expects the hub's data sets.

    DIR/ifeval/input_data.jsonl      as google-research publishes it
    DIR/gsm8k/test.jsonl             and train.jsonl, for the examples of the five-shot task
    DIR/math500/test.jsonl
    DIR/mmlu/mmlu.zip                the archive of hendrycks/test: data/{dev,val,test}/<subject>_<split>.csv, or the folder
    DIR/<task>/                      of any other task: a folder that `datasets.load_dataset` can read

Each becomes a folder that `load_dataset(folder, configuration)` reads offline. Rows are taken as they are; none is left out,
and one that could not be asked or scored (no question, no answer, an item that is there twice) is an error that names it.
"""

import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfsteer.data.files import rows_with
from selfsteer.store.durable import digest, file_digest, make_folder, read_small_text, write

Rows = list[dict[str, Any]]

_LETTERS = "ABCD"
_MMLU_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}
_AUXILIARY = "auxiliary_train"
"""Folder of questions from other benchmarks, in files of other names; one of them ends in _test."""


class Local(NamedTuple):
    """A benchmark's data on this machine."""

    folder: Path
    """What `load_dataset` is given."""
    digest: str
    """Of the files it came from."""
    splits: frozenset[str] | None
    """That every configuration has; None where only `load_dataset` will tell."""
    note: str | None = None
    """What a reader of its figures must know: that not all items are there."""


def local_data(name: str, data: Path, scratch: Path) -> Local:
    """The data of the benchmark `name` in `data`. scratch: where it is laid out, once for its content.

    Raises ValueError where there is none, or where it can't be read.
    """
    source = data / name
    if not source.is_dir():
        here = sorted(each.name for each in data.iterdir()) if data.is_dir() else []
        raise ValueError(
            f"evaluation.data: {source} is not a folder; {data} holds {here}. Put the files of {name} there, or leave"
            " evaluation.data out to take them from the hub."
        )
    reader = _READERS.get(name)
    if reader is None:
        return Local(source, folder_digest(source), None)
    found, configurations = folder_digest(source), reader(source)
    folder = scratch / f"{name}-{found[:12]}"
    if not (folder / "README.md").is_file():
        _lay_out(folder, configurations)
    splits = frozenset.intersection(*(frozenset(splits) for splits in configurations.values()))
    split, there = _PUBLISHED[name]
    items = sum(len(splits[split]) for splits in configurations.values())
    note = None if items == there else f"the files hold {items:,} items; {there:,} are published"
    return Local(folder, found, splits, note)


def folder_digest(folder: Path) -> str:
    """Of all files below it. Raises ValueError where there are none."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise ValueError(f"evaluation.data: {folder} is empty")
    return digest({str(file.relative_to(folder)): file_digest(file) for file in files})


Configurations = Mapping[str, Mapping[str, Rows]]
"""Rows by configuration and split."""


def _lay_out(folder: Path, configurations: Configurations) -> None:
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            file = folder / name / f"{split}.jsonl"
            make_folder(file.parent)
            write(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
            lines += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    # Written last: it says that the rest is there.
    write(folder / "README.md", "\n".join([*lines, "---", ""]).encode())


_PUBLISHED = {"ifeval": ("train", 541), "gsm8k": ("test", 1319), "math500": ("test", 500), "mmlu": ("test", 14042)}
"""The split that is measured, and how many items of it there are."""


def _ifeval(source: Path) -> Configurations:
    file = source / "input_data.jsonl"
    rows = _items(file, texts=("prompt",), others=("instruction_id_list", "kwargs"), key="key")
    for number, row in enumerate(rows, start=1):
        checks, arguments = row["instruction_id_list"], row["kwargs"]
        if not (isinstance(checks, list) and isinstance(arguments, list) and len(checks) == len(arguments) > 0):
            raise ValueError(f"{file}: item {number} has no instructions, each with its kwargs; fetch it again")
        if not all(isinstance(each, dict) for each in arguments):
            raise ValueError(f"{file}: item {number} has kwargs that are no object; fetch it again")
    return {"default": {"train": rows}}


def _gsm8k(source: Path) -> Configurations:
    files = {split: source / f"{split}.jsonl" for split in ("train", "test")}
    found = {
        split: _items(file, texts=("question", "answer"), key="question")
        for split, file in files.items()
        if split == "test" or file.is_file()
    }
    for split, rows in found.items():
        for number, row in enumerate(rows, start=1):
            if re.search(r"####\s*\S*\d", row["answer"]) is None:
                raise ValueError(f"{files[split]}: item {number} has an answer without '#### number'; fetch it again")
    return {"main": found}


def _math500(source: Path) -> Configurations:
    file = source / "test.jsonl"
    rows = _items(file, texts=("problem", "solution", "answer"), key="problem")
    for number, row in enumerate(rows, start=1):
        if "\\boxed" not in row["solution"]:
            raise ValueError(f"{file}: item {number} has a solution without \\boxed, which says its answer; fetch it again")
    return {"default": {"test": rows}}


def _items(file: Path, *, texts: Sequence[str], others: Sequence[str] = (), key: str) -> Rows:
    """All rows, each with texts that say something, no two with the same key."""
    rows = rows_with(file, key, *texts, *others)
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        for name in texts:
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"{file}: item {number} has no text in {name!r} but {row[name]!r:.40}; fetch it again")
        first = seen.setdefault(str(row[key]), number)
        if first != number:
            raise ValueError(f"{file}: items {first} and {number} are the same ({key}: {row[key]!r:.60}); take one away")
    return rows


def _mmlu(source: Path) -> Configurations:
    archive = source / "mmlu.zip"
    found: dict[str, dict[str, Rows]] = {}
    for place, name, text in _zipped(archive) if archive.is_file() else _files(source):
        short, split = next(
            ((short, split) for short, split in _MMLU_SPLITS.items() if name.endswith(f"_{short}")), ("", "")
        )
        if split:
            subject = found.setdefault(name.removesuffix(f"_{short}"), {})
            if split in subject:
                raise ValueError(f"{place}: {name}.csv is there twice; take one of them away")
            subject[split] = list(_questions(text, place))
    if not found:
        raise ValueError(f"evaluation.data: {source} holds neither mmlu.zip nor files such as test/anatomy_test.csv")
    for subject, splits in found.items():
        if not splits.get("test"):
            raise ValueError(f"evaluation.data: {source} has no questions of test/{subject}_test.csv; fetch it again")
    return {subject: found[subject] for subject in sorted(found)}


def _zipped(archive: Path) -> Iterator[tuple[str, str, str]]:
    """Where each file is, its name, and its text; what macOS puts beside them is left out."""
    try:
        with zipfile.ZipFile(archive) as file:
            for name in sorted(file.namelist()):
                if name.endswith(".csv") and not Path(name).name.startswith(".") and _AUXILIARY not in Path(name).parts:
                    yield f"{archive}: {name}", Path(name).stem, file.read(name).decode("utf-8-sig")
    # RuntimeError: a password, or a compression that Python does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(f"{archive}: damaged ({error}); fetch it again") from error


def _files(folder: Path) -> Iterator[tuple[str, str, str]]:
    for file in sorted(each for each in folder.rglob("*.csv") if _AUXILIARY not in each.parts):
        yield str(file), file.stem, read_small_text(file).removeprefix("\ufeff")


def _questions(text: str, place: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        if len(row) != 6 or row[5] not in tuple(_LETTERS) or not all(cell.strip() for cell in row):
            raise ValueError(
                f"{place}: row {number} is not question, four choices and a letter: {row!r:.200}; fetch it again"
            )
        yield {"question": row[0], "choices": row[1:5], "answer": _LETTERS.index(row[5])}


_READERS: dict[str, Callable[[Path], Configurations]] = {
    "ifeval": _ifeval,
    "gsm8k": _gsm8k,
    "math500": _math500,
    "mmlu": _mmlu,
}
