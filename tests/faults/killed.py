"""kill -9 of a stage at moments drawn by the clock, again and again; whenever the stage comes through, it is begun anew.

    killed.py RECIPE KILLS STAGE ...         RECIPE's folder holds the finished run that everything is compared with

The stages before it are copied from there, sealed, so that the kills meet this one alone. Requests are answered by the
scripted engine, a few milliseconds each; what scores and trains is the recipe's tiny model. The children are forks of this
process, which has imported everything. After each kill: no durable sample gone, none there twice, earlier stages as they
were sealed. After each time through: the outputs of the undisturbed run, and no more requests than wanted plus those in
flight at the kills. Prints of each stage how many kills hit and how often it came through.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load_file

from faults.scripted import IN_FLIGHT, ScriptedEngine, calls
from selfsteer import cli, pipeline
from selfsteer.engines import open as opening
from selfsteer.reports import tables
from selfsteer.store.folder import Stage
from selfsteer.store.journal import _DURABLE_EVERY

IMPORTED = (pipeline, tables)  # by the command itself, in every child anew
STAGES = (
    "1-principles",
    "2-responses",
    "3-steering",
    "4-generator",
    "5-preferences",
    "5-quality",
    "6-policy",
)
SAMPLED = ("1-principles", "2-responses", "5-preferences")
"""The stages that ask the engine."""
REQUEST_SECONDS = 0.005


def until_sealed(recipe: Path, stage: str, begun: int) -> None:
    """In a child: run the command up to the seal of the stage; a byte goes down the pipe when the stage begins."""

    is_current, verify, seal = Stage.is_current, Stage.verify, Stage.seal

    told = False

    def begins(self: Stage, fingerprint: str) -> bool:
        nonlocal told
        if self.path.name == stage and not told:
            told = True
            os.write(begun, b".")
        return is_current(self, fingerprint)

    def ending(through: Callable[..., Any]) -> Callable[..., Any]:
        def end(self: Stage, *rest: Any, **named: Any) -> Any:
            found = through(self, *rest, **named)
            if self.path.name == stage:
                os._exit(0)
            return found

        return end

    Stage.is_current, Stage.verify, Stage.seal = begins, ending(verify), ending(seal)
    log = recipe.parent / "log"
    engine: Any = lambda *_, **__: ScriptedEngine(log, lambda: time.sleep(REQUEST_SECONDS))  # noqa: E731
    opening.open_engine = engine
    sys.argv = ["selfsteer", "run", str(recipe)]
    cli.main()


def run(recipe: Path, stage: str, after: float | None) -> tuple[int, float]:
    """A child, killed so many seconds after the stage has begun; returns its exit status and how long the stage took."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            until_sealed(recipe, stage, writer)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    started = time.monotonic()
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)  # of a child that has ended: nothing, it has not been waited for
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, time.monotonic() - started


def durable(stage: Path) -> list[str]:
    """The keys of the whole records of a stage."""
    lines = [line for part in sorted(stage.glob("parts/*.jsonl")) for line in part.read_text().splitlines(keepends=True)]
    return [json.loads(line)["key"] for line in lines if line.endswith("}\n")]


def same(stage: Path, expected: Path) -> None:
    """Rows, reasons, samples, weights and losses."""
    ours, theirs = Stage(stage).verify(), Stage(expected).verify()
    assert (ours.wanted, ours.kept, ours.dropped) == (theirs.wanted, theirs.kept, theirs.dropped)
    assert ours.outputs.keys() == theirs.outputs.keys()
    for name in ours.outputs:
        if name.endswith(".parquet"):
            assert pq.read_table(stage / name).equals(pq.read_table(expected / name)), name
        elif name.endswith(".safetensors"):
            tensors, wanted = load_file(stage / name), load_file(expected / name)
            assert tensors.keys() == wanted.keys()
            assert all((tensors[key] == wanted[key]).all() for key in wanted), name
        elif name == "history.jsonl":
            curves = [
                [(step["step"], step["loss"]) for step in map(json.loads, (each / name).read_text().splitlines())]
                for each in (stage, expected)
            ]
            assert curves[0] == curves[1]
        elif name == "measures.json":
            assert json.loads((stage / name).read_bytes()) == json.loads((expected / name).read_bytes())
    assert Counter(durable(stage)) == Counter(durable(expected)), "every wanted key, once, and no other"


def killed(recipe: Path, stage: str, kills: int) -> dict[str, Any]:
    """Kill until so many kills have hit and the stage is through."""
    draw = random.Random(stage)
    run_folder, undisturbed = recipe.parent / "run", recipe.parent / "undisturbed" / "round-1"
    ours, before = run_folder / "round-1" / stage, STAGES[: STAGES.index(stage)]
    wanted = len(durable(undisturbed / stage)) if stage in SAMPLED else 0

    def begin_anew() -> None:
        shutil.rmtree(run_folder, ignore_errors=True)
        for name in before:
            shutil.copytree(undisturbed / name, run_folder / "round-1" / name)
        (recipe.parent / "log").unlink(missing_ok=True)

    begin_anew()
    status, seconds = run(recipe, stage, None)
    assert status == 0
    same(ours, undisturbed / stage)
    begin_anew()
    hit = since = through = 0
    kept: set[str] = set()
    while hit < kills or not Stage(ours).manifest():
        status, _ = run(recipe, stage, draw.uniform(0, seconds) if hit < kills else None)
        assert status in (0, -signal.SIGKILL), f"a child ended with {status}"
        keys = durable(ours)
        assert len(keys) == len(set(keys)), "a sample was made twice"
        assert kept <= set(keys), "a durable sample is gone"
        kept = set(keys)
        for name in before:
            Stage(run_folder / "round-1" / name).verify()
        if status:
            hit, since = hit + 1, since + 1
            continue
        same(ours, undisturbed / stage)
        asked = calls(recipe.parent / "log")
        assert len(asked) <= wanted + since * (IN_FLIGHT + _DURABLE_EVERY - 1), "more was asked than was in flight"
        through, since, kept = through + 1, 0, set()
        if hit < kills:
            begin_anew()
    return {"stage": stage, "kills": hit, "through": through, "seconds": round(seconds, 2)}


def main() -> None:
    """One stage after the other."""
    recipe, kills, *stages = sys.argv[1:]
    for stage in stages:
        print(json.dumps(killed(Path(recipe), stage, int(kills))), flush=True)


if __name__ == "__main__":
    main()
