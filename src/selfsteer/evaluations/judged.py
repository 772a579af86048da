"""Tasks whose answers a judge weighs: AlpacaEval 2, MT-Bench, Arena-Hard; and answers of any two models to the same queries.

The judge's name stands beside every figure, with what of the published protocol was not followed. A task is a function of
who answers; it returns the function that has the answers judged, so that the model is gone before the judge comes. Left out
on purpose: which judge, and how it is reached.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from selfsteer.engines.base import Sampling
from selfsteer.evaluations import arena_hard, mt_bench
from selfsteer.evaluations.alpaca_eval import gamed_of, read_baseline
from selfsteer.evaluations.asking import Answer, Ask, Asked
from selfsteer.evaluations.length_controlled import FOLDS, Gamed, Judged, difficulties, length_controlled
from selfsteer.evaluations.results import Figure, TaskResult
from selfsteer.measures.estimates import SHARE, Estimate, mean_estimate
from selfsteer.measures.verdicts import Verdict, judge_report, points
from selfsteer.records import Message, Pair, side, user_turn
from selfsteer.store.durable import digest, file_digest

_ALPACA_EVAL = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=2048)


class Verdicts(NamedTuple):
    """A judge, however it judges."""

    name: str
    """As a person calls it; stands beside every figure."""
    ask: Ask | None
    """Answers a question in words; None of a reward model."""
    compare: Callable[[Sequence[Pair]], Sequence[Verdict]]
    """A verdict for every pair, in order: chosen is the answer under test."""


JudgedTask = Callable[[Ask], Callable[[], TaskResult]]
"""Given who answers, all answers are made; what is returned has them judged."""


def _in_words(judge: Verdicts, task: str) -> Ask:
    if judge.ask is None:
        raise ValueError(f"evaluation.tasks: {task} is judged in words, which {judge.name} does not do; name an LLM")
    return judge.ask


def _there(estimate: Estimate | None, task: str) -> Estimate:
    if estimate is None:
        raise ValueError(f"{task}: no item has a verdict, so there is no figure; look at what the judge answers")
    return estimate


def mt_bench_task(folder: Path, judge: Verdicts, limit: int | None) -> JudgedTask:
    """MT-Bench's files in a folder, as a task. Raises ValueError as `read_mt_bench` does."""
    whole, ask_judge = mt_bench.read_mt_bench(folder), _in_words(judge, "mt_bench")
    bench = replace(whole, questions=whole.questions[:limit])

    def judged(answers: Sequence[tuple[Answer, Answer]]) -> TaskResult:
        found = mt_bench.grade(bench, answers, ask_judge)
        score = _there(found.score, "mt_bench")
        figures = [_figure("mt_bench", "grade (1 to 10)", score, found.by_question)]
        for name, turn in zip(("grade, first turn", "grade, second turn"), found.turns, strict=True):
            figures += [] if turn is None else [_figure("mt_bench", name, turn, None)]
        prompts = "the published prompts" if bench.published_prompts else "selfsteer's own prompts, not the published ones"
        return TaskResult(
            task="mt_bench",
            figures=figures,
            items=len(bench.questions),
            of=len(whole.questions),
            version="1",
            data=_local(folder / "question.jsonl"),
            unanswered=found.ungraded,
            cut=sum(answer.cut for both in answers for answer in both),
            judge=judge.name,
            notes=[prompts, *(f"{name} {category.mean:.2f}" for name, category in found.categories.items())],
            first=user_turn(bench.questions[0].turns[0]),
        )

    return lambda ask: partial(judged, mt_bench.answer_both_turns(bench, ask))


def arena_hard_task(folder: Path, judge: Verdicts, limit: int | None) -> JudgedTask:
    """Arena-Hard's files in a folder, as a task. Raises ValueError as `read_arena_hard` does."""
    whole, ask_judge = arena_hard.read_arena_hard(folder), _in_words(judge, "arena_hard")
    arena = replace(whole, prompts=whole.prompts[:limit])

    def judged(answers: Sequence[Answer]) -> TaskResult:
        found = arena_hard.judge_answers(arena, answers, ask_judge)
        rate = _there(found.win_rate, "arena_hard")
        prompts = "the published prompt" if arena.published_prompt else "selfsteer's own prompt, not the published one"
        return TaskResult(
            task="arena_hard",
            figures=[_figure("arena_hard", f"win rate against {arena_hard.BASELINE}", rate, found.by_prompt)],
            items=len(arena.prompts),
            of=len(whole.prompts),
            version="0.1",
            data=_local(folder / "question.jsonl"),
            unanswered=found.no_verdict,
            cut=sum(answer.cut for answer in answers),
            judge=judge.name,
            notes=[prompts, f"{found.flips} of {found.prompts} flip with the order"],
            first=user_turn(arena.prompts[0].text),
        )

    return lambda ask: partial(judged, arena_hard.answer(arena, ask))


