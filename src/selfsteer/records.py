"""The nouns of the method, as frozen records; every stage exchanges these, or paths to files of them.

Left out on purpose: behaviour. How records become prompts is in `prompts.py`, how they become pairs in `pairs.py`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation, in the form that every chat template reads."""

    role: str
    content: str


FinishReason = Literal["stop", "length"]
"""Why sampling ended: the model said its end token, or the limit of new tokens was reached."""

PairKind = Literal["l_plus", "l_minus", "alignment", "given"]
"""What a pair trains: either half of L_SSO (the generator), the policy, or a pair made elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """The user's request, x."""

    id: str
    """sha256 of the canonical JSON of `messages`, shortened to 16 hex digits."""
    messages: tuple[Message, ...]
    """The conversation up to and including the user's last turn; often that turn alone."""

    @property
    def text(self) -> str:
        """The user's last turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A row that goes no further, kept with its reason."""

    id: str
    """The query's id, or where the row stands when it has none."""
    reason: str
    """Short and the same for all rows dropped alike, so that it can be counted."""
    detail: str = ""
    """What is particular to this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principles:
    """The opposing principles that steer one query."""

    good: str
    """p+, leads to a good response."""
    bad: str
    """p-, leads to a relatively bad one."""
    quality: str
    """What the pair is about, such as "accuracy"; "generated" when a model wrote it."""
    source: Literal["library", "generated", "file"]
    concision: bool = False
    """The concision pair was added, against length bias."""
    fallback: str | None = None
    """Why a library pair stands in for a generated one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A text answering a query, as sampled."""

    text: str
    token_ids: tuple[int, ...]
    """The sampled tokens, without the end token."""
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """One query answered three times by the same policy."""

    query: Query
    principles: Principles
    good: Response
    """y+, sampled from x+ (the query under the good principle)."""
    bad: Response
    """y-, sampled from x- (the query under the bad principle)."""
    original: Response | None
    """y_o, sampled from the bare query; None where the recipe trains no generator on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A prompt with a better and a worse completion: what every preference trainer of the field reads."""

    query_id: str
    kind: PairKind
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_finish: FinishReason = "stop"
    """With "length", the completion was cut off: it is trained without an end token."""
    rejected_finish: FinishReason = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The log-probability of one completion under one model."""

    logps: float
    """log pi(y | x), summed over the completion, end token included when the completion has one."""
    tokens: int

    @property
    def mean_logps(self) -> float:
        """Per-token mean over the completion only; its exponential is the on-policy probability."""
        return self.logps / self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter on disk, in peft's format."""

    name: str
    """What engines know it by."""
    path: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on disk, an ordinary Hugging Face folder; perhaps with an adapter that is not merged into it."""

    path: str
    digest: str
    """sha256 over the names and contents of weights, configuration and tokenizer, of the adapter as well."""
    adapter: Adapter | None = None


class PairRow(TypedDict):
    """One row of a sealed pairs file (Parquet); the first three columns are what TRL reads.

    Rows of one query stand together, in the order of `pairs.steering_pairs`.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    query_id: str
    kind: str
    chosen_finish: str
    rejected_finish: str
    ref_chosen_logps: NotRequired[float | None]
    ref_rejected_logps: NotRequired[float | None]
    chosen_tokens: NotRequired[int | None]
    rejected_tokens: NotRequired[int | None]


class ScoredPair(NamedTuple):
    """Both completions of a pair under one model."""

    chosen: Scored
    rejected: Scored
