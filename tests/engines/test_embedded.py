"""The embedded engine on a tiny model: against model.generate, against itself in other batches, and when told to stop."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import END_ID, PAD_ID, other_model_dir, tiny_adapter, tiny_model, tiny_model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from selfsteer.engines import decoding
from selfsteer.engines import embedded as engine_module
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.embedded import TransformersEngine, why_not_slots
from selfsteer.models import tell_of_other_sampling
from selfsteer.records import Adapter

LENGTHS = (3, 40, 1, 17, 5, 29, 2, 11, 33, 8)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=20)
NUCLEUS = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=20)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_dir(tmp_path_factory.mktemp("tiny"))


def ragged_requests(sampling: Sampling) -> list[Request]:
    """Ten prompts of 1 to 40 tokens, with the seeds 100 to 109."""
    draw = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(3, 400, (n,), generator=draw).tolist()) for n in LENGTHS]
    return [
        Request(key=f"r{i}", messages=(), prompt_ids=prompt, sampling=sampling, seed=100 + i)
        for i, prompt in enumerate(prompts)
    ]


def answers(model_dir: str, requests: list[Request], *, batch_size: int) -> dict[str, Completion]:
    with TransformersEngine(model_dir, batch_size=batch_size, dtype=torch.float32) as engine:
        return {completion.key: completion for completion in engine.generate(requests)}


def greedy_by_generate(model: PreTrainedModel, request: Request) -> list[int]:
    """The oracle: one prompt at a time through transformers, without the end token."""
    ids = torch.tensor([request.prompt_ids])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=request.sampling.max_new_tokens, eos_token_id=END_ID, pad_token_id=END_ID
    )
    new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :].tolist()
    return new[: new.index(END_ID)] if END_ID in new else new


@pytest.mark.parametrize("slots", [True, False])
def test_adapters_of_one_model_answer_as_if_merged(
    model_dir: str, tmp_path: Path, slots: bool, monkeypatch: pytest.MonkeyPatch
):
    """Two adapters and the model as it is take turns in one engine; greedily each says what its merged folder says."""
    if not slots:
        monkeypatch.setattr(engine_module, "why_not_slots", lambda *_: "as the test says")
    for seed, name in enumerate(("good", "bad")):
        tiny_adapter(tmp_path / name, model_dir, seed=seed)
    merged: dict[str | None, str] = {name: str(tmp_path / name / "model") for name in ("good", "bad")} | {None: model_dir}
    wanted = ragged_requests(GREEDY)
    alone = {name: answers(folder, wanted, batch_size=3) for name, folder in merged.items()}
    mixed = [replace(item, key=f"{name} {item.key}", adapter=name) for item in wanted for name in ("good", None, "bad")]
    adapters = [Adapter(name=name, path=str(tmp_path / name / "adapter"), rank=4) for name in ("good", "bad")]
    with TransformersEngine(model_dir, batch_size=3, dtype=torch.float32, adapters=adapters) as engine:
        found = {completion.key: completion.token_ids for completion in engine.generate(mixed)}
    assert found == {f"{name} {key}": each.token_ids for name in alone for key, each in alone[name].items()}
    for one, other in (("good", "bad"), ("good", None), ("bad", None)):
        same = sum(alone[one][key].token_ids == alone[other][key].token_ids for key in alone[one])
        assert same < len(wanted) / 2, "the three are told apart"


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_equals_generate(model_dir: str, batch_size: int):
    """Token by token, for ragged prompts, with fewer slots than requests and with more."""
    requests = ragged_requests(GREEDY)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    completions = answers(model_dir, requests, batch_size=batch_size)
    assert {r.key: greedy_by_generate(model, r) for r in requests} == {k: list(c.token_ids) for k, c in completions.items()}


def test_a_sample_is_its_seeds_own(model_dir: str):
    """The same request gets the same sample whatever the batch size, the order and the company; another seed another one."""
    requests = ragged_requests(NUCLEUS)
    by_three = answers(model_dir, requests, batch_size=3)
    assert answers(model_dir, requests[::-1], batch_size=7) == by_three
    assert answers(model_dir, requests[4:5], batch_size=1) == {"r4": by_three["r4"]}
    assert len({c.token_ids for c in by_three.values()}) == len(requests)
    other = Request(key="r4", messages=(), prompt_ids=requests[4].prompt_ids, sampling=NUCLEUS, seed=7)
    assert answers(model_dir, [other], batch_size=1)["r4"].token_ids != by_three["r4"].token_ids


def test_samplings_may_differ_within_a_batch(model_dir: str):
    greedy, nucleus = ragged_requests(GREEDY), ragged_requests(NUCLEUS)
    mixed = answers(model_dir, [*greedy[:5], *nucleus[5:]], batch_size=4)
    apart = answers(model_dir, greedy[:5], batch_size=4) | answers(model_dir, nucleus[5:], batch_size=4)
    assert mixed == apart


def test_finish_reasons_and_text(model_dir: str):
    """Any token of the generation configuration's list ends a completion and is left out of it; else the limit does."""
    request = ragged_requests(GREEDY)[3]
    free = answers(model_dir, [request], batch_size=1)["r3"]
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    assert free.text == AutoTokenizer.from_pretrained(model_dir).decode(free.token_ids, skip_special_tokens=True)
    with TransformersEngine(model_dir, batch_size=1, dtype=torch.float32, end_ids=[free.token_ids[6]]) as engine:
        (ended,) = engine.generate([request])
    first = free.token_ids.index(free.token_ids[6])
    assert (ended.finish_reason, ended.token_ids) == ("stop", free.token_ids[:first])
    assert (ended.end_id, free.end_id) == (free.token_ids[6], None)


