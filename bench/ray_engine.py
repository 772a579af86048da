"""What the ray engine costs beside the embedded one that it holds: start-up, and each request.

    .venv-ray/bin/python bench/ray_engine.py [--model FOLDER] [--requests 256] [--tokens 16]

One replica on this machine, so that both do the same work; responses are the same, and compared. Wall-clock seconds include
what else the machine does; the CPU seconds are those of this process and the replica's.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import tiny_model_dir

from selfsteer.cluster import joined
from selfsteer.engines.base import Request, Sampling
from selfsteer.engines.open import open_engine
from selfsteer.models import checkpoint, load_tokenizer
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import EngineSection, RaySection, TransformersSection

EMBEDDED = TransformersSection(dtype="float32", batch_size=32)


class Took(NamedTuple):
    seconds: float
    cpu: float


def clocked(work: Callable[[], Any]) -> Took:
    began, cpu = time.perf_counter(), _cpu()
    work()
    return Took(time.perf_counter() - began, _cpu() - cpu)


def _cpu() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    below = [child for child in psutil.Process().children(recursive=True) if "Replica" in child.name()]
    times = [child.cpu_times() for child in below]
    return own.ru_utime + own.ru_stime + sum(found.user + found.system for found in times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=None)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(Path(given.model or tiny_model_dir(Path(folder) / "tiny")))
        prompts = Prompts(load_tokenizer(model.path))
        sampling = Sampling(temperature=0.7, top_p=0.8, max_new_tokens=given.tokens)
        asked = [({"role": "user", "content": f"Say {number}."},) for number in range(given.requests)]
        wanted = [
            Request(key=str(n), messages=m, prompt_ids=prompts.prompt_ids(m), sampling=sampling, seed=n)
            for n, m in enumerate(asked)
        ]

        def sampled(section: EngineSection, what: str) -> dict[str, Any]:
            began = time.perf_counter()
            found: dict[str, Any] = {}
            with open_engine(section, model, prompts, trust_remote_code=False) as engine:
                opened = time.perf_counter() - began
                list(engine.generate(wanted[:32]))  # the first pass of a process is slower
                took = clocked(lambda: found.update((answer.key, answer) for answer in engine.generate(wanted)))
            each = 1000 / len(wanted)
            print(
                f"{what:<10} opened in {opened:5.1f} s, {len(wanted)} requests in {took.seconds:6.2f} s"
                f" ({took.cpu:6.2f} CPU s)"
                f": {took.seconds * each:6.2f} ms a request ({took.cpu * each:6.2f} CPU ms)",
                flush=True,
            )
            return found

        began = time.perf_counter()
        with joined(None):
            print(f"Ray started in {time.perf_counter() - began:.1f} s")
            for _ in range(2):
                same = sampled(EMBEDDED, "embedded") == sampled(RaySection(kind="ray", replica=EMBEDDED), "ray")
                print("the same responses" if same else "other responses")


if __name__ == "__main__":
    main()
