"""Scores of pairs: equal to the model's own log-probabilities, in order, whatever the grouping."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import no_model_left
from tiny import END_ID, START_ID, tiny_model_dir
from transformers import AutoModelForCausalLM

from selfsteer.models import checkpoint, load_tokenizer
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Policy, Training
from selfsteer.records import Checkpoint, FinishReason, Message, Pair, side
from selfsteer.store.journal import Journal
from selfsteer.training.scoring import (
    Scorer,
    open_scorer,
    prefix_lengths,
    prefixes,
    score,
    score_missing,
    scores,
    tokenize,
)

FLOAT32 = Training(dtype="float32")


def pair(number: int, *, chosen: str = "", rejected: str = "No.", finish: FinishReason = "stop") -> Pair:
    return Pair(
        query_id=str(number),
        kind="given",
        prompt=(Message(role="user", content=f"Question {number}?"),),
        chosen=side(chosen or f"Paris, said {number} times over.", finish),
        rejected=side(rejected, finish),
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy(model=tiny_model_dir(tmp_path_factory.mktemp("tiny")))


def test_scores_are_the_models_own(policy: Policy):
    model = AutoModelForCausalLM.from_pretrained(policy.model, dtype=torch.float32)
    with open_scorer(policy, FLOAT32) as scorer:
        (scores,) = score(scorer, [[pair(7)]])
        tokens = tokenize(pair(7), scorer.prompts)
    for scored, completion in ((scores[0].chosen, tokens.chosen), (scores[0].rejected, tokens.rejected)):
        ids = torch.tensor([tokens.prompt + completion])
        with torch.no_grad():
            logps = model(input_ids=ids).logits.log_softmax(-1)[0]
        start = len(tokens.prompt)
        expected = sum(logps[start + i - 1, token].item() for i, token in enumerate(completion))
        assert scored.logps == pytest.approx(expected, rel=1e-5)
        assert scored.tokens == len(completion)
        assert completion[-1] == END_ID


def test_sampled_ids_are_scored_as_they_are(policy: Policy):
    """Ids that no text is encoded as ("Paris" in single letters), ended by another token than the tokenizer's."""
    with open_scorer(policy, FLOAT32) as scorer:
        letters = tuple(scorer.prompts.tokenizer.convert_tokens_to_ids(list("Paris")))
        sampled = replace(side("Paris"), token_ids=(*letters, START_ID))
        tokens = tokenize(replace(pair(7), chosen=sampled), scorer.prompts)
    assert tokens.chosen == (*letters, START_ID)
    assert tokens.rejected == tokenize(pair(7), scorer.prompts).rejected


def test_the_key_of_a_score_is_over_what_is_scored(policy: Policy):
    """Ids that differ are another question; a seed, an earlier score and whose query it is are not."""
    judge = Scorer(Checkpoint(path=policy.model, digest="d"), policy, Prompts(load_tokenizer(policy.model)), FLOAT32)
    sampled = replace(pair(1), chosen=replace(side("Paris"), token_ids=(5, 6)))
    other = replace(sampled, chosen=replace(sampled.chosen, token_ids=(5, 7)))
    scored = replace(sampled, query_id="2", chosen=replace(sampled.chosen, seed=3, logps=-1.0, tokens=2))
    assert judge.group([sampled]).key == judge.group([scored]).key
    assert len({judge.group([each]).key for each in (sampled, other, pair(1), pair(1, finish="length"))}) == 4


def test_a_cut_off_completion_is_scored_without_end_token(policy: Policy):
    with open_scorer(policy, FLOAT32) as scorer:
        assert tokenize(pair(1, finish="length"), scorer.prompts).chosen[-1] != END_ID


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, (1,)), (8, (8,)), (9, (8, 9)), (130, (8, 32, 128, 130)), (2048, (8, 32, 128, 512, 2048))]
)
def test_a_response_is_scored_up_to_every_edge_that_it_goes_beyond(tokens: int, expected: tuple[int, ...]):
    assert prefix_lengths(tokens, (8, 32, 128, 512)) == expected


