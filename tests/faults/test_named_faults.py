"""The last of the attacks that had no test; and that every test which a table of faults names is there."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfsteer.judges.llm import judge_template
from selfsteer.pipeline import first_round, prepare
from selfsteer.recipe.sections import PrincipleSource, Recipe
from selfsteer.stages.preferences import PREFERENCES
from selfsteer.stages.principles import load_pool
from selfsteer.stages.responses import requests_of
from selfsteer.stages.status import RESPONSES
from selfsteer.store.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
TABLES = (ROOT / "docs/faults.md", ROOT / "tests/faults/README.md")


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.name)
def test_every_test_that_a_table_names_is_there(table: Path):
    """`file.py::test`; a further `::test` is of the same file."""
    files = {file.name: file for file in (ROOT / "tests").rglob("test_*.py")}
    missing: list[str] = []
    for line in table.read_text(encoding="utf-8").splitlines():
        last = ""
        for name, test in re.findall(r"`(?:[a-z]+/)?(test_\w+\.py)?(?:::(test_\w+))?`", line):
            last = name or last
            if not last:
                continue
            if last not in files or (test and test not in functions(files[last])):
                missing.append(f"{last}::{test}")
    assert missing == []


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_principles_and_judge_templates_are_regular_files(what: str, tmp_path: Path):
    """A pipe would be waited for, a device read for ever."""
    path = tmp_path / "pipe.jsonl" if what == "pipe" else Path("/dev/zero")
    if what == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"no regular file|not a regular file"):
        load_pool(PrincipleSource(source="file", path=str(path)))
    with pytest.raises(ValueError, match=r"no regular file|not a regular file"):
        judge_template(path)


def test_a_scoring_process_whose_launcher_is_gone_ends_in_peace(tmp_path: Path):
    """The launcher was killed before this rank had begun, and the parent has cleared up."""
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "selfsteer.training.scoring", str(tmp_path / "scoring")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_no_random_number_is_met_twice(recipe_of: Callable[..., dict[str, Any]], tmp_path: Path):
    """A generator that met those behind the very y+ it was trained on would be measured as more on-policy than it is."""
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run"))
    drawn = first_round(RunFolder(recipe.output), recipe, prepare(recipe))
    row = {
        "query_id": "0" * 16,
        "messages": [{"role": "user", "content": "Hi"}],
        "principles": {"good": "Be kind.", "bad": "Be rude.", "quality": "", "source": "library", "checks": []},
    }
    models = dict.fromkeys(("good", "bad", "original"), drawn.policy)
    seeds = [
        item.seed
        for stage in (RESPONSES, PREFERENCES)
        for number in range(2)
        for item in requests_of(drawn, models, row, recipe.of_pairs, stage=stage, number=number).values()
    ]
    assert len(set(seeds)) == len(seeds) == 12
