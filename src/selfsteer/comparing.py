"""Ways of making preference data, side by side: the paper's Tables 3 to 6 and Figure 3 as a command.

Every arm is the recipe with a few settings changed. All answer the same queries with the same seeds; the measures are taken
on the held-out queries alone, which no generator and no policy was trained on, under the policy to be aligned. Differences
are against PBAA, query by query. Over several seeds, queries and seeds are crossed random effects: the interval says what
other queries and other seeds would do. The estimates of each seed stand beside it, with intervals over queries alone.
"""

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from selfsteer.cluster import cluster_of
from selfsteer.engines.open import check_engines
from selfsteer.measures.estimates import Estimate, crossed_estimate, known, mean_estimate
from selfsteer.measures.metrics import Method, RoundMetrics, TrainingSummary
from selfsteer.measures.text import repetition, similarity, words
from selfsteer.measures.verdicts import JudgeReport, Verdict, judge_report, points
from selfsteer.pipeline import Prepared, dated, finish, first_round, make_data, prepare, write_report
from selfsteer.recipe.engines import runs_already
from selfsteer.recipe.sections import Recipe, dump
from selfsteer.recipe.text import Override, apply_override
from selfsteer.records import Pair
from selfsteer.reports.comparison import (
    BASELINE,
    GAINS,
    ArmResult,
    ComparisonResult,
    SeedResult,
    write_comparison,
    write_comparison_page,
)
from selfsteer.stages import summary
from selfsteer.stages.answers import answers_stage
from selfsteer.stages.base import Round
from selfsteer.stages.drawing import held_out
from selfsteer.stages.essentials import check_essentials
from selfsteer.stages.evaluation import check_evaluation
from selfsteer.stages.gain import gain_of_queries
from selfsteer.stages.passes import passes_stage, query_passes
from selfsteer.stages.preferences import given_stage
from selfsteer.stages.quality import JudgeName, quality_stage, read_verdicts
from selfsteer.stages.status import GAIN, PRINCIPLES, method_of, stage_names
from selfsteer.stages.training import policy_stage
from selfsteer.store import columns
from selfsteer.store.folder import RunFolder, Stage, lenders

log = logging.getLogger(__name__)


class Arm(NamedTuple):
    """One way of making preference data."""

    description: str
    changes: Mapping[str, object]
    """What it sets in the recipe, by dotted key."""


_SSO = {"generator.kind": "single", "generator.objective": "sso"}

_LIBRARY = {
    "quality.answers": 0,
    "principles.source": "library",
    "principles.path": None,
    "principles.model": None,
    "principles.engine": None,
}

ARMS: Mapping[str, Arm] = {
    "base": Arm("the policy as it is: what win rates are against", {}),
    "pbaa": Arm("the policy's own responses, no generator", {"generator.kind": "none"}),
    "rlcd": Arm(
        "one fixed pair of principles, no generator (arXiv 2307.12950)",
        {
            **_LIBRARY,
            "generator.kind": "none",
            "principles.qualities": ["helpfulness"],
            "principles.limit": 1,
            "principles.concision": 0.0,
        },
    ),
    "sso": Arm("a generator trained with L_SSO", _SSO),
    "l_plus": Arm("a generator trained with L+ alone", {**_SSO, "generator.objective": "l_plus"}),
    "l_minus": Arm("a generator trained with L- alone", {**_SSO, "generator.objective": "l_minus"}),
    "equation_3": Arm("a generator trained with the obvious L-", {**_SSO, "generator.objective": "equation_3"}),
    "dual": Arm("two generators, one on L+ and one on L-", {**_SSO, "generator.kind": "dual"}),
    "sft_only": Arm(
        "a generator trained by the SFT term alone: what sharpening gains without preferences",
        {**_SSO, "generator.loss": "sft", "generator.sft_weight": 0.0},
    ),
    "sso_greedy": Arm(
        "as sso, y_o the most probable answer, as in the authors' second version of the code",
        {**_SSO, "responses.original.temperature": 0.0},
    ),
    "cooler": Arm(
        "the policy's own responses at compare.cooler: what a lower temperature gains without training",
        {"generator.kind": "none"},
    ),
    "ipo": Arm("as sso, with IPO in both trainings", {**_SSO, "generator.loss": "ipo", "alignment.loss": "ipo"}),
    "weak_principles": Arm(
        "as sso, the principles written by the policy itself",
        {**_SSO, **_LIBRARY, "principles.source": "generate", "principles.qualities": None},
    ),
    "given": Arm("preference data made elsewhere", {}),
}


