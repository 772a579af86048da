"""kind: vllm against scripted interpreters: what the server is started with, how it is guarded, how its end is told.

The real vLLM is in tests/real/.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import END_ID, tiny_model_dir
from waiting import alive, until

from selfsteer.engines import serving
from selfsteer.engines.base import Completion, Engine, Failed, Request, Sampling
from selfsteer.engines.open import check_engines, open_engine
from selfsteer.engines.openai import ServerError
from selfsteer.models import checkpoint, load_tokenizer
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import VllmSection
from selfsteer.recipe.sections import Recipe
from selfsteer.records import Adapter, Checkpoint


@pytest.fixture
def model(tiny_folder: str) -> Checkpoint:
    return checkpoint(Path(tiny_folder))


@pytest.fixture
def open_vllm(model: Checkpoint) -> Callable[..., Engine]:
    prompts = Prompts(load_tokenizer(model.path))

    def build(python: str, *, adapters: tuple[Adapter, ...] = (), **fields: Any) -> Engine:
        section = VllmSection(kind="vllm", python=python, **fields)
        return open_engine(section, model, prompts, trust_remote_code=False, adapters=adapters)

    return build


def started(python: str) -> dict[str, Any]:
    (file,) = (Path(python).parent / "started").iterdir()
    return json.loads(file.read_text()) | {"pid": int(file.name)}


def options(words: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[word] = []
        elif found:
            found[list(found)[-1]].append(word)
    return found


def requests(count: int) -> Iterator[Request]:
    for i in range(count):
        yield Request(key=f"k{i}", messages=(), prompt_ids=(10 + i,), sampling=Sampling(), seed=100 + i)


def test_what_was_sampled_comes_back_as_ids(
    scripted_vllm: Callable[..., str], open_vllm: Callable[..., Engine], model: Checkpoint
):
    """The end token apart, and the text decoded here."""
    tokenizer = load_tokenizer(model.path)
    with open_vllm(scripted_vllm()) as engine:
        answers = {answer.key: answer for answer in engine.generate(requests(30))}
    assert answers.keys() == {f"k{i}" for i in range(30)}
    for i in range(30):
        text = tokenizer.decode([10 + i, 20])
        key = f"k{i}"
        expected = Completion(key=key, text=text, token_ids=(10 + i, 20), end_id=END_ID, finish_reason="stop")
        assert answers[key] == expected


@pytest.mark.parametrize("on_cpu", [0, 1])
def test_a_request_carries_its_end_tokens_and_its_seed(
    on_cpu: int, scripted_vllm: Callable[..., str], open_vllm: Callable[..., Engine], tmp_path: Path
):
    """On a CPU no seed: vLLM dies on it there."""
    during = f"open({str(tmp_path / 'asked')!r}, 'w').write(json.dumps(asked))"
    with open_vllm(scripted_vllm(during=during, on_cpu=on_cpu)) as engine:
        list(engine.generate(requests(1)))
    asked = json.loads((tmp_path / "asked").read_text())
    seed = asked.pop("seed", None)
    assert seed == (None if on_cpu else 100)
    assert asked == {
        "model": "the model",
        "prompt": [10],
        "return_token_ids": True,
        "stop_token_ids": [END_ID],
        "temperature": 0.7,
        "top_p": 0.8,
        "max_tokens": 2048,
        "n": 1,
        "stream": False,
    }


def test_settings_become_arguments(scripted_vllm: Callable[..., str], open_vllm: Callable[..., Engine], model: Checkpoint):
    """Ranks 4 and 24 need room for 32."""
    python = scripted_vllm()
    adapters = (Adapter(name="good", path="/a/good", rank=4), Adapter(name="bad", path="/a/bad b", rank=24))
    extra = {
        "quantization": "fp8",
        "compilation_config": {"level": 0},
        "enable_chunked_prefill": False,
        "disable_log_stats": True,
    }
    with open_vllm(
        python,
        adapters=adapters,
        extra=extra,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=7,
        gpu_memory_utilization=0.25,
        enable_prefix_caching=False,
        enforce_eager=True,
    ):
        words = started(python)["arguments"]
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    found = options(words)
    assert found.pop("--port")[0].isdigit()
    assert found == {
        "--model": [model.path],
        "--host": ["127.0.0.1"],
        "--generation-config": ["vllm"],
        "--disable-uvicorn-access-log": [],
        "--dtype": ["float32"],
        "--tensor-parallel-size": ["1"],
        "--max-num-seqs": ["7"],
        "--max-model-len": ["512"],
        "--gpu-memory-utilization": ["0.25"],
        "--no-enable-prefix-caching": [],
        "--enforce-eager": [],
        "--enable-lora": [],
        "--max-loras": ["2"],
        "--max-lora-rank": ["32"],
        "--quantization": ["fp8"],
        "--compilation-config": ['{"level": 0}'],
        "--no-enable-chunked-prefill": [],
        "--disable-log-stats": [],
        "--lora-modules": ["good=/a/good", "bad=/a/bad b"],
    }


def test_requests_name_their_adapters(scripted_vllm: Callable[..., str], open_vllm: Callable[..., Engine]):
    names = ("good", "bad", None)
    wanted = [replace(request, adapter=name) for request, name in zip(requests(3), names, strict=True)]
    during = 'choice["token_ids"] = [{"good": 11, "bad": 12, "the model": 13}[asked["model"]]]'
    adapters = tuple(Adapter(name=name, path=f"/{name}", rank=8) for name in ("good", "bad"))
    with open_vllm(scripted_vllm(during=during), adapters=adapters) as engine:
        answers = {answer.key: answer for answer in engine.generate(wanted)}
    assert [answers[f"k{i}"].token_ids for i in range(3)] == [(11,), (12,), (13,)]  # type: ignore[union-attr]


def test_replicas_are_data_parallel(
    scripted_vllm: Callable[..., str], open_vllm: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    """One server, which sees all GPUs and deals them out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    python = scripted_vllm()
    with open_vllm(python, replicas=2, tensor_parallel_size=2):
        said = started(python)
    found = options(said["arguments"])
    assert (found["--data-parallel-size"], found["--tensor-parallel-size"], said["devices"]) == (["2"], ["2"], "3,5,6,7")
    for replicas, size in ((2, 3), (1, 6)):
        with pytest.raises(ValueError, match=rf"{replicas} x {size} GPUs are 6, CUDA_VISIBLE_DEVICES names 4"):
            open_vllm(python, replicas=replicas, tensor_parallel_size=size)


