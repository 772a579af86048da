"""The one reader of files of others, row by row: JSONL, JSON, CSV, Parquet, hub data sets; and of the chats within.

A file that is not what it should be (encoding, syntax, column, type) stops with an error that names file, row and key. Rows
stream through; of a .json file the text is held. Left out on purpose: compressed files, and hub configurations.
"""

# ruff: noqa: TRY004 (a wrong type within a file is a wrong value to whoever passes the file)
import csv
import json
import logging
import math
import re
import unicodedata
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import pyarrow
import pyarrow.types

from selfsteer.records import Message
from selfsteer.store import columns as parquet
from selfsteer.store.durable import digest, file_digest, regular_file

log = logging.getLogger(__name__)


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""The kinds of file that can be read, in any case."""

HUB = "hub:"
"""Before the name of a hub data set."""

_LONGEST_FIELD = 2**30
"""Of a CSV file, in characters. The csv module's own limit of 131,072 is shorter than one long document."""


class Row(NamedTuple):
    """One row of a file, before anything is known of it."""

    place: str
    """File and line, for messages."""
    fields: Mapping[str, object]
    columns: Collection[str]
    """All keys of the row; of Parquet those that were not asked for are no fields."""


def check_source(source: str | Path, setting: str) -> None:
    """Raises ValueError unless this is an ordinary file of a known kind or names a hub data set. setting: who named it."""
    name = str(source)
    if name.startswith(HUB):
        if not name.removeprefix(HUB).strip():
            raise ValueError(f"{setting}: hub: names no data set; expected hub:NAME, such as hub:owner/name")
        return
    path = Path(source)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; {setting} takes {', '.join(SUFFIXES)} or hub:NAME")
    regular_file(path, f"{setting} takes {', '.join(SUFFIXES)} or hub:NAME")


def source_digest(source: str | Path) -> str:
    """Digest of the file; of a hub data set only the name is known."""
    return digest(str(source)) if str(source).startswith(HUB) else file_digest(Path(source))


def source_rows(source: str | Path, columns: Collection[str] = (), *, split: str = "train") -> Iterator[Row]:
    """Every row of a file or a hub data set; of Parquet only `columns`, where some are given.

    Raises ValueError, naming file, row and key, for what is malformed. A header of a CSV file is required.
    """
    if str(source).startswith(HUB):
        return hub_rows(str(source).removeprefix(HUB), split)
    path = Path(source)
    return _csv_rows(path) if path.suffix.lower() == ".csv" else _file_rows(path, columns)


def all_rows(path: Path) -> Iterator[Row]:
    """Every row of a file for whoever reads all columns: a CSV file may have no header, so its first line is a row, too."""
    if path.suffix.lower() != ".csv":
        yield from _file_rows(path, ())
        return
    for place, values in _csv_lines(path):
        fields = {str(number): value for number, value in enumerate(values, 1)}
        yield Row(place, fields, fields)


def rows_with(path: Path, *fields: str) -> list[dict[str, Any]]:
    """All rows of a small file of evaluation data, each with these fields; raises ValueError naming file and row."""
    check_source(path, "evaluation data")
    rows: list[dict[str, Any]] = []
    for row in source_rows(path):
        if missing := [field for field in fields if field not in row.fields]:
            raise ValueError(f"{row.place} has no {missing}; found {keys_in_words(row.fields)}")
        rows.append(dict(row.fields))
    if not rows:
        raise ValueError(f"{path}: no rows; fetch it again")
    return rows


@contextmanager
def told_by(path: Path) -> Generator[None]:
    """Values of other types than whoever publishes such a file writes: what goes wrong with them, as an error about it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: its rows are not what is published under this name ({said}); fetch it again") from error


def _file_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    match path.suffix.lower():
        case ".parquet":
            return _parquet_rows(path, columns)
        case ".json":
            return _json_rows(path)
        case suffix:
            assert suffix == ".jsonl", suffix
            return jsonl_rows(path)


# --- messages --------------------------------------------------------------------------------------------------------------


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


@lru_cache(maxsize=256)
def say_once(text: str) -> None:
    """Warn of what concerns a whole file: it is read several times."""
    log.warning("%s", text)


# --- JSON ------------------------------------------------------------------------------------------------------------------


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Each object of a JSONL file; blank lines are skipped.

    Raises ValueError, naming file and line, for bytes that are no UTF-8, malformed JSON, and rows that are no objects.
    """
    for number, text in enumerate(_lines(path), 1):
        line = text.removeprefix("\ufeff")  # also within files that were put together of several
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            fields = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            _malformed(error, place, line, "expected one object a line")
        if not isinstance(fields, dict):
            hint = "; a file that is one JSON list is named .json" if isinstance(fields, list) else ""
            raise ValueError(f"{place} is {type_in_words(fields)}; expected one object a line{hint}")
        row = cast("dict[str, object]", fields)
        yield Row(place, row, row)


