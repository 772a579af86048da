"""comparison.html: the arms of a comparison as plots and tables, made from comparison.json alone.

Left out on purpose: numbers that comparison.json does not hold, and which arm is the best one; the intervals say that.
"""

from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, cast

from selfsteer.cells import cell, plain
from selfsteer.comparison import BASELINE, ComparisonResult, comparison_tables, read_comparison, write_tables
from selfsteer.durable import replacing
from selfsteer.page import table_html

Json = Mapping[str, Any]

_FORESTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("on_policy_all", "on-policy probability"),
        ("on_policy_chosen", "of chosen"),
        ("on_policy_rejected", "of rejected"),
    ),
    (
        ("accuracy", "accuracy by the judge"),
        ("principle_consistency", "principle consistency"),
        ("margin_per_token", "margin per token, nats"),
    ),
    (("length_chosen", "tokens of chosen"), ("length_rejected", "tokens of rejected")),
)
_AGAINST = {"accuracy": "accuracy by the judge", "principle_consistency": "principle consistency"}


def write_comparison_page(folder: Path) -> None:
    """Write comparison.md and comparison.html beside a comparison.json. Raises ValueError where there is none."""
    result = read_comparison(folder)
    write_tables(folder, result)
    facts = (
        result["model"],
        f"seeds {', '.join(map(str, result['seeds']))}",
        f"{result['holdout']:,} held-out queries",
    )
    plots = "\n".join(_plots(result))
    arms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(arm.get('description', ''))}</dd>" for name, arm in result["arms"].items()
    )
    tables = "\n".join(map(table_html, comparison_tables(result)))
    template = Template(files("selfsteer").joinpath("templates/report.html").read_text(encoding="utf-8"))
    text = template.substitute(
        name="Ways of making preference data",
        facts=" · ".join(map(escape, facts)),
        figures=_figures(result),
        tables=f"<section><h2>The arms</h2><dl>{arms}</dl></section>\n{plots}\n{tables}",
        plots="",
        examples="",
        closing="comparison.json holds every number of this page; `selfsteer report` makes it again from there.",
    )
    with replacing(folder / "comparison.html") as file:
        file.write(text.encode(errors="replace"))


def _figures(result: ComparisonResult) -> str:
    """How much more on-policy than the baseline the pairs of each arm are."""
    differences = _of(result, "difference", "on_policy_all")
    cells = ((name, cell(found, "number", signed=True)) for name, found in differences.items())
    return "\n".join(
        f'<div class="figure"><b>{escape(shown.value)}</b><i>{escape(shown.interval)}</i>'
        f"<span>{escape(name)}, on-policy probability above {BASELINE}</span></div>"
        for name, shown in cells
    )


def _of(result: ComparisonResult, key: str, measure: str) -> dict[str, Json]:
    """One estimate of every arm that has it, as JSON values."""
    arms = cast("Mapping[str, Json]", plain(result["arms"]))
    return {name: arm[key][measure] for name, arm in arms.items() if measure in arm.get(key, {})}


def _seeds(result: ComparisonResult, measure: str) -> dict[str, list[float]]:
    """The differences of every arm, seed by seed."""
    arms = cast("Mapping[str, Json]", plain(result["arms"]))
    return {
        name: [
            seed["difference"][measure]["mean"] for seed in arm["by_seed"].values() if measure in seed.get("difference", {})
        ]
        for name, arm in arms.items()
        if "by_seed" in arm
    }


def _plots(result: ComparisonResult) -> Iterator[str]:
    try:
        from selfsteer import comparison_plots
    except ModuleNotFoundError:
        yield '<p class="note">Install matplotlib (pip install "selfsteer[report]") to see plots here.</p>'
        return
    for measures in _FORESTS:
        panels = [
            comparison_plots.Forest(title, found, _seeds(result, measure))
            for measure, title in measures
            if (found := _of(result, "difference", measure))
        ]
        if panels:
            yield _figure(
                comparison_plots.forests(panels),
                f"Difference from {BASELINE} with its 95% interval, query by query. Filled: the interval leaves out zero. "
                "Small marks: each seed by itself.",
            )
    x = _of(result, "measures", "on_policy_all")
    panels = {title: y for measure, title in _AGAINST.items() if (y := _of(result, "measures", measure))}
    if x and panels:
        yield _figure(
            comparison_plots.scatter(x, panels),
            "On-policy probability and order of the pairs, each with its 95% interval. Up and to the right is better; the"
            " intervals of two arms overlap more than that of their difference says, which is taken query by query above.",
        )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
