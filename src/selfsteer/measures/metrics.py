"""metrics.json and its shape: what a run measures, and what `reports/` reads.

A key whose inputs were missing is absent. On disk an `Estimate` is {"mean", "low", "high", "n"}.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, cast

from selfsteer.measures.checks import CheckReport
from selfsteer.measures.estimates import Distribution, Estimate
from selfsteer.measures.verdicts import JudgedComparison, JudgeReport
from selfsteer.records import Saving
from selfsteer.store.durable import read_object, write

Method = Literal["sso", "dual", "pbaa", "given"]
"""Pairs from a data generator, from two (generator.kind dual), from the policy itself (none), or made elsewhere."""


class Both(TypedDict, total=False):
    """A measure of the chosen and of the rejected responses."""

    chosen: Estimate
    rejected: Estimate


class OnPolicy(Both, total=False):
    """exp(mean log pi(token)) of a response given the row's prompt, under the policy to be aligned; averaged."""

    all: Estimate
    """Over chosen and rejected alike: the mean over pairs of the mean of both."""


class Margin(TypedDict, total=False):
    """log pi(chosen) - log pi(rejected) under the policy to be aligned, in nats."""

    sum: Estimate
    """Of the summed log-probabilities."""
    per_token: Estimate
    """Of the per-token means."""
    chosen_above: Estimate
    """Share of pairs whose summed log-probability is higher for chosen."""
    length_correlation: float
    """Pearson correlation of the summed margin with the length difference, both chosen - rejected."""


class Length(TypedDict, total=False):
    """Lengths of the responses."""

    unit: str
    """"tokens" when every row knows them, else "words"."""
    chosen: Estimate
    rejected: Estimate
    chosen_median: float
    rejected_median: float
    ratio: float
    """Mean length of chosen / mean length of rejected."""
    chosen_longer: Estimate
    """Share of pairs whose chosen response is strictly longer."""


class Variety(TypedDict, total=False):
    """How varied the text of one side is."""

    distinct_1: float
    """Different words / words (arXiv 1510.03055)."""
    distinct_2: float
    distinct_3: float
    repetition: Estimate
    """Share of a response's word 3-grams that it has said before, averaged over responses."""


class Measures(TypedDict, total=False):
    """What `measure` found. Keys whose inputs were missing are absent."""

    pairs: int
    dropped: dict[str, int]
    """Rows of a file that could not be measured, by reason."""
    on_policy: OnPolicy
    margin: Margin
    length: Length
    variety: dict[str, Variety]
    """Of "chosen" and of "rejected"."""
    variety_words: int
    """Words of each side that distinct-n was taken over."""
    overlap: Estimate
    """Jaccard overlap of the word 3-grams of chosen and rejected."""
    near_identical: Estimate
    """Share of pairs whose overlap is above NEAR_IDENTICAL."""
    repeated_pairs: int
    """Pairs that repeat an earlier pair word for word."""
    repeated_chosen: int
    """Chosen responses that repeat an earlier chosen response word for word."""
    repeated_rejected: int
    near_repeated: Both
    """Share of responses that overlap with an earlier one of their side by more than NEAR_IDENTICAL."""
    truncated: Both
    """Share of responses cut off by the token limit; nobody knows it of pairs made elsewhere (kind "given")."""
    refusals: Both
    """Share of responses that decline to answer."""
    leakage: Both
    """Share of responses that speak of their principle."""
    language_mismatch: Both
    """Share of responses that leave the writing system of their query, of those where that can be told."""
    judge: JudgeReport
    """Of the judge that the recipe names."""
    checks: CheckReport
    """Of judge.kind checks, beside `judge`: which responses pass."""
    principle_consistency: JudgeReport
    """Of the self-judge by log pi(y | x+) - log pi(y | x-), summed over the tokens."""
    implicit_reward: JudgeReport
    """Of the self-judge by log pi(y) - log pi_ref(y), pi a model trained from pi_ref (`selfsteer measure`)."""
    likelihood: JudgeReport
    """Of the policy's mean log-probability a token: what a judge has to be better than (`selfsteer measure`)."""
    distributions: dict[str, Distribution]
    """"log_probability" (mean over the tokens) and "length" (chosen, rejected), "margin" (per token)."""


