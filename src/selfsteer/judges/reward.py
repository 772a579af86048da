"""Rewards of responses from a sequence-classification model in Hugging Face format with one label.

The conversation is rendered with the reward model's own chat template, the response as the assistant's last turn. Rewards
are journalled under what determines them. Left out on purpose: training a reward model; templates for tokenizers without
one (`Policy.chat_template` names a Jinja file); models whose scoring needs code of their own.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jinja2 import TemplateError
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from selfsteer.judges.base import Pairs, not_refused, with_refused
from selfsteer.measures.verdicts import Verdict, by_margin
from selfsteer.models import compute_dtype, let_go, load_configuration, load_model, pick_device, tokenizer_of
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import DTypeName
from selfsteer.recipe.sections import Policy
from selfsteer.records import Checkpoint, Message, Pair
from selfsteer.runtime import progress, raise_if_stopped, stop_requested
from selfsteer.store.durable import digest, file_digest
from selfsteer.store.folder import SCHEMA_VERSION
from selfsteer.store.journal import Journal, Record

_WINDOW = 128
"""Conversations sorted by length among themselves."""

Conversation = tuple[Message, ...]
"""Ends with the assistant's response."""

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """Which reward model scores, and how it computes."""

    model: Checkpoint
    policy: Policy
    """How it is read: chat template, remote code. Its `model` is not looked at."""
    dtype: DTypeName = "auto"
    max_tokens: int = 8192
    """Longer conversations are not scored; nothing is ever cut."""
    batch_tokens: int = 16384
    """Tokens of a forward pass, padding included: memory, not mathematics (but for rounding)."""

    def key(self, conversation: Conversation) -> str:
        """Of what determines the reward."""
        template = self.policy.chat_template
        content = {
            "schema": SCHEMA_VERSION,
            "reward_model": self.model.digest,
            "chat_template": None if template is None else file_digest(Path(template)),
            **({"template_arguments": self.policy.template_arguments} if self.policy.template_arguments else {}),
            "dtype": str(compute_dtype(self.dtype, pick_device())),
            "conversation": list(conversation),
        }
        return digest(content)


class Renderer(NamedTuple):
    """The tokenizer of a reward model; `open_renderer` makes it."""

    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    max_tokens: int

    def ids(self, conversation: Conversation) -> TokenIds:
        """The rendered conversation, without the header of another answer."""
        return self.prompts.conversation_ids(conversation)

    def refusal(self, conversation: Conversation) -> str | None:
        """Why this conversation must not be scored, or None."""
        if any(self.prompts.contains_special(message["content"]) for message in conversation):
            return "special tokens in the text"
        try:
            length = len(self.ids(conversation))
        except TemplateError as error:
            return f"refused by the chat template: {error.message}"
        return "too long for the reward model" if length > self.max_tokens else None


def open_renderer(reward: RewardModel) -> Renderer:
    """Raises ValueError where the tokenizer has no chat template."""
    policy = reward.policy
    tokenizer = tokenizer_of(policy, reward.model.path)
    prompts = Prompts.of(policy.model_copy(update={"system_role": "system"}), tokenizer)
    return Renderer(tokenizer, prompts, reward.max_tokens)


@contextmanager
def open_reward_model(reward: RewardModel) -> Generator[PreTrainedModel]:
    """The model ready to score, let go of when the block ends. Raises ValueError when it has not exactly one label."""
    device, path, trust = pick_device(), reward.model.path, reward.policy.trust_remote_code
    labels = load_configuration(path, trust_remote_code=trust).num_labels
    if labels != 1:
        raise ValueError(
            f"{path}: {labels} labels; a reward model has one. Name a sequence-classification "
            "model that was trained to score responses."
        )
    dtype = compute_dtype(reward.dtype, device)
    yield load_model(path, dtype=dtype, device=device, trust_remote_code=trust, kind=AutoModelForSequenceClassification)


