"""The first recipe: what it says fits the machine, loads, and never replaces a file."""

import io
import json
import sys
from pathlib import Path

import pytest

from selfsteer import cli, first_recipe
from selfsteer.recipe.sections import load


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "my queries: all.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {number} and {number}?"}) + "\n" for number in range(40)))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)
    monkeypatch.setattr(sys, "argv", ["selfsteer", "init", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_writes_what_loads(
    tiny_folder: str, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "mine.yaml"
    given = ("--model", tiny_folder, "--queries", str(queries), "--column", "prompt")
    assert command(monkeypatch, str(file), *given, "--output", str(tmp_path / "run")) == 0
    assert f"selfsteer run {file}" in capsys.readouterr().out
    recipe = load(file)
    assert (recipe.policy.model, recipe.queries.path, recipe.queries.column) == (tiny_folder, str(queries), "prompt")
    assert (recipe.queries.holdout, recipe.quality.gain) == (10, 10), "a quarter of 40"
    assert recipe.training.lora is None
    assert recipe.engine.kind == "transformers", "there is no vLLM in this environment"
    assert recipe.generator.learning_rate == 1e-5, "a small model"
    before = file.read_bytes()
    assert command(monkeypatch, str(file), *given) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_what_is_not_given_is_asked_for(
    tiny_folder: str, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A person answers; where nobody does, the option is named."""
    file = tmp_path / "mine.yaml"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{tiny_folder}\n{queries}\n"))
    assert command(monkeypatch, str(file)) == 0
    assert load(file).queries.column == "prompt"
    assert load(file).policy.model == tiny_folder
    for answers, option in (("", "--model"), (f"{tiny_folder}\n", "--queries")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
        assert command(monkeypatch, str(tmp_path / "other.yaml")) == 2
        assert f"nobody answers: give it with {option}" in capsys.readouterr().err
    assert not (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize(
    ("row", "taken"),
    [
        ({"id": 1, "prompt": "Who?"}, "prompt"),
        ({"prompt": "Who?", "query": "Why?"}, "query"),
        ({"source": "x", "instruction": "Tell."}, "instruction"),
        ({"messages": [{"role": "user", "content": "Who?"}]}, "messages"),
    ],
)
def test_the_column_is_known_by_its_name(tiny_folder: str, tmp_path: Path, row: dict[str, object], taken: str):
    path = tmp_path / "queries.jsonl"
    path.write_text(8 * f"{json.dumps(row)}\n")
    text = first_recipe.first_recipe(tiny_folder, str(path), None, "runs/first")
    assert f"column: {taken}\n" in text


def test_adapters_where_all_weights_do_not_fit(tiny_folder: str, queries: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_recipe, "device_memory", lambda _: 1000)
    text = first_recipe.first_recipe(tiny_folder, str(queries), "prompt", "runs/first")
    assert "lora:" in text
    assert "so adapters are trained" in text


def test_what_is_not_there_is_named(tiny_folder: str, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"has no 'query'; found the keys \['prompt'\]"):
        first_recipe.first_recipe(tiny_folder, str(queries), "query", "runs/first")
    with pytest.raises(ValueError, match="no-model"):
        first_recipe.first_recipe(str(tmp_path / "no-model"), str(queries), "prompt", "runs/first")


@pytest.mark.parametrize(("option", "missing"), [("--model", "./no-model"), ("--queries", "no-queries.jsonl")])
def test_a_slip_is_named_before_torch_is_imported(
    tiny_folder: str,
    queries: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    missing: str,
):
    monkeypatch.setitem(sys.modules, "selfsteer.first_recipe", None)  # what imports torch
    given = {"--model": tiny_folder, "--queries": str(queries)} | {option: missing}
    arguments = [text for pair in given.items() for text in pair]
    assert command(monkeypatch, str(tmp_path / "mine.yaml"), *arguments) == 2
    assert missing in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()
