"""The openai engine against a server that misbehaves in every way of the issue; see misbehaving.py."""

import base64
import codecs
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from misbehaving import Call, MisbehavingServer, Reply, chat, echo, error

from selfsteer import runtime
from selfsteer.engines import openai
from selfsteer.engines.base import Completion, Failed, Request, Sampling
from selfsteer.engines.excerpts import excerpt, reveals
from selfsteer.engines.openai import (
    Answer,
    OpenAIEngine,
    RefusedError,
    ServerError,
    TryError,
    read_answer,
    read_error,
    read_retry_after,
)
from selfsteer.recipe.engines import OpenAISection

SAMPLING = Sampling(temperature=0.7, top_p=0.8, max_new_tokens=64)
SECRET = "sk-4f8a1c-never-shown"
PROBE = "Hello"
"""What a one-token request of the engine asks."""


@dataclass(frozen=True)
class Letters:
    """What the engine asks of `Prompts`, of a tokenizer of letters, in which the section sign is a special token."""

    special_ids: frozenset[int] = frozenset({ord("\u00a7")})
    known_ids: frozenset[int] = frozenset(range(2**16))
    arguments: dict[str, object] = field(default_factory=dict)

    def completion_ids(self, text: str, finish: str) -> tuple[int, ...]:
        assert finish == "length"
        return tuple(map(ord, text))

    def without_turn(self, text: str) -> str:
        return text

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def piece(self, token_id: int) -> str:
        return chr(token_id % 256)


def requests(*prompts: str) -> list[Request]:
    return [
        Request(
            key=f"key of {prompt}",
            messages=({"role": "user", "content": prompt},),
            prompt_ids=(1, 10 + i),
            sampling=SAMPLING,
            seed=100 + i,
        )
        for i, prompt in enumerate(prompts)
    ]


def many(count: int) -> list[Request]:
    return requests(*(f"p{i}" for i in range(count)))


def engine_for(server: MisbehavingServer, **settings: Any) -> OpenAIEngine:
    quick = {"concurrency": 4, "tries": 3, "first_pause": 0.01, "total_seconds": 5.0, "idle_seconds": 2.0}
    section = OpenAISection(kind="openai", model="m", **({"base_url": server.base_url} | quick | settings))
    return OpenAIEngine(section, Letters(), ends={2})


def answered(server: MisbehavingServer, wanted: list[Request], **settings: Any) -> dict[str, Completion | Failed]:
    """What the engine makes of the requests, by prompt; each key must come back once."""
    with engine_for(server, **settings) as engine:
        outcomes = list(engine.generate(wanted))
    assert len({outcome.key for outcome in outcomes}) == len(outcomes)
    return {outcome.key.removeprefix("key of "): outcome for outcome in outcomes}


def until_error(engine: OpenAIEngine, wanted: list[Request]) -> tuple[list[Completion | Failed], ServerError]:
    """What comes before the engine gives up, and why it does."""
    outcomes: list[Completion | Failed] = []
    try:
        for outcome in engine.generate(wanted):
            outcomes.append(outcome)  # extend would keep nothing
    except ServerError as given_up:
        return outcomes, given_up
    raise AssertionError("the engine came to an end")


def texts(outcomes: dict[str, Completion | Failed]) -> dict[str, str]:
    return {prompt: outcome.text for prompt, outcome in outcomes.items() if isinstance(outcome, Completion)}


def failed(outcomes: dict[str, Completion | Failed]) -> dict[str, str]:
    return {prompt: outcome.reason for prompt, outcome in outcomes.items() if isinstance(outcome, Failed)}


def late(seconds: float) -> Callable[[Call], Reply]:
    """A script: the echo, after so many seconds."""
    return lambda call: Reply(body=echo(call).body, delay=seconds)


def misbehave_for(prompt: str, reply: Reply, *, times: int = 10**6) -> Callable[[Call], Reply]:
    """A script: this reply to the first calls with this prompt, the echo to all others."""
    return lambda call: reply if call.prompt == prompt and call.nth <= times else echo(call)


# ---- what works -------------------------------------------------------------------------------------------------------


def test_chat_request_and_completion():
    with MisbehavingServer(echo) as server:
        outcomes = answered(server, requests("one"))
    answer = Completion(key="key of one", text="ONE", token_ids=(79, 78, 69), finish_reason="stop", reencoded=True)
    assert outcomes == {"one": answer}
    (call,) = server.calls
    assert call.path == "/v1/chat/completions"
    assert "authorization" not in call.headers
    assert call.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "one"}],
        "temperature": 0.7,
        "top_p": 0.8,
        "max_tokens": 64,
        "n": 1,
        "seed": 100,
        "stream": False,
    }


def test_token_ids_request_keeps_the_servers_ids_without_the_end_token():
    """Sent: the rendered prompt exactly. Received: 7 8 2, of which 2 is the end token; at the limit 2 is just a token."""

    def script(call: Call) -> Reply:
        finish = "stop" if call.body["prompt"] == [1, 10] else "length"
        choice = {"index": 0, "text": "hi", "finish_reason": finish, "token_ids": [7, 8, 2]}
        return Reply(body=json.dumps({"choices": [choice]}).encode())

    with MisbehavingServer(script) as server:
        outcomes = answered(server, requests("a", "b"), send="token_ids")
    assert {k: (c.token_ids, c.end_id, c.reencoded) for k, c in outcomes.items() if isinstance(c, Completion)} == {
        "a": ((7, 8), 2, False),
        "b": ((7, 8, 2), None, False),
    }
    assert {call.path for call in server.calls} == {"/v1/completions"}
    assert all(call.body["return_token_ids"] is True and "messages" not in call.body for call in server.calls)