class Preference(TypedDict):
    """How one model orders the pairs."""

    margin: Estimate
    """log pi(chosen) - log pi(rejected), summed over tokens."""
    accuracy: Estimate
    """Share of pairs whose chosen response is the more probable one."""
    on_policy: OnPolicy


class Reward(TypedDict):
    """The implicit reward r(y) = beta * (log pi(y) - log pi_ref(y)) of DPO (arXiv 2305.18290, section 4)."""

    margin: Estimate
    accuracy: Estimate
    """Share of pairs with a higher reward for chosen; equal rewards count as wrong."""
    chosen: Estimate
    rejected: Estimate


class ImplicitReward(TypedDict, total=False):
    """What training did to the pairs. Before it the reward is zero for every response."""

    pairs: int
    beta: float
    before: Preference
    after: Preference
    reward: Reward


class Displacement(TypedDict, total=False):
    """How many nats a few responses have moved in a training: log pi(y | x) under what it delivers - what it began with.

    Chosen and rejected responses are of training pairs; unrelated ones are answers of the policy to bare queries that train
    nothing. With _token they are a token, each response counting alike.
    """

    chosen: Estimate
    chosen_token: Estimate
    rejected: Estimate
    rejected_token: Estimate
    unrelated: Estimate
    unrelated_token: Estimate
    lost: Estimate
    """By the unrelated ones: what a gate bounds."""
    crossed: int
    """The step at which training.stop_at_displacement was found crossed; what is delivered is of the reading before."""


class ComparedAnswers(TypedDict, total=False):
    """A share or a mean of the answers to the same held-out queries."""

    check: str
    """As canonical JSON, of the share that passes this check alone."""
    before: Estimate
    """By the policy that the run began with, given the bare query."""
    after: Estimate
    """By the aligned policy, likewise."""
    prompted: Estimate
    """By the policy that the run began with, given the query under its good principle: what there is to win."""
    change: Estimate
    """after - before, query by query."""
    gap: Estimate
    """prompted - after, query by query: what is left to win."""


class CheckedAnswers(TypedDict):
    """How many answers to held-out queries pass the checks of the query's principle."""

    queries: int
    passing: ComparedAnswers
    """All checks."""
    told: NotRequired[ComparedAnswers]
    """Mean log-probability of a token of an answer (nats) for the policy that the run began with, given the good principle:
    whether what passes is what this model would say when told to."""
    checks: list[ComparedAnswers]
    """Each check, of the queries whose principle has it; the most frequent first."""
    truncated: ComparedAnswers
    """Answers cut off by the token limit."""


class Comparison(TypedDict, total=False):
    """One set of pairs against another on the queries that both have: mean of the per-query differences."""

    queries: int
    held_out: bool
    """Nothing was trained on these queries."""
    chosen: Estimate
    """On-policy probability of the chosen response, first set - second set."""
    rejected: Estimate
    all: Estimate
    margin_per_token: Estimate
    both: dict[str, Estimate]
    """On-policy probability of "pairs" and of the "baseline", over the queries that both have."""


class HeadroomAt(TypedDict):
    """The same in a range of token positions, over the queries whose three responses all reach it."""

    first: int
    """Position of its first token, counted from 1."""
    last: int | None
    """None of the last range, which has no end."""
    original: Estimate
    good: Estimate
    bad: Estimate
    all: Estimate


class Headroom(TypedDict):
    """On-policy probability of the policy's own answer y_o beside y+ and y-, all given the bare query: what is to be won."""

    queries: int
    original: Estimate
    good: Estimate
    bad: Estimate
    chosen: Estimate
    """y_o - y+, query by query."""
    rejected: Estimate
    """y_o - y-."""
    all: Estimate
    """y_o - the mean of y+ and y-: what pairs would gain if steering cost them nothing."""
    positions: list[HeadroomAt]
    distribution: NotRequired[Distribution]
    """Of y_o's mean log-probability a token, as "original"."""


