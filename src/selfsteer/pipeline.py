"""The whole method, in the order of DESIGN section 1; start reading here.

    query -> principles -> responses -> steering pairs -> data generator -> alignment pairs -> policy -> report

Each line of `run_round` makes one sealed folder of the run; called again, it reuses what is sealed. Left out on purpose: how
anything is done.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from selfsteer.cluster import cluster_of
from selfsteer.data.queries import read_queries
from selfsteer.engines.open import check_engines
from selfsteer.measures.metrics import GateResult, Method, Metrics
from selfsteer.models import checkpoint, load_tokenizer, resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Recipe, dump
from selfsteer.records import Checkpoint, Query
from selfsteer.report.card import CardFacts, judged, write_model_card
from selfsteer.report.page import pick_examples, write_page
from selfsteer.report.tables import gates_table, table_text, write_metrics
from selfsteer.stages import summary
from selfsteer.stages.base import Round
from selfsteer.stages.passes import PASSES, passes_stage
from selfsteer.stages.preferences import preferences_stage
from selfsteer.stages.principles import principles_stage
from selfsteer.stages.quality import check_judging, quality_stage
from selfsteer.stages.responses import responses_stage
from selfsteer.stages.selection import Candidates, selection_stage
from selfsteer.stages.steering import steering_stage
from selfsteer.stages.training import MODEL, generator_stage, policy_stage
from selfsteer.store import columns
from selfsteer.store.folder import RunFolder

log = logging.getLogger(__name__)


def run(recipe: Recipe) -> Metrics:
    """Align recipe.policy, or continue where an earlier call with the same output folder stopped."""
    # What can't begin must leave no trace, and must not touch the folder of an earlier run.
    policy = resolve(recipe.policy)
    check_engines(recipe, policy, prompts_of(recipe, policy))
    check_judging(recipe)
    if not any(isinstance(item, Query) for item in read_queries(recipe.queries)):
        raise ValueError(f"{recipe.queries.path}: no usable query. Look at the file, or set queries.column in the recipe.")
    with cluster_of(recipe), RunFolder(recipe.output) as folder:
        folder.describe(dump(recipe), summary.session())
        round = first_round(folder, recipe, policy)
        while (aligned := run_round(round)) is not None:
            if round.number == recipe.rounds:
                return finish(folder, recipe, summary.method_of(recipe))
            round = replace(round, number=round.number + 1, policy=aligned, prompts=prompts_of(recipe, aligned))
        return finish(folder, recipe, summary.method_of(recipe), ended=round.number)


def run_round(round: Round) -> Checkpoint | None:
    """One round of Self-Steering Optimization (arXiv 2410.17131); returns the aligned policy.

    None where what became of the data since the round before ends the rounds (quality.stop_when).
    """
    candidates = make_data(round)
    if not may_align(round, summary.method_of(round.recipe)):
        return None
    aligned = policy_stage(round, selection_stage(round, candidates))
    passes_stage(round, aligned)
    return checkpoint(aligned.path / MODEL)


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


def first_round(folder: RunFolder, recipe: Recipe, policy: Checkpoint) -> Round:
    """The first round of a run."""
    prompts = prompts_of(recipe, policy)
    return Round(number=1, folder=folder, recipe=recipe, policy=policy, first=policy, prompts=prompts)


def prompts_of(recipe: Recipe, policy: Checkpoint) -> Prompts:
    """How this policy's prompts are rendered. Raises ValueError for a chat template that is missing or can't be read."""
    tokenizer = load_tokenizer(
        policy.path, chat_template=recipe.policy.chat_template, trust_remote_code=recipe.policy.trust_remote_code
    )
    return Prompts(tokenizer, system_role=recipe.policy.system_role)


def may_align(round: Round, method: Method) -> bool:
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
        finish(round.folder, round.recipe, method, ended=round.number)
        require(results)
    holding = [each.name for each in metrics["rounds"][-1].get("stop_when", []) if each.passed]
    if holding:
        log.warning("the rounds end: %s", ", ".join(holding))
    return not holding


def write_report(folder: RunFolder, metrics: Metrics, seed: int) -> None:
    """Write metrics.json and report.html."""
    write_metrics(folder.path / "metrics.json", metrics)
    pairs = map(columns.pair, folder.stage(len(metrics["rounds"]), "5-preferences").rows())
    answers = folder.stage(len(metrics["rounds"]), PASSES) if "answers" in metrics["rounds"][-1] else None
    read = [] if answers is None else pick_examples(answers.rows(), seed=seed)
    write_page(folder.path / "report.html", metrics, pick_examples(pairs, seed=seed), read)


def finish(folder: RunFolder, recipe: Recipe, method: Method, *, ended: int | None = None) -> Metrics:
    """Write metrics.json, report.html and the model card from the sealed stages.

    ended: the round that made its data and did not align the policy on it.
    """
    metrics = summary.metrics(folder, recipe, method, ended=ended)
    write_report(folder, metrics, recipe.seed)
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


class GateFailed(ValueError):
    """The data of a round fails its gates; the message is the table of those that failed."""


def complaint(results: Sequence[GateResult]) -> str | None:
    """The table of the gates that failed, as text; None where none did."""
    failed = [result for result in results if not result.passed]
    return table_text(gates_table(failed, title=f"{len(failed)} of {len(results)} gates failed")) if failed else None


def require(results: Sequence[GateResult]) -> None:
    """Raise `GateFailed` unless every gate passed."""
    text = complaint(results)
    if text is not None:
        raise GateFailed(text)
