"""Reads files of others row by row: JSONL, JSON, CSV, Parquet, hub data sets.

A file that is not what it should be (encoding, syntax, column) stops with an error that names the place. Rows stream
through, except those of a .json list.
"""

# ruff: noqa: TRY004 (a wrong type within a file is a wrong value to whoever passes the file)
import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow
import pyarrow.parquet

from selfsteer.store.durable import open_regular

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""The kinds of file that can be read."""


class Row(NamedTuple):
    """One row of a file, before anything is known of it."""

    place: str
    """File and line, for messages."""
    fields: Mapping[str, object]


def type_in_words(value: object) -> str:
    """What a JSON value is, for messages."""
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def keys_in_words(fields: Iterable[str]) -> str:
    """The keys of a row, for messages."""
    return f"the keys {sorted(map(str, fields))}"


def missing_column(place: str, column: str, fields: Iterable[str]) -> str:
    """That a row lacks the column, with those it has."""
    return f"{place} has no {column!r}; found {keys_in_words(fields)}. Rename the column or set queries.column in the recipe"


def file_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """Every row of an existing file of one of the SUFFIXES; of Parquet, `column` alone where one is given.

    Raises ValueError, naming file and place, for what is malformed.
    """
    match path.suffix.lower():
        case ".parquet":
            return _parquet_rows(path, column)
        case ".json":
            return _json_rows(path)
        case ".csv":
            return _csv_rows(path)
        case suffix:
            assert suffix == ".jsonl", suffix
            return jsonl_rows(path)


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield (place, fields) for each object of a JSONL file; blank lines are skipped.

    Raises ValueError, naming file and line, for bytes that are no UTF-8, malformed JSON, and rows that are no objects.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: malformed JSON ({error}); expected one object a line") from error
        if not isinstance(fields, dict):
            hint = "; a file that is one JSON list is named .json" if isinstance(fields, list) else ""
            raise ValueError(f"{place} is {type_in_words(fields)}; expected one object a line{hint}")
        yield Row(place, cast(dict[str, object], fields))


def _json_rows(path: Path) -> Iterator[Row]:
    text = "".join(_lines(path))
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line is named .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}:{error.lineno}: malformed JSON ({error.msg}); expected a list of objects{hint}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: malformed JSON ({error}); expected a list of objects") from error
    if not isinstance(items, list):
        raise ValueError(f"{path}: the file is {type_in_words(items)}; expected a list of objects")
    for number, fields in enumerate(cast(list[object], items), 1):
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: item {number} is {type_in_words(fields)}; expected an object")
        yield Row(f"{path}: item {number}", cast(dict[str, object], fields))


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    try:
        for values in reader:
            if not values:
                continue
            if header is None:
                header = values
                if repeated := sorted({name for name in header if header.count(name) > 1}):
                    raise ValueError(f"{path}:1: the header repeats {repeated}; give each column its own name")
                continue
            place = f"{path}:{reader.line_num}"
            if len(values) != len(header):
                raise ValueError(
                    f"{place}: {len(values)} fields under a header of {len(header)}; put text with commas in double quotes"
                )
            yield Row(place, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.line_num}: malformed CSV ({error}); often a double quote left open or not doubled above. "
            "JSONL has no such trap"
        ) from error


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column is not None and column not in file.schema_arrow.names:
                raise ValueError(missing_column(str(path), column, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=1024, columns=None if column is None else [column]):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", fields)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 within the rows from {number + 1} on ({error.reason})") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Every row of a split of a hub data set, streamed."""
    from datasets import load_dataset  # slow to import, and needed for the hub alone

    rows = cast(Iterable[dict[str, object]], load_dataset(name, split=split, streaming=True))
    for number, fields in enumerate(rows, 1):
        yield Row(f"hub:{name}: row {number}", fields)


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, strictly decoded, without a byte order mark; memory holds one line."""
    offset = 0
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 at byte {offset + error.start} of the file ({error.reason}); "
                    "save the file as UTF-8"
                ) from error
            offset += len(line)
            yield text.removeprefix("\ufeff") if number == 1 else text
