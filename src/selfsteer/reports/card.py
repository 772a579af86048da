"""The model card: a README.md in the model's folder that says how it was made, measured and licensed.

The frame is `templates/model_card.md`. Left out on purpose: claims about quality; the card carries the run's own numbers.
"""

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any, NotRequired, TypedDict

import yaml

from selfsteer.measures.metrics import Method, RoundMetrics
from selfsteer.recipe.references import is_hub_id
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.shipped import template
from selfsteer.reports import tables
from selfsteer.store.durable import write

_HOW: dict[Method, str] = {
    "sso": """\
A chat model aligned without human labels, by Self-Steering Optimization
([arXiv 2410.17131](https://arxiv.org/abs/2410.17131)):

1. Each query got two opposing principles, one that leads to a good response and one that leads to a relatively bad one.
2. The model answered each query under either principle.
3. A copy of the model, the data generator, was trained to keep good and bad responses apart and both close to what the model
   itself would say. It answered the queries under either principle, which made the preference pairs. It is not a part of
   this model.
4. The model was trained on the pairs, the bare query above both responses.""",
    "dual": """\
A chat model aligned without human labels, by Self-Steering Optimization with two data generators
([arXiv 2410.17131](https://arxiv.org/abs/2410.17131)):

1. Each query got two opposing principles, one that leads to a good response and one that leads to a relatively bad one.
2. The model answered each query under either principle.
3. Two copies of the model were trained: one to keep good responses above bad ones, one to prefer what the model itself would
   say when told to answer badly. The first answered the queries under the better principle, the second under the worse one,
   which made the preference pairs. Neither is a part of this model.
4. The model was trained on the pairs, the bare query above both responses.""",
    "pbaa": """\
A chat model aligned without human labels, on responses steered by principles alone (PBAA, the baseline of
[arXiv 2410.17131](https://arxiv.org/abs/2410.17131)):

1. Each query got two opposing principles, one that leads to a good response and one that leads to a relatively bad one.
2. The model answered each query under either principle, which made the preference pairs.
3. The model was trained on the pairs, the bare query above both responses.""",
    "given": "A chat model aligned on preference pairs that were made elsewhere.",
}

_SELF_MADE = """\
- That a response was sampled under the better principle does not make it the better response.
- What the model does not know, its own pairs cannot teach."""

_LIMITS: dict[Method, str] = {
    "sso": _SELF_MADE,
    "dual": _SELF_MADE,
    "pbaa": _SELF_MADE,
    "given": "- The pairs were made elsewhere; whether their preferences are right is not known here.",
}


class CardFacts(TypedDict):
    """What a card says."""

    name: str
    """Of the run."""
    base_model: str
    """The policy the run started from, as the recipe names it."""
    method: Method
    recipe: str
    """The resolved recipe, YAML."""
    judged: str
    """Who judged the pairs, and what came of it; see `judged`."""
    rounds: list[RoundMetrics]
    """As in metrics.json; what is missing is left out of the card."""
    evaluation: NotRequired[dict[str, Any]]
    """As in metrics.json."""
    result: NotRequired[str]
    """Which of several rounds this policy comes from, and why."""


def judged(recipe: Recipe, method: Method) -> str:
    """Who judged the pairs that a recipe makes or is given, and which of them align the policy."""
    judges = {"none": "", "llm": "an LLM", "reward_model": "a reward model", "checks": "code"}
    selects, judge = recipe.selection.active, judges[recipe.judge.kind]
    if selects and recipe.selection.by == "judge":
        return f"The scores of {judge} decided which of the pairs the model was trained on."
    said = "The data generator's own scores decided which of the pairs the model was trained on. " if selects else ""
    if judge:
        return f"{said}Of the pairs, {judge} judged a sample, to measure them; none was chosen by its verdict."
    made = "" if method == "given" else "No human, reward model or other model judged the responses."
    return f"{said}{made}".rstrip()


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write README.md into the model's folder, in place of one that is there; returns its path."""
    text = Template(template("model_card.md")).substitute(
        front_matter=yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True).rstrip(),
        name=facts["name"],
        base_model=_base_model(facts["base_model"]),
        version=version("selfsteer"),
        how="\n\n".join(filter(None, (_HOW[facts["method"]], facts["judged"], facts.get("result")))),
        limits=_LIMITS[facts["method"]],
        measured=_MEASURED if "evaluation" not in facts else _EVALUATED,
        tables="\n\n".join(map(tables.markdown, _tables(facts))),
        fence=_fence(facts["recipe"]),
        recipe=facts["recipe"].rstrip(),
    )
    path = folder / "README.md"
    write(path, text.encode())
    return path


_MEASURED = (
    "These numbers describe the training data and the training, not how good the answers are. Benchmarks are not among them."
)
_EVALUATED = "These numbers describe the training data and the training; the last table has benchmarks before and after."


def _tables(facts: CardFacts) -> Iterator[tables.Table]:
    yield from tables.tables(facts["rounds"])
    if "evaluation" in facts:
        yield tables.evaluation_table(facts["evaluation"])


def _front_matter(facts: CardFacts) -> dict[str, object]:
    matter: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    # The hub takes only ids of its own models.
    if is_hub_id(facts["base_model"]):
        matter["base_model"] = facts["base_model"]
    return {**matter, "tags": ["selfsteer", "preference", "dpo", "alignment"]}


def _base_model(model: str) -> str:
    if is_hub_id(model):
        return f"[{model}](https://huggingface.co/{model})"
    # A path says nothing to a stranger, and too much of the machine.
    return f"`{model if model.startswith('package:') else Path(model).name}`"


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in the text."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
