"""The plots of the report, as SVG to stand inside a page; needs matplotlib, and only this module does.

Colours are CSS variables of the page, so that the plots follow its light and dark themes. Left out on purpose: anything
that `metrics.json` does not hold.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfsteer.measures.metrics import Distribution, Measures, RoundMetrics, TrainingSummary

# Stand-ins that matplotlib accepts as colours, replaced in the SVG by what the page defines.
_COLOURS = {"#010203": "var(--ink)", "#010204": "var(--chosen)", "#010205": "var(--rejected)", "#010206": "var(--line)"}

INK, CHOSEN, REJECTED, LINE = _COLOURS

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "selfsteer",
    "font.family": "sans-serif",
    "font.size": 9.0,
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
    """One figure."""

    caption: str
    svg: str
    """An <svg> element."""


def plots(this: RoundMetrics, data: Mapping[str, Measures]) -> list[Plot]:
    """Every plot that a round's metrics allow. data: sets of pairs by the name they have in the tables."""
    drawn: list[Plot] = []
    curves = {
        name: [(entry["step"], entry["loss"]) for entry in this[key].get("curve", []) if "loss" in entry]
        for name, key in (("data generator", "generator"), ("policy", "policy"))
        if key in this
    }
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if curves:
        drawn.append(Plot("Training loss at each logged optimizer step.", _losses(curves)))
    readings = {
        name: found
        for name, key in (("data generator", "generator"), ("policy", "policy"))
        if key in this and (found := _readings(this[key]))
    }
    if readings:
        drawn.append(Plot("How far responses have moved since the training's start.", _movements(readings)))
    for name, label, caption in (
        ("on_policy", "exp(mean log-probability of a token)", "On-policy probability of the responses under the policy."),
        ("margin", "nats a token, chosen - rejected", "Log-probability margin of the pairs under the policy."),
        ("length", "", "Lengths of the responses."),
    ):
        panels = {key: found for key, measures in data.items() if (found := measures.get("distributions", {}).get(name))}
        if panels:
            units = {key: label or data[key].get("length", {}).get("unit", "words") for key in panels}
            drawn.append(Plot(caption, _histograms(panels, units)))
    return drawn


def _losses(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    with mpl.rc_context(STYLE):
        figure, panels = _figure(len(curves))
        for axes, (name, curve) in zip(panels, curves.items(), strict=True):
            axes.plot([step for step, _ in curve], [loss for _, loss in curve], color=CHOSEN, linewidth=1.5)
            axes.set_title(name)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel("loss")
        return to_svg(figure)


def _readings(training: TrainingSummary) -> Mapping[str, Sequence[tuple[float, float]]]:
    """Of each kind of responses the optimizer step and the nats moved, where the meter has read any."""
    kinds = {
        kind: [(entry["step"], entry[f"{kind}_moved"]) for entry in training.get("curve", []) if f"{kind}_moved" in entry]
        for kind in ("chosen", "rejected", "unrelated")
    }
    return {kind: [(0, 0.0), *found] for kind, found in kinds.items() if found}


def _movements(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    colours = {"chosen": CHOSEN, "rejected": REJECTED, "unrelated": INK}
    with mpl.rc_context(STYLE):
        figure, places = _figure(len(panels))
        for axes, (name, kinds) in zip(places, panels.items(), strict=True):
            axes.axhline(0, color=LINE, linewidth=1)
            for kind, found in kinds.items():
                axes.plot(*zip(*found, strict=True), color=colours[kind], linewidth=1.5, marker=".", label=kind)
            axes.set_title(name)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel("nats a response")
            axes.legend()
        return to_svg(figure)


def _histograms(panels: Mapping[str, Distribution], units: Mapping[str, str]) -> str:
    """One panel a set of pairs, on the same horizontal scale."""
    with mpl.rc_context(STYLE):
        figure, places = _figure(len(panels))
        low = min(distribution["edges"][0] for distribution in panels.values())
        high = max(distribution["edges"][-1] for distribution in panels.values())
        for axes, (name, distribution) in zip(places, panels.items(), strict=True):
            for index, (side, counts) in enumerate(distribution["counts"].items()):
                colour = (CHOSEN, REJECTED)[index]
                axes.stairs(counts, distribution["edges"], fill=True, color=colour, alpha=0.35)
                axes.stairs(counts, distribution["edges"], color=colour, linewidth=1.2, label=side)
            if len(distribution["counts"]) > 1:
                axes.legend()
            axes.set_xlim(low, high)
            axes.set_title(name)
            axes.set_xlabel(units[name])
            axes.set_ylabel("responses" if len(distribution["counts"]) > 1 else "pairs")
        return to_svg(figure)


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9.6, 2.7), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element whose colours are those of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg


Json = Mapping[str, Any]


class Forest(NamedTuple):
    """One panel: a measure's difference from the baseline for every arm."""

    title: str
    differences: Mapping[str, Json]
    """Arm -> {"mean", "low", "high", "n"}."""
    seeds: Mapping[str, Sequence[float]]
    """Arm -> the difference under each seed; arms of one seed are absent."""


def forests(panels: Sequence[Forest]) -> str:
    """Panels side by side, the arms from top to bottom."""
    arms = list(dict.fromkeys(arm for panel in panels for arm in panel.differences))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 0.8 + 0.34 * len(arms)), layout="constrained")
        places = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, panel in zip(places, panels, strict=True):
            axes.axvline(0, color=LINE, linewidth=1)
            for place, arm in enumerate(arms):
                if arm in panel.differences:
                    _interval(axes, panel.differences[arm], place)
                for value in panel.seeds.get(arm, ()):
                    axes.plot(value, place + 0.28, marker="|", markersize=5, color=INK, alpha=0.6)
            axes.set_title(panel.title)
            axes.set_yticks(range(len(arms)), arms)
            axes.set_ylim(len(arms) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=5)
            axes.spines["left"].set_visible(False)
        return to_svg(figure)


def _interval(axes: Axes, found: Json, place: int) -> None:
    low, high = found["low"], found["high"]
    beyond = low is not None and (low > 0 or high < 0)
    if low is not None:
        axes.plot([low, high], [place, place], color=CHOSEN, linewidth=1.6)
    axes.plot(found["mean"], place, marker="o", markersize=6, color=CHOSEN, fillstyle="full" if beyond else "none")


def scatter(x: Mapping[str, Json], panels: Mapping[str, Mapping[str, Json]]) -> str:
    """On-policy probability against each of the panels' measures, an arm a point, intervals both ways."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, y) in zip(places, panels.items(), strict=True):
            for arm in x.keys() & y.keys():
                _cross(axes, arm, x[arm], y[arm])
            axes.set_xlabel("on-policy probability")
            axes.set_ylabel(title)
            axes.margins(0.12)
        return to_svg(figure)


def _cross(axes: Axes, arm: str, x: Json, y: Json) -> None:
    middle = (x["mean"], y["mean"])
    if x["low"] is not None:
        axes.plot([x["low"], x["high"]], [middle[1]] * 2, color=LINE, linewidth=1.2, zorder=1)
    if y["low"] is not None:
        axes.plot([middle[0]] * 2, [y["low"], y["high"]], color=LINE, linewidth=1.2, zorder=1)
    axes.plot(*middle, marker="o", markersize=6, color=CHOSEN, zorder=2)
    axes.annotate(arm, middle, xytext=(5, 5), textcoords="offset points")
