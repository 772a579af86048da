"""The judge that a recipe names: an LLM in this process or behind an engine, or a reward model.

Left out on purpose: how they judge (`llm.py`, `reward.py`), and the judges that need no model of their own
(`implicit.py`, `checks.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from selfsteer.engines import open as opening
from selfsteer.engines.base import Engine
from selfsteer.engines.open import sampler_digest
from selfsteer.engines.openai import OpenAIEngine, Tokens
from selfsteer.judges.llm import EmbeddedJudge, LLMJudge, Pairs, embedded_verdicts, judge_template, sampled_verdicts
from selfsteer.judges.reward import RewardModel, reward_verdicts
from selfsteer.measures.verdicts import Verdict
from selfsteer.models import load_tokenizer, positions_of, resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import TransformersSection, context_limit, runs_already, sampling_identity
from selfsteer.recipe.sections import JudgeSection, Policy, Training
from selfsteer.recipe.text import RecipeError, explain, read_yaml
from selfsteer.records import Checkpoint
from selfsteer.store.durable import digest, file_digest, read_object
from selfsteer.store.journal import Journal
from selfsteer.training.scoring import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeJudge:
    """A judge that is there, as far as that can be told before it is asked; `find_judge` makes it."""

    section: JudgeSection
    model: Checkpoint | None
    """None of a judge that a server holds which runs already."""
    template: str
    """The question to an LLM."""
    trust_remote_code: bool
    date: str | None
    """What its chat template is told of the date, as the policy's is."""
    prompts: Prompts | None
    """How its prompts are rendered; None where its tokenizer is not known."""

    @property
    def name(self) -> str:
        """Digest of what judges: of the weights, or of the model's name on a server that runs already. No addresses."""
        engine = self.section.engine
        if self.model is None:
            assert engine is not None
            return digest(sampling_identity(engine))
        return self.model.digest if engine is None else sampler_digest(engine, self.model)

    def settings(self) -> dict[str, str | int]:
        """What beside that determines its verdicts; no paths."""
        fields = {"kind", "max_prompt_tokens"}
        fields |= {"dtype"} if self.section.engine is None else {"top_logps", "max_new_tokens", "retries"}
        fields |= {"template_arguments"} if self.section.template_arguments else set()
        return self.section.model_dump(include=fields) | {"template": digest(self.template)}

    def inputs(self) -> dict[str, str]:
        """Digests of what its verdicts are made with, for a stage's origin."""
        template = self.section.chat_template
        return {"judge": self.name} | ({} if template is None else {"judge's chat template": file_digest(Path(template))})


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
    return RecipeJudge(
        section=section,
        model=model,
        template=template,
        trust_remote_code=policy.trust_remote_code,
        date=policy.date,
        prompts=_prompts(section, model, policy),
    )


def _prompts(section: JudgeSection, model: Checkpoint | None, policy: Policy) -> Prompts | None:
    path = section.model if model is None else model.path
    if path is None:
        return None
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ValueError(f"judge.model: no tokenizer at {path!r}; name a folder in Hugging Face format, or a hub id")
    try:
        tokenizer = load_tokenizer(path, chat_template=section.chat_template, trust_remote_code=policy.trust_remote_code)
    except OSError as error:
        raise ValueError(f"judge.model: no tokenizer at {path!r} ({error})") from error
    asked = {"system_role": "system", "template_arguments": section.template_arguments}  # nothing is steered here
    prompts = Prompts.of(policy.model_copy(update=asked), tokenizer)
    try:
        # One behind an engine may think first: what it writes is read. Here the first letter counts.
        return prompts.whole().direct() if section.kind == "llm" and section.engine is None else prompts.whole()
    except ValueError as error:
        raise ValueError(str(error).replace("policy.", "judge.")) from error


def open_judge(judge: RecipeJudge) -> Engine:
    """An LLM judge as an engine, for questions that are answered in words. Raises ValueError for what the engine lacks."""
    assert judge.section.kind == "llm"
    if judge.section.engine is not None:
        return _open(judge)
    assert judge.model is not None
    assert judge.prompts is not None
    section = TransformersSection(dtype=judge.section.dtype)
    return opening.open_engine(section, judge.model, judge.prompts, trust_remote_code=judge.trust_remote_code)


def check_judge(judge: RecipeJudge) -> None:
    """Raise ValueError when the judge's engine lacks something that can be seen before it is started."""
    if judge.section.engine is not None:
        _open(judge)  # and never entered


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
    section, prompts = judge.section, judge.prompts
    if section.engine is not None:
        asked = LLMJudge(
            name=judge.name,
            prompts=prompts,
            template=judge.template,
            section=section.model_copy(update={"max_prompt_tokens": _within(judge, section.max_new_tokens)}),
        )
        return sampled_verdicts(asked, pairs, lambda: _open(judge), journal, total=total)
    assert judge.model is not None
    assert prompts is not None
    source = Policy(
        model=judge.model.path,
        chat_template=section.chat_template,
        template_arguments=section.template_arguments,
        date=judge.date,
        trust_remote_code=judge.trust_remote_code,
    )
    if section.kind == "reward_model":
        reward = RewardModel(model=judge.model, policy=source, dtype=section.dtype, max_tokens=_within(judge, 0))
        return reward_verdicts(reward, pairs, journal, total=total)
    scoring = Scorer(judge.model, source, prompts, Training(dtype=section.dtype))
    embedded = EmbeddedJudge(scoring=scoring, template=judge.template, max_prompt_tokens=_within(judge, _LETTER))
    return embedded_verdicts(embedded, pairs, journal, total=total)


_LETTER = 4
"""Tokens that a letter takes at most, with its end."""


def _within(judge: RecipeJudge, more: int) -> int:
    """The longest prompt that the judge is asked: what the section says, or what leaves its model room for `more` tokens."""
    limit = judge.section.max_prompt_tokens
    if judge.model is None:
        return limit
    positions = positions_of(judge.model.path, trust_remote_code=judge.trust_remote_code)
    room = min(filter(None, (positions, context_limit(judge.section.engine))), default=None)
    return limit if room is None else min(limit, room - more)


def _open(judge: RecipeJudge) -> Engine:
    engine = judge.section.engine
    assert engine is not None
    if judge.model is not None:
        assert judge.prompts is not None
        return opening.open_engine(engine, judge.model, judge.prompts, trust_remote_code=judge.trust_remote_code)
    assert engine.kind == "openai"
    # Nobody looks at the token ids of a verdict.
    tokens = Tokens(encode=lambda _text: (), template_arguments=judge.section.template_arguments)
    return OpenAIEngine(engine, tokens)
