"""Read a preference data set made elsewhere, in any of the forms the field writes, as `PairRow`s.

form              prompt                               chosen, rejected
plain             a string                             strings
conversational    messages                             messages: the completion, or the whole conversation
implicit prompt   none                                 two whole conversations with a common beginning
sharegpt ranking  "conversations": {"from", "value"}   {"from", "value"}

The first three are TRL's, the last is LLaMA-Factory's. Left out on purpose: plain strings without a prompt, in which only a
guess would tell the turns apart.

and write pairs for the programs that train on them.

format        what is written                        read with
trl           data/train-00000-of-00001.parquet      datasets.load_dataset(DIR, split="train"), then TRL's DPOTrainer
llamafactory  selfsteer.json, dataset_info.json      dataset_dir: DIR, dataset: selfsteer
parquet       pairs.parquet, every column            anything
jsonl         pairs.jsonl, every column              anything

Left out on purpose: uploading, and adding to files that exist.
"""

# ruff: noqa: TRY004 (a wrong type within a file is a wrong value to whoever passes the file)
import json
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pyarrow
import pyarrow as pa
import pyarrow.parquet as pq

from selfsteer.recipe.sections import load
from selfsteer.records import Dropped, Message, PairRow
from selfsteer.store.durable import digest, make_folder, open_regular, replacing
from selfsteer.store.folder import Stage

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
            with open_regular(path) as lines:
                for number, line in enumerate(lines, 1):
                    place = f"{path}: line {number}"
                    if line.strip():
                        yield place, _object(_parse(line, place), place)
        case ".json":
            with open_regular(path) as content:
                rows = _parse(content.read(), str(path))
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


log = logging.getLogger(__name__)

ExportFormat = Literal["trl", "llamafactory", "parquet", "jsonl"]

FILES: dict[ExportFormat, tuple[str, ...]] = {
    "trl": ("data/train-00000-of-00001.parquet",),
    "llamafactory": ("selfsteer.json", "dataset_info.json"),
    "parquet": ("pairs.parquet",),
    "jsonl": ("pairs.jsonl",),
}
"""What each format writes, relative to the folder."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

TRL_SCHEMA = pa.schema([(name, _MESSAGES) for name in ("prompt", "chosen", "rejected")])

PAIR_SCHEMA = pa.schema(
    [
        *TRL_SCHEMA,
        *(pa.field(name, pa.string()) for name in ("query_id", "kind", "chosen_finish", "rejected_finish")),
        *(pa.field(name, pa.float64()) for name in ("ref_chosen_logps", "ref_rejected_logps")),
        *(pa.field(name, pa.int64()) for name in ("chosen_tokens", "rejected_tokens")),
    ]
)
"""The columns of `PairRow`."""

_SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


class _Source(NamedTuple):
    rows: Iterator[PairRow]
    schema: pa.Schema


def export(source: Path, to: Path, format: ExportFormat) -> int:
    """Write the pairs that align the policy in a run's last round, or those of a file, into `to`; returns how many.

    Raises ValueError where the run has no finished preference data, FileExistsError where a file would be replaced.
    """
    rows, schema = _from_run(source) if source.is_dir() else _from_file(source)
    return write_pairs(rows, to, format, schema=schema)


def write_pairs(rows: Iterable[PairRow], to: Path, format: ExportFormat, *, schema: Any = PAIR_SCHEMA) -> int:
    """Write pairs into the folder `to`; returns how many. `schema`, a `pyarrow.Schema`, names the columns of "parquet".

    Each file appears whole or not at all. FileExistsError where one is there already.
    """
    paths = [to / name for name in FILES[format]]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} exists. Give another folder, or remove it first.")
    for path in paths:
        make_folder(path.parent)
    match format:
        case "trl":
            count = _write_parquet(rows, paths[0], TRL_SCHEMA)
        case "parquet":
            count = _write_parquet(rows, paths[0], schema)
        case "jsonl":
            count = _write_lines((_json_text(row) for row in rows), paths[0])
        case "llamafactory":
            count = _write_list((_json_text(_sharegpt_row(row)) for row in rows), paths[0])
            columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
            entry = {"file_name": paths[0].name, "ranking": True, "formatting": "sharegpt", "columns": columns}
            with replacing(paths[1]) as file:
                file.write(json.dumps({"selfsteer": entry}, indent=2).encode() + b"\n")
    log.info("wrote %s pairs to %s", f"{count:,}", paths[0])
    return count


def _from_run(run: Path) -> _Source:
    recipe = run / "recipe.yaml"
    selected = recipe.is_file() and load(recipe).selection.active
    names = ("5-selection", "5-preferences") if selected else ("5-preferences",)
    rounds = sorted(run.glob("round-*"), key=lambda folder: int(folder.name.removeprefix("round-")), reverse=True)
    for folder in rounds:
        for name in names:
            stage = Stage(folder / name)
            if stage.manifest() is not None:
                rows = cast("Iterator[PairRow]", stage.rows())
                return _Source(rows, pq.read_schema(stage.path / "data.parquet"))
    raise ValueError(
        f"{run} has no finished preference data (no sealed round-*/5-preferences). Let `selfsteer run` get there."
    )


def _from_file(path: Path) -> _Source:
    return _Source((row for row in read_pairs(path) if not isinstance(row, Dropped)), PAIR_SCHEMA)


def _write_parquet(rows: Iterable[PairRow], path: Path, schema: Any) -> int:
    """The columns of `schema`; missing values are null, other columns are left out."""
    count = 0
    remaining = iter(rows)
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        while batch := list(islice(remaining, _BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(cast("list[dict[str, Any]]", batch), schema=schema))
            count += len(batch)
    return count


def _write_lines(texts: Iterable[str], path: Path) -> int:
    count = 0
    with replacing(path) as file:
        for text in texts:
            file.write(text.encode() + b"\n")
            count += 1
    return count


def _write_list(texts: Iterable[str], path: Path) -> int:
    """One JSON list, one element a line, without holding it."""
    count = 0
    with replacing(path) as file:
        for text in texts:
            file.write((b"[\n" if count == 0 else b",\n") + text.encode())
            count += 1
        file.write(b"[]\n" if count == 0 else b"\n]\n")
    return count


def _json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _sharegpt_row(row: PairRow) -> dict[str, object]:
    """As LLaMA-Factory's dpo_en_demo."""
    return {
        "conversations": [_turn(message) for message in row["prompt"]],
        "chosen": _turn(row["chosen"][-1]),
        "rejected": _turn(row["rejected"][-1]),
    }


def _turn(message: Message) -> dict[str, str]:
    return {"from": _SHAREGPT_NAMES.get(message["role"], message["role"]), "value": message["content"]}
