"""The model card: a README.md in the model's folder that says how it was made, measured and licensed.

The frame is `templates/model_card.md`. Left out on purpose: claims about quality; the card carries the run's own numbers.
"""

import re
from importlib.metadata import version
from pathlib import Path
from string import Template

import yaml

from selfsteer.measures.metrics import Method, Metrics, RunFacts
from selfsteer.recipe.references import is_hub_id
from selfsteer.recipe.sections import Recipe, published
from selfsteer.recipe.shipped import template
from selfsteer.reports.drawing import markdown
from selfsteer.reports.tables import run_tables
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


def write_model_card(folder: Path, metrics: Metrics, recipe: Recipe, method: Method) -> Path:
    """Write README.md into the model's folder, in place of one that is there; returns its path."""
    run, resolved = metrics["run"], published(recipe)
    how = (_HOW[method], judged(recipe, method), _result(run, recipe.rounds))
    text = Template(template("model_card.md")).substitute(
        front_matter=yaml.safe_dump(_front_matter(run["model"]), sort_keys=False, allow_unicode=True).rstrip(),
        name=run["name"],
        base_model=_base_model(run["model"]),
        version=version("selfsteer"),
        how="\n\n".join(filter(None, how)),
        limits=_LIMITS[method],
        measured=_MEASURED if "evaluation" not in metrics else _EVALUATED,
        tables="\n\n".join(map(markdown, run_tables(metrics))),
        fence=_fence(resolved),
        recipe=resolved.rstrip(),
    )
    path = folder / "README.md"
    write(path, text.encode())
    return path


def _result(run: RunFacts, rounds: int) -> str:
    """Which of several rounds this policy comes from, and why."""
    if rounds == 1 or "policy_round" not in run:
        return ""
    ended = f" The rounds ended there, because {run['ended']}." if "ended" in run else ""
    return f"This is the policy of round {run['policy_round']} of {rounds}.{ended}"


_MEASURED = (
    "These numbers describe the training data and the training, not how good the answers are. Benchmarks are not among them."
)
_EVALUATED = "These numbers describe the training data and the training; the last table has benchmarks before and after."


def _front_matter(model: str) -> dict[str, object]:
    # The hub takes only ids of its own models.
    base = {"base_model": model} if is_hub_id(model) else {}
    named: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation", **base}
    return {**named, "tags": ["selfsteer", "preference", "dpo", "alignment"]}


def _base_model(model: str) -> str:
    if is_hub_id(model):
        return f"[{model}](https://huggingface.co/{model})"
    # A path says nothing to a stranger, and too much of the machine.
    return f"`{model if model.startswith('package:') else Path(model).name}`"


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in the text."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
