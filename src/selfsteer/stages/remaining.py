"""How long the rest of a run will take: what is left to do by `costs.py`, as fast as the same was done in its sealed stages.

Left out on purpose: the stage under way (`runtime.progress` tells of it), judges, benchmarks and stage 4-gain.
"""

from collections.abc import Iterable, Mapping
from itertools import islice

from selfsteer.clock import PRODUCTS
from selfsteer.stages.base import Round, sealed
from selfsteer.stages.costs import UNTIMED, Counts, Lengths, Tokens, stage_tokens
from selfsteer.stages.status import PRINCIPLES, RESPONSES, method_of, stage_names
from selfsteer.store import columns
from selfsteer.store.folder import Manifest

_LOOKED_AT = 100
"""Queries whose prompts and responses are measured; the others are counted."""

_BACKWARD = 3
"""A forward and a backward pass take about as long as so many forward passes (arXiv 2001.08361, section 2.1)."""


def time_left(round: Round, name: str) -> float | None:
    """Seconds from the beginning of this stage to the end of the run; None while too little is sealed to tell."""
    recipe = round.recipe
    names = stage_names(recipe, method_of(recipe))
    ahead = names[names.index(name) :]
    stages = {each: round.folder.stage(round.number, each) for each in names[: -len(ahead)]}
    done = {each: manifest for each, stage in stages.items() if (manifest := stage.manifest()) is not None}
    if RESPONSES not in done:
        return None
    counts = _counts(round)
    planned = {each: stage_tokens(recipe, counts, each) for each in names if each not in UNTIMED}
    later = (recipe.rounds - round.number) * [*planned.values()]
    return seconds_for([*(planned[each] for each in ahead if each in planned), *later], planned, done)


def seconds_for(ahead: Iterable[Tokens], planned: Mapping[str, Tokens], done: Mapping[str, Manifest]) -> float | None:
    """Seconds for these tokens, at the speed at which the sealed stages got through theirs.

    planned: tokens of each stage. None where nothing was sampled, or neither scored nor trained. What stages do beside the
    products of the model is taken to stay as large a part.
    """
    measured = {name: manifest for name, manifest in done.items() if name in planned and manifest.parts}
    sampling = _rate((planned[name].sampled, _spent(each, "sample")) for name, each in measured.items())
    scoring = _rate((planned[name].scored, _spent(each, "score")) for name, each in measured.items())
    training = _rate(
        (planned[name].trained, _spent(each, "forward", "backward", "optimizer")) for name, each in measured.items()
    )
    training = training or (scoring and scoring / _BACKWARD)
    scoring = scoring or (training and training * _BACKWARD)
    if not sampling or not scoring or not training:
        return None
    products = sum(_spent(each, *PRODUCTS) for each in measured.values())
    beside = sum(each.seconds for each in measured.values()) / products
    return beside * sum(each.sampled / sampling + each.scored / scoring + each.trained / training for each in ahead)


def _rate(spent: Iterable[tuple[float, float]]) -> float | None:
    """Tokens a second of those stages that spent some on it."""
    each = [(tokens, seconds) for tokens, seconds in spent if tokens and seconds]
    return sum(tokens for tokens, _ in each) / sum(seconds for _, seconds in each) if each else None


def _spent(manifest: Manifest, *parts: str) -> float:
    return sum(manifest.parts[part][0] for part in parts if part in manifest.parts)


def _counts(round: Round) -> Counts:
    """From the first queries of the round."""
    principles, responses = (round.folder.stage(round.number, name) for name in (PRINCIPLES, RESPONSES))
    bare: list[tuple[int, ...]] = []
    steered: list[tuple[int, ...]] = []
    for row in islice(principles.rows(), _LOOKED_AT):
        query = columns.query(row)
        steering = columns.principles(row)
        bare.append(round.prompts.prompt_ids(query.messages))
        for principle in (steering.good_message, steering.bad_message):
            steered.append(round.prompts.prompt_ids(round.prompts.steer(query.messages, principle)))
    said = Lengths.of(row[role]["token_ids"] for row in islice(responses.rows(), _LOOKED_AT) for role in ("good", "bad"))
    return Counts(sealed(principles).kept, Lengths.of(bare), Lengths.of(steered), said.mean)
