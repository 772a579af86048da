"""The whole method, in the order of DESIGN section 1; start reading here.

    query -> principles -> responses -> steering pairs -> data generator -> alignment pairs -> policy -> report

Each line of `run_round` makes one sealed folder of the run; called again, it reuses what is sealed. Left out on purpose: how
anything is done.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from selfsteer import summary
from selfsteer.answers import answers_stage, win_verdicts
from selfsteer.cards import CardFacts, Method, judged, write_model_card
from selfsteer.comparison import ArmRun, ComparisonResult, arm_recipe, check_arms, query_values, summarize, write_comparison
from selfsteer.comparison_page import write_comparison_page
from selfsteer.data_stages import preferences_stage, responses_stage
from selfsteer.gates import complaint, require
from selfsteer.given import given_stage, judge_given, measure_given
from selfsteer.judging import check_judge, find_judge, read_judge
from selfsteer.metrics import Measures, Metrics
from selfsteer.models import checkpoint, load_tokenizer, resolve
from selfsteer.page import pick_examples, write_page
from selfsteer.preferences import read_pairs
from selfsteer.principles_stage import principles_stage
from selfsteer.prompts import Prompts
from selfsteer.quality_stage import check_judging, quality_stage, read_verdicts
from selfsteer.queries import read_queries
from selfsteer.ray_cluster import cluster_of
from selfsteer.recipe import Policy, Recipe, dump
from selfsteer.records import Checkpoint, PairRow, Query
from selfsteer.report import write_metrics
from selfsteer.responses import check_engines
from selfsteer.selection_stage import Candidates, selection_stage
from selfsteer.stages import Round, held_out
from selfsteer.steering_stage import steering_stage
from selfsteer.store import RunFolder
from selfsteer.training_stages import MODEL, generator_stage, policy_stage
from selfsteer.verdicts import Verdict

log = logging.getLogger(__name__)

IMPLICIT = "implicit:"
"""Before the name of a trained model that judges by its implicit reward."""


def run(recipe: Recipe) -> Metrics:
    """Align recipe.policy, or continue where an earlier call with the same output folder stopped."""
    # What can't begin must leave no trace, and must not touch the folder of an earlier run.
    policy = resolve(recipe.policy)
    check_engines(recipe, policy, _prompts(recipe, policy))
    check_judging(recipe)
    if not any(isinstance(item, Query) for item in read_queries(recipe.queries)):
        raise ValueError(f"{recipe.queries.path}: no usable query. Look at the file, or set queries.column in the recipe.")
    with cluster_of(recipe), RunFolder(recipe.output) as folder:
        folder.describe(dump(recipe), summary.session())
        round = _round(1, folder, recipe, policy)
        while (aligned := run_round(round)) is not None:
            if round.number == recipe.rounds:
                return _finish(folder, recipe, summary.method_of(recipe))
            round = replace(round, number=round.number + 1, policy=aligned, prompts=_prompts(recipe, aligned))
        return _finish(folder, recipe, summary.method_of(recipe), ended=round.number)


def run_round(round: Round) -> Checkpoint | None:
    """One round of Self-Steering Optimization (arXiv 2410.17131); returns the aligned policy.

    None where what became of the data since the round before ends the rounds (quality.stop_when).
    """
    candidates = make_data(round)
    if not _may_align(round, summary.method_of(round.recipe)):
        return None
    return checkpoint(policy_stage(round, selection_stage(round, candidates)).path / MODEL)


def make_data(round: Round) -> Candidates:
    """Steps 1 to 4 of a round: the preference pairs, judged."""
    principles = principles_stage(round)
    responses = responses_stage(round, principles)
    if round.recipe.generator.kind == "none":  # PBAA, the paper's baseline: the policy's own responses are the pairs
        preferences = preferences_stage(round, principles, responses, None)
        return Candidates(preferences, quality_stage(round, preferences))
    steering = steering_stage(round, responses)
    generators = generator_stage(round, steering)
    preferences = preferences_stage(round, principles, responses, generators)
    return Candidates(preferences, quality_stage(round, preferences, steering), generators)


def train_pairs(pairs: Path, recipe: Recipe) -> Metrics:
    """Step 5 on its own: align recipe.policy, once, on a preference dataset made elsewhere."""
    recipe = recipe.model_copy(update={"rounds": 1})
    if recipe.selection.active and recipe.selection.by == "generator":
        raise ValueError("selection.by: generator, but these pairs come without one; set selection.by=judge")
    policy = resolve(recipe.policy)
    _prompts(recipe, policy)
    check_judging(recipe)
    next(read_pairs(pairs), None)
    with cluster_of(recipe), RunFolder(recipe.output) as folder:
        folder.describe(dump(recipe), summary.session())
        round = _round(1, folder, recipe, policy)
        preferences = given_stage(round, pairs)
        candidates = Candidates(preferences, quality_stage(round, preferences, principles=False))
        _may_align(round, "given")
        policy_stage(round, selection_stage(round, candidates))
        return _finish(folder, recipe, "given")


def compare(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> ComparisonResult:
    """Every arm under every seed, in run folders below recipe.output that lend each other what they have in common."""
    check_arms(recipe, arms, seeds)
    policy = resolve(recipe.policy)
    check_engines(recipe, policy, _prompts(recipe, policy))
    check_judging(recipe)
    runs: dict[str, list[ArmRun]] = {name: [] for name in arms}
    finished: list[RunFolder] = []
    with cluster_of(recipe), RunFolder(recipe.output) as owned:
        for seed in seeds:
            for name in arms:
                if name != "base":
                    log.info("arm %s, seed %d", name, seed)
                    arm = arm_recipe(recipe, name, seed)
                    runs[name].append(_run_arm(name, arm, policy, tuple(finished)))
                    finished.append(RunFolder(arm.output))
        result = summarize(recipe, runs, seeds)
        write_comparison(owned.path, result)
        write_comparison_page(owned.path)
    return result


def _run_arm(name: str, recipe: Recipe, policy: Checkpoint, lenders: tuple[RunFolder, ...]) -> ArmRun:
    """The data of one arm and, where the recipe says so, a policy aligned on it; its measures on the held-out queries."""
    with RunFolder(recipe.output) as folder:
        folder.describe(dump(recipe), summary.session())
        round = replace(_round(1, folder, recipe, policy), lenders=lenders, held_out_only=not recipe.compare.align)
        method = "given" if name == "given" else summary.method_of(recipe)
        if method == "given":
            preferences = given_stage(round, Path(cast(str, recipe.compare.given)))
            quality = quality_stage(round, preferences, principles=False)
        else:
            preferences, quality, _ = make_data(round)
        wins: list[Verdict] = []
        if recipe.compare.align:
            aligned = policy_stage(round, preferences)
            answers = None if method == "given" else answers_stage(round, folder.stage(1, "1-principles"), aligned)
            wins = [] if answers is None else win_verdicts(answers)
            metrics = _finish(folder, recipe, method)
        else:
            metrics = summary.unaligned(folder, recipe, method, 1)
            _write_report(folder, metrics, recipe.seed)
        rows = cast("Iterator[PairRow]", preferences.rows())
        verdicts = {} if quality is None else read_verdicts(quality)
        values = query_values(rows, verdicts.get("pbaa" if method == "pbaa" else "alignment", {}), held_out(round))
        return ArmRun(values, metrics["rounds"][0], wins)


def measure_pairs(pairs: Path, policy: str, judge: str | None = None) -> Measures:
    """On-policy probability, margins, lengths and overlap of any preference dataset, under the model that policy names.

    judge: who judges the pairs, too. An LLM or a reward model, which of the two its configuration says; a YAML file with a
    judge's section, as in a recipe; or "implicit:MODEL", a model trained from the policy, by its implicit reward.
    """
    trained = judge.removeprefix(IMPLICIT) if judge is not None and judge.startswith(IMPLICIT) else None
    found = None if judge is None or trained is not None else find_judge(read_judge(judge), Policy(model=policy))
    if found is not None:
        check_judge(found)
    measures = measure_given(pairs, policy, trained)
    if found is not None:
        measures["judge"] = judge_given(pairs, found, Policy(model=policy))
    return measures


def _round(number: int, folder: RunFolder, recipe: Recipe, policy: Checkpoint) -> Round:
    return Round(number=number, folder=folder, recipe=recipe, policy=policy, first=policy, prompts=_prompts(recipe, policy))


def _prompts(recipe: Recipe, policy: Checkpoint) -> Prompts:
    """How this policy's prompts are rendered. Raises ValueError for a chat template that is missing or can't be read."""
    tokenizer = load_tokenizer(
        policy.path, chat_template=recipe.policy.chat_template, trust_remote_code=recipe.policy.trust_remote_code
    )
    return Prompts(tokenizer, system_role=recipe.policy.system_role)


def _may_align(round: Round, method: Method) -> bool:
    """Whether the recipe lets this round's data align the policy; False where it ends the rounds.

    Raises `GateFailed` for data that fails a gate, where the recipe stops on failure; the policy of the round before is then
    the result.
    """
    section = round.recipe.quality
    if not section.gates and not (section.stop_when and round.number > 1):
        return True
    metrics = summary.unaligned(round.folder, round.recipe, method, round.number)
    results = metrics["rounds"][-1].get("gates", [])
    text = complaint(results)
    if text is not None and section.on_failure == "warn":
        log.warning("%s\nquality.on_failure is warn: the policy is aligned on these pairs all the same.", text)
    elif text is not None:
        _finish(round.folder, round.recipe, method, ended=round.number)
        require(results)
    holding = [each.name for each in metrics["rounds"][-1].get("stop_when", []) if each.passed]
    if holding:
        log.warning("the rounds end: %s", ", ".join(holding))
    return not holding


def _write_report(folder: RunFolder, metrics: Metrics, seed: int) -> None:
    """Write metrics.json and report.html."""
    write_metrics(folder.path / "metrics.json", metrics)
    pairs = cast("Iterator[PairRow]", folder.stage(len(metrics["rounds"]), "5-preferences").rows())
    write_page(folder.path / "report.html", metrics, pick_examples(pairs, seed=seed))


def _finish(folder: RunFolder, recipe: Recipe, method: Method, *, ended: int | None = None) -> Metrics:
    """Write metrics.json, report.html and the model card from the sealed stages.

    ended: the round that made its data and did not align the policy on it.
    """
    metrics = summary.metrics(folder, recipe, method, ended=ended)
    _write_report(folder, metrics, recipe.seed)
    run = metrics["run"]
    if "policy_round" not in run:
        return metrics
    facts = CardFacts(
        name=folder.path.name,
        base_model=recipe.policy.model,
        method=method,
        recipe=dump(recipe),
        judged=judged(recipe, method),
        rounds=metrics["rounds"],
    )
    if recipe.rounds > 1:
        facts["result"] = f"This is the policy of round {run['policy_round']} of {recipe.rounds}."
        if "ended" in run:
            facts["result"] += f" The rounds ended there, because {run['ended']}."
    write_model_card(folder.stage(run["policy_round"], "6-policy").path / MODEL, facts)
    return metrics
