"""What the stages of a round have in common: how one is made, sealed and reused.

A stage that was made from the same origin (settings and digests of its inputs) is reused as it is; one whose settings
changed is made again from its journal, so that only samples that are new are paid for. Left out on purpose: the stages
themselves (the other files here) and their order (`pipeline.py`).
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsteer.judges.base import RecipeJudge
from selfsteer.measures.metrics import Measures, from_plain, plain
from selfsteer.measures.quality import measure
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Recipe, Share, Training, load
from selfsteer.recipe.text import changes
from selfsteer.records import Checkpoint
from selfsteer.runtime import counted, duration
from selfsteer.stages.guard import Attempt, refuse_to_replace
from selfsteer.stages.status import (
    BAD_GENERATOR,
    GAIN,
    GENERATOR,
    GOOD_GENERATOR,
    PASSES,
    POLICY,
    PREFERENCES,
    PRINCIPLES,
    QUALITY,
    RESPONSES,
    SELECTION,
    STEERING,
    method_of,
    stage_names,
)
from selfsteer.store import columns
from selfsteer.store.durable import canonical_json, read_json, write
from selfsteer.store.folder import MEASURES, Contents, Manifest, Origin, RunFolder, Stage, adopt, borrow, elapsed
from selfsteer.store.journal import Journal
from selfsteer.training.scoring import Scorer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What the stages of one round have in common."""

    number: int
    folder: RunFolder
    recipe: Recipe
    policy: Checkpoint
    """The policy at the round's start: what samples, and the reference model of both trainings."""
    first: Checkpoint
    """The policy that the run began with."""
    prompts: Prompts
    judge: RecipeJudge | None
    lenders: tuple[RunFolder, ...] = ()
    """Runs whose stages and samples this one may take over, where they are the same."""
    replace: bool = False
    """Pairs and models of other settings may be given up."""
    within: Path | None = None
    """The folder of the comparison that this run is an arm of."""
    held_out_only: bool = False
    """Make preference data for the held-out queries alone: they are measured, and no policy is aligned."""
    time_left: Callable[["Round", str], float | None] | None = None
    """Seconds from the beginning of a stage to the end of the run (`remaining.py`, which reads stages)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An unsealed stage that is being made: where, with which journal, and under which fingerprint."""

    stage: Stage
    journal: Journal
    origin: Origin


class ModelCleaned(Exception):
    """A stage is to be made with models that `selfsteer clean` has deleted."""

    def __init__(self, name: str, stages: Sequence[Stage]) -> None:
        super().__init__(f"{name} needs {', '.join(stage.path.name for stage in stages)}")
        self.name, self.stages = name, stages

    def train_again(self) -> None:
        """Unseal what trained them, so that the next call does."""
        for stage in self.stages:
            log.info("%s: its model was cleaned, and %s is made with it: trained again", stage.path.name, self.name)
            stage.reopen()


