"""Preference data made elsewhere, in any of the forms the field writes; and pairs for the programs that train on them.

form              prompt                               chosen, rejected
plain             a string                             strings
conversational    messages                             messages: the completion, or the whole conversation
implicit prompt   none                                 two whole conversations with a common beginning
sharegpt ranking  "conversations": {"from", "value"}   {"from", "value"}

The first three are TRL's, the last is LLaMA-Factory's. A prompt beside whole conversations may be a part of their common
beginning: its first or last turn, or all of it. A column `system` is the system message in every form. Left out on purpose:
plain strings without a prompt, in which only a guess would tell the turns apart.

format        what is written, beside README.md     read with
trl           data/train-00000-of-00001.parquet      datasets.load_dataset(DIR, split="train"), then TRL's DPOTrainer
llamafactory  selfsteer.json, dataset_info.json      dataset_dir: DIR, dataset: selfsteer
parquet       pairs.parquet, all columns of a run    anything
jsonl         pairs.jsonl, all columns of a run      anything

Left out on purpose: uploading, and adding to files that exist.
"""

import json
import logging
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from selfsteer.data.files import (
    HUB,
    OTHER_COLUMNS,
    SUFFIXES,
    SURROGATE,
    SYSTEM_COLUMNS,
    Row,
    check_source,
    is_blank,
    keys_in_words,
    read_chat,
    say_once,
    source_rows,
    type_in_words,
    with_system,
)
from selfsteer.recipe.sections import load
from selfsteer.records import Dropped, Message, PairRow
from selfsteer.runtime import counted
from selfsteer.store.columns import PAIRS, write_rows
from selfsteer.store.durable import digest, make_folder, read_json, replacing, write
from selfsteer.store.folder import DATA, POLICY, PREFERENCES, SELECTION, Stage

log = logging.getLogger(__name__)

_FORMS = "Give 'prompt', 'chosen' and 'rejected' as strings or as lists of {role, content} messages."

_SIDES = ("chosen", "rejected")

_FINISHES, _IDS, _LOGPS, _TOKENS = (
    tuple(pattern.format(side) for side in _SIDES) for pattern in ("{}_finish", "{}_ids", "ref_{}_logps", "{}_tokens")
)

_COLUMNS = (
    *("prompt", "conversations", *_SIDES, "query_id", "kind", *_FINISHES, *_IDS, *_LOGPS, *_TOKENS),
    *(*SYSTEM_COLUMNS, *OTHER_COLUMNS),
)


def read_pairs(source: Path) -> Iterator[PairRow | Dropped]:
    """Yield the pairs of a file or a hub data set, and a `Dropped` for each row that can be none, in order.

    Columns of `PairRow` that the file has already are kept. ValueError, naming file, row and key, where a row is malformed.
    """
    check_source(source, "a preference dataset")
    for row in source_rows(source, _COLUMNS):
        turns = _turns(row)
        pair = turns if isinstance(turns, str) else _pair(row, turns)
        reason = pair if isinstance(pair, str) else drop_reason(pair)
        if isinstance(pair, str) or reason is not None:
            yield Dropped(id=_text(row, "query_id") or row.place, reason=reason or str(pair), detail=row.place)
        else:
            pair["query_id"] = pair["query_id"] or digest(pair["prompt"])[:16]  # as `Query.id`
            yield pair


def drop_reason(pair: PairRow) -> str | None:
    """Why there is nothing to learn from this pair, or None."""
    chosen, rejected = (pair[side][-1]["content"].strip() for side in _SIDES)
    texts = [message["content"] for key in ("prompt", *_SIDES) for message in pair[key]]
    if any(SURROGATE.search(text) for text in (*texts, pair["query_id"])):
        return "lone surrogate"
    if is_blank(pair["prompt"][-1]["content"]):
        return "empty prompt"
    if is_blank(chosen):
        return "empty chosen"
    if is_blank(rejected):
        return "empty rejected"
    return "chosen equal to rejected" if chosen == rejected else None


class _Turns(NamedTuple):
    """A pair as messages."""

    prompt: list[Message]
    chosen: Message
    rejected: Message


