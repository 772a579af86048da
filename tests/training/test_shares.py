"""Scoring in two processes: the numbers of one, stops, kills, and going on with another number of them."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import FLOAT32, steering_group
from tiny import tiny_model_dir
from waiting import until

from selfsteer import clock, runtime
from selfsteer.models import checkpoint, load_tokenizer
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Launcher, Policy
from selfsteer.records import side
from selfsteer.store.journal import Journal
from selfsteer.training.parallel import take_in
from selfsteer.training.scoring import Group, Scorer, score_missing, scores

ALONE, TOGETHER = Launcher(), Launcher(kind="accelerate", processes=2)
MANY = 1200
"""Groups that two processes need a while for."""
SECONDS = 600
"""How long a group may take; nearly all of it is importing torch on a machine that does other things."""


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return scorer_of(tiny_model_dir(tmp_path_factory.mktemp("shares") / "tiny"))


def scorer_of(folder: str) -> Scorer:
    return Scorer(checkpoint(Path(folder)), Policy(model=folder), Prompts(load_tokenizer(folder)), FLOAT32)


def groups(scorer: Scorer, count: int) -> Iterator[Group]:
    pair, _ = steering_group(3)
    return (scorer.group([replace(pair, rejected=side(f"No {number}."))]) for number in range(count))


def score_all(scorer: Scorer, folder: Path, count: int, launcher: Launcher) -> list[Any]:
    scorer = scorer._replace(launcher=launcher)
    with Journal(folder / "parts") as journal:
        score_missing(scorer, groups(scorer, count), journal, description="scores", total=count)
        assert not (folder / "scoring").exists()
        return [scores(journal, group) for group in groups(scorer, count)]


def keys(folder: Path) -> dict[str, list[str]]:
    """Of the whole records, by part."""
    found: dict[str, list[str]] = {}
    for part in sorted((folder / "parts").glob("*.jsonl")):
        lines = part.read_text().splitlines(keepends=True)
        found[part.name] = [json.loads(line)["key"] for line in lines if line.endswith("}\n")]
    return found


def once(folder: Path, expected: int) -> None:
    every = [key for found in keys(folder).values() for key in found]
    assert len(every) == len(set(every)) == expected


def both_at_work(folder: Path) -> bool:
    return len(keys(folder)) == 2 and all(keys(folder).values())


def test_two_processes_score_as_one_and_go_on_as_one(scorer: Scorer, tmp_path: Path):
    """Bit for bit; each has half of the groups. What is asked for later, in one process or in two, is not scored again."""
    before = clock.spent()
    alone = score_all(scorer, tmp_path / "alone", 21, ALONE)
    between = clock.spent()
    assert score_all(scorer, tmp_path / "together", 21, TOGETHER) == alone
    of_two, of_one = (clock.since(start, {})["score"].tokens for start in (between, before))
    assert of_one == 2 * of_two > 0, "the tokens of both processes"
    assert {name: len(found) for name, found in keys(tmp_path / "together").items()} == {
        "main-0-0.jsonl": 11,
        "main-1-0.jsonl": 10,
    }
    score_all(scorer, tmp_path / "together", 23, ALONE)
    assert len(keys(tmp_path / "together")["main-0.jsonl"]) == 2
    once(tmp_path / "together", 23)


def test_a_configuration_of_one_process(scorer: Scorer, tmp_path: Path):
    """accelerate then tells it nothing of a rank."""
    file = tmp_path / "one.yaml"
    file.write_text("{distributed_type: 'NO', mixed_precision: 'no', num_machines: 1, num_processes: 1, use_cpu: true}")
    score_all(scorer, tmp_path, 3, Launcher(kind="accelerate", config=str(file)))
    assert {name: len(found) for name, found in keys(tmp_path).items()} == {"main-0-0.jsonl": 3}


@pytest.mark.usefixtures("forked")
def test_a_process_that_breaks_off_costs_what_was_in_flight(scorer: Scorer, tmp_path: Path):
    """An empty response can't be scored, and is no row that a stage hands on: the error comes with a way to go on."""
    pair, _ = steering_group(1)
    poison = scorer.group([replace(pair, chosen=side("", "length"))])
    together = scorer._replace(launcher=TOGETHER)
    with Journal(tmp_path / "parts") as journal:
        asked = [*groups(scorer, 40), poison]
        with pytest.raises(ChildProcessError, match="The same command scores the rest"):
            score_missing(together, asked, journal, description="scores", total=len(asked))
        assert len(journal) >= 16, "what was finished counts at once"
        score_missing(scorer, groups(scorer, 40), journal, description="scores", total=40)
    once(tmp_path, 40)


PARENT = """
import sys; from pathlib import Path; sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from pathlib import Path
from test_shares import *
score_all(scorer_of(sys.argv[3]), Path(sys.argv[2]), MANY, TOGETHER)
"""


def test_a_killed_parent_takes_its_group_along(scorer: Scorer, tmp_path: Path):
    """kill -9 while both score: they notice and end; a session that begins meanwhile waits, and scores only the rest."""
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parent), str(tmp_path), scorer.model.path]
    with (tmp_path / "said").open("w") as said, subprocess.Popen(command, stderr=said) as parent:
        until(lambda: both_at_work(tmp_path) or parent.poll() is not None, "both at work", seconds=SECONDS)
        parent.kill()
    assert parent.returncode == -signal.SIGKILL, (tmp_path / "said").read_text()
    with Journal(tmp_path / "parts") as journal:
        score_missing(scorer, groups(scorer, MANY), journal, description="scores", total=MANY)
    found = keys(tmp_path)
    assert set(found) == {"main-0-0.jsonl", "main-1-0.jsonl", "main-0.jsonl"}, "they had not come to their end"
    once(tmp_path, MANY)


def test_a_signal_stops_the_group_and_keeps_what_is_finished(scorer: Scorer, tmp_path: Path):
    def stop() -> None:
        until(lambda: both_at_work(tmp_path), "both at work", seconds=SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    together = scorer._replace(launcher=TOGETHER)
    with runtime.graceful_stop(), Journal(tmp_path / "parts") as journal:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(runtime.Interrupted):
            score_missing(together, groups(scorer, MANY), journal, description="scores", total=MANY)
        assert 32 <= len(journal) < MANY
        assert not (tmp_path / "scoring").exists(), "the group has ended before its parent"
    once(tmp_path, len(journal))


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[]", "{}", '{"seconds": 0, "parts": {"a": 3}}', '{"seconds": 0, "memory": []}']
)
def test_what_a_process_spent_is_not_counted_where_it_can_t_be_read(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    counted: list[object] = []
    monkeypatch.setattr(clock, "take_in", lambda *spent: counted.append(spent))
    (tmp_path / "spent-0.json").write_text('{"seconds": 0, "parts": {"load": [1.5, 7]}, "memory": {"load": 9}}')
    (tmp_path / "spent-10.json").write_text(content)
    take_in(tmp_path)
    assert counted == [({"load": 1.5}, {"load": 7}, {"load": 9})]
    assert "spent-10.json: damaged" in caplog.text
    assert not list(tmp_path.iterdir())