def test_extra_fields_are_added_and_null_takes_one_out():
    with MisbehavingServer(echo) as server:
        answered(server, requests("a"), extra={"top_k": 20, "seed": None})
    assert server.calls[0].body["top_k"] == 20
    assert "seed" not in server.calls[0].body


def test_forty_requests_four_at_a_time_over_four_connections():
    """Answers of unequal delay come in another order; no fifth request is ever in flight, no fifth connection opened."""
    together = threading.Barrier(4)

    def script(call: Call) -> Reply:
        if call.number <= 4:
            together.wait(30)  # however busy the machine is
        return echo(call) if call.number % 7 else late(0.05)(call)

    with MisbehavingServer(script) as server:
        outcomes = answered(server, many(40), concurrency=4)
    assert texts(outcomes) == {f"p{i}": f"P{i}" for i in range(40)}
    assert list(outcomes) != [f"p{i}" for i in range(40)]
    assert len(server.calls) == 40
    assert server.most_in_flight == 4
    assert server.connections == 4


def test_requests_are_pulled_as_room_is_made():
    """Twice the concurrency at first, then one for each that is taken."""
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        for request in many(30):
            pulled += 1
            yield request

    with MisbehavingServer(echo) as server, engine_for(server, concurrency=3) as engine:
        outcomes = engine.generate(source())
        assert pulled == 0
        next(outcomes)
        assert pulled == 6
        next(outcomes)
        assert pulled == 7
        assert len(list(outcomes)) == 28


def test_second_generate_reuses_the_connections():
    with MisbehavingServer(echo) as server:
        with engine_for(server, concurrency=1) as engine:
            assert len(list(engine.generate(many(3)))) == 3
            assert len(list(engine.generate(many(3)))) == 3
            assert list(engine.generate([])) == []
        assert server.connections == 1
    with pytest.raises(ValueError, match="with statement"):
        next(engine.generate(many(1)))


# ---- what passes when tried again -------------------------------------------------------------------------------------

PASSING = {
    "429": error(429),
    "500": error(500),
    "502": Reply(status=502, body=b"<html>bad gateway</html>"),
    "503": error(503),
    "504": error(504),
    "reset before the answer": Reply(ending="nothing"),
    "reset amid the answer": Reply(body=b'{"choices": [', ending="reset"),
    "html": Reply(body=b"<html>Welcome to the hotel</html>", headers={"content-type": "text/html"}),
    "empty": Reply(body=b""),
    "truncated json": Reply(body=b'{"choices": [{"message": {"content": "On'),
    "{}": Reply(body=b"{}"),
    "error in a 200": Reply(body=b'{"error": {"message": "upstream"}}'),
    "no choices": chat("ONE", choices=0),
    "wrong n": chat("ONE", choices=2),
    "no finish reason": chat("ONE", finish=None),
    "null content": chat(None),
    "aborted": chat("ON", finish="abort"),
    "accepted, later": Reply(status=202, body=b"{}"),
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING.keys())
def test_tried_again_until_it_passes(reply: Reply):
    """Twice wrong, then right: three calls and the right text."""
    with MisbehavingServer(misbehave_for("one", reply, times=2)) as server:
        outcomes = answered(server, requests("one"))
    assert texts(outcomes) == {"one": "ONE"}
    assert len(server.calls) == 3


LIMITED = {
    "late": (Reply(body=chat("ONE").body, delay=0.4), {"total_seconds": 0.2}),
    "silent amid the answer": (Reply(body=b'{"choices": [', ending="silent"), {"idle_seconds": 0.2}),
    "never ending": (Reply(body=b"{", ending="endless"), {"total_seconds": 0.3}),
    "too large": (Reply(body=chat("x" * 2000).body), {"max_answer_bytes": 1000}),
    "never ending and too large": (Reply(body=b"{", ending="endless"), {"max_answer_bytes": 1000}),
}


@pytest.mark.parametrize(("reply", "limit"), LIMITED.values(), ids=LIMITED.keys())
def test_limits_end_a_try(reply: Reply, limit: dict[str, float]):
    """The limit itself ends the first try; the second is answered well."""
    began = time.monotonic()
    with MisbehavingServer(misbehave_for("one", reply, times=1)) as server:
        outcomes = answered(server, requests("one"), **limit)
        assert time.monotonic() - began < 1.5
    assert texts(outcomes) == {"one": "ONE"}
    assert len(server.calls) == 2


def test_a_slow_answer_within_the_limits_is_waited_for():
    """0.4 s of silence before an answer are generation, not idleness, though idle_seconds is 0.1."""
    with MisbehavingServer(late(0.4)) as server:
        assert texts(answered(server, requests("one"), idle_seconds=0.1)) == {"one": "ONE"}
    assert len(server.calls) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(status: int):
    """The pause of its own would be at most 0.01 s."""
    with MisbehavingServer(misbehave_for("one", error(status, Retry_After="0.3"), times=1)) as server:
        answered(server, requests("one"))
    first, second = server.calls
    assert 0.3 <= second.at - first.at < 0.8


def test_a_far_retry_after_ends_the_run():
    with (
        MisbehavingServer(lambda _: error(429, Retry_After="86400")) as server,
        pytest.raises(ServerError, match=r"come back in 86400 s .* same command continues"),
    ):
        answered(server, requests("one"))
    assert len(server.calls) == 1


def test_storm_of_429_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    """One call in five is let through: with only 3 tries a request, all 40 are answered, because somebody always is."""
    monkeypatch.setattr(openai, "LONGEST_PAUSE", 0.02)
    with MisbehavingServer(lambda call: echo(call) if call.number % 5 == 0 else error(429)) as server:
        outcomes = answered(server, many(40), concurrency=8, first_pause=0.002)
    assert texts(outcomes) == {f"p{i}": f"P{i}" for i in range(40)}
    assert len(server.calls) == 200  # the 200th call is the 40th that is let through
    assert server.most_in_flight <= 8


