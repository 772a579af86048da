"""The two stages that train: the data generator on the steering pairs, the policy on the preference data.

A dual generator is two trainings, each on one half of L_SSO. What they train is sampled as two adapters of one model by
engines that can do that, merged by others; margins are measured on the merged model.

The pairs come with log-probabilities of the policy. They are taken again where the reference is another function: the policy
of the first round, or, with training.lora.quantize, the policy with its weights in 4 bits, on which the adapter is trained.

Left out on purpose: the trainer (`training/`); files are the contract: sealed pairs in, a Hugging Face folder out.
"""

import logging
import shutil
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from selfsteer.measures.displacement import displaced, displacement
from selfsteer.measures.metrics import Displacement, ImplicitReward
from selfsteer.measures.quality import implicit_reward
from selfsteer.models import adapted, checkpoint
from selfsteer.pairs import response_side
from selfsteer.recipe.engines import takes_adapters
from selfsteer.recipe.sections import Alignment, Generator
from selfsteer.records import Checkpoint, Pair
from selfsteer.stages.base import Round, Work, inputs_of, kept, make_stage, policy_scorer, sealed, write_measures
from selfsteer.stages.drawing import draw_queries, held_out, set_aside
from selfsteer.stages.responses import UNRELATED
from selfsteer.stages.status import ADAPTER, BAD_GENERATOR, GENERATOR, GOOD_GENERATOR, MODEL, POLICY, PREFERENCES, RESPONSES
from selfsteer.store import columns
from selfsteer.store.durable import file_digest, make_folder
from selfsteer.store.folder import HISTORY, Contents, Origin, Stage
from selfsteer.training.displacement import Moved
from selfsteer.training.launch import launch
from selfsteer.training.packing import Row
from selfsteer.training.scoring import Group, score_missing, scores, tokenize
from selfsteer.training.train import MECHANICS, TrainingJob, identity_of
from selfsteer.training.trainer import reward_queries

log = logging.getLogger(__name__)

BOUNDING = ("dpop", "bdpo")
"""Losses made against displacement (`training/objective.py`)."""

TRACKED = "runs"
"""Where TensorBoard's events are, in a training's output and then in the stage: transformers names it so."""

_HALVES = {GOOD_GENERATOR: "l_plus", BAD_GENERATOR: "l_minus"}


class Generators(NamedTuple):
    """The stages of the models that answer x+ and x-: one and the same, unless the generator is dual."""

    good: Stage
    bad: Stage


def model_of(stage: Stage) -> Checkpoint:
    """The model that a stage has sealed. Its files were hashed when it was sealed or verified, and are not again."""
    inner = f"{MODEL}/"
    known = {name.removeprefix(inner): each for name, each in sealed(stage).outputs.items() if name.startswith(inner)}
    return checkpoint(stage.path / MODEL, known)


def samplers(round: Round, generators: Generators) -> list[dict[str, Checkpoint]]:
    """What answers x+ ("good") and x- ("bad"); those of a group are one model or adapters of one, and share an engine.

    What was trained is what is sampled: an adapter, where the engine takes any, and not the model that it is merged into,
    which half precision may round away. The digest is that of the adapter in both cases: a run may go on with the other.
    """
    together = takes_adapters(round.recipe.engine)

    def trained(role: str, stage: Stage) -> Checkpoint:
        if round.recipe.training.lora is None:
            return model_of(stage)
        model = adapted(round.policy, role, stage.path / ADAPTER)
        return model if together else Checkpoint(path=str(stage.path / MODEL), digest=model.digest)

    if generators.good == generators.bad:
        return [dict.fromkeys(generators._fields, trained("generator", generators.good))]
    both = {role: trained(role, stage) for role, stage in generators._asdict().items()}
    return [both] if together else [{role: model} for role, model in both.items()]


def generator_stage(round: Round, steering: Stage) -> Generators:
    """Step 3: a copy of the policy trained with L_SSO, or two, each with one half of it."""
    section = round.recipe.generator
    if section.kind == "dual":
        return Generators(
            good=_training_stage(round, GOOD_GENERATOR, steering, section),
            bad=_training_stage(round, BAD_GENERATOR, steering, section),
        )
    single = _training_stage(round, GENERATOR, steering, section)
    return Generators(good=single, bad=single)


