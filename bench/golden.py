"""One golden run: that a change of the code's shape changes no number and no sealed byte.

    python bench/golden.py record FILE      the quickstart recipe on a tiny random model; its numbers and columns, into FILE
    python bench/golden.py compare FILE     the same again; exits with 1 and the list where anything differs

Recorded: every number of metrics.json but times, versions and the bytes of what holds times, and a digest of each column of
every sealed Parquet file. Figures depend on the processor and its threads, so FILE is made before a change and compared
after it, on one machine.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

OVERRIDES = (
    "queries.limit=24",
    "responses.max_new_tokens=16",
    "engine.dtype=float32",
    "training.dtype=float32",
    "queries.max_prompt_tokens=1024",
    "queries.holdout=4",
    "generator.learning_rate=0.001",
    "alignment.learning_rate=0.001",
    "filters.max_length_ratio=1000",
)
TIMES = (
    "seconds",
    "memory",
    "time",
    "tokens_a_second",
    "tokens_per_second",
    "started",
    "created",
    "version",
    "digest",
    "path",
    "commit",
)
"""Parts of the names of entries that differ from run to run."""


def golden(folder: Path) -> dict[str, Any]:
    """The run's numbers and columns."""
    import pyarrow.parquet as pq
    from tiny import tiny_model_dir

    import selfsteer

    policy = tiny_model_dir(folder / "policy", max_positions=2048)
    os.chdir(ROOT)
    run = folder / "golden"
    selfsteer.run("quickstart", f"policy.model={policy}", f"output={run}", *OVERRIDES)
    columns: dict[str, str] = {}
    for file in sorted(run.rglob("*.parquet")):
        table = pq.read_table(file)
        for name in table.column_names:
            values = json.dumps(table.column(name).to_pylist(), sort_keys=True).encode()
            columns[f"{file.relative_to(run)}:{name}"] = hashlib.sha256(values).hexdigest()
    # A history holds seconds, whose digits take more bytes or fewer.
    with_history = tuple(f".{file.parent.name}.disk" for file in run.glob("round-*/*/history.jsonl"))
    found = leaves("", json.loads((run / "metrics.json").read_bytes()))
    numbers = {place: value for place, value in found if not place.endswith(with_history)}
    return {"columns": columns, "numbers": numbers}


def leaves(place: str, value: Any) -> Any:
    """(dotted place, value) of everything that must not change."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not any(part in key for part in TIMES):
                yield from leaves(f"{place}.{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(f"{place}[{number}]", inner)
    elif not isinstance(value, str):
        yield place, value


def main() -> None:
    what, file = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        found = golden(Path(folder))
    if what == "record":
        file.write_text(json.dumps(found, indent=1))
        print(f"{len(found['columns'])} columns, {len(found['numbers'])} numbers")
        return
    expected = json.loads(file.read_text())
    differing = [
        f"{key}: {expected[part].get(key)} -> {found[part].get(key)}"
        for part in expected
        for key in sorted(expected[part].keys() | found[part].keys())
        if expected[part].get(key) != found[part].get(key)
    ]
    print("\n".join(differing) or f"the same: {len(found['columns'])} columns, {len(found['numbers'])} numbers")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
