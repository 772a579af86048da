"""What a finished run no longer needs: the models of its data generators.

    selfsteer clean RUN         what would go
    selfsteer clean RUN --yes   deletes it

A generator is needed until its pairs are made and those that align the policy are chosen. Its manifest goes on to name what
it held, so that nothing made from it is made again; where other settings need it once more, it is trained again
(`stages.base.ModelCleaned`). Samples, pairs, measures and every round's policy stay. Left out on purpose: run folders as a
whole, which `rm -r` deletes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from selfsteer.recipe.sections import load
from selfsteer.stages.status import ADAPTER, GAIN, GENERATORS, MODEL, PREFERENCES, SELECTION, method_of, stage_names
from selfsteer.store.folder import RunFolder, Stage, lenders

_READERS = (GAIN, PREFERENCES, SELECTION)
"""The stages that load a generator's model."""


class Removable(NamedTuple):
    """The model of a generator that nothing loads any more."""

    folder: RunFolder
    round: int
    stage: Stage
    files: list[Path]


def removable(paths: Iterable[Path]) -> list[Removable]:
    """What can go from these runs, or from those of a comparison.

    Raises ValueError for a folder that holds no run, and for a shard, whose generator the other shards take over.
    """
    return [found for folder in lenders(paths) for found in _of_run(folder)]


def _of_run(folder: RunFolder) -> Iterator[Removable]:
    recipe = load(folder.path / "recipe.yaml")
    if recipe.queries.shard is not None:
        raise ValueError(
            f"{folder.path}: the other shards take the generator of shard {recipe.queries.shard} over. Merge them, clean the"
            " run that `selfsteer merge` makes, and delete the shards."
        )
    names = stage_names(recipe, method_of(recipe))
    for number in range(1, recipe.rounds + 1):
        sealed = {name for name in names if folder.stage(number, name).manifest() is not None}
        if not sealed.issuperset(name for name in names if name in _READERS):
            continue
        for name in sorted(sealed.intersection(GENERATORS)):
            stage = folder.stage(number, name)
            files = [file for each in (MODEL, ADAPTER) for file in (stage.path / each).rglob("*") if file.is_file()]
            if files:
                yield Removable(folder, number, stage, files)


def freed(found: Sequence[Removable]) -> dict[Path, int]:
    """Bytes that the disk gets back, by stage: a file that another run shares takes its room until it is gone there, too."""
    links: Counter[tuple[int, int]] = Counter()
    room: dict[Path, int] = {each.stage.path: 0 for each in found}
    for each in found:
        for file in each.files:
            about = file.stat()
            links[about.st_dev, about.st_ino] += 1
            if links[about.st_dev, about.st_ino] == about.st_nlink:
                room[each.stage.path] += about.st_size
    return room


def clean(found: Sequence[Removable]) -> None:
    """Delete it. Raises `RunFolderBusy` where a run is under way."""
    for each in found:
        with each.folder as owned:
            owned.stage(each.round, each.stage.path.name).clean((MODEL, ADAPTER))
