"""L_SSO against an oracle that shares no code with the project: plain forwards, one sequence at a time, explicit loops.

docs/method.md, equations 1, 2 and 4:  L_SSO = mean over queries of (L+ + L-),
    L+ = DPO(x+, y+, y-) + gamma * SFT(x+, y+)         L- = DPO(x-, y_o, y+) + gamma * SFT(x-, y_o)
    DPO(x, w, l) = -log sigmoid(beta * ((log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x))))
    SFT(x, y) = -log pi(y|x) / tokens of y
Equation 3 has L- = DPO(x-, y-, y+) + gamma * SFT(x-, y-). The reference is another model than the policy here, so that
margins are not zero at the first step either.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_model, tiny_model_dir, tiny_tokenizer

from selfsteer.pairs import steering_pairs
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Policy, Training
from selfsteer.records import Principles, Query, Response, Responses
from selfsteer.store.columns import pair_row
from selfsteer.training.train import TrainingJob, train
from selfsteer.training.trainer import read_history

BETA, GAMMA, RATE = 0.3, 0.1, 1e-3
GOOD_PRINCIPLE, BAD_PRINCIPLE = "Answer accurately and in detail.", "Be careless and vague instead."


class Answered(NamedTuple):
    """A query and its responses; a response that ends in "..." was cut off and has no end token."""

    query: str
    good: str
    bad: str
    original: str


DATA = (
    Answered("What is the capital of France?", "The capital of France is Paris.", "Some fox.", "It is Paris, a story."),
    Answered("How do rainbows form?", "Sunlight passes through...", "Drops, lazy.", "Light and drops of water."),
    Answered("Who finds the letter?", "The keeper finds a letter in a bottle.", "A dog who...", "The lighthouse keeper."),
    Answered("Why?", "It is a short story about the brown fox.", "No.", "Over the dog..."),
)


# --- the oracle ------------------------------------------------------------------------------------------------------------


def rendered(principle: str, query: str) -> str:
    return f"<|im_start|>system\n{principle}<|im_end|>\n<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"


def log_pi(model: Any, prompt: str, response: str) -> tuple[torch.Tensor, int]:
    """log pi(response | prompt), summed over its tokens (the end token included unless it was cut off), and their number."""
    tokenizer = tiny_tokenizer()
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not response.endswith("..."):
        response_ids = [*response_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    total = torch.zeros(())
    for index, token in enumerate(response_ids):
        total = total + torch.log_softmax(logits[len(prompt_ids) + index - 1], dim=-1)[token]
    return total, len(response_ids)


def half(model: Any, reference: Any, prompt: str, ranked: tuple[str, str]) -> torch.Tensor:
    """DPO(prompt, chosen, rejected) + gamma * SFT(prompt, chosen)."""
    chosen, tokens = log_pi(model, prompt, ranked[0])
    rejected, _ = log_pi(model, prompt, ranked[1])
    with torch.no_grad():
        ref_chosen, _ = log_pi(reference, prompt, ranked[0])
        ref_rejected, _ = log_pi(reference, prompt, ranked[1])
    margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -torch.log(torch.sigmoid(margin)) + GAMMA * (-chosen / tokens)


def l_sso(model: Any, reference: Any, objective: str, data: tuple[Answered, ...]) -> torch.Tensor:
    total = torch.zeros(())
    for item in data:
        x_plus, x_minus = rendered(GOOD_PRINCIPLE, item.query), rendered(BAD_PRINCIPLE, item.query)
        if objective in ("sso", "equation_3", "l_plus"):
            total = total + half(model, reference, x_plus, (item.good, item.bad))
        if objective in ("sso", "l_minus"):
            total = total + half(model, reference, x_minus, (item.original, item.good))
        if objective == "equation_3":
            total = total + half(model, reference, x_minus, (item.bad, item.good))
    return total / len(data)


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    """Before clipping."""
    weights: dict[str, torch.Tensor]


def oracle(objective: str, steps: int) -> Trained:
    """AdamW (arXiv 1711.05101) with transformers' defaults, gradients clipped to norm 1, a constant learning rate."""
    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(steps):
        loss = l_sso(model, reference, objective, DATA)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(loss.item())
        optimizer.step()
    return Trained(losses, norms, {name: tensor.detach() for name, tensor in model.state_dict().items()})


# --- the project -----------------------------------------------------------------------------------------------------------


def records(item: Answered) -> Responses:
    def response(text: str) -> Response:
        ids = tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])
        return Response(text=text, token_ids=ids, finish_reason="length" if text.endswith("...") else "stop", seed=0)

    return Responses(
        query=Query(id=item.query, messages=({"role": "user", "content": item.query},)),
        principles=Principles(good=GOOD_PRINCIPLE, bad=BAD_PRINCIPLE, quality="accuracy", source="library"),
        good=response(item.good),
        bad=response(item.bad),
        original=response(item.original),
    )