_SPACE = re.compile(r"[ \t\r\n]*")


def _json_rows(path: Path) -> Iterator[Row]:
    """Item by item, so that each error knows its item."""
    text = "".join(_lines(path))
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path}: the file is {_start_in_words(text, at)}; expected a list of objects")
    at = _after_space(text, at + 1)
    number = 0
    while text[at : at + 1] != "]" or number > 0:
        number += 1
        place = f"{path}: item {number}"
        try:
            fields, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                place = f"{path}: line {error.lineno}"
            _malformed(error, place, text[at:], "expected a list of objects")
        if not isinstance(fields, dict):
            raise ValueError(f"{place} is {type_in_words(fields)}; expected an object")
        row = cast("dict[str, object]", fields)
        yield Row(place, row, row)
        at = _after_space(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}: line {line}: malformed JSON (Expecting ',' delimiter); expected a list of objects")
        at = _after_space(text, at + 1)
    end = _after_space(text, at + 1)
    if end < len(text):
        line = text.count("\n", 0, end) + 1
        raise ValueError(
            f"{path}: line {line}: malformed JSON (Extra data); expected one list of objects and nothing behind it"
        )


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _start_in_words(text: str, at: int) -> str:
    if at == len(text):
        return "empty"
    if text[at] == "{":
        return "an object (a file with one object a line is named .jsonl)"
    return "text" if text[at] == '"' else "no list"


class _Repeated(ValueError):
    """A key that an object has twice."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice; keep one")
    return fields


# NaN is how pandas writes what is missing.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda name: None if name == "NaN" else float(name))

_DIGITS = re.compile(r"\d{1000,}")

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)

_DEPTH = 100
"""Where the text is deeper than this, the parser may have given up."""


def _malformed(error: Exception, place: str, text: str, expected: str) -> NoReturn:
    """Raise ValueError for a text that could not be parsed."""
    if isinstance(error, json.JSONDecodeError):
        raise ValueError(f"{place}: malformed JSON ({error.msg} at column {error.colno}); {expected}") from error
    if isinstance(error, _Repeated):
        raise ValueError(f"{place}: {error}") from error
    if isinstance(error, RecursionError):
        raise ValueError(f"{place}{_key_at(text, None)}: nested too deeply to be read; flatten or remove it") from error
    digits = _DIGITS.search(text)
    length = f"a number of {len(digits[0]):,} digits" if digits else str(error)
    raise ValueError(
        f"{place}{_key_at(text, digits and digits.start())}: {length}; write it as text, or remove it"
    ) from error


def _key_at(text: str, offset: int | None) -> str:
    """The key of the row under which the text at an offset stands (or where it first is too deep), for messages."""
    depth, key = 0, ""
    for token in _TOKEN.finditer(text):
        if offset is not None and token.start() >= offset:
            break
        if token[0] in "[{":
            depth += 1
            if offset is None and depth > _DEPTH:
                break
        elif token[0] in "]}":
            depth -= 1
        elif depth == 1 and text[_after_space(text, token.end()) :][:1] == ":":
            key = token[0][1:-1]
    return f", {key!r}" if key else ""


# --- CSV -------------------------------------------------------------------------------------------------------------------


def _csv_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every row that is not blank, with its place."""
    csv.field_size_limit(_LONGEST_FIELD)
    lines = _lines(path)
    first = list(islice(lines, _LOOKED_AT))
    if separator := _other_separator([line for line in first if line.strip()]):
        raise ValueError(f"{path}: its fields are separated by {separator!r}; save it with commas, or as JSONL")
    reader = csv.reader(chain(first, lines), strict=True)
    try:
        for values in reader:
            if values:
                yield f"{path}: line {reader.line_num}", values
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {reader.line_num}: malformed CSV ({error}); often a double quote left open or not doubled above. "
            "JSONL has no such trap"
        ) from error
    if reader.line_num == 0:
        raise ValueError(f"{path}: the file is empty")


_LOOKED_AT = 20
"""Lines of a CSV file that show what separates its fields."""


def _other_separator(lines: Sequence[str]) -> str | None:
    """What stands in every line equally often, as commas do not; None where there is no such mark."""
    if len(lines) < 2 or (lines[0].count(",") and len({line.count(",") for line in lines}) == 1):
        return None
    return next((mark for mark in ";\t|" if lines[0].count(mark) and len({line.count(mark) for line in lines}) == 1), None)


