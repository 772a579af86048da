"""`selfsteer measure` with every kind of judge, end to end on tiny models: what is printed is what plain forwards say."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import own_reward, reward_folder
from misbehaving import Call, MisbehavingServer, Reply, chat
from tiny import tiny_model_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM

from selfsteer import cli
from selfsteer.given import measure_pairs, train_pairs
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.text import RecipeError

PAIRS = (
    ("How do rainbows form?", "Sunlight passes through drops of water.", "Dunno."),
    ("What is the capital of France?", "Paris.", "The quick brown fox jumps over the lazy dog."),
    ("Write a short story.", "A keeper finds a letter in a bottle.", "A story about a lighthouse."),
)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("given") / "pairs.jsonl"
    rows = ({"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def logps(folder: str, prompt: str, response: str) -> list[float]:
    """Of each token of the response and its end token, by one plain forward."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([before + ids])).logits[0].log_softmax(-1)
    return [found[len(before) + i - 1, token].item() for i, token in enumerate(ids)]


def accuracy(margins: list[float]) -> float:
    return sum(margin > 0 for margin in margins) / len(margins)


def test_implicit_reward_and_likelihood(given: Path, tiny_folder: str, tmp_path: Path):
    """log pi(y) - log pi_ref(y) of chosen above that of rejected; the means per token of the policy alone."""
    trained = tiny_model_dir(tmp_path / "trained", seed=1, max_positions=2048)
    found = measure_pairs(given, tiny_folder, f"implicit:{trained}")
    gains: list[float] = []
    means: list[float] = []
    for prompt, *both in PAIRS:
        before = [logps(tiny_folder, prompt, response) for response in both]
        after = [logps(trained, prompt, response) for response in both]
        rewards = [sum(now) - sum(then) for now, then in zip(after, before, strict=True)]
        gains.append(rewards[0] - rewards[1])
        means.append(sum(before[0]) / len(before[0]) - sum(before[1]) / len(before[1]))
    assert found["implicit_reward"]["margin"].mean == pytest.approx(sum(gains) / 3, abs=1e-3)
    assert found["implicit_reward"]["accuracy"].mean == pytest.approx(accuracy(gains))
    assert found["likelihood"]["margin"].mean == pytest.approx(sum(means) / 3, abs=1e-4)
    assert found["likelihood"]["accuracy"].mean == pytest.approx(accuracy(means))
    assert found["likelihood"]["longer_wins"].n == 3
    assert "judge" not in found


def test_what_is_dropped_is_counted_and_nothing_left_is_an_error(tiny_folder: str, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        ("Why?", "So.<|im_end|>", "Dunno.<|im_end|>"),
        ("How?", "So.", "So.<|im_end|>"),
        ("Who?", "<|im_end|> I.", "You."),
    ]
    content = [json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) + "\n" for prompt, good, bad in rows]
    file.write_text("".join(content))
    found = measure_pairs(file, tiny_folder)
    assert found.get("pairs") == 1
    assert found.get("dropped") == {"chosen equal to rejected": 1, "special tokens in a response": 1}
    plain = tmp_path / "plain.jsonl"
    plain.write_text(content[0].replace("<|im_end|>", ""))
    assert found["on_policy"] == measure_pairs(plain, tiny_folder)["on_policy"], "the end token is trained once"
    file.write_text("".join(content[1:]))
    with pytest.raises(ValueError, match=r"pairs\.jsonl: no pair is left of 2: 1 .*, 1 "):
        measure_pairs(file, tiny_folder)


def test_a_model_is_no_judge_of_itself_by_implicit_reward(given: Path, tiny_folder: str):
    """Without training every reward is zero: all ties."""
    found = measure_pairs(given, tiny_folder, f"implicit:{tiny_folder}")["implicit_reward"]
    assert (found["ties"].mean, found["accuracy"].mean) == (1, 0.5)


