"""Read a preference data set made elsewhere, in any of the forms the field writes, as `PairRow`s.

form              prompt                               chosen, rejected
plain             a string                             strings
conversational    messages                             messages: the completion, or the whole conversation
implicit prompt   none                                 two whole conversations with a common beginning
sharegpt ranking  "conversations": {"from", "value"}   {"from", "value"}

The first three are TRL's, the last is LLaMA-Factory's. Left out on purpose: plain strings without a prompt, in which only a
guess would tell the turns apart.
"""

# ruff: noqa: TRY004 (a wrong type within a file is a wrong value to whoever passes the file)

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet as pq

from selfsteer.durable import digest
from selfsteer.records import Dropped, Message, PairRow

_BATCH_ROWS = 1024
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_FORMS = "Give 'prompt', 'chosen' and 'rejected' as strings or as lists of {role, content} messages."

Row = dict[str, Any]


def read_pairs(path: Path) -> Iterator[PairRow | Dropped]:
    """Yield the pairs of a .parquet, .jsonl or .json file, and a `Dropped` for each row that can be none, in order.

    Columns of `PairRow` that the file has already are kept. A .json file is held in memory, the others stream. ValueError,
    naming file, row and key, where a row is malformed.
    """
    for place, row in _rows(path):
        pair = _pair(row, place)
        reason = _drop_reason(pair)
        if reason is not None:
            yield Dropped(id=pair["query_id"] or place, reason=reason, detail=place)
        else:
            # As `Query.id`.
            pair["query_id"] = pair["query_id"] or digest(pair["prompt"])[:16]
            yield pair


def _drop_reason(pair: PairRow) -> str | None:
    chosen, rejected = (pair[side][-1]["content"].strip() for side in ("chosen", "rejected"))
    texts = [message["content"] for key in ("prompt", "chosen", "rejected") for message in pair[key]]
    if any(_SURROGATE.search(text) for text in texts):
        return "lone surrogate"
    if not pair["prompt"][-1]["content"].strip():
        return "empty prompt"
    if not chosen:
        return "empty chosen"
    if not rejected:
        return "empty rejected"
    return "chosen equal to rejected" if chosen == rejected else None


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Every row of the file with its place, for messages."""
    match path.suffix:
        case ".parquet":
            try:
                file = pq.ParquetFile(path)
            except pyarrow.ArrowInvalid as error:
                raise ValueError(
                    f"{path} is not a Parquet file: {error}. Give another, or name it after what it is."
                ) from error
            number = 0
            with file:
                for batch in file.iter_batches(_BATCH_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}: row {number}", row
        case ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    place = f"{path}: line {number}"
                    if line.strip():
                        yield place, _object(_parse(line, place), place)
        case ".json":
            rows = _parse(path.read_bytes(), str(path))
            if not isinstance(rows, list):
                raise ValueError(f"{path} is not a list of rows; a file with one object a line is named .jsonl.")
            for number, row in enumerate(cast("list[object]", rows), 1):
                yield f"{path}: row {number}", _object(row, f"{path}: row {number}")
        case other:
            raise ValueError(
                f"{path}: cannot read {other or 'files without a suffix'}; give a .parquet, .jsonl or .json file."
            )


def _parse(data: bytes, where: str) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}); save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}. Mend or remove it.") from error


def _object(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object but {type(value).__name__}. {_FORMS}")
    return cast(Row, value)


def _pair(row: Row, where: str) -> PairRow:
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise ValueError(f"{where} has no {key!r}; found the keys {sorted(row)}. Rename the column to {key!r}.")
    if "conversations" in row:
        prompt = _sharegpt(row["conversations"], f"{where}, 'conversations'")
        if isinstance(row.get("system"), str) and row["system"]:
            prompt = [Message(role="system", content=row["system"]), *prompt]
        chosen, rejected = (_sharegpt([row[key]], f"{where}, {key!r}") for key in ("chosen", "rejected"))
    else:
        chosen, rejected = (_messages(row[key], "assistant", f"{where}, {key!r}") for key in ("chosen", "rejected"))
        if row.get("prompt") is not None:
            prompt = _messages(row["prompt"], "user", f"{where}, 'prompt'")
        elif isinstance(row["chosen"], str):
            raise ValueError(f"{where} has no 'prompt'; found the keys {sorted(row)}. {_FORMS}")
        else:
            prompt = _common_beginning(chosen, rejected)
        chosen, rejected = _without(prompt, chosen), _without(prompt, rejected)
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError(f"{where}, 'prompt' must end in a user turn. {_FORMS}")
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if [message["role"] for message in messages] != ["assistant"]:
            raise ValueError(
                f"{where}, {key!r} must be one assistant turn after the prompt; found {[m['role'] for m in messages]}. "
                "Move the earlier turns into 'prompt'."
            )
    pair = PairRow(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        query_id=row.get("query_id") or "",
        kind=row.get("kind") or "given",
        chosen_finish=row.get("chosen_finish") or "stop",
        rejected_finish=row.get("rejected_finish") or "stop",
    )
    for key in ("ref_chosen_logps", "ref_rejected_logps", "chosen_tokens", "rejected_tokens"):
        if row.get(key) is not None:
            pair[key] = row[key]
    return pair


def _messages(value: object, role: str, where: str) -> list[Message]:
    """A string as one turn of `role`; a list of messages, or one message, as it is."""
    if isinstance(value, str):
        return [Message(role=role, content=value)]
    turns = cast("list[object]", value) if isinstance(value, list) else [value]
    return [_message(turn, ("role", "content"), where) for turn in turns]


def _sharegpt(value: object, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of {{from, value}} turns, found {type(value).__name__}. {_FORMS}")
    turns = [_message(turn, ("from", "value"), where) for turn in cast("list[object]", value)]
    for turn in turns:
        if turn["role"] not in _SHAREGPT_ROLES:
            raise ValueError(
                f"{where} has a turn from {turn['role']!r}; known are {sorted(_SHAREGPT_ROLES)}. Rename or remove it."
            )
    return [Message(role=_SHAREGPT_ROLES[turn["role"]], content=turn["content"]) for turn in turns]


def _message(turn: object, keys: tuple[str, str], where: str) -> Message:
    fields = cast(Row, turn) if isinstance(turn, dict) else {}
    role, content = (fields.get(key) for key in keys)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{where} has a turn without the strings {keys[0]!r} and {keys[1]!r}: {str(turn)[:80]!r}. {_FORMS}")
    return Message(role=role, content=content)


def _common_beginning(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The turns that both begin with, but never the last turn of either."""
    common: list[Message] = []
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        common.append(one)
    return common


def _without(prompt: list[Message], conversation: list[Message]) -> list[Message]:
    """The turns behind the prompt, where a conversation begins with it."""
    return conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else conversation
