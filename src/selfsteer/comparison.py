"""Ways of making preference data, side by side: the paper's Tables 3 to 6 and Figure 3 as a command.

Every arm is the recipe with a few settings changed. All answer the same queries with the same seeds; the measures are taken
on the held-out queries alone, which no generator and no policy was trained on, under the policy to be aligned. Differences
are against PBAA, query by query; several seeds are averaged within a query first, so the intervals say how much the result
depends on the queries, not on the training seed; for that there are the estimates of each seed. Left out on purpose: running
the arms (`pipeline.compare`), and the page (`comparison_page.py`).
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from selfsteer.cells import Cell, Row, Table, cell, duration, plain
from selfsteer.durable import replacing
from selfsteer.estimates import METHOD, Estimate, mean_estimate, paired_difference
from selfsteer.metrics import RoundMetrics, TrainingSummary
from selfsteer.quality import reference_scores
from selfsteer.quality_stage import JudgeName
from selfsteer.recipe import Recipe
from selfsteer.recipe_engines import runs_already
from selfsteer.recipe_text import Override, apply_override
from selfsteer.records import PairRow
from selfsteer.report import markdown
from selfsteer.verdicts import JudgeReport, Verdict, judge_report, points

BASELINE = "pbaa"


class Arm(NamedTuple):
    """One way of making preference data."""

    description: str
    changes: Mapping[str, object]
    """What it sets in the recipe, by dotted key."""


_SSO = {"generator.kind": "single", "generator.objective": "sso"}
_LIBRARY = {"principles.source": "library", "principles.path": None, "principles.model": None, "principles.engine": None}

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
    "ipo": Arm("as sso, with IPO in both trainings", {**_SSO, "generator.loss": "ipo", "alignment.loss": "ipo"}),
    "weak_principles": Arm(
        "as sso, the principles written by the policy itself",
        {**_SSO, **_LIBRARY, "principles.source": "generate", "principles.qualities": None},
    ),
    "given": Arm("preference data made elsewhere", {}),
}


def arm_recipe(recipe: Recipe, name: str, seed: int) -> Recipe:
    """The recipe of one arm: one round, without gates or selection.

    Raises `RecipeError` where an arm needs what the recipe lacks.
    """
    data = recipe.model_dump(mode="json")
    output = str(Path(recipe.output) / arm_folder(name, seed))
    unused: dict[str, object] = {"quality.gates": {}, "quality.stop_when": {}, "selection": {}}
    common: dict[str, object] = {"output": output, "seed": seed, "rounds": 1, **unused}
    for key, value in {**common, **ARMS[name].changes}.items():
        data = apply_override(data, Override(key, value))
    return Recipe.model_validate(data)


def arm_folder(name: str, seed: int) -> str:
    """The name of an arm's run folder."""
    return f"{name}-seed{seed}"