def _turns(row: Row) -> _Turns | str:
    """The conversation and its two last turns, or why the row must be dropped."""
    for key in _SIDES:
        if key not in row.fields:
            raise ValueError(
                f"{row.place} has no {key!r}; found {keys_in_words(row.columns)}. Rename the column to {key!r}."
            )
        if row.fields[key] is None:
            return f"empty {key}"
    given = "conversations" if row.fields.get("conversations") is not None else "prompt"
    if given == "conversations" and row.fields.get("prompt"):
        say_once(f"{row.place.rpartition(': ')[0]}: the column 'prompt' is not used: 'conversations' is what was asked")
    if row.fields.get(given) is None and isinstance(row.fields["chosen"], str):
        if "prompt" in row.columns:
            return "empty prompt"
        raise ValueError(f"{row.place} has no 'prompt'; found {keys_in_words(row.columns)}. {_FORMS}")
    read = {
        key: read_chat(row.fields[key], role, f"{row.place}, {key!r}")
        for key, role in ((given, "user"), *((side, "assistant") for side in _SIDES))
        if row.fields.get(key) is not None
    }
    if refused := next((chat for chat in read.values() if isinstance(chat, str)), None):
        return refused
    chats = cast("dict[str, list[Message]]", read)
    chosen, rejected = (chats[side] for side in _SIDES)
    prompt = _prompt(chats.get(given), chosen, rejected)
    if isinstance(prompt, str):
        return prompt
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{row.place}, {given!r} must end in a user turn. {_FORMS}")
    last = [_behind(prompt, chats[side], f"{row.place}, {side!r}") for side in _SIDES]
    whole = with_system(prompt, row)
    return whole if isinstance(whole, str) else _Turns(whole, *last)


def _prompt(given: list[Message] | None, chosen: list[Message], rejected: list[Message]) -> list[Message] | str:
    """What both responses answer: what is given, or the common beginning of two whole conversations that it is a part of."""
    if len(chosen) == 1 and len(rejected) == 1 and given is not None:
        return given
    common = _common_beginning(chosen, rejected)
    if given is None:
        return common or "no common beginning"
    if any(side[: len(given)] == given and len(side) == len(given) + 1 for side in (chosen, rejected)):
        return given
    if min(len(chosen), len(rejected)) > 1 and _is_part(given, chosen) and _is_part(given, rejected):
        return common if chosen[:-1] == rejected[:-1] else "the conversations part before their last turn"
    return given


def _is_part(given: list[Message], conversation: list[Message]) -> bool:
    """Whether these turns stand in a row in the conversation before its last turn."""
    return any(conversation[at : at + len(given)] == given for at in range(len(conversation) - len(given)))