def make_stage(
    round: Round, name: str, origin: Origin, make: Callable[[Work], Contents], *, models: Iterable[Stage] = ()
) -> Stage:
    """The sealed stage: as it stands when it has this origin, else made by `make` and sealed.

    models: the stages whose models `make` loads. Raises `ModelCleaned` where these are gone and would be loaded.
    """
    stage = round.folder.stage(round.number, name)
    if stage.is_current(origin.fingerprint):
        manifest = stage.verify()
        log.info("%s: sealed, reused", name)
        return _not_empty(stage, manifest)
    if not round.replace:
        where = Attempt(round.folder, round.recipe, round.number, round.within or round.folder.path)
        refuse_to_replace(where, name, origin)
    if gone := [each for each in dict.fromkeys(models) if sealed(each).cleaned]:
        raise ModelCleaned(name, gone)
    earlier = stage.manifest()
    if earlier is not None:
        changed = sorted(
            key
            for before, now in ((earlier.settings, origin.settings), (earlier.inputs, origin.inputs))
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key)
        )
        log.info("%s: made again, because of %s; samples that are still wanted are reused", name, ", ".join(changed))
        stage.reopen()
    if (line := _which(round, name)) is not None:
        left = round.time_left and round.time_left(round, name)
        log.info("%s%s", line, f"; about {duration(left)} left for the run" if left else "")
    lenders = [lender.stage(round.number, name) for lender in round.lenders if not _of_other_queries(round, name, lender)]
    borrow(stage, lenders)
    if adopt(stage, lenders, origin.fingerprint):
        log.info("%s: the same as in an earlier run, taken over", name)
        return _not_empty(stage, sealed(stage))
    if (share := round.recipe.queries.share) is not None and share.number > 1 and name != PREFERENCES:
        raise ValueError(_not_lent(share, lenders, origin))
    with elapsed(stage.path) as taken, stage.journal() as journal:
        contents = make(Work(stage=stage, journal=journal, origin=origin))
        manifest = stage.seal(origin, contents, taken=taken)
    reasons = f" ({counted(manifest.dropped)})" if manifest.dropped else ""
    log.info("%s: kept %s of %s%s", name, f"{manifest.kept:,}", f"{manifest.wanted:,}", reasons)
    return _not_empty(stage, manifest)


def _of_other_queries(round: Round, name: str, lender: RunFolder) -> bool:
    """Whether a lender is another shard of the same queries: of their pairs it has none, and may just be sampling."""
    mine = round.recipe.queries.share
    if name != PREFERENCES or mine is None:
        return False
    theirs = load(lender.path / "recipe.yaml").queries.share
    return theirs is not None and theirs.of == mine.of and theirs.number != mine.number


def _not_lent(share: Share, lenders: Sequence[Stage], origin: Origin) -> str:
    """Why a shard does not go on: a generator of its own would answer as no other shard's does."""
    said: list[str] = []
    for lender in lenders:
        manifest = lender.manifest()
        if manifest is None:
            said.append(f"{lender.path} is not sealed")
        else:
            said.append(f"{lender.path} is of other settings: {differences(manifest.origin, origin)}")
    return (
        f"queries.shard: {share.number}/{share.of} takes all that comes before its pairs over, so that one generator makes"
        f" those of all shards. {'; '.join(said) or 'No run was named with --borrow'}. Borrow the run of shard 1/{share.of},"
        " with the same recipe, once its generator is sealed (selfsteer status RUN)."
    )


def differences(before: Origin, after: Origin) -> str:
    """In which settings and inputs two origins differ, in words."""
    old, new = (json.loads(canonical_json(each.settings)) for each in (before, after))
    names = sorted(before.inputs.keys() | after.inputs.keys())
    inputs = (f"another {name}" for name in names if before.inputs.get(name) != after.inputs.get(name))
    return ", ".join([*map(str, changes(old, new)), *inputs])


TOO_LONG = "too long for the model"
"""Why what exceeds the positions of the policy is dropped."""

_PURPOSES = {
    PRINCIPLES: "a good and a bad principle for every query",
    RESPONSES: "the policy answers under both, and the bare query",
    STEERING: "steering pairs, and what there is to win",
    GENERATOR: "the data generator learns from the steering pairs",
    GOOD_GENERATOR: "the generator of good responses learns",
    BAD_GENERATOR: "the generator of bad responses learns",
    GAIN: "what that changed, at the same contexts",
    PREFERENCES: "the pairs that the policy will be aligned on",
    QUALITY: "the pairs are judged",
    SELECTION: "which pairs align the policy",
    POLICY: "the policy is aligned on the pairs",
    PASSES: "held-out queries are answered before and after",
}


def _which(round: Round, name: str) -> str | None:
    """Which of a round's stages begins; None of pairs made elsewhere, which have no such order."""
    recipe = round.recipe
    names = stage_names(recipe, method_of(recipe))
    ordered = name == names[0] or round.folder.has_stage(round.number, names[0])
    if name not in names or not ordered:
        return None
    of_rounds = f"round {round.number} of {recipe.rounds}, " if recipe.rounds > 1 else ""
    return f"{of_rounds}stage {names.index(name) + 1} of {len(names)}, {name}: {_PURPOSES[name]}"