def test_the_key_is_random_and_in_the_environment_alone(
    scripted_vllm: Callable[..., str],
    open_vllm: Callable[..., Engine],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    caplog.set_level("DEBUG")
    monkeypatch.setattr(serving, "_DYING", 0.1)  # it lives, and has no last words
    python = scripted_vllm(during='choice = {"finish_reason": "stop", "text": "x", "token_ids": [key]}')
    keys: list[str] = []
    for _ in range(2):
        with open_vllm(python) as engine:
            said = started(python)
            key = said["key"]
            command = Path(f"/proc/{said['pid']}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            assert "--port" in command
            with pytest.raises(ServerError) as raised:  # what the server repeats is no token
                list(engine.generate(requests(1)))
        keys.append(key)
        (Path(python).parent / "started" / str(said["pid"])).unlink()
        for shown in (command, caplog.text, str(raised.value), repr(engine)):
            assert key not in shown
        assert len(key) >= 32
    assert keys[0] != keys[1]


def test_a_refused_prompt_fails_alone(scripted_vllm: Callable[..., str], open_vllm: Callable[..., Engine]):
    """Of two tokens: the server is asked for one token behind the first of them, whether it is well."""
    during = 'if asked["prompt"] == [1, 11]: return self.answer({"error": "too long"}, 400)'
    with open_vllm(scripted_vllm(during=during)) as engine:
        wanted = (replace(each, prompt_ids=(1, *each.prompt_ids)) for each in requests(3))
        answers = {answer.key: answer for answer in engine.generate(wanted)}
    refused = answers.pop("k1")
    assert isinstance(refused, Failed)
    assert refused.reason == "refused by the server"
    assert all(isinstance(answer, Completion) for answer in answers.values())


def test_a_killed_server_is_an_error_after_what_is_finished(
    scripted_vllm: Callable[..., str], open_vllm: Callable[..., Engine]
):
    out_of_memory = 'print("CUDA error: out of memory", file=sys.stderr, flush=True); os.kill(os.getpid(), 9)'
    finished: list[str] = []
    python = scripted_vllm(during=f'if asked["prompt"] == [13]: {out_of_memory}')
    with open_vllm(python, max_num_seqs=1) as engine, pytest.raises(ServerError) as caught:
        finished.extend(answer.key for answer in engine.generate(requests(9)))
    assert set(finished) <= {"k0", "k1", "k2", "k4"}
    assert len(finished) >= 2, "two are in flight: k3 is sent when two of those before it have come back"
    assert "the server has ended (status 137, SIGKILL)" in str(caught.value)
    assert "CUDA error: out of memory" in str(caught.value)
    assert "the same command continues" in str(caught.value)


def test_a_server_that_does_not_start_says_why(scripted_vllm: Callable[..., str], open_vllm: Callable[..., Engine]):
    python = scripted_vllm(before='sys.exit("no memory for the cache")')
    with pytest.raises(ServerError, match=r"ended with status 1 before .*\n.*no memory for the cache"), open_vllm(python):
        pass


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/no/python", r"'/no/python' is no Python interpreter"),
        ("false", r"'false' has no vLLM .*\(status 1: it said nothing"),
        ("true", r"'true' has no vLLM .*\(status 0: it said nothing"),
        (sys.executable, r"has no vLLM .*can't import vLLM: No module named 'vllm'"),
        (str(Path(__file__).parent), r"is no Python interpreter"),
        ("sleeper", r"can't be used \(.*timed out"),
    ],
)
def test_an_interpreter_without_vllm_is_refused_before_anything_starts(
    python: str,
    said: str,
    scripted_vllm: Callable[..., str],
    open_vllm: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
):
    if python == "sleeper":
        monkeypatch.setattr(serving, "_PROBE_SECONDS", 0.2)
        python = scripted_vllm(probe="import time; time.sleep(60)")
    with pytest.raises(ValueError, match=rf"engine\.python: .*{said}"):
        open_vllm(python)


