"""What a mistake gets: exit status 2, a message with the culprit and the way out, no traceback, and nothing written.

The command is called in this process, with the real pipeline behind it.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import selfsteer
from selfsteer import cli
from selfsteer.recipe.sections import Recipe
from selfsteer.training import checkpoints

RecipeOf = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)


@pytest.fixture
def refused(
    tmp_path: Path, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a recipe with changes that must be refused; returns the message."""

    def run(changes: dict[str, Any] | None = None, *overrides: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_of(tmp_path / "run", changes)))
        monkeypatch.setattr(sys, "argv", ["selfsteer", "run", str(path), *overrides])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert "selfsteer: error: " in captured.err
        assert "Traceback" not in captured.err
        return captured.err.split("selfsteer: error: ", 1)[1]

    return run


def nothing_made(run: Path) -> bool:
    """No sample and no sealed stage."""
    return not [file for file in run.glob("round-*/**/*") if file.is_file() and file.name != "elapsed.json"]


def queries(tmp_path: Path, content: bytes, name: str = "queries.jsonl") -> dict[str, Any]:
    (tmp_path / name).write_bytes(content)
    return {"queries.path": str(tmp_path / name)}


# --- the recipe ------------------------------------------------------------------------------------------------------------


def test_an_unknown_key(refused: Callable[..., str], tmp_path: Path):
    message = refused({"alignment.learning_rat": 1e-6})
    assert "recipe.yaml:" in message
    assert "alignment.learning_rat: unknown key; did you mean alignment.learning_rate?" in message
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_on_the_command_line(refused: Callable[..., str], tmp_path: Path):
    message = refused(None, "respnses.top_p=0.5")
    assert "command line" in message
    assert "did you mean responses" in message
    assert not (tmp_path / "run").exists()


