"""The whole pipeline through the other engines: a scripted vLLM and a scripted server in place of the real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from builders import run

from selfsteer.engines.openai import ServerError

RecipeOf = Callable[..., dict[str, Any]]

WORDS = (
    '" ".join("fox dog bottle water story letter capital drops".split()[(asked["seed"] >> n) % 8] for n in range(0, 24, 3))'
)
"""Words that depend on the seed."""


Put = Callable[..., str]


def logging_vllm(scripted_vllm: Put, log: Path, *, dies_after: int = -1) -> str:
    """An interpreter with a scripted vLLM, which logs its starts and what it is asked, and dies after so many lines."""
    note = f"with open({str(log)!r}, 'a') as file: print("
    during = (
        f"{note}json.dumps([model, asked['prompt'], asked['seed']]), file=file)\n"
        f"if pathlib.Path({str(log)!r}).read_text().count(chr(10)) >= {dies_after} > 0: os.kill(os.getpid(), 9)\n"
        f"choice['token_ids'] = [*(10 + (asked['seed'] >> n) % 300 for n in range(0, 24, 3)), 2]"
    )
    before = f"model = arguments[arguments.index('--model') + 1]\n{note}'start', model, file=file)"
    return scripted_vllm(before=before, during=during)


def logging_server(scripted_server: Put, log: Path) -> str:
    """The command of a server of words, which logs the models that it is started with and those that are asked."""
    note = f"with open({str(log)!r}, 'a') as file: print("
    names = "[pathlib.Path(model).name, *(word.partition('=')[0] for word in words)]"
    before, during = f"{note}'started with', {names}, file=file)", f"{note}asked['model'], file=file)"
    return scripted_server(WORDS, name="model", before=before, during=during) + " {model} {port}"


def durable_tokens(folder: Path) -> list[tuple[int, ...]]:
    parts = sorted((folder / "parts").glob("*.jsonl"))
    return [tuple(json.loads(line)["data"]["token_ids"]) for part in parts for line in part.read_text().splitlines()]


def test_a_run_on_vllm_whose_server_is_killed_continues(recipe_of: RecipeOf, scripted_vllm: Put, tmp_path: Path):
    """The stage ends with an error; the same command asks for no sample that is durable."""
    output, log = tmp_path / "run", tmp_path / "vllm.log"
    python = logging_vllm(scripted_vllm, log, dies_after=9)
    recipe = recipe_of(output, {"engine.kind": "vllm", "engine.max_num_seqs": 2, "engine.python": python})
    with pytest.raises(ServerError, match="SIGKILL"):
        run(recipe)
    durable = durable_tokens(output / "round-1/2-responses")
    assert durable, "what was finished when the server died is kept"
    asked_before = [line for line in log.read_text().splitlines() if not line.startswith("start ")]
    log.unlink()
    logging_vllm(scripted_vllm, log)
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


def test_a_run_on_servers_that_the_stages_start(recipe_of: RecipeOf, scripted_server: Put, tmp_path: Path):
    output, log = tmp_path / "run", tmp_path / "server.log"
    recipe = recipe_of(output) | {"engine": {"kind": "openai", "serve": logging_server(scripted_server, log)}}
    run(recipe)
    held = [line for line in dict.fromkeys(log.read_text().splitlines()) if not line.startswith("started")]
    assert held == [recipe["policy"]["model"], str(output / "round-1/4-generator/model")], "each stage serves its model"


def test_a_dual_generator_is_served_as_two_adapters_of_one_model(recipe_of: RecipeOf, scripted_server: Put, tmp_path: Path):
    """One server in stage 5 where it can take adapters, else two, each with a merged one; with the same keys."""
    changes = {"generator.kind": "dual", "generator.max_steps": 1, "alignment.max_steps": 1, "training.lora": {"rank": 2}}
    keys: list[set[str]] = []
    servers: list[list[str]] = []
    asked: list[set[str]] = []
    for name, engine in (("adapters", {"serve_adapters": "{adapters}"}), ("merged", {})):
        log, output = tmp_path / f"{name}.log", tmp_path / name
        command = logging_server(scripted_server, log)
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


def test_a_lora_generator_is_sampled_as_its_adapter(recipe_of: RecipeOf, scripted_server: Put, tmp_path: Path):
    """What it is merged into may be rounded; an engine that takes no adapters gets it, with the same keys."""
    changes = {"generator.max_steps": 1, "alignment.max_steps": 1, "training.lora": {"rank": 2}}
    keys: list[set[str]] = []
    asked: list[set[str]] = []
    for name, engine in (("adapters", {"serve_adapters": "{adapters}"}), ("merged", {})):
        log, output = tmp_path / f"{name}.log", tmp_path / name
        command = logging_server(scripted_server, log)
        run(recipe_of(output, changes) | {"engine": {"kind": "openai", "serve": command, **engine}})
        asked.append({line for line in log.read_text().splitlines() if not line.startswith("started")})
        parts = (output / "round-1/5-preferences/parts").glob("*.jsonl")
        keys.append({json.loads(line)["key"] for part in parts for line in part.read_text().splitlines()})
    policy = recipe_of(tmp_path)["policy"]["model"]
    assert asked == [{policy, "generator"}, {policy, str(tmp_path / "merged/round-1/4-generator/model")}]
    assert keys[0] == keys[1]


def test_principles_are_asked_for_again_from_the_same_engine(recipe_of: RecipeOf, scripted_vllm: Put, tmp_path: Path):
    """What vLLM writes never parses, so each of the six queries is asked three times, by one server."""
    log = tmp_path / "vllm.log"
    python = logging_vllm(scripted_vllm, log)
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
