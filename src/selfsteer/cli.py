"""The command: parses, calls one function, prints what it returns, turns errors into messages and exit statuses.

Exit statuses: 0 done; 2 something the user can mend (recipe, data, model, run folder, disk); 128 + signal number when
stopped; 1 a defect, with its traceback. Torch and transformers are imported by the commands that need them, so that the
others answer at once. Results go to stdout, everything else to stderr.
"""

import logging
import os
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from selfsteer.recipe import sections as recipes
from selfsteer.recipe.engines import DTypeName
from selfsteer.runtime import Interrupted, graceful_stop

if TYPE_CHECKING:
    from selfsteer.stages.status import Status

log = logging.getLogger(__name__)

app = typer.Typer(
    help="Align a chat model without human labels, by Self-Steering Optimization (arXiv 2410.17131).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # `main` decides what a person sees of an exception
)

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

TemplateArguments = Annotated[
    str | None,
    typer.Option(
        metavar="YAML",
        help="Arguments of the models' chat template, such as '{enable_thinking: false}'.",
        show_default=False,
    ),
]

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


@app.command()
def run(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run the whole pipeline, or continue it where it stopped; output=DIR names the run folder."""
    resolved = recipes.load(recipe, overrides or ())
    with graceful_stop():
        from selfsteer import pipeline
        from selfsteer.report.verdict import print_verdict

        print_verdict(pipeline.run(resolved))


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print the resolved recipe: every setting, its description, and what differs from the default."""
    typer.echo(recipes.describe(recipes.load(recipe, overrides or ())), nl=False)


@app.command()
def status(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]) -> None:
    """Show the stages of a run, its counts and drops, and what comes next."""
    from selfsteer.stages.status import status as status_of

    _print_status(status_of(run))


@app.command()
def train(pairs: PairsFile, recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Align a model on a preference dataset made elsewhere."""
    resolved = recipes.load(recipe, overrides or ())
    with graceful_stop():
        from selfsteer.given import train_pairs
        from selfsteer.report.verdict import print_verdict

        print_verdict(train_pairs(pairs, resolved))


@app.command()
def measure(
    pairs: PairsFile,
    policy: Annotated[str, typer.Option(metavar="MODEL", help="The model to measure under, as policy.model in a recipe.")],
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Who judges the pairs: an LLM, a reward model, implicit:MODEL (a model trained from the policy), or a .yaml"
            " file with a judge section.",
            show_default=False,
        ),
    ] = None,
    template_arguments: TemplateArguments = None,
) -> None:
    """Measure a preference dataset: on-policy probability, margins, lengths, overlap, and a judge's accuracy."""
    with graceful_stop():
        from selfsteer.given import measure_pairs
        from selfsteer.report.tables import print_measures

        found = measure_pairs(pairs, policy, judge, _template_arguments(template_arguments))
        print_measures(found)
        _print_dropped(found.get("dropped", {}), found.get("pairs", 0))


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    arms: Annotated[str, typer.Option(metavar="A,B,...", help="What to compare; docs/quality.md lists them.")] = "pbaa,sso",
    seeds: Annotated[str | None, typer.Option(metavar="N,M,...", help="The seeds; the recipe's when left out.")] = None,
) -> None:
    """Make preference data in several ways on the same queries, and compare it on held-out ones."""
    resolved = recipes.load(recipe, overrides or ())
    numbers = [resolved.seed] if seeds is None else [_seed(text) for text in seeds.split(",")]
    with graceful_stop():
        from selfsteer import compare as comparing
        from selfsteer.report.comparison import comparison_tables
        from selfsteer.report.tables import table_text

        result = comparing.compare(resolved, [name.strip() for name in arms.split(",")], numbers)
        for table in comparison_tables(result):
            typer.echo(table_text(table) + "\n")
        typer.echo(f"comparison  {Path(resolved.output) / 'comparison.html'}, comparison.md, comparison.json")


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

