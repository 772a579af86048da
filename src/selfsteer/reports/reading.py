"""The rows that a page shows for reading: pairs, dropped rows and answers, from what the stages of a run have sealed.

Files are read a row group at a time, and of a large run only what the page has room for is kept. Left out on purpose: how
rows look (`page.py`).
"""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

import yaml

from selfsteer.measures.metrics import Metrics
from selfsteer.measures.text import words
from selfsteer.recipe.sections import load
from selfsteer.records import Pair, Side
from selfsteer.reports.tables import ALIGNMENT, GENERATOR, PBAA
from selfsteer.stages.base import kept
from selfsteer.stages.quality import CHECKS, VERDICTS
from selfsteer.stages.status import PASSES, PREFERENCES, PRINCIPLES, QUALITY, STEERING
from selfsteer.stages.steering import POLICY_PAIRS
from selfsteer.store import columns
from selfsteer.store.folder import RunFolder, Stage

EXAMPLES = 10
"""Rows that stand on the page without a script."""

MOST = 2_000
"""Pairs of one set on a page."""

ROOM = 3_700_000
"""Bytes of JSON for all pairs of a page: with plots and tables it stays below 5 MB."""

MOST_DROPPED = 500

_SHORT = 300
"""Characters of a dropped row's query, and of what is particular to it."""

T = TypeVar("T")


class SideEntry(TypedDict):
    """A response of a pair, as JSON."""

    text: str
    cut: bool
    length: int
    """Tokens, or words where the tokens are not known."""
    probability: NotRequired[float]
    """On-policy probability."""
    why_not: NotRequired[str]
    """Why it does not pass the checks of its principle; "" where it passes."""


class Entry(TypedDict):
    """A pair, as JSON."""

    id: str
    """That a link names: of the query, with a number behind it where the query has several pairs."""
    prompt: list[list[str]]
    """Role and content of each turn."""
    chosen: SideEntry
    rejected: SideEntry
    margin: NotRequired[float]
    """chosen - rejected, nats a token."""
    quality: NotRequired[str]
    good: NotRequired[str]
    bad: NotRequired[str]
    verdict: NotRequired[str]
    """"chosen", "rejected", "tie", or why there is none."""


class DroppedEntry(TypedDict):
    """A row that a stage dropped, as JSON."""

    id: str
    stage: str
    reason: str
    detail: str
    query: str


class PairSet(NamedTuple):
    """One set of pairs."""

    name: str
    """As in `tables.data_sets`."""
    prefix: str
    """Of the links to its pairs."""
    of: int
    """How many there are, these among them."""
    pairs: Sequence[Entry]


class Reading(NamedTuple):
    """All that a page shows for reading."""

    sets: Sequence[PairSet] = ()
    """The set that aligned the policy first."""
    dropped: Sequence[DroppedEntry] = ()
    dropped_of: int = 0
    answers: Sequence[Mapping[str, Any]] = ()
    """Rows of `columns.ANSWERS`."""
    turned: tuple[int, int] | None = None
    """Held-out answers that pass after the alignment and did not before, and the reverse."""
    recipe: str = ""
    """As YAML, what differs from the defaults."""
    commit: str | None = None
    """Of a source checkout."""


def pick_examples(items: Iterable[T], *, n: int = EXAMPLES, seed: int = 0) -> list[T]:
    """n items drawn evenly from a stream (reservoir sampling, Vitter 1985), in its order."""
    rng = random.Random(seed)
    taken: list[tuple[int, T]] = []
    for number, item in enumerate(items):
        if number < n:
            taken.append((number, item))
        elif (place := rng.randrange(number + 1)) < n:
            taken[place] = (number, item)
    return [item for _, item in sorted(taken, key=lambda numbered: numbered[0])]


def reading_of(folder: RunFolder, metrics: Metrics, seed: int) -> Reading:
    """What there is to read of the last round."""
    number = len(metrics["rounds"])
    this = metrics["rounds"][-1]
    stages = {name: folder.stage(number, name) for name in this.get("stages", {})}
    files: dict[str, Path] = {}
    if PREFERENCES in stages:  # not where a gate on headroom ended the round before
        files["alignment" if "alignment" in this else "pbaa"] = stages[PREFERENCES].path / "data.parquet"
    if STEERING in stages:
        files["pbaa"] = stages[STEERING].path / POLICY_PAIRS
    names = {"alignment": GENERATOR if "generator" in this else ALIGNMENT, "pbaa": PBAA}
    draw = Draw(seed)
    for name, file in files.items():
        for row in columns.file_rows(file, _PAIR_COLUMNS):
            draw.add(name, row["query_id"], lambda row=row: entry(columns.pair(row)))
    if QUALITY in stages:
        _add_verdicts(draw, stages[QUALITY].path)
    prefixes = dict(zip(files, ("pair", "pbaa"), strict=False))
    dropped, passes = list(_dropped(stages, seed)), stages.get(PASSES)
    recipe = load(folder.path / "recipe.yaml").model_dump(mode="json", exclude_defaults=True)
    return Reading(
        sets=[PairSet(names[name], prefixes[name], draw.seen[name], draw.entries(name)) for name in files],
        dropped=_with_queries(dropped, stages),
        dropped_of=sum(sum(stage["dropped"].values()) for stage in this.get("stages", {}).values()),
        answers=list(passes.picked(pick_examples(range(kept(passes)), seed=seed))) if passes else [],
        turned=_turned(passes) if passes else None,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        commit=folder.sessions()[-1].get("commit"),
    )


_PAIR_COLUMNS = [name for name in columns.PAIRS.names if not name.endswith(("_ids", "_seed"))]


