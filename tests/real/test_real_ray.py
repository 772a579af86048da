"""The ray engine and the ray launcher against a real Ray: `make test-ray` builds its environment and runs this.

Two replicas or two processes, on a cluster that says it has two CPUs.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from builders import curve, seven_queries
from safetensors.torch import load_file
from tiny import tiny_model_dir
from waiting import stop_amid_training, until

import selfsteer
from selfsteer import runtime
from selfsteer.cluster import ClusterError, joined
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.open import open_engine
from selfsteer.models import checkpoint, load_tokenizer
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import EngineSection, RaySection, TransformersSection
from selfsteer.recipe.sections import Launcher, Recipe
from selfsteer.training.launch import launch
from selfsteer.training.train import TrainingJob, train
from selfsteer.training.trainer import read_history

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
TOKEN = secrets.token_hex(32)

SECONDS = 600
"""How long anything may take; nearly all of it is importing torch on a machine that does other things."""

EMBEDDED = TransformersSection(dtype="float32", batch_size=4)
RAY = RaySection(kind="ray", replicas=2, in_flight=6, replica=EMBEDDED)


@contextmanager
def head_node(authentication: str, cpus: int) -> Iterator[str]:
    """A cluster of one node in processes of its own; yields its address.

    With every port given: a node that chooses its own waits 15 s for the processes that choose them, and no longer.
    """
    names = ("port", "ray-client-server-port", "metrics-export-port", "runtime-env-agent-port", "object-manager-port")
    names += ("node-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [*(f"--{name}={port}" for name, port in ports.items()), "--min-worker-port=0", "--max-worker-port=0"]
    options += [f"--num-cpus={cpus}", "--include-dashboard=false", "--object-store-memory=90000000", "--disable-usage-stats"]
    with subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options],
        env=os.environ | {"RAY_AUTH_MODE": authentication},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as head:
        try:
            until(
                lambda: head.poll() is not None or (ours("raylet") and listens(ports["port"])),
                "the head node",
                seconds=SECONDS,
            )
            assert head.poll() is None
            yield f"127.0.0.1:{ports['port']}"
        finally:
            whole = psutil.Process(head.pid)
            family = [whole, *whole.children(recursive=True)]
            head.terminate()
            _, alive = psutil.wait_procs(family, timeout=30)  # not of another cluster of these tests
            for process in alive:
                with suppress(psutil.NoSuchProcess):  # gone with one that was killed before it
                    process.kill()


def ours(name: str) -> list[psutil.Process]:
    """The processes of the clusters of these tests with that in their name, apart from this one."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if name in process.name() and process.pid != os.getpid() and process.environ().get("RAY_AUTH_TOKEN") == TOKEN:
                found.append(process)
    return found


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """What the processes of the clusters get: one thread each, our sources, the token."""
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(selfsteer.__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([here, str(Path(__file__).parents[1])]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="module")
def cluster(_environment: None) -> Iterator[str]:
    """One for all tests that need no other: starting it takes the longest. What names no address uses it, too."""
    with head_node("token", 2) as address, joined(address):
        yield address


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


@contextmanager
def opened(section: EngineSection, folder: Path) -> Iterator[Any]:
    prompts = Prompts(load_tokenizer(str(folder)))
    try:
        with open_engine(section, checkpoint(folder), prompts, trust_remote_code=False) as engine:
            yield engine
    finally:
        # They end with it, but not at once; the next test must not see them.
        until(lambda: not replicas(), "the replicas to end with their engine", seconds=SECONDS)


def answers(section: EngineSection, folder: Path, wanted: list[Request]) -> dict[str, Completion]:
    found: dict[str, Completion] = {}
    with opened(section, folder) as engine:
        for answer in engine.generate(wanted):
            assert isinstance(answer, Completion)
            assert answer.key not in found
            found[answer.key] = answer
    return found


def replicas() -> list[psutil.Process]:
    return ours("Replica")


# ---- the engine -------------------------------------------------------------------------------------------------------


def test_two_replicas_answer_like_the_embedded_engine(cluster: str, folder: Path, wanted: list[Request]):
    ours = answers(RAY, folder, wanted)
    assert ours == answers(EMBEDDED, folder, wanted)


def test_requests_are_pulled_as_there_is_room(cluster: str, folder: Path, wanted: list[Request]):
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


def test_a_replica_that_is_killed_is_replaced(cluster: str, folder: Path, wanted: list[Request], caplog: Any):
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


def test_replicas_that_die_and_die_stop_the_run(cluster: str, folder: Path, wanted: list[Request]):
    def use(section: RaySection) -> None:
        with opened(section, folder) as engine:
            stream = engine.generate(wanted)
            next(stream)
            for process in replicas():
                process.kill()
            list(stream)

    with pytest.raises(ClusterError, match=r"1 replicas have died, and engine.restarts is 0"):
        use(RAY.model_copy(update={"restarts": 0}))


def test_what_concerns_all_requests_is_raised_as_by_the_engine(cluster: str, folder: Path, wanted: list[Request]):
    too_long = replace(wanted[0], sampling=Sampling(max_new_tokens=10_000))
    with pytest.raises(ValueError, match="exceed the 512 positions"):
        answers(RAY, folder, [too_long])


def test_a_stop_drains_what_is_under_way(cluster: str, folder: Path, wanted: list[Request]):
    many = [
        replace(request, key=f"{request.key}-{copy}", sampling=replace(request.sampling, max_new_tokens=100))
        for copy in range(10)
        for request in wanted
    ]
    with runtime.graceful_stop(), opened(RAY, folder) as engine:
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
    cluster: str, recipe_of: RecipeOf, tmp_path: Path, changes: dict[str, Any], expected: str
):
    output = tmp_path / "run"
    recipe = recipe_of(output, {"generator.batch_size": 4, "alignment.batch_size": 4})  # which four processes can share
    with pytest.raises(ValueError, match=expected):
        selfsteer.run(Recipe.model_validate(recipe | changes))
    assert not output.exists()


