"""Benchmarks at the end of a run, and tasks with a judge: answered by tiny models, on made-up items."""

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from misbehaving import Call, MisbehavingServer, Reply, chat
from tiny import tiny_model_dir

from selfsteer import pipeline
from selfsteer.engines import open as opening
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.evaluating import evaluate_models
from selfsteer.evaluations.asking import Asked
from selfsteer.judges.find import find_judge
from selfsteer.models import resolve
from selfsteer.recipe.engines import TransformersSection
from selfsteer.recipe.sections import EvaluationSection, JudgeSection, Policy, Recipe
from selfsteer.stages.evaluation import evaluate_run, verdicts_of
from selfsteer.store.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and its libraries warn of themselves

FLOAT32 = TransformersSection(dtype="float32")


def write(file: Path, rows: Iterable[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write(
        folder / "ifeval" / "input_data.jsonl",
        [
            {"key": i, "prompt": f"Say {i}, please.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
            for i in range(5)
        ],
    )
    write(
        folder / "mt_bench" / "question.jsonl",
        [{"question_id": i, "category": "writing", "turns": [f"Write {i}.", "Shorter."]} for i in range(3)],
    )
    write(folder / "arena_hard" / "question.jsonl", [{"uid": str(i), "prompt": f"prompt {i}"} for i in range(3)])
    write(folder / "arena_hard" / "model_answer" / "gpt-4-0314.jsonl", [{"uid": str(i), "answer": "x"} for i in range(3)])
    outputs = [{"instruction": f"instruction {i}", "output": "A fox.", "generator": "base"} for i in range(6)]
    (folder / "alpaca_eval").mkdir()
    (folder / "alpaca_eval" / "model_outputs.json").write_text(json.dumps(outputs), encoding="utf-8")
    return folder


def test_a_run_measures_before_and_after(
    recipe_of: Callable[..., dict[str, Any]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("lm_eval")
    evaluation = {"tasks": ["ifeval"], "data": str(data), "limit": 3, "max_new_tokens": 6}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"evaluation": evaluation, "generator.kind": "none"}))
    pipeline.run(recipe)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    rows = metrics["evaluation"]["rows"]
    assert [(row["task"], row["items"], row["of"], row["limited"]) for row in rows] == [("ifeval", 3, 5, True)] * 4
    models = metrics["evaluation"]["models"]
    assert models["before"]["digest"] != models["after"]["digest"]
    assert (models["before"]["model"], models["after"]["model"]) == ("first policy", "aligned policy")
    page = (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "round-1" / "6-policy" / "model" / "README.md").read_text()
    for text in (page, card):
        assert "ifeval, prompt_level_strict_acc" in text
        assert "limited: 3 of 5 items" in text
    assert "Benchmarks are not among them" not in card

    def none(*_args: Any, **_options: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("selfsteer.stages.evaluation.Plan.evaluate", none)
    pipeline.run(recipe)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluation"] == metrics["evaluation"]
    write(data / "ifeval" / "more.jsonl", [])
    with pytest.raises(AssertionError, match="asked again"):  # its files are not what they were
        pipeline.run(recipe)


def test_a_run_with_a_task_that_will_not_do_does_not_begin(
    recipe_of: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
):
    evaluation = {"tasks": ["mt_bench"], "data": str(data)}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"evaluation": evaluation}))
    with pytest.raises(ValueError, match="mt_bench needs a judge"):
        pipeline.run(recipe)
    assert not (tmp_path / "run").exists()


class Says:
    """An engine that says the same to everything but what a judge is asked."""

    def __enter__(self) -> "Says":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            text = request.messages[-1]["content"]
            said = "[[7]]" if "Rating: [[5]]" in text else "[[B>A]]" if "[[A>>B]]" in text else "an answer"
            yield Completion(key=request.key, text=said, token_ids=(5,), finish_reason="stop")