OWNER = """
import sys, time
from pathlib import Path
from selfsteer.engines.serving import Serve, ServedEngine
serve = Serve(command=[*sys.argv[1:], "--port", "{port}"], model_path="m", start_seconds=60, key_env="VLLM_API_KEY")
with ServedEngine(serve, lambda address: __import__("contextlib").nullcontext()):
    print("open", flush=True)
    time.sleep(600)
"""


def test_a_server_ends_with_the_process_that_started_it(scripted_vllm: Callable[..., str]):
    """kill -9 of the one that samples: its end of the pipe closes, and the keeper ends the server."""
    python = scripted_vllm()
    with subprocess.Popen([sys.executable, "-c", OWNER, python, "-m"], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        owner.kill()
    pid = started(python)["pid"]
    until(lambda: not alive(pid), "the end of the server", seconds=60)


def test_a_server_ends_with_its_keeper(scripted_vllm: Callable[..., str]):
    """kill -9 of the keeper itself, as by someone who kills all processes of a run one by one."""
    python = scripted_vllm()
    with subprocess.Popen([sys.executable, "-c", OWNER, python, "-m"], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        pid = started(python)["pid"]
        keeper = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert b"keeper.py" in Path(f"/proc/{keeper}/cmdline").read_bytes()
        os.kill(keeper, signal.SIGKILL)
        until(lambda: not alive(pid), "the end of the server", seconds=60)
        owner.kill()


# --- room and rows ---------------------------------------------------------------------------------------------------------


def test_ids_without_a_token_are_never_sampled(scripted_vllm: Callable[..., str], tmp_path: Path):
    """The embedding has 9 rows more than the tokenizer has tokens."""
    folder = tiny_model_dir(tmp_path / "model", spare_rows=9)
    tokenizer = load_tokenizer(folder)
    size = len(tokenizer)
    python = scripted_vllm(during=f"open({str(tmp_path / 'asked')!r}, 'w').write(json.dumps(asked))")
    section = VllmSection(kind="vllm", python=python)
    with open_engine(section, checkpoint(Path(folder)), Prompts(tokenizer), trust_remote_code=False) as engine:
        list(engine.generate(requests(1)))
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked["logit_bias"] == {str(size + row): -100 for row in range(9)}


@pytest.mark.parametrize("kind", ["vllm", "ray"])
def test_no_room_for_a_response_is_said_at_the_start(kind: str, model: Checkpoint, recipe_of: Callable[..., dict[str, Any]]):
    """vLLM would refuse every request, and every row would be dropped."""
    vllm: dict[str, Any] = {"kind": "vllm", "max_model_len": 64}
    changes = {"engine": vllm if kind == "vllm" else {"kind": "ray", "replica": vllm}, "responses.max_new_tokens": 60}
    recipe = Recipe.model_validate(recipe_of(Path("run"), changes))
    with pytest.raises(ValueError, match=r"engine\.max_model_len: 64 tokens .*responses\.max_new_tokens is 60"):
        check_engines(recipe, model, Prompts(load_tokenizer(model.path)))
