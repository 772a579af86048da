"""The columns of the sealed Parquet files, and records back from their rows."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from selfsteer.records import Message, PairRow, PreferencePair, Principles, Query, Response, Responses, ScoredPair


def pair_row(pair: PreferencePair) -> PairRow:
    """The pair in the conversational form that TRL reads, as a row of a sealed Parquet file."""
    return PairRow(
        prompt=list(pair.prompt),
        chosen=[Message(role="assistant", content=pair.chosen)],
        rejected=[Message(role="assistant", content=pair.rejected)],
        query_id=pair.query_id,
        kind=pair.kind,
        chosen_finish=pair.chosen_finish,
        rejected_finish=pair.rejected_finish,
    )


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

_PRINCIPLES = pa.struct(
    [
        ("good", pa.string()),
        ("bad", pa.string()),
        ("quality", pa.string()),
        ("source", pa.string()),
        ("concision", pa.bool_()),
        ("fallback", pa.string()),
    ]
)

_RESPONSE = pa.struct(
    [("text", pa.string()), ("token_ids", pa.list_(pa.int32())), ("finish_reason", pa.string()), ("seed", pa.int64())]
)

PRINCIPLES = pa.schema([("query_id", pa.string()), ("messages", _MESSAGES), ("principles", _PRINCIPLES)])
"""Stage 1: a query and its principles a row."""

RESPONSES = pa.schema([*PRINCIPLES, ("good", _RESPONSE), ("bad", _RESPONSE), ("original", _RESPONSE)])
"""Stage 2: the three responses of a query a row."""

PAIRS = pa.schema(
    [
        ("prompt", _MESSAGES),
        ("chosen", _MESSAGES),
        ("rejected", _MESSAGES),
        ("query_id", pa.string()),
        ("kind", pa.string()),
        ("chosen_finish", pa.string()),
        ("rejected_finish", pa.string()),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
        ("chosen_tokens", pa.int64()),
        ("rejected_tokens", pa.int64()),
        ("principles", _PRINCIPLES),
        ("chosen_seed", pa.int64()),
        ("rejected_seed", pa.int64()),
    ]
)
"""Stages 3 and 5: `records.PairRow` with where it came from; principles and seeds are null for pairs made elsewhere."""


class Seeds(NamedTuple):
    """The seeds that a pair's responses were sampled with; none for pairs made elsewhere."""

    chosen: int | None = None
    rejected: int | None = None


NO_SEEDS = Seeds()


def query(row: dict[str, Any]) -> Query:
    """The query of a stage-1 or stage-2 row."""
    return Query(id=row["query_id"], messages=tuple(Message(**message) for message in row["messages"]))


def principles(row: dict[str, Any]) -> Principles:
    """The principles of a row."""
    return Principles(**row["principles"])


def responses(row: dict[str, Any]) -> Responses:
    """The record of a stage-2 row."""
    good, bad, original = (_response(row[role]) for role in ("good", "bad", "original"))
    assert good is not None
    assert bad is not None
    return Responses(query=query(row), principles=principles(row), good=good, bad=bad, original=original)


def _response(fields: dict[str, Any] | None) -> Response | None:
    if fields is None:
        return None
    return Response(
        text=fields["text"],
        token_ids=tuple(fields["token_ids"]),
        finish_reason=fields["finish_reason"],
        seed=fields["seed"],
    )


def response_columns(item: Response) -> dict[str, Any]:
    """The response as a column of a stage-2 row. Not asdict: that copies the token ids one by one."""
    return {name: getattr(item, name) for name in Response.__dataclass_fields__}


def pair(row: dict[str, Any]) -> PreferencePair:
    """The pair of a stage-3 or stage-5 row."""
    return PreferencePair(
        query_id=row["query_id"],
        kind=row["kind"],
        prompt=tuple(Message(**message) for message in row["prompt"]),
        chosen=row["chosen"][-1]["content"],
        rejected=row["rejected"][-1]["content"],
        chosen_finish=row["chosen_finish"],
        rejected_finish=row["rejected_finish"],
    )


def scored_row(pair: PreferencePair, scored: ScoredPair, principles: Principles | None, seeds: Seeds) -> PairRow:
    """A stage-3 or stage-5 row: the pair, its log-probabilities under the policy, and where it came from."""
    columns = {
        "ref_chosen_logps": scored.chosen.logps,
        "ref_rejected_logps": scored.rejected.logps,
        "chosen_tokens": scored.chosen.tokens,
        "rejected_tokens": scored.rejected.tokens,
        "principles": None if principles is None else asdict(principles),
        "chosen_seed": seeds.chosen,
        "rejected_seed": seeds.rejected,
    }
    return cast(PairRow, {**pair_row(pair), **columns})


_ROWS = 1024
"""Rows of a side file in memory at a time."""


def write_rows(path: Path, rows: Iterator[Mapping[str, Any]], schema: Any) -> int:
    """Write a Parquet file that a stage seals beside its data.parquet; returns the number of rows."""
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while some := [dict(row) for row in islice(rows, _ROWS)]:
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
            count += len(some)
    return count


def file_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of such a file, in order."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS):
            yield from batch.to_pylist()