def test_end_tokens_come_from_the_generation_configuration_the_tokenizer_and_its_template(tmp_path: Path):
    folder = tiny_model_dir(tmp_path)
    GenerationConfig(eos_token_id=[7, 9], pad_token_id=0).save_pretrained(folder)
    with TransformersEngine(folder, batch_size=1, dtype=torch.float32) as engine:
        assert engine._vocabulary.ends == {7, 9, END_ID}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|pad|>"  # which closes no turn; <|im_end|> goes on doing that
    tokenizer.save_pretrained(folder)
    with TransformersEngine(folder, batch_size=1, dtype=torch.float32) as engine:
        assert engine._vocabulary.ends == {7, 9, PAD_ID, END_ID}


OTHER_SAMPLING: dict[str, object] = {
    "repetition_penalty": 1.5,
    "num_beams": 4,
    "min_new_tokens": 15,
    "stop_strings": ["a", "e"],
    "forced_bos_token_id": 7,
    "suppress_tokens": list(range(8, 300)),
    "bad_words_ids": [[token] for token in range(3, 300)],
}


@pytest.mark.parametrize("slots", [True, False])
def test_a_model_s_own_sampling_is_left_out_and_told(
    slots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Each entry would change what is said; the tokens are those of the folder without them, and the entries are named."""
    if not slots:
        monkeypatch.setattr(engine_module, "why_not_slots", lambda *_: "a test")
    folder = tiny_model_dir(tmp_path)
    requests = ragged_requests(NUCLEUS)
    plain = answers(folder, requests, batch_size=4)
    caplog.clear()
    tell_of_other_sampling(folder)
    assert not caplog.records
    GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=True, **OTHER_SAMPLING).save_pretrained(folder)
    assert answers(folder, requests, batch_size=4) == plain
    caplog.clear()
    tell_of_other_sampling(folder)
    (record,) = caplog.records
    assert all(f"{name}=" in record.getMessage() for name in OTHER_SAMPLING)


@pytest.mark.parametrize("slots", [True, False])
def test_ids_that_no_token_has_are_never_sampled(slots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An embedding of 464 rows for 400 tokens, and logits that are nearly even: one sample in seven would be beyond."""
    folder = tiny_model_dir(tmp_path)
    tiny_model(vocab_size=464).save_pretrained(folder)
    if not slots:
        monkeypatch.setattr(engine_module, "why_not_slots", lambda *_: "it has windows")
    sampling = Sampling(temperature=100.0, top_p=1.0, max_new_tokens=50)
    requests = [Request(key=str(n), messages=(), prompt_ids=(5, 6), sampling=sampling, seed=n) for n in range(4)]
    sampled = [token for answer in answers(folder, requests, batch_size=4).values() for token in answer.token_ids]
    assert len(sampled) > 100
    assert max(sampled) < 400


def test_requests_are_pulled_a_few_batches_ahead(model_dir: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_module, "WINDOW_BATCHES", 2)
    pulled: list[str] = []

    def source() -> Iterator[Request]:
        for request in ragged_requests(GREEDY):
            pulled.append(request.key)
            yield request

    with TransformersEngine(model_dir, batch_size=2, dtype=torch.float32) as engine:
        completions = engine.generate(source())
        assert pulled == []
        first = next(completions)
        assert pulled == ["r0", "r1", "r2", "r3"]
        assert first.key in {"r1", "r3"}  # the longest prompts of the window are admitted first
        assert len({first.key, *(c.key for c in completions)}) == len(LENGTHS)


def test_a_stop_request_drains(model_dir: str, monkeypatch: pytest.MonkeyPatch):
    """What is under way is finished, nothing further is admitted."""
    stop = False
    monkeypatch.setattr(engine_module, "stop_requested", lambda: stop)
    with TransformersEngine(model_dir, batch_size=3, dtype=torch.float32) as engine:
        completions = engine.generate(ragged_requests(GREEDY))
        finished = [next(completions).key]
        stop = True
        finished += [completion.key for completion in completions]
    assert 3 <= len(finished) < 6
    assert len(set(finished)) == len(finished)


def test_a_reused_slot_leaks_nothing(model_dir: str, monkeypatch: pytest.MonkeyPatch):
    """The same completions when every new slot starts with huge values in place of zeros (finite, as real leftovers are)."""
    requests = ragged_requests(NUCLEUS)
    clean = answers(model_dir, requests, batch_size=3)
    layer = decoding.SlotCache.layer

    def poisoned(cache: decoding.SlotCache, index: int, keys: torch.Tensor, values: torch.Tensor):
        fresh = index not in cache.layers
        slots = layer(cache, index, keys, values)
        if fresh:
            for states in slots:
                states.fill_(1e9)
        return slots

    monkeypatch.setattr(decoding.SlotCache, "layer", poisoned)
    assert answers(model_dir, requests, batch_size=3) == clean


def test_long_prompts_are_admitted_over_several_passes(model_dir: str, monkeypatch: pytest.MonkeyPatch):
    requests = ragged_requests(NUCLEUS)
    at_once = answers(model_dir, requests, batch_size=10)
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS", 35)
    assert answers(model_dir, requests, batch_size=10) == at_once


def test_what_exceeds_the_model_is_refused_before_sampling(model_dir: str):
    request = Request(key="long", messages=(), prompt_ids=(5,) * 500, sampling=GREEDY, seed=0)
    with TransformersEngine(model_dir, batch_size=1, dtype=torch.float32) as engine:
        with pytest.raises(ValueError, match="500 tokens and 20 new ones exceed the 512 positions"):
            list(engine.generate([request]))
        with pytest.raises(ValueError, match="no tokens"):
            list(engine.generate([Request(key="empty", messages=(), prompt_ids=(), sampling=GREEDY, seed=0)]))


def test_no_requests_no_completions_and_a_closed_engine_says_so(model_dir: str):
    engine = TransformersEngine(model_dir, batch_size=1, dtype=torch.float32)
    with engine:
        assert list(engine.generate([])) == []
    with pytest.raises(ValueError, match="closed"):
        list(engine.generate([]))


def test_bfloat16_runs(model_dir: str):
    with TransformersEngine(model_dir, batch_size=4, dtype=torch.bfloat16) as engine:
        completions = list(engine.generate(ragged_requests(NUCLEUS)))
        assert engine._slots_hold
    assert len(completions) == len(LENGTHS)


def test_fallback_samples_the_same(model_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Through model.generate in batches: the same samples for the same seeds, and one warning."""
    requests = [*ragged_requests(GREEDY)[:5], *ragged_requests(NUCLEUS)[5:]]
    in_slots = answers(model_dir, requests, batch_size=3)
    monkeypatch.setattr(engine_module, "why_not_slots", lambda *_: "it has windows")
    with caplog.at_level(logging.WARNING, logger=engine_module.__name__):
        in_batches = answers(model_dir, requests, batch_size=3)
    assert in_batches == in_slots
    assert [record.message.split(": ")[-1] for record in caplog.records] == ["it has windows"]


@pytest.mark.parametrize("kind", ["bloom", "gemma2", "gpt2", "mamba", "rwkv"])
def test_models_of_other_kinds_are_sampled_as_one_prompt_alone(kind: str, tmp_path: Path):
    """Without an attention that is exchanged, with soft caps and windows, with a state that padding would change."""
    folder, requests = other_model_dir(tmp_path, kind), ragged_requests(replace(GREEDY, max_new_tokens=8))
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = answers(folder, requests, batch_size=4)
    for request in requests:
        said = found[request.key].token_ids
        assert list(said) == greedy_by_generate(model, request)


def test_models_that_the_slots_do_not_hold_for_are_found(model_dir: str):
    """By their layers, by what their attention asks for, and by the logits themselves."""
    prompt = tuple(range(3, 20))

    def model(**changes: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(model_dir, **changes).eval()

    assert why_not_slots(model(), prompt) is None
    assert why_not_slots(model(), (5,)) is None

    windowed = model()
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    assert "sliding_attention" in (why_not_slots(windowed, prompt) or "")

    odd = model()
    attention = odd.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"sliding_window": 4}), with_kwargs=True
    )
    assert "sliding_window" in (why_not_slots(odd, prompt) or "")
    assert odd.config._attn_implementation == "sdpa"

    wrong = model()
    forward = wrong.forward
    wrong.forward = lambda **kwargs: forward(**kwargs | {"position_ids": None})
    assert "differ" in (why_not_slots(wrong, prompt) or "")


@pytest.mark.parametrize("slots", [True, False])
def test_logits_that_are_not_finite_stop_the_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: bool):
    """One weight that is no number: the first logits end it, with the model, the prompt and the way out."""
    folder = tiny_model_dir(tmp_path / "tiny")
    weights = load_file(Path(folder) / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    if not slots:
        monkeypatch.setattr(engine_module, "why_not_slots", lambda *_: "as the test says")
    asked = Request(
        key="k",
        messages=({"role": "user", "content": "Why is the fox quick?"},),
        prompt_ids=(5, 6, 7),
        sampling=Sampling(max_new_tokens=4),
        seed=0,
    )
    with (
        engine_module.TransformersEngine(folder, batch_size=2, dtype=torch.float32) as engine,
        pytest.raises(ValueError, match=r"tiny: the logits are not finite.*fox quick.*engine\.dtype=float32"),
    ):
        list(engine.generate([asked]))
