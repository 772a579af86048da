"""The vLLM engine: worker processes (`vllm_worker.py`) that live as long as the engine is open.

A worker may run in another Python environment; it is sent token ids and sends back token ids, as each response is finished.
Several replicas share the requests: whoever has the fewest under way gets the next. Its process's end gives back all GPU
memory, and the end of its standard input ends it, so that none outlives us.

Left out on purpose: everything that vLLM does itself, and texts on the other side: the tokenizer is here.
"""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, NamedTuple, Self

from selfsteer.engines.base import Completion, Failed, Request, TokenLogp
from selfsteer.records import Adapter
from selfsteer.runtime import raise_if_stopped, stop_requested

log = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("vllm_worker.py")

LOG_LINES = 20
"""Last lines of a dead worker's log that its error repeats."""

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank."""

_POLL = 0.2
"""Seconds after which a wait notices that a stop was requested."""

_GRACE = 30.0
"""Seconds for a worker to end by itself before it is killed."""


class WorkerError(OSError):
    """A vLLM process that did not start or has ended; the message says why, as far as it said so itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """How vLLM runs the model."""

    python: str = sys.executable
    """The interpreter of the environment that holds vLLM."""
    replicas: int = 1
    """Worker processes, each on tensor_parallel_size GPUs of its own."""
    max_num_seqs: int = 256
    """Responses that a worker samples side by side."""
    tensor_parallel_size: int = 1
    logps: bool = False
    """Ask for the log-probability of each sampled token."""
    adapters: tuple[Adapter, ...] = ()
    """What requests may name; the responses of a batch may each use another one."""
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of vLLM's EngineArgs."""


@dataclass(slots=True, kw_only=True)
class _Worker:
    process: subprocess.Popen[str]
    log: IO[str]
    under_way: set[str] = field(default_factory=set[str])

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            log.debug("worker %d has ended", self.process.pid)  # its reader says so, and why

    def last_words(self) -> str:
        self.log.seek(0)
        return "".join(self.log.readlines()[-LOG_LINES:]).strip() or "(it said nothing)"


class _Said(NamedTuple):
    worker: _Worker
    message: dict[str, Any]
    """Empty: the worker has ended."""


