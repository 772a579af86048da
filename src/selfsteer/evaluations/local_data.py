"""Benchmarks from files on this machine, laid out as lm-evaluation-harness expects the hub's data sets.

    DIR/ifeval/input_data.jsonl      as google-research publishes it
    DIR/gsm8k/test.jsonl             and train.jsonl, for the examples of the five-shot task
    DIR/math500/test.jsonl
    DIR/mmlu/mmlu.zip                the archive of hendrycks/test: data/{dev,val,test}/<subject>_<split>.csv, or the folder
    DIR/<task>/                      of any other task: a folder that `datasets.load_dataset` can read

Each becomes a folder that `load_dataset(folder, configuration)` reads offline. Rows are taken as they are; none is left out.
"""

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from selfsteer.data.files import rows_with
from selfsteer.store.durable import digest, file_digest, read_small_text

Rows = list[dict[str, Any]]

_LETTERS = "ABCD"
_MMLU_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}


class Local(NamedTuple):
    """A benchmark's data on this machine."""

    folder: Path
    """What `load_dataset` is given."""
    digest: str
    """Of the files it came from."""
    splits: frozenset[str] | None
    """That every configuration has; None where only `load_dataset` will tell."""


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
        return Local(source, _digest(source), None)
    found, configurations = _digest(source), reader(source)
    folder = scratch / f"{name}-{found[:12]}"
    if not (folder / "README.md").is_file():
        _lay_out(folder, configurations)
    return Local(folder, found, frozenset.intersection(*(frozenset(splits) for splits in configurations.values())))


def _digest(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise ValueError(f"evaluation.data: {folder} is empty")
    return digest({str(file.relative_to(folder)): file_digest(file) for file in files})


Configurations = Mapping[str, Mapping[str, Rows]]
"""Rows by configuration and split."""


def _lay_out(folder: Path, configurations: Configurations) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            file = folder / name / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            lines += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    # Written last: it says that the rest is there.
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _ifeval(source: Path) -> Configurations:
    return {"default": {"train": rows_with(source / "input_data.jsonl", "key", "prompt", "instruction_id_list", "kwargs")}}


def _gsm8k(source: Path) -> Configurations:
    files = {split: source / f"{split}.jsonl" for split in ("train", "test")}
    return {
        "main": {
            split: rows_with(file, "question", "answer")
            for split, file in files.items()
            if split == "test" or file.is_file()
        }
    }


def _math500(source: Path) -> Configurations:
    return {"default": {"test": rows_with(source / "test.jsonl", "problem", "solution", "answer")}}


def _mmlu(source: Path) -> Configurations:
    archive = source / "mmlu.zip"
    found: dict[str, dict[str, Rows]] = {}
    for name, text in _zipped(archive) if archive.is_file() else _files(source):
        short, split = next(
            ((short, split) for short, split in _MMLU_SPLITS.items() if name.endswith(f"_{short}")), ("", "")
        )
        if split:
            found.setdefault(name.removesuffix(f"_{short}"), {})[split] = list(_questions(text, name))
    if not found:
        raise ValueError(f"evaluation.data: {source} holds neither mmlu.zip nor files such as test/anatomy_test.csv")
    return {subject: found[subject] for subject in sorted(found)}


def _zipped(archive: Path) -> Iterator[tuple[str, str]]:
    try:
        with zipfile.ZipFile(archive) as file:
            for name in sorted(file.namelist()):
                if name.endswith(".csv"):
                    yield Path(name).stem, file.read(name).decode("utf-8")
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{archive}: damaged ({error}); fetch it again") from error


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*.csv")):
        yield file.stem, read_small_text(file)


def _questions(text: str, name: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        if len(row) != 6 or row[5] not in _LETTERS:
            raise ValueError(f"{name}.csv: row {number} is not question, four choices and a letter: {row}")
        yield {"question": row[0], "choices": row[1:5], "answer": _LETTERS.index(row[5])}


_READERS: dict[str, Callable[[Path], Configurations]] = {
    "ifeval": _ifeval,
    "gsm8k": _gsm8k,
    "math500": _math500,
    "mmlu": _mmlu,
}
