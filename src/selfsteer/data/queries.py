"""Reads the queries, checks each, and drops repeated, empty and over-long ones with a reason.

A file that is not what it should be (encoding, syntax, column, type) stops the run with an error that names the place; a
sound row that makes no useful query is dropped and the reading goes on. Queries are kept verbatim: folding serves the
comparison alone. Rows stream through (`files.py`); of a query only a 64-bit fingerprint stays in memory. Left out on
purpose: the token limit, which needs the rendered prompt.
"""

import re
import unicodedata
from collections.abc import Iterator

from selfsteer.data import files
from selfsteer.data.files import Row, check_source, is_blank, keys_in_words, read_chat, source_rows, with_system
from selfsteer.recipe import sections
from selfsteer.recipe.shipped import located
from selfsteer.records import Dropped, Message, Query
from selfsteer.store.durable import digest

CHARACTERS_PER_TOKEN = 128
"""The longest tokens of common vocabularies (runs of spaces); a text beyond the token limit times this can never fit."""

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def read_queries(section: sections.Queries) -> Iterator[Query | Dropped]:
    """Yield each query that passes, and a `Dropped` for each row that does not, in the order of the file.

    Stops after `section.limit` passing queries. Raises ValueError, naming file and line, for anything that is not a
    readable file with text or chat messages in `section.column`.
    """
    source = located(section.path)
    check_source(source, "queries.path")
    columns = (section.column, *files.SYSTEM_COLUMNS, *files.OTHER_COLUMNS)
    seen: set[int] = set()
    for row in source_rows(source, columns, split=section.split):
        if section.column not in row.fields:
            raise ValueError(
                f"{row.place} has no {section.column!r}; found {keys_in_words(row.columns)}. Rename the column or set "
                "queries.column in the recipe (where a command has no recipe: --column)"
            )
        query = _query(row, section.column, section.max_prompt_tokens * CHARACTERS_PER_TOKEN)
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
    return files.source_digest(located(section.path))


def fold(text: str) -> str:
    """The text as compared with others: Unicode NFC, whitespace runs as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def make_query(messages: tuple[Message, ...]) -> Query:
    """The query of a conversation that ends in a user turn."""
    return Query(id=digest(list(messages))[:16], messages=messages)


def _fingerprint(query: Query) -> int:
    return int(digest([[message["role"], fold(message["content"])] for message in query.messages])[:16], 16)


def _query(row: Row, column: str, most_characters: int) -> Query | Dropped:
    value, place = row.fields[column], row.place
    if value is None:
        return Dropped(id=place, reason="empty")
    messages = read_chat(value, "user", f"{place}, {column!r}")
    if isinstance(messages, str):
        return Dropped(id=place, reason=messages)
    while messages and messages[-1]["role"] == "assistant":  # the query is the request, not an answer to it
        messages.pop()
    if not messages:
        return Dropped(id=place, reason="empty")
    if messages[-1]["role"] != "user":
        return Dropped(id=place, reason="no user turn at the end", detail=f"the last role is {messages[-1]['role']}")
    if is_blank(messages[-1]["content"]):
        return Dropped(id=place, reason="empty")
    if any(message["role"] == "tool" for message in messages):
        return Dropped(id=place, reason="a turn of a tool")
    if column not in files.SYSTEM_COLUMNS:
        messages = with_system(messages, row, column)
        if isinstance(messages, str):
            return Dropped(id=place, reason=messages)
    characters = sum(len(message["content"]) for message in messages)
    if characters > most_characters:
        return Dropped(id=place, reason="too long", detail=f"{characters:,} characters")
    for message in messages:
        if files.SURROGATE.search(message["content"]):
            return Dropped(id=place, reason="lone surrogate")
        # Nobody types these: they are the debris of binary files, and some move the terminal that prints them.
        if found := _CONTROL.search(message["content"]):
            return Dropped(id=place, reason="control character", detail=f"U+{ord(found.group()):04X}")
    return make_query(tuple(messages))