ChatTemplate = Annotated[
    str | None, typer.Option(metavar="FILE", help="A Jinja chat template, for a model without.", show_default=False)
]

Output = Annotated[Path, typer.Option(metavar="DIR", help="Keeps what was answered; the same command goes on from there.")]

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything there, too.")]


@app.command()
def evaluate(
    model: ModelName,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="ifeval, gsm8k, math500, mmlu, or any task of lm-evaluation-harness; alpaca_eval, mt_bench, arena_hard with"
            " --judge.",
        ),
    ] = "",
    before: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model to compare with, on the same items.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many items of each task; labelled as such.", min=1)] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with a folder of files for each task; the hub's otherwise.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each item, instead of the task's own.", min=0)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Limit of an answer, instead of the task's own.", min=1)] = None,
    engine: EngineFile = None,
    judge: JudgeName = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Recorded judgements in AlpacaEval's format, in place of a judge; MODEL is a name."
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="A Jinja chat template, for a model without.")
    ] = None,
    template_arguments: TemplateArguments = None,
    output: Output = Path("evaluations"),
    json: Json = None,
) -> None:
    """Measure a model on benchmarks, alone or against the one before; exit before anything runs if something is missing."""
    with graceful_stop():
        from selfsteer import evaluate as evaluating
        from selfsteer.recipe.sections import EvaluationSection, Policy
        from selfsteer.report.tables import print_annotated, print_evaluation

        if annotations is not None:
            if tasks or before or judge:
                raise ValueError("--annotations: recorded judgements need no --tasks, --before or --judge")
            print_annotated(*evaluating.annotated(annotations, data))
            return
        section = EvaluationSection(
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            limit=limit,
            data=None if data is None else str(data),
            fewshot=fewshot,
            max_new_tokens=max_new_tokens,
        )
        arguments = _template_arguments(template_arguments)
        policies = [
            Policy(model=name, chat_template=chat_template, template_arguments=arguments)
            for name in (before, model)
            if name is not None
        ]
        found = evaluating.evaluate_models(policies, section, evaluating.read_engine(engine), judge, output)
        print_evaluation(found, f"Evaluation of {model}" + (f" against {before}" if before else ""))
        _write_json(json, found)


