"""One run out of shards: the pairs that several runs made, each of its share of the queries, sealed as one stage 5.

    selfsteer run RECIPE queries.shard=1/3 output=runs/a-1                      trains the generator, answers its share
    selfsteer run RECIPE queries.shard=2/3 output=runs/a-2 --borrow runs/a-1    as soon as the generator is sealed
    selfsteer run RECIPE queries.shard=3/3 output=runs/a-3 --borrow runs/a-1
    selfsteer merge runs/a-1 runs/a-2 runs/a-3 --output runs/a                  this file
    selfsteer run runs/a/recipe.yaml                                            judges, selects, aligns

Keys and seeds know nothing of shards, so what is sealed is, byte for byte, what one run would have sealed. Nothing is asked,
scored or rendered: rows of sealed files are put in the order of the queries, a row group of each shard in memory at a time,
and measured. Samples come along: where another setting is tried later, they are there. Left out on purpose: what follows
(`pipeline.py`).
"""

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from selfsteer.clock import Spent, Taken, most
from selfsteer.recipe.sections import Recipe, Share, dump, load
from selfsteer.recipe.text import changes
from selfsteer.runtime import progress, raise_if_stopped
from selfsteer.stages import summary
from selfsteer.stages.base import differences, sealed
from selfsteer.stages.drawing import hold_out
from selfsteer.stages.preferences import SHARD, pair_measures
from selfsteer.stages.status import PREFERENCES, PRINCIPLES, STEERING, method_of, stage_names
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Manifest, Origin, RunFolder, Stage, adopt, borrow, elapsed, lend

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class Shard(NamedTuple):
    """A finished run of one share of the queries."""

    folder: RunFolder
    recipe: Recipe
    share: Share
    made: Manifest
    """Of its pairs."""

    def __str__(self) -> str:
        return f"{self.folder.path} ({self.recipe.queries.shard})"

    def stage(self, name: str) -> Stage:
        """A stage of its only round."""
        return self.folder.stage(1, name)

    @property
    def origin(self) -> Origin:
        """What its pairs were made from but for the share: what the pairs of all queries are made from."""
        settings = {key: value for key, value in self.made.settings.items() if key != SHARD}
        return Origin(settings=settings, inputs=self.made.inputs)


def merge(runs: Sequence[Path], output: Path) -> Manifest:
    """Make one run of all the shards of a recipe, up to its preference pairs; returns the manifest of these.

    Raises ValueError before anything is written for runs that are not the shards of one run, each once and finished, and for
    a folder that holds another run. The same call goes on where an earlier one stopped.
    """
    shards = find_shards(runs, output)
    first = shards[0]
    recipe = first.recipe.model_copy(
        update={"output": str(output), "queries": first.recipe.queries.model_copy(update={"shard": None})}
    )
    *before, last = stage_names(first.recipe, method_of(first.recipe))
    wanted = {name: sealed(first.stage(name)).fingerprint for name in before} | {last: first.origin.fingerprint}
    if _is_merged(output, recipe, wanted):
        return RunFolder.view(output).stage(1, last).verify()
    with RunFolder(output) as folder:
        folder.describe(dump(recipe), summary.session(recipe))
        for name in before:
            if not folder.stage(1, name).is_current(wanted[name]):
                borrow(folder.stage(1, name), [first.stage(name)])
                adopt(folder.stage(1, name), [first.stage(name)], wanted[name])
        return _merged(folder, shards)


# --- checks ----------------------------------------------------------------------------------------------------------------


def find_shards(runs: Sequence[Path], output: Path) -> list[Shard]:
    """The shards of one run, in their order. Raises ValueError where these runs are not all of them, each once and finished.

    output: where they are to be merged, for the commands that a message names.
    """
    shards = sorted(map(_shard, runs), key=lambda shard: shard.share)
    first = shards[0]
    for shard in shards[1:]:
        if shard.share.of != first.share.of:
            raise ValueError(f"{first} and {shard} are not shards of one run: name all {first.share.of} of one of them.")
    numbers = [shard.share.number for shard in shards]
    for shard, following in pairwise(shards):
        if shard.share == following.share:
            raise ValueError(f"{shard} and {following} are the same shard: name one of them.")
    if missing := [number for number in range(1, first.share.of + 1) if number not in numbers]:
        named = [f"{number}/{first.share.of}" for number in missing]
        command = ["selfsteer", "run", f"{first.folder.path}/recipe.yaml", f"queries.shard={named[0]}"]
        command.append(f"output={output}-{missing[0]}")
        if first.share.number == 1:
            command += ["--borrow", str(first.folder.path)]
        raise ValueError(
            f"{len(missing)} of {first.share.of} shards are missing: {', '.join(named)}. Make them, such as:"
            f" {shlex.join(command)}"
        )
    for shard in shards[1:]:
        said = _changes(first, shard)
        if shard.origin.fingerprint != first.origin.fingerprint:
            raise ValueError(
                f"{shard} is of another run than {first}: {said or differences(first.origin, shard.origin)}. Make it again"
                f" with the recipe of the others and --borrow {first.folder.path}."
            )
        if said:
            log.warning("%s: %s; what follows is done as %s has it", shard, said, first)
    return shards


