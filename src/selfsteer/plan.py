"""What a recipe will take on this machine, before anything is spent: `stages/costs.py` with counts and rates filled in.

Counts come from the recipe's own queries. Rates come from a short calibration: a few of these queries answered by the engine
and passed through the model forward and backward, as the stages will. Where the engine is a server, or the model is trained
by other processes, there is no calibration here and times are left open. Left out on purpose: judges and benchmarks.
"""

import math
import os
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from selfsteer.clock import held
from selfsteer.data.queries import read_queries
from selfsteer.engines.base import Completion, Sampling
from selfsteer.engines.open import check_engines, open_engine
from selfsteer.engines.sampling import request
from selfsteer.models import compute_dtype, pick_device
from selfsteer.pipeline import Prepared, prepare
from selfsteer.recipe.sections import Recipe
from selfsteer.records import Message, Query
from selfsteer.runtime import raise_if_stopped
from selfsteer.stages.costs import Counts, Lengths, Rates, StageCost, run_disk, stage_costs
from selfsteer.stages.drawing import none_left
from selfsteer.stages.essentials import check_essentials, device_memory, existing, size_of
from selfsteer.stages.principles import choose_principles, load_pool
from selfsteer.stages.status import method_of, stage_names
from selfsteer.training.logps import casting_once, choose_packing, to_device
from selfsteer.training.packing import Row
from selfsteer.training.scoring import open_scorer

_MEASURED = 200
"""Queries whose prompts are measured; the others are counted."""

_TOLERANCE = 0.2
"""The memory of a stage was measured within so much of its estimate (docs/log.md); less than that is no reason to refuse."""

_ASKED, _LONGEST = 30, 128
"""Calibration: prompts that are answered, as many under the good principle as under the bad one and bare, and the most
tokens of an answer."""


class Plan(TypedDict):
    """What a run will take."""

    model: str
    queries: int
    """Usable ones."""
    shard: str | None
    """Which share of them this run answers; None for all."""
    response: float
    """Tokens of a response on average, as calibrated; the limit where nothing was."""
    rates: dict[str, float | None]
    """Tokens a second: sampled, scored, trained."""
    rounds: int
    stages: list[StageCost]
    """Of one round."""
    seconds: float | None
    """Of all rounds; None where a stage is not known."""
    memory: int
    """Bytes of the largest stage, with responses as long as expected."""
    memory_most: int
    """The same with every response as long as it may be."""
    memory_free: int | None
    disk: int
    """Bytes at the peak."""
    disk_free: int
    load: float | None
    """Processes that wanted a core in the minute before the calibration; None where the system does not tell."""
    problems: list[str]
    """What would not fit, or would fail, each with its way out."""
    warnings: list[str]
    """What may not fit, and what the estimates hang on."""