def check_arms(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ValueError, before anything is sampled, for arms that can't be run."""
    unknown = [name for name in arms if name not in ARMS]
    if unknown:
        raise ValueError(f"there is no arm {', '.join(unknown)}; arms: {', '.join(ARMS)}")
    if len(set(arms)) != len(arms) or len(set(seeds)) != len(seeds):
        raise ValueError("an arm or a seed is named twice")
    if recipe.queries.holdout == 0:
        raise ValueError(
            "queries.holdout is 0: a comparison is measured on queries that nothing was trained on; set queries.holdout=64"
        )
    if "given" in arms and recipe.compare.given is None:
        raise ValueError('the arm "given" needs compare.given, a file of preference pairs')
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

_ON_POLICY = {"chosen": "on_policy_chosen", "rejected": "on_policy_rejected", "all": "on_policy_all"}
_ORDER = {
    "accuracy": "accuracy",
    "consistency": "principle_consistency",
    "margin / token": "margin_per_token",
    "length chosen": "length_chosen",
    "length rejected": "length_rejected",
}
_JUDGED = {"accuracy": "accuracy", "principle consistency": "principle_consistency"}
SHARES = frozenset(_JUDGED.values())
"""Measures that are shares."""


class ArmRun(NamedTuple):
    """One arm under one seed."""

    values: Values
    metrics: RoundMetrics
    wins: Sequence[Verdict]
    """Of the aligned policy over the first one, on the held-out queries."""


class SeedResult(TypedDict, total=False):
    """One arm under one seed."""

    measures: dict[str, Estimate]
    difference: dict[str, Estimate]
    """Arm - PBAA of the same seed."""


class ArmResult(TypedDict, total=False):
    """One arm over all seeds. Keys that were not measured are absent."""

    description: str
    queries: int
    """Held-out queries with a pair, whatever the seed."""
    measures: dict[str, Estimate]
    difference: dict[str, Estimate]
    """Arm - PBAA, on the queries that both have."""
    by_seed: dict[str, SeedResult]
    """Of several seeds, each by itself."""
    seconds: float
    """Making and judging the data, and aligning, all seeds together; a stage that arms share counts for each."""
    generator: dict[str, float]
    """"first" and "last" loss, "margin" after training: means over the seeds."""
    bad_generator: dict[str, float]
    policy: dict[str, float]
    wins: JudgeReport
    """Of the aligned policy over the first one; accuracy is the win rate, a tie counting one half."""


class ComparisonResult(TypedDict):
    """comparison.json."""

    baseline: str
    model: str
    seeds: list[int]
    holdout: int
    arms: dict[str, ArmResult]


def query_values(rows: Iterator[PairRow], verdicts: Mapping[JudgeName, Sequence[Verdict]], only: frozenset[str]) -> Values:
    """Every measure of each held-out query; a query with several pairs counts with their mean."""
    gathered: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        query = row["query_id"]
        scored = reference_scores(row)
        if query not in only or scored is None:
            continue
        chosen, rejected = (math.exp(side.mean_logps) for side in scored)
        found = {
            "on_policy_chosen": chosen,
            "on_policy_rejected": rejected,
            "on_policy_all": (chosen + rejected) / 2,
            "margin_per_token": scored.chosen.mean_logps - scored.rejected.mean_logps,
            "length_chosen": float(scored.chosen.tokens),
            "length_rejected": float(scored.rejected.tokens),
        }
        for name, value in found.items():
            gathered[name][query].append(value)
    judged: dict[JudgeName, str] = {"judge": "accuracy", "principle_consistency": "principle_consistency"}
    for by, name in judged.items():
        for verdict in verdicts.get(by, ()):
            if verdict.query_id in only and verdict.preferred is not None:
                gathered[name][verdict.query_id].append(points(verdict))
    return {name: {query: _average(values) for query, values in each.items()} for name, each in gathered.items()}


def summarize(recipe: Recipe, runs: Mapping[str, Sequence[ArmRun]], seeds: Sequence[int]) -> ComparisonResult:
    """The estimates of all arms, and their differences from PBAA where it is among them."""
    pooled = {name: _pooled([run.values for run in each]) for name, each in runs.items()}
    arms = {name: _arm(name, each, pooled) for name, each in runs.items()}
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


def _arm(name: str, runs: Sequence[ArmRun], pooled: Mapping[str, Values]) -> ArmResult:
    values = pooled[name]
    result = ArmResult(description=ARMS[name].description)
    if not runs:
        return result
    result["queries"] = len(values.get("on_policy_all", {}))
    result["measures"] = _means(values)
    result["seconds"] = sum(stage["seconds"] for run in runs for stage in run.metrics.get("stages", {}).values())
    if name != BASELINE and BASELINE in pooled:
        result["difference"] = _differences(values, pooled[BASELINE])
    for key in ("generator", "bad_generator", "policy"):
        trainings = [found for run in runs if (found := run.metrics.get(key)) is not None]
        if trainings:
            result[key] = _training(trainings)
    wins = [verdict for run in runs for verdict in run.wins]
    if wins:
        result["wins"] = judge_report(wins)
    return result


def _seed_result(run: ArmRun, baseline: ArmRun | None) -> SeedResult:
    result = SeedResult(measures=_means(run.values))
    if baseline is not None:
        result["difference"] = _differences(run.values, baseline.values)
    return result


def _means(values: Values) -> dict[str, Estimate]:
    found = {measure: mean_estimate(list(each.values())) for measure, each in values.items()}
    return {measure: estimate for measure, estimate in found.items() if estimate is not None}


def _differences(values: Values, baseline: Values) -> dict[str, Estimate]:
    found = {measure: paired_difference(each, baseline.get(measure, {})) for measure, each in values.items()}
    return {measure: estimate for measure, estimate in found.items() if estimate is not None}


def _pooled(seeds: Sequence[Values]) -> Values:
    """The mean over the seeds of each query."""
    gathered: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for values in seeds:
        for measure, each in values.items():
            for query, value in each.items():
                gathered[measure][query].append(value)
    return {measure: {query: _average(found) for query, found in each.items()} for measure, each in gathered.items()}


def _training(trainings: Sequence[TrainingSummary]) -> dict[str, float]:
    curves = [training.get("curve", []) for training in trainings]
    return {
        "first": _average([curve[0]["loss"] for curve in curves]),
        "last": _average([curve[-1]["loss"] for curve in curves]),
        "steps": _average([float(len(curve)) for curve in curves]),
        "last_margin": _average([curve[-1]["margin"] for curve in curves]),
    }


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- tables ----------------------------------------------------------------------------------------------------------------


def comparison_tables(result: ComparisonResult) -> Iterator[Table]:
    """The arms as rows: measures, differences from PBAA, trainings and win rates."""
    arms = {name: arm for name, arm in result["arms"].items() if "measures" in arm}
    about = f"On {result['holdout']:,} held-out queries, seeds {', '.join(map(str, result['seeds']))}. {METHOD}"
    for title, columns in (("On-policy probability", _ON_POLICY), ("Order and length in tokens", _ORDER)):
        yield _measures(title, arms, columns, "measures", about)
    compared = {name: arm for name, arm in arms.items() if "difference" in arm}
    if compared:
        about = "Per query, over the held-out queries that both arms have; several seeds are averaged within a query."
        for title, columns in (("On-policy probability", _ON_POLICY), ("Order and length in tokens", _ORDER)):
            yield _measures(f"{title}: difference from {BASELINE}", compared, columns, "difference", about)
        yield from _seed_tables(compared, result["seeds"])
    yield _trainings(arms)


def _measures(title: str, arms: Mapping[str, ArmResult], columns: Mapping[str, str], key: str, note: str) -> Table:
    shown = {heading: name for heading, name in columns.items() if any(name in cast(Any, arm)[key] for arm in arms.values())}
    rows = [
        Row(
            name,
            (
                Cell(f"{arm.get('queries', 0):,}"),
                *(
                    cell(
                        plain(cast(Any, arm)[key].get(measure)),
                        "share" if measure in SHARES else "number",
                        signed=key == "difference",
                    )
                    for measure in shown.values()
                ),
            ),
        )
        for name, arm in arms.items()
    ]
    return Table(title, ("queries", *shown), tuple(rows), note)


def _seed_tables(arms: Mapping[str, ArmResult], seeds: Sequence[int]) -> Iterator[Table]:
    """Each seed by itself: how much of a difference is the training seed's."""
    note = f"Arm - {BASELINE}, per query; what differs between the columns of a row is the seed's doing."
    for heading, measure in (("on-policy probability, all", "on_policy_all"), *_JUDGED.items()):
        found = {
            name: [cast(Any, arm["by_seed"][str(seed)]).get("difference", {}).get(measure) for seed in seeds]
            for name, arm in arms.items()
            if "by_seed" in arm
        }
        if any(each is not None for of_arm in found.values() for each in of_arm):
            form = "share" if measure in SHARES else "number"
            rows = [
                Row(name, tuple(cell(plain(each), form, signed=True) for each in of_arm)) for name, of_arm in found.items()
            ]
            columns = tuple(f"seed {seed}" for seed in seeds)
            yield Table(f"Seed by seed: {heading}, difference from {BASELINE}", columns, tuple(rows), note)


def _trainings(arms: Mapping[str, ArmResult]) -> Table:
    def loss(arm: ArmResult, key: str) -> Cell:
        found = cast("dict[str, float] | None", arm.get(key))
        return Cell("") if found is None else Cell(f"{found['first']:.4f} -> {found['last']:.4f}")

    rows = [
        Row(
            name,
            (
                loss(arm, "generator"),
                loss(arm, "bad_generator"),
                loss(arm, "policy"),
                cell(plain(arm["wins"].get("accuracy")) if "wins" in arm else None, "share"),
                Cell(duration(arm.get("seconds", 0.0))),
            ),
        )
        for name, arm in arms.items()
    ]
    columns = ("generator's loss", "of rejected", "policy's loss", "win rate", "time")
    note = (
        "Loss of the first and of the last step. Win rate of the aligned policy over the first one. "
        "Time: a stage that arms share counts for each."
    )
    return Table("Training", columns, tuple(rows), note)


def write_comparison(folder: Path, result: ComparisonResult) -> None:
    """Write comparison.json."""
    with replacing(folder / "comparison.json") as file:
        file.write(json.dumps(plain(result), indent=2, allow_nan=False).encode() + b"\n")


def read_comparison(folder: Path) -> ComparisonResult:
    """What `write_comparison` wrote, an `Estimate` being {"mean", "low", "high", "n"}. ValueError where there is none."""
    path = folder / "comparison.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no comparison here (no comparison.json). Name the folder that `compare` was given.")
    return cast(ComparisonResult, json.loads(path.read_bytes()))


def write_tables(folder: Path, result: ComparisonResult) -> None:
    """Write comparison.md."""
    arms = "\n".join(f"- **{name}**: {arm.get('description', '')}" for name, arm in result["arms"].items())
    tables = "\n\n".join(map(markdown, comparison_tables(result)))
    with replacing(folder / "comparison.md") as file:
        file.write(f"# Ways of making preference data\n\n{arms}\n\n{tables}\n".encode())
