"""Reward models: trained on preference pairs from anywhere, and measured on labelled ones.

    output/dropped.jsonl   rows that can't be trained on, with their reasons
    output/result.json     settings, counts, and the accuracy on held-out pairs
    output/parts/          rewards of held-out and benchmark responses, under content keys

Held-out are all pairs of a query or none: the same queries in every data set and at every seed. The model is trained and
scored on the same token ids. Left out on purpose: the training itself (`training/reward.py`).
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from selfsteer.data.exchange import find_pairs, read_pairs
from selfsteer.data.files import check_source, source_digest, source_rows
from selfsteer.evaluations.reward_bench import Benchmark, read_benchmark, report
from selfsteer.judges.reward import (
    Renderer,
    RewardModel,
    conversations,
    open_renderer,
    reward_of,
    reward_verdicts,
    score_missing,
)
from selfsteer.measures.estimates import METHOD
from selfsteer.measures.metrics import find, plain
from selfsteer.measures.verdicts import judge_report
from selfsteer.models import checkpoint, positions_of, resolve
from selfsteer.recipe.engines import DTypeName
from selfsteer.recipe.sections import Policy
from selfsteer.records import Checkpoint, Dropped, Message, PairRow
from selfsteer.store.columns import pair
from selfsteer.store.durable import canonical_json, digest, read_json, replacing, write
from selfsteer.store.folder import RunFolder, day_of
from selfsteer.store.journal import Journal
from selfsteer.training import checkpoints
from selfsteer.training.reward import RewardJob, RewardTraining, check_trl, train_reward

SCHEMA = 1
"""Version of what is trained on; part of the identity of every training."""

MARGINS = (("margin",), ("score_chosen", "score_rejected"), ("metadata.score_chosen", "metadata.score_rejected"))
"""Where a row may say by how much its chosen response is better: as a number, or as two scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One data set, and how much it counts."""

    path: Path
    weight: float = 1.0
    """Rows of an epoch, as a multiple of the data set: 0.5 takes a fixed half of its queries, 2 takes everything twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """How reward models are made, beside the training's own settings."""

    holdout: float = 0.1
    """Share of the queries that are held out."""
    max_tokens: int = 2048
    """Longer conversations are dropped; nothing is ever cut."""
    chat_template: str | None = None
    dtype: DTypeName = "auto"


class _Files(NamedTuple):
    tokens: Path
    counts: dict[str, dict[str, Any]]


def train_reward_model(
    sources: Sequence[Source], model: str, output: Path, settings: RewardSettings, training: RewardTraining
) -> dict[str, Any]:
    """Train a reward model, or continue where an earlier call stopped; returns what result.json holds.

    Raises ValueError, before anything is trained, for a file, a model or a setting that will not do, and where the output
    holds a reward model of other settings.
    """
    check_trl()
    if training.epochs <= 0:
        raise ValueError(f"--epochs: {training.epochs:g} passes train nothing; take more than 0")
    sources = [replace(source, path=find_pairs(source.path).source) for source in sources]
    named = dict(zip(_names([source.path for source in sources]), sources, strict=True))
    day, base = day_of(output), resolve(Policy(model=model))
    renderer = open_renderer(_scorer(base, settings, day))
    identity = digest(
        {
            "schema": SCHEMA,
            "model": base.digest,
            "template": renderer.prompts.digest,
            "sources": [[source_digest(source.path), source.weight] for source in sources],
            "settings": asdict(settings) | {"chat_template": None},
            "training": training.digest(),
        }
    )
    taken = f"{output} holds a reward model of other data or settings; choose another --output, or remove that one"
    with RunFolder(output) as folder:
        file = folder.path / "result.json"
        if os.path.lexists(file):
            known = read_json(file, {"identity": str}, way_out="delete it, and the same command trains again")
            if known["identity"] == identity:
                checkpoints.remove(folder.path)  # which a kill behind the result leaves
                return known
            raise ValueError(taken)
        if checkpoints.holds_another(folder.path, identity):
            raise ValueError(taken)
        folder.begin(day)
        tokens, counts = _tokenized(named, renderer, folder.path, settings, margin=training.margin)
        if not sum(count["trained on"] for count in counts.values()):
            raise ValueError(f"no pair is left to train on: {counts}")
        trained = train_reward(RewardJob(base.path, tokens, folder.path, identity), renderer.tokenizer, training)
        tokens.unlink()
        reward = _scorer(checkpoint(trained), replace(settings, chat_template=None), day)
        result = {
            "identity": identity,
            "model": str(trained),
            "base": model,
            "data": counts,
            "settings": asdict(settings) | asdict(training),
            "held_out": _held_out(named, reward, folder.path, settings.holdout),
            "method": METHOD,
        }
        write(file, canonical_json(plain(result)))
        checkpoints.remove(folder.path)
        return json.loads(file.read_bytes())


