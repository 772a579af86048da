"""Arena-Hard v0.1 (arXiv 2406.11939): 500 prompts, answers compared with a baseline's in both orders, in five degrees.

As published: a verdict of "much better" counts three times, a tie one half to each side, and the score is the Bradley-Terry
win rate against the baseline, which for two players is the share of points. The interval is the bootstrap over prompts.

    DIR/question.jsonl                       uid, prompt (or question_id, turns: [{content}])
    DIR/model_answer/gpt-4-0314.jsonl        the baseline's answers: uid or question_id, answer or choices[0].turns[0]
    DIR/judge_prompt.txt                     with {question}, {answer_1}, {answer_2}; the built-in one when there is none

Left out on purpose: style control, and the leaderboard's other models.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from selfsteer.data.files import rows_with, told_by
from selfsteer.engines.base import Sampling
from selfsteer.evaluations.asking import Answer, Ask, Asked
from selfsteer.measures.estimates import SHARE, Estimate, mean_estimate
from selfsteer.recipe.shipped import TEMPLATES
from selfsteer.records import user_turn

BASELINE = "gpt-4-0314"
MAX_NEW_TOKENS = 4096
ANSWERING = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS)
JUDGING = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=4096)
MUCH = 3
"""Times that "much better" counts."""
_VERDICT = re.compile(r"\[\[([AB<>=]+)\]\]")
_PLACE = re.compile(r"\{(question|answer_1|answer_2)\}")
_POINTS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("A>>B", "B<<A"), (MUCH, 0)),
    **dict.fromkeys(("A>B", "B<A"), (1, 0)),
    **dict.fromkeys(("A=B", "B=A"), (0.5, 0.5)),
    **dict.fromkeys(("B>A", "A<B"), (0, 1)),
    **dict.fromkeys(("B>>A", "A<<B"), (0, MUCH)),
}


class Prompt(NamedTuple):
    """One prompt with the baseline's answer."""

    id: str
    text: str
    baseline: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaHard:
    """The prompts, the baseline's answers and the judge's prompt."""

    prompts: Sequence[Prompt]
    template: str
    published_prompt: bool
    """The judge's prompt lay beside the questions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """What the judge said of both orders."""

    win_rate: Estimate | None
    """Share of points against the baseline, over prompts with a verdict in both orders."""
    by_prompt: Mapping[str, float]
    """What each prompt adds, so that their mean is the win rate."""
    prompts: int
    flips: int
    """Prompts whose two orders name different winners."""
    no_verdict: Mapping[str, int]


def read_arena_hard(folder: Path) -> ArenaHard:
    """Raises ValueError for a missing file, and naming it, for a prompt that the baseline has not answered."""
    answered, asked = folder / "model_answer" / f"{BASELINE}.jsonl", folder / "question.jsonl"
    with told_by(answered):
        answers = {_id(row): _text(row) for row in rows_with(answered)}
    prompts: list[Prompt] = []
    for row in rows_with(asked):
        with told_by(asked):
            id, text = _id(row), row["prompt"] if "prompt" in row else row["turns"][0]["content"]
        if id not in answers:
            raise ValueError(f"{folder}: the baseline {BASELINE} has no answer to prompt {id}")
        prompts.append(Prompt(id, text, answers[id]))
    file = folder / "judge_prompt.txt"
    template = (file if file.is_file() else TEMPLATES / "arena_hard_prompt.txt").read_text(encoding="utf-8")
    missing = {"question", "answer_1", "answer_2"} - set(_PLACE.findall(template))
    if missing:
        raise ValueError(f"{file}: the places {sorted(missing)} are missing")
    return ArenaHard(prompts=prompts, template=template, published_prompt=file.is_file())


def _id(row: Mapping[str, Any]) -> str:
    return str(row["uid"] if "uid" in row else row["question_id"])


def _text(row: Mapping[str, Any]) -> str:
    if "answer" in row:
        return row["answer"]
    turn = row["choices"][0]["turns"][0]
    return turn if isinstance(turn, str) else cast(dict[str, str], turn)["content"]


def answer(arena: ArenaHard, ask: Ask) -> Sequence[Answer]:
    """The model's answers."""
    return ask([Asked(user_turn(prompt.text), ANSWERING) for prompt in arena.prompts])


def judge_answers(arena: ArenaHard, answers: Sequence[Answer], judge: Ask) -> Arena:
    """Have every answer compared with the baseline's, once in each order."""
    no_verdict = Counter[str]()
    asked: list[Asked] = []
    for prompt, said in zip(arena.prompts, answers, strict=True):
        if said.error is None:
            asked.append(_compare(arena.template, prompt.text, prompt.baseline, said.text))
            asked.append(_compare(arena.template, prompt.text, said.text, prompt.baseline))
    verdicts = iter(judge(asked))
    points: dict[str, tuple[float, float]] = {}
    flips = 0
    for prompt, said in zip(arena.prompts, answers, strict=True):
        if said.error is not None:
            no_verdict[said.error] += 1
            continue
        first, second = next(verdicts), next(verdicts)
        # In the first order the model is B, in the second A.
        as_second, as_first = (None if each.error is not None else read_verdict(each.text) for each in (first, second))
        if as_second is None or as_first is None:
            no_verdict[first.error or second.error or "unreadable verdict"] += 1
            continue
        (lost, won), (won_again, lost_again) = as_second, as_first
        points[prompt.id] = (won + won_again, lost + lost_again)
        flips += (won - lost) * (won_again - lost_again) < 0
    by_prompt = _shares(points)
    return Arena(
        win_rate=mean_estimate(list(by_prompt.values()), within=SHARE),
        by_prompt=by_prompt,
        prompts=len(arena.prompts),
        flips=flips,
        no_verdict=no_verdict,
    )


def _shares(points: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """With the share p of all points, w won and l lost of a prompt, n prompts and P points: p + (w - p (w + l)) n / P.

    The mean of these is p, their spread that of p over prompts (the ratio estimator's).
    """
    total = sum(won + lost for won, lost in points.values())
    share = sum(won for won, _ in points.values()) / total if total else 0.0
    return {id: share + (won - share * (won + lost)) * len(points) / total for id, (won, lost) in points.items()}


def _compare(template: str, question: str, first: str, second: str) -> Asked:
    texts = {"question": question, "answer_1": first, "answer_2": second}
    return Asked(user_turn(_PLACE.sub(lambda place: texts[place[1]], template)), JUDGING)


def read_verdict(text: str) -> tuple[float, float] | None:
    """Points of A and of B; None where there is not exactly one verdict of the closed set, said once or more."""
    found = set(_VERDICT.findall(text))
    return _POINTS.get(found.pop()) if len(found) == 1 else None
