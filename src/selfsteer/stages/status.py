"""Which stages a run has, and how far each of them is: read from the run folder alone, without torch.

Left out on purpose: what the stages do (the modules of their names), and their measures (`summary.py`).
"""

import json
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from selfsteer.measures.metrics import Method
from selfsteer.recipe.sections import Recipe, load
from selfsteer.store.durable import canonical_json, digest, file_digest, write
from selfsteer.store.folder import POLICY, PREFERENCES, SELECTION, RunFolder, Stage

PRINCIPLES, RESPONSES, STEERING, GENERATOR = "1-principles", "2-responses", "3-steering", "4-generator"
GAIN, QUALITY, PASSES, ANSWERS = "4-gain", "5-quality", "7-checks", "7-answers"

GOOD_GENERATOR, BAD_GENERATOR = "4-generator-good", "4-generator-bad"
"""Of a dual generator: what answers x+ (chosen), trained with L+, and what answers x- (rejected), trained with L-."""

GENERATORS = (GENERATOR, GOOD_GENERATOR, BAD_GENERATOR)

TRAININGS = (*GENERATORS, POLICY)

MODEL, ADAPTER = "model", "adapter"
"""What a training seals: a Hugging Face folder, and with training.lora the adapter that is merged into it."""

STAGES: dict[Method, tuple[str, ...]] = {
    "sso": (PRINCIPLES, RESPONSES, STEERING, GENERATOR, PREFERENCES, POLICY),
    "dual": (PRINCIPLES, RESPONSES, STEERING, GOOD_GENERATOR, BAD_GENERATOR, PREFERENCES, POLICY),
    "pbaa": (PRINCIPLES, RESPONSES, PREFERENCES, POLICY),
    "given": (PREFERENCES, POLICY),
}
"""What a run consists of, by where its pairs come from; `stage_names` adds what measures."""

_ALIGNING = (SELECTION, POLICY, PASSES)


def method_of(recipe: Recipe) -> Method:
    """Where the pairs of a run of this recipe come from."""
    methods: dict[str, Method] = {"none": "pbaa", "single": "sso", "dual": "dual"}
    return methods[recipe.generator.kind]


def is_judged(recipe: Recipe, *, principles: bool) -> bool:
    """Whether the recipe asks for stage 5-quality. principles: the pairs come with those they were sampled under."""
    consistency = recipe.quality.principle_consistency and principles
    judged = recipe.judge.kind not in ("none", "checks") or by_checks(recipe, principles=principles)
    return consistency or judged or bool(recipe.quality.evaluation_files)


def by_checks(recipe: Recipe, *, principles: bool = True) -> bool:
    """Whether code judges the pairs; those made elsewhere have no principles to hold them against."""
    return recipe.judge.kind == "checks" and principles


def stage_names(recipe: Recipe, method: Method, *, aligned: bool = True) -> tuple[str, ...]:
    """The stages of a round, in order. aligned: False for a round that makes its data and aligns no policy on it.

    Those of a shard end with its pairs: what is measured and decided is of all shards together.
    """
    *made, policy = STAGES[method]
    if recipe.queries.shard is not None:
        return tuple(made)
    if recipe.measures_gain and method != "given":
        made.insert(made.index(PREFERENCES), GAIN)
    judged = [QUALITY] if is_judged(recipe, principles=method != "given") else []
    selected = [SELECTION] if recipe.selection.active else []
    answered = [PASSES] if recipe.quality.answers and method != "given" else []
    return tuple(name for name in (*made, *judged, *selected, policy, *answered) if aligned or name not in _ALIGNING)


class StageStatus(TypedDict):
    """How far one stage is."""

    round: int
    name: str
    state: Literal["sealed", "partial", "waiting"]
    wanted: int | None
    kept: int | None
    """Of a partial stage, the finished samples in its journal."""
    dropped: dict[str, int]
    seconds: float | None


class Status(TypedDict):
    """How far a run is."""

    run: str
    stages: list[StageStatus]
    next: str


def status(path: Path) -> Status:
    """How far the run at `path` is; needs no lock. Raises ValueError where there is no run."""
    folder = RunFolder.view(path)
    recipe = load(folder.path / "recipe.yaml")
    method = method_in(folder, recipe)
    stages: list[StageStatus] = []
    for number in range(1, recipe.rounds + 1):
        reason = read_end(folder, number)
        names = stage_names(recipe, method, aligned=reason is None)
        found = [_stage_status(folder.stage(number, name), number) for name in names]
        if reason is not None:  # perhaps before its data was made
            stages += (each for each in found if each["state"] != "waiting")
            return Status(run=str(path), stages=stages, next=f"nothing: {reason}")
        stages += found
    following = next((each for each in stages if each["state"] != "sealed"), None)
    if following is None:
        said = "the run is complete"
        if recipe.queries.share is not None:
            number, of = recipe.queries.share
            said = f"shard {number} of {of} is made; when all are: selfsteer merge RUN... --output RUN"
        return Status(run=str(path), stages=stages, next=f"nothing: {said}")
    verb = "continue" if following["state"] == "partial" else "begin"
    return Status(run=str(path), stages=stages, next=f"{verb} round {following['round']}, {following['name']}")


def method_in(folder: RunFolder, recipe: Recipe) -> Method:
    """Where the pairs of this run come from; those of `selfsteer train` were made elsewhere."""
    if not folder.stage(1, PRINCIPLES).path.is_dir() and folder.stage(1, PREFERENCES).path.is_dir():
        return "given"
    return method_of(recipe)


def _stage_status(stage: Stage, number: int) -> StageStatus:
    manifest = stage.manifest()
    begun = manifest is None and stage.path.is_dir() and any(stage.path.iterdir())
    return StageStatus(
        round=number,
        name=stage.path.name,
        state="sealed" if manifest else "partial" if begun else "waiting",
        wanted=manifest and manifest.wanted,
        kept=manifest.kept if manifest else stage.finished() if begun else None,
        dropped=manifest.dropped if manifest else {},
        seconds=manifest and manifest.seconds,
    )


# --- what ended a run before its time --------------------------------------------------------------------------------------

_ENDED = "ENDED.json"


class _End(NamedTuple):
    """Why a round did not align the policy, with what that was decided on."""

    reason: str
    recipe: str
    data: str


def record_end(folder: RunFolder, number: int, reason: str) -> None:
    """Write down, for whoever asks for the status, that the run ends with this round's data. For the owner of the run."""
    fields = _End(reason, *_decided_on(folder, number))._asdict()
    write(_round(folder, number) / _ENDED, canonical_json({**fields, "sha256": digest(fields)}) + b"\n")


def read_end(folder: RunFolder, number: int) -> str | None:
    """Why the run ended with this round; None where it did not, or the recipe or the data are no longer those."""
    path = _round(folder, number) / _ENDED
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_bytes())
        claimed = fields.pop("sha256")
        end = _End(**fields)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    sound = claimed == digest(fields)
    return end.reason if sound and (end.recipe, end.data) == _decided_on(folder, number) else None


def _round(folder: RunFolder, number: int) -> Path:
    return folder.path / f"round-{number}"


def _decided_on(folder: RunFolder, number: int) -> tuple[str, str]:
    """Digests of the recipe and of what the rounds up to this one have sealed, their trainings left out."""
    recipe = folder.path / "recipe.yaml"
    names = (STEERING, PREFERENCES, QUALITY)
    manifests = [Stage(_round(folder, each) / name).manifest() for each in range(1, number + 1) for name in names]
    return file_digest(recipe), digest([None if each is None else each.digest for each in manifests])