def score_batch(model: PreTrainedModel, rows: Sequence[TokenIds]) -> list[float]:
    """The reward of each tokenised conversation, in their order."""
    pad = cast("int | None", model.config.get_text_config().pad_token_id)
    if pad is None:
        # Padded with an id that no row contains, the model finds each row's last token as it does without padding.
        used = {token for row in rows for token in row}
        pad = next(token for token in range(len(used) + 1) if token not in used)
        model.config.get_text_config().pad_token_id = pad
        try:
            return score_batch(model, rows)
        finally:
            model.config.get_text_config().pad_token_id = None
    longest = max(map(len, rows))
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([row + (pad,) * (longest - len(row)) for row in rows], device=model.device),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device),
        ).logits
    return logits.float()[:, 0].tolist()


def score_missing(
    reward: RewardModel, conversations: Iterable[Conversation], journal: Journal, *, description: str, total: int
) -> None:
    """Score every conversation that the journal lacks; the model is loaded only when there is one.

    total, the number of conversations, is for the progress bar. Raises Interrupted when a signal asked to stop, ValueError
    at the first reward that is not finite.
    """
    lacking = journal.lacking(conversations, key=reward.key)
    if lacking is None:
        return
    renderer = open_renderer(reward)
    with progress(description, total, unit="responses") as advance, open_reward_model(reward) as model:
        journal.fill(_rewards(model, renderer, reward, lacking), advance)
    del model
    let_go()
    raise_if_stopped()


def reward_of(reward: RewardModel, conversation: Conversation, journal: Journal) -> float:
    """The journalled reward."""
    return journal.get(reward.key(conversation))["reward"]


def _rewards(
    model: PreTrainedModel, renderer: Renderer, reward: RewardModel, conversations: Iterator[Conversation]
) -> Iterator[Record]:
    """Key and reward of each conversation, until a signal asks to stop; those of like length share a forward pass."""
    while not stop_requested() and (window := list(islice(conversations, _WINDOW))):
        rows = sorted(
            ((renderer.ids(conversation), reward.key(conversation)) for conversation in window),
            key=lambda row: len(row[0]),
        )
        batch: list[tuple[TokenIds, str]] = []
        for row in rows:
            if batch and len(row[0]) * (len(batch) + 1) > reward.batch_tokens:
                yield from _scored(model, batch)
                batch = []
            batch.append(row)
        yield from _scored(model, batch)


def _scored(model: PreTrainedModel, batch: Sequence[tuple[TokenIds, str]]) -> Iterator[Record]:
    scores = score_batch(model, [ids for ids, _ in batch])
    if not all(map(math.isfinite, scores)):
        raise ValueError(
            f"{model.config.name_or_path}: rewards that are not finite. Look at the model's weights; in half precision, set"
            " dtype=float32"
        )
    return ((key, {"reward": score}) for (_, key), score in zip(batch, scores, strict=True))


# --- a reward model --------------------------------------------------------------------------------------------------------


def reward_verdicts(judge: RewardModel, pairs: Pairs, journal: Journal, *, total: int) -> Iterator[Verdict]:
    """The response with the higher reward. total, the number of pairs, is for the progress bar.

    Raises Interrupted, with all rewards durable, when a signal asked to stop.
    """
    renderer = open_renderer(judge)
    refused: dict[int, str] = {}

    def why_not(pair: Pair) -> str | None:
        return next(filter(None, map(renderer.refusal, conversations(pair))), None)

    def verdict(pair: Pair) -> Verdict:
        chosen, rejected = (reward_of(judge, conversation, journal) for conversation in conversations(pair))
        return by_margin(pair, chosen - rejected)

    wanted = chain.from_iterable(map(conversations, not_refused(pairs, why_not, refused)))
    score_missing(judge, wanted, journal, description="rewards", total=2 * total)
    yield from with_refused(pairs, refused, verdict)


def conversations(pair: Pair) -> tuple[Conversation, Conversation]:
    """With the chosen response, and with the rejected one."""
    return (*pair.prompt, *pair.chosen.messages), (*pair.prompt, *pair.rejected.messages)