_SHARED = {"policy", "judge", "output", "seed", "rounds", "compare"}
"""What an arm of one's own can't set: models are found once for all arms, and the comparison names its runs itself."""


def arms_of(recipe: Recipe) -> Mapping[str, Arm]:
    """The arms that there are, and those of the recipe's own."""
    own = {
        name: Arm(", ".join(f"{key}={value}" for key, value in changes.items()), changes)
        for name, changes in recipe.compare.arms.items()
    }
    return {**ARMS, **own}


def arm_recipe(recipe: Recipe, name: str, seed: int) -> Recipe:
    """The recipe of one arm: one round, without gates or selection.

    Raises `RecipeError` where an arm needs what the recipe lacks.
    """
    data = recipe.model_dump(mode="json")
    output = str(Path(recipe.output) / arm_folder(name, seed))
    unused: dict[str, object] = {"quality.gates": {}, "quality.stop_when": {}, "selection": {}}
    common: dict[str, object] = {"output": output, "seed": seed, "rounds": 1, **unused}
    cooler = {"generator.temperature": recipe.compare.cooler} if name == "cooler" else {}
    for key, value in {**common, **arms_of(recipe)[name].changes, **cooler}.items():
        data = apply_override(data, Override(key, value))
    return Recipe.model_validate(data)


def arm_folder(name: str, seed: int) -> str:
    """The name of an arm's run folder."""
    return f"{name}-seed{seed}"


