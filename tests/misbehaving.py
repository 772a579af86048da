"""A scripted HTTP server on the loopback, for tests: it answers as told, however badly, and counts what it is asked.

with MisbehavingServer(script) as server: ...      script: Call -> Reply, called for every POST
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request as the server saw it."""

    number: int
    """1 for the first call of all."""
    nth: int
    """1 for the first call with this very body."""
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float
    """Seconds, monotonic."""

    @property
    def prompt(self) -> str:
        """The last chat message."""
        return self.body["messages"][-1]["content"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What to send, and how to go wrong on the way."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before anything is sent."""
    ending: Literal["whole", "reset", "silent", "endless", "nothing"] = "whole"
    """Of the body: complete; cut by a reset; followed by silence; followed by more for ever. Or no reply but a reset."""


def chat(text: str | None, *, finish: str | None = "stop", choices: int = 1, **choice: Any) -> Reply:
    """A chat completion."""
    one = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **choice}
    return Reply(body=json.dumps({"object": "chat.completion", "choices": [one] * choices}).encode())


def echo(call: Call) -> Reply:
    """The prompt, answered in capitals."""
    return chat(call.prompt.upper())


def error(status: int, message: str = "no", **headers: str) -> Reply:
    """An error in OpenAI's form; header names with _ for -."""
    body = json.dumps({"error": {"message": message}}).encode()
    return Reply(status=status, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


class MisbehavingServer:
    """Serves from threads until the block ends; every connection is closed by then."""

    def __init__(self, script: Callable[[Call], Reply]) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.connections = 0
        self.most_in_flight = 0
        self.dead = False
        self.closing = threading.Event()
        self._in_flight = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self.die()
        self._thread.join()
        self._http.server_close()

    def die(self) -> None:
        """From now on connections are refused and calls on open ones reset; call it from the script or a test."""
        self.dead = True
        self._http.shutdown()
        self._http.socket.close()

    def count(self, prompt: str) -> int:
        """Calls with this prompt."""
        return sum(call.prompt == prompt for call in self.calls)

    def enter_call(self, path: str, headers: dict[str, str], raw: bytes) -> Call:
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            body = json.loads(raw)
            nth = 1 + sum(call.body == body for call in self.calls)
            call = Call(number=len(self.calls) + 1, nth=nth, path=path, headers=headers, body=body, at=time.monotonic())
            self.calls.append(call)
            return call

    def leave_call(self) -> None:
        with self._lock:
            self._in_flight -= 1


class _Http(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128
    owner: MisbehavingServer

    def get_request(self) -> tuple[socket.socket, Any]:
        accepted = super().get_request()
        self.owner.connections += 1
        return accepted

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away in these tests."""


def _handler(server: MisbehavingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            if server.dead:
                return self._reset()
            call = server.enter_call(self.path, {name.lower(): value for name, value in self.headers.items()}, raw)
            try:
                reply = server.script(call)
                server.closing.wait(reply.delay)
            finally:
                # Before the answer goes out: the client may call again as soon as it has it.
                server.leave_call()
            if reply.ending == "nothing":
                return self._reset()
            return self._send(reply)

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            # An endless body ends with its connection, one that is cut short promised more.
            promised = len(reply.body) + (0 if reply.ending == "whole" else 100)
            if reply.ending == "endless":
                self.send_header("connection", "close")
            else:
                self.send_header("content-length", str(promised))
            self.end_headers()
            self.wfile.write(reply.body)
            if reply.ending == "endless":
                while not server.closing.wait(0.02):
                    self.wfile.write(b" " * 64)
            elif reply.ending == "silent":
                server.closing.wait()
                self.close_connection = True
            elif reply.ending == "reset":
                self._reset()

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler
