"""Log-probabilities of preference pairs under a model, without gradient.

The reference log-probabilities of both trainings and the on-policy measures come from here, through the same packed forward
as training. The unit is a query's pairs together: packed alike and in the same dtype, the first training pass repeats these
numbers bit for bit.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from selfsteer.interrupt import stop_requested
from selfsteer.journal import Journal, Record
from selfsteer.logps import Packing, choose_packing, teach, to_device
from selfsteer.models import compute_dtype, load_model, load_tokenizer, pick_device
from selfsteer.packing import Rows, TokenPair, share_prompts
from selfsteer.prompts import Prompts
from selfsteer.quality import ScoredPair
from selfsteer.recipe import Policy, Training
from selfsteer.records import PreferencePair, Scored

KeyedPairs = tuple[str, Sequence[PreferencePair]]
"""The pairs of a query, under the key of their scores."""

_DURABLE_EVERY = 16
"""Groups appended to the journal at once."""


class Scorer(NamedTuple):
    """A model that scores pairs; `open_scorer` makes it."""

    model: PreTrainedModel
    """Taught by `logps.teach`."""
    prompts: Prompts
    training: Training
    """The mechanics that training will use, so that both compute alike."""


def tokenize(pair: PreferencePair, prompts: Prompts) -> TokenPair:
    """The pair as token ids. Raises ValueError for a completion without a single token."""
    chosen = prompts.completion_ids(pair.chosen, pair.chosen_finish)
    rejected = prompts.completion_ids(pair.rejected, pair.rejected_finish)
    if not chosen or not rejected:
        raise ValueError(
            f"query {pair.query_id}: an empty {'rejected' if chosen else 'chosen'} response can't be scored; drop it"
        )
    return TokenPair(prompts.prompt_ids(pair.prompt), chosen, rejected)


@contextmanager
def open_scorer(policy: Policy, training: Training) -> Generator[Scorer]:
    """The policy (a local folder) ready to score; the model is let go of when the block ends."""
    device = pick_device()
    tokenizer = load_tokenizer(policy.model, chat_template=policy.chat_template, trust_remote_code=policy.trust_remote_code)
    # Master weights in float32 and autocast, as in training: weights rounded beforehand would give other numbers.
    model = load_model(policy.model, dtype=torch.float32, device=device, trust_remote_code=policy.trust_remote_code)
    teach(model, compute_dtype(training.dtype, device))
    yield Scorer(model, Prompts(tokenizer, system_role=policy.system_role), training)


def score(scorer: Scorer, groups: Iterable[Sequence[PreferencePair]]) -> Iterator[list[ScoredPair]]:
    """The pairs of each query, in order; one query after the other is read, computed and yielded.

    groups: the pairs of a query together, as they are trained. `training.micro_batch_size` queries share a forward pass;
    above one, training (which shuffles) repeats the numbers only up to rounding.
    """
    model, prompts, training = scorer
    token_groups = (share_prompts([tokenize(pair, prompts) for pair in group]) for group in groups)
    first = next(token_groups, None)
    if first is None:
        return
    packing = choose_packing(model, first.rows, sharing=training.prefix_sharing)
    remaining = chain([first], token_groups)
    while batch := list(islice(remaining, training.micro_batch_size)):
        yield from _score_batch(model, batch, packing)


def _score_batch(model: PreTrainedModel, groups: Sequence[Rows], packing: Packing) -> Iterator[list[ScoredPair]]:
    batch = to_device(packing([row for group in groups for row in group.rows]), model.device)
    with torch.no_grad():
        logps: list[float] = model(**batch).tolist()
    scored = [Scored(logps=value, tokens=count) for value, count in zip(logps, batch["layout"].tokens, strict=True)]
    start = 0
    for group in groups:
        pairs = zip(group.chosen, group.rejected, strict=True)
        yield [ScoredPair(scored[start + chosen], scored[start + rejected]) for chosen, rejected in pairs]
        start += sum(len(row.completions) for row in group.rows)


def score_into(
    journal: Journal, groups: Iterable[KeyedPairs], how: tuple[Policy, Training], advance: Callable[[int], None]
) -> None:
    """Score every group and append it to the journal; returns early when a signal asked to stop, with all of it durable."""
    keys: deque[str] = deque()
    batch: list[Record] = []
    with open_scorer(*how) as scorer:
        try:
            for scored in score(scorer, _until_stopped(groups, keys)):
                batch.append((keys.popleft(), {"scores": [_numbers(pair) for pair in scored]}))
                if len(batch) == _DURABLE_EVERY:
                    journal.append(batch)
                    advance(len(batch))
                    batch = []
        finally:  # also when a pair can't be scored: what was finished is kept
            journal.append(batch)
            advance(len(batch))


def _until_stopped(groups: Iterable[KeyedPairs], keys: deque[str]) -> Iterator[Sequence[PreferencePair]]:
    """The pairs of each group; keys notes whose turn it is, because scoring may read ahead."""
    for key, pairs in groups:
        if stop_requested():
            return
        keys.append(key)
        yield pairs


def _numbers(pair: ScoredPair) -> list[float]:
    return [pair.chosen.logps, pair.chosen.tokens, pair.rejected.logps, pair.rejected.tokens]
