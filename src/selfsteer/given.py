"""Preference data made elsewhere: to train on, and to measure."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfsteer.cluster import cluster_of
from selfsteer.data.exchange import Found, find_pairs, read_pairs
from selfsteer.engines.open import prompts_of
from selfsteer.judges.base import RecipeJudge
from selfsteer.judges.find import ask, check_judge, find_judge, read_judge
from selfsteer.judges.implicit import implicit_verdicts, likelihood_verdicts
from selfsteer.measures.metrics import Measures, Metrics
from selfsteer.measures.quality import measure
from selfsteer.measures.verdicts import JudgeReport, judge_report
from selfsteer.models import positions_of, resolve
from selfsteer.pipeline import dated, finish, first_round, may_align, prepare
from selfsteer.recipe.sections import Policy, Recipe, Training, dump, load
from selfsteer.records import Pair
from selfsteer.runtime import counted
from selfsteer.stages import summary
from selfsteer.stages.essentials import check_essentials
from selfsteer.stages.evaluation import check_evaluation
from selfsteer.stages.preferences import given_stage, usable_pairs
from selfsteer.stages.quality import quality_stage
from selfsteer.stages.selection import Candidates, selection_stage
from selfsteer.stages.status import MODEL, POLICY, stage_names
from selfsteer.stages.training import policy_stage
from selfsteer.store.folder import RunFolder, lenders
from selfsteer.store.journal import Journal
from selfsteer.training.scoring import Group, Scorer, score_missing, scores

log = logging.getLogger(__name__)


def measure_given(path: Path, policy: Policy, trained: str | None = None) -> Measures:
    """Every measure of a preference dataset, with log-probabilities under `policy`.

    trained: a model trained from the policy, whose implicit reward judges the pairs. Both then compute in float32, as small
    differences decide. Nothing is kept.
    """
    training = Training() if trained is None else Training(dtype="float32")
    with TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        before = _Scored(path, _scorer(policy, training), journal)
        measures = measure(before.pairs())
        if before.dropped:
            measures["dropped"] = dict(before.dropped.most_common())
        measures["likelihood"] = judge_report(likelihood_verdicts(pair for pair in before.pairs() if pair.scored))
        if trained is not None:
            after = _Scored(path, _scorer(policy.model_copy(update={"model": trained, "revision": None}), training), journal)
            measures["implicit_reward"] = judge_report(implicit_verdicts(before.pairs(), after.pairs(), beta=1.0))
        return measures


def _scorer(policy: Policy, training: Training) -> Scorer:
    found = resolve(policy)
    return Scorer(found, policy.model_copy(update={"model": found.path}), prompts_of(policy, found), training)


class _Scored:
    """The usable pairs of a file under one model, scored once."""

    def __init__(self, path: Path, scorer: Scorer, journal: Journal) -> None:
        self._path, self._scorer, self._journal = path, scorer, journal
        self.dropped: Counter[str] = Counter()
        total = 0
        self._positions = positions_of(scorer.model.path, trust_remote_code=scorer.policy.trust_remote_code)
        for item in usable_pairs(path, scorer.prompts, None, self._positions):
            if isinstance(item, Pair):
                total += 1
            else:
                self.dropped[item.reason] += 1
        if total == 0:
            raise ValueError(f"{path}: no pair is left of {self.dropped.total():,}: {counted(self.dropped)}")
        score_missing(scorer, self._groups(), journal, description="log-probabilities of the pairs", total=total)

    def _groups(self) -> Iterator[Group]:
        for item in usable_pairs(self._path, self._scorer.prompts, None, self._positions):
            if isinstance(item, Pair):
                yield self._scorer.group((item,))

    def pairs(self) -> Iterator[Pair]:
        """Each pair with its log-probabilities."""
        for group in self._groups():
            yield from scores(self._journal, group)


def judge_given(path: Path, judge: RecipeJudge, policy: Policy) -> JudgeReport:
    """What a judge says about a preference dataset; nothing is kept. policy: whose prompts decide which pairs are usable."""
    found = resolve(policy)
    prompts = prompts_of(policy, found)
    positions = positions_of(found.path, trust_remote_code=policy.trust_remote_code)

    def pairs() -> Iterator[Pair]:
        return (item for item in usable_pairs(path, prompts, None, positions) if isinstance(item, Pair))

    with TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        return judge_report(ask(judge, pairs, journal, total=sum(1 for _ in pairs())))


def _pairs(found: Found) -> Path:
    """The file of a preference dataset or of a run's pairs; what must be known of these is logged."""
    if found.warning is not None:
        log.warning("%s", found.warning)
    return found.source


