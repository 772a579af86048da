"""What judges have in common: the one that a recipe names, and pairs that must not be put to it.

Left out on purpose: how a recipe's judge is found and asked (`find.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from selfsteer.engines.open import sampler_digest
from selfsteer.measures.verdicts import Verdict, failure
from selfsteer.models import positions_of
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import context_limit, sampling_identity
from selfsteer.recipe.sections import JudgeSection, Policy
from selfsteer.records import Checkpoint, Pair
from selfsteer.store.durable import digest, file_digest

Pairs = Callable[[], Iterable[Pair]]
"""The pairs to be judged, each time from the beginning: once to ask, once to read the verdicts."""


@dataclass(frozen=True, kw_only=True)
class RecipeJudge:
    """A judge that is there, as far as that can be told before it is asked; `find_judge` makes it."""

    section: JudgeSection
    model: Checkpoint | None
    """None of a judge that a server holds which runs already."""
    template: str
    """The question to an LLM (`llm.judge_template`)."""
    policy: Policy
    """How its model is loaded and asked; `policy.model` is its folder, its tokenizer's, or its name on a server."""
    prompts: Prompts | None
    """How its prompts are rendered; None where its tokenizer is not known. Only with it can texts that would be read as
    special tokens be kept from the judge."""

    @cached_property
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

    def context(self) -> int | None:
        """Tokens that its model holds, prompt and answer; None where nobody says."""
        if self.model is None:
            return None
        positions = positions_of(self.model.path, trust_remote_code=self.policy.trust_remote_code)
        return min(filter(None, (positions, context_limit(self.section.engine))), default=None)

    def longest_prompt(self, more: int) -> int:
        """The longest that it is asked, in tokens: what the section says, or what leaves its model room for `more`."""
        limit, context = self.section.max_prompt_tokens, self.context()
        return limit if context is None else min(limit, context - more)


def not_refused(pairs: Pairs, why_not: Callable[[Pair], str | None], refused: dict[int, str]) -> Iterator[Pair]:
    """The pairs that may be put to a judge; why the others may not is in `refused` from then on, by their number."""
    for number, pair in enumerate(pairs()):
        reason = why_not(pair)
        if reason is None:
            yield pair
        else:
            refused[number] = reason


def with_refused(pairs: Pairs, refused: Mapping[int, str], verdict: Callable[[Pair], Verdict]) -> Iterator[Verdict]:
    """A verdict for every pair, in order."""
    for number, pair in enumerate(pairs()):
        yield failure(pair, refused[number]) if number in refused else verdict(pair)
