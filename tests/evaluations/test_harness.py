"""Tasks of lm_eval on made-up items, answered by scripts: figures by hand, what is asked, and what is refused."""

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra selfsteer[evaluate]")

import lm_eval
from lm_eval.tasks import TaskManager

from selfsteer.evaluations.asking import Answer, Asked, Choices
from selfsteer.evaluations.harness import Harness
from selfsteer.evaluations.local_data import local_data
from selfsteer.evaluations.results import TaskResult
from selfsteer.recipe.sections import EvaluationSection

MMLU = str(Path(str(lm_eval.__file__)).parent / "tasks" / "mmlu" / "default")

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and its libraries warn of themselves

IFEVAL = [
    {"key": 1, "prompt": "Say hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2,
        "prompt": "Write fewer than three sentences, in lower case.",
        "instruction_id_list": ["length_constraints:number_sentences", "change_case:english_lowercase"],
        "kwargs": [{"num_sentences": 3, "relation": "less than"}, {}],
    },
    {
        "key": 3,
        "prompt": "Shout two words.",
        "instruction_id_list": ["change_case:capital_word_frequency"],
        "kwargs": [{"capital_frequency": 2, "capital_relation": "at least"}],
    },
]
GSM8K = [
    {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    {"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
    {"question": "What is 3 + 3?", "answer": "3 + 3 = 6\n#### 6"},
]


def write(folder: Path, name: str, file: str, rows: Sequence[object]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def no_scores(items: Sequence[Choices]) -> list[list[float]]:
    raise AssertionError("nothing is compared")


def no_answers(items: Sequence[Asked]) -> list[Answer]:
    raise AssertionError("nothing is answered")


def values(result: TaskResult) -> dict[str, float]:
    return {figure.metric: figure.value for figure in result.figures}


def test_ifeval_by_hand(tmp_path: Path):
    """Strict: 1 of 1, 1 of 2, 1 of 1: 2 of 3 prompts, 3 of 4 instructions. Loose: without its first line the second answer
    is in lower case, and one sentence: each instruction counts alone, so all 4 are met."""
    write(tmp_path, "ifeval", "input_data.jsonl", IFEVAL)
    answers = {
        "Say hello.": "Hello there",
        "Write fewer than three sentences, in lower case.": "Dr. Smith came.\nand then he left the room without a word.",
        "Shout two words.": "HELLO THERE my friend",
    }
    asked: list[Asked] = []

    def ask(items: Sequence[Asked]) -> list[Answer]:
        asked.extend(items)
        return [Answer(answers[item.messages[-1]["content"]]) for item in items]

    (found,) = Harness(EvaluationSection(tasks=["ifeval"], data=str(tmp_path)), tmp_path / "out").evaluate(ask, no_scores)
    assert values(found) == {
        "prompt_level_strict_acc": pytest.approx(2 / 3),
        "inst_level_strict_acc": pytest.approx(3 / 4),
        "prompt_level_loose_acc": 1.0,
        "inst_level_loose_acc": 1.0,
    }
    assert [(item.messages, item.sampling.temperature, item.sampling.max_new_tokens) for item in asked[:1]] == [
        (({"role": "user", "content": "Say hello."},), 0.0, 1280)
    ]
    assert (found.items, found.of, found.fewshot) == (3, 3, 0)
    note, short = found.notes
    assert short == "the files hold 3 items; 541 are published"
    assert note.startswith("sentences: Punkt of nltk")
    assert "; 2 checks" in note, "sentences and capital words"
    instructions = next(figure for figure in found.figures if figure.metric == "inst_level_strict_acc")
    # p + (s - p n) N / P with p = 3/4, N / P = 3/4: (1, 1), (1, 2) and (1, 1).
    assert instructions.by_item == {
        "0": pytest.approx(3 / 4 + 3 / 16),
        "1": pytest.approx(3 / 4 - 3 / 8),
        "2": pytest.approx(3 / 4 + 3 / 16),
    }


def test_a_limited_run_says_so_and_the_unanswered_count(tmp_path: Path):
    write(tmp_path, "ifeval", "input_data.jsonl", IFEVAL)

    def ask(items: Sequence[Asked]) -> list[Answer]:
        assert [item.sampling.max_new_tokens for item in items] == [7, 7]
        return [Answer("Hello there", cut=True), Answer("", error="refused by the server")]

    settings = EvaluationSection(tasks=["ifeval"], data=str(tmp_path), limit=2, max_new_tokens=7)
    (found,) = Harness(settings, tmp_path / "out").evaluate(ask, no_scores)
    assert values(found)["prompt_level_strict_acc"] == 0.5
    assert (found.items, found.of, found.cut, found.unanswered) == (2, 3, 1, {"refused by the server": 1})


def test_gsm8k_by_hand(tmp_path: Path):
    """Strict reads only "#### n", flexible the last number; what follows the next question is not part of an answer."""
    write(tmp_path, "gsm8k", "test.jsonl", GSM8K)
    texts = ["So it is\n#### 2", "It must be 4.", "It is 6.\n\nQuestion: What is 7?"]
    with pytest.raises(ValueError, match=r"gsm8k shows 5 examples.*train.jsonl.*gsm8k_cot"):
        Harness(EvaluationSection(tasks=["gsm8k"], data=str(tmp_path)), tmp_path / "out")
    harness = Harness(EvaluationSection(tasks=["gsm8k"], data=str(tmp_path), fewshot=0), tmp_path / "out")
    (found,) = harness.evaluate(lambda items: [Answer(text) for text in texts[: len(items)]], no_scores)
    assert values(found) == {"exact_match (strict-match)": pytest.approx(1 / 3), "exact_match (flexible-extract)": 1.0}
    strict = found.figures[0]
    assert strict.by_item == {"0": 1.0, "1": 0.0, "2": 0.0}
    assert strict.estimate is not None
    # Wilson, 1 of 3: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    assert strict.estimate[1:3] == pytest.approx((0.06149, 0.79234), abs=1e-5)
    assert found.data.startswith("local, sha256 ")


def test_examples_become_turns(tmp_path: Path):
    write(tmp_path, "gsm8k", "test.jsonl", GSM8K[:1])
    write(tmp_path, "gsm8k", "train.jsonl", GSM8K[1:])
    asked: list[Asked] = []

    def ask(items: Sequence[Asked]) -> list[Answer]:
        asked.extend(items)
        return [Answer("#### 2")]

    Harness(EvaluationSection(tasks=["gsm8k"], data=str(tmp_path), fewshot=1), tmp_path / "out").evaluate(ask, no_scores)
    ((example, answer, question),) = [item.messages for item in asked]
    assert example["role"] == question["role"] == "user"
    assert answer["role"] == "assistant"
    assert "#### " in answer["content"]
    assert question["content"] == "Question: What is 1 + 1?\nAnswer:"


def test_mmlu_compares_the_letters(tmp_path: Path):
    """Two questions, right are B and D; the scores prefer B and A."""
    (tmp_path / "mmlu").mkdir()
    with zipfile.ZipFile(tmp_path / "mmlu" / "mmlu.zip", "w") as archive:
        # A byte order mark, and what macOS puts beside a file, are no part of it.
        archive.writestr("data/test/anatomy_test.csv", '\ufeff"Which, of these?",a,b,c,d,B\r\nAnd now?,e,f,g,h,D\r\n')
        archive.writestr("__MACOSX/data/test/._anatomy_test.csv", b"\x00\x05\x16\x07\xff")
        archive.writestr("data/dev/anatomy_dev.csv", "Before?,a,b,c,d,A\n")
    seen: list[Choices] = []

    def score(items: Sequence[Choices]) -> list[list[float]]:
        seen.extend(items)
        return [[-2.0, -1.0, -3.0, -4.0], [-1.0, -2.0, -2.0, -2.0]]

    settings = EvaluationSection(tasks=["mmlu_anatomy"], data=str(tmp_path))
    (found,) = Harness(settings, tmp_path / "out").evaluate(no_answers, score)
    assert values(found) == {"acc": 0.5}
    assert seen[0].continuations == ("A", "B", "C", "D")
    assert seen[0].messages[-1]["content"] == "Which, of these?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    with pytest.raises(ValueError, match="mmlu_anatomy compares the log-probabilities"):
        Harness(settings, tmp_path / "out", scores=False)


def test_a_tag_is_its_tasks_and_what_is_beside_the_questions_is_left_out(tmp_path: Path):
    """Nineteen subjects of a question each; right is the letter that the scores prefer but in one."""
    subjects = sorted(TaskManager(include_defaults=False, include_path=MMLU).task_index["mmlu_stem_tasks"].tags)
    folder = tmp_path / "mmlu" / "data"
    for subject in subjects:
        write_text(folder / "test" / f"{subject.removeprefix('mmlu_')}_test.csv", QUESTION)
    write_text(folder / "test" / "anatomy_test.csv", QUESTION.replace(",B", ",A"))
    write_text(folder / "auxiliary_train" / "mc_test.csv", "One,two\n")

    def score(items: Sequence[Choices]) -> list[list[float]]:
        return [[-2.0, -1.0, -3.0, -4.0] for _ in items]

    settings = EvaluationSection(tasks=["mmlu_stem_tasks"], data=str(tmp_path))
    found = Harness(settings, tmp_path / "out").evaluate(no_answers, score)
    assert [each.task for each in found] == subjects
    assert [values(each)["acc"] for each in found] == [0.0 if each == "mmlu_anatomy" else 1.0 for each in subjects]
    assert all(each.data.startswith("local, sha256") for each in found)
    assert found[0].notes == [f"the files hold {len(subjects)} items; 14,042 are published"]


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


QUESTION = "Which?,a,b,c,d,B\n"

MATH = [{"problem": "1 + 1?", "solution": "It is \\boxed{2}.", "answer": "2"}]
ROWS = {
    "ifeval": ("ifeval/input_data.jsonl", IFEVAL),
    "gsm8k_cot": ("gsm8k/test.jsonl", GSM8K),
    "hendrycks_math500": ("math500/test.jsonl", MATH),
}


@pytest.mark.parametrize(
    ("task", "changes", "why"),
    [
        ("ifeval", {"prompt": " "}, r"item 1 has no text in 'prompt'"),
        ("ifeval", {"instruction_id_list": [], "kwargs": []}, "item 1 has no instructions"),
        ("ifeval", {"kwargs": [{}, {}]}, "item 1 has no instructions, each with its kwargs"),
        ("ifeval", {"kwargs": [None]}, "item 1 has kwargs that are no object"),
        ("ifeval", {"instruction_id_list": ["no:such"]}, r"item 1 of ifeval .*\(KeyError: 'no:such'\); fetch it again"),
        ("ifeval", {"kwargs": [{"zz": 1}]}, "item 1 of ifeval .*unexpected keyword argument 'zz'"),
        ("gsm8k_cot", {"question": None}, "item 1 has no text in 'question' but None"),
        ("gsm8k_cot", {"answer": ""}, "item 1 has no text in 'answer' but ''"),
        ("gsm8k_cot", {"answer": "Two."}, "item 1 has an answer without '#### number'"),
        ("hendrycks_math500", {"answer": 2}, "item 1 has no text in 'answer' but 2"),
        ("hendrycks_math500", {"solution": "It is 2."}, r"item 1 has a solution without \\boxed"),
    ],
)
def test_an_item_that_can_t_be_asked_or_scored_is_named(task: str, changes: dict[str, object], why: str, tmp_path: Path):
    """An empty answer would be right, an unknown check end in a traceback when all answers have been paid for."""
    file, rows = ROWS[task]
    folder, _, name = file.partition("/")
    write(tmp_path, folder, name, [rows[0] | changes, *rows[1:]])
    with pytest.raises(ValueError, match=why):
        Harness(EvaluationSection(tasks=[task], data=str(tmp_path)), tmp_path / "out")


def test_of_a_limited_run_the_items_are_tried_that_will_be_asked(tmp_path: Path):
    """All of MMLU's 14,042 take ten seconds."""
    write(tmp_path, "ifeval", "input_data.jsonl", [*IFEVAL[:2], IFEVAL[2] | {"instruction_id_list": ["no:such"]}])
    Harness(EvaluationSection(tasks=["ifeval"], data=str(tmp_path), limit=2), tmp_path / "out")
    with pytest.raises(ValueError, match="item 3 of ifeval"):
        Harness(EvaluationSection(tasks=["ifeval"], data=str(tmp_path), limit=3), tmp_path / "out")


def test_data_is_on_the_disk_before_it_counts_as_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "gsm8k", "test.jsonl", GSM8K)
    forced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: forced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    local_data("gsm8k", tmp_path, tmp_path / "out")
    assert [name for name in forced if name.endswith(".tmp")] == ["test.jsonl.tmp", "README.md.tmp"]


@pytest.mark.parametrize("task", sorted(ROWS))
def test_an_item_that_is_there_twice_is_refused(task: str, tmp_path: Path):
    file, rows = ROWS[task]
    folder, _, name = file.partition("/")
    write(tmp_path, folder, name, [*rows, rows[0]])
    with pytest.raises(ValueError, match=rf"{name}: items 1 and {len(rows) + 1} are the same"):
        Harness(EvaluationSection(tasks=[task], data=str(tmp_path)), tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            {"data/test/anatomy_test.csv": "Which?,a,b,c,d,\n"},
            r"mmlu\.zip: data/test/anatomy_test\.csv: row 1 is not question",
        ),
        ({"data/test/anatomy_test.csv": "Which?,a,b,c,d,BC\n"}, "row 1 is not question, four choices and a letter"),
        ({"data/test/anatomy_test.csv": ",a,b,c,d,B\n"}, "row 1 is not question, four choices and a letter"),
        ({"data/test/anatomy_test.csv": ""}, r"has no questions of test/anatomy_test\.csv"),
        ({"data/dev/anatomy_dev.csv": QUESTION}, r"has no questions of test/anatomy_test\.csv"),
        ({"a/anatomy_test.csv": QUESTION, "b/anatomy_test.csv": QUESTION}, r"anatomy_test\.csv is there twice"),
        ({"data/test/virology_test.csv": QUESTION}, "the items of mmlu_anatomy in .* can't be read.*fetch it again"),
    ],
    ids=["no letter", "two letters", "no question", "empty", "missing", "twice", "no such subject"],
)
def test_damaged_archives_of_mmlu_are_named(files: dict[str, str], why: str, tmp_path: Path):
    (tmp_path / "mmlu").mkdir()
    with zipfile.ZipFile(tmp_path / "mmlu" / "mmlu.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    with pytest.raises(ValueError, match=why):
        Harness(EvaluationSection(tasks=["mmlu_anatomy"], data=str(tmp_path)), tmp_path / "out")


def test_what_is_refused_at_the_start(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'gsm8kk' is no task of lm_eval; near it are \[.*'gsm8k'"):
        Harness(EvaluationSection(tasks=["ifeval", "gsm8kk"], data=None), tmp_path / "out")
    with pytest.raises(ValueError, match="name each task once"):
        Harness(EvaluationSection(tasks=["math500", "minerva_math500"], data=None), tmp_path / "out")
    with pytest.raises(ValueError, match="ifeval is not a folder"):
        Harness(EvaluationSection(tasks=["ifeval"], data=str(tmp_path)), tmp_path / "out")
    write(tmp_path, "ifeval", "input_data.jsonl", [{"prompt": "x"}])
    with pytest.raises(ValueError, match=r"input_data.jsonl: line 1 has no \['key'"):
        Harness(EvaluationSection(tasks=["ifeval"], data=str(tmp_path)), tmp_path / "out")