IMPLICIT = "implicit:"
"""Before the name of a trained model that judges by its implicit reward."""


def train_pairs(pairs: Path, recipe: Recipe, *, replace: bool = False, borrow: Sequence[Path] = ()) -> Metrics:
    """Step 5 on its own: align recipe.policy, once, on a preference dataset made elsewhere.

    replace, borrow: as of `pipeline.run`.
    """
    recipe = recipe.model_copy(update={"rounds": 1})
    if recipe.queries.shard is not None:
        raise ValueError("queries.shard: pairs made elsewhere are not split over run folders; set shard=null")
    if recipe.selection.active and recipe.selection.by == "generator":
        raise ValueError("selection.by: generator, but these pairs come without one; set selection.by=judge")
    pairs, recipe = _pairs(find_pairs(pairs)), dated(recipe, borrow)
    prepared = prepare(recipe, principles=False)
    check_evaluation(recipe, prepared.judge)
    check_essentials(recipe, prepared.policy, stage_names(recipe, "given"))
    next(read_pairs(pairs), None)
    lending = lenders(borrow)
    with cluster_of(recipe), RunFolder(recipe.output) as folder:
        folder.describe(dump(recipe), summary.session(recipe))
        round = dataclasses.replace(first_round(folder, recipe, prepared), replace=replace, lenders=lending)
        preferences = given_stage(round, pairs)
        candidates = Candidates(preferences, quality_stage(round, preferences, principles=False))
        may_align(round, "given")
        policy_stage(round, selection_stage(round, candidates))
        return finish(round, "given")


def measure_pairs(
    pairs: Path, policy: str | None = None, judge: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Measures:
    """On-policy probability, margins, lengths and overlap of any preference dataset, or of a run, under a policy.

    policy: as policy.model in a recipe; of a run the one that its pairs are to align, when None.
    arguments: of the policy's chat template.
    judge: who judges the pairs, too. An LLM or a reward model, which of the two its configuration says; a YAML file with a
    judge's section, as in a recipe; or "implicit:MODEL", a model trained from the policy, by its implicit reward.
    Raises ValueError where the pairs, the models or the policy's name are missing.
    """
    trained = judge.removeprefix(IMPLICIT) if judge is not None and judge.startswith(IMPLICIT) else None
    there = find_pairs(pairs)
    named = _policy_of(there, pairs) if policy is None else Policy(model=policy)
    if arguments:
        named = named.model_copy(update={"template_arguments": dict(arguments)})
    found = None if judge is None or trained is not None else find_judge(read_judge(judge), named)
    if found is not None:
        check_judge(found)
    pairs = _pairs(there)
    measures = measure_given(pairs, named, trained)
    if found is not None:
        measures["judge"] = judge_given(pairs, found, named)
    return measures


def _policy_of(found: Found, given: Path) -> Policy:
    """The policy that a round of a run began with."""
    if found.stage is None:
        raise ValueError(f"{given}: a file of pairs names no policy; say under which model to measure them (--policy MODEL)")
    place = found.stage.path.parent
    policy = load(place.parent / "recipe.yaml").policy
    number = int(place.name.removeprefix("round-"))
    if number == 1:
        return policy
    return policy.model_copy(update={"model": str(place.parent / f"round-{number - 1}" / POLICY / MODEL), "revision": None})
