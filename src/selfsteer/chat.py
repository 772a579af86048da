"""Ask the old and the new model the same thing, side by side: each keeps its own side of the conversation.

Prompts go the way that those of training go (`prompts.py`). Left out on purpose: streaming; a judge of what is said.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from selfsteer.engines.base import Completion, Engine, Failed, Request, Sampling
from selfsteer.engines.open import open_engine, prompts_of
from selfsteer.engines.sampling import seed_for
from selfsteer.measures.metrics import read_metrics
from selfsteer.models import resolve
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import EngineSection
from selfsteer.recipe.sections import Policy, Sampled
from selfsteer.records import Message
from selfsteer.runtime import Interrupted, raise_if_stopped, signal_number


def chat(
    models: Mapping[str, Policy], lines: Iterable[str], sampled: Sampled, engine: EngineSection, system: str | None = None
) -> Iterator[dict[str, str]]:
    """For each line what every model answers, by the model's name in `models`.

    A line "/new" begins the conversation again. What a model can't be asked (special tokens, a conversation longer than its
    context) is answered with the reason in brackets, and forgotten. Raises ValueError for models that can't be loaded.
    """
    with ExitStack() as stack:
        speakers = {name: _Speaker.of(policy, engine, stack) for name, policy in models.items()}
        for number, line in enumerate(lines):
            raise_if_stopped()
            if line.strip() == "/new":
                for speaker in speakers.values():
                    speaker.said.clear()
            elif asked := line.strip():
                yield {name: speaker.answer(asked, system, sampled, number) for name, speaker in speakers.items()}


def model_of(reference: str) -> str:
    """The aligned policy of a run folder; any other reference as it is. Raises ValueError for a run without one."""
    folder = Path(reference)
    if not (folder / "run.json").is_file():
        return reference
    run = read_metrics(folder)["run"]
    if "policy_folder" not in run:
        raise ValueError(f"{reference}: this run has aligned no policy; selfsteer status {reference} says why")
    return run["policy_folder"]


@dataclass(slots=True, kw_only=True, eq=False)
class _Speaker:
    """A model, and its side of the conversation."""

    prompts: Prompts
    engine: Engine
    said: list[Message] = field(default_factory=list[Message])

    @classmethod
    def of(cls, policy: Policy, section: EngineSection, stack: ExitStack) -> "_Speaker":
        model = resolve(policy)
        prompts = prompts_of(policy, model)
        engine = open_engine(section, model, prompts, trust_remote_code=policy.trust_remote_code)
        return cls(prompts=prompts, engine=stack.enter_context(engine))

    def answer(self, asked: str, system: str | None, sampled: Sampled, number: int) -> str:
        self.said.append(Message(role="user", content=asked))
        messages = tuple(self.said)
        if system is not None:
            messages = self.prompts.steer(messages, system)
        reason = self.prompts.quarantine_reason(messages)
        if reason is not None:
            self.said.pop()
            return f"[not asked: {reason}]"
        sampling = Sampling(**sampled.model_dump())
        ids = tuple(self.prompts.prompt_ids(messages))
        request = Request(
            key=str(number), messages=messages, prompt_ids=ids, sampling=sampling, seed=seed_for("chat", number)
        )
        try:
            answers = list(self.engine.generate([request]))
        except ValueError as error:  # of the embedded engine: more tokens than the model has positions
            answers = [Failed(key=request.key, reason="no answer", detail=str(error))]
        if not answers:
            raise Interrupted(signal_number())
        (found,) = answers
        if not isinstance(found, Completion):
            self.said.pop()
            return f"[{found.reason}: {found.detail}]"
        self.said.append(Message(role="assistant", content=found.text))
        return found.text
