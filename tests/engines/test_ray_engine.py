"""The ray engine without Ray: its replicas as threads of this process; clusters, versions and plans that are refused."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from selfsteer import cluster, runtime
from selfsteer.cluster import ClusterError, Node, Plan, SharedFolder, check_room, cluster_of, load_ray
from selfsteer.engines import ray as ray_engine
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.ray import RayEngine, Replica
from selfsteer.recipe.engines import RaySection
from selfsteer.recipe.sections import Recipe

RecipeOf = Callable[..., dict[str, Any]]


def asked(number: int) -> Request:
    return Request(key=f"k{number}", messages=(), prompt_ids=(1,), sampling=Sampling(), seed=number)


class Slots:
    """An engine with two slots, which asks for more whenever one is free, as the real ones do."""

    def __init__(self, *, breaks_at: str = "", error: Exception | None = None) -> None:
        self.breaks_at = breaks_at
        self.error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        source, slots = iter(requests), list[Request]()
        while True:
            while len(slots) < 2 and not runtime.stop_requested() and (request := next(source, None)):
                slots.append(request)
            if not slots:
                return
            done = slots.pop(0)
            if done.key == self.breaks_at:
                assert self.error is not None
                raise self.error
            yield Completion(key=done.key, text=done.key, token_ids=(), finish_reason="stop")


REPLICAS: list[Replica] = []


@pytest.fixture(autouse=True)
def _threads_end() -> Iterator[None]:
    """In Ray their processes are killed."""
    before = set(threading.enumerate())
    yield
    started = set(threading.enumerate()) - before
    with runtime.graceful_stop():
        runtime.request_stop()
        for found in REPLICAS:
            found._mail.put(None)
        for thread in started:
            assert thread.daemon, "Python, which Ray lets end the process, would wait for it"
            thread.join(timeout=10)
    REPLICAS.clear()


# ---- a replica --------------------------------------------------------------------------------------------------------


def replica(tmp_path: Path, engine: Slots) -> Replica:
    found = Replica()
    REPLICAS.append(found)
    found.start(SharedFolder.of(str(tmp_path)), lambda: engine)
    return found


def all_of(found: Replica, requests: list[Request], count: int) -> list[str]:
    keys = [answer.key for answer in found.exchange(requests, stop=False).finished]
    while len(keys) < count:
        keys += [answer.key for answer in found.exchange([], stop=False).finished]
    return keys


def test_a_replica_answers_what_comes_whenever_it_comes(tmp_path: Path):
    found = replica(tmp_path, Slots())
    assert all_of(found, [asked(1), asked(2), asked(3)], 3) == ["k1", "k2", "k3"]
    assert all_of(found, [asked(4)], 1) == ["k4"], "after it had run dry"


def test_a_replica_hands_over_what_was_finished_before_the_engine_broke(tmp_path: Path):
    found = replica(tmp_path, Slots(breaks_at="k3", error=ValueError("too long")))
    assert all_of(found, [asked(number) for number in range(5)], 3) == ["k0", "k1", "k2"]
    with pytest.raises(ValueError, match="too long"):
        found.exchange([], stop=False)


def test_a_replica_that_is_told_to_stop_says_when_it_is_done(tmp_path: Path):
    with runtime.graceful_stop():
        found = replica(tmp_path, Slots())
        told = found.exchange([asked(1)], stop=True)
        while told.running:
            told = found.exchange([], stop=True)
        assert told.finished == []


def test_a_node_that_sees_other_files_is_named(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    seen = SharedFolder.of(str(tmp_path))
    seen.check()
    (tmp_path / "model.safetensors").write_bytes(b"wei")
    with pytest.raises(ValueError, match=rf"{os.uname().nodename} sees other files in .*: model.safetensors"):
        seen.check()
    with pytest.raises(ValueError, match="does not see the model's folder"):
        seen._replace(folder=str(tmp_path / "elsewhere")).check()


# ---- the engine -------------------------------------------------------------------------------------------------------


class LostError(Exception):
    """Stands for Ray's errors about actors."""


