"""Losses by hand, against TRL's on the same batch, and L_SSO against an oracle written out."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, tensor

from selfsteer.recipe.sections import LossName
from selfsteer.training.objective import LOSSES, PairLogps, chosen_pulls, dpo, objective, sft


def pair_logps(
    chosen: float, rejected: float, *, ref: tuple[float, float] = (0.0, 0.0), tokens: tuple[int, int] = (4, 2)
) -> PairLogps:
    return PairLogps(
        chosen=tensor([chosen]),
        rejected=tensor([rejected]),
        ref_chosen=tensor([ref[0]]),
        ref_rejected=tensor([ref[1]]),
        chosen_tokens=tensor([tokens[0]]),
        rejected_tokens=tensor([tokens[1]]),
    )


def logistic(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log(1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "beta", "expected"),
    [
        # log-ratios 2 and 1 (chosen -8 against -10, rejected -5 against -6), 4 and 2 tokens
        ("dpo", 0.5, 0.474077),  # -log sigmoid(0.5 * 1)
        ("ipo", 0.5, 1.0),  # (2/4 - 1/2 - 1)^2
        ("hinge", 0.5, 0.5),  # 1 - 0.5 * 1
        ("hinge", 2.0, 0.0),  # 1 - 2 < 0
        ("simpo", 2.0, logistic(2 * (-2.0 + 2.5 - 0.5))),  # means -2 and -2.5, target 0.5: log 2
        (
            "orpo",
            0.5,
            2.0
            + 0.5 * logistic(math.log(math.exp(-2) / (1 - math.exp(-2))) - math.log(math.exp(-2.5) / (1 - math.exp(-2.5)))),
        ),
        ("apo_zero", 0.5, 1 - 1 / (1 + math.exp(-1.0)) + 1 / (1 + math.exp(-0.5))),
        ("robust_dpo", 0.5, (0.9 * 0.474077 - 0.1 * 0.974077) / 0.8),
        ("sppo", 0.5, (2 - 1) ** 2 + (1 + 1) ** 2),
        ("dpo_norm", 5.0, math.log(2)),  # 2/4 against 1/2: no gap a token
        ("dpop", 0.5, 0.474077),  # the chosen response has lost nothing: DPO
        ("bdpo", 0.5, logistic(0.5 * (2 - math.log(0.5 * math.e + 0.5)))),
        ("sft", 0.5, 8 / 4),  # of the chosen response alone, per token
    ],
)
def test_losses_by_hand(loss: LossName, beta: float, expected: float):
    pairs = pair_logps(-8.0, -5.0, ref=(-10.0, -6.0))
    assert LOSSES[loss](pairs, beta=beta).item() == pytest.approx(expected, abs=1e-5)


def test_dpo_norm_by_hand():
    """Log-ratios 2 over 4 tokens and -1 over 2, beta 5: -log sigmoid(5 * (0.5 + 0.5)) = 0.006715."""
    pairs = pair_logps(-8.0, -7.0, ref=(-10.0, -6.0))
    assert LOSSES["dpo_norm"](pairs, beta=5.0).item() == pytest.approx(0.006715, abs=1e-6)


def test_dpop_counts_what_the_chosen_lost():
    """Chosen -10.1 against -10, rejected -8 against -6: the gap of 1.9 becomes 1.9 - 50 * 0.1 = -3.1; beta 0.3."""
    loss = LOSSES["dpop"](pair_logps(-10.1, -8.0, ref=(-10.0, -6.0)), beta=0.3)
    assert loss.item() == pytest.approx(logistic(0.3 * -3.1), abs=1e-5)


def test_bdpo_gains_nothing_from_a_rejected_response_that_is_gone():
    """Rejected at a log-ratio of -200: its term is log(1 - 0.5), its gradient nought; at 0 it is DPO's, times 0.5."""
    gone = tensor([-206.0], requires_grad=True)
    even = tensor([-6.0], requires_grad=True)
    for rejected, loss, slope in ((gone, logistic(0.5 * math.log(2)), 0.0), (even, math.log(2), 0.5 * 0.5 * 0.5)):
        pairs = PairLogps(
            chosen=tensor([-10.0]),
            rejected=rejected,
            ref_chosen=tensor([-10.0]),
            ref_rejected=tensor([-6.0]),
            chosen_tokens=tensor([4]),
            rejected_tokens=tensor([2]),
        )
        found = LOSSES["bdpo"](pairs, beta=0.5)
        found.sum().backward()
        assert found.item() == pytest.approx(loss, abs=1e-6)
        assert rejected.grad is not None
        assert rejected.grad.item() == pytest.approx(slope, abs=1e-6)


