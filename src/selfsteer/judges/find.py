"""The judge that a recipe names: an LLM in this process or behind an engine, or a reward model.

Left out on purpose: how they judge (`llm.py`, `reward.py`), and the judges that need no model of their own
(`implicit.py`, `checks.py`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from selfsteer.engines import open as opening
from selfsteer.engines.base import Engine
from selfsteer.engines.openai import OpenAIEngine
from selfsteer.judges.base import Pairs, RecipeJudge
from selfsteer.judges.llm import embedded_verdicts, judge_template, sampled_verdicts
from selfsteer.judges.reward import RewardModel, reward_verdicts
from selfsteer.measures.verdicts import Verdict
from selfsteer.models import resolve, tokenizer_of
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import TransformersSection, runs_already
from selfsteer.recipe.sections import JudgeSection, Policy
from selfsteer.recipe.text import RecipeError, explain, read_yaml
from selfsteer.records import Checkpoint
from selfsteer.store.durable import read_object
from selfsteer.store.journal import Journal


def find_judge(section: JudgeSection, policy: Policy, known: Mapping[str, Checkpoint] | None = None) -> RecipeJudge | None:
    """The recipe's judge, None where it names none, or code (`judges/checks.py`).

    policy: says whether code that comes with a model may run, and what a chat template is told of the date.

    known: models that were resolved already, by their references. Raises ValueError for a model that is not there or has no
    chat template, and for a template without its places.
    """
    if section.kind in ("none", "checks"):
        return None
    template = judge_template(None if section.template is None else Path(section.template))
    model = None
    if not runs_already(section.engine):
        assert section.model is not None, "checked when the recipe was read"
        try:
            model = (known or {}).get(section.model) or resolve(
                Policy(model=section.model, trust_remote_code=policy.trust_remote_code)
            )
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(str(error).replace("policy.model", "judge.model")) from error
    tokenizer = section.model if model is None else model.path
    asked = Policy(
        model=tokenizer or str(section.served),
        chat_template=section.chat_template,
        template_arguments=section.template_arguments,
        date=policy.date,
        system_role="system",  # nothing is steered here
        trust_remote_code=policy.trust_remote_code,
    )
    prompts = None if tokenizer is None else _prompts(section, asked)
    return RecipeJudge(section=section, model=model, template=template, policy=asked, prompts=prompts)


def _prompts(section: JudgeSection, asked: Policy) -> Prompts:
    path = asked.model
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ValueError(f"judge.model: no tokenizer at {path!r}; name a folder in Hugging Face format, or a hub id")
    try:
        tokenizer = tokenizer_of(asked)
    except OSError as error:
        raise ValueError(f"judge.model: no tokenizer at {path!r} ({error})") from error
    prompts = Prompts.of(asked, tokenizer)
    try:
        # One behind an engine may think first: what it writes is read. Here the first letter counts.
        return prompts.whole().direct() if section.kind == "llm" and section.engine is None else prompts.whole()
    except ValueError as error:
        raise ValueError(str(error).replace("policy.", "judge.")) from error


def open_judge(judge: RecipeJudge) -> Engine:
    """An LLM judge as an engine. Raises ValueError, before anything is started, for what the engine lacks."""
    section = judge.section
    assert section.kind == "llm"
    engine = section.engine or TransformersSection(dtype=section.dtype)
    if judge.model is not None:
        assert judge.prompts is not None
        trust = judge.policy.trust_remote_code
        return opening.open_engine(engine, judge.model, judge.prompts, trust_remote_code=trust)
    assert engine.kind == "openai"
    asked = section.template_arguments if engine.send == "messages" else {}
    told = {"chat_template_kwargs": asked} if asked else {}
    # Nobody looks at the token ids of a verdict.
    return OpenAIEngine(engine.model_copy(update={"extra": told | engine.extra}), None)


def check_judge(judge: RecipeJudge) -> None:
    """Raise ValueError when the judge's engine lacks something that can be seen before it is started."""
    if judge.section.engine is not None:
        open_judge(judge)  # and never entered


def read_judge(reference: str) -> JudgeSection:
    """The judge that a command line names: a model with default settings, or the judge's section in a YAML file.

    Raises ValueError for a model that is not there, `RecipeError` for a file without a usable section.
    """
    path = Path(reference)
    if path.suffix not in (".yaml", ".yml"):
        return _guess(reference)
    data, lines = read_yaml(path)
    try:
        section = JudgeSection.model_validate(data.get("judge", {}))
    except ValidationError as error:
        mistakes = explain(error, JudgeSection, lambda key: f"{path}:{lines.get(f'judge.{key}', lines.get('judge', 1))}")
        raise RecipeError(mistakes) from None
    if section.kind == "none":
        raise RecipeError(f"{path}: names no judge; expected a section judge with a kind, and with a model or an engine")
    if section.kind == "checks":
        raise RecipeError(
            f"{path}: judge.kind: checks needs principles, which a file of pairs lacks; name an LLM or reward model"
        )
    return section


def _guess(model: str) -> JudgeSection:
    """Of which kind, the model's configuration says."""
    try:
        folder = Path(resolve(Policy(model=model)).path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(str(error).replace("policy.model", "--judge")) from error
    architectures = read_object(folder / "config.json").get("architectures")
    named = cast("list[object]", architectures) if isinstance(architectures, list) else []
    scores = any(str(name).endswith("ForSequenceClassification") for name in named)
    return JudgeSection(kind="reward_model" if scores else "llm", model=model)


def ask(judge: RecipeJudge, pairs: Pairs, journal: Journal, *, total: int) -> Iterator[Verdict]:
    """A verdict for every pair, in order; see `llm.py`. total, the number of pairs, is for the progress bar."""
    if judge.section.engine is not None:
        return sampled_verdicts(judge, pairs, lambda: open_judge(judge), journal, total=total)
    if judge.section.kind == "llm":
        return embedded_verdicts(judge, pairs, journal, total=total)
    assert judge.model is not None
    longest = judge.longest_prompt(0)
    reward = RewardModel(model=judge.model, policy=judge.policy, dtype=judge.section.dtype, max_tokens=longest)
    return reward_verdicts(reward, pairs, journal, total=total)
