"""The floors of the house (docs/design.md): a module imports from a lower floor, or from its own package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import selfsteer

HOUSE = Path(selfsteer.__file__).parent
FLOORS = (
    {"clock"},
    {"runtime", "records", "recipe"},
    {"store", "cluster", "llamacpp"},
    {"weights", "threads"},
    {"data", "models", "prompts", "adapters"},
    {"engines", "training", "measures"},
    {"pairs"},
    {"judges", "evaluations"},
    {"stages"},
    {"reports"},
    {"pipeline"},
    {"comparing", "given", "merge", "evaluating", "rewards", "doctor", "plan", "first_recipe", "chat", "clean"},
    {"cli", "__init__"},
    {"__main__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
ROOMS = {  # foreign libraries that live in few rooms
    "matplotlib": ("reports/plots",),
    "ray": ("cluster", "engines/ray", "training/launch"),
    "pyarrow": ("store/", "data/", "training/trainer"),
}
LIGHT = ("runtime", "records", "clock", "recipe/", "cli/", "__init__", "__main__")
"""Modules that --help and show load: no numpy and no torch."""


def imports(file: Path) -> Iterator[str]:
    """The modules that a file names in import statements, wherever they stand."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


FILES = {file.relative_to(HOUSE).with_suffix("").as_posix(): list(imports(file)) for file in HOUSE.rglob("*.py")}


def own(name: str) -> str | None:
    """The file of our own that an import names, or None."""
    parts = name.split(".")[1:] if name.startswith("selfsteer.") else []
    return next((found for n in (2, 1) if parts[:n] and (found := "/".join(parts[:n])) in FILES), None)


def test_every_module_has_a_floor():
    assert {name.split("/")[0] for name in FILES} <= FLOOR.keys()


def test_imports_go_down():
    upward = [
        f"{file} -> {found}"
        for file, names in FILES.items()
        for found in filter(None, map(own, names))
        if (here := file.split("/")[0]) != (there := found.split("/")[0]) and FLOOR[here] <= FLOOR[there]
    ]
    assert upward == []


def test_no_circles_within_a_package():
    below = {file: {found for found in map(own, names) if found and found != file} for file, names in FILES.items()}
    done: set[str] = set()
    while ready := {file for file in below.keys() - done if below[file] <= done}:
        done |= ready
    assert below.keys() - done == set()


def test_foreign_libraries_live_in_few_rooms():
    outside = [
        f"{file} -> {name}"
        for file, names in FILES.items()
        for name in names
        if (rooms := ROOMS.get(name.split(".")[0])) is not None and not file.startswith(rooms)
    ]
    assert outside == []


def test_light_modules_stay_light():
    heavy = {"numpy", "torch", "transformers", "pyarrow", "datasets"}
    tops = {
        file: {
            name.split(".")[0]
            for node in ast.parse((HOUSE / f"{file}.py").read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        for file in FILES
        if file.startswith(LIGHT)
    }
    assert {file: sorted(names & heavy) for file, names in tops.items() if names & heavy} == {}