def test_one_that_waits_is_not_given_up_while_others_get_through(monkeypatch: pytest.MonkeyPatch):
    """p0 is told to wait six times, twice its tries; whatever the clock says, others are answered meanwhile."""
    monkeypatch.setattr(OpenAIEngine, "_silence", lambda *_: 99.0)
    waits = misbehave_for("p0", error(429, Retry_After="0.05"), times=6)
    with MisbehavingServer(lambda call: waits(call) if call.prompt == "p0" else late(0.005)(call)) as server:
        outcomes = answered(server, many(120), concurrency=2)
    assert len(texts(outcomes)) == 120
    assert server.count("p0") == 7


def test_429_for_everybody_ends_after_the_total_limit():
    """At least `tries` calls, and none answered for total_seconds."""
    began = time.monotonic()
    with (
        MisbehavingServer(lambda _: error(429, "quota")) as server,
        pytest.raises(ServerError, match=r"asks to wait, and answered nobody for .*quota"),
    ):
        answered(server, requests("one"), total_seconds=0.4)
    assert 0.4 < time.monotonic() - began < 3
    assert len(server.calls) > 3


def test_the_time_when_nobody_asked_is_no_silence(monkeypatch: pytest.MonkeyPatch):
    with MisbehavingServer(misbehave_for("one", error(429), times=5)) as server, engine_for(server) as engine:
        monkeypatch.setattr(engine, "_last_answer", -math.inf)
        assert [outcome.key for outcome in engine.generate(requests("one"))] == ["key of one"]


def test_a_thousand_failures_overflow_nothing(monkeypatch: pytest.MonkeyPatch):
    """2.0 ** 1024 is no float."""
    monkeypatch.setattr(openai, "LONGEST_PAUSE", 0.0)
    with MisbehavingServer(misbehave_for("one", error(503), times=1030)) as server:
        assert texts(answered(server, requests("one"), tries=2000)) == {"one": "ONE"}


# ---- what one request must bear alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_fails_alone(status: int):
    """One call for it, none for the check: the server had answered others."""
    with MisbehavingServer(misbehave_for("p5", error(status, "too long"))) as server:
        outcomes = answered(server, many(10), concurrency=1)
    assert failed(outcomes) == {"p5": "refused by the server"}
    assert len(texts(outcomes)) == 9
    assert len(server.calls) == 10
    row = outcomes["p5"]
    assert isinstance(row, Failed)
    assert row.detail == f'HTTP {status} {{"error": {{"message": "too long"}}}}'


def test_refusals_in_a_row_are_checked():
    """The first of all, and the second after an answer: a one-token request with the same settings tells who is at fault."""
    with MisbehavingServer(lambda call: echo(call) if call.prompt == PROBE else error(400)) as server:
        outcomes = answered(server, many(3), concurrency=1, extra={"top_k": 5})
    assert failed(outcomes) == {f"p{i}": "refused by the server" for i in range(3)}
    assert [call.prompt for call in server.calls] == ["p0", PROBE, "p1", "p2", PROBE]
    probe = server.calls[1].body
    assert (probe["max_tokens"], probe["top_k"], probe["temperature"]) == (1, 5, 0.7)


def test_refusing_everything_from_some_moment_on_ends_the_run():
    """p5 may be at fault itself; that p6 is refused too is checked."""
    script: Callable[[Call], Reply] = lambda call: echo(call) if call.number <= 5 else error(400)  # noqa: E731
    with MisbehavingServer(script) as server, engine_for(server, concurrency=1) as engine:
        outcomes, _ = until_error(engine, many(50))
    assert [outcome.key for outcome in outcomes] == [f"key of p{i}" for i in range(6)]
    assert [call.prompt for call in server.calls] == ["p0", "p1", "p2", "p3", "p4", "p5", "p6", PROBE]


def test_settings_that_the_server_refuses_end_the_run():
    """Otherwise every row of a long run would be dropped."""
    with (
        MisbehavingServer(lambda _: error(400, "unknown field: seed")) as server,
        pytest.raises(ServerError, match=r"unknown field: seed.*so did a one-token request"),
    ):
        answered(server, many(50), concurrency=1)
    assert len(server.calls) == 2


def test_a_request_that_breaks_the_server_fails_alone():
    """500 for one request whenever it is tried: 3 tries, then a one-token request shows that the server is well."""
    with MisbehavingServer(misbehave_for("p2", error(500, "CUDA error"))) as server:
        outcomes = answered(server, many(6))
    assert failed(outcomes) == {"p2": "no usable answer"}
    assert (server.count("p2"), server.count(PROBE), len(server.calls)) == (3, 1, 9)


def test_unreadable_answers_are_paid_for_three_times_at_most():
    with MisbehavingServer(misbehave_for("p0", chat(None))) as server:
        outcomes = answered(server, many(2), tries=9)
    assert failed(outcomes) == {"p0": "no usable answer"}
    assert server.count("p0") == 3


@pytest.mark.parametrize("finish", ["content_filter", "tool_calls"])
def test_other_finish_reasons_fail_at_once(finish: str):
    with MisbehavingServer(misbehave_for("p1", chat(None, finish=finish))) as server:
        outcomes = answered(server, many(3), concurrency=1)
    assert failed(outcomes) == {"p1": f"finish reason {finish}"}
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *((name, "stop") for name in ("eos_token", "stop_sequence", "end_turn", "STOP", "COMPLETE", "FINISH", "endoftext")),
        *((name, "stop") for name in ("FINISH_REASON_STOP", "REASON_STOP", "EndTurn", "stop-sequence", " stop\n")),
        *((name, "length") for name in ("max_tokens", "MAX_TOKENS", "model_length", "LENGTH_CAPPED", "max tokens")),
        *(
            (name, "length")
            for name in ("FINISH_REASON_MAX_TOKENS", "REASON_MAX_LEN", "maxTokens", "context_length_exceeded")
        ),
    ],
)
def test_finish_reasons_by_other_names(said: str, meant: str):
    assert read_answer(chat("yes", finish=said).body).finish_reason == meant


