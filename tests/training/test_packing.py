"""Packed batches as literal tensors, and shared against plain: log-probabilities and gradients."""

import logging

import pytest
import torch
from tiny import other_model, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from selfsteer.training import packing
from selfsteer.training.logps import TokenLogps, casting_once, choose_packing, teach
from selfsteer.training.packing import (
    Row,
    Span,
    TokenPair,
    attention,
    balanced,
    pack,
    pad,
    row_tokens,
    segments_of,
    share_prompts,
    together,
)

ROWS = [Row((1, 2), ((3, 4, 5), (6, 7))), Row((8,), ((9,),))]


def test_pack_literally():
    batch = pack(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 6, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0]]
    assert batch["sources"].tolist() == [1, 2, 3, 1, 4, 5]
    assert batch["targets"].tolist() == [3, 4, 5, 6, 7, 9]
    assert batch["layout"].tokens == (3, 2, 1)
    assert batch["layout"].spans == (Span(2, (2, 1)), Span(1, (0,)))


def test_pad_literally():
    batch = pad(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 6, 0], [8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["sources"].tolist() == [1, 2, 3, 5, 6, 8]
    assert batch["targets"].tolist() == [3, 4, 5, 6, 7, 9]
    assert batch["layout"].spans is None


def test_segments_literally():
    """Two completions behind a prompt of two, one without queries of its own behind a prompt of one."""
    segments = segments_of((Span(2, (2, 1)), Span(1, (0,))), torch.device("cpu"))
    assert segments.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5]
    assert segments.query_ends.tolist() == [0, 2, 4, 5, 6]
    assert segments.key_ends.tolist() == [0, 2, 6, 9, 10]
    assert (segments.longest_query, segments.longest_key) == (2, 4)


