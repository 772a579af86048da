"""The nouns of the method, as frozen records; every stage exchanges these, or paths to files of them.

Left out on purpose: behaviour. How records become prompts is in `prompts.py`, how they become pairs in `pairs.py`.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, NotRequired, Self, TypedDict


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
    checks: tuple[str, ...] = ()
    """What code can check of a response to the good principle (`measures/checks.py`), each as canonical JSON."""
    wrap: str | None = None
    """What either principle is set into, at {principle}; None: it stands alone."""

    @property
    def good_message(self) -> str:
        """What steers towards p+."""
        return self._message(self.good)

    @property
    def bad_message(self) -> str:
        """What steers towards p-."""
        return self._message(self.bad)

    def _message(self, principle: str) -> str:
        return principle if self.wrap is None else self.wrap.replace("{principle}", principle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A text answering a query, as sampled."""

    text: str
    token_ids: tuple[int, ...]
    """The sampled tokens, without the end token."""
    finish_reason: FinishReason
    seed: int
    end_id: int | None = None
    """The end token that was sampled; None of a response that was cut off, and where the engine did not tell."""
    reencoded: bool = False
    """The engine told only the text; `token_ids` is that text encoded again."""

    @property
    def sampled(self) -> tuple[int, ...] | None:
        """All that was sampled, with the end token; None where the engine did not tell all of it."""
        if self.reencoded:
            return None
        if self.finish_reason == "length":
            return self.token_ids
        return None if self.end_id is None else (*self.token_ids, self.end_id)


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


class Scored(NamedTuple):
    """The log-probability of one completion under one model."""

    logps: float
    """log pi(y | x), summed over the completion, end token included when the completion has one."""
    tokens: int

    @property
    def mean_logps(self) -> float:
        """Per-token mean over the completion only; its exponential is the on-policy probability."""
        return self.logps / self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two responses of a pair: what was said, what it was sampled as, how probable the policy finds it."""

    messages: tuple[Message, ...]
    """The assistant's turn."""
    finish: FinishReason = "stop"
    """With "length", the response was cut off: it is trained without an end token."""
    token_ids: tuple[int, ...] | None = None
    """What was sampled, with the end token: what is scored, trained and measured. None where only the text is known."""
    logps: float | None = None
    """Summed log-probability under the policy to be aligned; None as long as nobody has scored the pair."""
    tokens: int | None = None
    """How many tokens that sum is over."""
    seed: int | None = None
    """That it was sampled with; None of a response made elsewhere."""

    @property
    def text(self) -> str:
        """What the assistant says."""
        return self.messages[-1]["content"]

    @property
    def score(self) -> Scored:
        """Of a response that is scored; `Pair.scored` says whether it is."""
        assert self.logps is not None, "not scored"
        assert self.tokens is not None, "not scored"
        return Scored(self.logps, self.tokens)


def user_turn(text: str) -> tuple[Message, ...]:
    """A conversation that only begins: what the user says."""
    return (Message(role="user", content=text),)


def side(text: str, finish: FinishReason = "stop") -> Side:
    """A response of which nothing but the text is known."""
    return Side(messages=(Message(role="assistant", content=text),), finish=finish)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt with a better and a worse response: the one shape of a pair, whoever made it and whatever it trains."""

    query_id: str
    """`Query.id`; of a pair made elsewhere its own id, or one of its prompt."""
    kind: PairKind
    """What it trains: l_plus, l_minus, alignment, or given."""
    prompt: tuple[Message, ...]
    """What both sides answer: x+, x- or the bare query."""
    chosen: Side
    rejected: Side
    principles: Principles | None = None
    """Those that the responses were sampled under; None of a pair made elsewhere."""

    @property
    def scored(self) -> bool:
        """Whether both responses carry their log-probability. ValueError where they cannot be any."""
        if None in (self.chosen.logps, self.chosen.tokens, self.rejected.logps, self.rejected.tokens):
            return False
        for side in (self.chosen, self.rejected):
            if not math.isfinite(side.score.logps) or side.score.tokens < 1:
                raise ValueError(
                    f"query {self.query_id}: a log-probability of {side.logps} over {side.tokens} tokens is no measure; "
                    "delete the scores of these pairs and let them be computed again."
                )
        return True

    def turned(self) -> Self:
        """Chosen and rejected exchanged. The principles stay: the good one still names what has now been rejected."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)


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


class Expected(NamedTuple):
    """What a model is expected to say next (`measures/gain.py`): means over the contexts of a response, nats a token."""

    on_policy: float
    """log pi(v | x, context) of its tokens v, sampled under the principle."""
    bare: float
    """The same of its tokens sampled given the bare query."""
    following: float
    """log pi(v | own principle) - log pi(v | opposite one) of its tokens sampled under the principle."""
    entropy: float
    """Of what it samples from under the principle."""
    unrelated: float
    """log model(v | x, context) of the policy's tokens sampled given the bare query."""


class Change(NamedTuple):
    """A response whose first `tokens` tokens are the contexts of two models."""

    tokens: int
    before: Expected
    """Of the policy."""
    after: Expected
    """Of the generator."""


class PairRow(TypedDict):
    """A pair as files made elsewhere and exports have it; the first three columns are what TRL reads."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    query_id: str
    kind: str
    chosen_finish: str
    rejected_finish: str
    chosen_ids: NotRequired[list[int] | None]
    """What was sampled, as the file says; its reader has to see whether they are tokens of this text (`Prompts.spells`)."""
    rejected_ids: NotRequired[list[int] | None]
    ref_chosen_logps: NotRequired[float | None]
    ref_rejected_logps: NotRequired[float | None]
    chosen_tokens: NotRequired[int | None]
    rejected_tokens: NotRequired[int | None]


class Saving(TypedDict):
    """What saving cost; margins are beta * (chosen log-ratio - rejected log-ratio), in the arithmetic of the training."""

    dtype: str
    """In which the weights are delivered."""
    trained: float | None
    """Mean margin of a few training pairs after the last step, less that before the first; None of sharded weights."""
    delivered: float | None
    """The same of what is delivered."""
    rounded: float | None
    """The same with its weights rounded to bfloat16, as an engine would sample them; None of what is delivered in it."""
    quantized: NotRequired[float]
    """With training.lora.quantize, the same on the weights in 4 bits that it was trained on; `trained` is then of the
    adapter on the full weights."""