def test_a_node_that_does_not_see_the_weights_is_named(cluster: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("selfsteer.cluster.SharedFolder.of", lambda path: _elsewhere(path))
    with pytest.raises(ValueError, match="does not see the model's folder /not/here"), opened(RAY, folder):
        pass


def _elsewhere(path: str) -> Any:
    from selfsteer.cluster import SharedFolder

    return SharedFolder("/not/here", {})


# ---- clusters that run already ----------------------------------------------------------------------------------------

JOIN = """
import json, sys
from selfsteer.cluster import joined
try:
    with joined(sys.argv[1]) as nodes:
        print(json.dumps({"joined": nodes}))
except (ValueError, OSError) as error:
    print(json.dumps({"refused": str(error)}))
"""


@pytest.mark.parametrize("authentication", ["token", "disabled"])
def test_a_cluster_is_joined_only_when_it_asks_for_a_token(authentication: str):
    with head_node(authentication, 1) as address:
        done = subprocess.run(
            [sys.executable, "-c", JOIN, address], capture_output=True, text=True, timeout=SECONDS, check=True
        )
    said = json.loads(done.stdout.splitlines()[-1])
    if authentication == "token":
        assert said == {"joined": [[1.0, 0.0]]}
    else:
        assert "lets in whoever comes without a token" in said["refused"]


# ---- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_killed_amid_its_responses_goes_on(cluster: str, recipe_of: RecipeOf, tmp_path: Path):
    """SIGKILL to the run in stage 2; its replicas end with it."""
    output = tmp_path / "run"
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"query": f"What is {number} and one?"}) + "\n" for number in range(16)))
    engine = {"kind": "ray", "replicas": 2, "in_flight": 2, "replica": {"dtype": "float32", "batch_size": 1}}
    recipe = recipe_of(output, {"queries.path": str(queries), "responses.max_new_tokens": 100})
    recipe["engine"] = engine | {"address": cluster}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    parts = output / "round-1/2-responses/parts"

    def durable() -> list[str]:
        lines = [line for part in parts.glob("*.jsonl") for line in part.read_text().splitlines(keepends=True)]
        return [json.loads(line)["key"] for line in lines if line.endswith("\n")]

    with subprocess.Popen([sys.executable, "-m", "selfsteer", "run", str(path)]) as run:
        until(lambda: run.poll() is not None or durable(), "the first durable responses", seconds=SECONDS)
        assert run.poll() is None
        run.kill()
    before = durable()
    assert 0 < len(before) < 48, "killed amid the stage"
    until(lambda: not replicas(), "the end of its replicas", seconds=SECONDS)
    selfsteer.run(Recipe.model_validate(recipe))
    after = durable()
    assert len(set(after)) == len(after) == 48, "no key twice, none lost"
    assert set(before) <= set(after)
    assert pq.read_table(output / "round-1/5-preferences/data.parquet").num_rows > 0


