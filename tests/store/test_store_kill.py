"""kill -9 of real processes: at random moments of work, and before every step of sealing and of reopening."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfsteer.records import Dropped
from selfsteer.store.folder import Contents, Origin, RunFolder, Stage
from selfsteer.store.journal import Journal

ORIGIN = Origin(settings={}, inputs={})

# Appends batch after batch, says which are durable, and seals and reopens the stage after every fifth.
WORK = """
import itertools, sys
from selfsteer.store.folder import Contents, Origin, RunFolder

with RunFolder(sys.argv[1]) as run:
    stage = run.stage(1, "2-responses")
    stage.reopen()
    with stage.journal() as journal:
        print("ready", flush=True)
        for batch in itertools.count(len(journal) // 8):
            keys = [f"{batch}-{n}" for n in range(8)]
            journal.append([(key, {"key": key, "text": "x" * 20_000}) for key in keys])
            print(batch, flush=True)
            if batch % 5 == 4:
                contents = Contents(wanted=8, rows=(journal.get(key) for key in keys))
                stage.seal(Origin(settings={}, inputs={}), contents)
                stage.reopen()
"""


def test_killed_at_random_moments(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Ten processes killed one after another in one folder: what any of them called durable stays."""
    draw = random.Random(2)
    stage = Stage(tmp_path / "run" / "round-1" / "2-responses")
    durable: set[str] = set()
    for _ in range(10):
        command = [sys.executable, "-c", WORK, str(tmp_path / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0.0, 0.15))
            worker.kill()
            said = worker.stdout.read()
        assert worker.returncode == -signal.SIGKILL
        durable |= {f"{batch}-{n}" for batch in said.split() for n in range(8)}
        if stage.manifest() is not None:
            stage.verify()
            assert len(list(stage.rows())) == 8
        with Journal(stage.path / "parts") as journal:
            assert [journal.get(key)["key"] for key in sorted(durable)] == sorted(durable)
    assert "damaged" not in caplog.text
    assert len(durable) > 80, "the processes hardly came to work; nothing was shown"


# For each run folder n = 1, 2, ... given, a child seals or reopens the stage and kills itself before its n-th step that
# changes the disk. Prints 0 for a child that came to its end and 9 for a killed one. Forks, so as to import only once.
STEP = """
import os, signal, sys
from pathlib import Path
import pyarrow as pa
from selfsteer.records import Dropped
from selfsteer.store.folder import Contents, Origin, RunFolder

steps = 0

def deadly(function):
    def step(*given, **named):
        global steps
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)
    return step

def work(path):
    with RunFolder(path) as run:
        stage = run.stage(1, "6-policy")
        for module, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "replace"), (Path, "unlink")):
            setattr(module, name, deadly(getattr(module, name)))
        if sys.argv[1] == "reopen":
            stage.reopen()
        else:
            rows = [*({"n": n} for n in range(300)), Dropped(id="q", reason="empty")]
            contents = Contents(wanted=301, rows=rows, files=("model",))
            stage.seal(Origin(settings={}, inputs={}), contents)

pa.Table.from_pylist([{"n": 1}])  # imports pandas, once instead of in every child
for steps, path in enumerate(sys.argv[2:], start=1):
    child = os.fork()
    if child == 0:
        work(path)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def runs(what: str, folder: Path) -> list[Path]:
    """Run folders in which a process was killed before step 1, 2, ... of `what`; in the last there was no such step."""
    paths = [folder / f"run-{step}" for step in range(1, 30)]
    for path in paths:
        with RunFolder(path) as run:
            stage = run.stage(1, "6-policy")
            (stage.path / "model").mkdir()
            (stage.path / "model" / "weights").write_bytes(b"w")
            (stage.path / "model" / "config").write_bytes(b"c")
            with stage.journal() as journal:
                journal.append([("key", {"n": 1})])
            if what == "reopen":
                seal(stage)
    done = subprocess.run(
        [sys.executable, "-c", STEP, what, *paths], stdout=subprocess.PIPE, text=True, timeout=100, check=True
    )
    ends = [int(status) for status in done.stdout.split()]
    killed = ends.index(0)
    assert ends == [signal.SIGKILL] * killed + [0] * (len(paths) - killed)
    return paths[: killed + 1]


def seal(stage: Stage) -> None:
    rows = [*({"n": n} for n in range(300)), Dropped(id="q", reason="empty")]
    contents = Contents(wanted=301, rows=rows, files=("model",))
    stage.seal(ORIGIN, contents)


def is_whole(stage: Stage) -> bool:
    """Whether the stage is sealed; if so, it must hold all it should."""
    if stage.manifest() is None:
        return False
    assert set(stage.verify().outputs) == {"data.parquet", "dropped.jsonl", "model/weights", "model/config"}
    assert [row["n"] for row in stage.rows()] == list(range(300))
    return True


def test_killed_before_each_step_of_sealing(tmp_path: Path):
    sealed: list[bool] = []
    for path in runs("seal", tmp_path):
        with RunFolder(path) as run:
            stage = run.stage(1, "6-policy")
            sealed.append(is_whole(stage))
            if not sealed[-1]:
                seal(stage)
            assert is_whole(stage)
            assert stage.finished() == 1
        assert not list(path.rglob("*.tmp"))
    # Unsealed up to the manifest's rename; after it come the sync of its folder and the end.
    assert sealed == sorted(sealed)
    assert sealed.count(False) >= 15
    assert sealed.count(True) >= 2


def test_killed_before_each_step_of_reopening(tmp_path: Path):
    sealed: list[bool] = []
    for path in runs("reopen", tmp_path):
        sealed.append(is_whole(Stage(path / "round-1" / "6-policy")))
        with RunFolder(path) as run:
            stage = run.stage(1, "6-policy")
            if sealed[-1]:
                stage.reopen()
            assert [file.name for file in stage.path.iterdir()] == ["parts"]
            assert stage.finished() == 1
    assert sealed == [True, *[False] * (len(sealed) - 1)], "unsealed from the first step on"
    assert len(sealed) >= 8
