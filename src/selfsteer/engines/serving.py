"""An OpenAI-compatible server that lives as long as the engine is open, with the model that the stage is about.

What a run trains exists only once it is trained, so no server can hold it beforehand: each stage serves its own. Either the
recipe says how a model's folder is served, or it is vLLM's own server (`vllm_command`), perhaps in another Python
environment. Its end gives back all GPU memory, and it ends with us, also when we are killed (`keeper.py`).

Left out on purpose: which servers there are, on which machines they run, and everything that vLLM does itself.
"""

import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple, Self, cast
from urllib.request import ProxyHandler, build_opener
from urllib.request import Request as Asked

from selfsteer.engines.base import Completion, Failed, Request
from selfsteer.engines.openai import OpenAIEngine, ServerError
from selfsteer.recipe.engines import VllmSection
from selfsteer.records import Adapter
from selfsteer.runtime import raise_if_stopped

log = logging.getLogger(__name__)

KEEPER = Path(__file__).with_name("keeper.py")

VLLM_ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
"""A folder of the user's must not stand in for a library: `python -m` looks into the current one first."""

VLLM_ON_CPU = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""On CPUs the queue between vLLM's server and its engine's process spins: a token costs a fifth less without it."""

VLLM_KEY = "VLLM_API_KEY"
"""The environment variable from which vLLM's server takes its key."""

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank."""

LOG_LINES = 20
"""Last lines of a dead server's log that its error repeats."""

_POLL = 0.5
"""Seconds between two looks at a server that is starting."""

_DYING = 10.0
"""Seconds for a server that answers no more to have ended, so that its last words can be told."""

_PROBE_SECONDS = 600.0
"""Limit of importing vLLM, which takes long on a cold disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """How a model is served."""

    command: Sequence[str]
    """Its words, run without a shell; {model} and {port} are filled in, the word {adapters} becomes NAME=FOLDER of each."""
    model_path: str
    start_seconds: float
    """Limit of starting."""
    adapters: tuple[Adapter, ...] = ()
    key_env: str | None = None
    """The environment variable in which the server is given a random key, of its own and anew at each start; None starts it
    without one. On a machine with others, loopback alone is no protection."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further variables."""


class Address(NamedTuple):
    """Where a server that we have started answers."""

    base_url: str
    model: str
    """The name under which it knows the model."""
    key: str | None


class Started(NamedTuple):
    """A server of ours that runs."""

    address: Address
    process: subprocess.Popen[bytes]
    words: IO[str]
    """What it says."""


class ServedEngine:
    """Implements `Engine`: starts the server, then is the engine that `connect` makes of its address.

    Raises ValueError when the program of the command is not there. Entering raises `ServerError` when the server ends or is
    not ready in time, with the last words of its log.
    """

    def __init__(self, serve: Serve, connect: Callable[[Address], OpenAIEngine]) -> None:
        self.serve = serve
        self._connect = connect
        self._engine: OpenAIEngine | None = None
        self.started: Started | None = None
        """None before it is entered, and after."""
        self._exit = ExitStack()
        program = serve.command[0]
        if shutil.which(program) is None:
            raise ValueError(f"engine.serve: there is no program {program!r} on this machine; name it with its path")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.started = start_server(self.serve, stack)
            self._engine = stack.enter_context(self._connect(self.started.address))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine = self.started = None
        self._exit.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion | Failed]:
        """As the engine for servers does; where the server has ended meanwhile, `ServerError` has its last words."""
        if self._engine is None or self.started is None:
            raise ValueError("the engine is closed; use it in a with statement")
        return _with_last_words(self._engine.generate(requests), self.started)


def _with_last_words(answers: Iterator[Completion | Failed], started: Started) -> Iterator[Completion | Failed]:
    try:
        yield from answers
    except ServerError as error:
        try:
            status = started.process.wait(_DYING)
        except subprocess.TimeoutExpired:
            raise error from None
        raise ServerError(f"the server has ended ({_how(status)}): {error} {_last_words(started.words)}") from None


def start_server(serve: Serve, stack: ExitStack) -> Started:
    """Start the server, until the stack is closed."""
    port = _free_port()
    filled = _filled(serve, port)
    log.info("starting a server: %s", shlex.join(filled))
    words = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", prefix="selfsteer-serve-"))  # noqa: SIM115
    key = None if serve.key_env is None else secrets.token_urlsafe(32)
    process = subprocess.Popen(
        [sys.executable, "-P", str(KEEPER), *filled],
        stdin=subprocess.PIPE,
        stdout=words,
        stderr=subprocess.STDOUT,
        env={**os.environ, **serve.environment, **({} if serve.key_env is None or key is None else {serve.key_env: key})},
        start_new_session=True,  # Ctrl-C is for us: we drain, and then end it
    )
    stack.callback(_end, process)
    base_url = f"http://127.0.0.1:{port}/v1"
    began = time.monotonic()
    while (name := _first_model(base_url, key)) is None:
        raise_if_stopped()
        if process.poll() is not None:
            raise ServerError(f"the server ended with {_how(process.returncode)} before it was ready. {_last_words(words)}")
        if time.monotonic() > began + serve.start_seconds:
            raise ServerError(f"the server was not ready in {serve.start_seconds:g} s (start_seconds). {_last_words(words)}")
        time.sleep(_POLL)
    log.info("the server is ready, after %.1f s", time.monotonic() - began)
    return Started(Address(base_url, name, key), process, words)