def _common_beginning(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The turns that both begin with, but never the last turn of either."""
    common: list[Message] = []
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        common.append(one)
    return common


def _behind(prompt: list[Message], conversation: list[Message], place: str) -> Message:
    """The one assistant turn behind the prompt, where the conversation begins with it."""
    turns = conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else conversation
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise ValueError(
            f"{place} must be one assistant turn after the prompt; found {[turn['role'] for turn in turns]}. "
            "Move the earlier turns into 'prompt'."
        )
    return turns[0]


def _pair(row: Row, turns: _Turns) -> PairRow:
    """The record of a row; what a file says of itself is checked here, once."""
    finishes = {key: _text(row, key) or "stop" for key in _FINISHES}
    for key, finish in finishes.items():
        if finish not in ("stop", "length"):
            raise ValueError(f"{row.place}, {key!r} is {finish!r}; expected stop or length. Rename the values or the column")
    kind = row.fields.get("kind")
    pair = PairRow(
        prompt=turns.prompt,
        chosen=[turns.chosen],
        rejected=[turns.rejected],
        query_id=_text(row, "query_id"),
        kind=kind if kind in ("l_plus", "l_minus", "alignment") else "given",  # a column of this name may mean anything
        chosen_finish=finishes["chosen_finish"],
        rejected_finish=finishes["rejected_finish"],
    )
    for key in _IDS:
        if (ids := row.fields.get(key)) and _are_ids(ids):
            pair[key] = cast("list[int]", ids)
    for key in _LOGPS:
        if (number := _number(row, key)) is not None:
            pair[key] = number
    for key in _TOKENS:
        if (number := _number(row, key)) is not None:
            if not (number.is_integer() and 0 < number < 2**31):
                raise ValueError(
                    f"{row.place}, {key!r} is {number:g}; expected a number of tokens. Rename or remove the column"
                )
            pair[key] = int(number)
    return pair


def _are_ids(value: object) -> bool:
    """Whether these may be token ids; a column of this name may mean anything."""
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**31 for each in cast("list[object]", value))


def _text(row: Row, key: str) -> str:
    """A column of names: text, or a number as text; "" where there is none."""
    value = row.fields.get(key)
    if isinstance(value, float) and value.is_integer():  # whole numbers of a column that has nulls, too, in pandas
        value = int(value)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{row.place}, {key!r} is {type_in_words(value)}; expected text. Rename or remove the column")


def _number(row: Row, key: str) -> float | None:
    value = row.fields.get(key)
    try:
        # In a CSV file all is text.
        number = None if value is None or value == "" or isinstance(value, bool) else float(cast("float | str", value))
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if isinstance(value, bool) or (number is not None and math.isinf(number)):
        raise ValueError(f"{row.place}, {key!r} is no finite number ({str(value)[:40]}); rename or remove the column")
    return None if number is None or math.isnan(number) else number


# --- where pairs are -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A preference dataset that can be read."""

    source: Path
    """A file, or hub:NAME."""
    stage: Stage | None = None
    """Of a run: the sealed stage whose data it is."""
    warning: str | None = None
    """What whoever uses these pairs must know."""


def find_pairs(source: Path, round: int | None = None) -> Found:
    """The pairs of a run folder that its policy was aligned on last (or those of one round), of an export, or of a file.

    Raises ValueError where there are none. A round that was stopped by a gate or by `stop_when` is passed over: its pairs
    have aligned nothing; a round that has not got to its alignment yet is taken, with a warning.
    """
    if str(source).startswith(HUB) or not source.is_dir():
        if source.suffix.lower() not in SUFFIXES and not str(source).startswith(HUB) and not source.exists():
            raise ValueError(f"{source}: no such run folder and no such file; name a run as its recipe's output does")
        check_source(source, "a preference dataset")
        if round is not None:
            raise ValueError(f"{source}: only a run folder has rounds; leave --round out")
        return Found(source)
    numbers = {int(match[1]) for path in source.iterdir() if (match := _ROUND.fullmatch(path.name)) and path.is_dir()}
    if not numbers and not (source / "run.json").is_file():
        exported = [file for names in FILES.values() if (file := source / names[0]).is_file()]
        if len(exported) == 1:
            return find_pairs(exported[0], round)
        raise ValueError(f"{source}: no run here (no run.json); name the folder that the recipe's output gave, or a file")
    ended = _ended(source)
    skipped: list[str] = []
    for number in sorted(numbers, reverse=True) if round is None else [round]:
        stage = _finished(source, number)
        if stage is None:
            continue
        if Stage(source / f"round-{number}" / POLICY).manifest() is not None:
            return Found(stage.path / DATA, stage, "; ".join(skipped) or None)
        if ended is None or ended[0] != number:
            said = f"{source}: round {number} has not aligned the policy on these pairs (yet)"
            return Found(stage.path / DATA, stage, "; ".join([*skipped, said]))
        said = f"{source}: round {number} ended without alignment, because {ended[1]}"
        if round is not None:
            return Found(stage.path / DATA, stage, said)
        skipped.append(f"{said}; its pairs are left out (--round {number} takes them)")
    if skipped:
        raise ValueError(f"{'; '.join(skipped)}. No earlier round has aligned the policy.")
    which = "round-*" if round is None else f"round-{round}"
    raise ValueError(
        f"{source} has no finished preference data (no sealed {which}/{PREFERENCES}). Let `selfsteer run` get there."
    )


_ROUND = re.compile(r"round-([1-9][0-9]{0,5})")


def _finished(run: Path, number: int) -> Stage | None:
    """The sealed stage that holds what a round would align its policy on."""
    recipe = run / "recipe.yaml"
    selects = load(recipe).selection.active if recipe.exists() else (run / f"round-{number}" / SELECTION).is_dir()
    names = (SELECTION, PREFERENCES) if selects else (PREFERENCES,)
    stages = (Stage(run / f"round-{number}" / name) for name in names)
    return next((stage for stage in stages if stage.manifest() is not None), None)


def _ended(run: Path) -> tuple[int, str] | None:
    """The round that ended the run without aligning the policy, and why, as its metrics say."""
    path = run / "metrics.json"
    if not path.exists():
        return None
    metrics = read_json(path, {"run": dict, "rounds": list}, way_out="delete it; `selfsteer run` writes it again")
    reason = metrics["run"].get("ended")
    return None if reason is None else (len(metrics["rounds"]), str(reason))


# --- export ----------------------------------------------------------------------------------------------------------------

ExportFormat = Literal["trl", "llamafactory", "parquet", "jsonl"]

FILES: dict[ExportFormat, tuple[str, ...]] = {
    "trl": ("data/train-00000-of-00001.parquet",),
    "llamafactory": ("selfsteer.json", "dataset_info.json"),
    "parquet": ("pairs.parquet",),
    "jsonl": ("pairs.jsonl",),
}
"""What each format writes, relative to the folder."""

TRL_SCHEMA = pa.schema([PAIRS.field(name) for name in ("prompt", "chosen", "rejected")])

PAIR_SCHEMA = pa.schema([PAIRS.field(name) for name in PairRow.__annotations__])
"""The columns of `PairRow`."""

_SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


_FLAGS = tuple(f"{side}_truncated" for side in _SIDES)
"""Columns that say which responses were cut off; written where such pairs are kept."""

CUT_OFF = "cut off by the length limit"

SPARED = "held out"


class Exported(NamedTuple):
    """What an export did."""

    written: int
    dropped: Mapping[str, int]
    """Rows left out, by reason."""
    warning: str | None
    """What whoever uses these pairs must know."""
    command: str
    """How to train on them."""


def export(
    source: Path,
    to: Path,
    format: ExportFormat,
    *,
    keep_truncated: bool = False,
    round: int | None = None,
    held_out: Callable[[Stage], Collection[str]] = lambda _: (),
) -> Exported:
    """Write the pairs that a run's policy was aligned on last, or those of a file, into `to`, with a dataset card.

    held_out: of a run's pairs the queries that are left out, as nothing was trained on them. keep_truncated: also pairs of
    which a response was cut off, in columns that say so; a trainer that is not told would teach the model to stop in the
    middle. Raises ValueError for another format and where no pair is left, FileExistsError where a file would be replaced.
    """
    if format not in FILES:
        raise ValueError(f"format: {format!r} is none of {', '.join(FILES)}")
    found = find_pairs(source, round)
    dropped: Counter[str] = Counter()
    spared = () if found.stage is None else held_out(found.stage)

    def rows() -> Iterator[PairRow]:
        given = read_pairs(found.source) if found.stage is None else cast("Iterator[PairRow]", found.stage.rows())
        for row in given:
            if isinstance(row, Dropped):
                dropped[row.reason] += 1
            elif row["query_id"] in spared:
                dropped[SPARED] += 1
            elif not keep_truncated and "length" in (row["chosen_finish"], row["rejected_finish"]):
                dropped[CUT_OFF] += 1
            else:
                yield row

    if next(rows(), None) is None:
        why = f" of {dropped.total():,}: {counted(dropped)}" if dropped else ""
        keep = [
            option for reason, option in ((CUT_OFF, "--keep-truncated"), (SPARED, "--keep-held-out")) if reason in dropped
        ]
        hint = f" ({' and '.join(keep)} exports those)" if keep else ""
        raise ValueError(f"{source}: no pair is left{why}{hint}")
    dropped.clear()
    schema = PAIR_SCHEMA if found.stage is None else pq.read_schema(found.source)
    written = write_pairs(rows(), to, format, schema=schema, flags=keep_truncated)
    result = Exported(written, dict(dropped.most_common()), found.warning, _command(format, to))
    write(to / CARD, _card(found, result, format, keep_truncated).encode())
    return result


def write_pairs(
    rows: Iterable[PairRow], to: Path, format: ExportFormat, *, schema: Any = PAIR_SCHEMA, flags: bool = False
) -> int:
    """Write pairs into the folder `to`; returns how many. `schema`, a `pyarrow.Schema`, names the columns of "parquet".

    flags: add columns that say which responses were cut off. Each file appears whole or not at all. FileExistsError where
    one is there already.
    """
    if to.exists() and not to.is_dir():
        raise FileExistsError(f"{to} is no folder. Give another.")
    paths = [to / name for name in FILES[format]]
    for path in (*paths, to / CARD):
        if path.exists():
            raise FileExistsError(f"{path} exists. Give another folder, or remove it first.")
    for path in paths:
        make_folder(path.parent)
    flagged = (_flagged(row, flags) for row in rows)
    match format:
        case "trl" | "parquet":
            columns = TRL_SCHEMA if format == "trl" else schema
            for name in _FLAGS if flags else ():
                columns = columns.append(pa.field(name, pa.bool_()))
            names = set(columns.names)
            count = write_rows(paths[0], ({key: row[key] for key in names & row.keys()} for row in flagged), columns)
        case "jsonl":
            count = _write_texts(map(_json_text, flagged), paths[0], ("", "\n", "\n"))
        case "llamafactory":
            count = _write_texts(map(_json_text, map(_sharegpt_row, flagged)), paths[0], ("[\n", ",\n", "\n]\n"))
            columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
            entry = {"file_name": paths[0].name, "ranking": True, "formatting": "sharegpt", "columns": columns}
            write(paths[1], json.dumps({"selfsteer": entry}, indent=2).encode() + b"\n")
    log.info("wrote %s pairs to %s", f"{count:,}", paths[0])
    return count


def _flagged(row: PairRow, flags: bool) -> dict[str, Any]:
    said = {flag: row[finish] == "length" for flag, finish in zip(_FLAGS, _FINISHES, strict=True)} if flags else {}
    return {**row, **said}


CARD = "README.md"


def _command(format: ExportFormat, to: Path) -> str:
    """How to train on what was written, or to load it."""
    folder = shlex.quote(str(to))
    match format:
        case "trl":
            return f"trl dpo --model_name_or_path MODEL --dataset_name {folder} --output_dir OUTPUT"
        case "llamafactory":
            return (
                "llamafactory-cli train --stage dpo --do_train true --model_name_or_path MODEL --template TEMPLATE"
                f" --dataset_dir {folder} --dataset selfsteer --output_dir OUTPUT"
            )
        case "parquet" | "jsonl":
            loader = "parquet" if format == "parquet" else "json"
            return f'datasets.load_dataset("{loader}", data_files={str(to / FILES[format][0])!r}, split="train")'


def _card(found: Found, result: Exported, format: ExportFormat, keep_truncated: bool) -> str:
    """The dataset card: where the pairs are from, how many were left out why, what the columns are, how to train on them."""
    files = FILES[format]
    origin = f"`{found.source.name}`, a preference dataset made elsewhere"
    if found.stage is not None:
        run, stage = found.stage.path.parents[1].absolute().name, found.stage.path.name
        origin = f"the run `{run}`, {found.stage.path.parent.name.replace('-', ' ')}, stage `{stage}`"
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        f"  data_files: {files[0]}",
        "tags:",
        "- preference",
        "- dpo",
        "- selfsteer",
        "---",
        "# Preference pairs",
        "",
        f"{result.written:,} pairs of {origin}, exported by selfsteer {version('selfsteer')} as `{format}`.",
    ]
    if found.stage is not None:
        lines += [
            "",
            "Made by Self-Steering Optimization (arXiv 2410.17131): both responses of a pair were sampled from a model, the",
            "chosen one under a principle that leads to a good response, the rejected one under its opposite. No person has",
            "labelled them.",
        ]
    if result.warning is not None:
        lines += ["", f"**{result.warning}.**"]
    lines += ["", f"Left out: {counted(result.dropped)}." if result.dropped else "Nothing was left out."]
    if found.stage is not None and (manifest := found.stage.manifest()) is not None and manifest.dropped:
        lines += ["", f"Dropped while they were made: {counted(manifest.dropped)}."]
    if keep_truncated:
        lines += ["", f"`{_FLAGS[0]}` and `{_FLAGS[1]}` say which responses were cut off by the length limit."]
    lines += ["", "Read or train on them, from within this folder, with", "", "    " + _command(format, Path()), ""]
    return "\n".join(lines)


def _write_texts(texts: Iterable[str], path: Path, around: tuple[str, str, str]) -> int:
    """The texts without holding them; around: what stands before the first, between two, and behind the last."""
    before, between, behind = around
    count = 0
    with replacing(path) as file:
        for text in texts:
            file.write((between if count else before).encode() + text.encode())
            count += 1
        file.write((behind if count else (before + behind).replace("\n", "")).encode())
    return count


def _json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _sharegpt_row(row: Mapping[str, Any]) -> dict[str, object]:
    """As LLaMA-Factory's dpo_en_demo."""
    return {
        "conversations": [_turn(message) for message in row["prompt"]],
        "chosen": _turn(row["chosen"][-1]),
        "rejected": _turn(row["rejected"][-1]),
        **{flag: row[flag] for flag in _FLAGS if flag in row},
    }


def _turn(message: Message) -> dict[str, str]:
    return {"from": _SHAREGPT_NAMES.get(message["role"], message["role"]), "value": message["content"]}
