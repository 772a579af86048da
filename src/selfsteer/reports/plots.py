"""The plots of the report, as SVG to stand inside a page or as files; needs matplotlib, and only this module does.

Colours in a page are its CSS variables, so that the plots follow its light and dark themes. Left out on purpose: anything
that `metrics.json` does not hold.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfsteer.measures.estimates import Distribution, Estimate
from selfsteer.measures.metrics import Comparison, Measures, RoundMetrics, TrainingSummary, find
from selfsteer.reports.tables import GENERATOR, PBAA, trainings_of

# The light theme's, which files keep; in the SVG of a page each is replaced by what the page defines.
COLOURS = {"#1d2329": "var(--ink)", "#12756b": "var(--chosen)", "#a94a20": "var(--rejected)", "#dfe2e0": "var(--line)"}

INK, CHOSEN, REJECTED, LINE = COLOURS

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "selfsteer",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


class Plot(NamedTuple):
    """One figure, of panels that a narrow page stacks."""

    name: str
    """Of its files."""
    caption: str
    panels: Mapping[str, Figure]
    """By title."""

    @property
    def svgs(self) -> list[str]:
        """An <svg> element a panel."""
        return [to_svg(figure, f"{self.caption} {title}") for title, figure in self.panels.items()]


def plots(this: RoundMetrics, data: Mapping[str, Measures]) -> list[Plot]:
    """Every plot that a round's metrics allow. data: sets of pairs by the name they have in the tables."""
    drawn: list[Plot] = []
    trainings = trainings_of(this)
    for key, file, caption in (
        (
            "loss",
            "loss",
            "Training loss of each logged step's own pairs, with what the loss adds to their gap (dpop, the SFT term).",
        ),
        ("margin", "reward-margin", "Reward margin of each step's pairs: beta * (log-ratio of chosen - of rejected)."),
    ):
        curves = {
            name: [(entry["step"], entry[key]) for entry in training.get("curve", []) if key in entry]
            for name, training in trainings.items()
        }
        curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
        if curves:
            drawn.append(Plot(file, caption, _curves(curves, file.replace("-", " "))))
    readings = {name: found for name, training in trainings.items() if (found := _readings(training))}
    if readings:
        drawn.append(Plot("displacement", "How far responses have moved since the training's start.", _movements(readings)))
    if (figure := figure_one(this, data)) is not None:
        drawn.append(figure)
    for name, label, caption in (
        ("margin", "nats a token, chosen - rejected", "Log-probability margin of the pairs under the policy."),
        ("length", "", "Lengths of the responses."),
    ):
        panels = {key: found for key, measures in data.items() if (found := measures.get("distributions", {}).get(name))}
        if panels:
            units = {key: label or data[key].get("length", {}).get("unit", "words") for key in panels}
            drawn.append(Plot(name, caption, _histograms(panels, units)))
    return drawn


@mpl.rc_context(STYLE)
def figure_one(this: RoundMetrics, data: Mapping[str, Measures]) -> Plot | None:
    """The paper's Figure 1 for one run (arXiv 2410.17131): the log-probability of responses under the policy.

    Of each set of pairs, the policy's before and the generator's after its training, beside the policy's own answers y_o.
    None where no set is scored.
    """
    name = "log_probability"
    sets = {key: found for key, measures in data.items() if (found := measures.get("distributions", {}).get(name))}
    if not sets:
        return None
    original = this["headroom"].get("distribution") if "headroom" in this else None
    caption = "Log-probability of the responses under the policy, given the bare query, as densities."
    if original is not None:
        caption += " Dashed: the policy's own answers y_o, unsteered."
    shown = [*sets.values(), *filter(None, [original])]
    low, high = _room(shown)
    panels: dict[str, Figure] = {}
    for key, found in sets.items():
        title = {PBAA: "before: the policy's pairs", GENERATOR: "after: the generator's pairs"}.get(key, key)
        panels[key], axes = _panel(title, "nats a token (mean of a response)", "density")
        for colour, side in zip((CHOSEN, REJECTED), found["counts"], strict=True):
            _density(axes, found, side, color=colour, fill=True, alpha=0.35)
            _density(axes, found, side, color=colour, linewidth=1.2, label=side)
        if original is not None:
            _density(axes, original, "original", color=INK, linewidth=1.2, linestyle="--", label="unsteered")
        axes.legend()
        axes.set_xlim(low, high)
    return Plot("figure-1", caption, panels)


def _density(axes: Axes, found: Distribution, side: str, **drawn: Any) -> None:
    """One histogram, its area 1, whatever its bins and however many responses it counts."""
    edges, counts = found["edges"], found["counts"][side]
    area = sum(counts) * (edges[1] - edges[0])
    axes.stairs([count / area for count in counts], edges, **drawn)