def _filled(serve: Serve, port: int) -> list[str]:
    adapters = [f"{adapter.name}={adapter.path}" for adapter in serve.adapters]
    fills = {"{model}": serve.model_path, "{port}": str(port)}
    filled: list[str] = []
    for word in serve.command:
        # In one pass: a folder's name may look like a place.
        plain = re.sub(r"\{model\}|\{port\}", lambda place: fills[place[0]], word)
        filled += adapters if word == "{adapters}" else [plain]
    return filled


def _first_model(base_url: str, key: str | None) -> str | None:
    """The first model that the server lists; None while it does not answer."""
    asked = Asked(f"{base_url}/models", headers={} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        # Without proxies: it is on this machine.
        with build_opener(ProxyHandler({})).open(asked, timeout=5) as response:
            return json.load(response)["data"][0]["id"]
    except (OSError, HTTPException):
        return None
    except (ValueError, LookupError, TypeError):
        raise ServerError(f"{base_url}/models lists no model: the command of engine.serve is no OpenAI server") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _how(status: int) -> str:
    """A status as a shell would say it, with the signal where it was one."""
    # The keeper's own end by a signal is negative, that of the command is told by it as a shell does.
    number = -status if status < 0 else status - 128
    names = {each.value: each.name for each in signal.Signals}
    return f"status {status}" + (f", {names[number]}" if number in names else "")


def _last_words(words: IO[str]) -> str:
    words.seek(0)
    return f"Its last words:\n{''.join(words.readlines()[-LOG_LINES:]).strip() or '(it said nothing)'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()  # the keeper ends the server, and after a while kills it
    process.wait()


# --- vLLM's own server -----------------------------------------------------------------------------------------------------


class Vllm(NamedTuple):
    """The vLLM of an interpreter."""

    version: str
    on_cpu: bool
    """Its sampler for CPUs dies on a seed of a request's own ("CPU Generator does not use offset")."""


_PROBE = """
import sys
try:
    import vllm
    from vllm.platforms import current_platform
    import vllm.entrypoints.openai.api_server
except (ImportError, OSError) as error:
    sys.exit(f"can't import vLLM: {error}")
print("vllm-is-there", vllm.__version__, int(current_platform.is_cpu()))
"""
"""OSError: a library that was built for another torch."""


@cache
def find_vllm(python: str) -> Vllm:
    """The vLLM that this interpreter imports; once a process, as it takes seconds. ValueError when there is none."""
    if shutil.which(python) is None:
        raise ValueError(f"engine.python: {python!r} is no Python interpreter; name that of vLLM's environment")
    try:
        probe = subprocess.run(
            [python, "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | VLLM_ENVIRONMENT,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(
            f"engine.python: {python!r} can't be used ({error}); name the interpreter of vLLM's environment"
        ) from error
    found = re.search(r"^vllm-is-there (\S+) ([01])$", probe.stdout, re.MULTILINE)
    if probe.returncode != 0 or found is None:
        said = (probe.stderr.strip() or probe.stdout.strip()).splitlines()
        why = said[-1] if said else "it said nothing, not even as a Python interpreter would"
        raise ValueError(
            f"engine.python: {python!r} has no vLLM that can be used ({_how(probe.returncode)}: {why}). Name the"
            " interpreter of an environment with vLLM, or install it there"
        )
    return Vllm(found[1], found[2] == "1")


def vllm_command(section: VllmSection, arguments: Mapping[str, object], adapters: Collection[Adapter]) -> list[str]:
    """The words that start vLLM's server for the section; arguments: further ones, as its EngineArgs names them."""
    named: dict[str, object] = section.model_dump(
        include={"tensor_parallel_size", "max_num_seqs", "max_model_len", "gpu_memory_utilization"}
        | {"enable_prefix_caching", "enforce_eager"},
        exclude_none=True,
    )
    named |= {"data_parallel_size": section.replicas} if section.replicas > 1 else {}
    if adapters:
        rank = max(adapter.rank for adapter in adapters)
        room = min((size for size in MAX_LORA_RANKS if size >= rank), default=rank)
        named |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": room}
    # By the module and not by its command, which is not there in every packaging of vLLM.
    words = [section.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}"]
    # The model's own sampling defaults (top_k, a repetition penalty) are none of the recipe's.
    words += ["--host", "127.0.0.1", "--port", "{port}", "--generation-config", "vllm", "--disable-uvicorn-access-log"]
    for name, value in {**named, **arguments, **section.extra}.items():
        words += _argument(name, value)
    return [*words, "--lora-modules", "{adapters}"] if adapters else words


def _argument(name: str, value: object) -> list[str]:
    """As vLLM's command line takes it."""
    flag = name.replace("_", "-")
    match value:
        case None:
            return []
        case bool():
            return [f"--{flag}"] if value else [f"--no-{flag}"]
        case list() | tuple():
            return [f"--{flag}", *map(str, cast("Sequence[object]", value))]
        case dict():
            return [f"--{flag}", json.dumps(value)]
        case _:
            return [f"--{flag}", str(value)]


def check_gpus(section: VllmSection) -> None:
    """Raise ValueError when fewer GPUs are given to this process than the section needs."""
    needed, given = section.replicas * section.tensor_parallel_size, os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [name for name in (given or "").split(",") if name]
    if devices and len(devices) < needed:
        raise ValueError(
            f"engine: {section.replicas} x {section.tensor_parallel_size} GPUs are {needed}, CUDA_VISIBLE_DEVICES names"
            f" {len(devices)}: lower engine.replicas or engine.tensor_parallel_size"
        )