def test_every_loss_of_the_recipe_exists_and_falls_as_the_chosen_gains():
    for name in get_args(LossName):
        chosen = tensor([-8.0], requires_grad=True)
        pairs = pair_logps(0.0, -5.0, ref=(-8.0, -5.0))
        moved = PairLogps(**{f: getattr(pairs, f) for f in PairLogps.__slots__} | {"chosen": chosen})
        LOSSES[name](moved, beta=0.1).sum().backward()
        assert chosen.grad is not None
        assert chosen.grad.item() < 0, name


def test_sft_is_the_mean_per_token():
    assert sft(pair_logps(-8.0, -5.0)).item() == 2.0


def test_objective_adds_the_weighted_sft_term():
    pairs = pair_logps(-8.0, -5.0, ref=(-10.0, -6.0))
    total = objective("dpo", beta=0.5, sft_weight=0.1)(pairs)
    assert total.item() == pytest.approx(dpo(pairs, beta=0.5).item() + 0.1 * 2.0)


@pytest.mark.parametrize(
    ("loss", "base"),
    [("dpo", 0.1 / 2), ("dpo_norm", 0.1 / 2 / 96), ("ipo", 2 * 5 / 96)],  # of IPO d (h - 1 / (2 tau))^2, h = 0
)
def test_the_share_of_the_sft_term_at_the_first_step(loss: LossName, base: float):
    """No margin, 96 tokens, beta and gamma 0.1: L_sft pulls with 0.1 / 96, two hundredths of DPO's 0.05."""
    pairs = pair_logps(-80.0, -90.0, ref=(-80.0, -90.0), tokens=(96, 40))
    of_base, of_sft = chosen_pulls(objective(loss, beta=0.1, sft_weight=0.1), pairs, 0.1)
    assert of_sft.tolist() == pytest.approx([0.1 / 96])
    assert of_base.tolist() == pytest.approx([base], rel=1e-4)


def test_orpo_stays_finite_for_an_almost_certain_completion():
    assert torch.isfinite(LOSSES["orpo"](pair_logps(-1e-5, -300.0), beta=0.1)).all()


# TRL 1.16 asks transformers 5.23 by names that are going away.
@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("dpo", "sigmoid"),
        ("ipo", "ipo"),
        ("hinge", "hinge"),
        ("apo_zero", "apo_zero"),
        ("sppo", "sppo_hard"),
        ("dpo_norm", "sigmoid_norm"),
    ],
)
def test_equal_to_trl_on_the_same_batch(ours: LossName, theirs: str, tmp_path, tiny_trl_batch):
    logps, trl_loss = tiny_trl_batch(theirs)
    assert LOSSES[ours](logps, beta=0.1).mean().item() == pytest.approx(trl_loss, rel=1e-5)


@pytest.fixture
def tiny_trl_batch(tmp_path):
    """TRL's loss on a batch of token ids, and the log-probabilities that our forward gives for the same ids."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tiny import tiny_model, tiny_tokenizer
    from trl import DPOConfig, DPOTrainer

    from selfsteer.training.logps import teach
    from selfsteer.training.packing import Row, pack

    ids = [
        {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11, 12, 13], "rejected_ids": [14, 15]},
        {"prompt_ids": [20, 21, 22], "chosen_ids": [23, 24], "rejected_ids": [25, 26, 27, 28]},
    ]

    def logps_of(seed: int) -> list[Tensor]:
        model = tiny_model(seed=seed)
        teach(model, torch.float32)
        model.set_attn_implementation("selfsteer")
        with torch.no_grad():
            return [
                model(**pack([Row(tuple(r["prompt_ids"]), (tuple(r["chosen_ids"]), tuple(r["rejected_ids"])))])) for r in ids
            ]

    def run(loss_type: str) -> tuple[PairLogps, float]:
        args = DPOConfig(
            output_dir=str(tmp_path),
            loss_type=[loss_type],
            beta=0.1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            activation_checkpointing=False,
            per_device_train_batch_size=2,
            max_length=None,
        )
        text = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
        trainer = DPOTrainer(
            model=tiny_model(seed=1),
            ref_model=tiny_model(seed=2),
            args=args,
            train_dataset=Dataset.from_list(text),
            processing_class=tiny_tokenizer(),
        )
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(ids)).item()
        now, reference = torch.stack(logps_of(1)), torch.stack(logps_of(2))
        pairs = PairLogps(
            chosen=now[:, 0],
            rejected=now[:, 1],
            ref_chosen=reference[:, 0],
            ref_rejected=reference[:, 1],
            chosen_tokens=tensor([5, 2]),
            rejected_tokens=tensor([2, 4]),
        )
        return pairs, loss

    return run