def test_a_reward_model_named_alone_or_by_a_file(given: Path, tiny_folder: str, tmp_path: Path):
    reward = reward_folder(tmp_path / "reward")
    margins = [own_reward(reward, prompt, good) - own_reward(reward, prompt, bad) for prompt, good, bad in PAIRS]
    file = tmp_path / "judge.yaml"
    file.write_text(json.dumps({"judge": {"kind": "reward_model", "model": reward.model.path}}))
    for judge in (reward.model.path, str(file)):
        found = measure_pairs(given, tiny_folder, judge)["judge"]
        assert found["margin"].mean == pytest.approx(sum(margins) / 3, abs=1e-4)
        assert found["accuracy"].mean == pytest.approx(accuracy(margins))
        assert not {"flips", "averaged_accuracy"} & found.keys(), "it sees one response at a time"


def test_an_llm_in_this_process(given: Path, tiny_folder: str):
    found = measure_pairs(given, tiny_folder, tiny_folder)["judge"]
    assert found["judged"].mean == 1
    assert {"accuracy", "averaged_accuracy", "ties", "flips", "prefers_first", "mass"} <= found.keys()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command; returns what it prints."""

    def command(*arguments: str) -> str:
        monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)
        monkeypatch.setattr(sys, "argv", ["selfsteer", *arguments])
        monkeypatch.setenv("COLUMNS", "120")  # an interval stands beside its value
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return command


def test_a_judge_behind_a_server(given: Path, tiny_folder: str, tmp_path: Path, shown: Callable[..., str]):
    """Pair 1: chosen in both orders (0.9, 0.8). Pair 2: 0.8 shown first, 0.3 shown second, a tie that averages to 0.55.
    Pair 3: no answer.
    """

    def script(call: Call) -> Reply:
        if call.prompt == "Hello":  # does it live?
            return chat("Hi")
        first = call.prompt.split("[response A ")[1].split("]\n", 1)[1].split("\n[end")[0]
        probability = {PAIRS[0][1]: 0.9, PAIRS[0][2]: 0.2, PAIRS[1][1]: 0.8, PAIRS[1][2]: 0.7}.get(first)
        if probability is None:
            return chat(None, finish="content_filter")
        top = [{"token": x, "logprob": math.log(p)} for x, p in (("A", probability), ("B", 1 - probability))]
        return chat("A", logprobs={"content": [{"token": "A", "top_logprobs": top}]})

    file = tmp_path / "judge.yaml"
    with MisbehavingServer(script) as server:
        engine = {"kind": "openai", "base_url": server.base_url, "model": "judge", "tries": 1, "first_pause": 0.01}
        file.write_text(json.dumps({"judge": {"kind": "llm", "engine": engine}}))
        text = shown("measure", str(given), "--policy", tiny_folder, "--judge", str(file))
    judged = text[text.index("judged by the judge") : text.index("judged by mean log-probability")]
    lines = [line.split() for line in judged.splitlines()]
    numbers = {" ".join(line[:-3]): line[-3] for line in lines if len(line) > 3}
    assert numbers["accuracy"] == "75.0%"
    assert numbers["of averaged orders"] == "100.0%"
    assert numbers["ties"] == numbers["orders disagree"] == "50.0%"
    assert "no verdict: no answer (finish reason content_filter)" in " ".join(judged.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("judge: {kind: llm}", "judge.yaml:1: needs judge.model|kind: llm needs judge.model"),
        ("judge:\n  kind: llm\n  modle: x", r"judge.yaml:3: modle: unknown key; did you mean model"),
        ("policy: {model: x}", "names no judge"),
    ],
)
def test_a_file_without_a_usable_judge_is_refused(given: Path, tiny_folder: str, tmp_path: Path, text: str, message: str):
    file = tmp_path / "judge.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        measure_pairs(given, tiny_folder, str(file))


def test_a_run_is_measured_under_the_policy_that_its_pairs_are_for(given: Path, tiny_folder: str, tmp_path: Path):
    """Round 1 begins with the recipe's model; a file of pairs says nothing of one."""
    recipe = {"output": str(tmp_path / "run"), "policy": {"model": tiny_folder}, "queries": {"path": "unused.jsonl"}}
    recipe |= {"alignment": {"max_steps": 1}, "training": {"dtype": "float32"}}
    train_pairs(given, Recipe.model_validate(recipe))
    assert measure_pairs(tmp_path / "run") == measure_pairs(tmp_path / "run", tiny_folder)
    with pytest.raises(ValueError, match=r"pairs.jsonl: a file of pairs names no policy.*--policy"):
        measure_pairs(given)
