"""Reward models: equal to the model's own output whatever the batch, journalled, and judges of pairs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from builders import own_reward, reward_folder
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATE

from selfsteer.judges import reward
from selfsteer.judges.reward import (
    RewardModel,
    open_renderer,
    open_reward_model,
    reward_of,
    reward_verdicts,
    score_batch,
    score_missing,
)
from selfsteer.measures.verdicts import judge_report
from selfsteer.models import checkpoint
from selfsteer.recipe.sections import Policy
from selfsteer.records import Message, Pair, side
from selfsteer.store.journal import Journal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    return reward_folder(tmp_path_factory.mktemp("reward") / "model")


def conversation(response: str, question: str = "What is the capital of France?") -> reward.Conversation:
    return (Message(role="user", content=question), Message(role="assistant", content=response))


RESPONSES = ("Paris.", "The capital of France is Paris. " * 3, "No.", "I would have to think about that for a while.")


def own_rewards(model: RewardModel) -> list[float]:
    """Of all responses to the same question."""
    rewards = [own_reward(model, "What is the capital of France?", response) for response in RESPONSES]
    assert len({round(value, 4) for value in rewards}) == len(RESPONSES)
    return rewards


@pytest.mark.parametrize("batch_tokens", [1, 200, 16384])
def test_rewards_are_the_models_own(model: RewardModel, batch_tokens: int, tmp_path: Path):
    batched = replace(model, batch_tokens=batch_tokens)
    with Journal(tmp_path) as journal:
        score_missing(batched, map(conversation, RESPONSES), journal, description="rewards", total=4)
        found = [reward_of(batched, conversation(response), journal) for response in RESPONSES]
    assert found == pytest.approx(own_rewards(model), rel=1e-4, abs=1e-6)


def test_a_model_without_padding_token_is_batched_all_the_same(tmp_path: Path):
    unpadded = reward_folder(tmp_path / "model", pad=None)
    renderer = open_renderer(unpadded)
    rows = [renderer.ids(conversation(response)) for response in RESPONSES]
    with open_reward_model(unpadded) as network:
        assert network.config.pad_token_id is None
        assert score_batch(network, rows) == pytest.approx(own_rewards(unpadded), rel=1e-4, abs=1e-6)
        assert network.config.pad_token_id is None


def test_rewards_are_journalled(model: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Journal(tmp_path) as journal:
        score_missing(model, map(conversation, RESPONSES), journal, description="rewards", total=4)
        before = [reward_of(model, conversation(response), journal) for response in RESPONSES]
    monkeypatch.setattr(reward, "open_reward_model", lambda *_: pytest.fail("the model was loaded"))
    with Journal(tmp_path) as journal:
        score_missing(model, map(conversation, RESPONSES), journal, description="rewards", total=4)
        assert [reward_of(model, conversation(response), journal) for response in RESPONSES] == before


def test_two_labels_are_no_reward(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="2 labels; a reward model has one"),
        open_reward_model(reward_folder(tmp_path / "model", labels=2)),
    ):
        pass


def test_reward_verdicts(model: RewardModel, tmp_path: Path):
    own = dict(zip(RESPONSES, own_rewards(model), strict=True))
    best, worst = max(own, key=own.__getitem__), min(own, key=own.__getitem__)
    texts = [(best, worst), (worst, best), (best, best), ("<|im_end|>", worst), (best, "word " * 300)]
    prompt = conversation("")[:1]
    pairs = [
        Pair(query_id=str(n), kind="given", prompt=prompt, chosen=side(chosen), rejected=side(rejected))
        for n, (chosen, rejected) in enumerate(texts)
    ]
    with Journal(tmp_path) as journal:
        verdicts = list(reward_verdicts(model, lambda: pairs, journal, total=len(pairs)))
        assert len(journal) == 2
    assert [verdict.preferred for verdict in verdicts] == ["chosen", "rejected", "tie", None, None]
    assert verdicts[0].margin == pytest.approx(own[best] - own[worst], rel=1e-3)
    report = judge_report(verdicts)
    assert report["accuracy"].mean == pytest.approx(0.5)
    assert report["errors"] == {"special tokens in the text": 1, "too long for the reward model": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_the_judge(value: float, model: RewardModel, tmp_path: Path):
    """As logits of a policy do: a model with such weights would else lose every pair without a word."""
    broken = Path(shutil.copytree(model.model.path, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][0, 0] = value
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    pairs = [Pair(query_id="1", kind="given", prompt=conversation("")[:1], chosen=side("Yes."), rejected=side("No."))]
    with (
        Journal(tmp_path / "parts") as journal,
        pytest.raises(ValueError, match=r"broken: rewards that are not finite\. Look at the model's weights"),
    ):
        list(reward_verdicts(replace(model, model=checkpoint(broken)), lambda: pairs, journal, total=1))


def test_a_conversation_that_the_template_refuses_is_named(model: RewardModel, tmp_path: Path):
    template = tmp_path / "strict.jinja"
    text = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(text + CHAT_TEMPLATE, encoding="utf-8")
    renderer = open_renderer(replace(model, policy=Policy(model=model.model.path, chat_template=str(template))))
    assert renderer.refusal(conversation("Yes.")) is None
    with_system = (Message(role="system", content="Be kind."), *conversation("Yes."))
    assert renderer.refusal(with_system) == "refused by the chat template: no system role"