def test_beginnings_are_scored_as_responses_of_their_own_would_be(policy: Policy, tmp_path: Path):
    prompts = Prompts(load_tokenizer(policy.model))
    scorer = Scorer(checkpoint(Path(policy.model)), policy, prompts, FLOAT32)
    with Journal(tmp_path) as journal:
        group = scorer.group([pair(7), pair(7, chosen="Yes.")], (2, 5))
        assert group.key != scorer.group([pair(7), pair(7, chosen="Yes.")]).key
        score_missing(scorer, [group], journal, description="prefixes", total=1)
        found = prefixes(journal, group)
        assert len(found) == 2
        for item, both in zip(group.pairs, found, strict=True):
            for mine, scored in zip((item.chosen, item.rejected), both, strict=True):
                ids = prompts.response_ids(mine, item.prompt)
                assert [each.tokens for each in scored] == [*(edge for edge in (2, 5) if edge < len(ids)), len(ids)]
                for part in scored:
                    cut = replace(mine, token_ids=ids[: part.tokens])
                    alone = scorer.group([replace(item, chosen=cut, rejected=cut)])
                    score_missing(scorer, [alone], journal, description="alone", total=1)
                    assert scores(journal, alone)[0].chosen.logps == pytest.approx(part.logps, rel=1e-5)


@pytest.mark.parametrize("several", [{"micro_batch_size": 3}, {"tokens_per_batch": 100}], ids=str)
def test_order_and_micro_batches(policy: Policy, several: dict[str, int]):
    """Seven queries, a few a forward pass: the same scores in the same order, up to rounding; two pairs stay together."""
    groups = [[pair(n), pair(n, chosen="No.", rejected="Yes.")] for n in range(7)]
    with open_scorer(policy, FLOAT32) as scorer:
        single = list(score(scorer, groups))
    with open_scorer(policy, FLOAT32.model_copy(update=several)) as scorer:
        packed = list(score(scorer, groups))
    assert [len(scores) for scores in single] == [2] * 7
    for a, b in zip(single, packed, strict=True):
        for x, y in zip(a, b, strict=True):
            assert y.chosen.logps == pytest.approx(x.chosen.logps, rel=1e-5)
            assert y.rejected.logps == pytest.approx(x.rejected.logps, rel=1e-5)


def test_in_half_precision_linear_layers_are_held_so_and_nothing_changes(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Autocast casts their weights anyway; embeddings, norms and the output layer are used in float32, too."""
    half, groups = Training(dtype="bfloat16"), [[pair(n)] for n in range(3)]
    with open_scorer(policy, half) as scorer:
        found = list(score(scorer, groups))
        dtypes = {name: weights.dtype for name, weights in scorer.model.named_parameters()}
    linear = {name for name in dtypes if "_proj" in name}
    assert len(linear) == 2 * 7
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == linear
    monkeypatch.setattr("selfsteer.training.scoring.hold_in_half", lambda *_: None)
    with open_scorer(policy, half) as scorer:
        assert list(score(scorer, groups)) == found, "bit for bit"


def test_a_layer_that_does_not_compute_in_half_precision_is_left_alone(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """Some routers switch autocast off: their weights are used in float32, and rounded ones would give other numbers."""
    half, groups = Training(dtype="bfloat16"), [[pair(n)] for n in range(3)]

    def found() -> tuple[list[Any], torch.dtype]:
        with open_scorer(policy, half) as scorer:
            mlp: Any = scorer.model.model.layers[0].mlp

            def exact(states: torch.Tensor) -> torch.Tensor:
                with torch.autocast("cpu", enabled=False):
                    return type(mlp).forward(mlp, states.float())

            mlp.forward = exact
            return list(score(scorer, groups)), mlp.gate_proj.weight.dtype

    held, dtype = found()
    assert dtype == torch.float32
    monkeypatch.setattr("selfsteer.training.scoring.hold_in_half", lambda *_: None)
    assert found()[0] == held


def test_groups_are_read_one_after_the_other(policy: Policy):
    read: list[int] = []

    def groups():
        for number in range(100):
            read.append(number)
            yield [pair(number)]

    with open_scorer(policy, FLOAT32) as scorer:
        scores = score(scorer, groups())
        next(scores)
        assert read == [0]


def test_the_model_is_let_go_of(policy: Policy, tmp_path: Path):
    scorer = Scorer(checkpoint(Path(policy.model)), policy, Prompts(load_tokenizer(policy.model)), FLOAT32)
    with Journal(tmp_path) as journal, no_model_left():
        score_missing(scorer, [scorer.group([pair(7)])], journal, description="pairs", total=1)


def test_nothing_to_score(policy: Policy):
    with open_scorer(policy, FLOAT32) as scorer:
        assert list(score(scorer, [])) == []


def test_an_empty_response_is_refused(policy: Policy):
    with open_scorer(policy, FLOAT32) as scorer, pytest.raises(ValueError, match="query 3: an empty rejected response"):
        list(score(scorer, [[pair(3, rejected="", finish="length")]]))