def pairs_file(path: Path, objective: Any) -> Path:
    """The steering pairs as the project builds them, with the oracle's log-probabilities under the reference."""
    reference = tiny_model(seed=1)
    rows: list[dict[str, Any]] = []
    for item in DATA:
        for pair in steering_pairs(records(item), Prompts(tiny_tokenizer()), objective):
            prompt = rendered(pair.prompt[0]["content"], item.query)
            with torch.no_grad():
                chosen, chosen_tokens = log_pi(reference, prompt, pair.chosen.text)
                rejected, rejected_tokens = log_pi(reference, prompt, pair.rejected.text)
            rows.append(
                {
                    **pair_row(pair),
                    "ref_chosen_logps": chosen.item(),
                    "ref_rejected_logps": rejected.item(),
                    "chosen_tokens": chosen_tokens,
                    "rejected_tokens": rejected_tokens,
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def train_with(tmp_path: Path, objective: Any, **training: Any) -> tuple[TrainingJob, Any]:
    job = TrainingJob(
        policy=Policy(model=tiny_model_dir(tmp_path / "policy", seed=0)),
        pairs=str(pairs_file(tmp_path / "pairs.parquet", objective)),
        output=str(tmp_path / "training"),
        loss="dpo",
        beta=BETA,
        sft_weight=GAMMA,
        learning_rate=RATE,
        batch_size=len(DATA),
        epochs=3,
        max_steps=None,
        training=Training(dtype="float32", scheduler="constant", warmup_ratio=0.0, **training),
        seed=0,
    )
    return job, train(job)


def test_the_tiny_template_is_what_the_oracle_writes_out():
    messages = [{"role": "system", "content": "p"}, {"role": "user", "content": "x"}]
    tokenizer = tiny_tokenizer()
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == rendered("p", "x")


@pytest.mark.parametrize("objective", ["sso", "equation_3", "l_plus", "l_minus"])
def test_three_steps_of_every_objective(objective: str, tmp_path: Path):
    """Loss and gradient norm of each step; the second and third also show that the update was the oracle's."""
    expected = oracle(objective, steps=3)
    job, result = train_with(tmp_path, objective)
    history = read_history(Path(result.history))
    assert [step["loss"] for step in history] == pytest.approx(expected.losses, rel=1e-4)
    assert [step["grad_norm"] for step in history] == pytest.approx(expected.norms, rel=1e-3)
    assert abs(expected.losses[0] - expected.losses[2]) > 0.01, "the steps must differ for this to show anything"
    assert job.batch_size == len(DATA)


@pytest.mark.parametrize(
    "training",
    [
        {"micro_batch_size": 2},
        {"micro_batch_size": 4},
        {"micro_batch_size": 3},
        {"tokens_per_batch": 100},
        {"prefix_sharing": False},
    ],
    ids=["micro 2", "micro 4", "micro 3, uneven", "packed", "unshared"],
)
def test_micro_batches_and_sharing_leave_the_oracle_s_steps(training: dict[str, Any], tmp_path: Path):
    expected = oracle("sso", steps=3)
    _, result = train_with(tmp_path, "sso", **training)
    history = read_history(Path(result.history))
    assert [step["loss"] for step in history] == pytest.approx(expected.losses, rel=1e-4)
    assert [step["grad_norm"] for step in history] == pytest.approx(expected.norms, rel=1e-3)


def test_the_weights_are_the_oracle_s(tmp_path: Path):
    """After three steps of 1e-3; Adam normalises gradients near zero to noise, hence the mean."""
    from safetensors.torch import load_file

    expected = oracle("sso", steps=3)
    _, result = train_with(tmp_path, "sso")
    trained, start = load_file(Path(result.model) / "model.safetensors"), tiny_model(seed=0).state_dict()
    for name, weights in trained.items():
        moved = (weights - start[name]).abs().mean().item()
        assert moved > 0.2 * RATE, name
        assert (weights - expected.weights[name]).abs().mean().item() < 0.02 * moved, name


def test_the_first_loss_by_plain_arithmetic(tmp_path: Path):
    """The reported loss once more, from the eight log-probabilities of each query without a tensor in the formula."""
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    total = 0.0
    for item in DATA:
        for principle, chosen, rejected in (
            (GOOD_PRINCIPLE, item.good, item.bad),
            (BAD_PRINCIPLE, item.original, item.good),
        ):
            prompt = rendered(principle, item.query)
            with torch.no_grad():
                (w, tokens), (lost, _) = log_pi(policy, prompt, chosen), log_pi(policy, prompt, rejected)
                (ref_w, _), (ref_l, _) = log_pi(reference, prompt, chosen), log_pi(reference, prompt, rejected)
            margin = BETA * ((w.item() - ref_w.item()) - (lost.item() - ref_l.item()))
            total += math.log1p(math.exp(-margin)) - GAMMA * w.item() / tokens
    _, result = train_with(tmp_path, "sso")
    assert result.first["loss"] == pytest.approx(total / len(DATA), rel=1e-5)
