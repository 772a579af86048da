"""Strict reading of what an OpenAI-compatible server sends back; nothing here does any input or output.

What is not exactly one finished choice with a text is an error, never an empty success. Left out on purpose: streamed
answers, tool calls, log-probabilities beyond the first token.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selfsteer.engines.base import TokenLogp
from selfsteer.records import FinishReason

EXCERPT = 300
"""Characters of a server's own words in a message of ours."""

REQUEST_REFUSED = frozenset({400, 413, 422})
"""Statuses that say: this request, and no other, is wrong (OpenAI and vLLM; too large; TGI)."""

TRY_AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another try may overcome; all from 500 on may be."""

MISFORMED = frozenset({"abort", "error"})
"""Finish reasons by which servers and routers say that generation broke off."""


class Answer(NamedTuple):
    """One sampled text, as the server reports it."""

    text: str
    token_ids: tuple[int, ...] | None
    """The server's own, the end token perhaps included (vLLM does); None when it returned none."""
    finish_reason: FinishReason
    first_logps: tuple[TokenLogp, ...] | None = None
    """The most probable first tokens; None when the server returned none."""


class RefusedError(Exception):
    """This request will never be answered; others may be."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class TryError(Exception):
    """This try gave no answer; another one may.

    costly: the server may have generated before it failed, so few further tries are made.
    busy: the server asked to wait. retry_after: for how many seconds, when it said so.
    """

    def __init__(self, detail: str, *, costly: bool = False, busy: bool = False, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.costly = costly
        self.busy = busy
        self.retry_after = retry_after


_Logp = Annotated[float, Field(le=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Message(_Part):
    content: str | None = None


class _Token(_Part):
    token: str
    logprob: _Logp


class _Position(_Part):
    top_logprobs: list[_Token] | None = None


class _Logprobs(_Part):
    content: list[_Position] | None = None
    """Of chat completions."""
    top_logprobs: list[dict[str, _Logp] | None] | None = None
    """Of completions."""


class _Choice(_Part):
    finish_reason: str
    message: _Message | None = None
    """Of chat completions."""
    text: str | None = None
    """Of completions."""
    token_ids: list[int] | None = None
    """Of vLLM, when asked with return_token_ids."""
    logprobs: object = None


class _Body(_Part):
    choices: list[_Choice] = Field(min_length=1, max_length=1)


def read_answer(body: bytes, *, secret: str | None = None) -> Answer:
    """The answer in the body of a 200; the secret is kept out of messages.

    Raises `RefusedError` for a generation that ended other than by its end token or its limit, `TryError` for everything
    that is not one finished choice.
    """
    try:
        (choice,) = _Body.model_validate_json(body).choices
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TryError(
            f"unusable answer: {where or 'body'}: {first['msg']}; it begins {excerpt(body, secret)!r}", costly=True
        ) from None
    reason = choice.finish_reason
    if reason in MISFORMED:
        raise TryError(f"unusable answer: finish_reason {reason!r}", costly=True)
    if reason not in ("stop", "length"):
        raise RefusedError(f"finish reason {reason}", "the server ended the generation for a reason of its own")
    text = choice.message.content if choice.message is not None else choice.text
    if text is None:
        raise TryError(f"unusable answer: no text beside finish_reason {reason!r}", costly=True)
    token_ids = None if choice.token_ids is None else tuple(choice.token_ids)
    if text and token_ids == ():
        raise TryError("unusable answer: a text of no tokens", costly=True)
    return Answer(text, token_ids, reason, _first_logps(choice.logprobs))


def _first_logps(said: object) -> tuple[TokenLogp, ...] | None:
    """The likely first tokens; None where a server gives none, or something else: the text is an answer all the same."""
    try:
        found = _Logprobs.model_validate(said)
    except ValidationError:
        return None
    chat = found.content[0].top_logprobs if found.content else None
    plain = found.top_logprobs[0] if found.top_logprobs else None
    if chat:
        return tuple(TokenLogp(each.token, each.logprob) for each in chat)
    return tuple(TokenLogp(*each) for each in plain.items()) if plain else None


def read_error(status: int, headers: Mapping[str, str], said: str) -> RefusedError | TryError | None:
    """What an answer other than 200 means for its request; None when it concerns all requests.

    said: the status and the beginning of the body, for messages.
    """
    if status in REQUEST_REFUSED:
        return RefusedError("refused by the server", said)
    if 200 <= status < 300:
        return TryError(f"unusable answer: {said}", costly=True)
    if status in TRY_AGAIN or status >= 500:
        retry_after = read_retry_after(headers)
        busy = status == 429 or (status == 503 and retry_after is not None)
        return TryError(said, busy=busy, retry_after=retry_after)
    return None


def read_retry_after(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3: seconds or a date); None without a usable one."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        # "-0000" leaves the zone open; the standard says GMT.
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def excerpt(body: bytes, secret: str | None = None) -> str:
    """The beginning of a server's answer in one printable line, without the secret should the server repeat it."""
    text = body[: 16 * EXCERPT].decode("utf-8", "replace")
    if secret:
        text = text.replace(secret, "[key]")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= EXCERPT else text[:EXCERPT] + " ..."
