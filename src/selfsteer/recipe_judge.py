"""The judge's section of a recipe. How judges judge is in `judges.py`, which of them a recipe names in `judging.py`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from selfsteer.recipe_engines import DTypeName, EngineSection, runs_already
from selfsteer.recipe_text import Section


class JudgeSection(Section):
    """What judges the pairs, in both orders; `docs/quality.md` says what its numbers are worth."""

    kind: Literal["none", "llm", "reward_model"] = "none"
    """llm: a chat model asked which response is better, by the probability of its answer; reward_model: a
    sequence-classification model with one label."""
    model: str | None = None
    """The judge, named as policy.model is. Of a server that runs already (engine.base_url), a folder or hub id whose
    tokenizer is the judge's: with it, pairs whose text holds its special tokens are not put to the server."""
    engine: EngineSection | None = None
    """With kind: llm, the engine that holds the judge (vllm, openai or ray, as in `engine`); this process when empty."""
    dtype: DTypeName = "float32"
    """Arithmetic in this process; a small judge's probabilities lie so close to one half that rounding turns some of its
    verdicts."""
    template: str | None = None
    """With kind: llm, a file with the question, in place of the built-in one."""
    chat_template: str | None = None
    """Path of a Jinja chat template, for tokenizers without one."""
    max_prompt_tokens: int = Field(default=8192, ge=1)
    """Pairs whose question (or conversation) is longer get no verdict; nothing is ever cut."""
    top_logps: int = Field(default=20, ge=0, le=20)
    """With an engine, judge by the probabilities of so many likely first tokens, where it tells them; 0 asks for none and
    reads the letter that it writes, for servers that refuse to tell."""
    max_new_tokens: int = Field(default=16, ge=1)
    """With an engine, the limit of an answer; a model that thinks before it answers needs more."""
    retries: int = Field(default=2, ge=0)
    """With an engine, further tries of an answer that can't be read."""

    @model_validator(mode="after")
    def _used_settings(self) -> Self:
        if self.kind != "none" and not self.model and not runs_already(self.engine):
            raise ValueError(f"kind: {self.kind} needs judge.model, or judge.engine with a server that runs already")
        if self.kind == "none" and (self.model or self.engine):
            raise ValueError("model and engine judge only with kind: llm or reward_model; set judge.kind")
        if self.kind != "llm" and self.template:
            raise ValueError(f"template {self.template!r} is read only with kind: llm; set judge.kind=llm or template=null")
        if self.kind == "reward_model" and self.engine:
            raise ValueError("a reward model scores in this process; set judge.engine=null, or judge.kind=llm")
        if self.engine is not None and self.engine.kind == "transformers":
            raise ValueError(
                "a judge in this process has no engine, and its arithmetic is judge.dtype; set judge.engine=null, or give"
                " engine the kind vllm, openai or ray"
            )
        if self.chat_template and not self.model:
            raise ValueError("chat_template is of a tokenizer that is not named; set judge.model, or chat_template=null")
        if not self.model and self.engine is not None and self.engine.kind == "openai" and self.engine.send == "token_ids":
            raise ValueError("engine.send: token_ids needs the judge's tokenizer; name it in judge.model")
        return self