def _csv_rows(path: Path) -> Iterator[Row]:
    header: list[str] | None = None
    for place, values in _csv_lines(path):
        if header is None:
            header = values
            if repeated := _repeated(header):
                raise ValueError(f"{place}: the header repeats {repeated}; give each column its own name")
            continue
        if len(values) != len(header):
            raise ValueError(
                f"{place}: {len(values)} fields under a header of {len(header)}; put text with commas in double quotes"
            )
        yield Row(place, dict(zip(header, values, strict=True)), header)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


# --- Parquet ---------------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    with parquet.opened(path) as file:
        with parquet.named(path):  # names may be no UTF-8
            schema = file.schema_arrow
            names = list(schema.names)
        if repeated := _repeated(names):
            raise ValueError(f"{path}: repeats the columns {repeated}; give each its own name")
        taken = [name for name in names if name in columns] if columns else _with_text(schema)
        number = 0
        for batch in parquet.batches(path, file, taken):
            for fields in _converted(batch, path, number):
                number += 1
                for key, value in fields.items():
                    if isinstance(value, float) and math.isnan(value):  # as in JSON
                        fields[key] = None
                yield Row(f"{path}: row {number}", fields, names)


def _with_text(schema: Any) -> list[str]:
    """The columns that may hold text: numbers and times have none, and some of them no Python value either."""
    return [field.name for field in schema if not pyarrow.types.is_primitive(field.type)]


def _converted(batch: Any, path: Path, before: int) -> list[dict[str, object]]:
    """The rows as Python objects. Raises ValueError naming the first value that is none (no UTF-8, the year 10000)."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, RecursionError, pyarrow.ArrowException) as error:
        for number in range(batch.num_rows):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                _check_value(column[number], f"{path}: row {before + number + 1}, {name!r}")
        raise ValueError(f"{path}: the rows from {before + 1} on can't be read ({error}); make the file again") from error


def _check_value(value: Any, place: str) -> None:
    try:
        value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason}); save the file with UTF-8 text") from error
    except (ValueError, OverflowError, RecursionError, pyarrow.ArrowException) as error:
        raise ValueError(f"{place}: can't be read ({error}); mend or remove it") from error


# --- hub -------------------------------------------------------------------------------------------------------------------


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Every row of a split of a hub data set, streamed. Raises ValueError naming it where it can't be fetched."""
    from datasets import load_dataset  # slow to import, and needed for the hub alone
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        rows = iter(cast("Iterable[dict[str, object]]", load_dataset(name, split=split, streaming=True)))
        while (fields := next(rows, None)) is not None:
            number += 1
            yield Row(f"{HUB}{name}: row {number}", fields, fields)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        behind = f" behind row {number}" if number else ""
        raise ValueError(
            f"{HUB}{name}: the split {split!r} of this data set can't be read{behind} ({error}); look at its name and split "
            "on the hub, and at the connection"
        ) from error


# --- text ------------------------------------------------------------------------------------------------------------------


_MARKS = {
    b"\xff\xfe": "it looks like UTF-16",
    b"\xfe\xff": "it looks like UTF-16",
    b"\x1f\x8b": "it looks compressed by gzip",
}
"""What files that are no UTF-8 begin with."""


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, strictly decoded, without a byte order mark; memory holds one line."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                reason = next((said for mark, said in _MARKS.items() if number == 1 and line.startswith(mark)), error.reason)
                raise ValueError(
                    f"{path}: line {number}: not UTF-8 at byte {offset + error.start} of the file ({reason}); "
                    "save the file as UTF-8"
                ) from error
            if number == 1 and "\0" in text[:8]:
                raise ValueError(
                    f"{path}: line 1: zero bytes in the text (it looks like UTF-16 or UTF-32); save the file as UTF-8"
                )
            offset += len(line)
            yield text.removeprefix("\ufeff") if number == 1 else text


SURROGATE = re.compile(r"[\ud800-\udfff]")
"""A lone one has no UTF-8 form, so a text with it can be neither digested nor written."""

# Shown as nothing, though letters and marks to Unicode: fillers in Hangul, Braille's empty cell, joiners, Khmer vowels that
# are not written, variation selectors (DerivedCoreProperties.txt: Default_Ignorable_Code_Point).
_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | frozenset(
    map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)))
)


def is_blank(text: str) -> bool:
    """Whether there is nothing to see: spaces, zero-width and control characters."""
    return all(
        character.isspace() or character in _UNSEEN or unicodedata.category(character) in ("Cf", "Cc") for character in text
    )


# --- chats -----------------------------------------------------------------------------------------------------------------

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Names of roles in files, and ours."""

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction", "System", "SYSTEM")
"""Columns beside a conversation that hold its system message."""

OTHER_COLUMNS = ("tools", "images", "videos", "audios", "history", "input", "context", "documents")
"""Columns beside a conversation that change what it asks for, and that can't be used."""

