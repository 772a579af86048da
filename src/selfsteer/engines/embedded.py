"""The embedded engine: samples a transformers model on any device, with continuous batching.

Requests are pulled a few batches ahead and admitted longest prompt first. Sequences sit in the slots of one cache
(`decoding.py`); one that finishes is yielded at once and a waiting prompt takes its slot in the next forward pass. A model
for which the slots do not hold is sampled by `model.generate` in batches of like length, with one warning.

The sequences under way at a time share one adapter: requests are best sent one adapter after the other.

A completion depends on its request and not on the requests beside it: its random numbers come from its own seed. The
probabilities they meet are equal only up to the rounding of matrix products of other shapes, so on rare occasions a token at
the edge of two intervals differs (much more often in bfloat16 than in float32).
"""

import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self, cast

import torch
from peft import LoraModel, PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from selfsteer.adapters import add_before_rounding
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.decoding import ATTENTION_NAME, Segment, SlotCache, UnsupportedAttentionError, choose, plan_step
from selfsteer.models import end_ids, let_go, load_model, position_limit, read_tokenizer, untrained_ids
from selfsteer.prompts import assistant_turn
from selfsteer.records import Adapter, FinishReason
from selfsteer.runtime import stop_requested

log = logging.getLogger(__name__)

WINDOW_BATCHES = 4
"""Requests are pulled and sorted this many batches at a time."""

PROMPT_TOKENS = 2048
"""Prompt tokens admitted to one forward pass, a longer single prompt apart; bounds the memory of activations."""


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """A request under way."""

    request: Request
    uniforms: list[float]
    """The random number of each token."""
    tokens: list[int] = field(default_factory=list[int])
    end: int | None = None
    """The end token, once it was drawn."""

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids) + len(self.tokens)


class _Vocabulary(NamedTuple):
    """What the sampler has to know of a model's tokens."""

    model: str
    """Its folder, for messages."""
    ends: frozenset[int]
    """What ends a completion."""
    never: list[int]
    """Ids that no token has: rows that the embedding has for its shape alone, never trained."""


