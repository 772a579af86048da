"""The judge that a recipe names: an LLM in this process, or a reward model.

Left out on purpose: how they judge (`judges.py`), and judges behind a server.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfsteer import reference
from selfsteer.durable import digest
from selfsteer.journal import Journal
from selfsteer.judge_prompts import judge_template
from selfsteer.judges import EmbeddedJudge, Pairs, embedded_verdicts, reward_verdicts
from selfsteer.models import load_tokenizer, resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe import JudgeSection, Policy, Training
from selfsteer.records import Checkpoint
from selfsteer.reward import RewardModel
from selfsteer.verdicts import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeJudge:
    """A judge whose model is on this machine; `find_judge` makes it."""

    section: JudgeSection
    model: Checkpoint
    template: str
    """The question to an LLM."""

    def settings(self) -> dict[str, str | int]:
        """What determines its verdicts, its model apart; no paths."""
        chosen = self.section.model_dump(include={"kind", "dtype", "max_prompt_tokens"})
        return chosen | {"template": digest(self.template)}


def find_judge(section: JudgeSection, policy: Policy) -> RecipeJudge | None:
    """The recipe's judge, None where it names none. policy: says whether code that comes with a model may run.

    Raises ValueError for a model that is not there or has no chat template, and for a template without its places.
    """
    if section.kind == "none":
        return None
    assert section.model is not None, "checked when the recipe was read"
    template = judge_template(None if section.template is None else Path(section.template))
    source = Policy(model=section.model, chat_template=section.chat_template, trust_remote_code=policy.trust_remote_code)
    try:
        model = resolve(source)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(str(error).replace("policy.model", "judge.model")) from error
    load_tokenizer(model.path, chat_template=section.chat_template, trust_remote_code=source.trust_remote_code)
    return RecipeJudge(section=section, model=model, template=template)


def guess_judge(model: str) -> JudgeSection:
    """A judge with default settings; of which kind, its configuration says. Raises ValueError as `resolve` does."""
    config = json.loads((Path(resolve(Policy(model=model)).path) / "config.json").read_bytes())
    scores = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    return JudgeSection(kind="reward_model" if scores else "llm", model=model)


def ask(judge: RecipeJudge, policy: Policy, pairs: Pairs, journal: Journal, *, total: int) -> Iterator[Verdict]:
    """A verdict for every pair, in order; see `judges.embedded_verdicts` and `judges.reward_verdicts`."""
    section = judge.section
    source = Policy(model=judge.model.path, chat_template=section.chat_template, trust_remote_code=policy.trust_remote_code)
    if section.kind == "reward_model":
        reward = RewardModel(model=judge.model, policy=source, dtype=section.dtype, max_tokens=section.max_prompt_tokens)
        return reward_verdicts(reward, pairs, journal, total=total)
    tokenizer = load_tokenizer(source.model, chat_template=source.chat_template, trust_remote_code=source.trust_remote_code)
    scoring = reference.Judge(judge.model, source, Prompts(tokenizer), Training(dtype=section.dtype))
    embedded = EmbeddedJudge(scoring=scoring, template=judge.template, max_prompt_tokens=section.max_prompt_tokens)
    return embedded_verdicts(embedded, pairs, journal, total=total)