class TaskError(LostError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Actor:
    def __init__(self, fake: "FakeRay") -> None:
        self.replica, self.fake = Replica(), fake
        REPLICAS.append(self.replica)
        self.thread = ThreadPoolExecutor(1)
        self.start = SimpleNamespace(remote=lambda *given: self._call(self.replica.start, *given))
        self.exchange = SimpleNamespace(remote=lambda sent, *, stop: self._exchange(sent, stop))

    def _call(self, method: Callable[..., Any], *given: Any, **named: Any) -> Future[Any]:
        return self.thread.submit(method, *given, **named)

    def _exchange(self, sent: list[Request], stop: bool) -> Future[Any]:
        self.fake.sent.update(request.key for request in sent)
        self.fake.calls += 1
        if self.fake.calls in self.fake.dies_at:
            lost: Future[Any] = Future()
            lost.set_exception(LostError("the node is gone"))
            return lost
        return self._call(self.replica.exchange, sent, stop=stop)


class FakeRay:
    """As much of Ray as the engine uses; the actors named by dies_at, the numbers of exchanges, are lost in them."""

    exceptions = SimpleNamespace(RayError=LostError, RayTaskError=TaskError)

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.killed: list[Actor] = []
        self.sent: Counter[str] = Counter()
        self.calls = 0
        self.dies_at: set[int] = set()
        self.options: dict[str, Any] = {}

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=self._options)

    def _options(self, **options: Any) -> Any:
        self.options = options
        return SimpleNamespace(remote=self._actor)

    def _actor(self) -> Actor:
        self.actors.append(Actor(self))
        return self.actors[-1]

    def wait(self, calls: list[Any], *, num_returns: int = 1, timeout: float) -> tuple[list[Any], list[Any]]:
        done, rest = wait(calls, timeout, return_when=FIRST_COMPLETED)
        return list(done)[: max(num_returns, 1)], list(rest)

    def get(self, call: Future[Any]) -> Any:
        try:
            return call.result()
        except LostError:
            raise
        except (ValueError, OSError) as error:
            raise TaskError(error) from error

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)
        actor.thread.shutdown()

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 0.0}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay()

    @contextmanager
    def joined(_: str | None) -> Iterator[list[Node]]:
        yield [Node(2.0, 0.0)]

    monkeypatch.setattr(ray_engine, "load_ray", lambda: found)
    monkeypatch.setattr(ray_engine, "joined", joined)
    return found


def engine(tmp_path: Path, slots: Callable[[], Slots] = Slots, **fields: Any) -> RayEngine:
    return RayEngine(str(tmp_path), RaySection(kind="ray", **{"replicas": 2, "in_flight": 3} | fields), slots)


def keys(answers: Iterable[Any]) -> Counter[str]:
    return Counter(answer.key for answer in answers)


WANTED = [asked(number) for number in range(20)]
ONCE = Counter(request.key for request in WANTED)


def test_every_request_is_answered_once_and_pulled_when_there_is_room(fake: FakeRay, tmp_path: Path):
    pulled: list[str] = []

    def lazily() -> Iterator[Request]:
        for request in WANTED:
            pulled.append(request.key)
            yield request

    with engine(tmp_path) as opened:
        stream = opened.generate(lazily())
        first = next(stream)
        assert len(pulled) <= 2 * 3
        assert keys([first, *stream]) == ONCE
        assert keys(opened.generate(WANTED)) == ONCE, "again"
    assert fake.options == {"num_cpus": 1, "num_gpus": 0, "max_restarts": 0}
    assert fake.killed == fake.actors, "they end with the engine"
    with pytest.raises(ValueError, match="closed"):
        next(opened.generate(WANTED))


def test_what_a_dead_replica_had_is_answered_by_others(fake: FakeRay, tmp_path: Path):
    fake.dies_at = {3, 5}
    with engine(tmp_path) as opened:
        assert keys(opened.generate(WANTED)) == ONCE
    assert fake.sent.total() > len(WANTED), "some were sent twice"
    assert len(fake.actors) == 4
    assert set(fake.killed) == set(fake.actors)


