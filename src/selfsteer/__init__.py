"""selfsteer: align a chat model without human labels, by Self-Steering Optimization (arXiv 2410.17131).

import selfsteer
metrics = selfsteer.run("quickstart", "queries.limit=48")
print(selfsteer.report("runs/quickstart"))

Each function does what the command of its name does, and returns what that found. All raise ValueError, or
FileNotFoundError for a file that is missing, for what the user can mend, with the way out; those that take long raise
`selfsteer.runtime.Interrupted` after SIGINT or SIGTERM, and are called from the main thread. Log records go to the logger
"selfsteer", which is silent until it is given a handler.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsteer.data.exchange import Exported, ExportFormat
    from selfsteer.measures.metrics import Measures, Metrics
    from selfsteer.recipe.sections import Recipe
    from selfsteer.reports.comparison import ComparisonResult
    from selfsteer.stages.status import Status
    from selfsteer.store.folder import Stage

__all__ = ["compare", "evaluate", "export", "load", "measure", "report", "run", "status", "train"]

logging.getLogger(__name__).addHandler(logging.NullHandler())
# Where it is installed it asks, on some CPUs, for a kernel that is not used here.
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)

# Everything is imported inside the functions, so that `import selfsteer` and the command's help stay fast.


def load(recipe: Path | str, *overrides: str) -> Recipe:
    """The recipe of a YAML file, or one that comes with the package, such as "quickstart".

    overrides: "key=value", with dotted keys. Raises RecipeError, a ValueError, naming file, line and key.
    """
    from selfsteer.recipe import sections

    return sections.load(Path(recipe), overrides)


def run(recipe: Recipe | Path | str, *overrides: str, replace: bool = False, borrow: Sequence[Path | str] = ()) -> Metrics:
    """The whole pipeline, or its continuation, as `selfsteer run` does it.

    recipe: a Recipe, or as `load` takes it; overrides go with the latter only.
    replace: give up the pairs and models that other settings made in the same output folder; refused otherwise.
    borrow: run folders whose stages and samples are taken over where they are the same.
    Returns what metrics.json holds.
    """
    from selfsteer import pipeline
    from selfsteer.runtime import graceful_stop

    resolved = _recipe(recipe, overrides)
    with graceful_stop():
        return pipeline.run(resolved, replace=replace, borrow=_paths(borrow))


def train(
    pairs: Path | str,
    recipe: Recipe | Path | str,
    *overrides: str,
    replace: bool = False,
    borrow: Sequence[Path | str] = (),
) -> Metrics:
    """Align a model on a preference dataset made elsewhere; as `run`, without making the data."""
    from selfsteer.data.named import check_order
    from selfsteer.given import train_pairs
    from selfsteer.runtime import graceful_stop

    if isinstance(recipe, (Path, str)):
        check_order(Path(pairs), Path(recipe))
    resolved = _recipe(recipe, overrides)
    with graceful_stop():
        return train_pairs(Path(pairs), resolved, replace=replace, borrow=_paths(borrow))


def measure(
    pairs: Path | str, policy: str | None = None, judge: str | None = None, template_arguments: dict[str, Any] | None = None
) -> Measures:
    """On-policy probability, margins, lengths and overlap of a preference dataset or of a run, and a judge's verdicts.

    policy: the model to measure under; of a run the one that its pairs are to align, when None.
    judge: an LLM, a reward model, a YAML file with a judge section, or "implicit:MODEL". template_arguments: of the policy.
    """
    from selfsteer.given import measure_pairs
    from selfsteer.runtime import graceful_stop

    with graceful_stop():
        return measure_pairs(Path(pairs), policy, judge, template_arguments)


def compare(
    recipe: Recipe | Path | str,
    *overrides: str,
    arms: Sequence[str] = ("pbaa", "sso"),
    seeds: Sequence[int] | None = None,
    replace: bool = False,
    borrow: Sequence[Path | str] = (),
) -> ComparisonResult:
    """Ways of making preference data, side by side on held-out queries. seeds: the recipe's when None."""
    from selfsteer import comparing
    from selfsteer.runtime import graceful_stop

    resolved = _recipe(recipe, overrides)
    with graceful_stop():
        return comparing.compare(
            resolved, arms, [resolved.seed] if seeds is None else seeds, replace=replace, borrow=_paths(borrow)
        )


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    before: str | None = None,
    limit: int | None = None,
    data: Path | str | None = None,
    judge: str | None = None,
    engine: Path | str | None = None,
    output: Path | str = "evaluations",
    fewshot: int | None = None,
    max_new_tokens: int | None = None,
    chat_template: str | None = None,
    template_arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A model on benchmarks, alone or against the one before, with paired differences.

    limit: only so many items of each task. data: a folder with a folder of files for each task; the hub's otherwise.
    engine: a YAML file with an engine section. output: the folder that keeps what was answered.
    fewshot, max_new_tokens: instead of the tasks' own. chat_template, template_arguments: of both models, as in a recipe.
    """
    from selfsteer import evaluating
    from selfsteer.recipe.sections import EvaluationSection, Policy
    from selfsteer.runtime import graceful_stop

    section = EvaluationSection(
        tasks=list(tasks),
        limit=limit,
        data=None if data is None else str(data),
        fewshot=fewshot,
        max_new_tokens=max_new_tokens,
    )
    models = [
        Policy(model=name, chat_template=chat_template, template_arguments=template_arguments or {})
        for name in (before, model)
        if name is not None
    ]
    with graceful_stop():
        opened = evaluating.read_engine(None if engine is None else Path(engine))
        return evaluating.evaluate_models(models, section, opened, judge, Path(output))


def export(
    run: Path | str,
    to: Path | str,
    format: ExportFormat,
    *,
    keep_truncated: bool = False,
    keep_held_out: bool = False,
    round: int | None = None,
) -> Exported:
    """Write the preference pairs of a run, or of a file, for the program that trains on them ("trl", ...).

    keep_truncated: also pairs with a cut-off response, in columns that say so. keep_held_out: also those of held-out
    queries, on which nothing was trained. round: of a run, this round's pairs.
    """
    from selfsteer.data import exchange

    def held_out(pairs: Stage) -> Collection[str]:
        from selfsteer.stages.drawing import held_out_of

        return () if keep_held_out else held_out_of(pairs)

    return exchange.export(Path(run), Path(to), format, keep_truncated=keep_truncated, round=round, held_out=held_out)


def status(run: Path | str) -> Status:
    """How far a run is, stage by stage; also of one under way."""
    from selfsteer.stages.status import status as status_of

    return status_of(Path(run))


def report(folder: Path | str) -> str:
    """All tables of a run, or of a comparison, as text of 100 columns."""
    from selfsteer.measures.metrics import read_metrics
    from selfsteer.reports.comparison import comparison_tables, read_comparison
    from selfsteer.reports.drawing import as_text, table_text
    from selfsteer.reports.verdict import print_run

    if (Path(folder) / "comparison.json").exists():
        return "\n\n".join(map(table_text, comparison_tables(read_comparison(Path(folder)))))
    return as_text(lambda console: print_run(read_metrics(Path(folder)), console))


def _recipe(recipe: Recipe | Path | str, overrides: Sequence[str]) -> Recipe:
    from selfsteer.recipe.sections import Recipe

    if not isinstance(recipe, Recipe):
        return load(recipe, *overrides)
    if overrides:
        raise ValueError("overrides go with the path of a recipe; a Recipe is changed with model_copy(update=...)")
    return recipe


def _paths(folders: Sequence[Path | str]) -> list[Path]:
    return [Path(folder) for folder in folders]
