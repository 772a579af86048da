"""The served page: how far a run is while it goes on, the report when it has ended, and nothing to strangers."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from builders import rows, run

from selfsteer.recipe.sections import Recipe, dump
from selfsteer.reports.view import REFRESH, SO_FAR, viewing
from selfsteer.store.folder import RunFolder

RecipeOf = Callable[..., dict[str, Any]]


def get(address: str, path: str | None = None, host: str | None = None) -> tuple[int, dict[str, str], str]:
    parts = urlsplit(address)
    connection = HTTPConnection(parts.netloc, timeout=10)
    connection.request("GET", parts.path if path is None else path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return found


@pytest.fixture
def under_way(recipe_of: RecipeOf, tmp_path: Path) -> Path:
    """A run that has begun, and has sealed nothing."""
    output = tmp_path / "run"
    with RunFolder(output) as folder:
        folder.describe(dump(Recipe.model_validate(recipe_of(output))), {})
    return output


def test_a_run_under_way_shows_its_stages_and_asks_again(under_way: Path):
    with viewing(under_way) as address:
        code, headers, page = get(address)
    assert code == 200
    assert headers["Refresh"] == str(REFRESH)
    assert "script" not in headers["Content-Security-Policy"]
    assert "4-generator" in page
    assert "waiting" in page
    assert "next: begin round 1, 1-principles" in page


def test_what_is_sealed_can_be_read_while_the_run_goes_on(recipe_of: RecipeOf, tmp_path: Path):
    """The policy is not aligned yet: its pairs and their measures are there, and nothing asks for them anew."""
    folder = tmp_path / "run"
    run(recipe_of(folder, {"generator.max_steps": 1, "alignment.max_steps": 1}))
    (folder / "round-1/6-policy/MANIFEST.json").unlink()
    with viewing(folder) as address:
        _, headers, stages = get(address)
        code, so_far, page = get(address + SO_FAR)
    assert headers["Refresh"] == str(REFRESH), "though a report of before is there"
    assert f'<a href="{SO_FAR}">' in stages
    assert code == 200
    assert "Refresh" not in so_far
    pairs = rows(folder, "5-preferences")
    assert f"{len(pairs)} pairs from" in page
    assert "still under way" in page
    assert "policy aligned" not in page
    assert f'"id":"{pairs[0]["query_id"]}"' in page
    assert "before: the policy" in page


def test_with_the_first_stages_alone_there_is_a_page_as_well(recipe_of: RecipeOf, tmp_path: Path):
    folder = tmp_path / "run"
    run(recipe_of(folder, {"generator.max_steps": 1, "alignment.max_steps": 1}))
    names = sorted(stage.name for stage in (folder / "round-1").iterdir() if stage.is_dir())
    for name in reversed(names):
        shutil.rmtree(folder / "round-1" / name)
        with viewing(folder) as address:
            code, _, page = get(address + SO_FAR)
        assert code == 200, name
        assert "still under way" in page


def test_a_finished_run_shows_its_report(recipe_of: RecipeOf, tmp_path: Path):
    short = {"generator.max_steps": 1, "alignment.max_steps": 1}
    run(recipe_of(tmp_path / "run", short))
    with viewing(tmp_path / "run") as address:
        code, headers, page = get(address)
    assert code == 200
    assert "Refresh" not in headers
    assert page == (tmp_path / "run/report.html").read_bytes().decode()


def test_strangers_see_nothing(under_way: Path):
    """Neither without the path, nor under another name for this machine (which a site could have given it)."""
    with viewing(under_way) as address:
        assert urlsplit(address).hostname == "127.0.0.1"
        assert get(address, path="/")[0] == 404
        assert get(address, path="/guess/")[0] == 404
        assert get(address, host=f"evil.example:{urlsplit(address).port}")[0] == 404
        assert get(address, host=f"localhost:{urlsplit(address).port}")[0] == 200
        assert get(address, host="localhost")[0] == 200, "as a browser asks at port 80"


def test_where_there_is_no_run(tmp_path: Path):
    with pytest.raises((ValueError, FileNotFoundError), match="run"), viewing(tmp_path / "nothing"):
        pass


def test_the_command_ends_with_a_signal(under_way: Path):
    command = [sys.executable, "-u", "-m", "selfsteer", "view", str(under_way)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        assert get(address)[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
