"""WPO: weights by hand, and whole trainings against the paper's equations written out with plain forwards."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import FLOAT32, curve, steering_group, training_job, write_pairs
from tiny import tiny_model_dir
from torch import Tensor, tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from selfsteer.recipe.sections import Lora, Policy
from selfsteer.records import Pair
from selfsteer.training.objective import PairLogps, expected_logps, objective, pair_weights, response_weights
from selfsteer.training.scoring import open_scorer, tokenize
from selfsteer.training.train import TrainingJob, train

# peft 0.21 asks transformers 5.23 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

PROBABILITIES = tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]])


def expected(logits: Tensor, weighting: Any) -> Tensor:
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    return expected_logps(exponentials.sum(-1), exponentials.square().sum(-1), weighting)


def test_expected_logps_by_hand():
    """Largest 0.5 and 0.8; squares 0.25 + 0.0625 + 0.0625 = 0.375 and 0.64 + 0.01 + 0.01 = 0.66. Logits may be shifted."""
    logits = PROBABILITIES.log() + tensor([[3.0], [-7.0]])
    assert expected(logits, "wpo_unaligned").tolist() == [0.0, 0.0]
    assert expected(logits, "wpo_greedy").exp().tolist() == pytest.approx([0.5, 0.8])
    assert expected(logits, "wpo").exp().tolist() == pytest.approx([0.375, 0.66])


def test_response_weights_by_hand():
    """Tokens of probability 0.25 and 0.8, and one of 0.1: plain sqrt(0.25 * 0.8) = 0.447214 and 0.1.

    Greedy: sqrt(0.25 / 0.5 * 0.8 / 0.8) = 0.707107, 0.1 / 0.8 = 0.125. Sampled: sqrt(0.25 / 0.375 * 0.8 / 0.66) = 0.898933,
    0.1 / 0.66 = 0.151515.
    """
    logps = tensor([0.25, 0.8, 0.1]).log()
    logits = PROBABILITIES[[0, 1, 1]].log()
    by_hand = {"wpo_unaligned": [0.447214, 0.1], "wpo_greedy": [0.707107, 0.125], "wpo": [0.898933, 0.151515]}
    for weighting, weights in by_hand.items():
        found = response_weights(logps, expected(logits, weighting), [2, 1])
        assert found.tolist() == pytest.approx(weights, abs=1e-5)


def test_pair_weights_are_products_of_at_most_one_without_gradient():
    logits = PROBABILITIES.log().requires_grad_()
    weights = response_weights(logits.log_softmax(-1)[:, 0], expected(logits, "wpo"), [1, 1])
    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([0.5 / 0.375, 0.8 / 0.66])
    assert pair_weights(weights[:1], weights[1:]).tolist() == [1.0]
    assert pair_weights(tensor([0.5]), tensor([0.25])).tolist() == [0.125]


def test_weights_of_one_leave_dpo_and_never_touch_the_sft_term():
    """DPO of log-ratios 2 and 1 at beta 0.5 is 0.474077; half of it plus 0.1 * (4 / 2) of SFT is 0.437038."""

    def loss(weights: Tensor | None) -> float:
        pairs = PairLogps(
            chosen=tensor([-4.0]),
            rejected=tensor([-5.0]),
            ref_chosen=tensor([-6.0]),
            ref_rejected=tensor([-6.0]),
            chosen_tokens=tensor([2]),
            rejected_tokens=tensor([3]),
            weights=weights,
        )
        return objective("dpo", beta=0.5, sft_weight=0.1)(pairs).item()

    assert loss(tensor([1.0])) == loss(None) == pytest.approx(0.474077 + 0.2, abs=1e-6)
    assert loss(tensor([0.5])) == pytest.approx(0.437038, abs=1e-6)


# --- whole trainings -------------------------------------------------------------------------------------------------------

GROUPS = [[steering_group(number)[0]] for number in range(6)]
"""One pair a query, as in the alignment."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """All six queries at once, one step; dropout-free, so that the oracle sees the same weights."""
    folder = tmp_path_factory.mktemp("weighting")
    policy = Policy(model=tiny_model_dir(folder / "tiny"))
    pairs = write_pairs(folder / "pairs.parquet", policy, FLOAT32, GROUPS)
    return replace(
        training_job(policy, pairs, folder / "unused"), learning_rate=1e-2, batch_size=6, epochs=1, weighting="wpo"
    )


def oracle(job: TrainingJob, model: Any, reference: Any, groups: list[list[Pair]]) -> tuple[Tensor, Tensor]:
    """Equation 2 of the paper from softmax and sums over the whole vocabulary: mean loss and mean weight of the pairs."""
    with open_scorer(job.policy, FLOAT32) as scorer:
        pairs = [tokenize(pair, scorer.prompts) for group in groups for pair in group]

    def both(of: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """log pi(y | x) and w(x, y)."""
        rows = of(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
        own = rows[torch.arange(len(completion)), list(completion)]
        against = {
            "wpo": (rows**2).sum(-1),
            "wpo_greedy": rows.max(-1).values,
            "wpo_unaligned": torch.ones(len(completion)),
        }[job.weighting]
        return own.log().sum(), (own / against).log().mean().exp()

    losses, weights = [], []
    for prompt, chosen, rejected in pairs:
        (chosen_logps, chosen_weight), (rejected_logps, rejected_weight) = (
            both(model, prompt, completion) for completion in (chosen, rejected)
        )
        with torch.no_grad():
            references = [both(reference, prompt, completion)[0] for completion in (chosen, rejected)]
        gap = chosen_logps - references[0] - rejected_logps + references[1]
        weight = (chosen_weight * rejected_weight).clamp(max=1).detach()
        losses.append(weight * -F.logsigmoid(job.beta * gap) - job.sft_weight * chosen_logps / len(chosen))
        weights.append(weight)
    return torch.stack(losses).mean(), torch.stack(weights).mean()


@pytest.mark.parametrize("weighting", ["wpo", "wpo_greedy", "wpo_unaligned"])
@pytest.mark.parametrize("sharing", [True, False], ids=["packed", "plain"])
def test_loss_and_gradient_equal_an_oracle_written_out(weighting: Any, sharing: bool, base: TrainingJob, tmp_path: Any):
    """At step 1, and at step 2, whose policy is no longer the reference; a weight with a gradient would show in the norm."""
    training = base.training.model_copy(update={"prefix_sharing": sharing})
    job = replace(base, weighting=weighting, training=training, epochs=2, output=str(tmp_path / "two"))
    result = train(job)
    assert result.shared == sharing
    reference = AutoModelForCausalLM.from_pretrained(job.policy.model, dtype=torch.float32)
    # A training of one epoch ends where the second step of this one begins.
    later = train(replace(job, epochs=1, output=str(tmp_path / "one"))).model
    for step, folder in ((result.first, job.policy.model), (result.last, later)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loss, weight = oracle(job, model, reference, GROUPS)
        loss.backward()
        norm = torch.stack([each.grad.norm() for each in model.parameters() if each.grad is not None]).norm()
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert step["weight"] == pytest.approx(weight.item(), rel=1e-5)  # pyright: ignore[reportTypedDictNotRequiredAccess]
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert 0 < step["weight"] < 1, "some pairs count less"  # pyright: ignore[reportTypedDictNotRequiredAccess]


@pytest.mark.parametrize(
    "mechanics",
    [{"micro_batch_size": 2}, {"prefix_sharing": False}, {"gradient_checkpointing": True}],
    ids=["micro 2", "unshared", "checkpointed"],
)
@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_mechanics_do_not_change_the_weights(mechanics: Any, lora: Lora | None, base: TrainingJob, tmp_path: Any):
    training = base.training.model_copy(update={"lora": lora})
    plain = replace(base, training=training, epochs=2, batch_size=4, output=str(tmp_path / "plain"))
    other = replace(plain, training=training.model_copy(update=mechanics), output=str(tmp_path / "other"))
    train(plain)
    train(other)
    for one, two in zip(curve(plain), curve(other), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_logits_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch, base: TrainingJob, tmp_path: Any):
    """A few logits of every token at a time: the same curve."""
    once = replace(base, output=str(tmp_path / "once"))
    train(once)
    monkeypatch.setattr("selfsteer.training.logps.CHUNK_ELEMENTS", 3 * 400)
    for name, sharing in (("packed", True), ("plain", False)):
        training = base.training.model_copy(update={"prefix_sharing": sharing})
        chunked = replace(base, training=training, output=str(tmp_path / name))
        train(chunked)
        assert curve(chunked)[0] == pytest.approx(curve(once)[0], rel=1e-5)
