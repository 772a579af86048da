"""A comparison of ways of making preference data: its shape on disk, its tables, its page.

Read from comparison.json alone. Left out on purpose: running the arms (`comparing.py`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from selfsteer.measures.estimates import METHOD, Estimate, known
from selfsteer.measures.metrics import from_plain, plain
from selfsteer.measures.verdicts import JudgeReport
from selfsteer.reports.drawing import Cell, Form, Row, Table, cell, markdown
from selfsteer.reports.page import NO_PLOTS, PLOTS_NEED, frame, table_html, write_html
from selfsteer.runtime import duration
from selfsteer.store.durable import read_json, write

if TYPE_CHECKING:
    from selfsteer.reports.plots import Plot

BASELINE = "pbaa"

_ON_POLICY = {"chosen": "on_policy_chosen", "rejected": "on_policy_rejected", "all": "on_policy_all"}

_ORDER = {
    "accuracy": "accuracy",
    "consistency": "principle_consistency",
    "margin / token": "margin_per_token",
    "length chosen": "length_chosen",
    "length rejected": "length_rejected",
}

_VARIETY = {"said before (3-grams)": "repetition", "overlap in a pair": "overlap"}

_PASSING = {"before alignment": "passes_before", "after": "passes_after", "told to": "passes_prompted"}

GAINS = {
    "gain": "gain",
    "same_prompt": "gain_same_prompt",
    "steering": "gain_steering",
    "following": "gain_following",
    "entropy": "gain_entropy",
    "displacement": "gain_displacement",
}
"""The changes of `measures/gain.py` by the name of their measure here."""

_CHANGES = {name.replace("_", " "): measure for name, measure in GAINS.items()}

_GROUPS = (
    ("Change of the next token's expectations at the same contexts, nats a token", _CHANGES),
    ("On-policy probability", _ON_POLICY),
    ("Order and length in tokens", _ORDER),
    ("Variety", _VARIETY),
    ("Held-out answers that pass the checks of their principle", _PASSING),
)

_JUDGED = {"accuracy": "accuracy", "principle consistency": "principle_consistency"}

_SHARES = frozenset((*_JUDGED.values(), *_VARIETY.values(), *_PASSING.values()))


def _form(measure: str) -> Form:
    return "share" if measure in _SHARES else "number"


class SeedResult(TypedDict, total=False):
    """One arm under one seed."""

    measures: dict[str, Estimate]
    difference: dict[str, Estimate]
    """Arm - PBAA of the same seed."""


class ArmResult(TypedDict, total=False):
    """One arm over all seeds. Keys that were not measured are absent."""

    description: str
    queries: int
    """Held-out queries with a pair, whatever the seed."""
    measures: dict[str, Estimate]
    difference: dict[str, Estimate]
    """Arm - PBAA, on the queries that both have."""
    by_seed: dict[str, SeedResult]
    """Of several seeds, each by itself."""
    seconds: float
    """Making and judging the data, and aligning, all seeds together; a stage that arms share counts for each."""
    generator: dict[str, float]
    """"first" and "last" loss, "last_margin", "steps", and "unrelated_token", nats a token that unrelated answers moved:
    means over the seeds."""
    bad_generator: dict[str, float]
    policy: dict[str, float]
    headroom: float
    """On-policy probability of y_o above the mean of y+ and y-, the mean over the seeds."""
    wins: JudgeReport
    """Of the aligned policy over the first one; accuracy is the win rate, a tie counting one half."""


class ComparisonResult(TypedDict):
    """comparison.json."""

    baseline: str
    model: str
    seeds: list[int]
    holdout: int
    arms: dict[str, ArmResult]


# --- tables ----------------------------------------------------------------------------------------------------------------


def comparison_tables(result: ComparisonResult) -> Iterator[Table]:
    """The arms as rows: measures, differences from PBAA, trainings and win rates."""
    arms = {name: arm for name, arm in result["arms"].items() if "measures" in arm}
    crossed = len(result["seeds"]) > 1
    method = "95% intervals: queries and seeds as crossed random effects (Satterthwaite)." if crossed else METHOD
    about = f"On {result['holdout']:,} held-out queries, seeds {', '.join(map(str, result['seeds']))}. {method}"
    yield from _measures(arms, "measures", "", about)
    compared = {name: arm for name, arm in arms.items() if "difference" in arm}
    about = f"Per query, over the held-out queries that both arms have. {method}"
    yield from _measures(compared, "difference", f": difference from {BASELINE}", about)
    yield from _seed_tables(compared, result["seeds"])
    yield _trainings(arms)


def _measures(arms: Mapping[str, ArmResult], key: Literal["measures", "difference"], of: str, note: str) -> Iterator[Table]:
    """A table for each group of which some arm has a measure."""
    found = {name: arm.get(key, {}) for name, arm in arms.items()}
    for title, columns in _GROUPS:
        shown = {heading: name for heading, name in columns.items() if any(name in each for each in found.values())}
        rows = (
            Row(
                name,
                (
                    Cell(f"{arms[name].get('queries', 0):,}"),
                    *(cell(each.get(measure), _form(measure), signed=key == "difference") for measure in shown.values()),
                ),
            )
            for name, each in found.items()
        )
        if shown:
            yield Table(f"{title}{of}", ("queries", *shown), tuple(rows), note)


def _seed_tables(arms: Mapping[str, ArmResult], seeds: Sequence[int]) -> Iterator[Table]:
    """Each seed by itself: how much of a difference is the training seed's."""
    note = f"Arm - {BASELINE}, per query; what differs between the columns of a row is the seed's doing."
    for heading, measure in (("on-policy probability, all", "on_policy_all"), *_JUDGED.items()):
        found = _by_seed(arms, measure)
        if any(each is not None for of_arm in found.values() for each in of_arm):
            rows = (
                Row(name, tuple(cell(each, _form(measure), signed=True) for each in of_arm))
                for name, of_arm in found.items()
            )
            columns = tuple(f"seed {seed}" for seed in seeds)
            yield Table(f"Seed by seed: {heading}, difference from {BASELINE}", columns, tuple(rows), note)


