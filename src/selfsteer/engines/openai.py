"""The engine for any OpenAI-compatible server, or a fleet of them behind a router (vLLM, SGLang, TGI, a hosted API).

Requests are pulled in the caller's thread as room is made for them; an event loop in a thread of its own (anyio's portal)
keeps up to `concurrency` of them in flight over reused connections. What may pass is tried again, with full jitter
(https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/) and after the time that the server asks for.
When a request fails for good, a one-token request tells whose fault that is: if the server answers it, the request is
yielded as `Failed`, else `ServerError` ends the run.

Chat messages are the default, rendered by the server's chat template. With `send="token_ids"` the prompt goes out exactly
as `Request.prompt_ids` has it, which vLLM and SGLang take at /completions; a rendered prompt is never sent as a string,
because servers put a second BOS before it.

A server may apply sampling defaults of its own to what a request leaves open (vLLM takes top_k and a repetition penalty
from the model's generation_config.json): start it without them (vLLM: --generation-config vllm), or set them in `extra`.

What a server says gets into a message of ours through `excerpts.excerpt` alone, which keeps the API key out of it.

Left out on purpose: streaming of single answers, several answers a request, starting or stopping servers.
"""

import codecs
import ipaddress
import json
import logging
import math
import os
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Annotated, NamedTuple, Self
from urllib.parse import urlsplit

import anyio
import httpx2
from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selfsteer.engines.base import Completion, Failed, Request, TokenLogp
from selfsteer.engines.excerpts import excerpt, repeats
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import OpenAISection
from selfsteer.records import FinishReason
from selfsteer.runtime import stop_requested

REQUEST_REFUSED = frozenset({400, 413, 422})
"""Statuses that say: this request, and no other, is wrong (OpenAI and vLLM; too large; TGI)."""

TRY_AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another try may overcome; all from 500 on may be."""

ENDED = frozenset(
    {"stop", "stopped", "eos", "eos_token", "eos_id", "eot", "eot_id", "eog", "end", "end_id", "end_turn", "end_of_turn"}
    | {"end_of_text", "endoftext", "end_of_sequence", "stop_sequence", "stop_token", "stop_word", "stop_words", "stop_str"}
    | {"stop_criteria_met", "complete", "completed", "finish", "finished", "done", "success", "succeeded"}
)
"""How servers say that the model had finished (OpenAI; TGI; Anthropic and its proxies; Cohere, llama.cpp, TensorRT-LLM,
Bedrock and others), as `_named` writes them."""

CUT_OFF = frozenset(
    {"length", "max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens", "max_length", "max_len"}
    | {"max_output", "model_length", "length_limit", "length_capped", "length_exceeded", "token_limit", "limit"}
    | {"token_limit_reached", "context", "context_length", "context_length_exceeded", "model_context_window_exceeded"}
)
"""How they say that the limit came first (OpenAI and TGI; Anthropic, Gemini; Mistral, watsonx and others)."""

OTHER_ENDS = frozenset(
    {"content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "refusal", "spii"}
    | {"sensitive", "language", "error_toxic", "guardrail_intervened", "tool_calls", "tool_call", "tool_use"}
    | {"function_call", "malformed_function_call", "pause_turn", "repetition"}
)
"""Known ends of a generation that concern its request alone."""

MISFORMED = frozenset(
    {"abort", "aborted", "error", "network_error", "error_limit", "failed", "cancelled", "canceled", "user_cancel"}
    | {"timeout", "timed_out", "time_limit", "preempt", "insufficient_system_resource"}
)
"""Finish reasons by which servers and routers say that generation broke off."""

UNKNOWN_ENDS = 4
"""Answers with a finish reason that we don't know, and none that had finished by one that we do, after which it is taken
for the server's word for that: rather ask a person than pay for answers that are thrown away."""


class Answer(NamedTuple):
    """One sampled text, as the server reports it."""

    text: str
    token_ids: tuple[int, ...] | None
    """The server's own, the end token perhaps included (vLLM does); None when it returned none."""
    finish_reason: FinishReason
    first_logps: tuple[TokenLogp, ...] | None = None
    """The most probable first tokens; None when the server returned none."""
    thought: bool = False
    """A thought stands beside it, which the server keeps apart."""