def test_a_value_out_of_range(refused: Callable[..., str], tmp_path: Path):
    assert "responses.top_p" in refused({"responses.top_p": 1.5})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no settings"),
        (b"[1]", "no settings"),
        (b"a: [", "no YAML"),
        (b"\xff", "not UTF-8"),
        (b"distributed_type: DEEPSPEED", "DeepSpeed is not supported"),
    ],
)
def test_a_launcher_s_file_that_won_t_do(content: bytes, says: str, refused: Callable[..., str], tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes(content)
    message = refused({"launcher.kind": "accelerate", "launcher.config": str(tmp_path / "a.yaml")})
    assert f"a.yaml: {says}" in message
    assert not (tmp_path / "run").exists()


# --- queries ---------------------------------------------------------------------------------------------------------------


def test_a_missing_file(refused: Callable[..., str], tmp_path: Path):
    assert "nowhere.jsonl" in refused({"queries.path": str(tmp_path / "nowhere.jsonl")})
    assert nothing_made(tmp_path / "run")


def test_a_missing_column(refused: Callable[..., str], tmp_path: Path):
    message = refused(queries(tmp_path, b'{"query": "Why?"}\n{"question": "How?", "source": "x"}\n'))
    assert "queries.jsonl" in message
    assert "2" in message.split("queries.jsonl", 1)[1][:12], "the line"
    assert "question" in message, "what was found"
    assert "queries.column" in message, "the way out"
    assert nothing_made(tmp_path / "run")


@pytest.mark.parametrize("row", [b'{"query": "How?"', b'["How?"]', b"How?", b'{"query": 7}', b'{"query": [NaN]}'])
def test_a_malformed_row(row: bytes, refused: Callable[..., str], tmp_path: Path):
    message = refused(queries(tmp_path, b'{"query": "Why?"}\n' + row + b"\n"))
    assert "queries.jsonl" in message
    assert "2" in message.split("queries.jsonl", 1)[1][:12], "the line"
    assert nothing_made(tmp_path / "run")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_invalid_utf8(form: str, refused: Callable[..., str], tmp_path: Path):
    rows = {"jsonl": b'{"query": "Why?"}\n{"query": "caf\xe9"}\n', "csv": b"query\nWhy?\ncaf\xe9\n"}[form]
    message = refused(queries(tmp_path, rows, f"queries.{form}"))
    assert f"queries.{form}" in message
    assert "UTF-8" in message
    assert nothing_made(tmp_path / "run")


@pytest.mark.parametrize("content", [b"\n\n", b'{"query": " "}\n', b'{"query": NaN}\n', '{"query": "\u200b"}\n'.encode()])
def test_no_query_at_all(content: bytes, refused: Callable[..., str], tmp_path: Path):
    message = refused(queries(tmp_path, content))
    assert "queries.jsonl" in message
    assert "no usable query" in message


def test_an_unknown_kind_of_file(refused: Callable[..., str], tmp_path: Path):
    message = refused(queries(tmp_path, b"Why?\n", "queries.txt"))
    assert "queries.txt" in message
    assert ".jsonl" in message


def test_every_prompt_is_over_long(refused: Callable[..., str], tmp_path: Path):
    """With its principle at the latest: the principle is never cut."""
    assert "max_prompt_tokens" in refused({"queries.max_prompt_tokens": 5})
    assert not list((tmp_path / "run").rglob("model.safetensors"))


def test_prompts_over_long_with_their_principle_only(refused: Callable[..., str], tmp_path: Path):
    assert "max_prompt_tokens" in refused({"queries.max_prompt_tokens": 80})
    assert not list((tmp_path / "run").rglob("model.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"queries.path": "nowhere.jsonl"},
        {"queries.column": "question"},
        {"policy.model": "nowhere"},
        {"training.optimizer": "adam"},
        {"training.optimizer": "schedule_free_adamw"},  # its weights are not those that it would be delivered with
        {"training.scheduler": "warmup_stable_decay"},  # needs a number of steps that no recipe can give
    ],
    ids=[
        "no query file",
        "no such column",
        "no model",
        "no such optimizer",
        "an average",
        "a schedule with settings of its own",
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(changes: dict[str, Any], refused: Callable[..., str], tmp_path: Path):
    refused(changes)
    assert not (tmp_path / "run").exists()


def test_a_mistake_leaves_the_recipe_of_the_run_before(refused: Callable[..., str], recipe_of: RecipeOf, tmp_path: Path):
    """recipe.yaml and run.json are the evidence of how the data was made."""
    selfsteer.run(Recipe.model_validate(recipe_of(tmp_path / "run", {"generator.kind": "none", "alignment.max_steps": 1})))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("recipe.yaml", "run.json")}
    refused({"policy.model": "nowhere"})
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


# --- the model -------------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(refused: Callable[..., str], tmp_path: Path):
    message = refused({"policy.model": str(tmp_path / "no-model")})
    assert "policy.model" in message
    assert "no-model" in message
    assert nothing_made(tmp_path / "run")


def test_no_chat_template(refused: Callable[..., str], tiny_folder: str, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    message = refused({"policy.model": str(folder)})
    assert "policy.chat_template" in message
    assert nothing_made(tmp_path / "run")


def test_a_generation_configuration_that_asks_for_more_is_told(
    command: Callable[..., Any], recipe_of: RecipeOf, tiny_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Once, when the run begins; the run goes on."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.1}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path / "run", {"policy.model": str(folder)})))
    assert command("run", str(tmp_path / "recipe.yaml")).status == 0
    assert caplog.text.count("asks for repetition_penalty=1.1, which is left out") == 1


def test_a_chat_template_with_a_mistake(refused: Callable[..., str], tmp_path: Path):
    (tmp_path / "own.jinja").write_text("{% for message in messages %}{{ message['content'] }}")
    message = refused({"policy.chat_template": str(tmp_path / "own.jinja")})
    assert "template" in message
    assert nothing_made(tmp_path / "run")


def test_no_chat_template_for_the_author_of_principles(refused: Callable[..., str], tiny_folder: str, tmp_path: Path):
    author = {"source": "generate", "model": tiny_folder, "chat_template": str(tmp_path / "none.jinja")}
    assert "none.jinja: no such file; name an ordinary file in principles.chat_template" in refused({"principles": author})
    assert not (tmp_path / "run").exists()


# --- what comes out of the model ------------------------------------------------------------------------------------------


def test_no_pair_is_left(refused: Callable[..., str], tmp_path: Path):
    """The tiny model never says its end token within one token; all is cut off, and all is dropped."""
    message = refused({"responses.max_new_tokens": 1, "filters.truncated": "drop"})
    assert "cut off by the length limit" in message, "what happened to the rows"
    assert "filters.truncated" in message or "max_new_tokens" in message, "the way out"
    assert not list((tmp_path / "run").rglob("model.safetensors"))


@pytest.mark.parametrize("section", ["generator", "alignment"])
def test_a_loss_that_is_not_finite(section: str, refused: Callable[..., str], tmp_path: Path):
    """Training stops; the last complete checkpoint stays, and so does all the data."""
    kind = "single" if section == "generator" else "none"
    message = refused({f"{section}.learning_rate": 1e30, "training.warmup_ratio": 0.0, "generator.kind": kind})
    assert "step 2" in message
    assert "nan" in message or "inf" in message
    assert "learning rate" in message, "the way out"
    stage = tmp_path / "run/round-1" / {"generator": "4-generator", "alignment": "6-policy"}[section]
    (training,) = stage.glob("training-*")
    kept = checkpoints.latest(training)
    assert kept is not None
    assert kept.name == "checkpoint-1"
    assert not (stage / "MANIFEST.json").exists()
    assert (tmp_path / "run/round-1/2-responses/MANIFEST.json").exists()


# --- pairs made elsewhere --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "Why?", "chosen": "So."}, "rejected"),
        ({"chosen": "So.", "rejected": "No."}, "prompt"),
        ({"prompt": "Why?", "chosen": 1, "rejected": "No."}, "chosen"),
    ],
)
@pytest.mark.parametrize("command", ["train", "measure"])
def test_pairs_that_are_none(
    command: str,
    row: dict[str, Any],
    named: str,
    recipe_of: RecipeOf,
    tiny_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    pairs, recipe = tmp_path / "pairs.jsonl", tmp_path / "recipe.yaml"
    good = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    pairs.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path / "run")))
    rest = [str(recipe)] if command == "train" else ["--policy", tiny_folder]
    monkeypatch.setattr(sys, "argv", ["selfsteer", command, str(pairs), *rest])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "pairs.jsonl" in message
    assert "2" in message.split("pairs.jsonl", 1)[1][:12], "the line"
    assert named in message
    assert nothing_made(tmp_path / "run")