def _by_seed(arms: Mapping[str, ArmResult], measure: str) -> dict[str, list[Estimate | None]]:
    """The difference of every arm with several seeds, under each of them in their order."""
    return {
        name: [seed.get("difference", {}).get(measure) for seed in arm["by_seed"].values()]
        for name, arm in arms.items()
        if "by_seed" in arm
    }


def _trainings(arms: Mapping[str, ArmResult]) -> Table:
    def loss(arm: ArmResult, key: str) -> Cell:
        found = cast("dict[str, float] | None", arm.get(key))
        return Cell("") if found is None else Cell(f"{found['first']:.4f} -> {found['last']:.4f}")

    def moved(arm: ArmResult, key: str) -> Cell:
        found = cast("dict[str, float] | None", arm.get(key)) or {}
        return Cell(f"{found['unrelated_token']:+.3f}" if "unrelated_token" in found else "")

    rows = [
        Row(
            name,
            (
                Cell(f"{arm['headroom']:+.3f}" if "headroom" in arm else ""),
                loss(arm, "generator"),
                loss(arm, "bad_generator"),
                moved(arm, "generator"),
                loss(arm, "policy"),
                moved(arm, "policy"),
                cell(arm["wins"].get("accuracy") if "wins" in arm else None, "share"),
                Cell(duration(arm.get("seconds", 0.0))),
            ),
        )
        for name, arm in arms.items()
    ]
    columns = ("headroom", "generator's loss", "of rejected", "displaced", "policy's loss", "displaced", "win rate", "time")
    note = (
        "Headroom: on-policy probability of y_o above y+ and y-. Loss of the first and of the last step. Displaced: nats a"
        " token that unrelated answers moved in the training. Win rate of the aligned policy over the first one. "
        "Time: a stage that arms share counts for each."
    )
    return Table("Training", columns, tuple(rows), note)


def write_comparison(folder: Path, result: ComparisonResult) -> None:
    """Write comparison.json."""
    write(folder / "comparison.json", json.dumps(plain(result), indent=2, allow_nan=False).encode() + b"\n")


def read_comparison(folder: Path) -> ComparisonResult:
    """What `write_comparison` wrote. Raises ValueError where there is none."""
    path = folder / "comparison.json"
    if not path.exists():
        raise ValueError(f"{folder}: no comparison here (no comparison.json). Name the folder that `compare` was given.")
    shape = {"baseline": str, "model": str, "seeds": list, "holdout": int, "arms": dict}
    return from_plain(read_json(path, shape, way_out=_WAY_OUT))


_WAY_OUT = "run `selfsteer compare` again, which writes it anew from what is sealed"


def write_tables(folder: Path, result: ComparisonResult) -> None:
    """Write comparison.md."""
    arms = "\n".join(f"- **{name}**: {arm.get('description', '')}" for name, arm in result["arms"].items())
    tables = "\n\n".join(map(markdown, comparison_tables(result)))
    write(folder / "comparison.md", f"# Ways of making preference data\n\n{arms}\n\n{tables}\n".encode())


_FORESTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("on_policy_all", "on-policy probability"),
        ("on_policy_chosen", "of chosen"),
        ("on_policy_rejected", "of rejected"),
    ),
    (
        ("accuracy", "accuracy by the judge"),
        ("principle_consistency", "principle consistency"),
        ("passes_after", "answers that pass after alignment"),
        ("margin_per_token", "margin per token, nats"),
    ),
    (("length_chosen", "tokens of chosen"), ("length_rejected", "tokens of rejected")),
)