_WAYS_OUT = {
    "prompt too long": "raise queries.max_prompt_tokens",
    TOO_LONG: "lower responses.max_new_tokens",
    "cut off by the length limit": "raise responses.max_new_tokens, or set filters.truncated to keep",
    "near-identical responses": "raise filters.near_identical, or use stronger principles",
    "identical responses": "raise responses.temperature, or use stronger principles",
    "length ratio": "raise filters.max_length_ratio",
    "refusal in the chosen response": "set filters.refusals to false",
    "principle leakage": "set filters.leakage to false",
    "small margin": "lower selection.min_margin",
    "order reversed": "set selection.drop_reversed to false",
    "no bad sample scores below the good ones": "train the generator further, or set selection.samples to 1",
}
"""What to change in the recipe when too many rows are dropped for a reason."""


def _not_empty(stage: Stage, manifest: Manifest) -> Stage:
    """The stage. Raises ValueError, with the reasons and the way out, when nothing was kept."""
    if manifest.kept > 0:
        return stage
    if manifest.wanted == 0 and stage.path.name == SELECTION:
        raise ValueError(f"{manifest.stage}: every pair is held out; lower queries.holdout in the recipe.")
    if manifest.wanted == 0:
        raise ValueError(f"{manifest.stage}: there are no queries. Look at queries.path and queries.column in the recipe.")
    reasons = "; ".join(
        f"{count:,} {reason}" + (f" ({_WAYS_OUT[reason]})" if reason in _WAYS_OUT else "")
        for reason, count in manifest.dropped.items()
    )
    raise ValueError(
        f"{manifest.stage}: nothing is left of {manifest.wanted:,}: {reasons}. See {stage.path / 'dropped.jsonl'}."
    )


def kept(stage: Stage) -> int:
    """How many items a sealed stage kept."""
    return sealed(stage).kept


def sealed(stage: Stage) -> Manifest:
    """The manifest of a stage that an earlier one has sealed."""
    manifest = stage.manifest()
    assert manifest is not None, f"{stage.path} is read before it is sealed"
    return manifest


def write_measures(stage: Stage, measures: Mapping[str, object]) -> str:
    """Write down what a stage without rows measured; the name of the file, to be sealed with it."""
    write(stage.path / MEASURES, canonical_json(plain(measures)))
    return MEASURES


def read_measures(stage: Stage) -> dict[str, Any]:
    """What a sealed stage measured."""
    way_out = f"delete {stage.path / 'MANIFEST.json'} and run the same command again: finished samples are reused"
    return from_plain(read_json(stage.path / MEASURES, {}, way_out=way_out))


def inputs_of(round: Round, **stages: Stage) -> dict[str, str]:
    """Digests of the policy, of how prompts are rendered, and of the sealed stages that this one reads."""
    digests = {"policy": round.policy.digest, "prompts": round.prompts.digest}
    return digests | {name: sealed(stage).digest for name, stage in stages.items()}


def arithmetic(training: Training) -> dict[str, Any]:
    """How log-probabilities are computed: trainings repeat them bit for bit only when they compute alike."""
    return training.model_dump(include={"dtype", "prefix_sharing"})


def policy_scorer(round: Round) -> Scorer:
    """What gives the reference log-probabilities: the policy, computing as the trainings will."""
    return Scorer(round.policy, round.recipe.policy, round.prompts, round.recipe.training, round.recipe.launcher)


def taking(**measures: Callable[[], object]) -> Callable[[], dict[str, Any]]:
    """For `Contents.measures`: what these return, under their names."""
    return lambda: {name: plain(take()) for name, take in measures.items()}


def measured(rows: Iterable[Mapping[str, Any]]) -> Measures:
    """The measures of a stage's pairs; rows of `columns.TEXTS` will do."""
    return measure(map(columns.pair, rows))