def policy_stage(round: Round, preferences: Stage) -> Stage:
    """Step 5: the policy itself trained on the preference data."""
    return _training_stage(round, POLICY, preferences, round.recipe.alignment)


def _training_stage(round: Round, name: str, pairs: Stage, section: Generator | Alignment) -> Stage:
    settings: dict[str, Any] = {
        "objective": section.model_dump(exclude={"kind", "objective", "queries", "temperature", "reference", "weighting"}),
        "training": identity_of(round.recipe.training, MECHANICS - {"save_dtype"}),
        "seed": round.recipe.seed,
    }
    if name == POLICY and round.recipe.queries.holdout:
        settings["holdout"] = round.recipe.queries.holdout
    elif name == POLICY and (aside := set_aside(round)):
        settings["aside"] = len(aside)
    if name in _HALVES:
        settings |= {"half": _HALVES[name], "adapter": True}  # adapter: not there in folders of earlier versions
    inputs = inputs_of(round, pairs=pairs)
    if isinstance(section, Alignment):
        if section.weighting != "none":
            settings["weighting"] = section.weighting
        if section.reference == "first" and round.first.digest != round.policy.digest:
            inputs["reference"] = round.first.digest
    origin = Origin(settings=settings, inputs=inputs)
    stage = make_stage(round, name, origin, lambda work: _train(round, work, pairs, section))
    for unfinished in stage.path.glob("training-*"):  # only now: a kill before the seal goes on from its last checkpoint
        shutil.rmtree(unfinished)
    return stage


def _lessons(round: Round, work: Work, pairs: Stage, *, of: Collection[str] | None = None) -> Iterator[Pair]:
    """The pairs that this stage trains on: all of them, or a generator's half, and none that is held out.

    of: only those of these queries.
    """
    half = _HALVES.get(work.stage.path.name)
    spared = _spared(round, work)
    every_pair = map(columns.pair, pairs.rows(of=of))
    return (pair for pair in every_pair if (half is None or pair.kind == half) and pair.query_id not in spared)


def _spared(round: Round, work: Work) -> frozenset[str]:
    """The queries that must not align the policy; the generator's pairs are of none of them."""
    return held_out(round) | set_aside(round) if work.stage.path.name == POLICY else frozenset()


def _unrelated(round: Round) -> tuple[Row, ...]:
    """The policy's answers to the bare queries that are set aside; of pairs made elsewhere, their chosen ones."""
    aside, prompts = set_aside(round), round.prompts
    if not aside:
        return ()
    if not round.folder.has_stage(round.number, RESPONSES):
        preferences = map(columns.pair, round.folder.stage(round.number, PREFERENCES).rows())
        of_query = {pair.query_id: pair for pair in preferences if pair.query_id in aside}
        tokens = [tokenize(pair, prompts) for pair in of_query.values()]
        return tuple(Row(each.prompt, (each.chosen,)) for each in tokens)
    rows: list[Row] = []
    for row in columns.file_rows(round.folder.stage(round.number, RESPONSES).path / UNRELATED):
        query, answer = columns.query(row), columns.response(row["original"])
        completion = prompts.response_ids(response_side(answer), query.messages)
        if completion:
            rows.append(Row(prompts.prompt_ids(query.messages), (completion,)))
    return tuple(rows)


def _anchored(round: Round, work: Work, pairs: Stage) -> Iterator[Pair]:
    """The same with the log-probabilities of the reference: of this round or of the first, held as the training holds it."""
    reference = round.first if "reference" in work.origin.inputs else round.policy
    scorer = policy_scorer(round)._replace(model=reference, quantize=round.recipe.training.quantize)

    def groups() -> Iterator[Group]:
        return scorer.by_query(_lessons(round, work, pairs))

    score_missing(scorer, groups(), work.journal, description="log-probabilities of the reference", total=kept(pairs))
    for group in groups():
        yield from scores(work.journal, group)


