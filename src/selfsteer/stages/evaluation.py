"""Benchmarks of the first and of the aligned policy, at the end of a run; and a judge as evaluations want one.

    <run>/evaluation/parts/      answers and verdicts, under content keys: what is there is not asked again
    <run>/evaluation/data/       local data, laid out
    <run>/evaluation/result.json the summary, with the digest of what made it; only where the judge has not gone

Not a stage: nothing later is made of it. Left out on purpose: what the tasks are (`evaluations/`).
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfsteer.engines.base import Request
from selfsteer.engines.sampling import Sampler
from selfsteer.evaluations.asking import Asked
from selfsteer.evaluations.evaluate import Answering, Plan, answering, ask_with
from selfsteer.evaluations.judged import Verdicts
from selfsteer.evaluations.local_data import folder_digest
from selfsteer.evaluations.results import summary
from selfsteer.judges.base import RecipeJudge
from selfsteer.judges.find import ask, open_judge
from selfsteer.judges.llm import keyed, rendered
from selfsteer.measures.metrics import plain
from selfsteer.measures.verdicts import Verdict, no_answer
from selfsteer.recipe.engines import runs_already
from selfsteer.recipe.sections import EvaluationSection, Recipe
from selfsteer.records import Checkpoint, Pair
from selfsteer.store.durable import canonical_json, digest, read_json, write
from selfsteer.store.journal import Journal

log = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the journalled answers in words and of the result; part of every key."""


def verdicts_of(judge: RecipeJudge, journal: Journal) -> Verdicts:
    """The judge for evaluations: in words where it has any, and by pairs."""

    def compare(pairs: Sequence[Pair]) -> Sequence[Verdict]:
        return list(ask(judge, lambda: pairs, journal, total=len(pairs)))

    sampler = Sampler(lambda: open_judge(judge), judge.prompts)
    in_words = ask_with(sampler, partial(_request, judge, judge.context()), journal, "verdicts in words")
    return Verdicts(judge_name(judge), in_words if judge.section.kind == "llm" else None, compare)


def judge_name(judge: RecipeJudge) -> str:
    """What people call it: its model's name, no folder of this machine."""
    name = judge.section.model or str(judge.section.served)
    return Path(name).name if Path(name).exists() else name


def _request(judge: RecipeJudge, context: int | None, asked: Asked) -> Request | str:
    """The judge's request for an item, of no more words than fit behind it, or why it must not be asked."""
    limit, sampling = judge.section.max_prompt_tokens, asked.sampling
    found = rendered([asked.messages], judge.prompts, limit if context is None else min(limit, context - 1))
    if isinstance(found, str):
        return found
    if context is not None:
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context - len(found[0])))
    return keyed(judge, asked.messages, sampling, schema=SCHEMA, repeat=asked.repeat)


def evaluate(
    models: Sequence[Answering], section: EvaluationSection, judge: RecipeJudge | None, folder: Path
) -> dict[str, Any]:
    """Every task of the section asked of every model: the one before, if there are two, and the one after.

    Raises ValueError, before anything is generated, for what can't be asked.
    """
    with Journal(folder / "parts") as journal:
        verdicts = None if judge is None else verdicts_of(judge, journal)
        scores = not any(runs_already(model.engine) for model in models)
        plan = Plan(section, folder, verdicts, scores=scores)
        found = [plan.evaluate(model, journal) for model in models]
    settings = {
        **section.model_dump(exclude={"data"}),
        "engine": models[-1].engine.kind,
        "judge": None if verdicts is None else verdicts.name,
        "versions": _versions(),
    }
    return summary(found[-1], found[0] if len(found) > 1 else None, settings)


def check_evaluation(recipe: Recipe, judge: RecipeJudge | None) -> None:
    """Raise ValueError where the recipe's tasks could not be asked at the end of its run. Leaves nothing behind."""
    section = recipe.evaluation
    if not section.tasks:
        return
    with TemporaryDirectory() as scratch, Journal(Path(scratch) / "parts") as journal:
        verdicts = None if judge is None else verdicts_of(judge, journal)
        Plan(section, Path(scratch), verdicts, scores=not runs_already(recipe.engine))


def evaluate_run(
    recipe: Recipe, first: Checkpoint, aligned: Checkpoint, judge: RecipeJudge | None, folder: Path
) -> dict[str, Any]:
    """The recipe's tasks before and after. What was found once is not asked again; what a judge that has gone left, is."""
    section = recipe.evaluation
    made_of = digest(
        {
            "schema": SCHEMA,
            "models": [first.digest, aligned.digest],
            "section": section.model_dump(exclude={"data"}),
            "data": None if section.data is None else folder_digest(Path(section.data)),
            "engine": recipe.engine.model_dump(mode="json"),
            "judge": None if judge is None else {"name": judge.name, "settings": judge.settings()},
            "versions": _versions(),
        }
    )
    file = folder / "result.json"
    if os.path.lexists(file):
        known = read_json(file, {"made_of": str, "result": dict}, way_out="delete it, and the same command evaluates again")
        if known["made_of"] == made_of and not _judge_has_gone(known["result"]):
            return known["result"]
    models = [_named(recipe, first, "first policy"), _named(recipe, aligned, "aligned policy")]
    result = plain(evaluate(models, section, judge, folder))
    if not _judge_has_gone(result):
        write(file, canonical_json({"made_of": made_of, "result": result}))
    return result


def _judge_has_gone(result: dict[str, Any]) -> bool:
    """Whether there are items that the same command should ask again."""
    return any(no_answer() in task["unanswered"] for model in result["models"].values() for task in model["tasks"])


def _named(recipe: Recipe, model: Checkpoint, name: str) -> Answering:
    policy = recipe.policy.model_copy(update={"model": model.path, "revision": None})
    return answering(policy, recipe.engine, name=name)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("selfsteer", "lm_eval", "transformers", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
