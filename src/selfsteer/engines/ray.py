"""The Ray engine: replicas of another engine (embedded, or vLLM) on the nodes of a Ray cluster, which share the requests.

Each replica is a plain actor with its engine in a thread. There is one call at a time to each, which brings it requests and
takes along what it has finished meanwhile, so that requests are pulled lazily, a replica's slots stay full, and what is in
flight is bounded. A replica that dies (its process, its node) is replaced a bounded number of times; what it had not handed
over is answered by whoever has room.

Why not Ray Data: it wants a finite data set before it starts, its vLLM stage keeps one of n outputs and no finish reason,
and its own checkpoint has lost samples. Why not an actor's streaming generator: it has no way in for further requests, so
that each batch would drain before the next one begins. Durability is the journal's (`store/journal.py`), which the process
of the run writes: a sample counts when it is there.

Left out on purpose: the cluster (`cluster.py`), and everything that the replicas' engines do.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Self

from selfsteer.cluster import ClusterError, Plan, SharedFolder, check_room, joined, load_ray
from selfsteer.engines.base import Completion, Engine, Failed, Request
from selfsteer.recipe.engines import RaySection
from selfsteer.runtime import raise_if_stopped, request_stop, stop_requested

log = logging.getLogger(__name__)

_BEAT = 1.0
"""Seconds after which a replica answers a call also with nothing, so that it can be told to stop."""

_POLL = 0.2
"""Seconds after which a wait for the replicas notices that a stop was requested."""

_PATIENCE = 60.0
"""Seconds for which replicas that are ready wait for the others, so that all begin with as many requests."""


class Told(NamedTuple):
    """What a replica hands over."""

    finished: list[Completion | Failed]
    running: bool
    """Whether more may come."""


class _Mail:
    """The requests that have come and were not taken yet.

    It ends when there is none, and goes on with the next that comes: engines ask again while something is under way.
    """

    def __init__(self) -> None:
        self._box: SimpleQueue[Request | None] = SimpleQueue()
        self._next: Request | None = None

    def put(self, request: Request | None) -> None:
        """None wakes up who waits."""
        self._box.put(request)

    def wait(self) -> None:
        """Returns when there is a request, or nothing more will come."""
        self._next = self._box.get()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Request:
        request, self._next = self._next, None
        if request is None:
            try:
                request = self._box.get_nowait()
            except Empty:
                raise StopIteration from None
        if request is None:
            raise StopIteration
        return request


class Replica:
    """What an actor is: an engine in a thread, and the hatch through which requests come and completions go."""

    def __init__(self) -> None:
        self._mail = _Mail()
        self._finished: SimpleQueue[Completion | Failed] = SimpleQueue()
        self._open = ExitStack()
        self._work: Future[None] = Future()

    def start(self, weights: SharedFolder, open_engine: Callable[[], Engine]) -> str:
        """Open the engine; returns the name of the node. Raises ValueError where the node does not see the weights."""
        weights.check()
        engine = self._open.enter_context(open_engine())
        # Not an executor: Ray lets Python end the process, which would wait for its thread, and that waits for requests.
        Thread(target=self._serve, args=(engine,), daemon=True).start()
        return os.uname().nodename

    def exchange(self, requests: list[Request], *, stop: bool) -> Told:
        """Takes requests, and hands over what is finished: at once when there is something, else within a second.

        Raises what the engine raised, when all that it had finished is handed over.
        """
        for request in requests:
            self._mail.put(request)
        if stop:
            request_stop()
            self._mail.put(None)
        finished: list[Completion | Failed] = []
        running = not self._work.done()
        if running:
            try:
                finished.append(self._finished.get(timeout=_BEAT))
            except Empty:
                running = not self._work.done()
        while not self._finished.empty():
            finished.append(self._finished.get())
        if not running and not finished:
            self._work.result()
        return Told(finished, running or bool(finished))

    def _serve(self, engine: Engine) -> None:
        try:
            while not stop_requested():
                self._mail.wait()
                for answer in engine.generate(self._mail):
                    self._finished.put(answer)
        except BaseException as error:  # noqa: BLE001 (`exchange` raises it)
            self._work.set_exception(error)
        else:
            self._work.set_result(None)


@dataclass(slots=True, kw_only=True, eq=False)
class _Member:
    """A replica, as the process of the run sees it."""

    actor: Any
    call: Any
    """The one call under way; None when it waits for us."""
    since: float
    """When it was asked for, time.monotonic()."""
    ready: bool = False
    under_way: dict[str, Request] = field(default_factory=dict[str, Request])
    to_send: list[Request] = field(default_factory=list[Request])


class RayEngine:
    """Implements `Engine` with replicas on a Ray cluster; entering it starts them, leaving it ends them.

    open_replica: opened in each replica; it is sent there, so it must be picklable. Raises ValueError without a usable Ray.
    Entering raises ValueError for a cluster that is refused, or whose nodes don't see the model's folder, and
    `ClusterError` when no replica is ready in time.
    """

    def __init__(self, model_path: str, section: RaySection, open_replica: Callable[[], Engine]) -> None:
        self.model_path = model_path
        self.section = section
        self._open_replica = open_replica
        self._ray = load_ray()
        self._members: list[_Member] = []
        self._lost: deque[Request] = deque()
        self._deaths = 0
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        wanted = self.section
        with ExitStack() as stack:
            nodes = stack.enter_context(joined(wanted.address))
            check_room(Plan(field="engine.replicas", copies=wanted.replicas, cpus=wanted.cpus, gpus=wanted.gpus), nodes)
            self._deaths = 0
            stack.callback(self._end)
            self._members = [self._start() for _ in range(wanted.replicas)]
            while not all(member.ready for member in self._members):
                raise_if_stopped()
                list(self._hear())
                if any(member.ready for member in self._members) and self._waited() > _PATIENCE:
                    break  # the others join when they are ready
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion | Failed]:
        """Answer the requests as `Engine` promises.

        Raises `ClusterError`, after yielding all that was handed over, when too many replicas have died.
        """
        if not self._members:
            raise ValueError("the engine is closed; use it in a with statement")
        source = iter(requests)
        self._lost.clear()
        for member in self._members:
            member.under_way.clear()  # abandoned with an earlier iterator
            member.to_send.clear()
        exhausted = False
        while True:
            while not stop_requested() and (self._lost or not exhausted) and (member := self._with_room()):
                request = self._lost.popleft() if self._lost else next(source, None)
                if request is None:
                    exhausted = True
                else:
                    member.under_way[request.key] = request
                    member.to_send.append(request)
            stop = stop_requested()
            if not any(map(_load, self._members)) and (stop or (exhausted and not self._lost)):
                return
            for member in self._members:
                if member.ready and member.call is None and (member.under_way or stop):
                    member.call = member.actor.exchange.remote(member.to_send, stop=stop)
                    member.to_send = []
            yield from self._hear()

    def _with_room(self) -> _Member | None:
        """Of the replicas that wait for us, the one with the fewest requests, if it has room."""
        waiting = [member for member in self._members if member.ready and member.call is None]
        least = min(waiting, key=_load, default=None)
        return least if least is not None and _load(least) < self.section.most_in_flight else None

    def _hear(self) -> Iterator[Completion | Failed]:
        """What the replicas have to say, after waiting a little for it; then those that have died are replaced."""
        calls = {member.call: member for member in self._members if member.call is not None}
        said, _ = self._ray.wait(list(calls), timeout=_POLL)
        if said:
            said, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        dead: list[tuple[_Member, str]] = []
        for call in said:
            member = calls[call]
            member.call = None
            try:
                told = self._ray.get(call)
            except self._ray.exceptions.RayTaskError as error:
                # Of the engine there; a process of its own that has ended (vLLM's) is like the replica's end.
                if not member.ready or not isinstance(error.cause, OSError):
                    raise error.cause from None
                dead.append((member, str(error.cause)))
            except self._ray.exceptions.RayError as error:
                dead.append((member, str(error)))
            else:
                yield from self._take(member, told)
        for member, why in dead:
            self._replace(member, why)
        if not any(member.ready for member in self._members) and self._waited() > self.section.start_seconds:
            raise ClusterError(
                f"no replica was ready in {self.section.start_seconds:g} s (engine.start_seconds); the cluster has free now:"
                f" {self._ray.available_resources()}"
            )

    def _take(self, member: _Member, told: Told | str) -> Iterator[Completion | Failed]:
        if isinstance(told, str):
            member.ready = True
            log.info("a replica is ready on %s, after %.1f s", told, time.monotonic() - member.since)
            return
        for answer in told.finished:
            if member.under_way.pop(answer.key, None) is not None:
                yield answer
        if not told.running:  # it was told to stop, and has finished what it had begun
            member.under_way.clear()

    def _replace(self, member: _Member, why: str) -> None:
        self._members.remove(member)
        self._ray.kill(member.actor)  # one that is out of reach only must not go on
        self._lost.extend(member.under_way.values())
        self._deaths += 1
        reason = why.strip().splitlines()[0] if why.strip() else "no reason was given"
        if self._deaths > self.section.restarts:
            raise ClusterError(
                f"{self._deaths} replicas have died, and engine.restarts is {self.section.restarts}; the last:"
                f" {why.strip()}. What is finished is kept; the same command continues."
            )
        log.warning("a replica has died with %d requests, which others answer now: %s", _load(member), reason)
        self._members.append(self._start())

    def _start(self) -> _Member:
        wanted = self.section
        actor = self._ray.remote(Replica).options(num_cpus=wanted.cpus, num_gpus=wanted.gpus, max_restarts=0).remote()
        call = actor.start.remote(SharedFolder.of(self.model_path), self._open_replica)
        return _Member(actor=actor, call=call, since=time.monotonic())

    def _waited(self) -> float:
        """Seconds for which the longest wait for a replica has lasted; 0 when all are ready."""
        now = time.monotonic()
        return now - min((member.since for member in self._members if not member.ready), default=now)

    def _end(self) -> None:
        for member in self._members:
            self._ray.kill(member.actor)
        self._members = []


def _load(member: _Member) -> int:
    return len(member.under_way)
