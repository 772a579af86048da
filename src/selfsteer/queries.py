"""Reads the queries, checks each, and drops repeated, empty and over-long ones with a reason.

A file that is not what it should be (encoding, syntax, column, type) stops the run with an error that names the place; a
sound row that makes no useful query is dropped and the reading goes on. Queries are kept verbatim: folding serves the
comparison alone. Rows stream through, except those of a .json list; of a query only a 64-bit fingerprint stays in memory.
Left out on purpose: the token limit, which needs the rendered prompt, and hub configurations.
"""

# ruff: noqa: TRY004 (a wrong type within a file is a wrong value to whoever passes the file)

import csv
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow
import pyarrow.parquet

from selfsteer import recipe
from selfsteer.durable import digest, file_digest
from selfsteer.records import Dropped, Message, Query

CHARACTERS_PER_TOKEN = 128
"""The longest tokens of common vocabularies (runs of spaces); a text beyond the token limit times this can never fit."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""The kinds of file that can be read."""

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Row(NamedTuple):
    """One row of a file, before anything is known of it."""

    place: str
    """File and line, for messages."""
    fields: Mapping[str, object]


def read_queries(section: recipe.Queries) -> Iterator[Query | Dropped]:
    """Yield each query that passes, and a `Dropped` for each row that does not, in the order of the file.

    Stops after `section.limit` passing queries. Raises ValueError, naming file and line, for anything that is not a
    readable file with text or chat messages in `section.column`.
    """
    seen: set[int] = set()
    for row in _rows(section):
        if section.column not in row.fields:
            raise ValueError(_missing(row.place, section.column, row.fields))
        query = _query(row.fields[section.column], row.place, section.max_prompt_tokens * CHARACTERS_PER_TOKEN)
        if isinstance(query, Query):
            fingerprint = _fingerprint(query)
            if fingerprint in seen:
                yield Dropped(id=query.id, reason="duplicate", detail=row.place)
                continue
            seen.add(fingerprint)
        yield query
        if len(seen) == section.limit:
            return


def source_digest(section: recipe.Queries) -> str:
    """Digest of the file; of a hub data set only the name is known."""
    return digest(section.path) if section.path.startswith("hub:") else file_digest(Path(section.path))


def fold(text: str) -> str:
    """The text as compared with others: Unicode NFC, whitespace runs as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def make_query(messages: tuple[Message, ...]) -> Query:
    """The query of a conversation that ends in a user turn."""
    return Query(id=digest(list(messages))[:16], messages=messages)


def _fingerprint(query: Query) -> int:
    return int(digest([[message["role"], fold(message["content"])] for message in query.messages])[:16], 16)


# --- one row ---------------------------------------------------------------------------------------------------------------


def _query(value: object, place: str, most_characters: int) -> Query | Dropped:
    if value is None:
        return Dropped(id=place, reason="empty")
    messages = _messages(value, place)
    while messages and messages[-1]["role"] == "assistant":  # the query is the request, not an answer to it
        messages.pop()
    if not messages:
        return Dropped(id=place, reason="empty")
    if messages[-1]["role"] != "user":
        return Dropped(id=place, reason="no user turn at the end", detail=f"the last role is {messages[-1]['role']}")
    if not messages[-1]["content"].strip():
        return Dropped(id=place, reason="empty")
    characters = sum(len(message["content"]) for message in messages)
    if characters > most_characters:
        return Dropped(id=place, reason="too long", detail=f"{characters:,} characters")
    for message in messages:
        # A lone surrogate has no UTF-8 form, so the row could be neither digested nor written.
        if _SURROGATE.search(message["content"]):
            return Dropped(id=place, reason="lone surrogate")
        # Nobody types these: they are the debris of binary files, and some move the terminal that prints them.
        if found := _CONTROL.search(message["content"]):
            return Dropped(id=place, reason="control character", detail=f"U+{ord(found.group()):04X}")
    return make_query(tuple(messages))


def _messages(value: object, place: str) -> list[Message]:
    if isinstance(value, str):
        return [Message(role="user", content=value)]
    if isinstance(value, list):
        return [_message(turn, f"{place}, message {number}") for number, turn in enumerate(cast(list[object], value), 1)]
    raise ValueError(f"{place}: the query is {_kind(value)}; expected text or a list of chat messages")


def _message(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} is {_kind(turn)}; expected an object with role and content (or from and value)")
    fields = cast(dict[str, object], turn)
    keys = ("from", "value") if "from" in fields else ("role", "content")
    role, content = (fields.get(key) for key in keys)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{place} needs role and content (or from and value) as text; found {_keys(fields)}")
    if role not in _ROLES:
        raise ValueError(f"{place} has the role {role!r}; known roles: {', '.join(_ROLES)}. Remove such conversations")
    return Message(role=_ROLES[role], content=content)


def _kind(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _keys(fields: Iterable[str]) -> str:
    return f"the keys {sorted(map(str, fields))}"


def _missing(place: str, column: str, fields: Iterable[str]) -> str:
    return f"{place} has no {column!r}; found {_keys(fields)}. Rename the column or set queries.column in the recipe"


# --- files -----------------------------------------------------------------------------------------------------------------


def _rows(section: recipe.Queries) -> Iterator[Row]:
    if section.path.startswith("hub:"):
        return _hub_rows(section.path.removeprefix("hub:"), section.split)
    path = Path(section.path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; queries.path takes .jsonl, .json, .csv, .parquet or hub:NAME")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; set queries.path in the recipe")
    return file_rows(path, section.column)


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
            raise ValueError(f"{place} is {_kind(fields)}; expected one object a line{hint}")
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
        raise ValueError(f"{path}: the file is {_kind(items)}; expected a list of objects")
    for number, fields in enumerate(cast(list[object], items), 1):
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: item {number} is {_kind(fields)}; expected an object")
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
                raise ValueError(_missing(str(path), column, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=1024, columns=None if column is None else [column]):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", fields)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 within the rows from {number + 1} on ({error.reason})") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset  # slow to import, and needed for the hub alone

    rows = cast(Iterable[dict[str, object]], load_dataset(name, split=split, streaming=True))
    for number, fields in enumerate(rows, 1):
        yield Row(f"hub:{name}: row {number}", fields)


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, strictly decoded, without a byte order mark; memory holds one line."""
    offset = 0
    with path.open("rb") as file:
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
