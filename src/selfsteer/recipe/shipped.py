"""What comes with the package: recipes by their bare name (`selfsteer run quickstart`), and the files that they read."""

import difflib
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "shipped"

TEMPLATES = Path(__file__).parents[1] / "templates"

SHIPPED = "shipped:"
"""Before the name of a file that comes with the package, wherever a recipe takes one."""


def located(name: str) -> str:
    """The path of a file that a recipe names; anything but `shipped:NAME` is a path already."""
    return str(FOLDER / "data" / name.removeprefix(SHIPPED)) if name.startswith(SHIPPED) else name


def template(name: str) -> str:
    """One of the texts that are kept out of the code: prompts, pages, lists of words."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe: a path, or the bare name of one that comes with the package.

    Raises FileNotFoundError, with the names that there are, the nearest first.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = names()
    if str(name) in known:
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(path.stem, known, n=len(known), cutoff=0.5)
    ordered = [*near, *(each for each in known if each not in near)]
    raise FileNotFoundError(f"{path}: no such recipe file. With the package come {', '.join(ordered)}")
