"""A first recipe for somebody's model, queries and machine: short, commented, and loadable (`selfsteer init`).

What is chosen is what this machine can do: adapters where full weights do not fit, vLLM where it is installed, rates by the
size of the model. Left out on purpose: everything with a default that holds (`selfsteer show` prints those).
"""

import sys
from typing import NamedTuple

import torch
import yaml

from selfsteer.data.files import source_rows
from selfsteer.data.queries import read_queries
from selfsteer.engines.serving import find_vllm
from selfsteer.models import compute_dtype, pick_device, resolve
from selfsteer.recipe.sections import Policy, Queries, Recipe
from selfsteer.records import Query
from selfsteer.stages.costs import training_state
from selfsteer.stages.essentials import device_memory, size_of

_SMALL = 1_000_000_000
"""Parameters below which a handful of steps at the paper's rate changes nothing (docs/comparison.md)."""

_HOLDOUT = 64


class Chosen(NamedTuple):
    """What the recipe says beyond model and queries, and why."""

    lora: bool
    vllm: bool
    small: bool
    because: str


_COLUMNS = ("query", "prompt", "instruction", "question", "messages", "conversations")
"""Names under which queries are published, the first that a file has is taken."""


def first_recipe(model: str, queries: str, column: str | None, output: str) -> str:
    """The recipe as YAML. column: of the queries; by its name when None.

    Raises ValueError for a model or queries that are not there.
    """
    column = column or _column(queries)
    policy, source = Policy(model=model), Queries(path=queries, column=column)
    usable = sum(isinstance(item, Query) for item in read_queries(source))
    if usable == 0:
        raise ValueError(f"{queries}: no usable query. Look at the file, or name its column with --column.")
    holdout = min(_HOLDOUT, usable // 4)
    found = _chosen(policy, source)
    lines = [
        "# Made by selfsteer init; every setting with its default and meaning: selfsteer show FILE",
        f"# {found.because}",
        "",
        f"output: {_text(output)}",
        "",
        "policy:",
        f"  model: {_text(model)}",
        "",
        "queries:",
        f"  path: {_text(queries)}  # {usable:,} usable queries",
        f"  column: {_text(column)}",
        f"  holdout: {holdout}  # no training sees these: measures are taken on them",
        "",
        "responses:",
        f"  max_new_tokens: {256 if found.small else 1024}  # raise it where the report says that many are cut off",
        "",
    ]
    if found.vllm:
        lines += ["engine:", "  kind: vllm", ""]
    if found.small:
        lines += [
            "generator:",
            "  learning_rate: 1.0e-5  # the paper's 5e-7 does nothing in few steps on a small model",
            "  batch_size: 8",
            "",
            "alignment:",
            "  loss: dpop             # bounds how far chosen answers can fall",
            "  learning_rate: 1.0e-5",
            "  batch_size: 8",
            "",
        ]
    if found.lora:
        lines += ["training:", "  lora:", "    rank: 16", ""]
    lines += ["quality:", f"  gain: {min(40, holdout)}  # does the generator steer, or only sharpen?", ""]
    text = "\n".join(lines)
    Recipe.model_validate(yaml.safe_load(text))
    return text


def _column(queries: str) -> str:
    first = next(source_rows(queries, _COLUMNS), None)
    return next((name for name in _COLUMNS if first is not None and name in first.fields), _COLUMNS[0])


def _text(value: str) -> str:
    """As YAML, in quotes where it needs them."""
    return yaml.safe_dump(value, allow_unicode=True, width=10_000).removesuffix("...\n").strip()


def _chosen(policy: Policy, queries: Queries) -> Chosen:
    checkpoint = resolve(policy)
    plain = Recipe(policy=policy, queries=queries)
    size = size_of(checkpoint, plain)
    device = pick_device()
    need = training_state(plain.training, size, half=compute_dtype("auto", device) != torch.float32)
    room = device_memory(device)
    lora = need > 0.8 * room  # activations come on top
    try:
        find_vllm(sys.executable)
        vllm = True
    except ValueError:
        vllm = False
    because = (
        f"{size.parameters / 1e6:,.0f}M parameters on {device.type}: full weights take {need / 1e9:.1f} GB of"
        f" {room / 1e9:.0f} GB, so {'adapters' if lora else 'all weights'} are trained; "
        + ("vLLM samples" if vllm else "the embedded engine samples (no vLLM in this environment)")
    )
    return Chosen(lora, vllm, size.parameters < _SMALL, because)