# A chat as JSON, or as Python or numpy prints it, in a string, perhaps in a string again: what CSV files and pandas make of
# a list. A key of another name may stand before (name, weight, id).
_CHAT_AS_TEXT = re.compile(
    r"""\s* "? (?:array\()? \s*
    (?: \[? \s* \{ \s* KEY(?:role|from|content|value)KEY
      | \[? \s* \{ \s* OTHER KEY(?:role|from)KEY .* KEY(?:content|value)KEY
      | \{ \s* (?:OTHER)? KEY(?:messages|conversations?)KEY
      | \[ \s* \{ \s* KEYtypeKEY \s* : \s* KEY(?:text|input_text|output_text)KEY
    ) .* [}\]] (?:, \s* dtype=\w+)? \)? "? \s*""".replace("OTHER", r"KEY\w+KEY \s* : [^{}\[\]]{1,200} , \s*").replace(
        "KEY", r"""\\?["']"""
    ),
    re.DOTALL | re.VERBOSE,
)


def read_chat(value: object, role: str, place: str) -> list[Message] | str:
    """The turns of a text (one of `role`), of a turn, or of a list of turns; or why such a row must be dropped.

    A turn is {role, content} or {from, value}; content is text or a list of text parts, which are joined. Raises ValueError,
    naming the place, for anything else.
    """
    if isinstance(value, str):
        return "JSON in a string" if _CHAT_AS_TEXT.fullmatch(value) else [Message(role=role, content=value)]
    if isinstance(value, dict):
        turns, places = [cast("object", value)], [place]
        if not {"role", "from"} & cast("dict[str, object]", value).keys():
            raise ValueError(f"{place} is an object; expected text or chat messages, each with role and content")
    elif isinstance(value, list):
        turns = cast("list[object]", value)
        places = [f"{place}, message {number}" for number in range(1, len(turns) + 1)]
    else:
        raise ValueError(f"{place} is {type_in_words(value)}; expected text or a list of chat messages")
    messages: list[Message] = []
    for turn, where in zip(turns, places, strict=True):
        message = _turn(turn, where)
        if isinstance(message, str):
            return message
        messages.append(message)
    return messages


def _turn(turn: object, place: str) -> Message | str:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} is {type_in_words(turn)}; expected an object with role and content (or from and value)")
    fields = cast("dict[str, object]", turn)
    # Parquet gives every turn all keys that some turn has.
    keys = ("from", "value") if fields.get("from") is not None else ("role", "content")
    role, content = (fields.get(key) for key in keys)
    if not isinstance(role, str) or keys[1] not in fields:
        raise ValueError(f"{place} needs role and content (or from and value) as text; found {keys_in_words(fields)}")
    if role not in ROLES:
        raise ValueError(f"{place} has the role {role!r}; known roles: {', '.join(ROLES)}. Rename or remove it")
    if content is None:
        return "null content"
    text = content if isinstance(content, str) else _joined(content, f"{place}, {keys[1]!r}")
    return "content that is not text" if text is None else Message(role=ROLES[role], content=text)


def _joined(content: object, place: str) -> str | None:
    """The text of a list of text parts, None where a part is something else (an image)."""
    if not isinstance(content, list):
        raise ValueError(f"{place} is {type_in_words(content)}; expected text or a list of text parts")
    texts: list[str] = []
    for part in cast("list[object]", content):
        fields = cast("dict[str, object]", part) if isinstance(part, dict) else {"text": part}
        text = fields.get("text")
        if not isinstance(text, str) or fields.get("type") not in (None, "text", "input_text", "output_text"):
            return None
        texts.append(text)
    return "".join(texts)


def with_system(messages: list[Message], row: Row, column: str = "") -> list[Message] | str:
    """The conversation under the system message that stands in a column of its own, or why such a row must be dropped.

    column: where the conversation stands. Other columns that matter are named. Raises ValueError, naming the place, for a
    system message that is no text.
    """
    source = row.place.rpartition(": ")[0]
    for name in OTHER_COLUMNS:
        if name != column and row.fields.get(name):
            say_once(f"{source}: the column {name!r} is not used: conversations are read without what stands there")
    found = [(name, row.fields[name]) for name in SYSTEM_COLUMNS if row.fields.get(name) is not None]
    texts: list[str] = []
    for name, value in found:
        if not isinstance(value, str):
            raise ValueError(
                f"{row.place}, {name!r} is {type_in_words(value)}; expected text. Rename it if it is no system message"
            )
        if not is_blank(value) and value not in texts:
            texts.append(value)
    own = [message["content"] for message in messages if message["role"] == "system"]
    if texts and len({*texts, *own}) > 1:
        return "two system messages"
    if not texts or own:
        return messages
    say_once(f"{source}: the column {found[0][0]!r} is taken as the system message of its conversation")
    return list(chain([Message(role="system", content=texts[0])], messages))