def check_arms(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ValueError, before anything is sampled, for arms that can't be run."""
    if shadowed := sorted(recipe.compare.arms.keys() & ARMS.keys()):
        raise ValueError(f"compare.arms: {', '.join(shadowed)} is an arm already; give yours another name")
    for name, changes in recipe.compare.arms.items():
        for key in changes:
            if key.partition(".")[0] in _SHARED:
                raise ValueError(f"compare.arms: {name} sets {key}, which all arms share; make a comparison of its own")
    known = arms_of(recipe)
    unknown = [name for name in arms if name not in known]
    if unknown:
        raise ValueError(f"there is no arm {', '.join(unknown)}; arms: {', '.join(known)}")
    if len(set(arms)) != len(arms) or len(set(seeds)) != len(seeds):
        raise ValueError("an arm or a seed is named twice")
    if recipe.queries.shard is not None:
        raise ValueError("queries.shard: a comparison is not split over run folders; set shard=null")
    if recipe.queries.holdout == 0:
        raise ValueError(
            "queries.holdout is 0: a comparison is measured on queries that nothing was trained on; set queries.holdout=64"
        )
    if "given" in arms and recipe.compare.given is None:
        raise ValueError('the arm "given" needs compare.given, a file of preference pairs')
    if "cooler" in arms and recipe.compare.cooler >= recipe.of_pairs.temperature:
        raise ValueError(
            f"compare.cooler: {recipe.compare.cooler:g} is not below the temperature of the other arms,"
            f" {recipe.of_pairs.temperature:g}; lower it, or leave out the arm"
        )
    if runs_already(recipe.engine) and recipe.compare.align and recipe.judge.kind != "none":
        raise ValueError(
            "engine: a server that runs already can't hold the policies whose answers are judged. Set engine.serve to the"
            " command that serves a model's folder, or use kind vllm; or set compare.align=false"
        )
    if (Path(recipe.output) / "run.json").exists():
        raise ValueError(f"{recipe.output} holds a run; give the comparison a folder of its own with output=DIR")
    for name in arms:
        arm_recipe(recipe, name, seeds[0])


# --- measures --------------------------------------------------------------------------------------------------------------

Values = dict[str, dict[str, float]]
"""Measure -> query -> value."""


class ArmRun(NamedTuple):
    """One arm under one seed."""

    values: Values
    metrics: RoundMetrics
    wins: Sequence[Verdict]
    """Of the aligned policy over the first one, on the held-out queries."""


def query_values(pairs: Iterator[Pair], verdicts: Mapping[JudgeName, Sequence[Verdict]], only: frozenset[str]) -> Values:
    """Every measure of each held-out query; a query with several pairs counts with their mean."""
    gathered: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        if pair.query_id not in only or not pair.scored:
            continue
        good, bad = pair.chosen.score, pair.rejected.score
        chosen, rejected = math.exp(good.mean_logps), math.exp(bad.mean_logps)
        found = {
            "on_policy_chosen": chosen,
            "on_policy_rejected": rejected,
            "on_policy_all": (chosen + rejected) / 2,
            "margin_per_token": good.mean_logps - bad.mean_logps,
            "length_chosen": float(good.tokens),
            "length_rejected": float(bad.tokens),
            "overlap": similarity(pair.chosen.text, pair.rejected.text),
        }
        repeated = [each for side in (pair.chosen, pair.rejected) if (each := repetition(words(side.text))) is not None]
        if repeated:
            found["repetition"] = _average(repeated)
        for name, value in found.items():
            gathered[name][pair.query_id].append(value)
    judged: dict[JudgeName, str] = {"judge": "accuracy", "principle_consistency": "principle_consistency"}
    for by, name in judged.items():
        for verdict in verdicts.get(by, ()):
            if verdict.query_id in only and verdict.preferred is not None:
                gathered[name][verdict.query_id].append(points(verdict))
    return {name: {query: _average(values) for query, values in each.items()} for name, each in gathered.items()}


def summarize(recipe: Recipe, runs: Mapping[str, Sequence[ArmRun]], seeds: Sequence[int]) -> ComparisonResult:
    """The estimates of all arms, and their differences from PBAA where it is among them."""
    described = arms_of(recipe)
    arms = {name: _arm(described[name], name, each, runs.get(BASELINE) or ()) for name, each in runs.items()}
    if len(seeds) > 1:
        for name, each in runs.items():
            baselines: Sequence[ArmRun | None] = runs.get(BASELINE) or [None] * len(each)
            found = zip(seeds, each, baselines, strict=True) if each else ()
            arms[name]["by_seed"] = {
                str(seed): _seed_result(run, None if name == BASELINE else baseline) for seed, run, baseline in found
            }
    return ComparisonResult(
        baseline=BASELINE, model=recipe.policy.model, seeds=list(seeds), holdout=recipe.queries.holdout, arms=arms
    )


def _arm(arm: Arm, name: str, runs: Sequence[ArmRun], baseline: Sequence[ArmRun]) -> ArmResult:
    result = ArmResult(description=arm.description)
    if not runs:
        return result
    result["queries"] = len({query for run in runs for query in run.values.get("on_policy_all", {})})
    result["measures"] = _crossed([run.values for run in runs])
    result["seconds"] = sum(stage["seconds"] for run in runs for stage in run.metrics.get("stages", {}).values())
    if name != BASELINE and baseline:
        result["difference"] = _crossed([_less(run.values, base.values) for run, base in zip(runs, baseline, strict=True)])
    headroom = [found["all"].mean for run in runs if (found := run.metrics.get("headroom")) is not None]
    if headroom:
        result["headroom"] = _average(headroom)
    for key in ("generator", "bad_generator", "policy"):
        trainings = [found for run in runs if (found := run.metrics.get(key)) is not None]
        if trainings:
            result[key] = _training(trainings)
    if any(run.wins for run in runs):
        result["wins"] = _wins([run.wins for run in runs])
    return result


def _wins(seeds: Sequence[Sequence[Verdict]]) -> JudgeReport:
    """What the judge says of all seeds; its win rate over queries and seeds as crossed random effects."""
    report = judge_report(verdict for verdicts in seeds for verdict in verdicts)
    if len(seeds) == 1:
        return report
    report.pop("accuracy", None)
    judged = [[verdict for verdict in verdicts if verdict.preferred is not None] for verdicts in seeds]
    found = crossed_estimate([{verdict.query_id: points(verdict) for verdict in verdicts} for verdicts in judged])
    if found is not None:
        report["accuracy"] = found
    return report


def _crossed(seeds: Sequence[Values]) -> dict[str, Estimate]:
    """Of every measure that all seeds have."""
    names = [name for name in seeds[0] if all(name in values for values in seeds)]
    return known({name: crossed_estimate([values[name] for values in seeds]) for name in names})


def _less(values: Values, baseline: Values) -> Values:
    """The differences of every query that both have."""
    return {
        measure: {query: value - baseline[measure][query] for query, value in each.items() if query in baseline[measure]}
        for measure, each in values.items()
        if measure in baseline
    }


def _seed_result(run: ArmRun, baseline: ArmRun | None) -> SeedResult:
    result = SeedResult(measures=_means(run.values))
    if baseline is not None:
        result["difference"] = _means(_less(run.values, baseline.values))
    return result


def _means(values: Values) -> dict[str, Estimate]:
    return known({measure: mean_estimate(list(each.values())) for measure, each in values.items()})


def _training(trainings: Sequence[TrainingSummary]) -> dict[str, float]:
    curves = [training.get("curve", []) for training in trainings]
    displacements = [training.get("displacement", {}) for training in trainings]
    moved = [each["unrelated_token"].mean for each in displacements if "unrelated_token" in each]
    return {
        **({"unrelated_token": _average(moved)} if len(moved) == len(trainings) else {}),
        "first": _average([curve[0]["loss"] for curve in curves]),
        "last": _average([curve[-1]["loss"] for curve in curves]),
        "steps": _average([float(len(curve)) for curve in curves]),
        "last_margin": _average([curve[-1]["margin"] for curve in curves]),
    }


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def compare(
    recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], *, replace: bool = False, borrow: Sequence[Path] = ()
) -> ComparisonResult:
    """Every arm under every seed, in run folders below recipe.output that lend each other what they have in common.

    replace, borrow: as of `pipeline.run`; a comparison lends all its runs.
    """
    check_arms(recipe, arms, seeds)
    recipe = dated(recipe, borrow)
    prepared = prepare(recipe)
    check_engines(recipe, prepared.policy, prepared.prompts)
    if recipe.compare.align:
        check_evaluation(recipe, prepared.judge)
    for name in arms:
        if name != "base":
            arm = arm_recipe(recipe, name, seeds[-1])  # the last to be made
            check_essentials(arm, prepared.policy, stage_names(arm, _method(name, arm), aligned=arm.compare.align))
    runs: dict[str, list[ArmRun]] = {name: [] for name in arms}
    finished: list[RunFolder] = list(lenders(borrow))
    with cluster_of(recipe), RunFolder(recipe.output) as owned:
        for seed in seeds:
            for name in arms:
                if name != "base":
                    log.info("arm %s, seed %d", name, seed)
                    arm = arm_recipe(recipe, name, seed)
                    runs[name].append(_run_arm(name, arm, prepared, tuple(finished), replace=replace))
                    finished.append(RunFolder(arm.output))
        result = summarize(recipe, runs, seeds)
        write_comparison(owned.path, result)
        write_comparison_page(owned.path)
    return result