@mpl.rc_context(STYLE)
def figure_three(this: RoundMetrics, data: Mapping[str, Measures]) -> Plot | None:
    """The paper's Figure 3 for one run (arXiv 2410.17131): accuracy of each set of pairs against its on-policy probability.

    Both over the held-out queries that policy and generator answered, where there are any. None where no set has both.
    """
    compared = this.get("comparison", Comparison())
    held_out = bool(compared.get("held_out"))
    judge = "the checks" if any("checks" in measures for measures in data.values()) else "the judge"
    ways = (("judge", f"accuracy by {judge}"), ("principle_consistency", "principle consistency"))
    drawn = ((who, _points(this, data, key, held_out=held_out)) for key, who in ways)
    who, found = next((each for each in drawn if each[1]), ("", None))
    if found is None:
        return None
    caption = "Up and to the right is better. Bars: 95% intervals. Dotted: chance."
    if held_out:
        caption = f"Over the {compared.get('queries', 0):,} held-out queries that both answered. {caption}"
    figure, axes = _panel("", "on-policy probability", who)
    axes.axhline(0.5, color=INK, linewidth=1, linestyle=":", alpha=0.6)
    for colour, (name, (x, y)) in zip((REJECTED, CHOSEN, INK), found.items(), strict=False):
        bars: dict[str, Any] = {"xerr": _reach(x), "yerr": _reach(y), "elinewidth": 1.4}
        axes.errorbar(x.mean, y.mean, **bars, fmt="o", color=colour, label=name)
    if "headroom" in this:
        axes.axvline(this["headroom"]["original"].mean, color=INK, linewidth=1, linestyle="--", label="unsteered")
        caption += " Dashed: the policy's own answers to queries trained on, unsteered; they have no accuracy."
    axes.margins(0.15)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.4), max(high, 0.6))
    axes.locator_params(axis="x", nbins=5)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)  # above: a run has its crosses anywhere
    return Plot("figure-3", caption, {"": figure})


def _points(
    this: RoundMetrics, data: Mapping[str, Measures], key: str, *, held_out: bool
) -> dict[str, tuple[Estimate, Estimate]]:
    """On-policy probability and accuracy by one judge, of each set of pairs that has both.

    held_out: of the held-out queries that both sets have, where it is known of them.
    """
    comparisons = (this.get("comparison"), this.get("judged_comparison", {}).get(key)) if held_out else (None, None)
    own = {PBAA: "baseline", GENERATOR: "pairs"}

    def of(name: str, compared: Any, path: str) -> Estimate | None:
        both = cast("Mapping[str, Estimate]", (compared or {}).get("both", {}))
        return both.get(own.get(name, "")) or find(data[name], path)

    paths = ("on_policy.all", f"{key}.accuracy")
    found = {name: [of(name, *each) for each in zip(comparisons, paths, strict=True)] for name in data}
    return {name.removesuffix(" pairs"): (x, y) for name, (x, y) in found.items() if x is not None and y is not None}


def _reach(value: Estimate) -> list[list[float]] | None:
    """How far an interval reaches below and above its mean; None where there is none."""
    low, high = value.low, value.high
    return None if low is None or high is None else [[value.mean - low], [high - value.mean]]