def test_too_many_deaths_stop_the_run_after_what_was_handed_over(fake: FakeRay, tmp_path: Path):
    fake.dies_at = {4}
    found: list[Any] = []
    with pytest.raises(ClusterError, match=r"1 replicas have died, and engine.restarts is 0.*the node is gone"):
        gather(engine(tmp_path, restarts=0), found)
    assert 0 < len(found) < 20
    assert keys(found) <= ONCE


def gather(opened: RayEngine, found: list[Any]) -> None:
    with opened:
        for answer in opened.generate(WANTED):
            found.append(answer)


def test_what_the_engine_raises_is_raised_and_the_end_of_its_own_process_is_a_death(fake: FakeRay, tmp_path: Path):
    with pytest.raises(ValueError, match="too long"):
        gather(engine(tmp_path, lambda: Slots(breaks_at="k7", error=ValueError("too long"))), [])
    with pytest.raises(ClusterError, match=r"2 replicas have died.*vLLM has ended"):
        gather(engine(tmp_path, lambda: Slots(breaks_at="k7", error=OSError("vLLM has ended")), restarts=1), [])


def test_no_replica_in_time_is_said_with_what_the_cluster_has_free(fake: FakeRay, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(Replica, "start", lambda *_: Future[str]().result(timeout=1.0))
    with pytest.raises(ClusterError, match=r"no replica was ready in 0.1 s .*'CPU': 0.0"):
        engine(tmp_path, start_seconds=0.1).__enter__()


def test_a_stop_finishes_what_has_begun(fake: FakeRay, tmp_path: Path):
    with runtime.graceful_stop(), engine(tmp_path) as opened:
        stream = opened.generate(WANTED)
        found = [next(stream)]
        runtime.request_stop()
        found += stream
    assert 1 <= len(found) <= 1 + 2 * 3
    assert keys(found) <= ONCE


# ---- what is refused --------------------------------------------------------------------------------------------------


def test_room_is_counted_a_node_at_a_time():
    """Two nodes of 8 CPUs and 1 GPU and one of 3 CPUs: 16 // 6 would be 3 copies, but only two nodes hold one."""
    nodes = [Node(8, 1), Node(8, 1), Node(3, 0)]
    check_room(Plan(field="engine.replicas", copies=2, cpus=6, gpus=0), nodes)
    check_room(Plan(field="engine.replicas", copies=5, cpus=3, gpus=0), nodes)
    with pytest.raises(ValueError, match="has room for 2 of 3") as refused:
        check_room(Plan(field="engine.replicas", copies=3, cpus=6, gpus=1), nodes)
    assert str(refused.value).splitlines() == [
        "engine.replicas: the Ray cluster has room for 2 of 3 copies",
        "  each copy, on one node         6 CPUs     1 GPUs",
        "  3 copies                      18 CPUs     3 GPUs",
        "  the cluster                   19 CPUs     2 GPUs",
        "  2 nodes of                     8 CPUs     1 GPUs",
        "  1 node of                      3 CPUs     0 GPUs",
        "Lower engine.replicas, engine.cpus or engine.gpus, or start more nodes first; Ray would wait for them for ever.",
    ]


def test_an_old_or_missing_ray_and_one_without_authentication_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "version", lambda _: "2.55.1")
    with pytest.raises(ValueError, match=r"Ray 2.55.1 is too old: before 2.56 it ran code"):
        load_ray()
    monkeypatch.setattr(cluster, "version", missing)
    with pytest.raises(ValueError, match=r"needs Ray 2.56 or newer: pip install 'selfsteer\[ray\]'"):
        load_ray()
    monkeypatch.setattr(cluster, "version", lambda _: "2.60.0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match=r"RAY_AUTH_MODE is 'disabled'"):
        load_ray()


def missing(name: str) -> str:
    raise cluster.PackageNotFoundError(name)


def test_one_run_joins_one_cluster(recipe_of: RecipeOf, tmp_path: Path):
    sections = {"engine": {"kind": "ray"}, "launcher": {"kind": "ray", "processes": 2, "address": "auto"}}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run") | sections)
    with pytest.raises(ValueError, match=r"the recipe names \['None', 'auto'\]"), cluster_of(recipe):
        pass
