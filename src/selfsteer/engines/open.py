"""From a recipe's engine section to the engine, checked before anything is started."""

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from selfsteer.engines.base import Engine
from selfsteer.engines.embedded import TransformersEngine
from selfsteer.engines.openai import OpenAIEngine
from selfsteer.engines.ray import RayEngine
from selfsteer.engines.serving import (
    VLLM_ENVIRONMENT,
    VLLM_KEY,
    VLLM_ON_CPU,
    Address,
    Serve,
    ServedEngine,
    check_gpus,
    find_vllm,
    vllm_command,
)
from selfsteer.models import (
    end_ids,
    is_exact,
    load_configuration,
    pick_device,
    sampling_dtype,
    tell_of_other_sampling,
    tokenizer_of,
    untrained_ids,
)
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import (
    EngineSection,
    OpenAISection,
    VllmSection,
    context_limit,
    runs_already,
    sampling_identity,
)
from selfsteer.recipe.sections import Policy, Recipe
from selfsteer.records import Adapter, Checkpoint, Message
from selfsteer.store.durable import digest

log = logging.getLogger(__name__)

_NO_LIMIT = 7 * 86400.0
"""Seconds: a vLLM of our own is as slow as it is, and its end ends what is asked of it."""


def open_engine(
    section: EngineSection, model: Checkpoint, prompts: Prompts, *, trust_remote_code: bool, adapters: Sequence[Adapter] = ()
) -> Engine:
    """The engine that the section names, holding this model; enter it to load or start it.

    adapters: what requests may name, where the engine takes any (`recipe.engines.takes_adapters`).

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
    dtype = sampling_dtype(section.dtype, model.path, device)
    if section.kind == "transformers":
        return TransformersEngine(
            model.path,
            batch_size=section.batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            adapters=adapters,
            end_ids=(prompts.end_id,),
        )
    arguments: dict[str, object] = {"dtype": str(dtype).removeprefix("torch.")}
    if trust_remote_code:
        arguments["trust_remote_code"] = True
    return _vllm_engine(section, model, prompts, adapters, arguments)


def prompts_of(policy: Policy, model: Checkpoint) -> Prompts:
    """How a model is asked that answers as it is. Raises ValueError for a template that fails, or has the model think."""
    tokenizer = tokenizer_of(policy, model.path)
    return Prompts.of(policy, tokenizer, end_ids(model.path, tokenizer)).whole().direct()


def _ends(model: Checkpoint, prompts: Prompts) -> frozenset[int]:
    """What ends an answer: the end tokens that the model folder names, and what closes a turn in the chat template."""
    return end_ids(model.path, prompts.tokenizer) | {prompts.end_id}


def check_engines(recipe: Recipe, policy: Checkpoint, prompts: Prompts) -> None:
    """Raise ValueError when an engine of the recipe lacks something that can be seen before it is started.

    What the policy would have engines do beside what the recipe says is told.
    """
    principles = recipe.principles.engine
    if not runs_already(recipe.engine):
        tell_of_other_sampling(policy.path)
    _check_room(recipe.engine, prompts, ("responses.max_new_tokens", recipe.responses.max_new_tokens))
    if recipe.principles.source == "generate":
        _check_room(principles or recipe.engine, prompts, ("principles.max_new_tokens", recipe.principles.max_new_tokens))
    for section in (recipe.engine,) if principles is None else (recipe.engine, principles):
        open_engine(section, policy, prompts, trust_remote_code=recipe.policy.trust_remote_code)  # and never entered


def _check_room(section: EngineSection, prompts: Prompts, new: tuple[str, int]) -> None:
    """Raise ValueError where no prompt leaves room for the wanted response: the server would refuse every request."""
    limit, (name, wanted) = context_limit(section), new
    shortest = len(prompts.prompt_ids((Message(role="user", content="Hi"),)))
    if limit is not None and shortest + wanted > limit:
        raise ValueError(
            f"engine.max_model_len: {limit} tokens for a prompt and its response, and {name} is {wanted}: no prompt leaves"
            f" room for that. Raise engine.max_model_len, or lower {name}"
        )


def _vllm_engine(
    section: VllmSection, model: Checkpoint, prompts: Prompts, adapters: Sequence[Adapter], arguments: dict[str, object]
) -> Engine:
    check_gpus(section)
    command = vllm_command(section, arguments, adapters)
    found = find_vllm(command[0])
    ends = _ends(model, prompts)
    # Also those that the model's configuration does not name.
    extra: dict[str, object] = {"stop_token_ids": sorted(ends)}
    if found.on_cpu:
        log.warning(
            "vLLM %s on a CPU takes no seed of a request's own: the same request is answered otherwise", found.version
        )
        extra["seed"] = None
    # A few more than are sampled, so that the server has something to start while we are busy.
    in_flight = section.replicas * (section.max_num_seqs + max(1, section.max_num_seqs // 4))
    rows = load_configuration(model.path, trust_remote_code="trust_remote_code" in arguments).get_text_config().vocab_size
    if never := untrained_ids(prompts.tokenizer, rows):
        extra["logit_bias"] = {str(token_id): -100 for token_id in never}

    def connect(address: Address) -> OpenAIEngine:
        client = OpenAISection(
            kind="openai",
            base_url=address.base_url,
            model=address.model,
            send="token_ids",
            concurrency=in_flight,
            tries=3,
            total_seconds=_NO_LIMIT,
            extra=extra,
        )
        return OpenAIEngine(client, prompts, ends=ends, exact=True, key=address.key)

    serve = Serve(
        command=command,
        model_path=model.path,
        start_seconds=section.start_seconds,
        adapters=tuple(adapters),
        key_env=VLLM_KEY,
        environment=VLLM_ENVIRONMENT | (VLLM_ON_CPU if found.on_cpu else {}),
    )
    return ServedEngine(serve, connect)


def _openai_engine(section: OpenAISection, model: Checkpoint, prompts: Prompts, adapters: Sequence[Adapter]) -> Engine:
    ends = _ends(model, prompts)
    if section.serve is None:
        return OpenAIEngine(section, prompts, ends=ends)
    if is_exact(model.path) and "float32" not in section.serve:
        log.warning(
            "%s: half precision would undo what was trained; have engine.serve hold it in float32 (vLLM: --dtype float32)",
            model.path,
        )

    def connect(address: Address) -> OpenAIEngine:
        there = {
            "serve": None,
            "serve_adapters": None,
            "base_url": address.base_url,
            "model": section.model or address.model,
        }
        return OpenAIEngine(section.model_copy(update=there), prompts, ends=ends)

    command = f"{section.serve} {section.serve_adapters}" if adapters else section.serve
    serve = Serve(
        command=shlex.split(command),
        model_path=model.path,
        start_seconds=section.start_seconds,
        adapters=tuple(adapters),
    )
    return ServedEngine(serve, connect)


def sampler_digest(section: EngineSection, model: Checkpoint) -> str:
    """Digest of what samples: the model's, and what of the engine's settings changes what is sampled.

    Of a server that runs already only the name of its model is known.
    """
    identity = sampling_identity(section)
    if not identity:
        return model.digest
    return digest(identity if runs_already(section) else {"model": model.digest, **identity})