def plan(recipe: Recipe, *, calibrate: bool = True) -> Plan:
    """Raises ValueError for a recipe that can't begin at all: its model, queries or principles are not there."""
    prepared = prepare(recipe)
    queries = [item for item in read_queries(recipe.queries) if isinstance(item, Query)]
    if not queries:
        raise ValueError(f"{recipe.queries.path}: no usable query. Look at the file, or set queries.column in the recipe.")
    looked_at = queries[:_MEASURED]
    prompts = list(_prompts(recipe, prepared, looked_at))
    if not prompts:
        raise ValueError(
            f"{recipe.queries.path}: the chat template renders none of the first {len(looked_at)} queries. Look at the file,"
            " or set policy.chat_template in the recipe."
        )
    used = [each for each in prompts if len(each.good) <= recipe.queries.max_prompt_tokens]
    count = round(len(queries) * len(used) / len(looked_at))
    problems = list(_problems(recipe, prepared))
    if not used:
        problems.append("no query fits queries.max_prompt_tokens with its principle; raise it")
        used = prompts
    elif recipe.queries.holdout and (reason := none_left(recipe.queries.holdout, count)):
        problems.append(reason)
    here = recipe.engine.kind == "transformers"
    size, device = size_of(prepared.policy, recipe), pick_device()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    libraries = (held() or 0) if device.type == "cpu" else 0
    free = device_memory(device) + libraries  # which this process holds already
    found = _calibrated(recipe, prepared, used) if calibrate and here and not problems else _Calibration(Rates(), None)
    response = found.response or float(recipe.responses.max_new_tokens)
    half = compute_dtype(recipe.training.dtype, device) != torch.float32
    bare, good = (Lengths.of(getattr(each, name) for each in used) for name in ("bare", "good"))
    counts = Counts(queries_a_round(recipe, count), bare, good, response)
    stages = stage_costs(recipe, counts, size, found.rates._replace(libraries=libraries), half=half)
    seconds = [stage["seconds"] for stage in stages if stage["samples"] or stage["scored"] or stage["trained"]]
    memory, most = (max(stage[key] for stage in stages) for key in ("memory", "memory_most"))
    warnings = list(_busy(load))
    disk, room = run_disk(stages, recipe.rounds), shutil.disk_usage(existing(Path(recipe.output))).free
    if most > free:
        said = (
            f"memory: {memory / 1e9:.1f} GB at the peak, {most / 1e9:.1f} GB where every response is as long as it may be;"
            f" {free / 1e9:.1f} GB are free"
        )
        way_out = "set training.lora.rank=16, training.gradient_checkpointing=true or a smaller engine.batch_size"
        if (1 - _TOLERANCE) * memory > free:
            problems.append(f"{said}: {way_out}")
        else:
            warnings.append(f"{said}, which may do; if not: {way_out}")
    if disk > room:
        problems.append(f"disk: {disk / 1e9:.1f} GB at the peak, {room / 1e9:.1f} GB are free; name another output")
    return Plan(
        model=recipe.policy.model,
        queries=count,
        shard=recipe.queries.shard,
        response=response,
        rates={"sampled": found.rates.sampled, "scored": found.rates.scored, "trained": found.rates.trained},
        rounds=recipe.rounds,
        stages=stages,
        seconds=None if None in seconds else recipe.rounds * sum(cast("list[float]", seconds)),
        memory=memory,
        memory_most=most,
        memory_free=free,
        disk=disk,
        disk_free=room,
        load=load,
        problems=problems,
        warnings=warnings,
    )


def queries_a_round(recipe: Recipe, count: int) -> int:
    """Of so many queries, those of the largest round."""
    if not recipe.queries.split_rounds:
        return count
    return recipe.queries.holdout + math.ceil((count - recipe.queries.holdout) / recipe.rounds)


def _busy(load: float | None) -> Iterator[str]:
    """Whether something else works on this machine, beside which the rates were measured."""
    cores = os.cpu_count() or 1
    if load is not None and load > cores / 2:
        yield (
            f"time: other processes are at work (load {load:.1f} on {cores} cores); the rates were measured beside them,"
            " and hold for a machine as busy as it is now"
        )


class _Prompts(NamedTuple):
    bare: tuple[int, ...]
    good: tuple[int, ...]
    bad: tuple[int, ...]
    messages: tuple[tuple[Message, ...], ...]
    """Of the three."""


def _prompts(recipe: Recipe, prepared: Prepared, queries: Sequence[Query]) -> Iterator[_Prompts]:
    """The first queries bare and under the principles that they would get; of generated ones the library stands in.

    Without those that can't be rendered, which a run drops.
    """
    pool = load_pool(recipe.principles)
    for query in queries:
        query = replace(query, messages=prepared.prompts.fold(query.messages))
        if isinstance(prepared.prompts.checked_ids(query.messages), str):
            continue
        principles = choose_principles(query, pool, recipe.seed)
        steered = (
            prepared.prompts.steer(query.messages, each) for each in (principles.good_message, principles.bad_message)
        )
        messages = (query.messages, *steered)
        bare, good, bad = (tuple(prepared.prompts.prompt_ids(each)) for each in messages)
        yield _Prompts(bare, good, bad, messages)


def _problems(recipe: Recipe, prepared: Prepared) -> Iterator[str]:
    """What a run would be refused for, each check by itself."""
    for check in (
        lambda: check_engines(recipe, prepared.policy, prepared.prompts),
        lambda: check_essentials(recipe, prepared.policy, stage_names(recipe, method_of(recipe))),
    ):
        try:
            check()
        except (ValueError, OSError) as error:
            yield str(error)


