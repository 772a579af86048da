"""An engine without a model, in whose log every request that it takes on leaves a line that outlives kill -9.

As a program: `scripted.py RECIPE LOG MOMENT ...` runs the pipeline once a moment, each in a child that is killed when its
engine takes on its n-th request ("kill:n"), may write no file beyond n bytes ("full:n"), or is left alone ("through:0").
Prints the exit status of every child; negative: the signal that killed it.
"""

import hashlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Self

from selfsteer import cli
from selfsteer.engines import open as opening
from selfsteer.engines.base import Completion, Request

IN_FLIGHT = 4
"""Requests that the engine works on at a time."""

WORDS = ("Paris", "rain", "light", "fox", "letter", "water", "slow", "deep", "bright", "seven", "perhaps", "never")


def answer(request: Request) -> Completion:
    """Words that depend on the request's key only; now and then, a pair of principles for who asks for one."""
    numbers = hashlib.sha256(request.key.encode()).digest()
    text = " ".join(WORDS[number % len(WORDS)] for number in numbers[:12])
    if "You write two system messages" in request.messages[0]["content"] and numbers[0] % 4:
        text = f"Bad: Say little about {text}.\nGood: Say enough about {text}."
    return Completion(
        key=request.key, text=text, token_ids=tuple(10 + number for number in numbers[:12]), finish_reason="stop"
    )


class ScriptedEngine:
    """Answers some requests at a time, the last one first."""

    def __init__(self, log: Path, taken_on: Callable[[], None] = lambda: None) -> None:
        self._log = log
        self._taken_on = taken_on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Log, then answer."""
        requests = iter(requests)
        while batch := list(islice(requests, IN_FLIGHT)):
            with self._log.open("a") as log:
                for request in batch:
                    log.write(request.key + "\n")
                    log.flush()
                    self._taken_on()
            yield from map(answer, reversed(batch))


def calls(log: Path) -> list[str]:
    """The key of every request that was taken on."""
    return log.read_text().splitlines() if log.exists() else []


def child(recipe: str, log: Path, moment: str) -> None:
    """One run of the command, to its end or its kill."""
    what, number = moment.split(":")
    left = int(number)

    def taken_on() -> None:
        nonlocal left
        left -= 1
        if what == "kill" and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    engine: Any = lambda *_, **__: ScriptedEngine(log, taken_on)  # noqa: E731
    opening.open_engine = engine
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, left))
    sys.argv = ["selfsteer", "run", recipe]
    cli.main()


def main() -> None:
    """Run the children one after the other."""
    recipe, log, *moments = sys.argv[1:]
    for moment in moments:
        pid = os.fork()
        if pid == 0:
            status: Any = 1
            try:
                child(recipe, Path(log), moment)
                status = 0
            except SystemExit as ended:
                status = ended.code
            finally:
                if status == 1:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(status)
        print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
