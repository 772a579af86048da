"""Hostile model folders, systematically: every one ends in one line, or in a model; never in a traceback, never in memory.

Each entry of each JSON file of a small model is replaced by values of other shapes and taken away; safetensors, GGUF and
tokenizer files are cut off and have bits flipped. Each is then used as every command uses a model, within a limit of memory.

    python bench/hostile.py [--share 0.1] [--seed 0]

Prints what ended otherwise, and how many ended how. Exit status 1 where something did.
"""

import argparse
import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import transformers
from tiny import tiny_gguf, tiny_model_dir

from selfsteer.models import end_ids, load_model, load_tokenizer, resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Policy

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**9, 10**30, 1.5, float("nan"), "", "x", "../../etc/passwd", [], [1], {}, {"a": 1}),
)
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
ROOM = 8 * 2**30
"""Bytes of address space beyond what the libraries have taken: the model itself is less than a megabyte."""


def places(tree: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every entry; of long lists and dictionaries the first and the last alone."""
    if isinstance(tree, dict | list):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        for key in keys if len(keys) <= 40 else (*keys[:2], keys[-1]):
            yield (*at, key)
            yield from places(tree[key], (*at, key))


def changed(tree: Any, at: tuple[str | int, ...], value: Any, *, remove: bool = False) -> Any:
    copy = json.loads(json.dumps(tree))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    if remove:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return copy


def json_cases(file: Path) -> Iterator[tuple[str, bytes]]:
    tree = json.loads(file.read_bytes())
    for at in places(tree):
        name = ".".join(map(str, at))
        yield f"{name} removed", json.dumps(changed(tree, at, None, remove=True)).encode()
        for value in (*VALUES, DEEP):
            yield f"{name} = {str(value)[:30]}", json.dumps(changed(tree, at, value)).encode()


def byte_cases(content: bytes, draw: random.Random, *, header: int) -> Iterator[tuple[str, bytes]]:
    for length in sorted({0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(content) // 2, len(content) - 1}):
        yield f"cut to {length}", content[:length]
    for _ in range(400):
        at, bit = draw.randrange(header), draw.randrange(8)
        yield f"bit {bit} of byte {at} flipped", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    for at in range(0, min(header, 64), 4):
        for word in (b"\xff" * 8, b"\0" * 8, (2**62).to_bytes(8, "little"), (10**10).to_bytes(8, "little")):
            yield f"{word.hex()} at {at}", content[:at] + word + content[at + 8 :]


def use(model: Path) -> None:
    """What every command does with a model, up to a forward pass."""
    path = resolve(Policy(model=str(model))).path
    tokenizer = load_tokenizer(path)
    end_ids(path, tokenizer)
    found = Prompts(tokenizer).whole().direct().checked_ids(({"role": "user", "content": "Hi"},))
    loaded = load_model(path, dtype=torch.float32)
    if not isinstance(found, str):
        loaded(torch.tensor([found]))


def outcome(case: Callable[[], None]) -> str:
    """In a process of its own, with little memory and time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        said = "a model"
        try:
            case()
        except (ValueError, OSError) as error:  # what `cli.main` puts into one line
            said = "one line" if str(error).strip() else f"FAULT {type(error).__name__} without a word"
        except BaseException as error:  # noqa: BLE001 (this is what is looked for)
            said = f"FAULT {type(error).__name__}: {str(error)[:200]}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return said or f"FAULT died, status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, drawn with the seed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    counts: Counter[str] = Counter()
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        os.environ["SELFSTEER_CACHE"] = str(root / "cache")
        whole = Path(tiny_model_dir(root / "whole"))
        gguf = Path(tiny_gguf(root / "tiny.gguf"))
        use(whole)
        use(gguf)

        def cases() -> Iterator[tuple[str, Path, bytes]]:
            for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
                yield from ((f"{name}: {what}", whole / name, content) for what, content in json_cases(whole / name))
            weights = (whole / "model.safetensors").read_bytes()
            header = 8 + int.from_bytes(weights[:8], "little")
            for file, size in ((whole / "model.safetensors", header), (gguf, 20_000), (whole / "tokenizer.json", 4_000)):
                content = file.read_bytes()
                found = byte_cases(content, draw, header=min(size, len(content)))
                yield from ((f"{file.name}: {what}", file, changed) for what, changed in found)

        for name, file, content in cases():
            if draw.random() > options.share:
                continue
            spoilt = root / "spoilt"
            shutil.rmtree(spoilt, ignore_errors=True)
            if file == gguf:
                spoilt.mkdir()
                model = spoilt / gguf.name
            else:
                model = Path(shutil.copytree(whole, spoilt))
            (spoilt / file.name).write_bytes(content)
            began = time.monotonic()
            said = outcome(lambda model=model: use(model))
            slowest = max(slowest, (time.monotonic() - began, name))
            kind = "FAULT" if said.startswith("FAULT") else said
            counts[f"{file.name}: {kind}"] += 1
            if kind == "FAULT":
                print(f"{name}: {said}", flush=True)
    for kind, count in sorted(counts.items()):
        print(f"{count:6,}  {kind}")
    print(f"the slowest took {slowest[0]:.1f} s: {slowest[1]}")
    sys.exit(any("FAULT" in kind for kind in counts))


if __name__ == "__main__":
    main()
