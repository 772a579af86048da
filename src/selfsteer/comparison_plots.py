"""The plots of a comparison, as SVG to stand inside its page; needs matplotlib.

Left out on purpose: anything that comparison.json does not hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfsteer.plots import CHOSEN, INK, LINE, STYLE, to_svg

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
