"""What a run says while it works: which stage of how many, how fast, how long it will still take."""

import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfsteer import clock, run, runtime
from selfsteer.recipe.sections import Recipe
from selfsteer.runtime import progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that is set by hand, and no terminal."""
    now = [0.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runtime.sys.stderr, "isatty", lambda: False, raising=False)
    return now


@pytest.mark.parametrize(
    ("total", "done", "seconds", "said"),
    [
        (100, 40, 40.0, "work: 40 of 100 rows, 1.0 a second, 1 min 00 s left"),
        (1000, 100, 50.0, "work: 100 of 1000 rows, 2.0 a second, 7 min 30 s left"),
        (100_000, 100, 40.0, "work: 100 of 100000 rows, 2.5 a second, 11 h 06 min left"),
        (10, 40, 40.0, "work: 40 rows, 1.0 a second"),
        (100, 0, 40.0, "work: 0 of 100 rows, 0.0 a second"),
        (100, 2, 40.0, "work: 2 of 100 rows, 3.0 a minute, 32 min 40 s left"),
    ],
)
def test_lines_say_how_long_it_will_still_take(
    total: int, done: int, seconds: float, said: str, now: list[float], caplog: pytest.LogCaptureFixture
):
    """Where the total turns out too small, nothing is known of it."""
    caplog.set_level(logging.INFO)
    with progress("work", total, unit="rows") as advance:
        now[0] = seconds
        advance(done)
        assert caplog.messages == [said]


def test_the_time_left_of_units_side_by_side_is_a_bound(now: list[float], caplog: pytest.LogCaptureFixture):
    """8 of 64 that began together are finished after 40 s; the others are nearly so, and the bound counts nothing of it."""
    caplog.set_level(logging.INFO)
    with progress("work", 64, unit="rows", side_by_side=True) as advance:
        now[0] = 40.0
        advance(8)
    assert caplog.messages[0] == "work: 8 of 64 rows, 0.2 a second, at most 4 min 40 s left"


def test_lines_say_how_many_tokens_were_computed_in_a_second(now: list[float], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    clock.count("sample", 5)  # before
    with progress("work", 100, unit="rows") as advance:
        now[0] = 40.0
        clock.count("sample", 80_000)
        advance(40)
    assert caplog.messages[0] == "work: 40 of 100 rows, 1.0 a second, 2,000 tokens a second, 1 min 00 s left"


def test_every_stage_is_announced_once_by_its_place(
    recipe_of: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    recipe = Recipe.model_validate(
        recipe_of(tmp_path / "run", {"rounds": 2, "generator.max_steps": 1, "alignment.max_steps": 1})
    )
    run(recipe)
    lines = [line for line in caplog.messages if re.match(r"round \d of 2, stage", line)]
    found = [re.match(r"round (\d) of 2, stage (\d) of (\d), (\S+): \w+", line) for line in lines]
    names = [
        "1-principles",
        "2-responses",
        "3-steering",
        "4-generator",
        "5-preferences",
        "5-quality",
        "6-policy",
    ]
    expected = [(str(round), str(place), name) for round in (1, 2) for place, name in enumerate(names, 1)]
    assert [each.group(1, 2, 4) for each in found if each] == expected
    assert {each.group(3) for each in found if each} == {"7"}
    told = [name for line, name in zip(lines, 2 * names, strict=True) if line.endswith(" left for the run")]
    assert told == 2 * names[3:], "as soon as something was sampled and scored"
    caplog.clear()
    run(recipe)
    assert not [line for line in caplog.messages if " stage " in line], "nothing is made anew"


WORK = """
import logging
import torch
from selfsteer.runtime import graceful_stop

logging.basicConfig()
with graceful_stop():
    print("begun", flush=True)
    while True:
        torch.ones(NUMBER, NUMBER) @ torch.ones(NUMBER, NUMBER)
"""


@pytest.mark.parametrize("number", [8, 8192], ids=["between calls", "within a call of many seconds"])
def test_a_second_signal_ends_it_at_once_and_says_what_is_safe(number: int):
    """Another kind between them is a first one."""
    command = [sys.executable, "-c", WORK.replace("NUMBER", str(number))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert said.splitlines()[-1].startswith("SIGINT once more: ended at once; finished samples and complete checkpoints")
    if number == 8:
        assert "SIGTERM: finishing what is under way; once more ends it at once" in said
