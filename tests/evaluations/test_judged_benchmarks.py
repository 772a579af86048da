"""MT-Bench and Arena-Hard on made-up questions, with scripted answers and judges: scores by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from selfsteer.evaluations.arena_hard import answer, judge_answers, read_arena_hard, read_verdict
from selfsteer.evaluations.asking import Answer, Asked
from selfsteer.evaluations.mt_bench import answer_both_turns, grade, read_grade, read_mt_bench


def write(file: Path, rows: Sequence[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def mt_folder(tmp_path: Path) -> Path:
    write(
        tmp_path / "question.jsonl",
        [
            {"question_id": 81, "category": "writing", "turns": ["Write {answer}.", "Shorter."]},
            {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And 1 more?"]},
        ],
    )
    write(tmp_path / "reference_answer_gpt-4.jsonl", [{"question_id": 111, "choices": [{"turns": ["two", "three"]}]}])
    return tmp_path


def echo(items: Sequence[Asked]) -> list[Answer]:
    return [Answer(f"answer to {item.messages[-1]['content']}") for item in items]


def test_mt_bench_by_hand(mt_folder: Path):
    """Grades 7 and 9, 4 and 5: questions 8 and 4.5, score 6.25; first turns (7 + 4) / 2, second (9 + 5) / 2."""
    bench = read_mt_bench(mt_folder)
    assert not bench.published_prompts
    asked: list[Asked] = []

    def model(items: Sequence[Asked]) -> list[Answer]:
        asked.extend(items)
        return echo(items)

    answers = answer_both_turns(bench, model)
    assert [(item.messages[-1]["content"], item.sampling.temperature) for item in asked] == [
        ("Write {answer}.", 0.7),
        ("1 + 1?", 0.0),
        ("Shorter.", 0.7),
        ("And 1 more?", 0.0),
    ]
    assert [message["content"] for message in asked[2].messages] == [
        "Write {answer}.",
        "answer to Write {answer}.",
        "Shorter.",
    ]
    seen: list[str] = []

    def judge(items: Sequence[Asked]) -> list[Answer]:
        seen.extend(item.messages[-1]["content"] for item in items)
        return [Answer(f"Well. Rating: [[{mark}]]") for mark in (7, 9, 4, 5)]

    found = grade(bench, answers, judge)
    assert found.score is not None
    assert found.score.mean == 6.25
    assert [turn and turn.mean for turn in found.turns] == [5.5, 7.0]
    assert {name: category.mean for name, category in found.categories.items()} == {"writing": 8.0, "math": 4.5}
    assert "[answer]\nanswer to Write {answer}.\n" in seen[0], "a place named in a text stays as it is"
    assert "two" not in seen[0]
    assert "[reference answer]\ntwo\n" in seen[2]
    assert "three" in seen[3]


def test_a_grade_that_is_not_there_is_no_zero(mt_folder: Path):
    bench = read_mt_bench(mt_folder)
    answers = answer_both_turns(bench, echo)
    found = grade(bench, answers, lambda items: [Answer("[[8]]"), Answer("[[6]]"), Answer("hm"), Answer("", error="gone")])
    assert found.score is not None
    assert (found.score.mean, found.score.n, found.questions) == (7.0, 1, 2)
    assert found.ungraded == {"unreadable grade": 1, "gone": 1}


def test_published_prompts_are_used_where_they_are(mt_folder: Path):
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    write(
        mt_folder / "judge_prompts.jsonl",
        [{"name": name, "system_prompt": "S", "prompt_template": f"{name} {{question}}"} for name in names],
    )
    bench = read_mt_bench(mt_folder)
    assert bench.published_prompts
    seen: list[tuple[str, ...]] = []

    def judge(items: Sequence[Asked]) -> list[Answer]:
        seen.extend(tuple(message["content"] for message in item.messages) for item in items)
        return [Answer("[[1]]")] * 4

    grade(bench, answer_both_turns(bench, echo), judge)
    assert seen[0] == ("S", "single-v1 Write {answer}.")
    assert seen[3] == ("S", "single-math-v1-multi-turn 1 + 1?")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("Rating: [[7]]", 7), ("[[7.5]] of [[10]]", 7.5), ("[6]", 6), ("[[11]]", None), ("[[0]]", None), ("seven", None)],
)
def test_read_grade(text: str, wanted: float | None):
    assert read_grade(text) == wanted


def test_a_reference_that_is_missing_is_named(mt_folder: Path):
    (mt_folder / "reference_answer_gpt-4.jsonl").unlink()
    with pytest.raises(ValueError, match=r"question 111 \(math\) is graded against a reference"):
        read_mt_bench(mt_folder)


@pytest.fixture
def arena_folder(tmp_path: Path) -> Path:
    write(tmp_path / "question.jsonl", [{"uid": str(i), "prompt": f"prompt {i}"} for i in range(3)])
    rows = [{"question_id": str(i), "choices": [{"turns": [{"content": f"baseline {i}"}]}]} for i in range(3)]
    write(tmp_path / "model_answer" / "gpt-4-0314.jsonl", rows)
    return tmp_path


def test_arena_hard_by_hand(arena_folder: Path):
    """Model is B, then A: much better twice, 6 of 6; better and worse, a flip, 1 of 2; worse and a tie, 0.5 of 2.

    Points 7.5 of 10."""
    arena = read_arena_hard(arena_folder)
    said = iter(["[[B>>A]]", "So: [[A>>B]]", "[[B>A]]", "[[B>A]]", "[[A>B]]", "[[A=B]]"])
    found = judge_answers(arena, answer(arena, echo), lambda items: [Answer(next(said)) for _ in items])
    assert found.win_rate is not None
    assert found.win_rate.mean == pytest.approx(0.75)
    assert (found.flips, found.prompts, found.no_verdict) == (1, 3, {})


def test_arena_hard_counts_what_has_no_verdict(arena_folder: Path):
    arena = read_arena_hard(arena_folder)
    said = iter(["[[B>A]]", "[[A>B]]", "A", "[[A>B]]", "[[A>B]] or [[B>A]]", "[[A=B]]"])
    found = judge_answers(arena, answer(arena, echo), lambda items: [Answer(next(said)) for _ in items])
    assert found.win_rate is not None
    assert (found.win_rate.mean, found.win_rate.n) == (1.0, 1)
    assert found.no_verdict == {"unreadable verdict": 2}


def test_arena_hard_shows_both_orders(arena_folder: Path):
    seen: list[str] = []

    def judge(items: Sequence[Asked]) -> list[Answer]:
        seen.extend(item.messages[0]["content"] for item in items)
        return [Answer("[[A=B]]")] * 6

    arena = read_arena_hard(arena_folder)
    judge_answers(arena, answer(arena, echo), judge)
    assert "[answer A]\nbaseline 0\n" in seen[0]
    assert "[answer A]\nanswer to prompt 0\n" in seen[1]


DAMAGED = ["null", "[]", "{", '{"uid": 1}', '{"question_id": 1, "choices": [], "category": "math", "turns": 3}', "\xe9", ""]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_of_benchmarks_are_named(mt_folder: Path, arena_folder: Path, content: str):
    """Both lie in one folder, with the questions of the second."""
    for name, read in (
        ("question.jsonl", read_mt_bench),
        ("reference_answer_gpt-4.jsonl", read_mt_bench),
        ("model_answer/gpt-4-0314.jsonl", read_arena_hard),
        ("question.jsonl", read_arena_hard),
    ):
        file = arena_folder / name
        kept = file.read_bytes()
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=str(file)):
            read(arena_folder)
        file.write_bytes(kept)


def test_arena_hard_names_the_missing_baseline(arena_folder: Path):
    write(arena_folder / "model_answer" / "gpt-4-0314.jsonl", [{"uid": "0", "answer": "x"}])
    with pytest.raises(ValueError, match="gpt-4-0314 has no answer to prompt 1"):
        read_arena_hard(arena_folder)
    (arena_folder / "model_answer" / "gpt-4-0314.jsonl").unlink()
    with pytest.raises(ValueError, match=r"gpt-4-0314.jsonl: no such file; evaluation data takes"):
        read_arena_hard(arena_folder)


@pytest.mark.parametrize(
    ("text", "wanted"), [("[[A>B]]", (1, 0)), ("[[B>>A]] [[B>>A]]", (0, 3)), ("[[C]]", None), ("", None)]
)
def test_read_verdict(text: str, wanted: tuple[float, float] | None):
    assert read_verdict(text) == wanted
