"""AlpacaEval 2 (arXiv 2404.04475): answers to 805 instructions, compared with a baseline's; its files, and its two win
rates.

    DIR/model_outputs.gpt4_1106_preview.json (or DIR/model_outputs.json)   the baseline's answers, in the published order:
                                                                          instruction, output, generator
    DIR/df_gamed.csv          difficulties, and the answers of two models that gamed lengths, for the published
                              length-controlled rate; without it the formula without difficulty is used, which is said
    annotations.json          recorded judgements: instruction, output_1 (baseline), output_2 (model), preference (1 to 2,
                              1.5 a tie; 0, too, of older files), annotator

Left out on purpose: asking a judge (that is a comparison of answers like any other), and other baselines' leaderboards.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfsteer.data.files import rows_with, told_by
from selfsteer.evaluations.length_controlled import Gamed, Judged, WinRate, length_controlled, read_gamed

_BASELINES = ("model_outputs.gpt4_1106_preview.json", "model_outputs.json")


class Output(NamedTuple):
    """One instruction and an answer to it."""

    instruction: str
    output: str


class Baseline(NamedTuple):
    """The published list of instructions with the baseline's answers."""

    generator: str
    outputs: Sequence[Output]


class Annotations(NamedTuple):
    """Recorded judgements."""

    judged: Sequence[Judged]
    model: str
    baseline: str
    annotator: str


def read_baseline(folder: Path) -> Baseline:
    """Raises ValueError where there is none, or where an instruction stands in it twice."""
    file = next((folder / name for name in _BASELINES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder}: no {_BASELINES[0]}, the answers that AlpacaEval 2 compares with")
    rows = rows_with(file, "instruction", "output", "generator")
    with told_by(file):
        generators = {row["generator"] for row in rows}
        if len(generators) != 1:
            raise ValueError(f"{file}: answers of {sorted(generators)}; expected one model's")
        outputs = [Output(row["instruction"], row["output"]) for row in rows]
        if len({each.instruction for each in outputs}) < len(outputs):
            raise ValueError(f"{file}: an instruction stands in it twice")
    return Baseline(generators.pop(), outputs)


def gamed_of(folder: Path | None) -> Gamed | None:
    """The table of difficulties in a folder; None where there is none."""
    file = None if folder is None else folder / "df_gamed.csv"
    return read_gamed(file) if file is not None and file.is_file() else None


def read_annotations(file: Path) -> Annotations:
    """Judgements in AlpacaEval's own format. Raises ValueError for what is missing, mixed, or no preference."""
    rows = rows_with(file, "instruction", "output_1", "output_2", "preference", "generator_1", "generator_2")
    with told_by(file):
        for name in ("generator_1", "generator_2", "annotator"):
            if len({row.get(name) for row in rows}) != 1:
                raise ValueError(f"{file}: {name} is not the same in every row; give one model's judgements by one judge")
        judged = [
            Judged(
                row["instruction"],
                len(row["output_1"]),
                len(row["output_2"]),
                _preference(row["preference"], f"{file}: row {n}"),
            )
            for n, row in enumerate(rows, start=1)
        ]
    first = rows[0]
    return Annotations(judged, first["generator_2"], first["generator_1"], str(first.get("annotator", "unknown")))


def _preference(value: Any, where: str) -> float | None:
    """From 1 (the baseline) to 2 (the model), as 0 to 1; None without a verdict."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if value == 0:
        return 0.5
    if not isinstance(value, int | float) or not 1 <= value <= 2:
        raise ValueError(f"{where}: preference {value!r} is not between 1 (output_1) and 2 (output_2)")
    return float(value) - 1


def annotated_win_rate(annotations: Annotations, folder: Path | None) -> WinRate:
    """Both win rates of recorded judgements. folder: with df_gamed.csv for the published formula, and the published list."""
    gamed = gamed_of(folder)
    order = None
    if folder is not None and any((folder / name).is_file() for name in _BASELINES):
        order = [each.instruction for each in read_baseline(folder).outputs]
        missing = sorted(set(order) - {each.instruction for each in annotations.judged})
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(order)} instructions have no judgement, first {missing[0][:60]!r}; AlpacaEval's"
                " figures are over all of them"
            )
    return length_controlled(annotations.judged, gamed=gamed, order=order)
