"""kill -9 at drawn moments of each stage; killed.py does it and says what must hold.

Twenty moments a stage with SELFSTEER_KILLS=20 (`make test-faults`), one without.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import selfsteer
from faults.killed import STAGES
from faults.scripted import ScriptedEngine
from selfsteer.engines import open as opening
from selfsteer.recipe.sections import Recipe

KILLS = int(os.environ.get("SELFSTEER_KILLS", "1"))
TEXTS = [f"What is the sum of {number} and {number + 1}?" for number in range(16)]


@pytest.fixture(scope="module")
def recipe(recipe_of: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside its finished, undisturbed run."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "queries.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in TEXTS))
    changes = {
        "queries.path": str(folder / "queries.jsonl"),
        "principles.source": "generate",
        "principles.retries": 1,
        "generator.batch_size": 4,
        "alignment.batch_size": 4,
    }
    values = recipe_of(folder / "run", changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_engine", lambda *_, **__: ScriptedEngine(folder / "log"))
        selfsteer.run(Recipe.model_validate(values))
    (folder / "run").rename(folder / "undisturbed")
    return folder / "recipe.yaml"


def test_killed_at_moments_drawn_in_each_stage(recipe: Path):
    command = [sys.executable, "-m", "faults.killed", str(recipe), str(KILLS), *STAGES]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    ended = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600 + 600 * KILLS,
        check=False,
        env=environment,
    )
    (recipe.parent / "said").write_text(ended.stdout)
    assert ended.returncode == 0, ended.stdout
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"stage"')]
    assert [(each["stage"], each["kills"]) for each in found] == [(stage, KILLS) for stage in STAGES]
    assert all(each["through"] > 0 for each in found), found
    print(*found, sep="\n")
