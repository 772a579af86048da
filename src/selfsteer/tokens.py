"""The pairs of a training as token ids: tokenised once, kept on disk, read by query from a memory map."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset, Sampler

from selfsteer import processes
from selfsteer.packing import TokenPair
from selfsteer.prompts import Prompts
from selfsteer.records import PairRow, PreferencePair
from selfsteer.scoring import tokenize

_REQUIRED = ("prompt", "chosen", "rejected", "query_id", "kind", "chosen_finish", "rejected_finish")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps", "chosen_tokens", "rejected_tokens")
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [("prompt", _IDS), ("chosen", _IDS), ("rejected", _IDS), ("ref_chosen", pa.float64()), ("ref_rejected", pa.float64())]
)


class Group(NamedTuple):
    """The pairs of one query, with their reference log-probabilities."""

    pairs: tuple[TokenPair, ...]
    ref_chosen: tuple[float, ...]
    ref_rejected: tuple[float, ...]
    counts: bool = True
    """False for what only keeps a process busy while others have one query more: computed, but no part of the loss."""


class TokenGroups(Dataset[Group]):
    """All groups of a training, in the order of the pairs file; memory does not grow with their number.

    The one behind the last is the first again, not counting.
    """

    def __init__(self, file: Path) -> None:
        self.epoch = 0
        self._source = pa.memory_map(str(file))
        self._reader = pa.ipc.open_file(self._source)

    def __len__(self) -> int:
        return self._reader.num_record_batches

    def set_epoch(self, epoch: int) -> None:
        """Accelerate calls this before every epoch. (It would not reach `Order` where several processes go on mid-epoch.)"""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Group:
        counts = index < len(self)
        rows = self._reader.get_batch(index if counts else 0).to_pylist()
        return Group(
            pairs=tuple(TokenPair(tuple(row["prompt"]), tuple(row["chosen"]), tuple(row["rejected"])) for row in rows),
            ref_chosen=tuple(row["ref_chosen"] for row in rows),
            ref_rejected=tuple(row["ref_rejected"] for row in rows),
            counts=counts,
        )


class Order(Sampler[int]):
    """Every query once an epoch, shuffled anew from seed and epoch, the same in every process.

    Filled up with the group that does not count, to a multiple of what all processes take at a time. (accelerate would fill
    up with queries of the epoch's beginning, which would then count twice.)
    """

    def __init__(self, data: TokenGroups, *, multiple: int, seed: int) -> None:
        self._data = data
        self._filled = -(-len(data) // multiple) * multiple
        self._seed = seed

    def __len__(self) -> int:
        return self._filled

    def __iter__(self) -> Iterator[int]:
        queries = len(self._data)
        generator = torch.Generator().manual_seed(self._seed + self._data.epoch)
        yield from torch.randperm(queries, generator=generator).tolist()
        yield from [queries] * (self._filled - queries)


def token_groups(path: Path, prompts: Prompts, scratch: Path, *, needs_reference: bool) -> TokenGroups:
    """Tokenise a pairs file (Parquet with the columns of `PairRow`, rows of one query together).

    scratch: where the first process makes the file of token ids, for all; it is gone once they have it open.
    Raises ValueError for missing columns, for missing reference log-probabilities where they are needed, and for reference
    log-probabilities that belong to another tokenization.
    """
    file = processes.agree(lambda: _write(path, prompts, scratch, needs_reference=needs_reference))
    groups = TokenGroups(file)
    processes.wait()
    if processes.is_first():
        file.unlink()  # the maps keep it; nothing is left behind when the processes are killed
    if not len(groups):
        raise ValueError(f"{path}: no pairs to train on")
    return groups


def _write(path: Path, prompts: Prompts, scratch: Path, *, needs_reference: bool) -> Path:
    with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for rows in _query_rows(path):
            tokens = [_token_row(row, prompts, path, needs_reference=needs_reference) for row in rows]
            writer.write_batch(pa.RecordBatch.from_pylist(tokens, schema=_SCHEMA))
    return scratch


def _query_rows(path: Path) -> Iterator[Sequence[PairRow]]:
    file = pq.ParquetFile(path)
    found = file.schema_arrow.names
    missing = [name for name in _REQUIRED if name not in found]
    if missing:
        raise ValueError(f"{path}: the columns {missing} are missing; found {found}. Expected the columns of a pairs file.")
    columns = [*_REQUIRED, *(name for name in _REFERENCE if name in found)]
    rows = (
        row for batch in file.iter_batches(batch_size=256, columns=columns) for row in cast(list[PairRow], batch.to_pylist())
    )
    for _, group in groupby(rows, key=lambda row: row["query_id"]):
        yield list(group)


def _token_row(row: PairRow, prompts: Prompts, path: Path, *, needs_reference: bool) -> dict[str, Any]:
    pair = PreferencePair(
        query_id=row["query_id"],
        kind=cast(Any, row["kind"]),
        prompt=tuple(row["prompt"]),
        chosen=row["chosen"][-1]["content"],
        rejected=row["rejected"][-1]["content"],
        chosen_finish=cast(Any, row["chosen_finish"]),
        rejected_finish=cast(Any, row["rejected_finish"]),
    )
    tokens = tokenize(pair, prompts)
    references = (row.get("ref_chosen_logps"), row.get("ref_rejected_logps"))
    if needs_reference and None in references:
        raise ValueError(
            f"{path}: query {pair.query_id} has no reference log-probabilities (ref_chosen_logps, ref_rejected_logps). "
            "Score the pairs first, or take a loss without a reference (simpo, orpo)."
        )
    recorded = (row.get("chosen_tokens"), row.get("rejected_tokens"))
    if None not in recorded and recorded != (len(tokens.chosen), len(tokens.rejected)):
        raise ValueError(
            f"{path}: query {pair.query_id} was scored with {recorded} completion tokens, this tokenizer gives "
            f"{(len(tokens.chosen), len(tokens.rejected))}. Score the pairs again with the policy to be trained."
        )
    return {
        "prompt": tokens.prompt,
        "chosen": tokens.chosen,
        "rejected": tokens.rejected,
        "ref_chosen": references[0] or 0.0,
        "ref_rejected": references[1] or 0.0,
    }
