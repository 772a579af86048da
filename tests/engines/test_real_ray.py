"""The ray engine and the ray launcher against a real Ray on this machine: `make test-ray` builds its environment and runs this.

Two replicas or two processes, on a cluster that says it has two CPUs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from tiny import tiny_model_dir

import selfsteer
from selfsteer import checkpoints, interrupt
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.launch import launch
from selfsteer.models import checkpoint, load_tokenizer
from selfsteer.prompts import Prompts
from selfsteer.ray_cluster import ClusterError, joined
from selfsteer.recipe import Launcher, Policy, Recipe
from selfsteer.recipe_engines import EngineSection, RaySection, TransformersSection
from selfsteer.responses import open_engine
from selfsteer.trainer import read_history
from selfsteer.training import TrainingJob, train

ray = pytest.importorskip("ray", reason="needs a real Ray in an environment of its own: run make test-ray")
# Ray's own Python leaves files to the garbage collector and uses what later versions of its libraries deprecate.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)

RecipeOf = Callable[..., dict[str, Any]]
TWO = Launcher(kind="ray", processes=2)
EMBEDDED = TransformersSection(dtype="float32", batch_size=4)
RAY = RaySection(kind="ray", replicas=2, in_flight=6, replica=EMBEDDED)


@pytest.fixture(scope="module", autouse=True)
def _own_processes_have_one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(selfsteer.__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([here, str(Path(__file__).parents[1])]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def cluster(_own_processes_have_one_thread: None) -> Iterator[None]:
    """One for all tests that need no other: starting it takes the longest."""
    with joined(None):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[Request]:
    prompts = Prompts(load_tokenizer(str(folder)))
    asked = [({"role": "user", "content": f"What is the capital of France? {'Paris ' * number}"},) for number in range(24)]
    return [
        Request(
            key=f"k{number}",
            messages=messages,
            prompt_ids=prompts.prompt_ids(messages),
            sampling=Sampling(temperature=0.0 if number % 2 else 0.7, top_p=0.9, max_new_tokens=24),
            seed=number,
        )
        for number, messages in enumerate(asked)
    ]


def opened(section: EngineSection, folder: Path) -> Any:
    return open_engine(section, checkpoint(folder), Prompts(load_tokenizer(str(folder))), trust_remote_code=False)


def answers(section: EngineSection, folder: Path, wanted: list[Request]) -> dict[str, Completion]:
    found: dict[str, Completion] = {}
    with opened(section, folder) as engine:
        for answer in engine.generate(wanted):
            assert isinstance(answer, Completion)
            assert answer.key not in found
            found[answer.key] = answer
    return found


def replicas() -> list[psutil.Process]:
    """The processes of the actors, ours only."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if process.name().startswith("ray::Replica")]


def until(true: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return value


# ---- the engine -------------------------------------------------------------------------------------------------------


def test_two_replicas_answer_like_the_embedded_engine(cluster: None, folder: Path, wanted: list[Request]):
    ours = answers(RAY, folder, wanted)
    assert ours == answers(EMBEDDED, folder, wanted)
    assert not replicas(), "they end with the engine"


def test_requests_are_pulled_as_there_is_room(cluster: None, folder: Path, wanted: list[Request]):
    pulled: list[str] = []

    def lazily() -> Iterator[Request]:
        for request in wanted:
            pulled.append(request.key)
            yield request

    with opened(RAY, folder) as engine:
        stream = engine.generate(lazily())
        for answered in range(1, 9):
            next(stream)
            assert len(pulled) <= answered + 2 * 6 + 8, "in flight, and handed over at once"
        again = {answer.key for answer in engine.generate(wanted)}
    assert again == {request.key for request in wanted}, "an abandoned iterator leaves nothing behind"


def test_a_replica_that_is_killed_is_replaced(cluster: None, folder: Path, wanted: list[Request], caplog: Any):
    long = [replace(request, sampling=replace(request.sampling, max_new_tokens=100)) for request in wanted]
    caplog.set_level("INFO", "selfsteer")
    found: Counter[str] = Counter()
    with opened(RAY, folder) as engine:
        for answer in engine.generate(long):
            found[answer.key] += 1
            if found.total() == 3:
                replicas()[0].kill()
    assert found == Counter(request.key for request in wanted)
    assert "a replica has died" in caplog.text


def test_replicas_that_die_and_die_stop_the_run(cluster: None, folder: Path, wanted: list[Request]):
    section = RAY.model_copy(update={"restarts": 0})
    with pytest.raises(ClusterError, match=r"1 replicas have died, and engine.restarts is 0"), opened(section, folder) as engine:
        stream = engine.generate(wanted)
        next(stream)
        for process in replicas():
            process.kill()
        list(stream)


def test_what_concerns_all_requests_is_raised_as_by_the_engine(cluster: None, folder: Path, wanted: list[Request]):
    too_long = replace(wanted[0], sampling=Sampling(max_new_tokens=10_000))
    with pytest.raises(ValueError, match="exceed the 512 positions"):
        answers(RAY, folder, [too_long])


def test_a_stop_drains_what_is_under_way(cluster: None, folder: Path, wanted: list[Request]):
    many = [
        replace(request, key=f"{request.key}-{copy}", sampling=replace(request.sampling, max_new_tokens=100))
        for copy in range(10)
        for request in wanted
    ]
    with interrupt.graceful_stop(), opened(RAY, folder) as engine:
        stream = engine.generate(many)
        next(stream)
        os.kill(os.getpid(), signal.SIGTERM)  # ours, though Ray would have had it
        rest = list(stream)
    assert 0 < len(rest) <= 2 * 6
    assert len({answer.key for answer in rest}) == len(rest)


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"engine": {"kind": "ray", "replicas": 3}}, r"engine.replicas: the Ray cluster has room for 2 of 3 copies"),
        ({"engine": {"kind": "ray", "cpus": 3}}, r"each copy, on one node +3 CPUs +0 GPUs\n.*\n  the cluster +2 CPUs"),
        ({"engine": {"kind": "ray", "gpus": 1}}, r"room for 0 of 1 copies"),
        ({"launcher": {"kind": "ray", "processes": 4}}, r"launcher.processes: the Ray cluster has room for 2 of 4 copies"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_made(
    cluster: None, recipe_of: RecipeOf, tmp_path: Path, changes: dict[str, Any], expected: str
):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=expected):
        selfsteer.run(Recipe.model_validate(recipe_of(output) | changes))
    assert not output.exists()


def test_a_node_that_does_not_see_the_weights_is_named(cluster: None, folder: Path, monkeypatch: pytest.MonkeyPatch):
    engine = opened(RAY, folder)
    monkeypatch.setattr("selfsteer.ray_cluster.SharedFolder.of", lambda path: _elsewhere(path))
    with pytest.raises(ValueError, match="does not see the model's folder /not/here"):
        engine.__enter__()


def _elsewhere(path: str) -> Any:
    from selfsteer.ray_cluster import SharedFolder

    return SharedFolder("/not/here", {})
