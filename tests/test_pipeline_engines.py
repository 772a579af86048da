"""The whole pipeline through the other engines: a scripted vLLM and a scripted server in place of the real ones."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import selfsteer
from selfsteer.engines.openai import ServerError
from selfsteer.recipe.sections import Recipe

RecipeOf = Callable[..., dict[str, Any]]

VLLM = """#!PYTHON
import sys
if sys.argv[1] == "-c":
    print("vllm-is-there 0.0 0")
    sys.exit()
import json, os, pathlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
log, arguments = pathlib.Path(LOG), sys.argv[1:]
model = arguments[arguments.index("--model") + 1]
with log.open("a") as file:
    print("start", model, file=file)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer({"data": [{"id": "m"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with log.open("a") as file:
            print(json.dumps([model, asked["prompt"], asked["seed"]]), file=file)
        if log.read_text().count("\\n") == DIES_AFTER:
            os.kill(os.getpid(), 9)
        ids = [10 + (asked["seed"] >> shift) % 300 for shift in range(0, 24, 3)]
        self.answer({"choices": [{"text": "", "token_ids": [*ids, 2], "finish_reason": "stop"}]})
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""

SERVER = """
import json, pathlib, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
log, model, port, *adapters = sys.argv[1:]
with open(log, "a") as file:
    print("started with", [pathlib.Path(model).name, *(adapter.partition("=")[0] for adapter in adapters)], file=file)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer({"data": [{"id": model}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(log, "a") as file:
            print(asked["model"], file=file)
        words = ["fox", "dog", "bottle", "water", "story", "letter", "capital", "drops"]
        text = " ".join(words[(asked["seed"] >> shift) % 8] for shift in range(0, 24, 3))
        self.answer({"choices": [{"finish_reason": "stop", "message": {"content": text}}]})
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


def run(recipe: dict[str, Any]) -> Any:
    return selfsteer.run(Recipe.model_validate(recipe))


def put_vllm(folder: Path, *, dies_after: int = -1) -> tuple[str, Path]:
    """An interpreter with a scripted vLLM, and the log of what it is asked."""
    log, script = folder / "vllm.log", folder / "python"
    filled = VLLM.replace("PYTHON", sys.executable).replace("LOG", repr(str(log))).replace("DIES_AFTER", str(dies_after))
    script.write_text(filled, encoding="utf-8")
    script.chmod(0o755)
    return str(script), log


def durable_tokens(folder: Path) -> list[tuple[int, ...]]:
    parts = sorted((folder / "parts").glob("*.jsonl"))
    return [tuple(json.loads(line)["data"]["token_ids"]) for part in parts for line in part.read_text().splitlines()]


def test_a_run_on_vllm_whose_server_is_killed_continues(recipe_of: RecipeOf, tmp_path: Path):
    """The stage ends with an error; the same command asks for no sample that is durable."""
    output = tmp_path / "run"
    python, log = put_vllm(tmp_path, dies_after=9)
    recipe = recipe_of(output, {"engine.kind": "vllm", "engine.max_num_seqs": 2, "engine.python": python})
    with pytest.raises(ServerError, match="SIGKILL"):
        run(recipe)
    durable = durable_tokens(output / "round-1/2-responses")
    assert durable, "what was finished when the server died is kept"
    asked_before = [line for line in log.read_text().splitlines() if not line.startswith("start ")]
    log.unlink()
    put_vllm(tmp_path)
    run(recipe)
    lines = log.read_text().splitlines()
    models = [line.removeprefix("start ") for line in lines if line.startswith("start ")]
    assert models == [recipe["policy"]["model"], str(output / "round-1/4-generator/model")]
    asked = [line for line in lines if not line.startswith("start ")]
    assert len(set(asked)) == len(asked)
    again = set(asked) & set(asked_before)
    assert len(again) <= len(asked_before) - len(durable), "only what was not finished is asked for again"
    sampled = durable_tokens(output / "round-1/2-responses")
    assert sampled[: len(durable)] == durable
    rows = pq.read_table(output / "round-1/5-preferences/data.parquet").to_pylist()
    assert rows


def test_a_run_on_servers_that_the_stages_start(recipe_of: RecipeOf, tmp_path: Path):
    output, log, script = tmp_path / "run", tmp_path / "server.log", tmp_path / "server.py"
    script.write_text(SERVER, encoding="utf-8")
    command = shlex.join([sys.executable, str(script), str(log)]) + " {model} {port}"
    recipe = recipe_of(output) | {"engine": {"kind": "openai", "serve": command}}
    run(recipe)
    held = [line for line in dict.fromkeys(log.read_text().splitlines()) if not line.startswith("started")]
    assert held == [recipe["policy"]["model"], str(output / "round-1/4-generator/model")], "each stage serves its model"


def test_a_dual_generator_is_served_as_two_adapters_of_one_model(recipe_of: RecipeOf, tmp_path: Path):
    """One server in stage 5 where it can take adapters, else two, each with a merged one; with the same keys."""
    script = tmp_path / "server.py"
    script.write_text(SERVER, encoding="utf-8")
    changes = {"generator.kind": "dual", "generator.max_steps": 1, "alignment.max_steps": 1, "training.lora": {"rank": 2}}
    keys: list[set[str]] = []
    servers: list[list[str]] = []
    asked: list[set[str]] = []
    for name, engine in (("adapters", {"serve_adapters": "{adapters}"}), ("merged", {})):
        log, output = tmp_path / f"{name}.log", tmp_path / name
        command = shlex.join([sys.executable, str(script), str(log)]) + " {model} {port}"
        run(recipe_of(output, changes) | {"engine": {"kind": "openai", "serve": command, **engine}})
        lines = log.read_text().splitlines()
        servers.append([line.removeprefix("started with ") for line in lines if line.startswith("started")])
        asked.append({line for line in lines if not line.startswith("started")})
        parts = (output / "round-1/5-preferences/parts").glob("*.jsonl")
        keys.append({json.loads(line)["key"] for part in parts for line in part.read_text().splitlines()})
    assert servers == [["['tiny']", "['tiny', 'good', 'bad']"], ["['tiny']", "['model']", "['model']"]]
    folders = {str(tmp_path / f"merged/round-1/4-generator-{half}/model") for half in ("good", "bad")}
    policy = recipe_of(tmp_path)["policy"]["model"]
    assert asked == [{policy, "good", "bad"}, {policy} | folders]
    assert keys[0] == keys[1]


def test_a_lora_generator_is_sampled_as_its_adapter(recipe_of: RecipeOf, tmp_path: Path):
    """What it is merged into may be rounded; an engine that takes no adapters gets it, with the same keys."""
    script = tmp_path / "server.py"
    script.write_text(SERVER, encoding="utf-8")
    changes = {"generator.max_steps": 1, "alignment.max_steps": 1, "training.lora": {"rank": 2}}
    keys: list[set[str]] = []
    asked: list[set[str]] = []
    for name, engine in (("adapters", {"serve_adapters": "{adapters}"}), ("merged", {})):
        log, output = tmp_path / f"{name}.log", tmp_path / name
        command = shlex.join([sys.executable, str(script), str(log)]) + " {model} {port}"
        run(recipe_of(output, changes) | {"engine": {"kind": "openai", "serve": command, **engine}})
        asked.append({line for line in log.read_text().splitlines() if not line.startswith("started")})
        parts = (output / "round-1/5-preferences/parts").glob("*.jsonl")
        keys.append({json.loads(line)["key"] for part in parts for line in part.read_text().splitlines()})
    policy = recipe_of(tmp_path)["policy"]["model"]
    assert asked == [{policy, "generator"}, {policy, str(tmp_path / "merged/round-1/4-generator/model")}]
    assert keys[0] == keys[1]


def test_principles_are_asked_for_again_from_the_same_engine(recipe_of: RecipeOf, tmp_path: Path):
    """What vLLM writes never parses, so each of the six queries is asked three times, by one server."""
    python, log = put_vllm(tmp_path)
    changes = {
        "engine.kind": "vllm",
        "engine.python": python,
        "principles.source": "generate",
        "generator.kind": "none",
        "alignment.max_steps": 1,
    }
    run(recipe_of(tmp_path / "run", changes))
    lines = log.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("start")]
    assert starts == [0, 1 + 3 * 6]


def test_what_an_engine_lacks_is_said_before_anything_is_written(recipe_of: RecipeOf, tmp_path: Path):
    output = tmp_path / "run"
    for engine, lacks in (
        ({"kind": "vllm", "python": "/no/python"}, "no Python interpreter"),
        ({"kind": "vllm", "python": "false"}, "has no vLLM that can be used"),
        ({"kind": "openai", "serve": "/no/vllm serve {model} --port {port}"}, "no program '/no/vllm'"),
    ):
        with pytest.raises(ValueError, match=lacks):
            run(recipe_of(output) | {"engine": engine})
    server = {"kind": "openai", "base_url": "http://h/v1", "model": "m", "api_key_env": "NOT_THERE_X"}
    with pytest.raises(ValueError, match="NOT_THERE_X"):
        run(recipe_of(output, {"principles.source": "generate", "principles.engine": server}))
    assert not output.exists()
