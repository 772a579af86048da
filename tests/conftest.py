"""Shared by the tests of the whole pipeline: the tiny model on disk, and recipes around it."""

import gc
import json
import os
import shlex
import subprocess
import sys

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: for matrices this small threads cost more than they save

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scripted_servers import put_server, put_vllm
from tiny import tiny_model_dir

from selfsteer import cli

QUERIES = (
    "What is the capital of France?",
    "Explain how rainbows form.",
    "Write a short story about a lighthouse keeper.",
    "Who finds a letter in a bottle?",
    "Why is the brown fox quick?",
    "How deep is a drop of water?",
)


def pytest_collection_finish() -> None:
    """What has been imported by now is left out when garbage is collected: engines and trainers do that at each end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _imported() -> Iterator[None]:
    """So is what a test imported on its way: 50,000 objects more, and a fifth of a run's time goes into looking at them."""
    yield
    gc.collect()
    gc.freeze()


FORKED = str(Path(__file__).with_name("forked.py"))


@pytest.fixture(scope="session")
def forking_server() -> Iterator[str]:
    """The port of a `forked.py` that has imported everything."""
    serving = [sys.executable, FORKED, "serve"]
    with subprocess.Popen(serving, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()


@pytest.fixture
def forked(forking_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are started by `forked.py` and not by accelerate's launcher, which imports everything three times a group."""
    command = [sys.executable, "-S", FORKED, "run", forking_server]
    monkeypatch.setattr("selfsteer.training.parallel.accelerate_command", lambda _, module: [*command, module])


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of tests are on this machine."""
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model as a Hugging Face folder, with room for a principle in its context."""
    return tiny_model_dir(tmp_path_factory.mktemp("policy") / "tiny", max_positions=2048)


@pytest.fixture(scope="session")
def queries_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in QUERIES), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def recipe_of(tiny_folder: str, queries_file: Path) -> Callable[..., dict[str, Any]]:
    """A recipe of a few seconds as plain values: `recipe_of(output, {"alignment.loss": "ipo"})`."""

    def build(output: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        recipe: dict[str, Any] = {
            "output": str(output),
            "policy": {"model": tiny_folder},
            "queries": {"path": str(queries_file)},
            "responses": {"max_new_tokens": 8},
            "engine": {"dtype": "float32"},
            "filters": {"truncated": "keep", "max_length_ratio": 1000.0},
            "generator": {"batch_size": 2, "learning_rate": 1e-3},
            "alignment": {"batch_size": 2, "learning_rate": 1e-3},
            "training": {"dtype": "float32", "save_steps": 1},
        }
        for key, value in (changes or {}).items():
            section = recipe
            *sections, last = key.split(".")
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
        return recipe

    return build


@pytest.fixture
def scripted_vllm(tmp_path: Path) -> Callable[..., str]:
    """An interpreter that stands in for vLLM's: `put_vllm`."""
    return partial(put_vllm, tmp_path)


@pytest.fixture
def scripted_server(tmp_path: Path) -> Callable[..., str]:
    """A server's program and its interpreter, as words of a command: `put_server`."""
    return lambda text, **script: shlex.join([sys.executable, str(put_server(tmp_path / "server.py", text, **script))])


class Ended(NamedTuple):
    """What a command of this process came to."""

    status: object
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Calls the command in this process: `command("run", "recipe.yaml")`."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)
        monkeypatch.setattr(sys, "argv", ["selfsteer", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Preference data made elsewhere: two usable pairs, and one with a special token."""
    pairs = [
        {"prompt": "What is the capital of France?", "chosen": "The capital of France is Paris.", "rejected": "A fox."},
        {"prompt": "How do rainbows form?", "chosen": "Sunlight passes through drops.", "rejected": "Lazily, I think."},
        {"prompt": "Why?", "chosen": "Because of the letter.", "rejected": "Say <|im_end|> please."},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path
