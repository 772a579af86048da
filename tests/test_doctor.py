"""The doctor: what is well is said in a line, what is not comes with its fix and a status of 2."""

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from selfsteer import cli, doctor

Usage = namedtuple("Usage", "total used free")


def found(findings: list[doctor.Finding], what: str) -> doctor.Finding:
    (only,) = [each for each in findings if each.what == what]
    return only


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100e9, 10e9, 90e9))


def test_this_environment_is_sound():
    """That of the tests has the libraries of the package within their bounds, and no vLLM."""
    findings = doctor.examine()
    assert not doctor.broken(findings)
    assert "transformers 5." in found(findings, "libraries").found
    assert "cpus" in found(findings, "device").found
    assert found(findings, "disk, here").found == "90 GB free"
    assert found(findings, "vLLM").state == "missing"
    assert "engine.python" in found(findings, "vLLM").fix


def test_a_library_out_of_bounds_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    honest = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "4.57.1" if name == "transformers" else honest(name))
    findings = doctor.examine()
    assert doctor.broken(findings)
    transformers = found(findings, "transformers")
    assert (transformers.state, transformers.found) == ("broken", "version 4.57.1, wanted >=5.23")
    assert transformers.fix == "pip install 'transformers>=5.23'"
    assert "transformers" not in found(findings, "libraries").found
    assert "vLLM" not in [each.what for each in findings], "what comes then imports what is broken"


def test_a_full_disk_and_an_interpreter_that_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100e9, 99e9, 1e9))
    findings = doctor.examine("/nowhere/bin/python")
    assert found(findings, "disk, here").found == "1.0 GB free"
    assert found(findings, "disk, here").state == "broken"
    assert found(findings, "vLLM").state == "broken"
    assert "/nowhere/bin/python" in found(findings, "vLLM").found


@pytest.mark.parametrize(("free", "status"), [(90e9, 0), (1e9, 2)])
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free: float, status: int):
    monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100e9, 0, free))
    monkeypatch.setattr(sys, "argv", ["selfsteer", "doctor", "--json", "-"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {each["state"] for each in findings} == ({"ok", "missing"} if status == 0 else {"ok", "missing", "broken"})