def entry(pair: Pair) -> Entry:
    """The pair as JSON."""
    scored = pair.scored
    found = Entry(
        id=pair.query_id,
        prompt=[[turn["role"], turn["content"]] for turn in pair.prompt],
        chosen=_side(pair.chosen, scored=scored),
        rejected=_side(pair.rejected, scored=scored),
    )
    if scored:
        found["margin"] = round(pair.chosen.score.mean_logps - pair.rejected.score.mean_logps, 4)
    if pair.principles is not None:
        found["quality"], found["good"], found["bad"] = (
            pair.principles.quality,
            pair.principles.good,
            pair.principles.bad,
        )
    return found


def _side(side: Side, *, scored: bool) -> SideEntry:
    text = side.text
    found = SideEntry(text=text, cut=side.finish == "length", length=side.score.tokens if scored else len(words(text)))
    if scored:
        found["probability"] = round(math.exp(side.score.mean_logps), 4)
    return found


class Draw:
    """Queries drawn evenly, with all their pairs, as many as a page has room for: those with the lowest hashes.

    A query is drawn in every set or in none, and nothing but what is drawn stays in memory.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[str, dict[str, list[tuple[int, Entry]]]] = {}
        """Query -> set -> number of the row, pair."""
        self._ranks: list[tuple[float, str]] = []
        self._above = math.inf
        self._bytes = 0
        self._counts: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def add(self, name: str, query: str, make: Callable[[], Entry]) -> None:
        """One pair of a set; made only where its query may be drawn."""
        number = self.seen[name]
        self.seen[name] += 1
        rank = _rank(self._seed, query)
        if rank >= self._above:
            return
        if query not in self._drawn:
            self._drawn[query] = {}
            heappush(self._ranks, (-rank, query))
        made, others = make(), self._drawn[query].setdefault(name, [])
        if others:
            made["id"] = f"{query}-{len(others) + 1}"
        others.append((number, made))
        self._counts[name] += 1
        self._bytes += _size(made)
        while self._ranks and (self._counts.most_common(1)[0][1] > MOST or self._bytes > ROOM):
            highest, gone = heappop(self._ranks)
            self._above = -highest
            for which, pairs in self._drawn.pop(gone).items():
                self._counts[which] -= len(pairs)
                self._bytes -= sum(_size(pair) for _, pair in pairs)

    def of(self, name: str, query: str) -> list[Entry]:
        """The pairs of one query in a set, in order."""
        return [pair for _, pair in self._drawn.get(query, {}).get(name, [])]

    def entries(self, name: str) -> list[Entry]:
        """The pairs of a set that are drawn, in the order of their file."""
        found = [numbered for sets in self._drawn.values() for numbered in sets.get(name, [])]
        return [pair for _, pair in sorted(found, key=lambda numbered: numbered[0])]


def _rank(seed: int, text: str) -> float:
    """A number that is as good as drawn, and always the same."""
    return int.from_bytes(sha256(f"{seed} {text}".encode()).digest()[:6]) / 2**48


def _size(made: Entry) -> int:
    return len(json.dumps(made, ensure_ascii=False).encode(errors="replace"))


def _add_verdicts(draw: Draw, quality: Path) -> None:
    """What the judge said of each pair; where there is no judge, principle consistency."""
    judged = {row["pairs"] for row in columns.file_rows(quality / VERDICTS, ["pairs", "by"]) if row["by"] == "judge"}
    verdicts = columns.file_rows(quality / VERDICTS, ["pairs", "by", "query_id", "preferred", "error"])
    by = {True: "judge", False: "principle_consistency"}
    for row, pair in _drawn(draw, (row for row in verdicts if row["by"] == by[row["pairs"] in judged])):
        pair["verdict"] = row["preferred"] or f"no verdict: {row['error']}"
    if (quality / CHECKS).is_file():
        for row, pair in _drawn(draw, (row for row in columns.file_rows(quality / CHECKS) if row["checks"])):
            pair["chosen"]["why_not"] = row["chosen_why_not"] or ""
            pair["rejected"]["why_not"] = row["rejected_why_not"] or ""


def _drawn(draw: Draw, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Entry]]:
    """The rows of pairs that are drawn, each with its pair: the first of a query with its first, and so on."""
    given: Counter[tuple[str, str]] = Counter()
    for row in rows:
        place = row["pairs"], row["query_id"]
        for pair in draw.of(*place)[given[place] :][:1]:
            yield row, pair
            given[place] += 1


def _dropped(stages: Mapping[str, Stage], seed: int) -> Iterator[DroppedEntry]:
    """Dropped rows, drawn evenly where there are more than a page has room for."""
    every = ((name, row) for name, stage in stages.items() for row in stage.dropped())
    for name, row in pick_examples(every, n=MOST_DROPPED, seed=seed):
        yield DroppedEntry(id=row.id, stage=name, reason=row.reason, detail=_cut(row.detail), query="")


def _with_queries(dropped: Sequence[DroppedEntry], stages: Mapping[str, Stage]) -> Sequence[DroppedEntry]:
    """With the user's last turn, of those whose query was read."""
    if dropped and PRINCIPLES in stages:
        wanted = {row["id"] for row in dropped}
        rows = columns.file_rows(stages[PRINCIPLES].path / "data.parquet", ["query_id", "messages"])
        queries = {row["query_id"]: _cut(row["messages"][-1]["content"]) for row in rows if row["query_id"] in wanted}
        for row in dropped:
            row["query"] = queries.get(row["id"], "")
    return dropped


def _cut(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


def _turned(stage: Stage) -> tuple[int, int]:
    """How many answers pass after the alignment alone, and how many before it alone."""
    passes = [
        [all(reason is None for reason in reasons) for reasons in stage.column(f"{which}_why_not")]
        for which in ("before", "after")
    ]
    both = list(zip(*passes, strict=True))
    return both.count((False, True)), both.count((True, False))