# --- pairs -----------------------------------------------------------------------------------------------------------------


def _tokenized(
    sources: Mapping[str, Source], renderer: Renderer, folder: Path, settings: RewardSettings, *, margin: bool
) -> _Files:
    """Both conversations of every pair to be trained on as token ids, and what became of the rows of every data set."""
    counts: dict[str, dict[str, Any]] = {}
    tokens = folder / "tokens.jsonl"
    with replacing(tokens) as out, replacing(folder / "dropped.jsonl") as dropped:
        for name, source in sources.items():
            count: dict[str, Any] = {"rows": 0, "trained on": 0, "held out": 0, "weight": source.weight, "dropped": {}}
            counts[name] = count
            rows = zip(read_pairs(source.path), source_rows(source.path), strict=True)
            for row, (_, raw, _) in rows:
                count["rows"] += 1
                line = row if isinstance(row, Dropped) else _line(row, renderer)
                if isinstance(line, Dropped):
                    count["dropped"][line.reason] = count["dropped"].get(line.reason, 0) + 1
                    dropped.write((json.dumps({"file": name} | asdict(line)) + "\n").encode())
                    continue
                assert not isinstance(row, Dropped)
                if is_held_out(row["query_id"], settings.holdout):
                    count["held out"] += 1
                    continue
                if margin:
                    line["margin"] = _margin(raw, f"{source.path}, query {row['query_id']}")
                copies = _copies(row["query_id"], source.weight)
                count["trained on"] += copies
                out.write((json.dumps(line) + "\n").encode() * copies)
    return _Files(tokens, counts)


def _names(paths: Sequence[Path]) -> list[str]:
    """Each file's name, with as many of its folders as tell it from the others. ValueError where one is there twice."""
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path}: named twice; name each file once")

    def name(path: Path) -> str:
        ends = (path.parts[-depth:] for depth in range(1, len(path.parts)))
        alone = (end for end in ends if sum(other.parts[-len(end) :] == end for other in paths) == 1)
        return "/".join(next(alone, path.parts))

    return list(map(name, paths))


def _line(row: PairRow, renderer: Renderer) -> dict[str, Any] | Dropped:
    ids: list[list[int]] = []
    for conversation in conversations(pair(row)):
        reason = renderer.refusal(conversation)
        if reason is not None:
            return Dropped(id=row["query_id"], reason=reason)
        ids.append(list(renderer.ids(conversation)))
    chosen, rejected = ids
    return {"chosen_ids": chosen, "rejected_ids": rejected}


def _share_of(query_id: str, purpose: str) -> float:
    """A number in [0, 1) that belongs to the query, the same in every data set and run."""
    return int(digest([purpose, query_id])[:8], 16) / 2**32


def is_held_out(query_id: str, share: float) -> bool:
    """Whether the pairs of a query are kept for measuring."""
    return _share_of(query_id, "held out") < share


def _copies(query_id: str, weight: float) -> int:
    return int(weight) + (_share_of(query_id, "weight") < weight - int(weight))