def _train(round: Round, work: Work, pairs: Stage, section: Generator | Alignment) -> Contents:
    unfinished = work.stage.path / f"training-{work.origin.fingerprint[:12]}"
    for stale in work.stage.path.glob("training-*"):
        if stale != unfinished:
            shutil.rmtree(stale)
    data, queries = pairs.path / "data.parquet", kept(pairs)
    anchored = "reference" in work.origin.inputs or round.recipe.training.quantize is not None
    if anchored or {"half", "holdout", "aside"} & work.origin.settings.keys():
        make_folder(unfinished)
        data = unfinished / "pairs.parquet"
        if not data.is_file():  # checkpoints know it by its bytes, which another pyarrow writes otherwise
            lessons = _anchored(round, work, pairs) if anchored else _lessons(round, work, pairs)
            columns.write_rows(data, map(columns.pair_row, lessons), columns.PAIRS)
        queries = columns.count(data)
        if queries == 0:
            raise ValueError(f"{work.stage.path}: every pair is held out; lower queries.holdout.")
    job = TrainingJob(
        policy=round.recipe.policy.model_copy(update={"model": round.policy.path}),
        pairs=str(data),
        output=str(unfinished),
        training=round.recipe.training,
        seed=round.recipe.seed,
        unrelated=_unrelated(round),
        **section.model_dump(include=set(TrainingJob.__dataclass_fields__)),  # loss, beta, rates, batches
    )
    result = launch(job, round.recipe.launcher)
    folders = (MODEL,) if round.recipe.training.lora is None else (MODEL, ADAPTER)
    for name in folders:
        shutil.rmtree(work.stage.path / name, ignore_errors=True)
        (unfinished / name).rename(work.stage.path / name)
    shutil.copyfile(unfinished / HISTORY, work.stage.path / HISTORY)
    if (unfinished / TRACKED).is_dir():
        shutil.copytree(unfinished / TRACKED, work.stage.path / TRACKED, dirs_exist_ok=True)
    known = {file.name: file_digest(file) for file in (work.stage.path / MODEL).iterdir() if file.is_file()}
    trained = checkpoint(work.stage.path / MODEL, known)
    reward = _what_training_did(round, work, pairs, trained, section.beta, queries)
    found: dict[str, object] = {"steps": result.steps, "reward": reward, "saving": result.saving}
    if result.moved is not None:
        found["displacement"] = _displacement(work, section.loss, result.moved, result.crossed)
    measures = write_measures(work.stage, found)
    return Contents(
        wanted=queries,
        files=(*folders, HISTORY, measures),
        known={f"{MODEL}/{name}": each for name, each in known.items()},
    )


def _displacement(work: Work, loss: str, moved: Moved, crossed: int | None) -> Displacement:
    found = displacement(moved)
    if crossed is not None:
        found["crossed"] = crossed
    if (warning := displaced(found)) is not None:
        other = "" if loss in BOUNDING else f", or take a loss that bounds it ({', '.join(BOUNDING)})"
        log.warning("%s: %s. Lower the learning rate or train less%s; docs/quality.md", work.stage.path.name, warning, other)
    return found


def _what_training_did(
    round: Round, work: Work, pairs: Stage, trained: Checkpoint, beta: float, queries: int
) -> ImplicitReward:
    """Margins and accuracy of the training pairs before and after, on some of the queries, at most quality.sample.

    Rewards are against the policy at the round's start, whatever reference the loss had.
    """
    count = reward_queries(queries, round.recipe.quality.sample)
    drawn = draw_queries(round, pairs, count, without=_spared(round, work))
    scorer = policy_scorer(round)._replace(model=trained)

    def groups() -> Iterator[Group]:
        return scorer.by_query(_lessons(round, work, pairs, of=drawn))

    total = kept(pairs) if drawn is None else len(drawn)
    score_missing(scorer, groups(), work.journal, description="margins after training", total=total)
    before = (pair for group in groups() for pair in group.pairs)
    after = (pair for group in groups() for pair in scores(work.journal, group))
    return implicit_reward(before, after, beta=beta)
