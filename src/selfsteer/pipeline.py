"""The whole method, in the order of docs/method.md; start reading here.

    query -> principles -> responses -> steering pairs -> data generator -> alignment pairs -> policy -> report

Each line of `run_round` makes one sealed folder of the run; called again, it reuses what is sealed. Left out on purpose: how
anything is done.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from selfsteer.cluster import cluster_of
from selfsteer.data.queries import read_queries
from selfsteer.engines.open import check_engines, prompts_of
from selfsteer.judges.base import RecipeJudge
from selfsteer.judges.find import check_judge, find_judge
from selfsteer.measures.contamination import check_files
from selfsteer.measures.gates import evaluate
from selfsteer.measures.headroom import in_words
from selfsteer.measures.metrics import GateResult, Headroom, Method, Metrics, RoundMetrics, hold_metrics, write_metrics
from selfsteer.models import compute_dtype, pick_device, resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe.gates import before_generator, parse
from selfsteer.recipe.sections import Recipe, dump
from selfsteer.records import Checkpoint, Query
from selfsteer.reports.card import write_model_card
from selfsteer.reports.drawing import cell, table_text
from selfsteer.reports.page import write_page
from selfsteer.reports.reading import reading_of
from selfsteer.reports.tables import gates_table
from selfsteer.stages import summary
from selfsteer.stages.base import ModelCleaned, Round, read_measures
from selfsteer.stages.essentials import check_essentials
from selfsteer.stages.evaluation import check_evaluation, evaluate_run
from selfsteer.stages.gain import gain_stage
from selfsteer.stages.passes import passes_stage, require_answerable
from selfsteer.stages.preferences import preferences_stage
from selfsteer.stages.principles import check_writer, load_pool, principles_stage
from selfsteer.stages.quality import quality_stage, require_checks
from selfsteer.stages.remaining import time_left
from selfsteer.stages.responses import responses_stage
from selfsteer.stages.selection import Candidates, selection_stage
from selfsteer.stages.status import GENERATORS, MODEL, POLICY, STEERING, method_of, record_end, stage_names
from selfsteer.stages.steering import steering_stage
from selfsteer.stages.training import generator_stage, model_of, policy_stage
from selfsteer.store.folder import RunFolder, Stage, day_of, lenders
from selfsteer.training.train import check_optimizer

log = logging.getLogger(__name__)

Made = TypeVar("Made")


def run(recipe: Recipe, *, replace: bool = False, borrow: Sequence[Path] = ()) -> Metrics:
    """Align recipe.policy, or continue where an earlier call with the same output folder stopped.

    replace: give up the pairs and models that other settings made in this folder; without, `WouldReplace` is raised.
    borrow: folders of other runs, whose stages and samples are taken over where they are the same.
    """
    lending = lenders(borrow)
    check_share(recipe, lending)
    recipe = dated(recipe, borrow)
    # What can't begin must leave no trace, and must not touch the folder of an earlier run.
    prepared = prepare(recipe)
    check_engines(recipe, prepared.policy, prepared.prompts)
    check_evaluation(recipe, prepared.judge)
    check_essentials(recipe, prepared.policy, stage_names(recipe, method_of(recipe)))
    if not any(isinstance(item, Query) for item in read_queries(recipe.queries)):
        raise ValueError(f"{recipe.queries.path}: no usable query. Look at the file, or set queries.column in the recipe.")
    with cluster_of(recipe), RunFolder(recipe.output) as folder:
        folder.describe(dump(recipe), summary.session(recipe))
        dtype = str(compute_dtype(recipe.training.dtype, pick_device())).removeprefix("torch.")
        log.info("%s on %s, matrix products in %s", recipe.policy.model, pick_device().type, dtype)
        round = dataclasses.replace(
            first_round(folder, recipe, prepared), replace=replace, lenders=lending, time_left=time_left
        )
        if recipe.queries.shard is not None:
            return run_shard(round)
        while (aligned := run_round(round)) is not None:
            if round.number == recipe.rounds:
                return finish(round, method_of(recipe))
            round = dataclasses.replace(round, number=round.number + 1, policy=aligned)
        return finish(round, method_of(recipe), ended=True)


def training_again(make: Callable[[Round], Made]) -> Callable[[Round], Made]:
    """What `make` makes, where it needs a model that was cleaned after that has been trained again."""

    @functools.wraps(make)
    def made(round: Round) -> Made:
        while True:
            try:
                return make(round)
            except ModelCleaned as needed:
                needed.train_again()

    return made


@training_again
def run_round(round: Round) -> Checkpoint | None:
    """One round of Self-Steering Optimization (arXiv 2410.17131); returns the aligned policy.

    None where what became of the data since the round before ends the rounds (quality.stop_when).
    """
    candidates = make_data(round)
    if not may_align(round, method_of(round.recipe)):
        return None
    aligned = policy_stage(round, selection_stage(round, candidates))
    passes_stage(round, aligned)
    return model_of(aligned)


def run_shard(round: Round) -> Metrics:
    """The pairs of a share of the queries; the run that `merge.py` makes of all shards judges them and aligns the policy."""
    make_data(round)
    metrics = summary.unaligned(round.folder, round.recipe, method_of(round.recipe))
    write_report(round.folder, metrics, round.recipe.seed)
    return metrics


@training_again
def make_data(round: Round) -> Candidates:
    """Steps 1 to 4 of a round: the preference pairs, judged."""
    principles = principles_stage(round)
    require_answerable(round, principles)
    responses = responses_stage(round, principles)
    if round.recipe.generator.kind == "none":  # PBAA, the paper's baseline: the policy's own responses are the pairs
        gain_stage(round, principles, None)
        preferences = preferences_stage(round, principles, responses, None, None)
        return Candidates(preferences, quality_stage(round, preferences))
    steering = steering_stage(round, responses)
    hold_headroom(round, steering)
    generators = generator_stage(round, steering)
    if round.recipe.queries.shard is not None:
        return Candidates(preferences_stage(round, principles, responses, steering, generators))
    gain_stage(round, principles, generators)
    preferences = preferences_stage(round, principles, responses, steering, generators)
    return Candidates(preferences, quality_stage(round, preferences, steering), generators)


def check_share(recipe: Recipe, lending: Sequence[RunFolder]) -> None:
    """Raises ValueError for a shard that would train a generator of its own, as none of these runs has one to lend."""
    share = recipe.queries.share
    if share is None or share.number == 1:
        return
    names = [name for name in stage_names(recipe, method_of(recipe)) if name in GENERATORS]
    folders = [Path(recipe.output), *(folder.path for folder in lending)]
    if not any(all(Stage(folder / "round-1" / name).manifest() for name in names) for folder in folders):
        raise ValueError(
            f"queries.shard: {recipe.queries.shard} takes the generator over from the run of shard 1/{share.of}: name it"
            f" with --borrow RUN, once its {' and '.join(names)} is sealed (selfsteer status RUN)."
        )


def dated(recipe: Recipe, lending: Sequence[Path] = ()) -> Recipe:
    """The recipe with the day that chat templates are told: that on which the run, or the comparison, began.

    What is sampled on one day and trained on the next must stand behind one prompt.
    lending: runs whose day it is, where there is none yet.
    """
    if recipe.policy.date is not None:
        return recipe
    day = day_of(Path(recipe.output), *lending)
    return recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"date": day})})


def hold_headroom(round: Round, steering: Stage) -> None:
    """Say what a generator can win, and hold the gates on it.

    Raises `GateFailed` where one fails and the recipe stops on failure; the policy of the round before is then the result.
    """
    found: Headroom | None = read_measures(steering)["headroom"]
    if found is None:
        return
    log.info("%s", in_words(found))
    gates = list(filter(before_generator, parse(round.recipe.quality.gates)))
    text = complaint(evaluate(gates, RoundMetrics(headroom=found), number=round.number))
    if text is not None:
        stop_or_warn(round, method_of(round.recipe), f"{text}\n{in_words(found)}", "the generator is trained", STEERING)


class Prepared(NamedTuple):
    """What a recipe names, found: once for a run, whatever its stages ask."""

    policy: Checkpoint
    judge: RecipeJudge | None
    prompts: Prompts
    """Of the policy; training leaves its tokenizer as it is, so they are those of all rounds."""


def prepare(recipe: Recipe, *, principles: bool = True) -> Prepared:
    """Raises ValueError, before anything is written, for a model, a judge, a template or a file that is not there.

    principles: the pairs will come with the principles they were sampled under.
    """
    check_optimizer(recipe.training.optimizer)
    policy = resolve(recipe.policy)
    prompts = prompts_of(recipe.policy, policy)
    if principles:
        load_pool(recipe.principles)
        check_writer(recipe)
    require_checks(recipe, principles=principles)
    known = {recipe.policy.model: policy} if recipe.policy.revision is None else {}
    judge = find_judge(recipe.judge, recipe.policy, known)
    if judge is not None:
        check_judge(judge)
    check_files([Path(file) for file in recipe.quality.evaluation_files])
    return Prepared(policy, judge, prompts)


def first_round(folder: RunFolder, recipe: Recipe, prepared: Prepared) -> Round:
    """The first round of a run."""
    policy, judge, prompts = prepared
    return Round(number=1, folder=folder, recipe=recipe, policy=policy, first=policy, prompts=prompts, judge=judge)


def may_align(round: Round, method: Method) -> bool:
    """Whether the recipe lets this round's data align the policy; False where it ends the rounds.

    Raises `GateFailed` for data that fails a gate, where the recipe stops on failure; the policy of the round before is then
    the result.
    """
    section = round.recipe.quality
    if not section.gates and not (section.stop_when and round.number > 1):
        return True
    found = summary.round_metrics(round.folder, round.recipe, method, unaligned=round.number)[-1]
    text = complaint(found.get("gates", []))
    if text is not None:
        stop_or_warn(round, method, text, "the policy is aligned on these pairs")
    holding = [each.name for each in found.get("stop_when", []) if each.passed]
    if holding:
        log.warning("the rounds end: %s", ", ".join(holding))
    return not holding


def stop_or_warn(round: Round, method: Method, complaint: str, otherwise: str, until: str | None = None) -> None:
    """After a failed gate: raises `GateFailed`, the run finished, or says what is done all the same, as the recipe wants.

    until: as of `finish`.
    """
    if round.recipe.quality.on_failure == "stop":
        finish(round, method, ended=True, until=until)
        raise GateFailed(complaint)
    log.warning("%s\nquality.on_failure is warn: %s all the same.", complaint, otherwise)


def write_report(folder: RunFolder, metrics: Metrics, seed: int) -> None:
    """Write metrics.json and report.html; the page, which reads pairs, only where it is missing or the metrics are new."""
    page, numbers = folder.path / "report.html", folder.path / "metrics.json"
    if not hold_metrics(numbers, metrics):
        page.unlink(missing_ok=True)  # first: a page of other numbers would count as theirs after a kill
        write_metrics(numbers, metrics)
    if not page.exists():
        write_page(page, metrics, reading_of(folder, metrics, seed))


def finish(last: Round, method: Method, *, ended: bool = False, until: str | None = None) -> Metrics:
    """Write metrics.json, report.html and the model card from the sealed stages.

    last: the last round. ended: it did not align the policy. until: the stage that it ended with, before its data was made.
    """
    folder, recipe, reason = last.folder, last.recipe, None
    rounds = summary.round_metrics(folder, recipe, method, unaligned=last.number if ended else None, until=until)
    if ended:
        reason = why_not_aligned(rounds[-1], number=last.number, gates_stop=recipe.quality.on_failure == "stop")
        assert reason is not None, "a round ends without alignment for a reason"
        record_end(folder, last.number, reason)
    metrics = summary.metrics(folder, recipe, rounds, ended=reason)
    run = metrics["run"]
    if recipe.evaluation.tasks and "policy_round" in run:
        aligned = model_of(folder.stage(run["policy_round"], POLICY))
        metrics["evaluation"] = evaluate_run(recipe, last.first, aligned, last.judge, folder.path / "evaluation")
    write_report(folder, metrics, recipe.seed)
    if "policy_round" in run:
        write_model_card(folder.stage(run["policy_round"], POLICY).path / MODEL, metrics, recipe, method)
    return metrics


class GateFailed(ValueError):
    """The data of a round fails its gates; the message is the table of those that failed."""


def complaint(results: Sequence[GateResult]) -> str | None:
    """The table of the gates that failed, as text; None where none did."""
    failed = [result for result in results if not result.passed]
    return table_text(gates_table(failed, title=f"{len(failed)} of {len(results)} gates failed")) if failed else None


def why_not_aligned(metrics: RoundMetrics, *, number: int, gates_stop: bool) -> str | None:
    """Which failed gates, or else which reasons to end the rounds, keep round `number` from its alignment; None for none."""
    gates = metrics.get("gates", []) if gates_stop else []
    failed = [f"{gate.name} {_shown(gate)}{gate.reason}" for gate in gates if not gate.passed]
    holding = [f"{each.name} {_shown(each)}is {each.bound}" for each in metrics.get("stop_when", []) if each.passed]
    found = "; ".join(failed or holding)
    return f"round {number} did not align the policy: {found}" if found else None


def _shown(result: GateResult) -> str:
    shown = cell(result.value, "number").text
    return f"{shown} " if shown else ""
