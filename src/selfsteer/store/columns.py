"""The columns of the sealed Parquet files, and records back from their rows."""

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfsteer.records import Expected, Message, Pair, Principles, Query, Response, Responses, Side
from selfsteer.store.durable import replacing

_IDS = pa.list_(pa.int32())

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

_PRINCIPLES = pa.struct(
    [
        ("good", pa.string()),
        ("bad", pa.string()),
        ("quality", pa.string()),
        ("source", pa.string()),
        ("concision", pa.bool_()),
        ("fallback", pa.string()),
        ("checks", pa.list_(pa.string())),
        ("wrap", pa.string()),
    ]
)

_RESPONSE = pa.struct(
    [
        ("text", pa.string()),
        ("token_ids", _IDS),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("end_id", pa.int32()),
        ("reencoded", pa.bool_()),
    ]
)

PRINCIPLES = pa.schema([("query_id", pa.string()), ("messages", _MESSAGES), ("principles", _PRINCIPLES)])
"""Stage 1: a query and its principles a row."""

RESPONSES = pa.schema([*PRINCIPLES, ("good", _RESPONSE), ("bad", _RESPONSE), ("original", _RESPONSE)])
"""Stage 2: the three responses of a query a row."""

_PREFIXES = pa.list_(pa.struct([("tokens", pa.int64()), ("logps", pa.float64())]))

HEADROOM = pa.schema([("query_id", pa.string()), *((name, _PREFIXES) for name in ("original", "good", "bad"))])
"""Stage 3: of each response to a query, the summed log-probability up to several positions and as a whole a row."""

_EXPECTED = pa.struct([(name, pa.float64()) for name in Expected._fields])

_CHANGED = pa.struct([("tokens", pa.int64()), ("before", _EXPECTED), ("after", _EXPECTED)])

GAIN = pa.schema([("query_id", pa.string()), ("good", _CHANGED), ("bad", _CHANGED)])
"""Stage 4: what policy (before) and generator (after) expect at the contexts of both responses to a query a row."""

UNRELATED = pa.schema([("query_id", pa.string()), ("messages", _MESSAGES), ("original", _RESPONSE)])
"""Stage 2, beside them: answers to bare queries that train nothing."""

_WHICH = ("before", "after", "prompted")

ANSWERS = pa.schema(
    [
        *PRINCIPLES,
        *((which, _RESPONSE) for which in _WHICH),
        *((f"{which}_why_not", pa.list_(pa.string())) for which in _WHICH),
        *((f"{which}_told", pa.float64()) for which in _WHICH),
    ]
)
"""Stage 7: three answers to a held-out query a row; for each check of its principle why it does not pass, null where it
does; and a token's mean log-probability for the first policy given the good principle (nats)."""

PAIRS = pa.schema(
    [
        ("prompt", _MESSAGES),
        ("chosen", _MESSAGES),
        ("rejected", _MESSAGES),
        ("query_id", pa.string()),
        ("kind", pa.string()),
        ("chosen_finish", pa.string()),
        ("rejected_finish", pa.string()),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
        ("chosen_tokens", pa.int64()),
        ("rejected_tokens", pa.int64()),
        ("principles", _PRINCIPLES),
        ("chosen_seed", pa.int64()),
        ("rejected_seed", pa.int64()),
    ]
)
"""Stages 3 and 5: `records.Pair`; ids, principles and seeds are null for pairs made elsewhere."""

TEXTS = [name for name in PAIRS.names if name != "principles" and not name.endswith(("_ids", "_seed"))]
"""Of these what pairs are measured by: without token ids, which are most of a row."""

VERDICTS = pa.schema(
    [
        ("pairs", pa.string()),
        ("by", pa.string()),
        ("query_id", pa.string()),
        ("preferred", pa.string()),
        ("longer", pa.string()),
        ("chosen_first", pa.float64()),
        ("chosen_second", pa.float64()),
        ("mass", pa.float64()),
        ("margin", pa.float64()),
        ("error", pa.string()),
    ]
)
"""Stage 5, of the judges: a row a judge and pair."""

CHECKS = pa.schema(
    [
        ("pairs", pa.string()),
        ("query_id", pa.string()),
        ("principle", pa.string()),
        ("checks", pa.list_(pa.string())),
        ("chosen_why_not", pa.string()),
        ("rejected_why_not", pa.string()),
        ("original_passes", pa.bool_()),
    ]
)
"""Stage 5, of the checks: why either response of a pair does not pass, null where it does, a row; and of a steering pair,
whether y_o does."""


def query(row: dict[str, Any]) -> Query:
    """The query of a stage-1 or stage-2 row."""
    return Query(id=row["query_id"], messages=_messages(row["messages"]))


def principles(row: Mapping[str, Any]) -> Principles:
    """The principles of a row."""
    fields: dict[str, Any] = {**row["principles"]}
    fields["checks"] = tuple(fields.get("checks") or ())
    return Principles(**fields)


def principles_columns(item: Principles) -> dict[str, Any]:
    """The principles as a column. Not asdict: that copies the values."""
    return {name: getattr(item, name) for name in Principles.__dataclass_fields__}


def responses(row: dict[str, Any]) -> Responses:
    """The record of a stage-2 row."""
    return Responses(
        query=query(row),
        principles=principles(row),
        good=response(row["good"]),
        bad=response(row["bad"]),
        original=None if row["original"] is None else response(row["original"]),
    )