HOLD = """
import time
from selfsteer.cluster import joined
with joined(None):
    print("joined", flush=True)
    time.sleep(10_000)
"""


def test_a_ray_of_its_own_ends_with_the_run(tmp_path: Path):
    """Also with SIGKILL; its token is in no file."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, env=environment | {"HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "joined\n"
        started = psutil.Process(run.pid).children(recursive=True)
        assert any("raylet" in process.name() for process in started)
        run.kill()
    until(lambda: not [process for process in started if process.is_running()], "the end of its Ray", seconds=SECONDS)
    assert not (tmp_path / ".ray").exists()


# ---- the launcher -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return seven_queries(tmp_path_factory.mktemp("launch"))


def same_curve(job: TrainingJob, expected: TrainingJob) -> None:
    assert [step["step"] for step in read_history(Path(job.output) / "history.jsonl")] == list(
        range(1, len(curve(expected)) + 1)
    )
    assert curve(job) == [(pytest.approx(loss, abs=1e-4), pytest.approx(norm, rel=1e-4)) for loss, norm in curve(expected)]


def test_two_ray_processes_train_as_one(cluster: str, job: TrainingJob, tmp_path: Path):
    alone, together = (replace(job, output=str(tmp_path / name)) for name in ("alone", "together"))
    train(alone)
    result = launch(together, TWO)
    same_curve(together, alone)
    assert result.steps == 6
    assert not (Path(together.output) / ".ray").exists()
    weights, expected = (load_file(Path(each.output) / "model" / "model.safetensors") for each in (together, alone))
    assert all((weights[name] - expected[name]).abs().max() < 1e-5 for name in expected)


def test_a_group_that_loses_a_process_goes_on_from_its_last_complete_checkpoint(
    cluster: str, job: TrainingJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    alone, together = (replace(job, output=str(tmp_path / name), max_steps=12) for name in ("alone", "together"))
    train(alone)
    history = Path(together.output) / "history.jsonl"
    killed: list[int] = []

    def kill_one() -> None:
        until(lambda: len(read_history(history)) >= 3, "three steps", seconds=SECONDS)
        killed.append(len(read_history(history)))
        ours("TrainWorker")[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    result = launch(together, TWO)
    killer.join()
    assert 3 <= killed[0] < 12
    assert result.steps == 12
    same_curve(together, alone)


def test_a_signal_ends_in_a_complete_checkpoint(cluster: str, job: TrainingJob, tmp_path: Path):
    long = replace(job, output=str(tmp_path / "run"), epochs=300, learning_rate=1e-5)
    stop_amid_training(long, TWO, seconds=SECONDS)


def test_a_refusal_comes_back_in_words(cluster: str, job: TrainingJob, tmp_path: Path):
    with pytest.raises(ValueError, match="batch_size 3 can't be shared by 2 processes"):
        launch(replace(job, batch_size=3, output=str(tmp_path / "run")), TWO)