@app.command("compare-answers")
def compare_answers(
    a: Annotated[str, typer.Argument(metavar="A", help="The model whose win rate is asked for.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model that it is compared with.")],
    queries: Annotated[Path, typer.Option(metavar="FILE", help="A .jsonl, .json, .csv or .parquet file of queries.")],
    judge: Annotated[
        str, typer.Option(metavar="JUDGE", help="An LLM, a reward model, or a .yaml file with a judge section.")
    ],
    column: Annotated[str, typer.Option(help="The column with the query.")] = "query",
    limit: Annotated[int | None, typer.Option(help="Only so many queries, the first ones.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="Of the answers; 0 takes the most probable token.", min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus of the answers.")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of an answer.", min=1)] = 2048,
    template_arguments: TemplateArguments = None,
    engine: EngineFile = None,
    output: Output = Path("evaluations"),
    json: Json = None,
) -> None:
    """Let a judge compare two models' answers to the same queries, in both orders; length-controlled, too."""
    with graceful_stop():
        from selfsteer import evaluate as evaluating
        from selfsteer.recipe.sections import Policy, Queries, Sampled
        from selfsteer.report.tables import print_evaluation

        arguments = _template_arguments(template_arguments)
        found = evaluating.compare_answers(
            (Policy(model=a, template_arguments=arguments), Policy(model=b, template_arguments=arguments)),
            Queries(path=str(queries), column=column, limit=limit),
            Sampled(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens),
            (evaluating.read_engine(engine), judge),
            output,
        )
        print_evaluation(found, f"{a} against {b}")
        _write_json(json, found)


@app.command()
def reward(
    pairs: Annotated[list[Path], typer.Argument(metavar="PAIRS...", help="Preference datasets.", show_default=False)],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The chat model to start from, as policy.model in a recipe.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; the same command goes on from there.")],
    weights: Annotated[
        str | None, typer.Option(metavar="W,...", help="How often each dataset is taken: 0.5 half of it, 2 twice.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of the queries kept for measuring.", min=0, max=0.9)] = 0.1,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs.")] = 1.0,
    learning_rate: Annotated[float | None, typer.Option(help="1e-5 when left out; 1e-4 with --lora-rank.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs an optimizer step.", min=1)] = 32,
    micro_batch_size: Annotated[int, typer.Option(help="Pairs a forward pass: memory, not mathematics.", min=1)] = 4,
    lora_rank: Annotated[int | None, typer.Option(help="Train adapters of this rank; all weights otherwise.", min=1)] = None,
    margin: Annotated[bool, typer.Option("--margin", help="Take each pair's own margin from its row.")] = False,
    center: Annotated[float | None, typer.Option(help="Pull rewards to a mean of zero, such as 0.01.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longer conversations are dropped.", min=1)] = 2048,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="A Jinja chat template, for a model without.")
    ] = None,
    dtype: Annotated[DTypeName, typer.Option(help="Arithmetic of the forward pass.")] = "auto",
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the head and of the order.", min=0)] = 0,
) -> None:
    """Train a reward model on preference pairs, and measure it on held-out ones."""
    with graceful_stop():
        from selfsteer import rewards
        from selfsteer.report.tables import print_judged
        from selfsteer.training.reward import RewardTraining

        given = [1.0] * len(pairs) if weights is None else [_weight(text) for text in weights.split(",")]
        if len(given) != len(pairs):
            raise ValueError(f"--weights: {len(given)} weights for {len(pairs)} datasets")
        training = RewardTraining(
            epochs=epochs,
            learning_rate=learning_rate or (1e-5 if lora_rank is None else 1e-4),
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            lora_rank=lora_rank,
            margin=margin,
            center=center,
            dtype=dtype,
            seed=seed,
            save_steps=save_steps,
        )
        settings = rewards.RewardSettings(holdout=holdout, max_tokens=max_tokens, chat_template=chat_template, dtype=dtype)
        sources = [rewards.Source(path=path, weight=weight) for path, weight in zip(pairs, given, strict=True)]
        found = rewards.train_reward_model(sources, model, output, settings, training)
        print_judged(found["held_out"], "Held-out pairs")
        typer.echo(f"reward model  {found['model']}")


def _template_arguments(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return TypeAdapter(dict[str, Any], config=ConfigDict(strict=True)).validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError):
        raise ValueError(
            f"--template-arguments: {text!r}; expected names and values, such as '{{thinking: false}}'"
        ) from None


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"--weights: {text!r} is no positive number")
    return weight


@app.command("reward-bench")
def reward_bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A reward model: a folder or a hub id.", show_default=False)],
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE", help="RewardBench, RewardBench 2, LLMBar, or preference pairs; several times for several."
        ),
    ],
    output: Output = Path("evaluations"),
    max_tokens: Annotated[int, typer.Option(help="Longer conversations are not scored.", min=1)] = 8192,
    dtype: Annotated[DTypeName, typer.Option(help="Arithmetic of the forward pass.")] = "auto",
    json: Json = None,
) -> None:
    """Measure a reward model on labelled data: by subset and over all, as each benchmark is published."""
    with graceful_stop():
        from selfsteer import rewards
        from selfsteer.report.tables import print_reward_bench

        settings = rewards.RewardSettings(max_tokens=max_tokens, dtype=dtype)
        found = rewards.reward_bench(model, data, output, settings)
        for name, benchmark in found.items():
            print_reward_bench(benchmark, name)
        _write_json(json, found)