def _margin(raw: Mapping[str, Any], where: str) -> float:
    for names in MARGINS:
        values = [find(raw, name) for name in names]
        if all(isinstance(value, int | float) for value in values):
            return float(values[0]) if len(values) == 1 else float(values[0]) - float(values[1])
    raise ValueError(f"{where}: --margin needs one of {[' and '.join(names) for names in MARGINS]}; found {sorted(raw)}")


# --- measured --------------------------------------------------------------------------------------------------------------


def _held_out(sources: Mapping[str, Source], reward: RewardModel, folder: Path, share: float) -> dict[str, Any]:
    """What the trained model says of the held-out pairs, data set by data set."""
    with Journal(folder / "parts") as journal:
        found: dict[str, Any] = {}
        for name, source in sources.items():
            rows = (row for row in read_pairs(source.path) if not isinstance(row, Dropped))
            pairs = [pair(row) for row in rows if is_held_out(row["query_id"], share)]
            if pairs:
                found[name] = judge_report(reward_verdicts(reward, lambda pairs=pairs: pairs, journal, total=len(pairs)))
        return found


def _scorer(model: Checkpoint, settings: RewardSettings, day: str) -> RewardModel:
    """day: what the chat template is told of the date."""
    return RewardModel(
        model=model,
        policy=Policy(model=model.path, chat_template=settings.chat_template, date=day),
        dtype=settings.dtype,
        max_tokens=min(filter(None, (settings.max_tokens, positions_of(model.path)))),
    )


def reward_bench(model: str, files: Sequence[Path], output: Path, settings: RewardSettings) -> dict[str, Any]:
    """A reward model on labelled data: RewardBench, RewardBench 2, LLMBar, or plain preference pairs.

    model: as policy.model in a recipe, or a folder that `train_reward_model` wrote, whose model is meant.
    Rewards are kept in output/parts. Raises ValueError, before anything is scored, for a file of no known format.
    """
    for file in files:
        check_source(file, "labelled data")
    inner = Path(model) / "model"
    found = str(inner) if (inner / "config.json").is_file() else model
    day = day_of(output)
    reward = _scorer(resolve(Policy(model=found)), settings, day)
    open_renderer(reward)
    benchmarks = dict(zip(_names(files), map(_benchmark, files), strict=True))
    with RunFolder(output) as folder, Journal(folder.path / "parts") as journal:
        folder.begin(day)
        return {name: _measured(reward, benchmark, journal) for name, benchmark in benchmarks.items()}


def _benchmark(file: Path) -> Benchmark | list[PairRow | Dropped]:
    """A benchmark by its columns; else plain pairs."""
    rows = [row.fields for row in source_rows(file)]
    if rows and ("subset" in rows[0] or "output_1" in rows[0]):
        return read_benchmark(rows, str(file))
    return list(read_pairs(file))


def _measured(reward: RewardModel, benchmark: Benchmark | list[PairRow | Dropped], journal: Journal) -> dict[str, Any]:
    if isinstance(benchmark, list):
        pairs = [pair(row) for row in benchmark if not isinstance(row, Dropped)]
        dropped = Counter(row.reason for row in benchmark if isinstance(row, Dropped))
        verdicts = reward_verdicts(reward, lambda: pairs, journal, total=len(pairs))
        return {"format": "pairs", **judge_report(verdicts), "dropped": dict(dropped)}
    renderer = open_renderer(reward)
    wanted = [
        [(*item.prompt, Message(role="assistant", content=text)) for text in item.responses] for item in benchmark.items
    ]
    refused = [next(filter(None, map(renderer.refusal, all)), None) for all in wanted]
    asked = [conversation for all, reason in zip(wanted, refused, strict=True) if reason is None for conversation in all]
    score_missing(reward, asked, journal, description="rewards", total=len(asked))
    scores = [
        None if reason is not None else [reward_of(reward, each, journal) for each in all]
        for all, reason in zip(wanted, refused, strict=True)
    ]
    return asdict(report(benchmark, scores)) | {"refused": dict(Counter(filter(None, refused)))}