def test_a_finish_reason_that_nobody_knows_ends_the_run_after_four():
    """All that is finished bears it, so it is the server's word for that; the 46 others are never paid for."""
    with (
        MisbehavingServer(lambda call: chat("x", finish="length" if call.number % 2 else "fini")) as server,
        pytest.raises(ServerError, match=r"finish reason 'fini', which is none that says finished \(.*eos_token"),
    ):
        answered(server, many(50), concurrency=1)
    assert len(server.calls) == 8


def test_a_finish_reason_that_nobody_knows_costs_its_row_where_others_end_well():
    script: Callable[[Call], Reply] = lambda call: chat("x", finish="stop" if call.number % 2 else "fini")  # noqa: E731
    with MisbehavingServer(script) as server:
        outcomes = answered(server, many(20), concurrency=1)
    assert failed(outcomes) == {f"p{i}": "finish reason fini" for i in range(1, 20, 2)}
    assert len(server.calls) == 20


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "fox."}]}, "A fox."),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}, {"text": "A fox."}]}, "A fox."),
        ({"content": []}, ""),
        ({"content": "A fox.", "refusal": None, "tool_calls": []}, "A fox."),
    ],
)
def test_content_in_parts_is_joined(message: dict[str, Any], text: str):
    """So do servers of models that think (Mistral's)."""
    assert read_answer(chat("", message=message).body).text == text
    assert read_answer(b"\xef\xbb\xbf" + chat("", message=message).body).text == text, "behind a byte order mark"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": None, "refusal": "I can't."}, "a refusal in place of a text"),
        ({"content": "", "refusal": "I can't."}, "a refusal in place of a text"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "a call of a tool in place of a text"),
        ({"content": None, "reasoning_details": [{"text": "Hm"}]}, "no text beside a thought"),
        ({"content": "", "thinking": "Hm"}, "no text beside a thought"),
        ({"content": [{"type": "thinking", "thinking": "Hm"}]}, "no text beside a thought"),
    ],
)
def test_what_a_server_says_in_place_of_a_text_costs_its_row(message: dict[str, Any], reason: str):
    """Once: asking again would bring the same."""
    with MisbehavingServer(lambda call: chat("", message=message) if call.prompt == "p1" else echo(call)) as server:
        outcomes = answered(server, many(4), concurrency=1)
    assert failed(outcomes) == {"p1": reason}
    assert len(server.calls) == 4


@pytest.mark.parametrize(
    "thought",
    [
        {"message": {"content": None, "reasoning_content": "Hm"}, "finish": "length"},
        {"message": {"content": "", "reasoning": "Hm"}, "finish": "length"},
        {"message": {"content": None, "reasoning": "Hm"}, "finish": "stop"},
        {"message": {"content": None}, "finish": "max_tokens"},
    ],
)
def test_a_thought_without_a_text_costs_its_row(thought: dict[str, Any]):
    """One call for each such row: asking again brings the same, and the server is well."""
    body = json.dumps({"choices": [{"finish_reason": thought["finish"], "message": thought["message"]}]}).encode()
    with MisbehavingServer(lambda call: Reply(body=body) if call.prompt in ("p0", "p1", "p5") else echo(call)) as server:
        outcomes = answered(server, many(8), concurrency=1)
    assert failed(outcomes) == dict.fromkeys(("p0", "p1", "p5"), "no text beside a thought")
    assert len(server.calls) == 8


def test_a_server_that_thinks_first_is_well():
    """p1 always fails. The probe's one token is of a thought, and shows that the server generates."""

    def script(call: Call) -> Reply:
        if call.prompt == PROBE:
            return chat(None, finish="length")
        return error(400) if call.prompt == "p0" else echo(call)

    with MisbehavingServer(script) as server:
        outcomes = answered(server, many(4), concurrency=1)
    assert failed(outcomes) == {"p0": "refused by the server"}
    assert server.count(PROBE) == 1


def test_an_answer_that_spells_special_tokens_is_no_answer():
    """Encoded here, its text would be other tokens than were sampled. Where the ids came along, they count."""
    with MisbehavingServer(lambda call: chat("\u00a7 end" if call.prompt == "p1" else "fine")) as server:
        outcomes = answered(server, many(3))
    assert failed(outcomes) == {"p1": "special tokens in the server's answer"}
    choice = {"text": "\u00a7", "finish_reason": "stop", "token_ids": [7, 2]}
    with MisbehavingServer(lambda _: Reply(body=json.dumps({"choices": [choice]}).encode())) as server:
        outcomes = answered(server, requests("a"), send="token_ids")
    assert texts(outcomes) == {"a": "\u00a7"}


def test_an_empty_answer_that_ended_is_an_answer():
    """The model said its end token first: what becomes of that is a filter's to say."""
    with MisbehavingServer(lambda _: chat("")) as server:
        assert texts(answered(server, requests("one"))) == {"one": ""}


# ---- what ends the run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "way_out"),
    [
        (401, "environment variable TEST_KEY"),
        (403, "environment variable TEST_KEY"),
        (404, "Check base_url .* 'm'"),
        (405, "Check base_url"),
        (302, "Redirects are not followed"),
    ],
)
def test_refusals_of_everything_stop_at_once(status: int, way_out: str, monkeypatch: pytest.MonkeyPatch):
    """No second try, and no further request of the other 49."""
    monkeypatch.setenv("TEST_KEY", SECRET)
    with (
        MisbehavingServer(lambda _: error(status)) as server,
        pytest.raises(ServerError, match=rf"{server.base_url}/chat/completions refuses all .*HTTP {status}.*{way_out}"),
    ):
        answered(server, many(50), concurrency=1, api_key_env="TEST_KEY")
    assert len(server.calls) == 1