class RefusedError(Exception):
    """This request will never be answered; others may be.

    generated: the server did generate, and so is well; what came of it can't be used. unknown_end: its finish reason, when
    that is none that we know.
    """

    def __init__(self, reason: str, detail: str, *, generated: bool = False, unknown_end: str | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.generated = generated
        self.unknown_end = unknown_end


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


class _Piece(_Part):
    type: str = "text"
    text: str | None = None
    """Of the type text; others hold a thought (Mistral)."""


class _Message(_Part):
    content: str | list[_Piece] | None = None
    reasoning: object = None
    reasoning_content: object = None
    reasoning_details: object = None
    thinking: object = None
    """The thought, where a server keeps it apart (vLLM's is either of the first two, by version; OpenRouter; Ollama)."""
    refusal: object = None
    tool_calls: object = None
    """What is said in place of a text."""

    @property
    def text(self) -> str | None:
        """What is said."""
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "".join(piece.text or "" for piece in self.content if piece.type == "text")

    @property
    def thought(self) -> bool:
        """Whether a thought stands beside it."""
        apart = (self.reasoning, self.reasoning_content, self.reasoning_details, self.thinking)
        pieces = self.content if isinstance(self.content, list) else []
        return any(apart) or any(piece.type != "text" for piece in pieces)


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
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    """Of vLLM, when asked with return_token_ids."""
    logprobs: object = None


class _Body(_Part):
    choices: list[_Choice] = Field(min_length=1, max_length=1)


def read_answer(body: bytes, *, secret: str | None = None) -> Answer:
    """The answer in the body of a 200; the secret is kept out of messages and answers.

    Raises `RefusedError` for a generation that ended other than by its end token or its limit, or within a thought;
    `TryError` for everything that is not one finished choice.
    """
    try:
        (choice,) = _Body.model_validate_json(body.removeprefix(codecs.BOM_UTF8)).choices
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TryError(
            f"unusable answer: {where or 'body'}: {first['msg']}; it begins {excerpt(body, secret)!r}", costly=True
        ) from None
    finish = _finish_reason(choice.finish_reason, secret)
    said = choice.message
    text = said.text if said is not None else choice.text
    if said is not None and not text and (said.refusal or said.tool_calls):
        what = "a refusal" if said.refusal else "a call of a tool"
        raise RefusedError(f"{what} in place of a text", "the server says that its model answered so", generated=True)
    if said is not None and not text and (said.thought or (text is None and finish == "length")):
        ended = "was all that the model said" if finish == "stop" else "was cut off by the limit of new tokens"
        raise RefusedError("no text beside a thought", f"the thought {ended}", generated=True)
    if text is None:
        raise TryError(f"unusable answer: no text beside finish_reason {finish!r}", costly=True)
    if secret and repeats(text, secret):
        raise RefusedError("the API key in the answer", "the server repeats the key that it was sent", generated=True)
    token_ids = None if choice.token_ids is None else tuple(choice.token_ids)
    if text and token_ids == ():
        raise TryError("unusable answer: a text of no tokens", costly=True)
    first_logps = _first_logps(choice.logprobs)
    if secret and first_logps and repeats("".join(token.text for token in first_logps), secret):
        first_logps = None
    return Answer(text, token_ids, finish, first_logps, thought=said is not None and said.thought)


def _finish_reason(said: str, secret: str | None) -> FinishReason:
    name = _named(said)
    if name in ENDED:
        return "stop"
    if name in CUT_OFF:
        return "length"
    shown = excerpt(said.encode("utf-8", "replace"), secret, limit=40)
    if name in MISFORMED:
        raise TryError(f"unusable answer: finish_reason {shown!r}", costly=True)
    raise RefusedError(
        f"finish reason {shown}",
        "the server ended the generation for a reason of its own",
        generated=True,
        unknown_end=None if name in OTHER_ENDS else shown,
    )


def _named(reason: str) -> str:
    """A finish reason in small letters with underscores, without the name of its list: FINISH_REASON_STOP, EndTurn."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s.:-]+", "_", reason.strip()).lower()
    return parted.removeprefix("finish_").removeprefix("reason_")


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
    if _SECONDS.fullmatch(value):
        seconds = float(value)
        return seconds if math.isfinite(seconds) else None
    try:
        date = parsedate_to_datetime(value)
        # "-0000" leaves the zone open; the standard says GMT.
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
    except (ValueError, OverflowError):  # the latter for years and zones beyond those of the calendar
        return None


_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")


log = logging.getLogger(__name__)

# They log status lines and headers as servers send them, perhaps with our key in them.
logging.getLogger("httpx2").setLevel(logging.WARNING)
logging.getLogger("httpcore2").setLevel(logging.WARNING)

COSTLY_TRIES = 3
"""Tries of a request whose answers were late, unreadable or too large: each may have cost the server a whole generation."""

LONGEST_PAUSE = 60.0
"""Seconds to which the pause between two tries grows, unless the server asks for more."""

LONGEST_WAIT = 600.0
"""Seconds: a server that asks for more (Retry-After) ends the run, which can be continued later."""

KEEPALIVE = 4.0
"""Seconds for which an unused connection is kept: less than the 5 after which uvicorn closes it, perhaps as we write."""

WARN_EVERY = 30.0
"""Seconds between two warnings about failing tries."""

_STOP_POLL = 0.2
"""Seconds after which a pause notices that a stop was requested."""

_ERROR_BYTES = 4096
"""What is read of the body of an error."""


class ServerError(OSError):
    """The server cannot be used, by any request; the message says what to do."""


class OpenAIEngine:
    """Implements `Engine` over HTTP; opens its connections on entry and closes them on exit.

    server: of one that runs already; for one that we have started, with its address and model filled in, and key.
    prompts: has the tokenizer of its answers; None leaves out the ids of those that come without. ends: the model's end
    tokens, taken off the ids that a server returns. exact: these have to come, else the run ends, and the text is theirs;
    otherwise the text is the server's, encoded where it returns no ids.
    Proxies come from the usual environment variables, but none stands between us and this machine.
    Raises ValueError when the named key is not in the environment.
    """

    def __init__(
        self,
        server: OpenAISection,
        prompts: Prompts | None,
        *,
        ends: Collection[int] = (),
        exact: bool = False,
        key: str | None = None,
    ) -> None:
        assert server.base_url is not None
        assert server.model is not None
        self.server = server
        self.model = server.model
        self.url = server.base_url.rstrip("/") + ("/chat/completions" if server.send == "messages" else "/completions")
        self._prompts, self._ends, self._exact = prompts, ends, exact
        self._key = _api_key(server.api_key_env) if key is None else key
        self._exit = ExitStack()
        self._portal: BlockingPortal | None = None
        self._under_way: set[Future[Answer | Failed | None]] = set()
        self._ending = False
        self._answered = 0
        self._answered_at_refusal = 0
        self._ended_well = 0
        self._unknown_ends = 0
        self._last_answer = 0.0
        self._failed_tries = 0
        self._said_no_ids = False
        self._last_warning = -WARN_EVERY

    def __enter__(self) -> Self:
        # An answer's size is limited as it comes: it must not unfold after that.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        concurrency, idle = self.server.concurrency, self.server.idle_seconds
        self._limiter = anyio.CapacityLimiter(concurrency)
        self._client = httpx2.AsyncClient(
            headers=headers,
            limits=httpx2.Limits(
                max_connections=concurrency, max_keepalive_connections=concurrency, keepalive_expiry=KEEPALIVE
            ),
            mounts=_past_proxies(self.url),
            # A server is silent while it generates, so the wait for its answer is limited by the total alone.
            timeout=httpx2.Timeout(connect=idle, write=idle, read=None, pool=None),
        )
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name="openai-engine"))
            stack.enter_context(self._portal.wrap_async_context_manager(self._client))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cancel()
        self._portal = None
        self._exit.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion | Failed]:
        """Answer the requests as `Engine` promises; those in flight when the iterator is closed are abandoned.

        Raises `ServerError`, after yielding all that is finished, when the server refuses us (401, 403, 404), has gone,
        or answers nonsense to everything.
        """
        if self._portal is None:
            raise ValueError("the engine is closed; use it in a with statement")
        self._ending = False
        source = iter(requests)
        done: SimpleQueue[Future[Answer | Failed | None]] = SimpleQueue()
        keys: dict[Future[Answer | Failed | None], str] = {}
        try:
            while True:
                # Twice the concurrency, so that the loop has something to start while the caller is busy.
                while len(self._under_way) < 2 * self.server.concurrency and not self._at_end():
                    request = next(source, None)
                    if request is None:
                        break
                    future = self._portal.start_task_soon(self._outcome, request)
                    keys[future] = request.key
                    self._under_way.add(future)
                    future.add_done_callback(done.put)
                if not self._under_way:
                    return
                future = done.get()
                self._under_way.discard(future)
                yield from self._finished(future.result(), keys.pop(future))
        except ServerError:
            self._cancel()
            for future, key in keys.items():
                if not future.cancelled() and future.exception() is None:
                    yield from self._finished(future.result(), key)
            raise
        finally:
            self._cancel()

    def _cancel(self) -> None:
        for future in self._under_way:
            future.cancel()
        self._under_way.clear()

    def _finished(self, outcome: Answer | Failed | None, key: str) -> Iterator[Completion | Failed]:
        if outcome is None:
            return
        if isinstance(outcome, Failed):
            yield outcome
            return
        # Here and not in the loop's thread: tokenizers must not be used by two threads at once.
        text, ids, end_id = outcome.text, outcome.token_ids or (), None
        wrong = None
        if outcome.token_ids is None:
            if self.server.send == "token_ids":
                self._note_no_ids()
            if self._prompts is not None:
                text = self._prompts.without_turn(text)
                ids = self._prompts.completion_ids(text, "length")
                wrong = None if self._prompts.special_ids.isdisjoint(ids) else "special tokens in the server's answer"
        elif self._prompts is not None:
            if outcome.finish_reason == "stop" and ids and ids[-1] in self._ends:
                ids, end_id = ids[:-1], ids[-1]
            wrong = None if self._prompts.known_ids.issuperset(ids) else "ids without a token in the server's answer"
            text = self._prompts.text(ids) if self._exact and wrong is None else text
        if wrong is not None:
            yield Failed(key=key, reason=wrong, detail=excerpt(text.encode(), self._key))
            return
        yield Completion(
            key=key,
            text=text,
            token_ids=ids,
            end_id=end_id,
            reencoded=outcome.token_ids is None,
            thought=outcome.thought,
            finish_reason=outcome.finish_reason,
            first_logps=None if outcome.first_logps is None else tuple(map(self._named, outcome.first_logps)),
        )

    def _named(self, token: TokenLogp) -> TokenLogp:
        """With its text, where the server named it by its id."""
        found = _TOKEN_ID.fullmatch(token.text)
        if found is None or self._prompts is None:
            return token
        return TokenLogp(self._prompts.piece(int(found[1])), token.logp)

    def _note_no_ids(self) -> None:
        """Once: that the server does not say what was sampled."""
        said = "returns no token ids (return_token_ids: vLLM from 0.10.2 on)"
        if self._exact:
            raise self._unusable(f"{said}, so nobody knows what was sampled. Take a newer vLLM")
        if not self._said_no_ids:
            self._said_no_ids = True
            log.warning("%s %s: its texts are encoded here, perhaps as other tokens than were sampled", self.url, said)

    async def _outcome(self, request: Request) -> Answer | Failed | None:
        """The answer to one request, why there is none, or None when the end came first."""
        async with self._limiter:
            try:
                return await self._tried(request)
            except ServerError:
                self._ending = True
                raise

    async def _tried(self, request: Request) -> Answer | Failed | None:
        failures = costly = 0
        in_vain = 0  # tries in a row during which nobody was answered
        answered, began = self._answered, anyio.current_time()
        while not self._at_end():
            try:
                answer = await self._try(self._body(request))
            except RefusedError as refusal:
                if refusal.generated:
                    self._note_unusable(refusal)
                    return Failed(key=request.key, reason=refusal.reason, detail=refusal.detail)
                # Two in a row, or the very first: perhaps it is our settings that are refused.
                in_a_row, self._answered_at_refusal = self._answered == self._answered_at_refusal, self._answered
                if in_a_row:
                    await self._check_server(request, refusal)
                return Failed(key=request.key, reason=refusal.reason, detail=refusal.detail)
            except TryError as error:
                failures += 1
                costly += error.costly
                in_vain = in_vain + 1 if answered == self._answered else 0
                answered = self._answered
                self._warn(error)
                if costly >= COSTLY_TRIES or (failures >= self.server.tries and not error.busy):
                    await self._check_server(request, error)
                    return Failed(key=request.key, reason="no usable answer", detail=f"{failures} tries; the last: {error}")
                # One that is told to wait is not given up while others get through: its turn will come.
                if in_vain >= self.server.tries and (silence := self._silence(began)) > self.server.total_seconds:
                    raise self._unusable(f"asks to wait, and answered nobody for {silence:.0f} s ({error})") from None
                await self._pause(failures, error.retry_after)
            else:
                self._note_answer()
                self._ended_well += answer.finish_reason == "stop"
                return answer
        return None

    def _at_end(self) -> bool:
        return self._ending or stop_requested()

    def _note_answer(self) -> None:
        self._answered += 1
        self._last_answer = anyio.current_time()

    def _note_unusable(self, refusal: RefusedError) -> None:
        """Raise `ServerError` when it is the server's way to end all its answers as we can't read."""
        self._note_answer()
        self._unknown_ends += refusal.unknown_end is not None
        if refusal.unknown_end is not None and self._unknown_ends >= UNKNOWN_ENDS and not self._ended_well:
            raise self._unusable(
                f"ends its answers with the finish reason {refusal.unknown_end!r}, which is none that says finished"
                f" ({', '.join(sorted(ENDED))}) or cut off ({', '.join(sorted(CUT_OFF))}): put a proxy before it that says"
                " one of them"
            )

    def _silence(self, began: float) -> float:
        """Seconds since the server last answered any request, or since the one began that waits."""
        return anyio.current_time() - max(began, self._last_answer)

    async def _pause(self, failures: int, retry_after: float | None) -> None:
        asked = retry_after or 0.0
        if asked > LONGEST_WAIT:
            raise self._unusable(f"asks to come back in {asked:.0f} s (Retry-After)")
        limit = min(LONGEST_PAUSE, self.server.first_pause * 2.0 ** min(failures - 1, 60))
        end = anyio.current_time() + asked + random.uniform(0, limit)
        while (left := end - anyio.current_time()) > 0 and not self._at_end():
            await anyio.sleep(min(left, _STOP_POLL))

    async def _check_server(self, request: Request, cause: Exception) -> None:
        """Raise `ServerError` unless a harmless prompt has one token generated, under the request's own settings."""
        probe = replace(
            request,
            messages=({"role": "user", "content": "Hello"},),
            prompt_ids=request.prompt_ids[:1],
            sampling=replace(request.sampling, max_new_tokens=1),
        )
        try:
            await self._try(self._body(probe))
        except (RefusedError, TryError) as error:
            # One that thinks first has no text yet, and is well all the same.
            if not (isinstance(error, RefusedError) and error.generated):
                raise self._unusable(f"failed ({cause}), and so did a one-token request ({error})") from None
        self._note_answer()

    async def _try(self, body: bytes) -> Answer:
        """One exchange. Raises RefusedError, TryError, ServerError."""
        total = self.server.total_seconds
        try:
            with anyio.fail_after(total):
                async with self._client.stream("POST", self.url, content=body) as response:
                    if response.status_code != 200:
                        said = f"HTTP {response.status_code} {excerpt(await self._beginning(response), self._key)}".strip()
                        error = read_error(response.status_code, response.headers, said)
                        raise error or self._refuses_all(response.status_code, said)
                    content = await self._whole(response)
        except TimeoutError:
            raise TryError(f"no complete answer in {total:g} s (total_seconds)", costly=True) from None
        except httpx2.RequestError as error:
            # These repeat what they can't read: a status line, a header, the size of a chunk.
            raise TryError(f"{type(error).__name__}: {excerpt(str(error).encode(), self._key)}") from None
        return read_answer(content, secret=self._key)

    def _body(self, request: Request) -> bytes:
        sampling, top = request.sampling, request.top_logps or None
        body: dict[str, object] = {
            "model": request.adapter or self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "n": 1,
            "seed": request.seed,
            "stream": False,
        }
        if self.server.send == "messages":
            body |= {"messages": request.messages, "logprobs": top and True, "top_logprobs": top}
            body |= {"chat_template_kwargs": (self._prompts and self._prompts.arguments) or None}
        else:
            body |= {"prompt": request.prompt_ids, "return_token_ids": True, "logprobs": top}
            # By their texts, which key the answer, several tokens would be one (vLLM).
            body |= {"return_tokens_as_token_ids": top and self._prompts and True}
        body |= self.server.extra
        return json.dumps({key: value for key, value in body.items() if value is not None}).encode()

    async def _whole(self, response: httpx2.Response) -> bytes:
        """The body within the limits of size and silence."""
        body = bytearray()
        chunks = response.aiter_bytes()
        while True:
            try:
                with anyio.fail_after(self.server.idle_seconds):
                    body += await anext(chunks)
            except StopAsyncIteration:
                return bytes(body)
            except TimeoutError:
                raise TryError(
                    f"silent for {self.server.idle_seconds:g} s amid its answer (idle_seconds)", costly=True
                ) from None
            if len(body) > self.server.max_answer_bytes:
                raise TryError(
                    f"an answer of more than {self.server.max_answer_bytes} bytes (max_answer_bytes)", costly=True
                )

    async def _beginning(self, response: httpx2.Response) -> bytes:
        """What an error says for itself, as far as it comes; the status counts even when that breaks off."""
        body = bytearray()
        with anyio.move_on_after(self.server.idle_seconds):
            try:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _ERROR_BYTES:
                        break
            except httpx2.RequestError as error:
                log.debug("%s: body of HTTP %d: %s", self.url, response.status_code, excerpt(str(error).encode(), self._key))
        return bytes(body)

    def _refuses_all(self, status: int, said: str) -> ServerError:
        name = self.server.api_key_env
        if status in (401, 403):
            way_out = f"Put a valid key into the environment variable {name}" if name else "Name its variable in api_key_env"
        elif 300 <= status < 400:
            way_out = "Redirects are not followed: set base_url to where it leads"
        else:
            way_out = f"Check base_url (it mostly ends in /v1) and the model's name there, {self.model!r}"
        return self._unusable(f"refuses all requests ({said}). {way_out}")

    def _unusable(self, what: str) -> ServerError:
        return ServerError(
            f"{self.url} {what}. {self._answered} requests were answered before; what is finished is kept. When this "
            "is mended, the same command continues."
        )

    def _warn(self, error: TryError) -> None:
        self._failed_tries += 1
        now = anyio.current_time()
        if now - self._last_warning >= WARN_EVERY:
            self._last_warning = now
            log.warning("%s: trying again (%d failed tries so far); the last: %s", self.url, self._failed_tries, error)


_TOKEN_ID = re.compile(r"token_id:([0-9]{1,9})")
"""vLLM's name of a token."""


def _past_proxies(url: str) -> dict[str, httpx2.AsyncHTTPTransport | None]:
    """A way around the proxies of the environment to a server on this machine, which none of them can reach."""
    host = urlsplit(url).hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost" or host.endswith(".localhost")
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None} if here else {}


def _api_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    # Checked here, because the HTTP library would repeat a malformed header in its error.
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"the environment variable {name}, which api_key_env names, holds no usable key; set it and run again"
        )
    return key