def test_tasks_with_a_judge(data: Path, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The judge grades 7, and always prefers the second: against the baseline a win and a loss."""
    monkeypatch.setattr(opening, "open_engine", lambda *_args, **_options: Says())
    section = EvaluationSection(tasks=["mt_bench", "arena_hard"], data=str(data), limit=2)
    found = evaluate_models([Policy(model=tiny_folder)], section, FLOAT32, tiny_folder, tmp_path / "out")
    figures = {(row["task"], row["metric"]): row for row in found["rows"]}
    mt, arena = figures["mt_bench", "grade (1 to 10)"], figures["arena_hard", "win rate against gpt-4-0314"]
    assert (mt["after"].mean, mt["items"], mt["of"], mt["judge"], mt["form"]) == (
        7.0,
        2,
        3,
        Path(tiny_folder).name,
        "number",
    )
    assert (arena["after"].mean, arena["limited"]) == (0.5, True)
    tasks = {task["task"]: task for task in found["models"]["after"]["tasks"]}
    assert tasks["mt_bench"]["notes"][0] == "selfsteer's own prompts, not the published ones"
    assert tasks["arena_hard"]["notes"] == ["selfsteer's own prompt, not the published one", "2 of 2 flip with the order"]


def test_alpaca_eval_through_a_real_judge(data: Path, tiny_folder: str, tmp_path: Path):
    """A tiny judge in this process; the figure says that it is not the leaderboard's."""
    section = EvaluationSection(tasks=["alpaca_eval"], data=str(data), max_new_tokens=5)
    engine = TransformersSection(dtype="float32", batch_size=6)
    monkey = Policy(model=tiny_folder)
    found = evaluate_models([monkey], section, engine, tiny_folder, tmp_path / "out")
    names = [row["metric"] for row in found["rows"]]
    assert names[:2] == ["win rate", "length-controlled win rate"]
    assert found["rows"][0]["after"].n == 6
    (task,) = found["models"]["after"]["tasks"]
    assert "length-controlled by the formula without difficulty: not the leaderboard's" in task["notes"]


def test_a_judge_that_goes_is_asked_for_the_rest(
    recipe_of: Callable[..., dict[str, Any]], data: Path, tiny_folder: str, tmp_path: Path
):
    """It dies at the third question: one of six items has its verdict in both orders."""
    evaluation = {"tasks": ["alpaca_eval"], "data": str(data), "max_new_tokens": 5}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"evaluation": evaluation}))
    policy, gone = resolve(Policy(model=tiny_folder)), True

    def script(call: Call) -> Reply:
        if gone and call.number == 3:
            server.die()
            return Reply(ending="nothing")
        return chat("A")

    def judged(server: MisbehavingServer) -> int:
        engine = {"kind": "openai", "base_url": server.base_url, "model": "judge", "concurrency": 1, "tries": 1}
        judge = find_judge(JudgeSection.model_validate({"kind": "llm", "engine": engine}), Policy(model="-"))
        found = evaluate_run(recipe, policy, policy, judge, tmp_path / "run" / "evaluation")
        return found["rows"][0]["after"]["n"]

    file = tmp_path / "run" / "evaluation" / "result.json"
    with MisbehavingServer(script) as server:
        assert judged(server) == 1
    assert not file.exists()
    gone = False
    with MisbehavingServer(script) as server:
        assert judged(server) == 6
        assert len(server.calls) == 10
        assert judged(server) == 6
        assert len(server.calls) == 10
    assert file.exists()


def test_a_judge_in_words_is_asked_what_its_context_holds(tmp_path: Path):
    """64 positions: what leaves no room is not asked, and no answer is longer than the room."""
    judge = find_judge(
        JudgeSection(kind="llm", model=tiny_model_dir(tmp_path / "judge", max_positions=64)), Policy(model="-")
    )
    assert judge is not None
    short, long = (({"role": "user", "content": "Write. " * words},) for words in (1, 40))
    asked = [Asked(messages, Sampling(temperature=0.0, max_new_tokens=2048)) for messages in (short, long)]
    with Journal(tmp_path / "parts") as journal:
        in_words = verdicts_of(judge, journal).ask
        assert in_words is not None
        answered, refused = in_words(asked)
    assert answered.error is None
    assert refused.error == "too long for the judge"


def test_a_reward_model_grades_nothing(data: Path, tiny_folder: str, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "rm")
    section = EvaluationSection(tasks=["mt_bench"], data=str(data))
    with pytest.raises(ValueError, match="mt_bench is judged in words, which rm does not do"):
        evaluate_models([Policy(model=tiny_folder)], section, FLOAT32, str(tmp_path / "rm"), tmp_path / "out")


def test_a_template_is_told_the_day_on_which_the_answers_began(data: Path, tmp_path: Path):
    """On another day they are not asked again; `run.json` keeps the day."""
    model = tiny_model_dir(tmp_path / "model")
    template = Path(model) / "chat_template.jinja"
    template.write_text("Today is {{ strftime_now('%d %b %Y') }}." + template.read_text())
    section = EvaluationSection(tasks=["ifeval"], data=str(data), limit=1, max_new_tokens=3)
    out = tmp_path / "out"

    def first_prompt() -> str:
        found = evaluate_models([Policy(model=model)], section, FLOAT32, None, out)
        return found["models"]["after"]["first_prompts"]["ifeval"]

    today = datetime.now(UTC).strftime("%d %b %Y")
    assert first_prompt().startswith(f"Today is {today}.")
    described = json.loads((out / "run.json").read_text())
    described["sessions"][0]["date"] = "2025-01-31"
    (out / "run.json").write_text(json.dumps(described))
    assert first_prompt().startswith("Today is 31 Jan 2025.")
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 1