def test_nothing_is_sent_after_a_refusal_though_the_caller_is_busy():
    """The first request is refused while the second is still being made."""

    def source() -> Iterator[Request]:
        for request in many(20):
            yield request
            time.sleep(0.3)

    with MisbehavingServer(lambda _: error(401)) as server:
        with engine_for(server, concurrency=1) as engine, pytest.raises(ServerError, match="HTTP 401"):
            next(engine.generate(source()))
        assert len(server.calls) == 1


def test_no_key_where_one_is_needed():
    with MisbehavingServer(lambda _: error(401)) as server, pytest.raises(ServerError, match="in api_key_env"):
        answered(server, many(1))


def test_a_key_that_expires_keeps_what_is_finished():
    script: Callable[[Call], Reply] = lambda call: echo(call) if call.number <= 5 else error(401)  # noqa: E731
    with MisbehavingServer(script) as server, engine_for(server, concurrency=1) as engine:
        outcomes, given_up = until_error(engine, many(20))
    assert [outcome.key for outcome in outcomes] == [f"key of p{i}" for i in range(5)]
    assert "5 requests were answered before" in str(given_up)
    assert len(server.calls) == 6


def test_a_server_that_is_dead_from_the_start():
    with MisbehavingServer(echo) as server:
        server.die()
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"ConnectError.*0 requests were answered.*same command continues"):
            answered(server, many(100))
    assert time.monotonic() - began < 5
    assert server.calls == []


def test_a_server_that_dies_halfway():
    """What it answered is yielded; then the error, after 3 refused tries."""

    def script(call: Call) -> Reply:
        if call.number == 20:
            server.die()
            return Reply(ending="nothing")
        return echo(call)

    with MisbehavingServer(script) as server, engine_for(server) as engine:
        outcomes, given_up = until_error(engine, many(100))
        calls = len(server.calls)
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    # Of the 19 answers before its death, up to 3 others were on their way.
    assert 16 <= len({outcome.key for outcome in outcomes}) == len(outcomes) < calls
    assert f"{len(outcomes)} requests were answered before" in str(given_up)
    assert "same command continues" in str(given_up)


def test_html_for_everybody_ends_the_run():
    with (
        MisbehavingServer(lambda _: Reply(body=b"<html>Log in to the network</html>")) as server,
        pytest.raises(ServerError, match="Log in to the network"),
    ):
        answered(server, many(10), concurrency=1)
    assert len(server.calls) == 4  # three tries and the check


# ---- stopping ---------------------------------------------------------------------------------------------------------


def test_stop_drains_what_is_in_flight(monkeypatch: pytest.MonkeyPatch):
    """Four in flight when the stop comes: those are answered, the 46 others never sent."""

    def script(call: Call) -> Reply:
        if call.number == 4:
            monkeypatch.setattr(runtime, "_received", 15)
        return late(0.3)(call)

    with MisbehavingServer(script) as server:
        outcomes = answered(server, many(50), concurrency=4)
    assert texts(outcomes) == {f"p{i}": f"P{i}" for i in range(4)}
    assert len(server.calls) == 4


def test_stop_ends_a_long_pause(monkeypatch: pytest.MonkeyPatch):
    def script(_: Call) -> Reply:
        monkeypatch.setattr(runtime, "_received", 15)
        return error(429, Retry_After="60")

    began = time.monotonic()
    with MisbehavingServer(script) as server:
        assert answered(server, many(3), concurrency=1) == {}
    assert time.monotonic() - began < 2
    assert len(server.calls) == 1


def test_closing_the_iterator_abandons_what_is_in_flight():
    began = time.monotonic()
    with MisbehavingServer(lambda call: echo(call) if call.prompt == "p0" else late(3)(call)) as server:
        with engine_for(server) as engine:
            for outcome in engine.generate(many(50)):
                assert outcome.key == "key of p0"
                break
        assert time.monotonic() - began < 2
        assert len(server.calls) <= 8


# ---- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """The server repeats the key in every error; all loggers are on."""
    monkeypatch.setenv("TEST_KEY", SECRET)
    caplog.set_level(logging.DEBUG)

    def script(call: Call) -> Reply:
        assert call.headers["authorization"] == f"Bearer {SECRET}"
        if call.prompt == "bad":
            return error(400, f"bad request of {SECRET}")
        if call.prompt == "html":
            return Reply(body=f"<p>{SECRET}</p>".encode())
        return echo(call) if call.number < 20 else error(401, f"Incorrect API key provided: {SECRET}")

    with MisbehavingServer(script) as server, engine_for(server, api_key_env="TEST_KEY", concurrency=1) as engine:
        outcomes, given_up = until_error(engine, requests("bad", "html", *(f"p{i}" for i in range(30))))
        shown = [repr(engine), repr(engine.server), repr(outcomes), repr(given_up), caplog.text]
        shown += [str(vars(record)) for record in caplog.records]
    assert "[key]" in str(given_up)
    assert repr(outcomes).count("[key]") == 2
    assert SECRET not in "\n".join(shown)