class Gain(TypedDict):
    """How the generator differs from the policy at the same contexts, nats a token (`measures/gain.py`): after - before."""

    queries: int
    contexts: int
    gain: Estimate
    """Of the expected on-policy log-probability: the two below together."""
    same_prompt: Estimate
    """What the bare query shows alone: sharpening, displacement."""
    steering: Estimate
    following: Estimate
    """How much more the tokens belong to their own principle than to the opposite one."""
    following_before: Estimate
    """Of the policy, not a change."""
    entropy: Estimate
    """Of what is sampled from."""
    displacement: Estimate
    """Of the log-probability of what the policy samples for the bare query."""


class Contamination(TypedDict):
    """Queries that share text with evaluation files."""

    share: Estimate
    """Of the queries that share a 13-gram with any of the files."""
    files: dict[str, int]
    """Such queries by file."""


class Drift(TypedDict, total=False):
    """The alignment pairs of a round against those of the round before: this round - the one before."""

    margin: Estimate
    """Of the log-probability margin per token."""
    on_policy: Estimate
    length_chosen: Estimate
    """In the unit of both rounds; absent where they differ."""
    length_rejected: Estimate
    refusals_chosen: Estimate
    refusals_rejected: Estimate
    repetition_chosen: Estimate
    accuracy: Estimate
    principle_consistency: Estimate


class GateResult(NamedTuple):
    """One gate of the recipe, evaluated on a round."""

    name: str
    bound: str
    """As the recipe says it."""
    value: Estimate | None
    """None where the measure is absent."""
    passed: bool
    reason: str = ""
    """Why it failed."""


class PartSummary(TypedDict):
    """What a part of a stage's work took (`clock.py`)."""

    seconds: float
    tokens: int
    """Of responses; 0 where none are counted."""


class StageSummary(TypedDict):
    """What became of the rows of one stage."""

    wanted: int
    kept: int
    dropped: dict[str, int]
    """Rows by the reason they were dropped for."""
    seconds: float
    parts: NotRequired[dict[str, PartSummary]]
    """What of the seconds went where, as far as it is known; the rest is Python around it."""
    disk: NotRequired[int]
    """Bytes of what it sealed and of its samples."""
    memory: NotRequired[dict[str, int]]
    """Bytes held at the peak, as in `clock.Taken`."""


class TrainingSummary(TypedDict, total=False):
    """One training, of the generator or of the policy."""

    steps: int
    seconds: float
    tokens_per_second: float
    curve: list[dict[str, float]]
    """One entry a logged step: "step", "loss", and whatever else the trainer logs."""
    reward: ImplicitReward
    """Of the pairs that it was trained on."""
    displacement: Displacement
    """Absent where no reading was taken."""
    saving: Saving


class RoundMetrics(TypedDict, total=False):
    """One pass of the five steps."""

    stages: dict[str, StageSummary]
    """In the order of the run folder."""
    steering: Measures
    """The steering pairs, each measured under its own prompt (x+ or x-)."""
    pbaa: Measures
    """The policy's own responses of stage 2 as alignment pairs: steered by principle only, the paper's baseline.

    With generator.kind none these pairs align the policy, and `alignment` is absent.
    """
    alignment: Measures
    """The data generator's pairs, or pairs made elsewhere: what the policy is aligned on."""
    selected: Measures
    """Of `alignment` (or `pbaa`), what the recipe's selection aligned the policy on; not judged again."""
    headroom: Headroom
    """Before the generator, where one trains on y_o."""
    gain: Gain
    """Of the generator over the policy, where quality.gain asks for it."""
    comparison: Comparison
    """alignment - pbaa."""
    judged_comparison: dict[str, JudgedComparison]
    """alignment against pbaa, by judge as in `Measures`."""
    contamination: Contamination
    drift: Drift
    """From the second round on."""
    gates: list[GateResult]
    stop_when: list[GateResult]
    """From the second round on, what would end the rounds; `passed` where it does."""
    generator: TrainingSummary
    """Of a dual generator, the one of the chosen responses."""
    bad_generator: TrainingSummary
    """Of a dual generator, the one of the rejected responses."""
    policy: TrainingSummary
    answers: CheckedAnswers
    """Of quality.answers."""


