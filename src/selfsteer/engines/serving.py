"""An OpenAI-compatible server that lives as long as the engine is open, with the model that the stage is about.

What a run trains exists only once it is trained, so no server can hold it beforehand: the recipe says how a model's folder
is served, and each stage serves its own. Left out on purpose: which servers there are, and on which machines they run.
"""

import json
import logging
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Self
from urllib.request import ProxyHandler, build_opener

from selfsteer.engines.base import Completion, Failed, Request
from selfsteer.engines.openai import OpenAIEngine, ServerError
from selfsteer.records import Adapter
from selfsteer.runtime import raise_if_stopped

log = logging.getLogger(__name__)

KEEPER = Path(__file__).with_name("keeper.py")

LOG_LINES = 20
"""Last lines of a dead server's log that its error repeats."""

_POLL = 0.5
"""Seconds between two looks at a server that is starting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """How a model is served."""

    command: str
    """Split as a shell would, but run without one; {model} and {port} are filled in."""
    model_path: str
    start_seconds: float
    """Limit of starting."""
    adapters: tuple[Adapter, ...] = ()
    """Where the command has the word {adapters}, NAME=FOLDER of each is put in its place."""


class ServedEngine:
    """Implements `Engine`: starts the server, then is the engine that `connect` makes of its base_url and model name.

    Raises ValueError when the program of the command is not there. Entering raises `ServerError` when the server ends or is
    not ready in time, with the last words of its log.
    """

    def __init__(self, serve: Serve, connect: Callable[[str, str], OpenAIEngine]) -> None:
        self.serve = serve
        self._connect = connect
        self._engine: OpenAIEngine | None = None
        self._exit = ExitStack()
        program = shlex.split(serve.command)[0]
        if shutil.which(program) is None:
            raise ValueError(f"engine.serve: there is no program {program!r} on this machine; name it with its path")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            base_url, name = start_server(self.serve, stack)
            self._engine = stack.enter_context(self._connect(base_url, name))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine = None
        self._exit.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion | Failed]:
        """As the engine for servers does."""
        if self._engine is None:
            raise ValueError("the engine is closed; use it in a with statement")
        return self._engine.generate(requests)


def start_server(serve: Serve, stack: ExitStack) -> tuple[str, str]:
    """Start the server, until the stack is closed; returns its base_url and the name under which it knows the model."""
    port = _free_port()
    filled = _filled(serve, port)
    log.info("starting a server: %s", shlex.join(filled))
    words = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", prefix="selfsteer-serve-"))  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-P", str(KEEPER), *filled],
        stdin=subprocess.PIPE,
        stdout=words,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for us: we drain, and then end it
    )
    stack.callback(_end, process)
    base_url = f"http://127.0.0.1:{port}/v1"
    deadline = time.monotonic() + serve.start_seconds
    while (name := _first_model(base_url)) is None:
        raise_if_stopped()
        if process.poll() is not None:
            raise ServerError(f"the server ended with status {process.returncode} before it was ready. {_log_of(words)}")
        if time.monotonic() > deadline:
            raise ServerError(f"the server was not ready in {serve.start_seconds:g} s (start_seconds). {_log_of(words)}")
        time.sleep(_POLL)
    return base_url, name


def _filled(serve: Serve, port: int) -> list[str]:
    adapters = [f"{adapter.name}={adapter.path}" for adapter in serve.adapters]
    filled: list[str] = []
    for word in shlex.split(serve.command):
        plain = word.replace("{model}", serve.model_path).replace("{port}", str(port))
        filled += adapters if word == "{adapters}" else [plain]
    return filled


def _first_model(base_url: str) -> str | None:
    """The first model that the server lists; None while it does not answer."""
    try:
        # Without proxies: it is on this machine.
        with build_opener(ProxyHandler({})).open(f"{base_url}/models", timeout=5) as response:
            return json.load(response)["data"][0]["id"]
    except (OSError, HTTPException):
        return None
    except (ValueError, LookupError, TypeError):
        raise ServerError(f"{base_url}/models lists no model: the command of engine.serve is no OpenAI server") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _log_of(words: IO[str]) -> str:
    words.seek(0)
    return f"Its last words:\n{''.join(words.readlines()[-LOG_LINES:]).strip() or '(it said nothing)'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()  # the keeper ends the server, and after a while kills it
    process.wait()