# --- calibration -----------------------------------------------------------------------------------------------------------


class _Calibration(NamedTuple):
    rates: Rates
    response: float | None
    """Tokens of a response, on average."""


def _calibrated(recipe: Recipe, prepared: Prepared, prompts: Sequence[_Prompts]) -> _Calibration:
    """Some seconds of work: answers, a forward pass, a forward and backward pass."""
    whole = (pair for each in prompts for pair in zip((each.bare, each.good, each.bad), each.messages, strict=True))
    asked = list(islice(whole, _ASKED))
    limit = min(_LONGEST, recipe.responses.max_new_tokens)
    sampling = Sampling(**recipe.responses.steered.model_dump() | {"max_new_tokens": limit})
    requests = [
        replace(request(prepared.prompts, messages, model_digest="", sampling=sampling, seed=number), prompt_ids=ids)
        for number, (ids, messages) in enumerate(asked)
    ]
    trust = recipe.policy.trust_remote_code
    began = time.perf_counter()
    with open_engine(recipe.engine, prepared.policy, prepared.prompts, trust_remote_code=trust) as engine:
        loaded = time.perf_counter()
        answers = [answer for answer in engine.generate(requests) if isinstance(answer, Completion)]
        sampled = sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - loaded)
    raise_if_stopped()
    if not answers:
        return _Calibration(Rates(loading=loaded - began), None)
    forward, backward, kept = _passes(recipe, prepared, [ids for ids, _ in asked], answers)
    rates = Rates(sampled=sampled, scored=forward, trained=backward, loading=loaded - began, kept=kept)
    return _Calibration(rates, expected_length(answers, recipe.responses.max_new_tokens))


def expected_length(answers: Sequence[Completion], limit: int) -> float:
    """Mean tokens of answers up to `limit`, of some that were cut off earlier.

    As if each token were the last with one probability (exponential lengths): tokens / endings is its estimate, and the mean
    up to the limit follows. Without an ending the limit itself.
    """
    tokens = sum(len(answer.token_ids) for answer in answers)
    ended = sum(answer.finish_reason == "stop" for answer in answers)
    if ended == 0 or tokens == 0:
        return float(limit)
    mean = tokens / ended
    return mean * (1 - math.exp(-limit / mean))


def _passes(
    recipe: Recipe, prepared: Prepared, prompts: Sequence[tuple[int, ...]], answers: Sequence[Completion]
) -> tuple[float, float, float]:
    """Of responses behind their prompts: tokens a second forward alone, and forward and backward, and bytes a token kept."""
    completions = [answer.token_ids or prompts[0][:8] for answer in answers]
    rows = [Row(prompt, (completion,)) for prompt, completion in zip(prompts[:4], completions, strict=False)]
    policy = recipe.policy.model_copy(update={"model": prepared.policy.path})
    with open_scorer(policy, recipe.training) as scorer:
        model = scorer.model
        packing = choose_packing(model, rows[:1], sharing=recipe.training.prefix_sharing)
        batches = [to_device(packing([row]), model.device) for row in rows]
        tokens = sum(len(row.prompt) + len(row.completions[0]) for row in rows)

        def run(*, train: bool) -> float:
            began = time.perf_counter()
            for batch in batches:
                raise_if_stopped()
                logps = model(**cast("dict[str, Any]", batch))
                if train:
                    logps.sum().backward()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            return tokens / (time.perf_counter() - began)

        row, batch = max(zip(rows, batches, strict=True), key=lambda each: len(each[0].completions[0]))
        with keeping(model) as kept:
            model(**cast("dict[str, Any]", batch))
        run(train=True)  # kernels are chosen, memory is taken
        with torch.no_grad(), casting_once(model.device):  # as pairs are scored
            scored = run(train=False)
        return scored, run(train=True), sum(kept.values()) / (len(row.prompt) + len(row.completions[0]))


@contextmanager
def keeping(model: torch.nn.Module) -> Generator[dict[int, int]]:
    """What a forward pass in the block keeps for its backward pass: where it lies, and its bytes.

    Without weights and their copies in half precision, which are there once whatever the tokens are.
    """
    weights = {tuple(sorted(each.shape)) for each in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(sorted(tensor.shape)) not in weights:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