class VllmEngine:
    """Implements `Engine` with vLLM; starts the workers on entry, which may take minutes, and ends them on exit.

    model_path: the model as a Hugging Face folder. decode: the text of token ids. end_ids: what ends a response.
    Raises ValueError when there is no such interpreter, or fewer GPUs than the settings need.
    """

    def __init__(
        self,
        model_path: str,
        settings: VllmSettings,
        *,
        decode: Callable[[Iterable[int]], str],
        end_ids: Collection[int],
    ) -> None:
        self.model_path = model_path
        self.settings = settings
        self._decode = decode
        self._end_ids = frozenset(end_ids)
        self._workers: list[_Worker] = []
        self._said: SimpleQueue[_Said] = SimpleQueue()
        self._exit = ExitStack()
        if shutil.which(settings.python) is None:
            raise ValueError(f"engine.python: {settings.python!r} is no Python interpreter; name that of vLLM's environment")
        self._devices = _devices(settings)

    def __enter__(self) -> Self:
        log.info("starting vLLM: %d worker(s) of %s", self.settings.replicas, self.settings.python)
        with ExitStack() as stack:
            stack.callback(self._workers.clear)
            for devices in self._devices:
                self._workers.append(self._start(devices, stack))
            ready = [self._heard().message["ready"] for _ in self._workers]
            log.info("vLLM %s is ready", ready[0]["version"])
            if not ready[0]["seeded"]:
                log.warning("this vLLM takes no seed of a request's own: other samples of the same request would differ")
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion | Failed]:
        """Answer the requests as `Engine` promises; a prompt too long for the model is `Failed`.

        Raises `WorkerError`, after yielding all that is finished, when a worker has ended.
        """
        if not self._workers:
            raise ValueError("the engine is closed; use it in a with statement")
        source = iter(requests)
        for worker in self._workers:
            worker.under_way.clear()  # abandoned with an earlier iterator
        # A few more than are sampled, so that a worker has something to start while the caller is busy.
        room = self.settings.max_num_seqs + max(1, self.settings.max_num_seqs // 4)
        while True:
            while not stop_requested() and (worker := min(self._workers, key=_load)) and _load(worker) < room:
                request = next(source, None)
                if request is None:
                    break
                worker.under_way.add(request.key)
                worker.send(_asked(request))
            if not any(map(_load, self._workers)):
                return
            try:
                said = self._heard()
            except WorkerError:
                while not self._said.empty():
                    yield from self._answer(self._said.get())
                raise
            yield from self._answer(said)

    def _answer(self, said: _Said) -> Iterator[Completion | Failed]:
        key: str = said.message.get("id", "")
        if key in said.worker.under_way:
            said.worker.under_way.remove(key)
            yield self._read(key, said.message)

    def _read(self, key: str, message: dict[str, Any]) -> Completion | Failed:
        if "refused" in message:
            return Failed(key=key, reason="refused by vLLM", detail=message["refused"])
        reason: str = message["finish_reason"]
        if reason not in ("stop", "length"):
            return Failed(
                key=key, reason=f"finish reason {reason}", detail="vLLM ended the generation for a reason of its own"
            )
        ids: list[int] = message["token_ids"]
        logps: list[float] | None = message["logps"]
        end = ids.pop() if reason == "stop" and ids and ids[-1] in self._end_ids else None
        return Completion(
            key=key,
            text=self._decode(ids),
            token_ids=tuple(ids),
            finish_reason=reason,
            end_id=end,
            logps=None if logps is None else tuple(logps),
            first_logps=self._first(message.get("first_logps")),  # only there where it was asked for
        )

    def _first(self, said: list[tuple[int, float]] | None) -> tuple[TokenLogp, ...] | None:
        # vLLM gives -inf to tokens that can't come, and JSON has no such number.
        return None if said is None else tuple(TokenLogp(self._decode([x]), logp) for x, logp in said if logp > -math.inf)

    def _heard(self) -> _Said:
        """The next thing that a worker says. Raises `WorkerError` for one that has ended, Interrupted while starting."""
        while True:
            try:
                said = self._said.get(timeout=_POLL)
            except Empty:
                if not any(map(_load, self._workers)):
                    raise_if_stopped()
                continue
            if not said.message:
                status = said.worker.process.wait()
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                raise WorkerError(
                    f"the vLLM process {said.worker.process.pid} has ended ({how}). What is finished is kept; the same"
                    f" command continues. Its last words:\n{said.worker.last_words()}"
                )
            if "fatal" in said.message:
                raise WorkerError(f"engine: {said.message['fatal']}. Its last words:\n{said.worker.last_words()}")
            return said

    def _start(self, devices: str | None, stack: ExitStack) -> _Worker:
        words = stack.enter_context(
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", prefix="selfsteer-vllm-")  # noqa: SIM115
        )
        process = subprocess.Popen(
            [self.settings.python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            env=os.environ | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}),
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us: we drain, and then end it
        )
        worker = _Worker(process=process, log=words)
        reader = threading.Thread(target=_listen, args=(worker, self._said), daemon=True)
        reader.start()
        stack.callback(reader.join)
        stack.callback(_end, process)
        arguments = {
            "model": self.model_path,
            "skip_tokenizer_init": True,
            "max_num_seqs": self.settings.max_num_seqs,
            "tensor_parallel_size": self.settings.tensor_parallel_size,
            **_lora_arguments(self.settings.adapters),
            **self.settings.arguments,
        }
        adapters = {adapter.name: adapter.path for adapter in self.settings.adapters}
        start = {"adapters": adapters, "end_ids": sorted(self._end_ids), "logps": self.settings.logps}
        worker.send({"engine": arguments, **start})
        return worker


def _load(worker: _Worker) -> int:
    return len(worker.under_way)


def _asked(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "id": request.key,
        "prompt_ids": request.prompt_ids,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed,
        "top_logps": request.top_logps,
        "adapter": request.adapter,
    }


def _lora_arguments(adapters: Collection[Adapter]) -> dict[str, Any]:
    if not adapters:
        return {}
    rank = max(adapter.rank for adapter in adapters)
    room = min((size for size in MAX_LORA_RANKS if size >= rank), default=rank)
    return {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": room}


def _listen(worker: _Worker, said: SimpleQueue[_Said]) -> None:
    """Runs in a thread of its own, so that a worker never waits for us to read."""
    assert worker.process.stdout is not None
    with worker.process.stdout as lines:
        for line in lines:
            try:
                said.put(_Said(worker, json.loads(line)))
            except ValueError:
                log.debug("cut off by the end of worker %d: %r", worker.process.pid, line)
    said.put(_Said(worker, {}))


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        log.debug("worker %d had ended before", process.pid)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        log.warning("the vLLM process %d does not end; killing it", process.pid)
    # Also what it has started and left, such as the processes of tensor parallelism.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        log.debug("process group %d is gone", process.pid)
    process.wait()


def _devices(settings: VllmSettings) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker; None leaves the environment's."""
    if settings.replicas == 1:
        return [None]
    needed = settings.replicas * settings.tensor_parallel_size
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(number) for number in range(needed)] if given is None else [name for name in given.split(",") if name]
    if 0 < len(devices) < needed:
        raise ValueError(
            f"engine: {settings.replicas} replicas of {settings.tensor_parallel_size} GPUs need {needed},"
            f" CUDA_VISIBLE_DEVICES names {len(devices)}: lower engine.replicas"
        )
    width = settings.tensor_parallel_size
    return [",".join(devices[i * width : (i + 1) * width]) for i in range(settings.replicas)]
