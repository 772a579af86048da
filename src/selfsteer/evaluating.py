"""Is a model better than another? Benchmarks before and after, and answers against answers.

Left out on purpose: what is asked (`evaluations/`) and how it is kept (`stages/evaluation.py`).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from selfsteer.data.queries import read_queries, source_digest
from selfsteer.engines.base import Sampling
from selfsteer.engines.sampling import Sampler, kept_open
from selfsteer.evaluations.alpaca_eval import annotated_win_rate, read_annotations
from selfsteer.evaluations.asking import Answer, Asked
from selfsteer.evaluations.evaluate import Answering, answering, ask_with
from selfsteer.evaluations.judged import compare
from selfsteer.evaluations.length_controlled import WinRate
from selfsteer.evaluations.results import Evaluation, TaskResult, summary
from selfsteer.judges.base import RecipeJudge
from selfsteer.judges.find import check_judge, find_judge, read_judge
from selfsteer.recipe.engines import EngineSection, TransformersSection, runs_already
from selfsteer.recipe.sections import EvaluationSection, Policy, Queries, Sampled
from selfsteer.recipe.text import RecipeError, Section, explain, read_yaml
from selfsteer.records import Dropped, Query
from selfsteer.runtime import counted
from selfsteer.stages.evaluation import evaluate, verdicts_of
from selfsteer.store.folder import RunFolder, day_of
from selfsteer.store.journal import Journal


def evaluate_models(
    models: Sequence[Policy], section: EvaluationSection, engine: EngineSection, judge: str | None, output: Path
) -> dict[str, Any]:
    """The tasks of a section, answered by one model, or by the one before and the one after.

    judge: as `read_judge` reads it, for tasks that need one. output: the folder that keeps what was answered.
    Raises ValueError, before anything is generated, for a task, a model, an engine or a judge that will not do.
    """
    day = day_of(output)
    asked, found = _models(models, engine, day), _judge(judge, day)
    with RunFolder(output) as folder:
        folder.begin(day)
        return evaluate(asked, section, found, folder.path)


def compare_answers(
    models: tuple[Policy, Policy], queries: Queries, sampled: Sampled, how: tuple[EngineSection, str], output: Path
) -> dict[str, Any]:
    """Both models answer the queries, and a judge says who answers better, in both orders.

    how: the engine, and the judge as `read_judge` reads it. The win rate is that of the first model.
    """
    engine, reference = how
    day = day_of(output)
    ours, theirs = _models(models, engine, day)
    judge = _judge(reference, day)
    assert judge is not None
    items = list(read_queries(queries))
    read = [item for item in items if isinstance(item, Query)]
    dropped = Counter(item.reason for item in items if isinstance(item, Dropped))
    if not read:
        raise ValueError(f"{queries.path}: no usable query. Look at the file, or name its column.")
    sampling = Sampling(**sampled.model_dump())
    with RunFolder(output) as folder, Journal(folder.path / "parts") as journal:
        folder.begin(day)
        said = [_answers(model, read, sampling, journal) for model in (ours, theirs)]
        verdicts = verdicts_of(judge, journal)
        compared = compare(verdicts, [query.messages for query in read], *said)
    result = TaskResult(
        task="answers",
        figures=compared.figures("answers", None),
        items=len(read),
        of=len(read),
        version="1",
        data=f"{Path(queries.path).name}, sha256 {source_digest(queries)[:16]}",
        unanswered=compared.unanswered,
        cut=sum(answer.cut for answers in said for answer in answers),
        judge=verdicts.name,
        notes=[*compared.notes(None), *([f"left out: {counted(dropped)}"] if dropped else [])],
    )
    evaluation = Evaluation(model=ours.name, digest=ours.model.digest, tasks=[result], seconds=0.0)
    against = {"against": theirs.name, "sampling": sampled.model_dump(), "engine": engine.kind, "judge": verdicts.name}
    return summary(evaluation, None, against)


def _answers(model: Answering, queries: Sequence[Query], sampling: Sampling, journal: Journal) -> Sequence[Answer]:
    with kept_open(model.open) as engine:
        ask = ask_with(Sampler(engine, model.prompts), model.request, journal, f"answers of {Path(model.name).name}")
        return ask([Asked(query.messages, sampling) for query in queries])


def annotated(file: Path, data: Path | None) -> tuple[WinRate, str]:
    """The win rates of recorded judgements in AlpacaEval's format, and who judged whom.

    data: AlpacaEval's folder, with df_gamed.csv for the published length-controlled rate and the list of instructions.
    """
    annotations = read_annotations(file)
    folder = data if data is None or not (data / "alpaca_eval").is_dir() else data / "alpaca_eval"
    who = f"{annotations.model} against {annotations.baseline}, judged by {annotations.annotator}"
    return annotated_win_rate(annotations, folder), who


def _models(models: Sequence[Policy], engine: EngineSection, day: str) -> list[Answering]:
    if len(models) > 1 and runs_already(engine):
        raise ValueError(
            "--engine: a server that runs already holds one model, so it can't answer for two; set engine.serve to the"
            " command that serves a model's folder, use kind vllm, or evaluate one model at a time"
        )
    return [answering(model.model_copy(update={"date": model.date or day}), engine) for model in models]


def _judge(reference: str | None, day: str) -> RecipeJudge | None:
    if reference is None:
        return None
    judge = find_judge(read_judge(reference), Policy(model=reference, date=day))
    assert judge is not None
    check_judge(judge)
    return judge


class _EngineFile(Section):
    """A file with an engine's section."""

    engine: EngineSection


def read_engine(file: Path | None) -> EngineSection:
    """The engine section of a YAML file (under `engine`, as in a recipe); the embedded engine without one."""
    if file is None:
        return TransformersSection()
    data, lines = read_yaml(file)
    if "engine" not in data:
        raise RecipeError(f"{file}: no section engine; expected one, as in a recipe")
    try:
        return _EngineFile.model_validate({"engine": data["engine"]}).engine
    except ValidationError as error:
        raise RecipeError(explain(error, _EngineFile, lambda key: f"{file}:{lines.get(key, lines['engine'])}")) from None