class TransformersEngine:
    """Implements `Engine` with a model of this process, and adapters for it; loads them on entry and frees them on exit."""

    def __init__(
        self,
        model_path: str,
        *,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        adapters: Sequence[Adapter] = (),
        end_ids: Collection[int] = (),
    ) -> None:
        """end_ids: what ends a completion beside the end tokens that the model folder names."""
        self.model_path = model_path
        self.adapters = tuple(adapters)
        self.batch_size = batch_size
        self._dtype = dtype
        self._device = device
        self._trust_remote_code = trust_remote_code
        self._model: PreTrainedModel | None = None
        self._adapted: PeftModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._more_ends = end_ids
        self._vocabulary = _Vocabulary("", frozenset(), [])
        self._slots_hold: bool | None = None

    def __enter__(self) -> Self:
        trust = self._trust_remote_code
        self._model = load_model(self.model_path, dtype=self._dtype, device=self._device, trust_remote_code=trust)
        self._adapted = self._with_adapters(self._model)
        self._apply(None)
        self._tokenizer = read_tokenizer(self.model_path, trust_remote_code=trust)
        rows = cast(int, self._model.config.get_text_config().vocab_size)
        closing = {assistant_turn(self._tokenizer).end_id} if self._tokenizer.chat_template else set[int]()
        self._vocabulary = _Vocabulary(
            model=self.model_path,
            ends=end_ids(self.model_path, self._tokenizer).union(self._more_ends, closing),
            never=untrained_ids(self._tokenizer, rows),
        )
        # A request says all about its sampling: a model's own top_k or repetition penalty would change the distribution.
        self._model.generation_config = GenerationConfig()
        return self

    def __exit__(self, *exception: object) -> None:
        self._model = self._adapted = self._tokenizer = self._slots_hold = None
        let_go()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer the requests as `Engine` promises.

        Raises ValueError for a request that is empty or does not fit the model, when its window is pulled.
        """
        if self._model is None or self._tokenizer is None:
            raise ValueError("the engine is closed; use it in a with statement")
        waiting = _Waiting(requests, size=WINDOW_BATCHES * self.batch_size, max_positions=position_limit(self._model.config))
        while (first := waiting.turn()) is not None:
            self._apply(first.adapter)
            if self._slots_hold is None:
                reason = why_not_slots(self._model, first.prompt_ids)
                self._slots_hold = reason is None
                if reason is not None:
                    log.warning("%s: sampling with model.generate, which is slower: %s", self.model_path, reason)
            sample = _sample_in_slots if self._slots_hold else _sample_in_batches
            for sequence, reason in sample(self._model, waiting, self.batch_size, self._vocabulary):
                yield Completion(
                    key=sequence.request.key,
                    text=self._decoded(sequence.tokens),
                    token_ids=tuple(sequence.tokens),
                    finish_reason=reason,
                    end_id=sequence.end,
                )

    def _apply(self, adapter: str | None) -> None:
        """Switch to this adapter, or to the model as it is."""
        if self._adapted is None:
            assert adapter is None, f"the engine was opened without the adapter {adapter!r}"
            return
        layers = cast(LoraModel, self._adapted.base_model)
        if adapter is None:
            layers.disable_adapter_layers()
        else:
            layers.enable_adapter_layers()
            self._adapted.set_adapter(adapter)

    def _with_adapters(self, model: PreTrainedModel) -> PeftModel | None:
        """The model with all adapters upon it, which puts them into its own layers as well."""
        if not self.adapters:
            return None
        first, *others = self.adapters
        adapted = PeftModel.from_pretrained(model, first.path, adapter_name=first.name)
        for adapter in others:
            adapted.load_adapter(adapter.path, adapter_name=adapter.name)
        add_before_rounding(adapted)
        return adapted

    def _decoded(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class _Waiting:
    """The requests to come, pulled a window at a time; one adapter's after another's, the longest prompts first."""

    def __init__(self, requests: Iterable[Request], *, size: int, max_positions: int | None) -> None:
        self._source = iter(requests)
        self._size = size
        self._max_positions = max_positions
        self._window: list[Request] = []
        self._adapter: str | None = None

    def turn(self) -> Request | None:
        """The next request, whose adapter `peek` keeps to from now on; None as there."""
        following = self._next()
        if following is not None:
            self._adapter = following.adapter
        return following

    def peek(self) -> Request | None:
        """The next request; None when there is none with the adapter whose turn it is, or a stop was requested."""
        following = self._next()
        return following if following is not None and following.adapter == self._adapter else None

    def _next(self) -> Request | None:
        if stop_requested():
            return None
        if not self._window:
            self._window = list(itertools.islice(self._source, self._size))
            for request in self._window:
                self._check(request)
            # From the end: what the turn is about goes on, and the others follow.
            self._window.sort(key=lambda item: (item.adapter == self._adapter, item.adapter or "", len(item.prompt_ids)))
        return self._window[-1] if self._window else None

    def take(self) -> _Sequence:
        """The request that was peeked at, with its random numbers."""
        request = self._window.pop()
        generator = torch.Generator().manual_seed(request.seed)
        uniforms = torch.rand(request.sampling.max_new_tokens, generator=generator).tolist()
        return _Sequence(request=request, uniforms=uniforms)

    def _check(self, request: Request) -> None:
        if not request.prompt_ids:
            raise ValueError(f"request {request.key}: the prompt has no tokens")
        prompt, new = len(request.prompt_ids), request.sampling.max_new_tokens
        if self._max_positions is not None and prompt + new > self._max_positions:
            raise ValueError(
                f"request {request.key}: a prompt of {prompt} tokens and {new} new ones exceed the {self._max_positions} "
                "positions of the model. Lower max_new_tokens or queries.max_prompt_tokens in the recipe."
            )


_Finished = Iterator[tuple[_Sequence, FinishReason]]


def _sample_in_slots(model: PreTrainedModel, waiting: _Waiting, batch_size: int, vocabulary: _Vocabulary) -> _Finished:
    """Continuous batching: `active[i]` sits in slot i."""
    cache = SlotCache(batch_size)
    active: list[_Sequence] = []
    while True:
        going = len(active)
        admitted_tokens = 0
        while len(active) < batch_size and (request := waiting.peek()) is not None:
            if admitted_tokens and admitted_tokens + len(request.prompt_ids) > PROMPT_TOKENS:
                break
            admitted_tokens += len(request.prompt_ids)
            active.append(waiting.take())
        if not active:
            return
        drawn = _drawn(_forward(model, cache, active, going), active, vocabulary)
        finished: list[tuple[_Sequence, FinishReason]] = []
        for slot in reversed(range(len(active))):
            sequence = active[slot]
            reason = _extended(sequence, drawn[slot], vocabulary.ends)
            if reason is None:
                continue
            finished.append((sequence, reason))
            last = active.pop()
            if last is not sequence:
                active[slot] = last
                cache.move(len(active), slot, last.length - 1)  # the newest token is not in the cache yet
        yield from finished


def _sample_in_batches(model: PreTrainedModel, waiting: _Waiting, batch_size: int, vocabulary: _Vocabulary) -> _Finished:
    """Batch after batch through `model.generate`, left-padded; each token is drawn as in the slots.

    A model that does not look past padding (RWKV's state does not) gets prompts of one length together.
    """
    request = waiting.peek()
    padding_holds = request is not None and _looks_past_padding(model, request.prompt_ids)
    while True:
        batch: list[_Sequence] = []
        while len(batch) < batch_size and (request := waiting.peek()) is not None:
            if batch and not padding_holds and len(request.prompt_ids) != batch[0].length:
                break
            batch.append(waiting.take())
        if not batch:
            return
        width = max(sequence.length for sequence in batch)

        def force_drawn(ids: Tensor, logits: Tensor, batch: list[_Sequence] = batch, width: int = width) -> Tensor:
            """A logits processor that leaves only the drawn token to the greedy choice after it."""
            chosen = _drawn(logits, batch, vocabulary, at=ids.shape[1] - width)
            index = torch.tensor(chosen, device=logits.device)[:, None]
            return torch.full_like(logits, -torch.inf).scatter_(-1, index, 0.0)

        padding = [[0] * (width - s.length) for s in batch]
        sequences = model.generate(  # pyright: ignore[reportCallIssue]
            torch.tensor([p + list(s.request.prompt_ids) for p, s in zip(padding, batch, strict=True)], device=model.device),
            attention_mask=torch.tensor([[0] * len(p) + [1] * (width - len(p)) for p in padding], device=model.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max(s.request.sampling.max_new_tokens for s in batch),
                eos_token_id=sorted(vocabulary.ends),
                pad_token_id=min(vocabulary.ends),
            ),
            logits_processor=LogitsProcessorList([force_drawn]),
        )
        for sequence, tokens in zip(batch, sequences[:, width:].tolist(), strict=True):
            reason = None
            for token in tokens:
                if reason is None:
                    reason = _extended(sequence, token, vocabulary.ends)
            assert reason is not None
            yield sequence, reason


def _looks_past_padding(model: PreTrainedModel, prompt_ids: tuple[int, ...]) -> bool:
    """Whether the logits behind a prompt are the same with padding before it."""
    asked, config = list(prompt_ids[:8]), GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=0)

    def logits(padding: int) -> Tensor:
        found: list[Tensor] = []

        def keep(_: Tensor, logits: Tensor) -> Tensor:
            found.append(logits)
            return logits

        model.generate(  # pyright: ignore[reportCallIssue]
            torch.tensor([[0] * padding + asked], device=model.device),
            attention_mask=torch.tensor([[0] * padding + [1] * len(asked)], device=model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([keep]),
        )
        return found[0][0].float()

    alone, padded = logits(0), logits(2)
    return bool((padded - alone).abs().max() <= _rounding(alone, model.dtype))


def _rounding(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """What comes of rounding alone: a few hundred units in the last place of the largest logit, at any precision."""
    return torch.finfo(dtype).eps ** 0.5 * (logits - logits.mean()).abs().max()


def _extended(sequence: _Sequence, token: int, ends: frozenset[int]) -> FinishReason | None:
    """Append the token and say why the sequence is finished, if it is."""
    if token in ends:
        sequence.end = token
        return "stop"
    sequence.tokens.append(token)
    return "length" if len(sequence.tokens) == sequence.request.sampling.max_new_tokens else None


@torch.inference_mode()
def _forward(model: PreTrainedModel, cache: SlotCache, active: list[_Sequence], going: int) -> Tensor:
    """One pass over the newest tokens of the first `going` sequences and the whole prompts of the others.

    Returns the logits of each sequence's next token, (sequences, vocabulary).
    """
    ids = [sequence.tokens[-1] for sequence in active[:going]]
    positions = [sequence.length - 1 for sequence in active[:going]]
    last = list(range(going))
    prompts: list[Segment] = []
    for slot, sequence in enumerate(active[going:], start=going):
        prompt = sequence.request.prompt_ids
        prompts.append(Segment(slot, len(ids), len(ids) + len(prompt)))
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        last.append(len(ids) - 1)
    lengths = [sequence.length for sequence in active[:going]]
    step = plan_step(cache, lengths, tuple(prompts), like=next(model.parameters()))
    return model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
        logits_to_keep=torch.tensor(last, device=model.device),
        step=step,
    ).logits[0]


@torch.inference_mode()
def _drawn(logits: Tensor, sequences: list[_Sequence], known: _Vocabulary, *, at: int | None = None) -> list[int]:
    """The next token of each sequence, drawn with its random number `at` (default: its next one); none of `known.never`."""
    finite = logits.amax(dim=-1).isfinite()  # NaN and infinity come through the maximum
    if not finite.all():
        asked = sequences[int((~finite).nonzero()[0])].request.messages[-1]["content"]
        raise ValueError(
            f"{known.model}: the logits are not finite numbers, first after the prompt that ends in {asked[-80:]!r}. Look at"
            " the model's weights; in half precision, set engine.dtype=float32"
        )
    if known.never:
        logits = logits.index_fill(-1, torch.tensor(known.never, device=logits.device), -torch.inf)
    numbers = [
        (
            s.request.sampling.temperature,
            s.request.sampling.top_p,
            s.uniforms[min(len(s.tokens) if at is None else at, len(s.uniforms) - 1)],
        )
        for s in sequences
    ]
    temperature, top_p, uniforms = torch.tensor(numbers, device=logits.device).unbind(-1)
    return choose(logits, temperature=temperature, top_p=top_p, uniforms=uniforms).tolist()


def why_not_slots(model: PreTrainedModel, prompt_ids: tuple[int, ...]) -> str | None:
    """Why this model can't be sampled in slots, or None when it can; then its attention is switched to them.

    Whatever its configuration says, the logits after the prompt must equal those of the plain forward pass, both when the
    prompt is prefilled whole and when its last token is decoded.
    """
    if not model._supports_attention_backend:  # pyright: ignore[reportPrivateUsage]
        return f"{type(model).__name__} takes no attention function"
    other = set(model.config.get_text_config().to_dict().get("layer_types") or ()) - {"full_attention"}
    if model._is_stateful or other:  # pyright: ignore[reportPrivateUsage]
        return f"{type(model).__name__} has layers with a state or a window: {', '.join(sorted(other)) or 'recurrent'}"
    plain_attention = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    assert plain_attention is not None
    ids = (prompt_ids * 2)[: max(2, min(len(prompt_ids), 256))]
    with torch.inference_mode():
        plain = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
    model.set_attn_implementation(ATTENTION_NAME)
    cache = SlotCache(2)
    probes = (Request(key="probe", messages=(), prompt_ids=each, sampling=Sampling(), seed=0) for each in (ids[:-1], ids))
    shorter, whole = (_Sequence(request=request, uniforms=[]) for request in probes)
    try:
        _forward(model, cache, [shorter], 0)
        shorter.tokens.append(ids[-1])
        in_slots = _forward(model, cache, [shorter, whole], 1).float()
    except UnsupportedAttentionError as error:
        model.set_attn_implementation(plain_attention)
        return str(error)
    difference = (in_slots - plain).abs().max()
    if difference <= _rounding(plain, model.dtype):
        return None
    model.set_attn_implementation(plain_attention)
    return f"the logits of a first prompt differ by {difference.item():.2g} from the plain forward pass"
