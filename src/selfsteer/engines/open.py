"""From a recipe's engine section to the engine, checked before anything is started."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from selfsteer.engines.base import Engine
from selfsteer.engines.embedded import TransformersEngine
from selfsteer.engines.openai import OpenAIEngine, Server
from selfsteer.engines.ray import RayEngine
from selfsteer.engines.serving import Serve, ServedEngine
from selfsteer.engines.vllm import VllmEngine, VllmSettings
from selfsteer.models import compute_dtype, end_ids, pick_device
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import EngineSection, OpenAISection, VllmSection, runs_already, sampling_identity
from selfsteer.recipe.sections import Recipe
from selfsteer.records import Adapter, Checkpoint
from selfsteer.store.durable import digest


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
            end_ids=(prompts.end_id,),
        )
    arguments = _vllm_arguments(section) | {
        "dtype": str(dtype).removeprefix("torch."),
        "trust_remote_code": trust_remote_code,
    }
    fields = section.model_dump(include={"replicas", "max_num_seqs", "tensor_parallel_size", "logps"})
    if section.python is not None:
        fields["python"] = section.python
    settings = VllmSettings(**fields, adapters=tuple(adapters), arguments=arguments)
    return VllmEngine(model.path, settings, decode=partial(_decode, prompts), end_ids=_ends(model, prompts))


def _ends(model: Checkpoint, prompts: Prompts) -> frozenset[int]:
    """What ends an answer: the end tokens that the model folder names, and what closes a turn in the chat template."""
    return end_ids(model.path, prompts.tokenizer) | {prompts.end_id}


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
        ends, where = _ends(model, prompts), server(section, base_url, name)
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
