"""Reward models: trained on made-up pairs that differ in a word, measured, resumed, loaded as an ordinary model."""

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_model_dir
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from selfsteer import runtime
from selfsteer.judges.find import ask, find_judge
from selfsteer.judges.reward import RewardModel, open_renderer, open_reward_model, score_batch
from selfsteer.models import checkpoint
from selfsteer.recipe.sections import JudgeSection, Policy
from selfsteer.records import Pair, side
from selfsteer.rewards import RewardSettings, Source, is_held_out, reward_bench, train_reward_model
from selfsteer.store.journal import Journal
from selfsteer.training import reward as training
from selfsteer.training.reward import RewardTraining

pytest.importorskip("trl", reason="needs the extra selfsteer[reward]")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its libraries warn of themselves

SETTINGS = RewardSettings(holdout=0.25, max_tokens=100, dtype="float32")
TRAINING = RewardTraining(epochs=8.0, learning_rate=3e-3, batch_size=8, micro_batch_size=4, dtype="float32", save_steps=4)


def pairs_file(
    path: Path, *, start: int = 0, count: int = 60, extra: Callable[[int], dict[str, Any]] = lambda _: {}
) -> Path:
    """The better answer says Paris, the worse one lighthouse."""
    rows = [
        {
            "prompt": f"Question {i}: what is the capital of France?",
            "chosen": f"The answer {i % 7} is Paris.",
            "rejected": f"The answer {i % 5} is a lighthouse.",
            **extra(i),
        }
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: str) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rewards")
    return train_reward_model(
        [Source(path=pairs_file(folder / "pairs.jsonl"))], tiny_folder, folder / "out", SETTINGS, TRAINING
    )


def test_it_learns_what_tells_the_pairs_apart(trained: dict[str, Any]):
    report = trained["held_out"]["pairs.jsonl"]
    data = trained["data"]["pairs.jsonl"]
    assert data["rows"] == 60
    assert data["held out"] == report["pairs"] == sum(is_held_out_of(i) for i in range(60))
    assert data["trained on"] == 60 - data["held out"]
    assert report["accuracy"]["mean"] > 0.9
    assert report["accuracy"]["low"] > 0.5


def is_held_out_of(number: int) -> bool:
    from selfsteer.store.durable import digest

    messages = [{"role": "user", "content": f"Question {number}: what is the capital of France?"}]
    return is_held_out(digest(messages)[:16], SETTINGS.holdout)


def test_it_loads_as_an_ordinary_model_and_judges(trained: dict[str, Any], tmp_path: Path):
    model = AutoModelForSequenceClassification.from_pretrained(trained["model"], dtype=torch.float32)
    assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(trained["model"])
    rewards: list[float] = []
    for answer in ("The answer is Paris.", "The answer is a lighthouse."):
        messages = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": answer}]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            rewards.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert rewards[0] > rewards[1]
    section = JudgeSection(kind="reward_model", model=trained["model"], dtype="float32")
    judge = find_judge(section, Policy(model=trained["model"]))
    assert judge is not None
    pair = Pair(
        query_id="q",
        kind="given",
        prompt=({"role": "user", "content": "What is the capital of France?"},),
        chosen=side("The answer is Paris."),
        rejected=side("The answer is a lighthouse."),
    )
    with Journal(tmp_path) as journal:
        (verdict,) = ask(judge, lambda: [pair], journal, total=1)
    assert verdict.preferred == "chosen"
    assert verdict.margin == pytest.approx(rewards[0] - rewards[1], abs=1e-5)


def test_the_same_command_again_is_done(trained: dict[str, Any], tiny_folder: str, monkeypatch: pytest.MonkeyPatch):
    folder = Path(trained["model"]).parent
    monkeypatch.setattr("selfsteer.rewards.train_reward", None)
    sources = [Source(path=folder.parent / "pairs.jsonl")]
    (folder / "checkpoint-8").mkdir()  # as of a kill behind the result
    assert train_reward_model(sources, tiny_folder, folder, SETTINGS, TRAINING) == trained
    assert not (folder / "checkpoint-8").exists()
    with pytest.raises(ValueError, match="holds a reward model of other data or settings"):
        train_reward_model(sources, tiny_folder, folder, SETTINGS, replace(TRAINING, seed=1))


