"""As many threads as cores are free: the arithmetic, the following, and where the user's word holds."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from selfsteer import threads
from selfsteer.models import load_model
from selfsteer.threads import EVERY, Usage, free_threads


@pytest.mark.parametrize(
    ("others", "cores", "most", "right"),
    [
        (0.0, 2, 2, 2),
        (0.2, 2, 2, 2),  # what a quiet machine always has
        (0.3, 2, 2, 1),
        (1.0, 2, 2, 1),
        (2.0, 2, 2, 1),  # never none
        (1.0, 16, 16, 15),
        (3.5, 16, 16, 12),
        (3.0, 16, 8, 8),  # two threads a core: the cores that are left do
        (12.0, 16, 8, 4),
    ],
)
def test_what_others_take_is_left_to_them(others: float, cores: int, most: int, right: int):
    before = Usage(now=100.0, busy=50.0, own=20.0)
    own = 7.0
    after = Usage(now=110.0, busy=50.0 + own + 10 * others, own=20.0 + own)
    assert free_threads(before, after, cores=cores, most=most) == right


def test_more_of_its_own_than_of_all_is_nobody_else():
    """The two are read one after the other."""
    assert free_threads(Usage(0, 0, 0), Usage(5, 4.9, 5.0), cores=2, most=2) == 2


def test_seconds_of_this_process_are_its_own():
    before = threads.usage()
    end = before.own + 0.3
    while (after := threads.usage()).own < end:
        sum(range(10_000))
    assert after.busy - before.busy >= 0.2  # a core's clock ticks in hundredths
    assert after.now > before.now


def test_a_model_follows_whatever_wraps_it(tiny_folder: str, monkeypatch: pytest.MonkeyPatch):
    """Others begin to work between two forward passes, and end: the threads go down, and up again."""
    moments = iter(
        [
            Usage(now=0.0, busy=0.0, own=0.0),
            Usage(now=EVERY, busy=2 * EVERY, own=EVERY),
            Usage(now=2 * EVERY, busy=3 * EVERY, own=2 * EVERY),
        ]
    )
    clock = iter([EVERY - 1, EVERY, 2 * EVERY - 1, 2 * EVERY])
    monkeypatch.setattr(threads, "usage", lambda: next(moments))
    monkeypatch.setattr(threads, "_cores", lambda: [0, 1])
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(threads, "_follower", threads._Follower())  # pyright: ignore[reportPrivateUsage]
        model = load_model(tiny_folder, dtype=torch.float32)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        found: list[int] = []
        for _ in range(4):
            wrapped(input_ids=torch.tensor([[1, 2]]))
            found.append(torch.get_num_threads())
        assert found == [2, 1, 1, 2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("word", "follows"), [("2", False), (None, True)])
def test_the_user_s_number_holds(word: str | None, follows: bool):
    if (os.cpu_count() or 1) == 1:
        pytest.skip("one core, one thread")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if word is not None:
        environment["OMP_NUM_THREADS"] = word
    code = "from selfsteer import threads; print(threads._follower is not None)"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(follows)