def spellings(secret: str) -> dict[str, str]:
    """The secret as a server or a proxy may write it."""
    hexed = secret.encode().hex()
    return {
        "plain": secret,
        "spaces": " ".join(secret),
        "lines": "\r\n\t".join(secret),
        "nulls": "\0".join(secret),
        "twenty of its characters": secret[:20],
        "its end": secret[-9:],
        "percent": "".join(f"%{ord(c):02x}" for c in secret),
        "percent twice": "".join(f"%25{ord(c):02x}" for c in secret),
        "json": "".join(f"\\u{ord(c):04x}" for c in secret),
        "bytes": "".join(f"\\x{ord(c):02x}" for c in secret),
        "html": "".join(f"&#{ord(c)};" for c in secret),
        "base64": base64.b64encode(secret.encode()).decode(),
        "base64 of the header": base64.b64encode(f"Bearer {secret}".encode()).decode(),
        "base64 of user and key": base64.urlsafe_b64encode(f"me:{secret}".encode()).decode(),
        "hexadecimal": hexed,
        "hexadecimal pairs": " ".join(hexed[i : i + 2] for i in range(0, len(hexed), 2)),
        "capitals": secret.upper(),
        "wide letters": "".join(chr(ord(c) + 0xFEE0) for c in secret),
        "backwards": secret[::-1],
        "base32": base64.b32encode(secret.encode()).decode(),
        "base32 of the header": base64.b32encode(f"Bearer {secret}".encode()).decode(),
        "rot13": codecs.encode(secret, "rot13"),
        "numbers": ", ".join(map(str, secret.encode())),
        "numbers of three digits": "".join(f"{byte:03}" for byte in secret.encode()),
        "binary": " ".join(f"{byte:08b}" for byte in secret.encode()),
        "binary without zeros": ",".join(f"{byte:b}" for byte in secret.encode()),
        "octal": " ".join(f"{byte:o}" for byte in secret.encode()),
        "hexadecimal numbers": ", ".join(map(hex, secret.encode())),
        "quoted-printable": "".join(f"={byte:02X}" for byte in secret.encode()),
        "hexadecimal backwards": hexed[::-1],
        "base64 backwards": base64.b64encode(secret.encode()).decode()[::-1],
        "base85": base64.b85encode(secret.encode()).decode(),
        "ascii85": base64.a85encode(f"Bearer {secret}".encode()).decode(),
    }


@pytest.mark.parametrize("form", spellings("any"))
def test_no_spelling_of_the_key_passes(form: str):
    said = f"Incorrect API key provided: {spellings(SECRET)[form]}. Find yours at https://example.org"
    shown = excerpt(said.encode(), SECRET)
    assert shown in (said.replace(SECRET, "[key]"), "[withheld: it repeats the API key, or a part of it]")
    assert not reveals(shown, SECRET)


def test_other_words_are_no_key():
    """Fewer than eight of its letters in a row are nobody's secret; of a short key all of it is."""
    said = "sk-4f8a1: never say never, was shown to 4f8a and 1c (never)"
    assert excerpt(said.encode(), SECRET) == said
    assert excerpt(b"the body is empty", "EMPTY-1") == "the body is empty"
    assert "withheld" in excerpt(b"E M P T Y 1", "EMPTY-1")
    assert excerpt(b"xyz", "x") == "[key]yz"


def malformed(server_says: bytes) -> Iterator[str]:
    """A base_url at which a server says just this to everything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(server_says)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)


KEY_IN = {
    "status line": b"HTTP/1.1 2%s OK\r\n\r\n",
    "no status line": b"%s\r\n\r\n",
    "reason phrase": b"HTTP/1.1 500 %s\r\nContent-Length: 0\r\n\r\n",
    "header line": b"HTTP/1.1 200 OK\r\n%s\r\n\r\n",
    "header name": b"HTTP/1.1 200 OK\r\nX \0 %s: 1\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n",
    "encoding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n",
    "chunk header": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",
    "location": b"HTTP/1.1 302 Found\r\nLocation: http://h/%s\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("place", KEY_IN)
@pytest.mark.parametrize("form", ["plain", "twenty of its characters", "spaces", "nulls", "percent"])
def test_no_malformed_answer_tells_the_key(
    place: str, form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """HTTP libraries quote what they can't read; all loggers are on."""
    monkeypatch.setenv("TEST_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    quick = {"tries": 1, "first_pause": 0.01, "total_seconds": 5.0, "idle_seconds": 2.0, "concurrency": 1}
    for base_url in malformed(KEY_IN[place] % spellings(SECRET)[form].encode()):
        section = OpenAISection(kind="openai", base_url=base_url, model="m", api_key_env="TEST_KEY", **quick)  # type: ignore[arg-type]
        with OpenAIEngine(section, Letters()) as engine, pytest.raises(ServerError) as raised:
            list(engine.generate(many(1)))
    assert not reveals(str(raised.value), SECRET)
    assert not reveals(caplog.text, SECRET)


@pytest.mark.parametrize("form", sorted(spellings("any").keys() - {"twenty of its characters", "its end"}))
def test_an_answer_that_spells_the_key_is_none(form: str):
    """In its text, or over the likely first tokens, which are kept beside it."""
    said = spellings(SECRET)[form]
    with pytest.raises(RefusedError, match="the API key in the answer"):
        read_answer(chat(f"It is {said}, I think.").body, secret=SECRET)
    tokens = [{"token": part, "logprob": -1.0} for part in (said[:5], said[5:])]
    listed = {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": tokens}]}
    assert read_answer(chat("Fine.", logprobs=listed).body, secret=SECRET).first_logps is None


def test_an_answer_may_hold_words_that_somebody_took_for_a_key():
    assert read_answer(chat("That is not needed, a dummy.").body, secret="not-needed").text == "That is not needed, a dummy."
    with pytest.raises(RefusedError, match="the API key in the answer"):
        read_answer(chat("Say not-needed.").body, secret="not-needed")


def test_an_answer_with_special_tokens_does_not_tell_the_key(monkeypatch: pytest.MonkeyPatch):
    """Twenty of its characters, which are not all of it: the answer is dropped for its special token, and shown."""
    monkeypatch.setenv("TEST_KEY", SECRET)
    special = Letters(special_ids=frozenset({ord("|")}))
    with MisbehavingServer(lambda call: chat(f"{SECRET[:20]}|")) as server:
        section = OpenAISection(kind="openai", base_url=server.base_url, model="m", api_key_env="TEST_KEY")
        with OpenAIEngine(section, special) as engine:
            (found,) = engine.generate(many(1))
    assert isinstance(found, Failed)
    assert found.reason == "special tokens in the server's answer"
    assert not reveals(found.detail, SECRET)


def test_no_answer_holds_the_key(monkeypatch: pytest.MonkeyPatch):
    """Neither its finish reason nor its text, which would be written into the run folder."""
    monkeypatch.setenv("TEST_KEY", SECRET)

    def script(call: Call) -> Reply:
        return {"p1": chat("a", finish=f"no {' '.join(SECRET)}"), "p2": chat(f"It is {SECRET}.")}.get(
            call.prompt, echo(call)
        )

    with MisbehavingServer(script) as server:
        outcomes = answered(server, many(4), api_key_env="TEST_KEY")
    assert failed(outcomes).keys() == {"p1", "p2"}
    assert failed(outcomes)["p2"] == "the API key in the answer"
    assert not reveals(repr(outcomes), SECRET)


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "line\nbreak", "naïve"])
def test_an_unusable_key_is_refused_without_being_shown(value: str | None, monkeypatch: pytest.MonkeyPatch):
    if value is None:
        monkeypatch.delenv("TEST_KEY", raising=False)
    else:
        monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(ValueError, match=r"variable TEST_KEY,.* holds no usable key") as raised:
        OpenAIEngine(OpenAISection(kind="openai", base_url="http://h/v1", model="m", api_key_env="TEST_KEY"), Letters())
    assert value is None or not value.strip() or value not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://h/v1", "http://u:pw@h/v1", "http://h/v1?api_key=pw", "http:///v1", "http://[pw/v1"]
)
def test_base_url_is_checked_without_being_shown(url: str):
    with pytest.raises(ValueError, match="base_url must be") as raised:
        OpenAISection(kind="openai", base_url=url, model="m")
    assert "pw" not in str(raised.value)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="concurrency"):
        OpenAISection(kind="openai", base_url="http://h/v1", model="m", concurrency=0)
    with pytest.raises(ValueError, match=r"\['temperature'\]"):
        OpenAISection(kind="openai", base_url="http://h/v1", model="m", extra={"temperature": 2, "seed": None})