def test_a_stopped_training_goes_on(
    trained: dict[str, Any], tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped after six steps and continued, it ends with the weights of the one that was not stopped."""
    source = [Source(path=pairs_file(tmp_path / "pairs.jsonl"))]
    steps = 0

    class Stops(training.Keeper):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == 6:
                runtime.request_stop()
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(training, "Keeper", Stops)
    with runtime.graceful_stop(), pytest.raises(runtime.Interrupted):
        train_reward_model(source, tiny_folder, tmp_path / "out", SETTINGS, TRAINING)
    with pytest.raises(ValueError, match="holds a reward model of other data or settings"):
        train_reward_model(source, tiny_folder, tmp_path / "out", SETTINGS, replace(TRAINING, lora_rank=4))
    assert (tmp_path / "out" / "checkpoint-6" / "COMPLETE").is_file()
    found = train_reward_model(source, tiny_folder, tmp_path / "out", SETTINGS, TRAINING)
    whole, resumed = (
        AutoModelForSequenceClassification.from_pretrained(each["model"]).state_dict() for each in (trained, found)
    )
    for name, weights in whole.items():
        torch.testing.assert_close(weights, resumed[name], atol=1e-6, rtol=1e-5)
    assert not list((tmp_path / "out").glob("checkpoint-*")), "they are gone with the finished training"
    lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.parametrize(
    ("room", "named"),
    [(1_000, "tokens.jsonl"), (25_000, ".cache"), (60_000, "checkpoint-4")],
    ids=["pairs", "rows", "weights"],
)
def test_a_full_disk_is_named(room: int, named: str, tiny_folder: str, tmp_path: Path):
    """A limit on the file size stands in for it."""
    source = [Source(path=pairs_file(tmp_path / "pairs.jsonl"))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=f"run the same command again.*{named}"):
            train_reward_model(source, tiny_folder, tmp_path / "out", SETTINGS, TRAINING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_adapters_margins_and_centring(tiny_folder: str, tmp_path: Path):
    """With margins the two scores' difference is asked for; the result is one plain model all the same."""
    file = pairs_file(tmp_path / "pairs.jsonl", extra=lambda i: {"score_chosen": 8 + i % 2, "score_rejected": 5})
    settings = replace(TRAINING, lora_rank=4, margin=True, center=0.01, learning_rate=1e-2)
    found = train_reward_model([Source(path=file)], tiny_folder, tmp_path / "out", SETTINGS, settings)
    assert found["held_out"]["pairs.jsonl"]["accuracy"]["mean"] > 0.9
    assert not (Path(found["model"]) / "adapter_config.json").exists()
    plain = replace(settings, margin=False)
    without = train_reward_model([Source(path=file)], tiny_folder, tmp_path / "plain", SETTINGS, plain)
    margins = [each["held_out"]["pairs.jsonl"]["margin"]["mean"] for each in (found, without)]
    assert margins[0] > margins[1], "a margin pushes the rewards further apart"
    bare = pairs_file(tmp_path / "bare.jsonl")
    with pytest.raises(ValueError, match=r"--margin needs one of"):
        train_reward_model([Source(path=bare)], tiny_folder, tmp_path / "bare", SETTINGS, settings)


def test_weights_take_parts_and_repeat(tiny_folder: str, tmp_path: Path):
    one, two = pairs_file(tmp_path / "one.jsonl"), pairs_file(tmp_path / "two.jsonl", start=100)
    short = replace(TRAINING, epochs=0.1)
    sources = [Source(path=one, weight=0.5), Source(path=two, weight=2.0)]
    found = train_reward_model(sources, tiny_folder, tmp_path / "out", SETTINGS, short)["data"]
    kept = {name: each["rows"] - each["held out"] for name, each in found.items()}
    assert 0.3 * kept["one.jsonl"] < found["one.jsonl"]["trained on"] < 0.7 * kept["one.jsonl"]
    assert found["two.jsonl"]["trained on"] == 2 * kept["two.jsonl"]
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert rates[0] == TRAINING.learning_rate, "of two steps the first is taken, too"
    assert len(rates) == 2


def test_rows_that_can_not_be_trained_on_are_kept_with_their_reason(tiny_folder: str, tmp_path: Path):
    file = pairs_file(tmp_path / "pairs.jsonl", count=12)
    bad = [
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "a <|im_end|> b", "rejected": "c"},
        {"prompt": "x", "chosen": "fox " * 200, "rejected": "c"},
    ]
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in bad)
    short = replace(TRAINING, epochs=1.0)
    data = train_reward_model([Source(path=file)], tiny_folder, tmp_path / "out", SETTINGS, short)["data"]["pairs.jsonl"]
    assert data["dropped"] == {
        "chosen equal to rejected": 1,
        "special tokens in the text": 1,
        "too long for the reward model": 1,
    }
    kept = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [each["reason"] for each in kept] == list(data["dropped"])