class RunFacts(TypedDict):
    """What identifies the run."""

    name: str
    folder: str
    model: str
    """The policy it started from, as the recipe names it."""
    seed: int
    seconds: float
    """Wall-clock time, resumed parts added up."""
    policy_folder: NotRequired[str]
    """Where the aligned model is."""
    policy_round: NotRequired[int]
    """The round that it comes from."""
    ended: NotRequired[str]
    """Why the last of `rounds` did not align the policy; absent where it did."""
    pairs: NotRequired[str]
    """Where the preference data is."""
    shard: NotRequired[str]
    """Of a run that made the pairs of a share of the queries alone, which: 3/8."""
    under_way: NotRequired[bool]
    """Not all stages are sealed yet; of the last round there is what those that are say."""
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[str]


class Metrics(TypedDict):
    """A whole run."""

    run: RunFacts
    rounds: list[RoundMetrics]
    evaluation: NotRequired[dict[str, Any]]
    """Of the first and of the aligned policy, where the recipe names tasks; `evaluations.results.summary`."""


Json = Mapping[str, Any]


def plain(value: object) -> Any:
    """The same as JSON values: an `Estimate` becomes {"mean", "low", "high", "n"}, a `GateResult` likewise."""
    if isinstance(value, Estimate | GateResult):
        return {key: plain(item) for key, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("list[object]", value)]
    return value


def from_plain(value: Any) -> Any:
    """The inverse of `plain` for values without a `GateResult`."""
    if isinstance(value, list):
        return [from_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        fields = {str(key): from_plain(item) for key, item in cast("dict[str, Any]", value).items()}
        return Estimate(**fields) if tuple(sorted(fields)) == _ESTIMATE else fields
    return value


_ESTIMATE = tuple(sorted(Estimate._fields))


def find(node: Json, path: str) -> Any:
    """The value at a dotted path, or None where it was not measured."""
    found: Any = node
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = cast(Json, found)[key]
    return found


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write metrics.json, whole or not at all. Raises ValueError where a number is not finite."""
    write(path, _content(metrics))


def hold_metrics(path: Path, metrics: Metrics) -> bool:
    """Whether a file is what `write_metrics` would write."""
    return path.is_file() and path.read_bytes() == _content(metrics)


def _content(metrics: Metrics) -> bytes:
    return json.dumps(plain(metrics), indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_metrics(folder: Path) -> Metrics:
    """What `write_metrics` wrote into a run folder; what the run has made is where the folder is now.

    Raises FileNotFoundError where there is nothing to report, ValueError where the file is damaged.
    """
    path = folder / "metrics.json"
    if not path.exists():
        what = (
            "its run is not finished: selfsteer status shows where it is"
            if (folder / "run.json").exists()
            else "neither a run nor a comparison is there"
        )
        raise FileNotFoundError(f"{path} is missing: {what}")
    found = read_object(path)
    if any(not isinstance(found.get(key), kind) for key, kind in (("run", dict), ("rounds", list))):
        raise ValueError(f"{path}: not the metrics of a run; delete it and run the same command again")
    metrics = cast(Metrics, from_plain(found))
    for this in metrics["rounds"]:
        for key in ("gates", "stop_when"):
            if key in this:
                this[key] = [GateResult(**each) for each in cast("dict[str, list[dict[str, Any]]]", this)[key]]
    run, before = metrics["run"], Path(metrics["run"]["folder"])
    run["folder"] = str(folder)
    for key in ("policy_folder", "pairs"):
        if (made := run.get(key)) is not None and Path(made).is_relative_to(before):
            run[key] = str(folder / Path(made).relative_to(before))
    return metrics
