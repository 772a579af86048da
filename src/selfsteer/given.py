"""Preference data made elsewhere: to train on, and to measure."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from selfsteer import schemas
from selfsteer.durable import file_digest
from selfsteer.journal import Journal
from selfsteer.judging import RecipeJudge, ask
from selfsteer.metrics import Measures
from selfsteer.models import load_tokenizer, resolve
from selfsteer.pairs import special_token_reason
from selfsteer.preferences import read_pairs
from selfsteer.prompts import Prompts
from selfsteer.quality import measure, reference_scores
from selfsteer.recipe import Policy, Training
from selfsteer.records import Dropped, PairRow, PreferencePair
from selfsteer.reference import Group, Judge, score_missing, scores
from selfsteer.schemas import NO_SEEDS
from selfsteer.self_judges import implicit_verdicts, likelihood_verdicts
from selfsteer.stages import Round, Work, arithmetic, inputs_of, make_stage, policy_as_judge
from selfsteer.store import Contents, Origin, Stage
from selfsteer.verdicts import JudgeReport, judge_report


def given_stage(round: Round, pairs: Path) -> Stage:
    """Stage 5 filled from a file: checked pairs with their reference log-probabilities under the policy."""
    settings = {"max_prompt_tokens": round.recipe.queries.max_prompt_tokens, **arithmetic(round.recipe.training)}
    origin = Origin(settings=settings, inputs={**inputs_of(round), "pairs": file_digest(pairs)})
    return make_stage(round, "5-preferences", origin, lambda work: _given(round, work, pairs))


def _given(round: Round, work: Work, path: Path) -> Contents:
    judge = policy_as_judge(round)
    limit = round.recipe.queries.max_prompt_tokens
    dropped: list[Dropped] = []

    def groups() -> Iterator[Group | Dropped]:
        for item in usable_pairs(path, round.prompts, limit):
            yield item if isinstance(item, Dropped) else judge.group((item,))

    wanted = sum(1 for _ in usable_pairs(path, round.prompts, limit))
    to_score = (group for group in groups() if isinstance(group, Group))
    score_missing(judge, to_score, work.journal, description="log-probabilities of the pairs", total=wanted)

    def rows() -> Iterator[PairRow]:
        for item in groups():
            if isinstance(item, Dropped):
                dropped.append(item)
            else:
                [scored] = scores(work.journal, item)
                yield schemas.scored_row(item.pairs[0], scored, None, NO_SEEDS)

    return Contents(wanted=wanted, rows=rows(), dropped=dropped, schema=schemas.PAIRS)


def usable_pairs(path: Path, prompts: Prompts, max_prompt_tokens: int | None) -> Iterator[PreferencePair | Dropped]:
    """The pairs of a file that can be tokenised as they are, and the others with the reason why not.

    Raises ValueError, naming file and row, for a malformed file.
    """
    number = 0
    for number, row in enumerate(read_pairs(path), 1):  # noqa: B007 (counts the rows for the error below)
        if isinstance(row, Dropped):
            yield row
            continue
        pair = schemas.pair(cast(dict[str, Any], row))
        reason = prompts.quarantine_reason(pair.prompt) or special_token_reason((pair.chosen, pair.rejected), prompts)
        if reason is None and max_prompt_tokens is not None and len(prompts.prompt_ids(pair.prompt)) > max_prompt_tokens:
            reason = "prompt too long"
        yield pair if reason is None else Dropped(id=pair.query_id, reason=reason)
    if number == 0:
        raise ValueError(f"{path}: no rows")


def measure_given(path: Path, policy: str, trained: str | None = None) -> Measures:
    """Every measure of a preference dataset, with log-probabilities under `policy` (a model reference as in a recipe).

    trained: a model trained from the policy, whose implicit reward judges the pairs. Both then compute in float32, as small
    differences decide. Nothing is kept.
    """
    training = Training() if trained is None else Training(dtype="float32")
    with TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        before = _Scored(path, _scorer(policy, training), journal)
        measures = measure(row for _, row in before.rows())
        likely = ((pair, scored) for pair, row in before.rows() if (scored := reference_scores(row)) is not None)
        measures["likelihood"] = judge_report(likelihood_verdicts(likely))
        if trained is not None:
            after = _Scored(path, _scorer(trained, training), journal)
            scored = (found for _, row in after.rows() if (found := reference_scores(row)) is not None)
            measures["implicit_reward"] = judge_report(implicit_verdicts(before.rows(), scored, beta=1.0))
        return measures


def _scorer(model: str, training: Training) -> Judge:
    found = resolve(Policy(model=model))
    return Judge(found, Policy(model=found.path), Prompts(load_tokenizer(found.path)), training)


class _Scored:
    """The usable pairs of a file under one model, scored once."""

    def __init__(self, path: Path, judge: Judge, journal: Journal) -> None:
        self._path, self._judge, self._journal = path, judge, journal
        total = sum(1 for _ in self._groups())
        score_missing(judge, self._groups(), journal, description="log-probabilities of the pairs", total=total)

    def _groups(self) -> Iterator[Group]:
        for item in usable_pairs(self._path, self._judge.prompts, None):
            if isinstance(item, PreferencePair):
                yield self._judge.group((item,))

    def rows(self) -> Iterator[tuple[PreferencePair, PairRow]]:
        """Each pair with the columns of its log-probabilities."""
        for group in self._groups():
            [scored] = scores(self._journal, group)
            yield group.pairs[0], schemas.scored_row(group.pairs[0], scored, None, NO_SEEDS)


def judge_given(path: Path, judge: RecipeJudge, policy: Policy) -> JudgeReport:
    """What a judge says about a preference dataset; nothing is kept. policy: whose prompts decide which pairs are usable."""
    prompts = Prompts(load_tokenizer(resolve(policy).path))

    def pairs() -> Iterator[PreferencePair]:
        return (item for item in usable_pairs(path, prompts, None) if isinstance(item, PreferencePair))

    with TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        return judge_report(ask(judge, pairs, journal, total=sum(1 for _ in pairs())))