def test_warnings_are_few(caplog: pytest.LogCaptureFixture):
    """Forty failed tries, one warning."""
    with MisbehavingServer(lambda call: error(500, "busy") if call.nth <= 2 else echo(call)) as server:
        assert len(texts(answered(server, many(20)))) == 20
    (record,) = [r for r in caplog.records if r.name == "selfsteer.engines.openai"]
    assert "trying again (1 failed tries so far); the last: HTTP 500" in record.getMessage()


# ---- reading ----------------------------------------------------------------------------------------------------------


def test_read_answer():
    assert read_answer(chat("yes", finish="length", token_ids=[5, 6]).body) == Answer("yes", (5, 6), "length")
    assert read_answer(chat("yes", logprobs=None).body) == Answer("yes", None, "stop")
    thought = {"finish_reason": "stop", "message": {"content": "yes", "reasoning": "Hm"}}
    assert read_answer(json.dumps({"choices": [thought]}).encode()) == Answer("yes", None, "stop", thought=True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 100_000, "recursion"),
        (b"\xff\xfe", "body"),
        (b'{"choices": [{"finish_reason": "stop", "message": {"content": "\\ud800"}}]}', "body"),
        (b'{"choices": {}}', "choices"),
        (b'{"choices": [{"finish_reason": "stop", "message": {"content": 3}}]}', "choices.0.message.content"),
        (b'{"choices": [{"finish_reason": "stop"}]}', "no text"),
        (b'{"choices": [{"message": {"content": "a"}}]}', "choices.0.finish_reason"),
        (chat("a", token_ids=["5"]).body, "choices.0.token_ids.0"),
        (chat("a", token_ids=[True]).body, "choices.0.token_ids.0"),
        (chat("a", token_ids=[-1]).body, "choices.0.token_ids.0"),
        (chat("a", token_ids=[2**31]).body, "choices.0.token_ids.0"),
        (chat("a", token_ids=[]).body, "no tokens"),
    ],
)
def test_read_answer_refuses(body: bytes, said: str):
    with pytest.raises(TryError, match=said) as raised:
        read_answer(body)
    assert raised.value.costly


def test_read_answer_of_a_filtered_generation():
    with pytest.raises(RefusedError, match="finish reason content_filter"):
        read_answer(chat(None, finish="content_filter").body)


def test_read_error():
    """503 is a request to wait only when it says for how long."""
    assert isinstance(read_error(422, {}, ""), RefusedError)
    busy = {(status, after): read_error(status, {"retry-after": after}, "") for status in (429, 503) for after in ("", "2")}
    assert {k: (e.busy, e.retry_after) for k, e in busy.items() if isinstance(e, TryError)} == {
        (429, ""): (True, None),
        (429, "2"): (True, 2.0),
        (503, ""): (False, None),
        (503, "2"): (True, 2.0),
    }
    assert [read_error(status, {}, "") for status in (301, 401, 402, 403, 404, 405, 410)] == [None] * 7


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        (" 0.5 ", 0.5),
        ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2026 07:28:30 -0000", 30.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
        ("-1", None),
        ("1_000", None),
        ("\uff11", None),
        ("1e3", None),
        ("2026-10-21T07:28:30Z", None),
        ("Wed, 21 Oct 2026 07:28:30 +9999999999999", None),
        ("Wed, 21 Oct 2026 07:28:30 +9959", None),
        ("Wed, 21 Oct 99999 07:28:30 GMT", None),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("9" * 5000, None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
    ],
)
def test_read_retry_after(value: str, seconds: float | None):
    now = datetime(2026, 10, 21, 7, 28, 0, tzinfo=UTC)
    assert read_retry_after({"retry-after": value}, now=now) == seconds


