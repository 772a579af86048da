"""A server that lives as long as the engine: started with the stage's model, ended with it, and gone when we are killed."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import alive, until

from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.openai import OpenAIEngine, ServerError
from selfsteer.engines.serving import KEEPER, Address, Serve, ServedEngine
from selfsteer.recipe.engines import OpenAISection
from selfsteer.records import Adapter

ANSWER = """f"{asked['model']}, {os.getpid()}\""""
"""Which model answers, in which process."""

NAME = '"served " + os.path.basename(model)'


def connect(address: Address) -> OpenAIEngine:
    section = OpenAISection(kind="openai", base_url=address.base_url, model=address.model)
    return OpenAIEngine(section, None)


@pytest.fixture
def served(scripted_server: Callable[..., str]) -> Callable[..., ServedEngine]:
    def build(command: str | None = None, *, start_seconds: float = 60) -> ServedEngine:
        command = command or scripted_server(ANSWER, name=NAME) + " {model} {port}"
        serve = Serve(command=shlex.split(command), model_path="/models/the {port}", start_seconds=start_seconds)
        return ServedEngine(serve, connect)

    return build


def test_the_stage_is_answered_by_a_server_of_its_model_which_ends_with_it(served: Callable[..., ServedEngine]):
    request = Request(key="k", messages=({"role": "user", "content": "?"},), prompt_ids=(1,), sampling=Sampling(), seed=0)
    with served() as engine:
        (answer,) = engine.generate([request])
        assert isinstance(answer, Completion)
        name, _, pid = answer.text.partition(", ")
        assert name == "served the {port}", "the folder's name has a space and looks like a place: it is passed as it is"
        assert alive(int(pid))
    assert not alive(int(pid))
    with pytest.raises(ValueError, match="closed"):
        engine.generate([request])


def test_adapters_are_words_of_the_command_and_models_of_the_server(scripted_server: Callable[..., str], tmp_path: Path):
    said = tmp_path / "words"
    server = scripted_server(ANSWER, before=f"open({str(said)!r}, 'w').write(repr(words))")
    adapters = (Adapter(name="good", path="/runs/an adapter", rank=8), Adapter(name="bad", path="/runs/b", rank=8))
    serve = Serve(
        command=[*shlex.split(server), "{model}", "{port}", "--lora-modules", "{adapters}"],
        model_path="/models/m",
        start_seconds=60,
        adapters=adapters,
    )
    request = Request(
        key="k", messages=({"role": "user", "content": "?"},), prompt_ids=(1,), sampling=Sampling(), seed=0, adapter="bad"
    )
    with ServedEngine(serve, connect) as engine:
        (answer,) = engine.generate([request])
    assert said.read_text() == "['--lora-modules', 'good=/runs/an adapter', 'bad=/runs/b']"
    assert isinstance(answer, Completion)
    assert answer.text.startswith("bad, ")


def test_a_server_that_ends_says_why(served: Callable[..., ServedEngine]):
    command = f"{sys.executable} -c \"import sys; sys.exit('no memory for {{model}} at {{port}}')\""
    with pytest.raises(ServerError, match=r"ended with status 1 .*\n.*no memory for /models/the {port}"), served(command):
        pass


def test_a_server_that_does_not_get_ready(served: Callable[..., ServedEngine]):
    command = f'{sys.executable} -c "import time; time.sleep(600)" {{model}} {{port}}'
    with pytest.raises(ServerError, match=r"not ready in 0\.5 s"), served(command, start_seconds=0.5):
        pass


def test_no_such_program(served: Callable[..., ServedEngine]):
    with pytest.raises(ValueError, match=r"engine\.serve: there is no program 'vlm'"):
        served("vlm serve {model} --port {port}")


def test_the_keeper_ends_the_command_when_its_owner_is_killed(tmp_path: Path):
    """An owner that starts the keeper and is killed; the command and its child are gone."""
    pids = tmp_path / "pids"
    command = f"sleep 600 & echo $! $$ > {shlex.quote(str(pids))}; wait"
    owner = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, {str(KEEPER)!r}, 'sh', '-c', {command!r}], stdin=subprocess.PIPE);"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", owner]) as process:
        deadline = time.monotonic() + 60
        while not (pids.exists() and pids.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    for pid in pids.read_text().split():
        until(lambda pid=int(pid): not alive(pid), "the end of the process", seconds=60)