def _shard(path: Path) -> Shard:
    folder = RunFolder.view(path)
    recipe = load(folder.path / "recipe.yaml")
    share = recipe.queries.share
    if share is None:
        raise ValueError(f"{path} is no shard: its recipe has no queries.shard. Name runs that have one, such as 1/3.")
    stages = [folder.stage(1, name).manifest() for name in stage_names(recipe, method_of(recipe))]
    made = stages[-1]
    digests = {manifest.digest for manifest in stages if manifest is not None}
    # What it was made from is what lies beside it: nothing has been made again since.
    if (
        made is None
        or made.settings.get(SHARD) != recipe.queries.shard
        or not digests.issuperset(map(made.inputs.get, _READ))
    ):
        raise ValueError(
            f"{path} ({recipe.queries.shard}) has not made its pairs yet: continue it with the command that began it,"
            " then merge."
        )
    return Shard(folder, recipe, share, made)


_READ = ("principles", "steering", "generator")
"""The stages that pairs are made from, as the inputs name them."""


def _changes(first: Shard, other: Shard) -> str:
    """What differs between the recipes of two shards, and need not."""
    before, after = (shard.recipe.model_dump(mode="json") for shard in (first, other))
    return ", ".join(str(each) for each in changes(before, after) if each.key not in ("output", "queries.shard"))


def _is_merged(output: Path, recipe: Recipe, wanted: dict[str, str]) -> bool:
    """Whether a folder holds the pairs of this merge already; then other settings may have gone on from them.

    wanted: stage -> fingerprint. Raises ValueError for a folder that holds anything else than this merge, or its beginning.
    """
    if not (output / "run.json").exists():
        return False
    folder = RunFolder.view(output)
    found = {name: folder.stage(1, name).manifest() for name in wanted}
    same = load(output / "recipe.yaml").model_copy(update={"output": recipe.output}) == recipe
    others = [name for name, manifest in found.items() if manifest is not None and manifest.fingerprint != wanted[name]]
    if others or not (same or found[PREFERENCES]):
        raise ValueError(f"{output} holds another run; give the merged one a folder of its own with --output RUN.")
    return found[PREFERENCES] is not None


# --- the pairs of all queries ----------------------------------------------------------------------------------------------


def _merged(folder: RunFolder, shards: Sequence[Shard]) -> Manifest:
    """Stage 5 as one run would have sealed it."""
    stage, origin = folder.stage(1, PREFERENCES), shards[0].origin
    parts = [shard.stage(PREFERENCES) for shard in shards]
    for shard, part in zip(shards, parts, strict=True):
        part.verify()
        lend(part, stage, f"shard-{shard.share.number}")
    queries = folder.stage(1, PRINCIPLES).path / "data.parquet"

    def ids() -> Iterator[str]:
        return (row["query_id"] for row in columns.file_rows(queries, ["query_id"]))

    holdout = shards[0].recipe.queries.holdout
    spared = hold_out(set(ids()), holdout) if holdout else frozenset[str]()

    def rows() -> Iterator[dict[str, Any]]:
        with progress("pairs put in order", sum(shard.made.kept for shard in shards), unit="pairs") as advance:
            for row in in_order(ids(), [part.rows() for part in parts], lambda row: row["query_id"]):
                raise_if_stopped()
                advance(1)
                yield row

    dropped = in_order(ids(), [part.dropped() for part in parts], lambda item: item.id)
    contents = Contents(
        wanted=sum(shard.made.wanted for shard in shards),
        rows=chain(rows(), dropped),
        schema=columns.PAIRS,
        measures=pair_measures(stage, folder.stage(1, STEERING), spared),
    )
    with elapsed(stage.path) as taken:
        return stage.seal(origin, contents, taken=lambda: _altogether(taken(), shards))


def in_order(ids: Iterable[str], shards: Sequence[Iterator[Item]], query_of: Callable[[Item], str]) -> Iterator[Item]:
    """The items of all shards, those of each query together, in the order of the queries (`ids`).

    shards: the first has items of the first query and every len(shards)-th one after it, and so on, each in that order.
    Raises ValueError for an item of a query that is not its shard's.
    """
    ahead = [next(items, None) for items in shards]
    for place, query_id in enumerate(ids):
        at = place % len(shards)
        while (item := ahead[at]) is not None and query_of(item) == query_id:
            yield item
            ahead[at] = next(shards[at], None)
    for number, item in enumerate(ahead, 1):
        if item is not None:
            raise ValueError(f"shard {number}: the query {query_of(item)} is not one of its queries, or out of order")


def _altogether(merging: Taken, shards: Sequence[Shard]) -> Taken:
    """What the pairs took, on all machines together; the memory is the most that one of them held."""
    parts: dict[str, Spent] = dict(merging.parts)
    for shard in shards:
        for name, (seconds, tokens) in shard.made.parts.items():
            before = parts.get(name, Spent())
            parts[name] = Spent(before.seconds + seconds, before.tokens + int(tokens))
    memory = most(merging.memory, *(shard.made.memory for shard in shards))
    return Taken(merging.seconds + sum(shard.made.seconds for shard in shards), parts, memory)