def states(layout: packing.Layout, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value of one layer with four heads in two groups."""
    assert layout.spans is not None
    total = sum(span.prompt + sum(span.completions) for span in layout.spans)
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(1, heads, total, 16, generator=generator) for heads in (4, 2, 2)]
    return [each.to(device, dtype).requires_grad_() for each in made]


def test_segments_hold_what_attention_segment_by_segment_sees():
    """The kernel's arguments, followed one segment after the other: each query sees the keys up to its own end."""
    layout = pack(random_rows())["layout"]
    query, key, value = states(layout)
    by_segment, _ = attention(torch.nn.Module(), query, key, value, None, layout=layout)
    assert layout.spans is not None
    segments = segments_of(layout.spans, query.device)
    for index in range(len(segments.query_ends) - 1):
        own = slice(int(segments.query_ends[index]), int(segments.query_ends[index + 1]))
        seen = segments.keys[int(segments.key_ends[index]) : int(segments.key_ends[index + 1])]
        length, total = own.stop - own.start, len(seen)
        mask = torch.ones(length, total, dtype=torch.bool).tril(total - length)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, own], key[:, :, seen], value[:, :, seen], attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(by_segment[0, own], expected[0].transpose(0, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel over all segments runs on CUDA")
def test_one_kernel_equals_segment_by_segment(monkeypatch: pytest.MonkeyPatch):
    """Outputs and gradients, within the rounding of bfloat16."""
    layout = pack(random_rows())["layout"]
    found: list[list[torch.Tensor]] = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(packing, "_half_precision", lambda query: None)
        made = states(layout, "cuda", torch.bfloat16)
        output, _ = attention(torch.nn.Module(), *made, None, layout=layout)
        output.float().square().sum().backward()
        found.append([output.float(), *(each.grad.float() for each in made if each.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)


def test_prompts_and_completions_are_computed_once():
    """Two pairs under one prompt that share a response, one under another: two rows, four completions."""
    a, b = (1, 2), (3,)
    x, y, z = (4,), (5,), (6,)
    shared = share_prompts([TokenPair(a, x, y), TokenPair(a, z, x), TokenPair(b, y, y)])
    assert shared.rows == (Row(a, (x, y, z)), Row(b, (y,)))
    assert shared.chosen == (0, 2, 3)
    assert shared.rejected == (1, 0, 3)


def test_row_tokens_count_prompts_once():
    assert row_tokens([Row((1, 2), ((3,), (4, 5))), Row((1,), ((2,),))]) == 7


@pytest.mark.parametrize(
    ("count", "budget", "expected"),
    [
        (1, None, [[5], [9], [3], [4], [1], [20], [2]]),
        (3, None, [[5, 9, 3], [4, 1, 20], [2]]),
        (1, 12, [[5], [9, 3], [4, 1], [20], [2]]),
        (1, 44, [[5, 9, 3, 4, 1, 20, 2]]),
        (1, 1, [[5], [9], [3], [4], [1], [20], [2]]),
    ],
)
def test_what_shares_a_forward_pass(count: int, budget: int | None, expected: list[list[int]]):
    """Each unit is its own number of tokens."""
    found = together([5, 9, 3, 4, 1, 20, 2], lambda unit: unit, count=count, budget=budget)
    assert list(found) == expected


def test_parts_of_nearly_as_many_tokens():
    tokens = [7, 1, 6, 5, 4, 9, 2, 3]
    parts = balanced(range(8), tokens, 3)
    assert sorted(unit for part in parts for unit in part) == list(range(8))
    assert sorted(sum(tokens[unit] for unit in part) for part in parts) == [12, 12, 13]
    assert balanced([3, 5], tokens, 2) == [[5], [3]]


def random_rows(seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 400, (count,), generator=generator).tolist())

    return [Row(ids(37), (ids(23), ids(1), ids(40))), Row(ids(5), (ids(11), ids(2)))]


def variants() -> dict[str, PreTrainedModel]:
    untied = tiny_model()
    untied.config.tie_word_embeddings = False
    untied.lm_head = torch.nn.Linear(32, 400, bias=True)
    checkpointed = tiny_model()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    frozen = tiny_model()
    frozen.requires_grad_(False)
    for layer in frozen.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
    return {"tied": tiny_model(), "untied with bias": untied, "checkpointed": checkpointed, "frozen head": frozen}


@pytest.mark.parametrize("name", ["tied", "untied with bias", "checkpointed", "frozen head"])
def test_shared_equals_plain(name: str, monkeypatch: pytest.MonkeyPatch):
    """Log-probabilities within 1e-5 relative and gradients within 1e-4 of the largest, with several chunks of logits."""
    monkeypatch.setattr("selfsteer.training.logps.CHUNK_ELEMENTS", 400 * 7)
    model = variants()[name].train()
    teach(model, torch.float32)
    rows = random_rows()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    grads = {}
    plain = model(**pad(rows))
    (plain * weights).sum().backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert choose_packing(model, rows) is pack
    shared = model(**pack(rows))
    (shared * weights).sum().backward()
    assert torch.allclose(shared, plain, rtol=1e-5, atol=0)
    assert grads.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    for key, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad - grads[key]).abs().max() <= 1e-4 * grads[key].abs().max(), key


def test_log_probabilities_in_bfloat16_are_close_and_negative():
    model = tiny_model()
    teach(model, torch.bfloat16)
    exact = tiny_model()
    teach(exact, torch.float32)
    rows = random_rows()
    assert choose_packing(model, rows) is pack
    with torch.no_grad():
        rounded, plain = model(**pack(rows)), exact(**pad(rows))
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, plain, rtol=1e-2, atol=0.1)


class Casts(TorchDispatchMode):
    """How often a matrix of these shapes is copied to another dtype while this is on."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_several_passes():
    """And the numbers are the same to the bit."""
    model = tiny_model()
    teach(model, torch.bfloat16)
    rows = random_rows()
    assert choose_packing(model, rows) is pack
    weights = [layer.mlp.gate_proj.weight.shape for layer in model.model.layers]
    with torch.no_grad():
        with Casts(set(weights)) as each_time:
            expected = [model(**pack(rows)) for _ in range(3)]
        with casting_once(model.device), Casts(set(weights)) as once:
            found = [model(**pack(rows)) for _ in range(3)]
    assert (each_time.count, once.count) == (3 * len(weights) * 2, len(weights) * 2), "gate_proj and up_proj"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(2)
        assert not torch.equal(model(**pack(rows)), expected[0]), "nothing is kept afterwards"


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes while this is on."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_times_vocabulary(frozen: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """600 tokens of 400 would be 240,000 logits; with chunks of 50 tokens nothing exceeds 20,000, forward or backward."""
    monkeypatch.setattr("selfsteer.training.logps.CHUNK_ELEMENTS", 400 * 50)
    hidden = torch.randn(600, 32, requires_grad=True)
    weight = torch.randn(400, 32, requires_grad=not frozen)
    targets = torch.arange(600) % 400
    with Largest() as largest, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logps, _ = TokenLogps.apply(hidden, weight, None, targets, "wpo")
        logps.sum().backward()
    assert hidden.grad is not None
    assert 400 * 40 < largest.elements <= 400 * 50


@pytest.mark.parametrize("trained", [True, False])
def test_a_whole_slice_may_be_impossible(trained: bool, monkeypatch: pytest.MonkeyPatch):
    """Tokens that a bias of -inf forbids, more than a slice of them, at either end of the vocabulary."""
    monkeypatch.setattr("selfsteer.training.logps.CHUNK_ELEMENTS", 6 * 10)
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=trained)
    bias = torch.zeros(40)
    bias[:15], bias[30:] = float("-inf"), float("-inf")
    targets = torch.arange(15, 21)
    logps, expected = TokenLogps.apply(hidden, weight, bias, targets, "wpo")
    plain = (hidden @ weight.T + bias).log_softmax(-1)
    assert torch.allclose(logps, plain[range(6), targets], atol=1e-5)
    assert torch.allclose(expected, plain.exp().square().sum(-1).log(), atol=1e-5)
    [found] = torch.autograd.grad(logps.sum(), hidden)
    [wanted] = torch.autograd.grad(plain[range(6), targets].sum(), hidden)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_completion_does_not_see_its_neighbours():
    """The log-probabilities of a completion alone are those beside others, to the bit or nearly."""
    model = tiny_model()
    teach(model, torch.float32)
    (prompt, completions), _ = random_rows()
    assert choose_packing(model, [Row(prompt, completions)]) is pack
    with torch.no_grad():
        together = model(**pack([Row(prompt, completions)]))
        alone = torch.cat([model(**pack([Row(prompt, (completion,))])) for completion in completions])
    assert torch.allclose(together, alone, rtol=1e-6)


def test_the_taught_model_still_answers_plain_calls():
    model, ids = tiny_model(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        teach(model, torch.float32)
        choose_packing(model, random_rows())
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)


def test_a_sliding_window_is_not_shared(caplog: pytest.LogCaptureFixture):
    config = MistralConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = MistralForCausalLM(config).eval()
    teach(model, torch.float32)
    with caplog.at_level(logging.WARNING):
        assert choose_packing(model, random_rows()) is pad
    assert len([r for r in caplog.records if "does not allow prefix sharing" in r.message]) == 1
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["bloom", "gemma2", "mamba"])
def test_models_of_other_kinds_are_not_shared(kind: str, caplog: pytest.LogCaptureFixture):
    """Their own attention knows no prompts beside each other: found out without a mistake, and left as it was."""
    model = other_model(kind)
    before = model.config._attn_implementation
    teach(model, torch.float32)
    assert choose_packing(model, random_rows()) is pad
    assert [record.message.count("does not allow prefix sharing") for record in caplog.records] == [1]
    assert model.config._attn_implementation == before
    prompt, (completion, *_) = random_rows()[0]
    with torch.no_grad():
        [found] = model(**pad([Row(prompt, (completion,))]))
        logps = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    by_hand = sum(logps[len(prompt) + at - 1, token] for at, token in enumerate(completion))
    assert found == pytest.approx(float(by_hand), rel=1e-5)


def test_scaled_logits_are_not_shared():
    """A model whose logits are more than hidden states times the head is found out by its numbers."""
    model = tiny_model()
    plain = model.forward

    def softcapped(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = 5 * torch.tanh(outputs.logits / 5)
        return outputs

    model.forward = softcapped
    teach(model, torch.float32)
    assert choose_packing(model, random_rows()) is pad


def test_sharing_can_be_switched_off():
    assert choose_packing(tiny_model(), random_rows(), sharing=False) is pad
