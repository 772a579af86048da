"""Sampling through an engine, into a journal: what is wanted, less what is there already.

Both samplings of the method (by the policy, by the data generator) and the generation of principles are this one loop.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from typing import Any, cast

from selfsteer.durable import digest
from selfsteer.engines.base import Completion, Engine, Failed, Request, Sampling
from selfsteer.engines.openai import OpenAIEngine, Server
from selfsteer.engines.ray import RayEngine
from selfsteer.engines.serving import Serve, ServedEngine
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.engines.vllm import VllmEngine, VllmSettings
from selfsteer.interrupt import raise_if_stopped
from selfsteer.journal import Journal
from selfsteer.models import compute_dtype, end_ids, pick_device
from selfsteer.progress import progress
from selfsteer.prompts import Prompts
from selfsteer.recipe import Recipe
from selfsteer.recipe_engines import EngineSection, OpenAISection, VllmSection, runs_already, sampling_identity
from selfsteer.records import Adapter, Checkpoint, Message, Response

SCHEMA = 1
"""Version of the journalled samples; part of every key."""

_DURABLE_EVERY = 16
"""Completions appended to the journal at once: one fdatasync for so many."""


def open_engine(
    section: EngineSection, model: Checkpoint, prompts: Prompts, *, trust_remote_code: bool, adapters: Sequence[Adapter] = ()
) -> Engine:
    """The engine that the section names, holding this model; enter it to load or start it.

    adapters: what requests may name, where the engine takes any (`recipe_engines.takes_adapters`).

    A server that runs already holds the model that it holds. Raises ValueError, before anything is started, for what the
    engine lacks: an interpreter, GPUs, a program, an API key.
    """
    if section.kind == "openai":
        return _openai_engine(section, model, prompts, adapters)
    if section.kind == "ray":
        there = replace(model, path=os.path.abspath(model.path))
        found = [replace(adapter, path=os.path.abspath(adapter.path)) for adapter in adapters]
        open_replica = partial(
            open_engine, section.replica, there, prompts, trust_remote_code=trust_remote_code, adapters=found
        )
        return RayEngine(there.path, section, open_replica)
    device = pick_device()
    dtype = compute_dtype(section.dtype, device)
    if section.kind == "transformers":
        return TransformersEngine(
            model.path,
            batch_size=section.batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            adapters=adapters,
        )
    arguments = _vllm_arguments(section) | {
        "dtype": str(dtype).removeprefix("torch."),
        "trust_remote_code": trust_remote_code,
    }
    fields = section.model_dump(include={"replicas", "max_num_seqs", "tensor_parallel_size", "logps"})
    if section.python is not None:
        fields["python"] = section.python
    settings = VllmSettings(**fields, adapters=tuple(adapters), arguments=arguments)
    return VllmEngine(model.path, settings, decode=partial(_decode, prompts), end_ids=end_ids(model.path, prompts.tokenizer))


def check_engines(recipe: Recipe, policy: Checkpoint, prompts: Prompts) -> None:
    """Raise ValueError when an engine of the recipe lacks something that can be seen before it is started."""
    principles = recipe.principles.engine
    for section in (recipe.engine,) if principles is None else (recipe.engine, principles):
        open_engine(section, policy, prompts, trust_remote_code=recipe.policy.trust_remote_code)  # and never entered


def _vllm_arguments(section: VllmSection) -> dict[str, Any]:
    names = {"max_model_len", "gpu_memory_utilization", "enable_prefix_caching", "enforce_eager"}
    return section.model_dump(include=names, exclude_none=True) | section.extra


def server(section: OpenAISection, base_url: str, model: str) -> Server:
    """Where the section's requests go. model: its name on the server, where the section names none."""
    same = set(type(section).model_fields) - {"kind", "base_url", "model", "serve", "serve_adapters", "start_seconds"}
    return Server(base_url=base_url, model=section.model or model, **section.model_dump(include=same))


