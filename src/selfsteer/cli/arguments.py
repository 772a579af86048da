"""Arguments and options that several commands take, and what several of them print."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from selfsteer.runtime import counted

log = logging.getLogger(__name__)

RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="The recipe: a YAML file, or one that comes along, such as quickstart.", show_default=False
    ),
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace the recipe's, such as generator.beta=0.2.", show_default=False
    ),
]

PairsFile = Annotated[
    Path,
    typer.Argument(
        metavar="PAIRS",
        help="A preference dataset (prompt, chosen, rejected): a file, a run folder, or hub:NAME.",
        show_default=False,
    ),
]

Replace = Annotated[
    bool, typer.Option("--replace", help="Give up the pairs and models that other settings made in the output folder.")
]

Borrow = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="RUN",
        help="Take over the stages and samples of another run where they are the same; several times for several.",
        show_default=False,
    ),
]

TemplateArguments = Annotated[
    str | None,
    typer.Option(
        metavar="YAML",
        help="Arguments of the models' chat template, such as '{enable_thinking: false}'.",
        show_default=False,
    ),
]
ChatTemplate = Annotated[str | None, typer.Option(metavar="FILE", help="A Jinja chat template, for a model without.")]

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a hub id, a .gguf file or package:NAME, as policy.model in a recipe."),
]

EngineFile = Annotated[
    Path | None,
    typer.Option(metavar="YAML", help="A file with a section engine, as in a recipe; the embedded engine when left out."),
]

JudgeName = Annotated[
    str | None,
    typer.Option(metavar="JUDGE", help="An LLM, a reward model, or a .yaml file with a judge section.", show_default=False),
]

Output = Annotated[Path, typer.Option(metavar="DIR", help="Keeps what was answered; the same command goes on from there.")]


def _writable(file: Path | None) -> Path | None:
    """Said before the work that is to be written there."""
    if file is not None and file != Path("-"):
        if file.is_dir():
            raise typer.BadParameter(f"{file} is a folder; name a file in it")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise typer.BadParameter(f"{file} can't be written: {file.parent} is no folder that you may write to")
    return file


Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write everything there, too; - prints it, and nothing else.",
        show_default=False,
        callback=_writable,
    ),
]


def examples(*commands: str) -> str:
    """For the end of a command's help; typer makes a line of each paragraph."""
    return "\n\n".join([f"Example{'s' if commands[1:] else ''}:", *(f"selfsteer {command}" for command in commands)])


def read_template_arguments(text: str | None) -> dict[str, Any]:
    """Of a chat template, as the option has them."""
    if text is None:
        return {}
    try:
        return TypeAdapter(dict[str, Any], config=ConfigDict(strict=True)).validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError):
        raise ValueError(
            f"--template-arguments: {text!r}; expected names and values, such as '{{thinking: false}}'"
        ) from None


def tell(found: Mapping[str, Any], file: Path | None, show: Callable[[], None]) -> None:
    """Show what was found to a person, and write all of it to a file; for "-" print it for a program, and nothing else."""
    if file is None:
        show()
        return
    import json

    from selfsteer.measures.metrics import plain

    text = json.dumps(plain(found), indent=2, ensure_ascii=False, allow_nan=False)
    if file == Path("-"):
        typer.echo(text)
        return
    show()
    file.write_text(f"{text}\n", encoding="utf-8")


def print_dropped(dropped: Mapping[str, int], kept: int) -> None:
    """Nothing is left out without a word."""
    if dropped:
        lost = sum(dropped.values())
        log.warning("dropped %s of %s: %s", f"{lost:,}", f"{kept + lost:,}", counted(dropped))
