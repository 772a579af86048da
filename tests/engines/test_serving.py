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
from selfsteer.engines.openai import OpenAIEngine, ServerError, Tokens
from selfsteer.engines.serving import KEEPER, Address, Serve, ServedEngine
from selfsteer.recipe.engines import OpenAISection
from selfsteer.records import Adapter

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
model, port = sys.argv[1:]
print("serving", model, flush=True)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer({"data": [{"id": "served " + os.path.basename(model)}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = f"{asked['model']}, {os.getpid()}"
        self.answer({"choices": [{"finish_reason": "stop", "message": {"content": text}}]})
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


def connect(address: Address) -> OpenAIEngine:
    section = OpenAISection(kind="openai", base_url=address.base_url, model=address.model)
    return OpenAIEngine(section, Tokens(encode=lambda text: (len(text),)))


@pytest.fixture
def served(tmp_path: Path) -> Callable[..., ServedEngine]:
    script = tmp_path / "server.py"
    script.write_text(SERVER, encoding="utf-8")

    def build(command: str | None = None, *, start_seconds: float = 60) -> ServedEngine:
        command = command or f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{model}} {{port}}"
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


def test_adapters_are_words_of_the_command_and_models_of_the_server(tmp_path: Path):
    script, words = tmp_path / "server.py", tmp_path / "words"
    said = f"open({str(words)!r}, 'w').write(repr(sys.argv[3:]))\n"
    script.write_text(SERVER.replace("model, port = sys.argv[1:]", f"model, port = sys.argv[1:3]\n{said}"), encoding="utf-8")
    adapters = (Adapter(name="good", path="/runs/an adapter", rank=8), Adapter(name="bad", path="/runs/b", rank=8))
    serve = Serve(
        command=[sys.executable, str(script), "{model}", "{port}", "--lora-modules", "{adapters}"],
        model_path="/models/m",
        start_seconds=60,
        adapters=adapters,
    )
    request = Request(
        key="k", messages=({"role": "user", "content": "?"},), prompt_ids=(1,), sampling=Sampling(), seed=0, adapter="bad"
    )
    with ServedEngine(serve, connect) as engine:
        (answer,) = engine.generate([request])
    assert words.read_text() == "['--lora-modules', 'good=/runs/an adapter', 'bad=/runs/b']"
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
