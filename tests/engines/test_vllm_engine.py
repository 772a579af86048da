"""The vLLM engine against a scripted worker: the protocol, who gets what, and how a worker's end is told.

The real vLLM is in tests/engines/.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import alive, until

from selfsteer.engines import vllm
from selfsteer.engines.base import Completion, Failed, Request, Sampling
from selfsteer.engines.vllm import VllmEngine, VllmSettings, WorkerError
from selfsteer.records import Adapter

END = 2

WORKER = """
import json, os, sys
start = json.loads(sys.stdin.readline())
open(os.environ["STARTED"] + f"/{os.getpid()}", "w").write(json.dumps([start, os.environ.get("CUDA_VISIBLE_DEVICES")]))
def say(message):
    print(json.dumps(message), flush=True)
BEFORE
say({"ready": {"version": "0", "seeded": True}})
for line in sys.stdin:
    request = json.loads(line)
    ids = request["prompt_ids"]
    answer = {"id": request["id"], "token_ids": [*ids, request["seed"], 2], "finish_reason": "stop", "logps": [-0.5] * 2}
    DURING
    say(answer)
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a worker of this script in place; returns the folder in which each says what it was started with."""

    def put(*, before: str = "", during: str = "pass") -> Path:
        script = tmp_path / "worker.py"
        script.write_text(WORKER.replace("BEFORE", before).replace("DURING", during), encoding="utf-8")
        monkeypatch.setattr(vllm, "WORKER", script)
        started = tmp_path / "started"
        started.mkdir()
        monkeypatch.setenv("STARTED", str(started))
        return started

    return put


def engine(**settings: object) -> VllmEngine:
    return VllmEngine(
        "model",
        VllmSettings(**settings),
        decode=lambda ids: " ".join(map(str, ids)),
        end_ids={END},  # type: ignore[arg-type]
    )


def requests(count: int) -> Iterator[Request]:
    for i in range(count):
        yield Request(key=f"k{i}", messages=(), prompt_ids=(10 + i,), sampling=Sampling(), seed=100 + i)


def test_answers_come_back_as_records_without_the_end_token(scripted: Callable[..., Path]):
    scripted()
    with engine() as opened:
        (answer,) = opened.generate(requests(1))
    assert answer == Completion(key="k0", text="10 100", token_ids=(10, 100), finish_reason="stop", logps=(-0.5, -0.5))


def test_likely_first_tokens_are_told_where_they_were_asked_for(scripted: Callable[..., Path]):
    """As texts, of which several tokens may have the same; what is impossible is left out."""
    said = "[[7, -0.5], [8, -1.5], [9, -float('inf')]][: request['top_logps']]"
    scripted(during=f"if request['top_logps']: answer['first_logps'] = {said}")
    (request,) = requests(1)
    with engine() as opened:
        (asked,) = opened.generate([replace(request, top_logps=3)])
        (unasked,) = opened.generate([request])
    assert isinstance(asked, Completion)
    assert isinstance(unasked, Completion)
    assert asked.first_logps == (("7", -0.5), ("8", -1.5))
    assert unasked.first_logps is None


def test_every_request_is_answered_once_and_pulled_lazily(scripted: Callable[..., Path]):
    scripted()
    pulled: list[str] = []

    def noted() -> Iterator[Request]:
        for request in requests(50):
            pulled.append(request.key)
            yield request

    with engine(max_num_seqs=4, replicas=2) as opened:
        answers = opened.generate(noted())
        first = next(answers)
        assert len(pulled) <= 2 * 5 + 1, "a quarter more than are sampled side by side, in each replica"
        keys = [first.key, *(answer.key for answer in answers)]
        again = [answer.key for answer in opened.generate(requests(3))]
    assert sorted(keys) == sorted(f"k{i}" for i in range(50))
    assert sorted(again) == ["k0", "k1", "k2"]


def test_requests_name_their_adapters(scripted: Callable[..., Path]):
    """Ranks 4 and 24 need room for 32, and the responses of a batch may use both."""
    started = scripted(during='answer["token_ids"] = [{"good": 1, "bad": 0, None: 5}[request["adapter"]]]')
    adapters = (Adapter(name="good", path="/a/good", rank=4), Adapter(name="bad", path="/a/bad", rank=24))
    names = ("good", "bad", None)
    wanted = [replace(request, adapter=name) for request, name in zip(requests(3), names, strict=True)]
    with engine(adapters=adapters) as opened:
        answers = {answer.key: answer for answer in opened.generate(wanted)}
    assert [answers[f"k{i}"].text for i in range(3)] == ["1", "0", "5"]  # type: ignore[union-attr]
    (file,) = started.iterdir()
    (start, _) = json.loads(file.read_text())
    assert start["adapters"] == {"good": "/a/good", "bad": "/a/bad"}
    assert start["engine"].items() >= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 32}.items()


def test_replicas_have_gpus_of_their_own(scripted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    started = scripted()
    with engine(replicas=2, tensor_parallel_size=2):
        pids = [int(file.name) for file in started.iterdir()]
    devices = sorted(file.read_text().split("}, ")[-1] for file in started.iterdir())
    assert devices == ['"3,5"]', '"6,7"]']
    assert not any(map(alive, pids)), "the engine is closed, and so the GPUs are free"
    with pytest.raises(ValueError, match="2 replicas of 3 GPUs need 6, CUDA_VISIBLE_DEVICES names 4"):
        engine(replicas=2, tensor_parallel_size=3)


def test_a_refused_prompt_fails_alone(scripted: Callable[..., Path]):
    scripted(during='if ids == [11]: answer = {"id": request["id"], "refused": "too long"}')
    with engine() as opened:
        answers = {answer.key: answer for answer in opened.generate(requests(3))}
    assert answers["k1"] == Failed(key="k1", reason="refused by vLLM", detail="too long")
    assert isinstance(answers["k0"], Completion)
    assert isinstance(answers["k2"], Completion)


def test_a_generation_that_was_aborted_is_no_answer(scripted: Callable[..., Path]):
    scripted(during='answer["finish_reason"] = "abort"')
    with engine() as opened:
        (answer,) = opened.generate(requests(1))
    assert isinstance(answer, Failed)
    assert answer.reason == "finish reason abort"


def test_a_killed_worker_is_an_error_after_what_is_finished(scripted: Callable[..., Path]):
    scripted(
        during='if ids == [13]: print("CUDA error: out of memory", file=sys.stderr, flush=True); os.kill(os.getpid(), 9)'
    )
    finished: list[str] = []
    with engine(max_num_seqs=2) as opened, pytest.raises(WorkerError, match="ended \\(SIGKILL\\)") as caught:
        finished.extend(answer.key for answer in opened.generate(requests(9)))
    assert finished == ["k0", "k1", "k2"]
    assert "CUDA error: out of memory" in str(caught.value)
    assert "the same command continues" in str(caught.value)


def test_a_worker_that_does_not_start_says_why(scripted: Callable[..., Path]):
    scripted(before='say({"fatal": "vLLM does not start: no memory"}); sys.exit(1)')
    with pytest.raises(WorkerError, match="vLLM does not start: no memory"), engine():
        pass


def test_the_worker_names_a_python_without_vllm():
    """The worker itself, under this interpreter, which has no vLLM."""
    with pytest.raises(WorkerError, match="can't import vLLM"), engine(python=sys.executable):
        pass


def test_no_such_interpreter():
    with pytest.raises(ValueError, match=r"engine\.python: '/no/python' is no Python interpreter"):
        engine(python="/no/python")


def test_a_closed_engine_says_so(scripted: Callable[..., Path]):
    with pytest.raises(ValueError, match="closed"):
        next(engine().generate(requests(1)))


OWNER = """
import sys, time
from pathlib import Path
from selfsteer.engines import vllm
vllm.WORKER = Path(sys.argv[1])
with vllm.VllmEngine("model", vllm.VllmSettings(), decode=str, end_ids={2}):
    print("open", flush=True)
    time.sleep(600)
"""


def test_a_worker_ends_with_the_process_that_started_it(scripted: Callable[..., Path]):
    """kill -9 of the one that samples: its end of the pipe closes, and the worker's input ends."""
    started = scripted()
    with subprocess.Popen([sys.executable, "-c", OWNER, str(vllm.WORKER)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        owner.kill()
    (worker,) = (int(file.name) for file in started.iterdir())
    until(lambda: not alive(worker), "the end of the worker", seconds=60)
