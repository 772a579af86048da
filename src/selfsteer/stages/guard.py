"""Nothing is destroyed by a second try: what going on with other settings would cost, said before anything is made again.

Lost for good are only preference pairs, trained models and checkpoints of an unfinished training. Samples stay in their
journals, and measures are taken again from them; so neither stands in the way of a change.

Left out on purpose: whether a stage can stay as it is, and making it again (`base.make_stage`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.text import changes
from selfsteer.stages.status import (
    ANSWERS,
    GAIN,
    PASSES,
    PREFERENCES,
    PRINCIPLES,
    QUALITY,
    TRAININGS,
    method_of,
    stage_names,
)
from selfsteer.store.folder import Manifest, Origin, RunFolder, Stage, WouldReplace

_MEASURES_ONLY = {GAIN, QUALITY, PASSES, ANSWERS}

_INPUTS = {
    "queries": "the queries: the file is not what it was",
    "policy": "the policy: its weights are not what they were",
    "prompts": "the prompts: the model's chat template or tokenizer is not what it was",
}
"""What a stage reads that is no stage."""

_FILES = {
    (PREFERENCES, "pairs"): "the pairs: their file is not what it was",
    (PRINCIPLES, "principles"): "the principles: their file is not what it was",
}
"""The same of one stage; of the others it is what a stage made."""


class Attempt(NamedTuple):
    """A recipe in a folder, at one of its rounds."""

    folder: RunFolder
    recipe: Recipe
    number: int
    output: Path
    """What the user names: the folder, or that of the comparison around it."""


class _Loss(NamedTuple):
    again: list[str]
    pairs: int
    models: int
    unfinished: int


def refuse_to_replace(attempt: Attempt, name: str, origin: Origin) -> None:
    """Raises `WouldReplace` where making a stage from this origin loses pairs, a model or an unfinished training.

    For a stage that is not sealed from this origin; the message says what changed, what it costs, and both ways out.
    """
    if name in _MEASURES_ONLY:
        return
    stage = attempt.folder.stage(attempt.number, name)
    sealed, stale = stage.manifest(), _checkpoints(stage, origin)
    if sealed is None and not stale and any(stage.path.iterdir()):
        return  # unfinished, and nothing is lost by going on; what follows from it is looked at when it is there
    later = list(_later(attempt, name))
    loss = _loss(([(name, stage)] if sealed or stale else []) + later, origin)
    if not (loss.pairs or loss.models or loss.unfinished):
        return
    reasons = list(_reasons(attempt, sealed, origin)) or [f"{name} was not made before"]
    place = attempt.output
    raise WouldReplace(
        f"{attempt.folder.path} holds what other settings made. Changed since:\n"
        + "".join(f"  {reason}\n" for reason in reasons)
        + f"{', '.join(loss.again)} would be made again; {_in_words(loss)} would go.\n"
        f"Keep them: another folder, which borrows the samples that still hold: output={_free(place)} --borrow {place}\n"
        "Give them up: --replace (in Python replace=True)"
    )


def _later(attempt: Attempt, name: str) -> Iterator[tuple[str, Stage]]:
    """The stages that follow from one, in its round and in the later ones, as far as there are any."""
    folder, recipe, number, _ = attempt
    begun = name == PRINCIPLES or folder.has_stage(number, PRINCIPLES)
    names = stage_names(recipe, method_of(recipe) if begun else "given")
    after = names[names.index(name) + 1 :] if name in names else ()
    for each in after:
        if folder.has_stage(number, each):
            yield each, folder.stage(number, each)
    for later in range(number + 1, recipe.rounds + 1):
        for each in names:
            if folder.has_stage(later, each):
                yield f"round {later}: {each}", folder.stage(later, each)


def _loss(stages: list[tuple[str, Stage]], origin: Origin) -> _Loss:
    again: list[str] = []
    pairs = models = unfinished = 0
    for label, stage in stages:
        manifest = stage.manifest()
        if manifest is None:
            stale = _checkpoints(stage, origin)
            unfinished += stale
            again += [label] if stale else []
            continue
        again.append(label)
        pairs += manifest.kept if stage.path.name == PREFERENCES else 0
        models += stage.path.name in TRAININGS and not manifest.cleaned
    return _Loss(again, pairs, models, unfinished)


def _checkpoints(stage: Stage, origin: Origin) -> bool:
    """Whether an unfinished training has saved something that it could not go on from."""
    own = f"training-{origin.fingerprint[:12]}"
    return any(found.parent.name != own for found in stage.path.glob("training-*/checkpoint-*"))


def _in_words(loss: _Loss) -> str:
    words = [f"{loss.pairs:,} pairs"] if loss.pairs else []
    words += [f"{loss.models} models" if loss.models > 1 else "a model"] if loss.models else []
    words += ["what an unfinished training has learned"] if loss.unfinished else []
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _reasons(attempt: Attempt, sealed: Manifest | None, origin: Origin) -> Iterator[str]:
    """In the words of the recipe; in those of the stage where the recipe is the same; and the inputs that changed."""
    before, now = attempt.folder.earlier, attempt.recipe.model_dump(mode="json")
    said = [] if before is None else list(changes(_plain(before), now))
    said = [each for each in said if each.key != "output"]
    yield from map(str, said)
    if sealed is None:
        return
    if not said:
        yield from map(str, changes(sealed.settings, _plain(origin.settings)))
    explained = {each.key.partition(".")[0] for each in said}
    if "policy" in explained:
        explained.add("prompts")
    for name in sorted(sealed.inputs.keys() | origin.inputs.keys()):
        if sealed.inputs.get(name) == origin.inputs.get(name) or name in explained:
            continue
        words = _INPUTS.get(name) or _FILES.get((PurePath(sealed.stage).name, name))
        if words is not None:
            yield words
        elif not said:
            yield f"what the stage before handed on ({name})"


def _plain(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """As YAML gives it back: tuples are lists."""
    return yaml.safe_load(value if isinstance(value, str) else yaml.safe_dump(dict(value)))


def _free(folder: Path) -> Path:
    """A name beside a folder that nothing has yet."""
    number = 2
    while (free := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return free