def _openai_engine(section: OpenAISection, model: Checkpoint, prompts: Prompts, adapters: Sequence[Adapter]) -> Engine:
    def connect(base_url: str, name: str) -> OpenAIEngine:
        ends, where = end_ids(model.path, prompts.tokenizer), server(section, base_url, name)
        return OpenAIEngine(where, tokenize=lambda text: prompts.completion_ids(text, "length"), end_ids=ends)

    if section.serve is None:
        assert section.base_url is not None
        assert section.model is not None
        return connect(section.base_url, section.model)
    command = f"{section.serve} {section.serve_adapters}" if adapters else section.serve
    serve = Serve(command=command, model_path=model.path, start_seconds=section.start_seconds, adapters=tuple(adapters))
    return ServedEngine(serve, connect)


def _decode(prompts: Prompts, token_ids: Iterable[int]) -> str:
    text = prompts.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return cast(str, text)


def sampler_digest(section: EngineSection, model: Checkpoint) -> str:
    """Digest of what samples: the model's, and what of the engine's settings changes what is sampled.

    Of a server that runs already only the name of its model is known.
    """
    identity = sampling_identity(section)
    if not identity:
        return model.digest
    return digest(identity if runs_already(section) else {"model": model.digest, **identity})


def seed_for(*parts: str | int) -> int:
    """A 32-bit seed that depends on its parts only: not on order, time or the number of others."""
    return int(digest(list(parts))[:8], 16)


def request(prompts: Prompts, messages: tuple[Message, ...], *, model_digest: str, sampling: Sampling, seed: int) -> Request:
    """A request whose key is the content that determines its completion (no paths, times or endpoints)."""
    prompt_ids = prompts.prompt_ids(messages)
    key = digest(
        {
            "schema": SCHEMA,
            "model": model_digest,
            "prompt_ids": prompt_ids,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": seed,
        }
    )
    return Request(key=key, messages=messages, prompt_ids=prompt_ids, sampling=sampling, seed=seed)


@contextmanager
def kept_open(open_engine: Callable[[], Engine]) -> Generator[Callable[[], AbstractContextManager[Engine]]]:
    """Gives `sample` an engine that stays open from its first use to the end of the block."""
    with ExitStack() as stack:
        opened = cache(lambda: stack.enter_context(open_engine()))
        yield lambda: nullcontext(opened())


def sample(
    open_engine: Callable[[], AbstractContextManager[Engine]],
    wanted: Iterable[Request],
    journal: Journal,
    *,
    description: str,
    total: int,
) -> int:
    """Answer every wanted request that the journal lacks; the engine is opened only when there is one.

    wanted is read lazily, once. total, the number of wanted requests, is for the progress bar.
    Returns the number of new samples. Raises Interrupted, with all finished samples durable, when a signal asked to stop.
    """
    lacking = _lacking(wanted, journal)
    first = next(lacking, None)
    if first is None:
        return 0
    new = 0
    batch: list[Completion | Failed] = []
    with progress(description, max(0, total - len(journal)), unit="responses") as advance, open_engine() as engine:
        try:
            for answer in engine.generate(chain([first], lacking)):
                batch.append(answer)
                if len(batch) >= _DURABLE_EVERY:
                    _append(journal, batch)
                    new += len(batch)
                    advance(len(batch))
                    batch = []
        finally:  # also when the engine breaks off: what it had finished is kept
            _append(journal, batch)
        new += len(batch)
        advance(len(batch))
    raise_if_stopped()
    return new


def response(journal: Journal, wanted: Request) -> Response | Failed:
    """The journalled answer to a request, or why there is none."""
    data = journal.get(wanted.key)
    if "failed" in data:
        return Failed(key=wanted.key, reason=data["failed"], detail=data["detail"])
    return Response(
        text=data["text"], token_ids=tuple(data["token_ids"]), finish_reason=data["finish_reason"], seed=wanted.seed
    )


def _lacking(wanted: Iterable[Request], journal: Journal) -> Iterator[Request]:
    """The wanted requests that have no durable answer, each key once."""
    seen: set[str] = set()
    for item in wanted:
        if item.key not in journal and item.key not in seen:
            seen.add(item.key)
            yield item


def _append(journal: Journal, batch: list[Completion | Failed]) -> None:
    if batch:
        journal.append([(item.key, _data(item)) for item in batch])


def _data(item: Completion | Failed) -> dict[str, object]:
    if isinstance(item, Failed):
        return {"failed": item.reason, "detail": item.detail}
    data: dict[str, object] = {"text": item.text, "token_ids": list(item.token_ids), "finish_reason": item.finish_reason}
    return data if item.logps is None else data | {"logps": list(item.logps)}