def _write_json(file: Path | None, found: Mapping[str, Any]) -> None:
    if file is not None:
        import json

        from selfsteer.measures.metrics import plain

        file.write_text(json.dumps(plain(found), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


@app.command("report")
def print_report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A run folder, or the folder of a comparison.", show_default=False)
    ],
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the plots of a run there, as SVG and PNG, instead.", show_default=False),
    ] = None,
) -> None:
    """Print all tables of a run; or make the page and the tables of a comparison again, from its numbers."""
    if (folder / "comparison.json").exists():
        if figures is not None:
            raise ValueError(f"--figures: {folder} is a comparison; name the folder of one of its runs")
        from selfsteer.report.comparison import write_comparison_page

        write_comparison_page(folder)
        typer.echo(f"comparison  {folder / 'comparison.html'}, comparison.md")
        return
    from selfsteer.report.tables import print_run, read_metrics

    metrics = read_metrics(folder)
    if figures is None:
        print_run(metrics)
        return
    from selfsteer.report.page import write_run_figures

    for path in write_run_figures(metrics, figures):
        typer.echo(path)


def _seed(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"--seeds: {text!r} is not a whole number")
    return int(text)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a preference dataset.", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    format: Annotated[ExportFormat, typer.Option(help="What will read it.")],
    keep_truncated: Annotated[
        bool, typer.Option("--keep-truncated", help="Also pairs with a cut-off response, in columns that say so.")
    ] = False,
    round: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Of a run: this round's pairs, not the last that were aligned on.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the preference pairs of a run for the program that trains on them, with a dataset card."""
    from selfsteer.data import exchange

    found = exchange.export(run, to, format, keep_truncated=keep_truncated, round=round)
    if found.warning is not None:
        log.warning("%s", found.warning)
    if keep_truncated:
        log.warning("cut-off responses are among the pairs: a trainer that puts an end token there teaches to stop early")
    typer.echo(f"wrote {found.written:,} pairs to {to}")
    _print_dropped(found.dropped, found.written)
    typer.echo(f"use them with  {found.command}")


# ---- printing -------------------------------------------------------------------------------------------------------


def _print_status(found: "Status") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from selfsteer.report.tables import duration

    colours = {"sealed": "green", "partial": "yellow", "waiting": "dim"}
    table = Table(title=Text(found["run"]), title_justify="left")
    for heading in ("round", "stage", "state", "kept", "wanted", "dropped", "time"):
        table.add_column(
            heading, justify="right" if heading in {"round", "kept", "wanted", "time"} else "left", overflow="fold"
        )
    for stage in found["stages"]:
        drops = ", ".join(f"{count:,} {reason}" for reason, count in sorted(stage["dropped"].items(), key=lambda d: -d[1]))
        table.add_row(
            str(stage["round"]),
            Text(stage["name"]),
            Text(stage["state"], style=colours[stage["state"]]),
            _count(stage["kept"]),
            _count(stage["wanted"]),
            Text(drops),
            "-" if stage["seconds"] is None else duration(stage["seconds"]),
        )
    console = Console()
    console.print(table)
    console.print(Text(f"next: {found['next']}"))


def _print_dropped(dropped: Mapping[str, int], kept: int) -> None:
    """Nothing is left out without a word."""
    if dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        log.warning("dropped %s of %s: %s", f"{sum(dropped.values()):,}", f"{kept + sum(dropped.values()):,}", reasons)


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


# ---- logging and errors ---------------------------------------------------------------------------------------------


def _configure_logging(*, verbose: bool) -> None:
    """Our own messages from INFO up, everyone else's from WARNING up, on stderr."""
    # Read when the libraries are first imported, which is why they are not set through their own functions.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if verbose else "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "warning" if verbose else "error")
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars for loading and writing weights
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)
    logging.getLogger("selfsteer").setLevel(logging.DEBUG if verbose else logging.INFO)


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        app(prog_name="selfsteer")
    except Interrupted as stopped:
        print(f"{stopped}:\n  {shlex.join(['selfsteer', *sys.argv[1:]])}", file=sys.stderr)
        sys.exit(stopped.exit_status)
    except (ValueError, OSError) as error:
        log.debug("the error in full", exc_info=error)
        print(f"selfsteer: error: {error}", file=sys.stderr)
        sys.exit(2)
