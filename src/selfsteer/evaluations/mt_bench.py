"""MT-Bench (arXiv 2306.05685): 80 questions of two turns, each answer graded from 1 to 10 by a judge.

As published: the temperature depends on the category, the second turn follows the model's own first answer, the judge sees
both turns when it grades the second, and a reference answer where the category has a right one; the score is the mean over
all 160 grades. The published prompts are used where they lie beside the questions (judge_prompts.jsonl); else the built-in
ones, which is said with every figure, as is the judge's name.

    DIR/question.jsonl                     question_id, category, turns
    DIR/reference_answer_gpt-4.jsonl       question_id, choices (or reference_answer/gpt-4.jsonl)
    DIR/judge_prompts.jsonl                name, system_prompt, prompt_template

Left out on purpose: the pairwise mode.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from selfsteer.data.files import rows_with, told_by
from selfsteer.engines.base import Sampling
from selfsteer.evaluations.asking import Answer, Ask, Asked
from selfsteer.measures.estimates import Estimate, mean_estimate, mean_of
from selfsteer.recipe.shipped import TEMPLATES
from selfsteer.records import Message, side, user_turn

MAX_NEW_TOKENS = 1024
GRADING = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=2048)
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""By category; 0 in the others."""
_WITH_REFERENCE = frozenset({"math", "reasoning", "coding"})
_GRADES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_PLACE = re.compile(r"\{(\w+)\}")


class Question(NamedTuple):
    """One question of two turns."""

    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MtBench:
    """The questions and the judge's prompts."""

    questions: Sequence[Question]
    prompts: Mapping[str, tuple[str, str]]
    """System prompt and template by name."""
    published_prompts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grades:
    """What the judge gave."""

    score: Estimate | None
    """The mean grade over both turns, its interval over questions; only of questions with both grades."""
    by_question: Mapping[str, float]
    turns: tuple[Estimate | None, Estimate | None]
    categories: Mapping[str, Estimate]
    questions: int
    ungraded: Mapping[str, int]
    """Answers without a grade, by reason."""


def read_mt_bench(folder: Path) -> MtBench:
    """Raises ValueError for a missing file or a question without what it needs."""
    references = _references(folder)
    questions: list[Question] = []
    file = folder / "question.jsonl"
    for row in rows_with(file, "question_id", "category", "turns"):
        id, category, turns = str(row["question_id"]), row["category"], row["turns"]
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in cast("list[object]", turns)):
            raise ValueError(f"{file}: the turns of question {id} are not texts; fetch it again")
        if len(turns) != 2:
            raise ValueError(f"{folder}/question.jsonl: question {id} has {len(turns)} turns, not two")
        reference = references.get(id)
        if category in _WITH_REFERENCE and reference is None:
            raise ValueError(
                f"{folder}: question {id} ({category}) is graded against a reference answer, and there is none; add"
                " reference_answer_gpt-4.jsonl"
            )
        questions.append(Question(id, category, (turns[0], turns[1]), reference if category in _WITH_REFERENCE else None))
    file = folder / "judge_prompts.jsonl"
    rows = rows_with(
        file if file.is_file() else TEMPLATES / "mt_bench_prompts.jsonl", "name", "system_prompt", "prompt_template"
    )
    prompts = {row["name"]: (row["system_prompt"], row["prompt_template"]) for row in rows}
    missing = {"single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"} - prompts.keys()
    if missing:
        raise ValueError(f"{file}: the prompts {sorted(missing)} are missing")
    return MtBench(questions=questions, prompts=prompts, published_prompts=file.is_file())


def _references(folder: Path) -> dict[str, tuple[str, str]]:
    file = next(
        (f for f in (folder / "reference_answer_gpt-4.jsonl", folder / "reference_answer" / "gpt-4.jsonl") if f.is_file()),
        None,
    )
    if file is None:
        return {}
    with told_by(file):
        found = {str(row["question_id"]): row["choices"][0]["turns"] for row in rows_with(file, "question_id", "choices")}
        return {id: (turns[0], turns[1]) for id, turns in found.items()}


def answer_both_turns(bench: MtBench, ask: Ask) -> list[tuple[Answer, Answer]]:
    """The model's answers; the second turn is asked where the first one was answered."""
    first = [_asked(user_turn(question.turns[0]), question) for question in bench.questions]
    firsts = ask(first)
    second = [
        _asked((*asked.messages, *side(said.text).messages, *user_turn(question.turns[1])), question)
        for question, asked, said in zip(bench.questions, first, firsts, strict=True)
        if said.error is None
    ]
    seconds = iter(ask(second))
    return [(said, next(seconds) if said.error is None else Answer("", error="no first answer")) for said in firsts]


def _asked(messages: tuple[Message, ...], question: Question) -> Asked:
    temperature = _TEMPERATURES.get(question.category, 0.0)
    return Asked(messages, Sampling(temperature=temperature, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS))


def grade(bench: MtBench, answers: Sequence[tuple[Answer, Answer]], judge: Ask) -> Grades:
    """Have both turns graded. A grade that can't be read is none, never a zero."""
    wanted: list[tuple[int, int]] = []
    asked: list[Asked] = []
    ungraded = Counter[str]()
    for place, (question, both) in enumerate(zip(bench.questions, answers, strict=True)):
        for turn in (0, 1):
            error = both[turn].error
            if error is not None:
                ungraded[error] += 1
                continue
            wanted.append((place, turn))
            asked.append(Asked(_question_to_judge(bench, question, both, turn), GRADING))
    found: dict[tuple[int, int], float] = {}
    for key, said in zip(wanted, judge(asked), strict=True):
        mark = None if said.error is not None else read_grade(said.text)
        if mark is None:
            ungraded[said.error or "unreadable grade"] += 1
        else:
            found[key] = mark
    places = range(len(bench.questions))
    both = {
        bench.questions[place].id: (found[place, 0] + found[place, 1]) / 2
        for place in places
        if (place, 0) in found and (place, 1) in found
    }
    categories: dict[str, list[float]] = {}
    for question in bench.questions:
        if question.id in both:
            categories.setdefault(question.category, []).append(both[question.id])
    first, second = (mean_estimate([mark for (_, turn), mark in found.items() if turn == wanted]) for wanted in (0, 1))
    return Grades(
        score=mean_estimate(list(both.values())),
        by_question=both,
        turns=(first, second),
        categories={name: mean_of(own) for name, own in categories.items()},
        questions=len(bench.questions),
        ungraded=ungraded,
    )


def _question_to_judge(bench: MtBench, question: Question, answers: tuple[Answer, Answer], turn: int) -> tuple[Message, ...]:
    name = ("single-math-v1" if question.reference else "single-v1") + ("-multi-turn" if turn else "")
    system, template = bench.prompts[name]
    texts = {
        "question": question.turns[0],
        "answer": answers[0].text,
        "question_1": question.turns[0],
        "question_2": question.turns[1],
        "answer_1": answers[0].text,
        "answer_2": answers[1].text,
    }
    if question.reference:
        texts |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
    # At once, so that a place named in an answer stays as it is.
    filled = _PLACE.sub(lambda place: texts.get(place[1], place[0]), template)
    return (Message(role="system", content=system), *user_turn(filled))


def read_grade(text: str) -> float | None:
    """The first number in double square brackets, else in single ones, as published; None of one outside 1 to 10."""
    match = next((match for pattern in _GRADES if (match := pattern.search(text))), None)
    mark = None if match is None else float(match[1])
    return mark if mark is not None and 1 <= mark <= 10 else None