def alpaca_eval_task(folder: Path, judge: Verdicts, limit: int | None) -> JudgedTask:
    """AlpacaEval's files in a folder, as a task: the baseline's answers are compared with the model's."""
    baseline = read_baseline(folder)
    wanted = baseline.outputs[:limit]
    # The published formula is over all instructions; of a part of them only the one without difficulty can be fitted.
    gamed = gamed_of(folder) if len(wanted) == len(baseline.outputs) else None
    if gamed is not None:
        instructions = [each.instruction for each in wanted]
        difficulties(instructions, instructions, gamed)  # before anything is answered: do they belong together?

    def judged(answers: Sequence[Answer]) -> TaskResult:
        outputs = [Answer(each.output) for each in wanted]
        compared = compare(judge, [user_turn(each.instruction) for each in wanted], answers, outputs)
        return TaskResult(
            task="alpaca_eval",
            figures=compared.figures("alpaca_eval", gamed),
            items=len(wanted),
            of=len(baseline.outputs),
            version="2",
            data=f"local, {len(baseline.outputs)} answers of {baseline.generator}, sha256 {digest(list(wanted))[:16]}",
            unanswered=compared.unanswered,
            cut=sum(answer.cut for answer in answers),
            judge=judge.name,
            notes=["selfsteer's own prompt in both orders, not the published one in one order", *compared.notes(gamed)],
            first=user_turn(wanted[0].instruction),
        )

    return lambda ask: partial(judged, ask([Asked(user_turn(each.instruction), _ALPACA_EVAL) for each in wanted]))


JUDGED: Mapping[str, Callable[[Path, Verdicts, int | None], JudgedTask]] = {
    "alpaca_eval": alpaca_eval_task,
    "mt_bench": mt_bench_task,
    "arena_hard": arena_hard_task,
}
"""By the name of the task, which is that of its folder too."""


# --- answers against answers -----------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """Answers of a model against another's, as a judge sees them."""

    judged: Sequence[Judged]
    verdicts: Sequence[Verdict]
    unanswered: Mapping[str, int]
    """Prompts without a verdict, by reason."""

    def figures(self, task: str, gamed: Gamed | None) -> list[Figure]:
        """Win rate, length-controlled win rate, ties and flips, as shares."""
        preferences = {str(place): each.preference for place, each in enumerate(self.judged) if each.preference is not None}
        rate = _there(mean_estimate(list(preferences.values()), within=SHARE), task)
        figures = [_figure(task, "win rate", rate, preferences)]
        if len(preferences) >= FOLDS:
            controlled = length_controlled(self.judged, gamed=gamed).length_controlled
            figures.append(_figure(task, "length-controlled win rate", controlled, None))
        report = judge_report(self.verdicts)
        for name, key in (("ties", "ties"), ("orders disagree", "flips"), ("first shown preferred", "prefers_first")):
            estimate = report.get(key)
            if isinstance(estimate, Estimate):
                figures.append(_figure(task, name, estimate, None))
        return figures

    def notes(self, gamed: Gamed | None) -> list[str]:
        """How the length-controlled rate was made."""
        if sum(each.preference is not None for each in self.judged) < FOLDS:
            return [f"no length-controlled rate of fewer than {FOLDS} verdicts"]
        formula = "the published formula" if gamed is not None else "the formula without difficulty: not the leaderboard's"
        return [f"length-controlled by {formula}"]


def compare(
    judge: Verdicts, prompts: Sequence[tuple[Message, ...]], ours: Sequence[Answer], theirs: Sequence[Answer]
) -> Compared:
    """Have the answers of one model compared with another's, prompt by prompt; what has no answer has no verdict."""
    unanswered = Counter[str]()
    pairs: dict[int, Pair] = {}
    for place, (prompt, our, their) in enumerate(zip(prompts, ours, theirs, strict=True)):
        error = our.error or their.error
        if error is not None:
            unanswered[error] += 1
            continue
        pairs[place] = Pair(
            query_id=digest(list(prompt))[:16], kind="given", prompt=prompt, chosen=side(our.text), rejected=side(their.text)
        )
    verdicts = dict(zip(pairs, judge.compare(list(pairs.values())), strict=True))
    unanswered.update(verdict.error for verdict in verdicts.values() if verdict.error is not None)
    judged = [
        Judged(
            prompt[-1]["content"],
            len(their.text),
            len(our.text),
            preference(verdicts[place]) if place in verdicts else None,
        )
        for place, (prompt, our, their) in enumerate(zip(prompts, ours, theirs, strict=True))
    ]
    return Compared(judged, list(verdicts.values()), unanswered)


def preference(verdict: Verdict) -> float | None:
    """How much chosen is preferred, 0 to 1: a judge's probability in both orders where it tells one, else 0, 1/2 or 1."""
    if verdict.error is not None:
        return None
    return points(verdict) if verdict.probability is None else verdict.probability


def _figure(task: str, metric: str, estimate: Estimate, by_item: Mapping[str, float] | None) -> Figure:
    form = "number" if task == "mt_bench" else "share"
    return Figure(task=task, metric=metric, value=estimate.mean, estimate=estimate, by_item=by_item, form=form)


def _local(file: Path) -> str:
    return f"local, sha256 {file_digest(file)[:16]}"