def test_scores_do_not_depend_on_the_batch_with_padding_as_the_end_token(tmp_path: Path):
    """pad = eos, and a template that ends in the end token: TRL trains and we score at the same token."""
    folder = Path(tiny_model_dir(tmp_path / "base", max_positions=512))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    source = [Source(path=pairs_file(tmp_path / "pairs.jsonl"))]
    found = train_reward_model(source, str(folder), tmp_path / "out", SETTINGS, replace(TRAINING, epochs=2.0))
    reward = RewardModel(model=checkpoint(Path(found["model"])), policy=Policy(model=found["model"]), dtype="float32")
    renderer = open_renderer(reward)
    assert renderer.tokenizer.pad_token_id == renderer.tokenizer.eos_token_id
    answers = ("Paris.", "The capital of France is Paris. " * 4, "No.")
    rows = [
        renderer.ids(({"role": "user", "content": "What?"}, {"role": "assistant", "content": answer})) for answer in answers
    ]
    with open_reward_model(reward) as model:
        together = score_batch(model, rows)
        alone = [score_batch(model, [row])[0] for row in rows]
        with torch.no_grad():
            bare = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)
    assert alone == pytest.approx(bare, abs=1e-6)
    assert len({round(each, 3) for each in alone}) == 3


def test_benchmarks_of_every_format(trained: dict[str, Any], tmp_path: Path):
    """A model that likes Paris: right on the first of two subsets, wrong on the second."""
    good, bad = "The answer is Paris.", "The answer is a lighthouse."
    rows = [
        {"prompt": "What?", "chosen": good, "rejected": bad, "subset": "alpacaeval-easy", "id": None},
        {"prompt": "What?", "chosen": bad, "rejected": good, "subset": "alpacaeval-hard", "id": None},
    ]
    (tmp_path / "rb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    llmbar = [{"input": "What?", "output_1": bad, "output_2": good, "label": label} for label in (1, 2, 2)]
    (tmp_path / "llmbar.json").write_text(json.dumps(llmbar))
    with pairs_file(tmp_path / "pairs.jsonl", start=500, count=5).open("a") as lines:
        lines.write(json.dumps({"prompt": "x", "chosen": "same", "rejected": "same"}) + "\n")
    (tmp_path / "more").mkdir()
    files = [tmp_path / name for name in ("rb.jsonl", "llmbar.json")]
    files += [tmp_path / "pairs.jsonl", pairs_file(tmp_path / "more" / "pairs.jsonl", start=600, count=3)]
    found = reward_bench(trained["model"], files, tmp_path / "out", SETTINGS)
    assert reward_bench(str(Path(trained["model"]).parent), files, tmp_path / "again", SETTINGS) == found, "by its folder"
    assert {name: each.mean for name, each in found["rb.jsonl"]["subsets"].items()} == {
        "alpacaeval-easy": 1.0,
        "alpacaeval-hard": 0.0,
    }
    assert found["rb.jsonl"]["score"] is None
    assert found["llmbar.json"]["score"].mean == pytest.approx(2 / 3)
    assert found[f"{tmp_path.name}/pairs.jsonl"]["accuracy"].mean == 1.0
    assert found["more/pairs.jsonl"]["pairs"] == 3
    assert found[f"{tmp_path.name}/pairs.jsonl"]["dropped"] == {"chosen equal to rejected": 1}


def test_what_is_refused(tiny_folder: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere.jsonl: no such"):
        train_reward_model([Source(path=tmp_path / "nowhere.jsonl")], tiny_folder, tmp_path / "out", SETTINGS, TRAINING)
    two, file = tmp_path / "two", pairs_file(tmp_path / "pairs.jsonl", count=3)
    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=2).save_pretrained(two)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(two)
    with pytest.raises(ValueError, match="2 labels"):
        reward_bench(str(two), [file], tmp_path / "bench", SETTINGS)
    with pytest.raises(ValueError, match=r"--epochs: 0 passes train nothing"):
        train_reward_model([Source(path=file)], tiny_folder, tmp_path / "out", SETTINGS, replace(TRAINING, epochs=0.0))
    with pytest.raises(ValueError, match=r"pairs.jsonl: named twice"):
        train_reward_model([Source(path=file)] * 2, tiny_folder, tmp_path / "out", SETTINGS, TRAINING)
    assert not (tmp_path / "out").exists()
