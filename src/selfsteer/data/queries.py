"""Reads the queries, checks each, and drops repeated, empty and over-long ones with a reason.

A file that is not what it should be (encoding, syntax, column, type) stops the run with an error that names the place; a
sound row that makes no useful query is dropped and the reading goes on. Queries are kept verbatim: folding serves the
comparison alone. Rows stream through, except those of a .json list; of a query only a 64-bit fingerprint stays in memory.
Left out on purpose: the token limit, which needs the rendered prompt, and hub configurations.
"""

# ruff: noqa: TRY004 (a wrong type within a file is a wrong value to whoever passes the file)
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from selfsteer.data.files import SUFFIXES, Row, file_rows, hub_rows, keys_in_words, missing_column, type_in_words
from selfsteer.recipe import sections
from selfsteer.records import Dropped, Message, Query
from selfsteer.store.durable import digest, file_digest

CHARACTERS_PER_TOKEN = 128
"""The longest tokens of common vocabularies (runs of spaces); a text beyond the token limit times this can never fit."""

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")

_SURROGATE = re.compile(r"[\ud800-\udfff]")


def read_queries(section: sections.Queries) -> Iterator[Query | Dropped]:
    """Yield each query that passes, and a `Dropped` for each row that does not, in the order of the file.

    Stops after `section.limit` passing queries. Raises ValueError, naming file and line, for anything that is not a
    readable file with text or chat messages in `section.column`.
    """
    seen: set[int] = set()
    for row in _rows(section):
        if section.column not in row.fields:
            raise ValueError(missing_column(row.place, section.column, row.fields))
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


def source_digest(section: sections.Queries) -> str:
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
    raise ValueError(f"{place}: the query is {type_in_words(value)}; expected text or a list of chat messages")


def _message(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} is {type_in_words(turn)}; expected an object with role and content (or from and value)")
    fields = cast(dict[str, object], turn)
    keys = ("from", "value") if "from" in fields else ("role", "content")
    role, content = (fields.get(key) for key in keys)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{place} needs role and content (or from and value) as text; found {keys_in_words(fields)}")
    if role not in _ROLES:
        raise ValueError(f"{place} has the role {role!r}; known roles: {', '.join(_ROLES)}. Remove such conversations")
    return Message(role=_ROLES[role], content=content)


# --- files -----------------------------------------------------------------------------------------------------------------


def _rows(section: sections.Queries) -> Iterator[Row]:
    if section.path.startswith("hub:"):
        return hub_rows(section.path.removeprefix("hub:"), section.split)
    path = Path(section.path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; queries.path takes .jsonl, .json, .csv, .parquet or hub:NAME")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; set queries.path in the recipe")
    return file_rows(path, section.column)
