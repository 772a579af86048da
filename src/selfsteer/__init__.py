"""selfsteer: align a chat model without human labels, by Self-Steering Optimization (arXiv 2410.17131).

import selfsteer
metrics = selfsteer.run("quickstart", "queries.limit=48")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfsteer.measures.metrics import Metrics
    from selfsteer.recipe.sections import Recipe

__all__ = ["run"]


def run(recipe: Recipe | Path | str, *overrides: str, replace: bool = False, borrow: Sequence[Path | str] = ()) -> Metrics:
    """The whole pipeline, or its continuation, as `selfsteer run` does it; call it from the main thread.

    recipe: a Recipe, or the path of one in YAML; overrides: "key=value", with dotted keys, for a path only.
    replace: give up the pairs and models that other settings made in the same output folder; refused otherwise.
    borrow: run folders whose stages and samples are taken over where they are the same.
    Returns what metrics.json holds. Raises ValueError for what the user can mend, Interrupted after SIGINT or SIGTERM.
    """
    # Imported here so that `import selfsteer` and the command's help stay fast.
    from selfsteer import pipeline
    from selfsteer.recipe.sections import Recipe, load
    from selfsteer.runtime import graceful_stop

    if not isinstance(recipe, Recipe):
        recipe = load(Path(recipe), overrides)
    elif overrides:
        raise ValueError("overrides go with the path of a recipe; a Recipe is changed with model_copy(update=...)")
    with graceful_stop():
        return pipeline.run(recipe, replace=replace, borrow=[Path(folder) for folder in borrow])
