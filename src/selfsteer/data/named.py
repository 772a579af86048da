"""Whether what a command names is on this machine: looked at before torch is imported, so that a slip costs no time.

Left out on purpose: what is in the files and folders, which those who open them say.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from selfsteer.data.exchange import find_pairs
from selfsteer.data.files import check_source
from selfsteer.recipe.engines import runs_already
from selfsteer.recipe.references import check_model
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.shipped import located, names
from selfsteer.store.durable import read_small_text, regular_file

_RECIPES = (".yaml", ".yml")


def check_recipe(recipe: Recipe, *, queries: bool = True) -> None:
    """Raises ValueError or FileNotFoundError for the first model or file of a recipe that is not there.

    queries: False where the pairs were made elsewhere, and queries and principles are not read.
    """
    check_model(recipe.policy.model)
    for setting, path in (
        ("policy.chat_template", recipe.policy.chat_template),
        ("judge.chat_template", recipe.judge.chat_template),
        ("judge.template", recipe.judge.template),
        ("launcher.config", recipe.launcher.config),
    ):
        if path is not None:
            regular_file(Path(path), f"name an ordinary file in {setting}")
    if recipe.launcher.config is not None:
        check_launcher(Path(recipe.launcher.config))
    if recipe.judge.model is not None and not runs_already(recipe.judge.engine):
        check_model(recipe.judge.model, "judge.model")
    if not queries:
        return
    check_source(located(recipe.queries.path), "queries.path")
    if recipe.principles.path is not None:
        regular_file(Path(located(recipe.principles.path)), "principles.path takes a JSONL file of principle pairs")
    if recipe.principles.model is not None:
        check_model(recipe.principles.model, "principles.model")
    if recipe.principles.chat_template is not None:
        regular_file(Path(recipe.principles.chat_template), "name an ordinary file in principles.chat_template")


def check_launcher(path: Path, *, quantize: bool = False) -> None:
    """Raises ValueError for what is no configuration of accelerate, or one that is not supported here.

    quantize: weights are to be held in 4 bits.

    What else is in it, accelerate says in each process that it starts.
    """
    try:
        found = yaml.safe_load(read_small_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML ({' '.join(str(error).split())}); {_ACCELERATE}") from error
    if type(found) is not dict:
        raise ValueError(f"{path}: no settings of accelerate; {_ACCELERATE}")
    if found.get("distributed_type") == "DEEPSPEED":
        raise ValueError(f"{path}: DeepSpeed is not supported: it rounds what is trained; choose FSDP (`accelerate config`)")
    if quantize and found.get("distributed_type") == "FSDP":
        raise ValueError(f"{path}: FSDP can't shard weights in 4 bits; set training.lora.quantize=null, or choose MULTI_GPU")


_ACCELERATE = "`accelerate config --config_file FILE` writes such a file"


def check_pairs(pairs: Sequence[Path], models: Mapping[str, str | None]) -> None:
    """Raises ValueError or FileNotFoundError for the first preference dataset, or model by the option that names it, that is
    not there.
    """
    for path in pairs:
        find_pairs(path)
    for option, model in models.items():
        if model is not None and Path(model).suffix in _RECIPES:
            regular_file(Path(model), option)
        elif model is not None:
            check_model(model.removeprefix("implicit:"), option)


def check_models(models: Mapping[str, str | None]) -> None:
    """Raises ValueError for the first of these, by the argument that names it, that is neither a model here nor a run."""
    for argument, model in models.items():
        if model is not None and not (Path(model) / "run.json").is_file():
            check_model(model, argument)


def check_order(pairs: Path, recipe: Path) -> None:
    """Raises ValueError where a recipe stands in the place of the pairs, and something else in that of the recipe."""
    first, second = (each.suffix in _RECIPES or str(each) in names() for each in (pairs, recipe))
    if first and not second:
        raise ValueError(f"{pairs} is a recipe, and the pairs come first: {recipe}, then {pairs}")
