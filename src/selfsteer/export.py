"""Write preference pairs for the programs that train on them.

format        what is written                        read with
trl           data/train-00000-of-00001.parquet      datasets.load_dataset(DIR, split="train"), then TRL's DPOTrainer
llamafactory  selfsteer.json, dataset_info.json      dataset_dir: DIR, dataset: selfsteer
parquet       pairs.parquet, every column            anything
jsonl         pairs.jsonl, every column              anything

Left out on purpose: uploading, and adding to files that exist.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from selfsteer.durable import make_folder, replacing
from selfsteer.preferences import read_pairs
from selfsteer.recipe import load
from selfsteer.records import Dropped, Message, PairRow
from selfsteer.store import Stage

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

_SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
_BATCH_ROWS = 1024


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
            count = _write_lines((_json(row) for row in rows), paths[0])
        case "llamafactory":
            count = _write_list((_json(_sharegpt(row)) for row in rows), paths[0])
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


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _sharegpt(row: PairRow) -> dict[str, object]:
    """As LLaMA-Factory's dpo_en_demo."""
    return {
        "conversations": [_turn(message) for message in row["prompt"]],
        "chosen": _turn(row["chosen"][-1]),
        "rejected": _turn(row["rejected"][-1]),
    }


def _turn(message: Message) -> dict[str, str]:
    return {"from": _SHAREGPT_ROLES.get(message["role"], message["role"]), "value": message["content"]}