def response(fields: Mapping[str, Any]) -> Response:
    """The response in a column of a stage-2 row, or in a record of the journal with its request's seed."""
    found: dict[str, Any] = {**fields, "token_ids": tuple(fields["token_ids"])}
    return Response(**found)


def response_columns(item: Response) -> dict[str, Any]:
    """The response as a column of a stage-2 row. Not asdict: that copies the token ids one by one."""
    return {name: getattr(item, name) for name in Response.__dataclass_fields__}


def pair_row(pair: Pair) -> dict[str, Any]:
    """A row of a sealed pairs file; its first columns are those that TRL reads. Rows of one query stand together."""
    chosen, rejected = pair.chosen, pair.rejected
    return {
        "prompt": pair.prompt,
        "chosen": chosen.messages,
        "rejected": rejected.messages,
        "query_id": pair.query_id,
        "kind": pair.kind,
        "chosen_finish": chosen.finish,
        "rejected_finish": rejected.finish,
        "chosen_ids": chosen.token_ids,
        "rejected_ids": rejected.token_ids,
        "ref_chosen_logps": chosen.logps,
        "ref_rejected_logps": rejected.logps,
        "chosen_tokens": chosen.tokens,
        "rejected_tokens": rejected.tokens,
        "principles": None if pair.principles is None else principles_columns(pair.principles),
        "chosen_seed": chosen.seed,
        "rejected_seed": rejected.seed,
    }


def pair(row: Mapping[str, Any]) -> Pair:
    """The pair of such a row, or of a row made elsewhere, which lacks the later columns."""
    return Pair(
        query_id=row["query_id"],
        kind=row["kind"],
        prompt=_messages(row["prompt"]),
        chosen=_side(row, "chosen"),
        rejected=_side(row, "rejected"),
        principles=None if row.get("principles") is None else principles(row),
    )


def _side(row: Mapping[str, Any], name: str) -> Side:
    ids = row.get(f"{name}_ids")
    return Side(
        messages=_messages(row[name]),
        finish=row[f"{name}_finish"],
        token_ids=None if ids is None else tuple(ids),
        logps=row.get(f"ref_{name}_logps"),
        tokens=row.get(f"{name}_tokens"),
        seed=row.get(f"{name}_seed"),
    )


def _messages(turns: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in turns)


# --- the one writer and the one reader of Parquet files -------------------------------------------------------------------

# Rows of responses carry thousands of token ids each; as Python objects a group of this size stays below about 50 MB.
_ROWS = 256


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: Any = None) -> int:
    """Write a Parquet file, whole or not at all, a row group in memory at a time; returns the number of rows.

    schema: a `pyarrow.Schema`, missing values become null; inferred from the first 256 rows when absent. Raises ValueError
    for a row with a column that is not in the schema.
    """
    remaining = iter(rows)
    first = [dict(row) for row in islice(remaining, _ROWS)]
    schema = pa.Table.from_pylist(first).schema if schema is None else schema
    columns = set(schema.names)
    count = 0
    with replacing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in chain([first], iter(lambda: [dict(row) for row in islice(remaining, _ROWS)], [])):
            for number, row in enumerate(group, start=count):
                # pyarrow would leave such values out without a word.
                if not columns.issuperset(row):
                    raise ValueError(f"{path}: row {number} has {sorted(set(row) - columns)}, not in the schema.")
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def file_rows(
    path: Path, columns: list[str] | None = None, *, of: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, in order; of all columns, or of these. Raises ValueError naming a file that is damaged.

    of: only the rows of these queries; the others are passed over before anything is made of them.
    """
    if of is not None and not of:
        return
    with opened(path) as file:
        for batch in batches(path, file, columns):
            if of is not None:
                mask = [query_id in of for query_id in batch.column("query_id").to_pylist()]
                batch = batch.filter(pa.array(mask, pa.bool_()))
            yield from batch.to_pylist()


@contextmanager
def opened(path: Path) -> Generator[pq.ParquetFile]:
    """A Parquet file. Raises ValueError naming the file where it is none."""
    with named(path):
        # With pre_buffer the bytes of every row group that was read stay in memory.
        file = pq.ParquetFile(path, pre_buffer=False)
    with file:
        yield file


def count(path: Path) -> int:
    """How many rows such a file has."""
    with opened(path) as file:
        return file.metadata.num_rows


def column(path: Path, name: str) -> list[Any]:
    """One column of such a file; nothing else is read."""
    with opened(path) as file, named(path):
        return file.read(columns=[name]).column(name).to_pylist()


def picked(path: Path, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The rows with these numbers, which ascend, of a file that `write_rows` wrote; row groups without one are not read."""
    with opened(path) as file, named(path):
        for group, some in groupby(numbers, lambda number: number // _ROWS):
            rows = file.read_row_group(group).slice
            yield from (rows(number % _ROWS, 1).to_pylist()[0] for number in some)


def batches(path: Path, file: pq.ParquetFile, columns: list[str] | None = None) -> Iterator[Any]:
    """The rows of an opened file as `pyarrow.RecordBatch`es. Raises ValueError naming the file where one can't be read."""
    with named(path):
        found = file.iter_batches(_ROWS, columns=columns)
    while True:
        with named(path):
            batch = next(found, None)
        if batch is None:
            return
        yield batch


@contextmanager
def named(path: Path) -> Generator[None]:
    """Turns what pyarrow raises for damaged bytes (also an OSError without a number) into a ValueError naming the file."""
    try:
        yield
    except (pa.ArrowException, OSError, RecursionError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: not a readable Parquet file ({reason}); give another, or make it again") from error