def test_excerpt_is_one_short_printable_line():
    assert excerpt(b"a\n\t b\x1b[31m\xff") == "a b [31m�"
    assert len(excerpt(b"x" * 10_000)) == 304
    assert excerpt(f"{'x' * 295}{SECRET}".encode(), SECRET) == "x" * 295 + "[key]"


def test_first_logps_are_asked_for_and_read():
    """Chat completions and completions name them differently; None where a server gives none, or nonsense."""
    top = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "A", "logprob": -0.1}]}]}
    request = Request(key="k", messages=({"role": "user", "content": "p"},), prompt_ids=(1,), sampling=SAMPLING, seed=1)
    with MisbehavingServer(lambda _: chat("A", logprobs=top)) as server, engine_for(server) as engine:
        (completion,) = engine.generate([replace(request, top_logps=5)])
        assert isinstance(completion, Completion)
        assert completion.first_logps == (("A", -0.1),)
        assert (server.calls[0].body["logprobs"], server.calls[0].body["top_logprobs"]) == (True, 5)
        list(engine.generate([request]))
        assert not {"logprobs", "top_logprobs"} & server.calls[1].body.keys()


@pytest.mark.parametrize(
    ("logprobs", "first"),
    [
        ({"top_logprobs": [{"A": -0.1, "B": -3}], "tokens": ["A"]}, (("A", -0.1), ("B", -3.0))),
        (None, None),
        ({"content": []}, None),
        ({"content": [{"token": "A", "logprob": -0.1}]}, None),
        ({"content": [{"top_logprobs": [{"token": "A", "logprob": 0.9}]}]}, None),  # a probability, perhaps
        ({"top_logprobs": [{"A": "likely"}]}, None),
        ([-0.1], None),
    ],
)
def test_an_answer_stays_one_whatever_its_logprobs(logprobs: object, first: object):
    body = {"choices": [{"text": "A", "finish_reason": "stop", "logprobs": logprobs}]}
    answer = read_answer(json.dumps(body).encode())
    assert answer.text == "A"
    assert answer.first_logps == first


# ---- what the server knows of tokens --------------------------------------------------------------------------------------


def completion(**choice: Any) -> Reply:
    """A completion (no chat)."""
    return Reply(body=json.dumps({"choices": [{"text": "AB", "finish_reason": "stop", **choice}]}).encode())


def with_tokens(server: MisbehavingServer, *, exact: bool = False, **more: Any) -> OpenAIEngine:
    return OpenAIEngine(engine_for(server, send="token_ids").server, Letters(**more), ends={2}, exact=exact)


def test_ids_that_no_token_has_are_no_answer():
    """Rows of the embedding that nobody trained: their text is nothing, so only the ids tell."""
    ids = {1: [65, 66, 2], 2: [65, 511, 2]}
    with (
        MisbehavingServer(lambda call: completion(token_ids=ids[call.number])) as server,
        with_tokens(server, known_ids=frozenset(range(256))) as engine,
    ):
        first, second = (next(engine.generate([wanted])) for wanted in many(2))
    assert isinstance(first, Completion)
    assert first.token_ids == (65, 66)
    assert isinstance(second, Failed)
    assert second.reason == "ids without a token in the server's answer"


def test_a_server_that_returns_no_ids_is_named_once(caplog: pytest.LogCaptureFixture):
    with MisbehavingServer(lambda _: completion()) as server, with_tokens(server) as engine:
        answers = list(engine.generate(many(3)))
    assert all(isinstance(answer, Completion) and answer.reencoded for answer in answers)
    assert caplog.text.count("returns no token ids") == 1


def test_where_ids_are_needed_such_a_server_ends_the_run():
    with MisbehavingServer(lambda _: completion()) as server, with_tokens(server, exact=True) as engine:
        outcomes, error = until_error(engine, many(3))
    assert outcomes == []
    assert "returns no token ids" in str(error)


def test_likely_tokens_are_named_by_their_ids():
    """By their texts, two tokens that say the same would be one."""
    top = {"token_id:65": -0.1, "token_id:321": -3.0, "B": -4.0}
    with (
        MisbehavingServer(lambda _: completion(logprobs={"top_logprobs": [top]}, token_ids=[65])) as server,
        with_tokens(server) as engine,
    ):
        (answer,) = engine.generate([replace(many(1)[0], top_logps=5)])
        list(engine.generate(many(1)))
    assert isinstance(answer, Completion)
    assert answer.first_logps == (("A", -0.1), ("A", -3.0), ("B", -4.0))
    asked, without = server.calls
    assert asked.body["return_tokens_as_token_ids"] is True
    assert "return_tokens_as_token_ids" not in without.body


def test_arguments_of_the_template_go_to_a_server_that_renders():
    told = Letters(arguments={"enable_thinking": False})
    with MisbehavingServer(echo) as server:
        with OpenAIEngine(engine_for(server).server, told) as engine:
            list(engine.generate(many(1)))
        list(answered(server, many(1)))
    assert server.calls[0].body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in server.calls[1].body


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_no_proxy_stands_before_this_machine(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with MisbehavingServer(echo) as server:
        for host in ("127.0.0.1", "localhost"):
            address = server.base_url.replace("127.0.0.1", host)
            with engine_for(server, base_url=address) as engine:
                assert [type(answer) for answer in engine.generate(many(1))] == [Completion]


def test_a_proxy_stands_before_others(monkeypatch: pytest.MonkeyPatch):
    """Of the environment, which is meant: nothing listens there."""
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with MisbehavingServer(echo) as server:
        monkeypatch.setenv("HTTP_PROXY", server.base_url.removesuffix("/v1"))
        with engine_for(server, base_url="http://a-server.invalid/v1") as engine:
            assert [type(answer) for answer in engine.generate(many(1))] == [Completion]
