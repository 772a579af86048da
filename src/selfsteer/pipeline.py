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
from selfsteer.cards import CardFacts, Method, write_model_card
from selfsteer.comparison import ArmRun, ComparisonResult, arm_recipe, check_arms, query_values, summarize, write_comparison
from selfsteer.data_stages import preferences_stage, principles_stage, responses_stage, steering_stage
from selfsteer.gates import complaint, require
from selfsteer.given import given_stage, judge_given, measure_given
from selfsteer.metrics import Measures, Metrics
from selfsteer.models import checkpoint, load_tokenizer, resolve
from selfsteer.page import pick_examples, write_page
from selfsteer.preferences import read_pairs
from selfsteer.prompts import Prompts
from selfsteer.quality_stage import QUALITY, check_judging, quality_stage, read_verdicts
from selfsteer.queries import read_queries
from selfsteer.ray_cluster import cluster_of
from selfsteer.recipe import Policy, Recipe, dump
from selfsteer.recipe_judge import find_judge, guess_judge
from selfsteer.records import Checkpoint, PairRow, Query
from selfsteer.report import write_metrics
from selfsteer.responses import check_engines
from selfsteer.stages import Round, held_out
from selfsteer.store import RunFolder, Stage
from selfsteer.training_stages import MODEL, generator_stage, policy_stage
from selfsteer.verdicts import Verdict

log = logging.getLogger(__name__)


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
        for number in range(1, recipe.rounds + 1):
            policy = run_round(_round(number, folder, recipe, policy))
        return _finish(folder, recipe, summary.method_of(recipe))


def run_round(round: Round) -> Checkpoint:
    """One round of Self-Steering Optimization (arXiv 2410.17131); returns the aligned policy."""
    preferences = make_data(round)
    _hold_gates(round, summary.method_of(round.recipe))
    return checkpoint(policy_stage(round, preferences).path / MODEL)


def make_data(round: Round) -> Stage:
    """Steps 1 to 4 of a round: the preference pairs, judged."""
    principles = principles_stage(round)
    responses = responses_stage(round, principles)
    if round.recipe.generator.kind == "none":  # PBAA, the paper's baseline: the policy's own responses are the pairs
        preferences = preferences_stage(round, principles, responses, None)
        quality_stage(round, preferences)
        return preferences
    steering = steering_stage(round, responses)
    generators = generator_stage(round, steering)
    preferences = preferences_stage(round, principles, responses, generators)
    quality_stage(round, preferences, steering)
    return preferences


def train_pairs(pairs: Path, recipe: Recipe) -> Metrics:
    """Step 5 on its own: align recipe.policy on a preference dataset made elsewhere."""
    policy = resolve(recipe.policy)
    _prompts(recipe, policy)
    check_judging(recipe)
    next(read_pairs(pairs), None)
    with cluster_of(recipe), RunFolder(recipe.output) as folder:
        folder.describe(dump(recipe), summary.session())
        round = _round(1, folder, recipe, policy)
        preferences = given_stage(round, pairs)
        quality_stage(round, preferences, principles=False)
        _hold_gates(round, "given")
        policy_stage(round, preferences)
        return _finish(folder, recipe, "given")


def compare(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> ComparisonResult:
    """Every arm under every seed, in run folders below recipe.output that lend each other what they have in common."""
    check_arms(recipe, arms, seeds)
    policy = resolve(recipe.policy)
    _prompts(recipe, policy)
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
            preferences = make_data(round)
            quality = folder.stage(1, QUALITY)
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
        verdicts = {} if quality is None or quality.manifest() is None else read_verdicts(quality)
        values = query_values(rows, verdicts.get("pbaa" if method == "pbaa" else "alignment", {}), held_out(round))
        return ArmRun(values, metrics["rounds"][0], wins)


def measure_pairs(pairs: Path, policy: str, judge: str | None = None) -> Measures:
    """On-policy probability, margins, lengths and overlap of any preference dataset, under the model that policy names.

    judge: a model that judges the pairs, too: an LLM, or a reward model by its configuration.
    """
    found = None if judge is None else find_judge(guess_judge(judge), Policy(model=policy))
    measures = measure_given(pairs, policy)
    if found is not None:
        measures["judge"] = judge_given(pairs, found, Policy(model=policy))
    return measures


def _round(number: int, folder: RunFolder, recipe: Recipe, policy: Checkpoint) -> Round:
    return Round(number=number, folder=folder, recipe=recipe, policy=policy, prompts=_prompts(recipe, policy))


def _prompts(recipe: Recipe, policy: Checkpoint) -> Prompts:
    """How this policy's prompts are rendered. Raises ValueError for a chat template that is missing or can't be read."""
    tokenizer = load_tokenizer(
        policy.path, chat_template=recipe.policy.chat_template, trust_remote_code=recipe.policy.trust_remote_code
    )
    return Prompts(tokenizer, system_role=recipe.policy.system_role)


def _hold_gates(round: Round, method: Method) -> None:
    """Compare the data of a round with the recipe's gates. Raises `GateFailed` where the recipe stops on failure."""
    section = round.recipe.quality
    if not section.gates:
        return
    metrics = summary.unaligned(round.folder, round.recipe, method, round.number)
    results = metrics["rounds"][-1].get("gates", [])
    text = complaint(results)
    if text is None:
        return
    if section.on_failure == "warn":
        log.warning("%s\nquality.on_failure is warn: the policy is aligned on these pairs all the same.", text)
        return
    _write_report(round.folder, metrics, round.recipe.seed)
    require(results)


def _write_report(folder: RunFolder, metrics: Metrics, seed: int) -> None:
    """Write metrics.json and report.html."""
    write_metrics(folder.path / "metrics.json", metrics)
    pairs = cast("Iterator[PairRow]", folder.stage(len(metrics["rounds"]), "5-preferences").rows())
    write_page(folder.path / "report.html", metrics, pick_examples(pairs, seed=seed))


def _finish(folder: RunFolder, recipe: Recipe, method: Method) -> Metrics:
    """Write metrics.json, report.html and the model card from the sealed stages."""
    metrics = summary.metrics(folder, recipe, method)
    _write_report(folder, metrics, recipe.seed)
    facts = CardFacts(
        name=folder.path.name,
        base_model=recipe.policy.model,
        method=method,
        recipe=dump(recipe),
        rounds=metrics["rounds"],
    )
    write_model_card(folder.stage(recipe.rounds, "6-policy").path / MODEL, facts)
    return metrics
