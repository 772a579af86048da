"""Expected on-policy log-probabilities of two models at the same contexts, exact over the vocabulary.

What the numbers mean is in `measures/gain.py`. Left out on purpose: prefix sharing; each prompt is a forward pass of its
own, so that every model can be measured, and a few dozen queries are enough.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfsteer.models import compute_dtype
from selfsteer.recipe.sections import Sampled
from selfsteer.records import Change, Expected
from selfsteer.training.packing import TokenIds
from selfsteer.training.scoring import OpenScorer

_CANDIDATES = 512
"""The most probable tokens among which a nucleus is sought first."""


class Contexts(NamedTuple):
    """A response as token ids, and the three prompts that it is put behind."""

    own: TokenIds
    """The query under the principle that the response was sampled under."""
    opposite: TokenIds
    bare: TokenIds
    response: TokenIds
    """Not empty; every token of it is expected once, behind those before it."""


class Sampler(NamedTuple):
    """A model, and how it samples."""

    scorer: OpenScorer
    sampled: Sampled


def expectations(policy: Sampler, generator: Sampler, responses: Iterable[Contexts]) -> Iterator[Change]:
    """Of each response, before and after. Raises ValueError where a model gives numbers that are not finite."""
    for each in responses:
        with torch.inference_mode():
            yield _measured(policy, generator, each)


def _measured(policy: Sampler, generator: Sampler, contexts: Contexts) -> Change:
    own, opposite, bare = (_logps(policy.scorer, prompt, contexts.response) for prompt in contexts[:3])
    taught = policy.scorer is generator.scorer
    after_own = own if taught else _logps(generator.scorer, contexts.own, contexts.response)
    after_bare = bare if taught else _logps(generator.scorer, contexts.bare, contexts.response)
    following = own - opposite

    unrelated = nucleus(bare, policy.sampled)

    def expected(steered: Tensor, unsteered: Tensor, sampled: Sampled) -> Expected:
        choice, alone = nucleus(steered, sampled), nucleus(unsteered, sampled)
        return Expected(
            on_policy=choice.mean(bare),
            bare=alone.mean(bare),
            following=choice.mean(following),
            entropy=choice.entropy(),
            unrelated=unrelated.mean(unsteered),
        )

    found = Change(
        tokens=len(contexts.response),
        before=expected(own, bare, policy.sampled),
        after=expected(after_own, after_bare, generator.sampled),
    )
    if not torch.tensor([*found.before, *found.after]).isfinite().all():
        raise ValueError(
            f"{generator.scorer.model.config.name_or_path}: expectations that are not finite. Look at the model's weights;"
            " in half precision, set training.dtype=float32"
        )
    return found


def _logps(scorer: OpenScorer, prompt: TokenIds, response: TokenIds) -> Tensor:
    """log pi(v | prompt, the response so far) of every token v, where each token of the response is expected: (N, V)."""
    model = scorer.model
    ids = torch.tensor([(*prompt, *response[:-1])], device=model.device)
    dtype = compute_dtype(scorer.training.dtype, model.device)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits: Tensor = model(input_ids=ids, use_cache=False, **_only_last(model, len(response))).logits
    last = logits[0, -len(response) :].float()
    return last - last.logsumexp(-1, keepdim=True)


def _only_last(model: PreTrainedModel, count: int) -> dict[str, int]:
    known = inspect.signature(type(model).forward).parameters
    return {"logits_to_keep": count} if "logits_to_keep" in known else {}


class Nucleus(NamedTuple):
    """What is sampled from at each of N contexts."""

    ids: Tensor
    """(N, K) tokens."""
    probabilities: Tensor
    """(N, K), 0 outside of the nucleus, 1 together."""

    def mean(self, values: Tensor) -> float:
        """The expectation of values, (N, V), averaged over the contexts."""
        return (self.probabilities * values.gather(-1, self.ids)).sum(-1).double().mean().item()

    def entropy(self) -> float:
        """In nats, averaged over the contexts."""
        return -torch.special.xlogy(self.probabilities, self.probabilities).sum(-1).double().mean().item()


def nucleus(logps: Tensor, sampled: Sampled) -> Nucleus:
    """The smallest sets of most probable tokens with at least top_p at this temperature (arXiv 1904.09751), renormalised.

    logps: (N, V), of the whole vocabulary. At temperature 0 the most probable token alone.
    """
    vocabulary = logps.shape[-1]
    if sampled.temperature == 0:
        ids = logps.argmax(-1, keepdim=True)
        return Nucleus(ids, torch.ones_like(ids, dtype=torch.float32))
    probabilities = (logps / sampled.temperature).softmax(-1)
    for count in (min(_CANDIDATES, vocabulary), vocabulary):
        values, ids = probabilities.topk(count)
        before = values.cumsum(-1) - values
        if count == vocabulary or bool((before[:, -1] + values[:, -1] >= sampled.top_p).all()):
            kept = torch.where(before < sampled.top_p, values, 0.0)
            return Nucleus(ids, kept / kept.sum(-1, keepdim=True))
    raise AssertionError("the whole vocabulary holds every nucleus")
