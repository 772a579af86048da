"""AlpacaEval's files: recorded judgements, the published list, and what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsteer.evaluations.alpaca_eval import annotated_win_rate, read_annotations, read_baseline


def annotation(number: int, preference: Any) -> dict[str, Any]:
    return {
        "instruction": f"instruction {number}",
        "output_1": "b" * 100,
        "output_2": "m" * 100,
        "generator_1": "baseline",
        "generator_2": "model",
        "annotator": "judge",
        "preference": preference,
    }


def write(file: Path, rows: Any) -> Path:
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def test_win_rate_of_recorded_judgements(tmp_path: Path):
    """Preferences 1.9 twice, 1.2, 0 (an old tie), 1.5, 1 and none: (0.9 + 0.9 + 0.2 + 0.5 + 0.5 + 0) / 6 = 1/2."""
    rows = [annotation(i, value) for i, value in enumerate([1.9, 1.9, 1.2, 0, 1.5, 1, None])]
    annotations = read_annotations(write(tmp_path / "annotations.json", rows))
    assert annotations[1:] == ("model", "baseline", "judge")
    found = annotated_win_rate(annotations, None)
    assert found.win_rate.mean == pytest.approx(0.5)
    assert (found.wins, found.baseline_wins, found.draws, found.no_verdict) == (2, 2, 2, 1)
    assert found.formula == "length_controlled_minimal"


def test_a_missing_instruction_is_named(tmp_path: Path):
    annotations = read_annotations(write(tmp_path / "annotations.json", [annotation(i, 1.5) for i in range(6)]))
    outputs = [{"instruction": f"instruction {i}", "output": "b", "generator": "baseline"} for i in range(7)]
    write(tmp_path / "model_outputs.json", outputs)
    with pytest.raises(ValueError, match="1 of 7 instructions have no judgement, first 'instruction 6'"):
        annotated_win_rate(annotations, tmp_path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([annotation(0, 3)], "row 1: preference 3 is not between"),
        ([annotation(0, "m")], "row 1: preference 'm'"),
        ([annotation(0, 1), annotation(1, 1) | {"annotator": "other"}], "annotator is not the same"),
        ([{"instruction": "x"}], r"item 1 has no \['output_1'"),
        ([annotation(0, 1) | {"output_1": None}], "its rows are not what is published"),
        ({"a": 1}, "expected a list"),
    ],
)
def test_what_is_refused(rows: Any, said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        read_annotations(write(tmp_path / "annotations.json", rows))


def test_the_baseline_has_each_instruction_once(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no model_outputs.gpt4_1106_preview.json"):
        read_baseline(tmp_path)
    write(tmp_path / "model_outputs.json", [{"instruction": "i", "output": "b", "generator": "g"}] * 2)
    with pytest.raises(ValueError, match="stands in it twice"):
        read_baseline(tmp_path)