def _method(name: str, arm: Recipe) -> Method:
    return "given" if name == "given" else method_of(arm)


def _run_arm(name: str, recipe: Recipe, prepared: Prepared, lending: tuple[RunFolder, ...], *, replace: bool) -> ArmRun:
    """The data of one arm and, where the recipe says so, a policy aligned on it; its measures on the held-out queries."""
    align, method = recipe.compare.align, _method(name, recipe)
    with RunFolder(recipe.output) as folder:
        folder.describe(dump(recipe), summary.session(recipe))
        round = dataclasses.replace(
            first_round(folder, recipe, prepared),
            lenders=lending,
            held_out_only=not align,
            replace=replace,
            within=folder.path.parent,
        )
        if method == "given":
            preferences = given_stage(round, Path(cast(str, recipe.compare.given)))
            quality = quality_stage(round, preferences, principles=False)
        else:
            preferences, quality, _ = make_data(round)
        more: Values = {}
        wins: Sequence[Verdict] = ()
        if align:
            more, wins = _answered(round, policy_stage(round, preferences), method)
            metrics = finish(round, method)
        else:
            metrics = summary.unaligned(folder, recipe, method)
            write_report(folder, metrics, recipe.seed)
        pairs = map(columns.pair, preferences.rows())
        verdicts = {} if quality is None else read_verdicts(quality)
        values = query_values(pairs, verdicts.get("pbaa" if method == "pbaa" else "alignment", {}), held_out(round))
        if folder.has_stage(1, GAIN):
            more |= {GAINS[change]: each for change, each in gain_of_queries(folder.stage(1, GAIN)).items()}
        return ArmRun(values | more, metrics["rounds"][0], wins)


def _answered(round: Round, aligned: Stage, method: Method) -> tuple[Values, Sequence[Verdict]]:
    """Which held-out answers pass their checks, and what the judge says of them; nothing of pairs made elsewhere."""
    if method == "given":
        return {}, ()
    checked = passes_stage(round, aligned)
    passing: Values = {} if checked is None else {f"passes_{which}": each for which, each in query_passes(checked).items()}
    answers = answers_stage(round, round.folder.stage(1, PRINCIPLES), aligned)
    return passing, () if answers is None else read_verdicts(answers)["alignment"]["judge"]