_SCATTERS = (
    (
        (GAINS["displacement"], "displacement of bare answers, nats a token"),
        {GAINS["gain"]: "on-policy, nats a token", GAINS["steering"]: "of it steering", GAINS["following"]: "following"},
        "What each generator gained, against what it took away from answers that its training was not about. Up and to"
        " the right is better; how many steps, and how large, is left out on purpose.",
    ),
    (
        ("on_policy_all", "on-policy probability"),
        {"accuracy": "accuracy by the judge", "principle_consistency": "principle consistency"},
        "On-policy probability and order of the pairs, each with its 95% interval. Up and to the right is better; the"
        " intervals of two arms overlap more than that of their difference says, which is taken query by query above.",
    ),
)
"""One measure against others: it and its name, theirs, the caption."""


def write_comparison_page(folder: Path) -> None:
    """Write comparison.md and comparison.html beside a comparison.json. Raises ValueError where there is none."""
    result = read_comparison(folder)
    try:
        _write_page(folder, result)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder / 'comparison.json'}: damaged, not what was written ({error!r}); {_WAY_OUT}") from error


def _write_page(folder: Path, result: ComparisonResult) -> None:
    write_tables(folder, result)
    facts = (
        result["model"],
        f"seeds {', '.join(map(str, result['seeds']))}",
        f"{result['holdout']:,} held-out queries",
    )
    try:
        plots = "\n".join(map(_figure, _plots(result)))
    except ModuleNotFoundError:
        plots = NO_PLOTS
    arms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(arm.get('description', ''))}</dd>" for name, arm in result["arms"].items()
    )
    tables = "\n".join(map(table_html, comparison_tables(result)))
    body = (
        f'<div class="measures">{"".join(_headlines(result))}</div>',
        f"<section><h2>The arms</h2><dl>{arms}</dl></section>",
        plots,
        tables,
        "<p>comparison.json holds every number of this page; <code>selfsteer report</code> makes it again from there.</p>",
    )
    write_html(folder / "comparison.html", frame("Ways of making preference data", facts, "\n".join(body)))


_HEADLINES = {
    "on_policy_all": "on-policy probability",
    "accuracy": "accuracy of the pairs",
    "passes_after": "answers that pass after alignment",
}


def _headlines(result: ComparisonResult) -> Iterator[str]:
    """What the pairs of each arm, and the policy aligned on them, have beyond the baseline's."""
    for measure, title in _HEADLINES.items():
        for name, found in _of(result, "difference", measure).items():
            shown = cell(found, _form(measure), signed=True)
            yield (
                f'<div class="measure"><p class="name">{escape(name)}, {title}, less that of {BASELINE}</p>'
                f"<p>{escape(shown.value)} {escape(shown.interval)}</p></div>"
            )


def _of(result: ComparisonResult, key: Literal["measures", "difference"], measure: str) -> dict[str, Estimate]:
    """One estimate of every arm that has it."""
    return known({name: arm.get(key, {}).get(measure) for name, arm in result["arms"].items()})


def write_comparison_figures(folder: Path, to: Path) -> list[Path]:
    """The plots of a comparison's page as SVG and PNG files; returns them. Raises ValueError without matplotlib."""
    try:
        from selfsteer.reports import plots
    except ModuleNotFoundError as error:
        raise ValueError(PLOTS_NEED) from error
    return plots.write_figures(_plots(read_comparison(folder)), to)


def _plots(result: ComparisonResult) -> Iterator["Plot"]:
    """Raises ModuleNotFoundError without matplotlib."""
    from selfsteer.reports import plots

    for measures in _FORESTS:
        panels = [
            plots.Forest(
                title,
                found,
                {
                    arm: [each.mean for each in seeds if each is not None]
                    for arm, seeds in _by_seed(result["arms"], measure).items()
                },
            )
            for measure, title in measures
            if (found := _of(result, "difference", measure))
        ]
        if panels:
            caption = (
                f"Difference from {BASELINE} with its 95% interval, query by query. Filled: the interval leaves out zero."
                " Small marks: each seed by itself."
            )
            yield plots.Plot(f"differences-{measures[0][0]}", caption, {"": plots.forests(panels)})
    for (measure, label), others, caption in _SCATTERS:
        x = _of(result, "measures", measure)
        panels = {title: y for other, title in others.items() if (y := _of(result, "measures", other))}
        if x and panels:
            yield plots.Plot(f"against-{measure}", caption, {"": plots.scatter(x, panels, label)})


def _figure(plot: "Plot") -> str:
    whole = f'<div class="whole" tabindex="0" role="group" aria-label="plot">{"".join(plot.svgs)}</div>'
    return f"<figure>{whole}<figcaption>{escape(plot.caption)}</figcaption></figure>"
