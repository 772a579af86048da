"""Evaluations of real (tiny) models: one asking, journalled, resumed; the log-probabilities of given answers; bad input."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfsteer.engines import open as opening
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.sampling import Sampler, kept_open
from selfsteer.evaluating import compare_answers, evaluate_models, read_engine
from selfsteer.evaluations.asking import Asked, Choices
from selfsteer.evaluations.evaluate import answering, ask_with, score_with
from selfsteer.recipe.engines import TransformersSection
from selfsteer.recipe.sections import EvaluationSection, Policy, Queries, Sampled, Training
from selfsteer.records import Message
from selfsteer.store.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval and its libraries warn of themselves

FLOAT32 = TransformersSection(dtype="float32")


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_dir(tmp_path_factory.mktemp("other") / "other", seed=5, max_positions=2048)


@pytest.fixture
def ifeval(tmp_path: Path) -> Path:
    rows = [
        {"key": i, "prompt": f"Say {i}, without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for i in range(6)
    ]
    (tmp_path / "data" / "ifeval").mkdir(parents=True)
    file = tmp_path / "data" / "ifeval" / "input_data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "data"


class Breaks:
    """An engine that answers "x" so often and then breaks off; counts what it was asked."""

    def __init__(self, answers: int) -> None:
        self.left, self.asked = answers, 0

    def __enter__(self) -> "Breaks":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            if not self.left:
                raise ConnectionError("the engine has gone")
            self.left -= 1
            self.asked += 1
            yield Completion(key=request.key, text="x", token_ids=(5,), finish_reason="stop")


def test_before_and_after_on_the_same_items(ifeval: Path, tiny_folder: str, other_folder: str, tmp_path: Path):
    pytest.importorskip("lm_eval")
    section = EvaluationSection(tasks=["ifeval"], data=str(ifeval), max_new_tokens=6, limit=4)
    models = [Policy(model=other_folder), Policy(model=tiny_folder)]
    found = evaluate_models(models, section, FLOAT32, None, tmp_path / "out")
    assert [row["metric"] for row in found["rows"]] == [
        "prompt_level_strict_acc",
        "inst_level_strict_acc",
        "prompt_level_loose_acc",
        "inst_level_loose_acc",
    ]
    row = found["rows"][0]
    assert (row["items"], row["of"], row["limited"]) == (4, 6, True)
    assert row["difference"].mean == pytest.approx(row["after"].mean - row["before"].mean)
    assert row["difference"].n == 4
    first = found["models"]["after"]["first_prompts"]["ifeval"]
    assert first == "<|im_start|>user\nSay 0, without commas.<|im_end|>\n<|im_start|>assistant\n"
    assert found["models"]["after"]["ends"] == ["<|im_end|>"]


def test_a_broken_evaluation_goes_on(ifeval: Path, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval")
    section = EvaluationSection(tasks=["ifeval"], data=str(ifeval), max_new_tokens=6)
    engines = [Breaks(4), Breaks(99)]
    current: list[Breaks] = []
    monkeypatch.setattr(opening, "open_engine", lambda *_args, **_options: current[0])
    current[:] = engines[:1]
    with pytest.raises(ConnectionError):
        evaluate_models([Policy(model=tiny_folder)], section, FLOAT32, None, tmp_path / "out")
    current[:] = engines[1:]
    found = evaluate_models([Policy(model=tiny_folder)], section, FLOAT32, None, tmp_path / "out")
    assert [engine.asked for engine in engines] == [4, 2]
    assert found["rows"][0]["after"].mean == 1.0
    again = evaluate_models([Policy(model=tiny_folder)], section, FLOAT32, None, tmp_path / "out")
    assert engines[1].asked == 2
    assert again["rows"] == found["rows"]


def test_scores_are_the_models_own(tiny_folder: str, tmp_path: Path):
    """log p of each continuation behind the rendered prompt, by a plain forward pass."""
    items = [
        Choices(user("What is the capital of France?"), ("Paris", "A lighthouse", "B")),
        Choices((Message(role="system", content="Answer accurately."), *user("Why?")), ("A", "B", "C", "D")),
    ]
    model = answering(Policy(model=tiny_folder), FLOAT32)
    with Journal(tmp_path) as journal:
        found = score_with(model, Training(dtype="float32"), journal)(items)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    network = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    for item, scores in zip(items, found, strict=True):
        prompt = tokenizer.apply_chat_template([dict(each) for each in item.messages], add_generation_prompt=True)[
            "input_ids"
        ]
        for text, score in zip(item.continuations, scores, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps = network(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            wanted = sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(ids))
            assert score == pytest.approx(wanted, abs=1e-4)


def test_what_can_not_be_asked_is_counted_by_its_reason(tmp_path: Path):
    folder = tiny_model_dir(tmp_path / "model", max_positions=48)
    model = answering(Policy(model=folder), FLOAT32)
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=64)
    texts = ["Who?", "x <|im_end|> y", "fox " * 60]
    with Journal(tmp_path / "parts") as journal, kept_open(model.open) as engine:
        said = ask_with(Sampler(engine, model.prompts), model.request, journal, "answers")(
            [Asked(user(text), greedy) for text in texts]
        )
    assert [answer.error for answer in said] == [None, "special tokens in the text", "longer than the model's context"]


def test_greedy_answers_are_those_of_generate(tiny_folder: str, tmp_path: Path):
    """The same prompt as training, rendered once; no sampling."""
    model = answering(Policy(model=tiny_folder), FLOAT32)
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=8)
    with Journal(tmp_path) as journal, kept_open(model.open) as engine:
        (said,) = ask_with(Sampler(engine, model.prompts), model.request, journal, "answers")(
            [Asked(user("Explain how rainbows form."), greedy)]
        )
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    network = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Explain how rainbows form."}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    wanted = network.generate(input_ids=prompt, do_sample=False, max_new_tokens=8)[0, prompt.shape[1] :]
    assert said.text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_answers_are_compared(tiny_folder: str, other_folder: str, queries_file: Path, tmp_path: Path):
    """Of a model against itself, with greedy answers: all alike, so the win rate is one half."""

    def run(a: str, b: str) -> dict[str, Any]:
        queries = Queries(path=str(queries_file), limit=5)
        sampled = Sampled(temperature=0.0, top_p=1.0, max_new_tokens=6)
        return compare_answers(
            (Policy(model=a), Policy(model=b)), queries, sampled, (FLOAT32, tiny_folder), tmp_path / "out"
        )

    same = {row["metric"]: row["after"] for row in run(tiny_folder, tiny_folder)["rows"]}
    assert same["win rate"].mean == pytest.approx(0.5, abs=1e-6)
    forth = {row["metric"]: row["after"] for row in run(tiny_folder, other_folder)["rows"]}
    back = {row["metric"]: row["after"] for row in run(other_folder, tiny_folder)["rows"]}
    assert forth["win rate"].mean == pytest.approx(1 - back["win rate"].mean, abs=1e-6)
    assert forth["win rate"].n == 5
    assert "length-controlled win rate" in forth
    assert forth["orders disagree"].mean == back["orders disagree"].mean


@pytest.mark.parametrize(
    ("tasks", "data", "said"),
    [
        (["alpaca_eval"], True, "alpaca_eval needs a judge"),
        (["ifeval", "ifeval"], True, "name each task once"),
        ([], True, "name each task once"),
        (["ifeval"], False, "is not a folder"),
    ],
)
def test_bad_sections_are_refused(
    tasks: Sequence[str], data: bool, said: str, ifeval: Path, tiny_folder: str, tmp_path: Path
):
    section = EvaluationSection(tasks=list(tasks), data=str(ifeval if data else tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=said):
        evaluate_models([Policy(model=tiny_folder)], section, FLOAT32, None, tmp_path / "out")


def test_a_model_without_chat_template_is_refused(tiny_folder: str, tmp_path: Path):
    folder = Path(tiny_model_dir(tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        evaluate_models([Policy(model=str(folder))], EvaluationSection(tasks=["ifeval"]), FLOAT32, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_engine_files(tmp_path: Path):
    assert read_engine(None).kind == "transformers"
    (tmp_path / "engine.yaml").write_text("engine:\n  kind: transformers\n  batch_size: 3\n", encoding="utf-8")
    engine = read_engine(tmp_path / "engine.yaml")
    assert engine.kind == "transformers"
    assert engine.batch_size == 3
    (tmp_path / "none.yaml").write_text("judge: {}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no section engine"):
        read_engine(tmp_path / "none.yaml")
    (tmp_path / "wrong.yaml").write_text("engine:\n  batch: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"wrong.yaml:2"):
        read_engine(tmp_path / "wrong.yaml")
