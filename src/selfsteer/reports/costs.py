"""Where the time, the memory and the disk of a run went, and what a run will take, as tables.

Left out on purpose: taking the time (`clock.py`), and the estimates (`plan.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from selfsteer.clock import PARTS, PRODUCTS, Part, most
from selfsteer.measures.metrics import Metrics, PartSummary, RoundMetrics, StageSummary
from selfsteer.reports.drawing import Cell, Row, Table, console_of, print_table
from selfsteer.runtime import duration


def print_costs(metrics: Metrics, *, session: float) -> None:
    """Print where the time of a run went. session: seconds of the command that ends now."""
    rounds = metrics["rounds"]
    for table in costs(metrics):
        print_table(table)
    stages = sum(stage["seconds"] for this in rounds for stage in this.get("stages", {}).values())
    said = f"stages {duration(stages)}, over all sessions; this command {duration(session)}, with libraries, checks and page"
    console_of().print(Text(said), soft_wrap=True)


def costs(metrics: Metrics) -> Iterator[Table]:
    """What every round took (`cost_tables`)."""
    rounds = metrics["rounds"]
    for number, this in enumerate(rounds, 1):
        yield from cost_tables(this, round_suffix(number, rounds))


def round_suffix(number: int, rounds: Sequence[RoundMetrics]) -> str:
    """Which round the title of a table or a plot is about; "" where there is one."""
    return f", round {number}" if len(rounds) > 1 else ""


def cost_line(metrics: Metrics) -> str:
    """What the stages of all rounds took: time, tokens, memory at the peak, disk."""
    stages = [stage for this in metrics["rounds"] for stage in this.get("stages", {}).values()]
    said = [f"Cost: {duration(sum(stage['seconds'] for stage in stages))}"]
    for part, name in (("sample", "sampled"), ("score", "scored"), ("forward", "trained")):
        tokens = sum(stage.get("parts", {}).get(part, _NOTHING)["tokens"] for stage in stages)
        said += [f"{tokens:,} tokens {name}"] if tokens else []
    peaks = most(*(stage.get("memory", {}) for stage in stages))
    said += [f"{peaks[where] / 1e9:.1f} GB of {where.upper()}" for where in ("ram", "gpu") if peaks.get(where)]
    return ", ".join([*said, f"{sum(stage.get('disk', 0) for stage in stages) / 1e9:.1f} GB of disk"])


def cost_tables(this: RoundMetrics, suffix: str) -> Iterator[Table]:
    """What each part of the work took, over all stages and in each; nothing where it was not recorded."""
    stages = this.get("stages", {})
    known = {name: stage.get("parts", {}) for name, stage in stages.items()}
    found = [part for part in PARTS if any(part in parts for parts in known.values())]
    whole = sum(stage["seconds"] for stage in stages.values())
    if not found or not whole:
        return
    seconds = {part: sum(parts.get(part, _NOTHING)["seconds"] for parts in known.values()) for part in found}
    tokens = {part: sum(parts.get(part, _NOTHING)["tokens"] for parts in known.values()) for part in found}

    def line(label: str, took: float, counted: int = 0) -> Row:
        rate = f"{counted / took:,.0f}" if counted and took else ""
        return Row(label, tuple(map(Cell, (duration(took), f"{took / whole:.1%}", f"{counted:,}" if counted else "", rate))))

    rows = [line(part, seconds[part], tokens[part]) for part in found]
    rows += [line("all else", max(0.0, whole - sum(seconds.values()))), line("all", whole)]
    products = [part for part in found if part in PRODUCTS]
    share = sum(seconds[part] for part in products) / whole
    note = f"{share:.0%} in model products: {', '.join(products)}. Tokens are of responses."
    yield Table(f"Where the time went{suffix}", ("time", "share", "tokens", "tokens a second"), tuple(rows), note)

    def of_stage(name: str, stage: StageSummary) -> Row:
        took = {group: sum(known[name].get(part, _NOTHING)["seconds"] for part in parts) for group, parts in _COSTS.items()}
        took |= {"else": max(0.0, stage["seconds"] - sum(took.values())), "all": stage["seconds"]}
        held = {"disk": stage.get("disk", 0), **stage.get("memory", {})}
        sizes = (_megabytes(held[where]) if held.get(where) else "" for where in places)
        return Row(name, tuple(map(Cell, (*(f"{each:.1f}" if each >= 0.05 else "" for each in took.values()), *sizes))))

    known_places = {"disk"}.union(*(stage.get("memory", {}) for stage in stages.values()))
    places = [each for each in _PLACES if each in known_places]
    rows = [of_stage(name, stage) for name, stage in stages.items()]
    note = "Memory: at the peak, without servers." if len(places) > 1 else ""
    columns = (*_COSTS, "else", "all", *(f"MB {where}" for where in places))
    yield Table(f"{BY_STAGE}{suffix}", columns, tuple(rows), note)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.{0 if size >= 100e6 else 1}f}"


BY_STAGE = "Seconds and megabytes by stage"
"""How the title of that table begins."""

_PLACES = ("disk", "ram", "gpu")


_NOTHING = PartSummary(seconds=0.0, tokens=0)

_COSTS: Mapping[str, tuple[Part, ...]] = {
    "load": ("load", "render"),
    "sample": ("sample",),
    "score": ("score",),
    "train": ("forward", "backward", "optimizer"),
    "measure": ("measure",),
    "save": ("checkpoint", "journal", "seal"),
}


def print_plan(found: Mapping[str, Any]) -> None:
    """Print what a run will take (`plan.Plan`)."""

    def size(number: int) -> Cell:
        return Cell(f"{number / 1e9:.2f}" if number else "")

    def row(stage: Mapping[str, Any]) -> Row:
        counts = (Cell(f"{stage[name]:,}" if stage[name] else "") for name in ("samples", "sampled", "scored", "trained"))
        time = "" if stage["seconds"] is None else duration(stage["seconds"])
        disk = stage["disk"] + stage["passing_disk"]
        return Row(stage["stage"], (*counts, size(stage["memory"]), size(disk), Cell(time)))

    rates = ", ".join(f"{rate:,.0f} {name}" for name, rate in found["rates"].items() if rate is not None)
    whole = "not known" if found["seconds"] is None else duration(found["seconds"])
    free = "not known" if found["memory_free"] is None else f"{found['memory_free'] / 1e9:.1f}"
    shard = "" if found["shard"] is None else f"shard {found['shard']} of "
    note = (
        "Responses; tokens sampled, scored and trained on; memory and disk in GB.\n"
        f"{shard}{found['queries']:,} queries, responses of {found['response']:.0f} tokens; tokens a second:"
        f" {rates or 'not measured'}. Memory at the peak {found['memory'] / 1e9:.1f} GB"
        f" ({found['memory_most'] / 1e9:.1f} GB if every response is as long as it may be) of {free} free, disk"
        f" {found['disk'] / 1e9:.1f} GB of {found['disk_free'] / 1e9:.0f} free. Time of {found['rounds']} round(s): {whole},"
        " on this machine as busy as it was while these rates were measured; judges, benchmarks, 4-gain and 5-quality are"
        " not in it."
    )
    columns = ("responses", "sampled", "scored", "trained", "memory", "disk", "time")
    console = console_of()
    print_table(Table(f"Plan for {found['model']}", columns, tuple(map(row, found["stages"])), note), console)
    for warning in found["warnings"]:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)
    for problem in found["problems"]:
        console.print(Text(f"! {problem}", style="bold red"), soft_wrap=True)