@mpl.rc_context(STYLE)
def _curves(curves: Mapping[str, Sequence[tuple[float, float]]], label: str) -> dict[str, Figure]:
    drawn: dict[str, Figure] = {}
    for name, curve in curves.items():
        drawn[name], axes = _panel(name, "optimizer step", label)
        axes.plot(*zip(*curve, strict=True), color=CHOSEN, linewidth=1.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn


def _readings(training: TrainingSummary) -> Mapping[str, Sequence[tuple[float, float]]]:
    """Of each kind of responses the optimizer step and the nats moved, where the meter has read any."""
    kinds = {
        kind: [(entry["step"], entry[f"{kind}_moved"]) for entry in training.get("curve", []) if f"{kind}_moved" in entry]
        for kind in ("chosen", "rejected", "unrelated")
    }
    return {kind: [(0, 0.0), *found] for kind, found in kinds.items() if found}


@mpl.rc_context(STYLE)
def _movements(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> dict[str, Figure]:
    colours = {"chosen": CHOSEN, "rejected": REJECTED, "unrelated": INK}
    drawn: dict[str, Figure] = {}
    for name, kinds in panels.items():
        drawn[name], axes = _panel(name, "optimizer step", "nats a response")
        axes.axhline(0, color=LINE, linewidth=1)
        for kind, found in kinds.items():
            axes.plot(*zip(*found, strict=True), color=colours[kind], linewidth=1.5, marker=".", label=kind)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return drawn


@mpl.rc_context(STYLE)
def _histograms(panels: Mapping[str, Distribution], units: Mapping[str, str]) -> dict[str, Figure]:
    """One panel a set of pairs, on the same horizontal scale."""
    low, high = _room([*panels.values()])
    drawn: dict[str, Figure] = {}
    for name, distribution in panels.items():
        both = len(distribution["counts"]) > 1
        drawn[name], axes = _panel(name, units[name], "responses" if both else "pairs")
        for colour, (side, counts) in zip((CHOSEN, REJECTED), distribution["counts"].items(), strict=False):
            axes.stairs(counts, distribution["edges"], fill=True, color=colour, alpha=0.35)
            axes.stairs(counts, distribution["edges"], color=colour, linewidth=1.2, label=side)
        if both:
            axes.legend()
        axes.set_xlim(low, high)
    return drawn


def _room(shown: Sequence[Distribution]) -> tuple[float, float]:
    """Of one horizontal axis for all of them, beyond their outermost edges, whose lines would be cut in two."""
    low, high = min(each["edges"][0] for each in shown), max(each["edges"][-1] for each in shown)
    return low - (high - low) / 50, high + (high - low) / 50


def _panel(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """As wide as a telephone: its text is read there as it is drawn. x, y: what the axes are.

    The same room for the axes in every panel: matplotlib's layout engines draw all text twice more to find it.
    """
    figure = Figure(figsize=(4.4, 2.9))
    axes = figure.subplots(gridspec_kw={"left": 0.18, "right": 0.97, "bottom": 0.17, "top": 0.88})
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def write_figures(drawn: Iterable[Plot], folder: Path) -> list[Path]:
    """Every panel as SVG and PNG, in the colours of the page's light theme; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with mpl.rc_context(STYLE):
        for plot in drawn:
            for number, figure in enumerate(plot.panels.values(), 1):
                path = folder / (plot.name if len(plot.panels) == 1 else f"{plot.name}-{number}")
                figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None}, facecolor="white")
                figure.savefig(path.with_suffix(".png"), dpi=200, facecolor="white")
                written += [path.with_suffix(".svg"), path.with_suffix(".png")]
    return written


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element whose colours are those of the page. label: what it shows, for who can't see it."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    # Several figures stand in one page: names of groups that nothing refers to would be there twice.
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label.strip())}" ', 1)


class Forest(NamedTuple):
    """One panel: a measure's difference from the baseline for every arm."""

    title: str
    differences: Mapping[str, Estimate]
    """By arm."""
    seeds: Mapping[str, Sequence[float]]
    """Arm -> the difference under each seed; arms of one seed are absent."""


@mpl.rc_context(STYLE)
def forests(panels: Sequence[Forest]) -> Figure:
    """Panels side by side, the arms from top to bottom."""
    arms = list(dict.fromkeys(arm for panel in panels for arm in panel.differences))
    figure = Figure(figsize=(9.6, 0.8 + 0.34 * len(arms)), layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(places, panels, strict=True):
        axes.axvline(0, color=LINE, linewidth=1)
        for place, arm in enumerate(arms):
            if (found := panel.differences.get(arm)) is not None:
                filled = "full" if found.above_zero or found.below_zero else "none"
                bar: dict[str, Any] = {"xerr": _reach(found), "elinewidth": 1.6, "fillstyle": filled}
                axes.errorbar(found.mean, place, **bar, fmt="o", color=CHOSEN)
            for value in panel.seeds.get(arm, ()):
                axes.plot(value, place + 0.28, marker="|", markersize=5, color=INK, alpha=0.6)
        axes.set_title(panel.title)
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=5)
        axes.spines["left"].set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def scatter(x: Mapping[str, Estimate], panels: Mapping[str, Mapping[str, Estimate]], label: str) -> Figure:
    """One measure, named by label, against each of the panels' measures; an arm a point, intervals both ways."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, y) in zip(places, panels.items(), strict=True):
        for arm in x.keys() & y.keys():
            bars: dict[str, Any] = {"xerr": _reach(x[arm]), "yerr": _reach(y[arm]), "ecolor": LINE, "elinewidth": 1.2}
            axes.errorbar(x[arm].mean, y[arm].mean, **bars, fmt="o", color=CHOSEN)
            axes.annotate(arm, (x[arm].mean, y[arm].mean), xytext=(5, 5), textcoords="offset points")
        axes.set_xlabel(label)
        axes.set_ylabel(title)
        axes.margins(0.12)
    return figure
