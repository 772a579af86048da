"""The configuration of a run: one frozen section a stage, every field described, unknown keys refused.

The defaults are the paper's (arXiv 2410.17131v2, section 4.1 and appendix A) wherever it gives a number.
`load` reads a recipe from YAML, `describe` writes it with everything explained. How YAML is read and how errors are put
into words is in `text.py`; environment references and includes were left out on purpose: a recipe says all it does.
"""

import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, cast

import yaml
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from selfsteer.recipe import shipped, text
from selfsteer.recipe.engines import DTypeName, EngineSection, TransformersSection, runs_already
from selfsteer.recipe.gates import parse, unmeasured
from selfsteer.recipe.text import FilePath, RecipeError, Section

_NOT_OF_A_TEMPLATE = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now", "raise_exception"),
}
"""Set by us, or by transformers' apply_chat_template, which takes a template's arguments beside its own."""


def template_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a chat template, checked."""
    if taken := sorted(_NOT_OF_A_TEMPLATE & given.keys()):
        raise ValueError(f"{', '.join(taken)} can't be given to a chat template here")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("the arguments of a chat template are JSON values; put a date into quotes") from None
    return given


TemplateArguments = Annotated[dict[str, Any], AfterValidator(template_arguments)]


class JudgeSection(Section):
    """What judges the pairs; `docs/quality.md` says what its numbers are worth."""

    kind: Literal["none", "llm", "reward_model", "checks"] = "none"
    """llm: a chat model asked in both orders which response is better, by the probability of its answer; reward_model: a
    sequence-classification model with one label; checks: code, by the checks of the principles (`docs/checks.md`)."""
    model: FilePath | None = None
    """The judge, named as policy.model is. Of a server that runs already (engine.base_url), a folder or hub id whose
    tokenizer is the judge's: with it, pairs whose text holds its special tokens are not put to the server."""
    engine: EngineSection | None = None
    """With kind: llm, the engine that holds the judge (vllm, openai or ray, as in `engine`); this process when empty."""
    dtype: DTypeName = "float32"
    """Arithmetic in this process; a small judge's probabilities lie so close to one half that rounding turns some of its
    verdicts."""
    template: FilePath | None = None
    """With kind: llm, a file with the question, in place of the built-in one."""
    chat_template: FilePath | None = None
    """Path of a Jinja chat template, for tokenizers without one."""
    template_arguments: TemplateArguments = Field(default_factory=dict[str, Any])
    """Arguments of the chat template, such as {enable_thinking: false}; a server that renders messages itself is sent them
    as chat_template_kwargs (vLLM, SGLang)."""
    max_prompt_tokens: int = Field(default=8192, ge=1)
    """Pairs whose question (or conversation) is longer get no verdict; nothing is ever cut."""
    top_logps: int = Field(default=20, ge=0, le=20)
    """With an engine, judge by the probabilities of so many likely first tokens, where it tells them; 0 asks for none and
    reads the letter that it writes, for servers that refuse to tell."""
    max_new_tokens: int = Field(default=16, ge=1)
    """With an engine, the limit of an answer; a model that thinks before it answers needs more."""
    retries: int = Field(default=2, ge=0)
    """With an engine, further tries of an answer that can't be read."""

    @property
    def served(self) -> str | None:
        """The name of the model on a server that judges."""
        return self.engine.model if self.engine is not None and self.engine.kind == "openai" else None

    @model_validator(mode="after")
    def _used_settings(self) -> Self:
        if self.kind in ("llm", "reward_model") and not self.model and not runs_already(self.engine):
            raise ValueError(f"kind: {self.kind} needs judge.model, or judge.engine with a server that runs already")
        if self.kind in ("none", "checks") and (self.model or self.engine):
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


class Launcher(Section):
    """The processes of the trainings; where they run, not what they compute."""

    kind: Literal["local", "accelerate", "ray"] = "local"
    """local: this process. accelerate: several, started by `accelerate launch`, which score the pairs too. ray: several, on
    a Ray cluster; scoring stays in this process."""
    processes: int | None = Field(default=None, ge=1)
    """The number of processes over all machines; with kind: accelerate, the configuration's when empty."""
    config: FilePath | None = None
    """With kind: accelerate, its configuration file (FSDP, machines); data parallelism here when empty."""
    address: str | None = None
    """With kind: ray, the cluster, as engine.address names it; one on this machine, for the run, when empty."""
    cpus: float = Field(default=1, gt=0)
    """With kind: ray, CPUs that each process takes."""
    gpus: int = Field(default=0, ge=0, le=1)
    """With kind: ray, GPUs that each process takes."""
    restarts: int = Field(default=3, ge=0)
    """With kind: ray, how often a group that lost a process is started again, from its last complete checkpoint."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        used = {
            "local": set[str](),
            "accelerate": {"processes", "config"},
            "ray": {"processes", "address", "cpus", "gpus", "restarts"},
        }[self.kind]
        fields = type(self).model_fields
        unused = [name for name in fields if name not in used | {"kind"} and getattr(self, name) != fields[name].default]
        if unused:
            kinds = "accelerate" if unused == ["config"] else "ray" if "processes" not in unused else "accelerate or ray"
            raise ValueError(f"launcher.{' and launcher.'.join(unused)} need launcher.kind: {kinds}")
        if self.kind == "accelerate" and self.processes is None and self.config is None:
            raise ValueError("kind: accelerate needs launcher.processes or launcher.config")
        if self.kind == "accelerate" and self.processes == 1 and self.config is None:
            raise ValueError("kind: accelerate starts several processes; one is launcher.kind: local")
        if self.kind == "ray" and self.processes is None:
            raise ValueError("kind: ray needs launcher.processes")
        if self.kind == "ray" and self.address is not None and "://" in self.address:
            raise ValueError(
                "launcher.address: Ray Train does not run through a Ray client (ray://); start the run on a node of the"
                " cluster and name it auto"
            )
        return self


class Selection(Section):
    """Which of the pairs that the filters kept align the policy: all of them, unless a rule is set here.

    Measures and gates are of the pairs before it; held-out queries take no part in it.
    """

    by: Literal["generator", "judge"] = "generator"
    """What scores responses. generator: the implicit reward beta * log(pi_generator(y|x) / pi(y|x)) given the bare query,
    with generator.beta (arXiv 2305.18290). judge: the recipe's; of an LLM, 2 * probability that chosen is better - 1; of
    checks 1, 0 or -1."""
    drop_reversed: bool = False
    """Drop pairs whose order the scores reverse (arXiv 2404.09824); an LLM judge has to in both orders of showing them."""
    min_margin: float | None = None
    """Drop pairs whose chosen response scores less than this above the rejected one (arXiv 2502.14560)."""
    top_share: float | None = Field(default=None, gt=0, le=1)
    """Keep this share of the pairs, those with the largest margins (arXiv 2502.14560)."""
    shorter_within: float | None = Field(default=None, ge=0)
    """Of responses that score within this of each other, choose the shorter one (arXiv 2407.19594)."""
    samples: int = Field(default=1, ge=1)
    """Let the generator answer this often under either principle, and pair the good response that scores best with the bad
    one that is nearest to 2 standard deviations below their mean (arXiv 2502.16825)."""

    @property
    def active(self) -> bool:
        """Whether anything is selected."""
        bounds = (self.min_margin, self.top_share, self.shorter_within)
        return self.drop_reversed or self.samples > 1 or any(bound is not None for bound in bounds)

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.min_margin is not None and self.top_share is not None:
            raise ValueError("min_margin and top_share are two bounds on one margin; set one of them to null")
        if self.samples > 1 and self.by == "judge":
            raise ValueError("samples are ranked one by one, by the generator's implicit reward; set selection.by=generator")
        return self


LossName = Literal[
    "dpo", "ipo", "hinge", "simpo", "orpo", "apo_zero", "robust_dpo", "sppo", "dpo_norm", "dpop", "bdpo", "sft"
]

ObjectiveName = Literal["sso", "equation_3", "l_plus", "l_minus"]

Weighting = Literal["none", "wpo", "wpo_greedy", "wpo_unaligned"]


class Generator(Section):
    """The data generator: the policy trained with L_SSO to make accurate, on-policy pairs."""

    kind: Literal["single", "dual", "none"] = "single"
    """single: one generator; dual: one trained on L+ for the chosen and one on L- for the rejected responses (needs
    training.lora); none: no generator, the pairs come from the policy itself (PBAA, the paper's baseline)."""
    objective: ObjectiveName = "sso"
    """sso (equation 4), equation_3 (the obvious L-), or one half alone."""
    loss: LossName = "dpo"
    """L_base, the preference loss; dpo_norm, dpop and bdpo guard against displacement (`docs/quality.md`); sft: none, the
    SFT term itself stands in its place (a control)."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference model (tau for IPO)."""
    sft_weight: float = Field(default=0.1, ge=0)
    """gamma, the weight of the SFT term on the chosen response."""
    temperature: float | None = Field(default=None, ge=0)
    """Of the responses that become the alignment pairs, by the generator or, with kind: none, by the policy; that of
    responses when empty. Lower than that, it makes any response more probable, generator or not."""
    queries: int | None = Field(default=8000, ge=1)
    """Train on this many queries, drawn with the seed; all when empty."""
    learning_rate: float = Field(default=5e-7, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=32, ge=1)
    """Queries an optimizer step."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the steering pairs."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps."""

    @property
    def uses_original(self) -> bool:
        """Whether anything trains on y_o."""
        return self.kind != "none" and self.objective in ("sso", "l_minus")

    @model_validator(mode="after")
    def _both_halves(self) -> Self:
        if self.kind == "dual" and self.objective in ("l_plus", "l_minus"):
            raise ValueError(
                f"kind: dual trains a generator on each half of L_SSO, but objective {self.objective!r} has one half alone; "
                "set generator.objective to sso or equation_3"
            )
        return self


class Alignment(Section):
    """The alignment of the policy on the pairs that the generator made."""

    loss: LossName = "dpo"
    """L_base, the preference loss; dpo_norm, dpop and bdpo guard against displacement (`docs/quality.md`)."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference model (tau for IPO)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of an SFT term on the chosen response."""
    learning_rate: float = Field(default=5e-7, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=256, ge=1)
    """Queries an optimizer step. A run's own data has a pair of each; of pairs made elsewhere, adjacent ones of the same
    prompt are one query, and their losses are added."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the alignment pairs."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps."""
    weighting: Weighting = "none"
    """wpo: L_base of a pair counts by how probable its responses are under the policy in training, against the expected
    probability of a sampled token (arXiv 2406.11827); wpo_greedy: against the most probable one; wpo_unaligned: as it is."""
    reference: Literal["round", "first"] = "round"
    """Of later rounds: the reference is the policy at the round's start, or the one that the run began with. (That of the
    generator is always the round's start, which its pairs have to stay close to.)"""


Quantization = Literal["nf4"]


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685), folded into the model when training ends."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the update; the adapter is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in the adapter; above 0 the first margins are no longer exactly zero."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter, as peft names them."""
    quantize: Quantization | None = None
    """nf4: hold the frozen weights of the linear layers in 4 bits while adapters are trained (QLoRA, arXiv 2305.14314;
    needs the extra selfsteer[qlora]). The reference is then the quantized policy; what comes out is the adapter on the
    full weights (docs/howto/lora.md)."""


SchedulerName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class Training(Section):
    """Mechanics that both trainings share."""

    lora: Lora | None = None
    """Train adapters instead of the full weights."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Queries a forward pass and device; memory, not mathematics."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Pack queries into a forward pass while they have at most so many tokens, each prompt counted once; a longer one is
    alone. Fills the machine with short queries, whose number `micro_batch_size` would fix. When empty, by that."""
    dtype: DTypeName = "auto"
    """Arithmetic of the forward pass; float32 master weights are kept. auto as in engine.dtype."""
    prefix_sharing: bool = True
    """Compute each prompt once for its completions; switched off by itself where a model does not allow it."""
    save_dtype: Literal["auto", "float32", "policy"] = "auto"
    """What the trained weights are saved in: float32, or the dtype of the policy. auto: that of the policy, unless rounding
    would change the margin of the trained pairs by more than 5 %, as it does with small updates of bfloat16 weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    optimizer: str = "adamw_torch_fused"
    """Optimizer, as transformers names it."""
    scheduler: SchedulerName = "cosine"
    """Learning-rate schedule, as transformers names it; those that need settings of their own are left out."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    save_steps: int = Field(default=50, ge=1)
    """Optimizer steps between checkpoints; a killed training continues from the last complete one."""
    displacement_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps between readings of how far chosen, rejected and unrelated responses have moved (`docs/quality.md`).
    When empty, as often as costs 4 % of the training, of four responses at least; 0: never, and no query is set aside."""
    stop_at_displacement: float | None = Field(default=None, gt=0)
    """End a training when unrelated responses have lost more than so many nats (each, on average), and deliver the model of
    the last reading before. Every reading within the bound is then a checkpoint."""
    report_to: list[str] = Field(default_factory=list[str])
    """Trackers, as transformers names them (tensorboard, wandb, ...); one may stand without a list."""

    @property
    def quantize(self) -> Quantization | None:
        """`lora.quantize`: how the frozen weights are held."""
        return None if self.lora is None else self.lora.quantize

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, given: object) -> object:
        return [given] if isinstance(given, str) and given else given

    @model_validator(mode="after")
    def _bound_is_measured(self) -> Self:
        if self.stop_at_displacement is not None and self.displacement_steps == 0:
            raise ValueError("stop_at_displacement needs readings; set displacement_steps to null, or to 1 or more")
        return self


RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a run folder."""


class Policy(Section):
    """The chat model to align."""

    model: FilePath = Field(min_length=1)
    """A local folder in Hugging Face format, a hub id, a .gguf file, or package:NAME (the GGUF in an installed package)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model."""
    chat_template: FilePath | None = None
    """Path of a Jinja chat template, for tokenizers without one."""
    template_arguments: TemplateArguments = Field(default_factory=dict[str, Any])
    """Arguments of the chat template, such as {enable_thinking: false}. Thoughts are no part of responses: a template that
    has the model think is refused (docs/design.md)."""
    date: str | None = None
    """The day that a chat template is told which asks for it, such as 2025-01-31; the one on which the run began (UTC) when
    empty."""
    system_role: Literal["auto", "system", "user"] = "auto"
    """Where a principle goes: the system message, or before the user's first turn for templates without a system role."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @field_validator("date", mode="before")
    @classmethod
    def _a_day(cls, given: object) -> object:
        """YAML reads an unquoted day as one."""
        if isinstance(given, str):
            try:
                return date.fromisoformat(given).isoformat()
            except ValueError:
                raise ValueError(f"{given!r} is no day; write it as 2025-01-31") from None
        return given.isoformat() if isinstance(given, date) else given


class Share(NamedTuple):
    """`queries.shard` in numbers: of a run's queries, in their order, the `number`-th of every `of`."""

    number: int
    """From 1."""
    of: int

    def places(self, count: int) -> range:
        """Which of `count` queries these are, from 0."""
        return range(self.number - 1, count, self.of)


_SHARD = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")


class Queries(Section):
    """The requests to answer."""

    path: FilePath = Field(min_length=1)
    """A .jsonl, .json, .csv or .parquet file, or hub:NAME for a hub data set."""
    column: str = Field(default="query", min_length=1)
    """The column with the query: a string, or a list of chat messages ending in a user turn."""
    split: str = "train"
    """Split of a hub data set."""
    limit: int | None = Field(default=None, ge=1)
    """Take at most this many queries, the first ones that pass the checks."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longer rendered prompts (query and principle) are dropped before sampling; nothing is ever cut."""
    holdout: int = Field(default=0, ge=0)
    """Keep this many queries, the same whatever the seed, out of both trainings; pairs are made and judged on them."""
    split_rounds: bool = False
    """With several rounds, give each an equal share of the queries instead of all; held-out ones belong to every round."""
    shard: str | None = None
    """Such as 3/8: make the preference pairs of every 8th query alone, beginning with the 3rd, and align no policy. Shard 1
    trains the generator, the others take it over (--borrow); `selfsteer merge` makes one run of all eight
    (docs/scaling.md)."""

    @field_validator("shard")
    @classmethod
    def _one_of_several(cls, shard: str | None) -> str | None:
        found = None if shard is None else _SHARD.fullmatch(shard)
        if shard is not None and (found is None or int(found[1]) > int(found[2])):
            raise ValueError(f"{shard!r} is no shard; write the third of eight as 3/8")
        return shard

    @property
    def share(self) -> Share | None:
        """`shard` in numbers."""
        return None if self.shard is None else Share(*map(int, self.shard.split("/")))


class PrincipleSource(Section):
    """Where the opposing principles come from."""

    source: Literal["library", "generate", "file"] = "library"
    """The built-in library, a language model, or a file."""
    path: FilePath | None = None
    """With source: file, a JSONL file of {"good", "bad", "quality", "checks"} pairs, the last two optional; a row with
    "query" serves that query alone."""
    qualities: list[str] | None = None
    """Only these qualities of the library (or file); all of them when empty."""
    limit: int | None = Field(default=None, ge=1)
    """Only this many pairs of the library (or file), the first ones; 1 is one fixed pair for all queries."""
    model: FilePath | None = None
    """With source: generate, the principle generator; the policy itself when empty."""
    engine: EngineSection | None = None
    """With source: generate, the engine that holds the principle generator; the one of the responses when empty."""
    chat_template: FilePath | None = None
    """Of `model`: path of a Jinja chat template, for tokenizers without one."""
    template_arguments: TemplateArguments = Field(default_factory=dict[str, Any])
    """Of `model`: arguments of the chat template, such as {enable_thinking: false}."""
    wrap: bool = False
    """Set the principle into a sentence that asks to follow it without mentioning it, instead of sending it bare."""
    concision: float = Field(default=0.2, ge=0, le=1)
    """Share of the queries that get the concision pair added, against length bias."""
    temperature: float = Field(default=0.7, ge=0)
    """With source: generate, the sampling temperature."""
    max_new_tokens: int = Field(default=256, ge=1)
    """With source: generate, the limit of a principle pair."""
    retries: int = Field(default=2, ge=0)
    """With source: generate, further tries before a library pair stands in."""

    @model_validator(mode="after")
    def _used_settings(self) -> Self:
        for key in ("chat_template", "template_arguments"):
            if getattr(self, key) and not self.model:
                raise ValueError(f"{key} is of principles.model; the policy's own is policy.{key}")
        if self.source == "file" and not self.path:
            raise ValueError("source: file needs principles.path, a JSONL file of principle pairs")
        if self.source != "file" and self.path:
            raise ValueError(f"path {self.path!r} is read only with source: file; set principles.source=file or path=null")
        if self.source != "generate" and self.model:
            raise ValueError(
                f"model {self.model!r} writes only with source: generate; set principles.source=generate or model=null"
            )
        if self.source != "generate" and self.engine:
            raise ValueError("engine writes only with source: generate; set principles.source=generate or engine=null")
        if self.model and runs_already(self.engine):
            raise ValueError(
                f"model {self.model!r} is not what a server that runs already holds; say it in engine.model alone"
            )
        return self


class Sampled(Section):
    """How answers are drawn."""

    temperature: float = Field(default=0.7, ge=0)
    """0 takes the most probable token."""
    top_p: float = Field(default=0.8, gt=0, le=1)
    """Nucleus: the smallest set of tokens with at least this probability."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Limit of a response."""


class OriginalSampled(Section):
    """How y_o alone is drawn, the answer to the bare query that L- pulls the bad response towards."""

    temperature: float | None = Field(default=None, ge=0)
    """That of the other responses when empty, as the paper has it; 0 takes the most probable token."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """That of the other responses when empty."""


class ResponsesSection(Sampled):
    """How responses are drawn, by the policy and by the data generator."""

    original: OriginalSampled = OriginalSampled()

    @property
    def steered(self) -> Sampled:
        """How y+ and y- are drawn, and answers that are compared."""
        return Sampled(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)

    @property
    def bare(self) -> Sampled:
        """How y_o is drawn."""
        return self.steered.model_copy(update=self.original.model_dump(exclude_none=True))


class Filters(Section):
    """What must not become training data."""

    truncated: Literal["drop", "keep"] = "drop"
    """Responses cut off by max_new_tokens; kept ones are trained without an end token."""
    near_identical: float = Field(default=0.9, gt=0, le=1)
    """Drop pairs whose responses share at least this much of their word 3-grams (Jaccard)."""
    max_length_ratio: float = Field(default=4.0, ge=1)
    """Drop pairs in which one response has more than this many times the tokens of the other."""
    refusals: bool = True
    """Drop pairs whose chosen response is a refusal."""
    leakage: bool = True
    """Drop pairs in which a response speaks of its principle ("as instructed by the guidelines")."""


class Quality(Section):
    """The measures of the data, and what becomes of a round whose data fails them."""

    sample: int | None = Field(default=512, ge=1)
    """Judge the pairs of at most this many queries, drawn with the seed; of all when empty. Margins after training are
    measured on a quarter of the queries trained on (at least 16), at most on this many; not again when this changes."""
    principle_consistency: bool = True
    """Measure whether the policy itself tells the responses apart by their principles: a forward pass a pair."""
    evaluation_files: list[FilePath] = Field(default_factory=list[FilePath])
    """Files (.jsonl, .json, .csv, .parquet) that the queries must not overlap with; the overlap is measured."""
    answers: int = Field(default=0, ge=0)
    """With judge.kind: checks, so many held-out queries are answered before and after the alignment, and before it with
    their good principle: the shares that pass."""
    gain: int = Field(default=0, ge=0)
    """On so many held-out queries, what the generator's training changed: the expected on-policy log-probability of a token,
    exact over the vocabulary, and how much of it is steering and how much sharpening."""
    gates: dict[str, str] = Field(default_factory=dict[str, str])
    """Bounds on the measures of a round's pairs, such as accuracy: ">= 0.6" (`docs/quality.md`)."""
    on_failure: Literal["stop", "warn"] = "stop"
    """After a failed gate: stop before the policy is aligned (the data stays), or warn and go on."""
    stop_when: dict[str, str] = Field(default_factory=dict[str, str])
    """From the second round on, what ends the rounds with the policy of the round before, such as drift_on_policy: "< 0 at
    95%" (its whole interval); any one that holds does. Names and bounds are those of gates."""

    @field_validator("gates", "stop_when", mode="before")
    @classmethod
    def _bounds_have_a_direction(cls, gates: object) -> object:
        for name, bound in cast("dict[object, object]", gates).items() if isinstance(gates, dict) else ():
            if isinstance(bound, int | float):
                way_out = f'expected a bound with its direction, such as ">= {bound}"'
                raise ValueError(f"gate {name}: given {bound}, {way_out}")  # noqa: TRY004 (for pydantic a wrong value)
        return cast(object, gates)

    @field_validator("gates", "stop_when")
    @classmethod
    def _readable_gates(cls, gates: dict[str, str]) -> dict[str, str]:
        if gates:
            parse(gates)
        return gates


class EvaluationSection(Section):
    """Whether the policy is better: benchmarks of the first and of the aligned policy, at the end of a run."""

    tasks: list[str] = Field(default_factory=list[str])
    """ifeval, gsm8k, math500, mmlu, or any other task of lm-evaluation-harness (the extra selfsteer[evaluate]); alpaca_eval,
    mt_bench and arena_hard with a judge. None when empty."""
    data: FilePath | None = None
    """Folder with a folder of files for each task (ifeval, gsm8k, math500, mmlu, alpaca_eval, ...); the hub's when empty."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many items of each task, the first ones; every figure of such a run says so."""
    fewshot: int | None = Field(default=None, ge=0)
    """Examples shown before each item, instead of the task's own number."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Limit of an answer, instead of the task's own."""


class ComparisonSection(Section):
    """What `selfsteer compare` does beyond making and measuring the data of every arm."""

    align: bool = False
    """Align a policy on each arm's data as well, and let the judge, if there is one, compare it with the first policy."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    """Arms of your own, by name: the settings that each changes, by dotted key, such as {gamma_1: {generator.sft_weight:
    1.0}}."""
    given: str | None = None
    """Preference data made elsewhere, for the arm "given"."""
    cooler: float = Field(default=0.5, ge=0)
    """generator.temperature of the arm "cooler", the policy without a generator; it is to be below that of the others."""


class Recipe(Section):
    """A whole run. Defaults are the paper's; `selfsteer show RECIPE` prints every one with its description."""

    output: FilePath = "runs/default"
    """The run folder."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn."""
    rounds: int = Field(default=1, ge=1)
    """Passes of the five steps, each from the policy of the one before."""
    policy: Policy
    queries: Queries
    principles: PrincipleSource = PrincipleSource()
    responses: ResponsesSection = ResponsesSection()
    engine: EngineSection = TransformersSection()
    """What turns prompts into responses: kind transformers (embedded), vllm, openai or ray, each with fields of its own."""
    filters: Filters = Filters()
    generator: Generator = Generator()
    selection: Selection = Selection()
    alignment: Alignment = Alignment()
    training: Training = Training()
    launcher: Launcher = Launcher()
    judge: JudgeSection = JudgeSection()
    quality: Quality = Quality()
    evaluation: EvaluationSection = EvaluationSection()
    compare: ComparisonSection = ComparisonSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.generator.kind == "dual" and self.training.lora is None:
            raise ValueError(
                "generator.kind: dual trains two adapters on one model and needs training.lora; set training.lora.rank=16"
            )
        bounds = {**self.quality.stop_when, **self.quality.gates}
        if mistakes := unmeasured(bounds, self._not_measured()):
            raise ValueError("; ".join(mistakes))
        return self

    @model_validator(mode="after")
    def _shards_have_one_generator(self) -> Self:
        if self.queries.shard is None:
            return self
        if self.rounds > 1:
            raise ValueError(
                "queries.shard: a second round begins from the policy that all shards together align; set rounds=1, and"
                " begin the next round as a run of its own from the merged run's policy"
            )
        if self.generator.kind == "none":
            raise ValueError("queries.shard: what is split is the work of the generator; set generator.kind, or shard=null")
        return self

    @model_validator(mode="after")
    def _answers_can_be_checked(self) -> Self:
        if self.quality.answers == 0:
            return self
        if self.judge.kind != "checks":
            raise ValueError("quality.answers: answers are checked with judge.kind: checks only; set it, or answers=0")
        if self.queries.holdout == 0:
            raise ValueError("quality.answers: no query is kept out of the training; set queries.holdout, or answers=0")
        if runs_already(self.engine):
            raise ValueError(
                "quality.answers: a server that runs already can't hold the aligned policy. Set engine.serve to the command"
                " that serves a model's folder, or use kind vllm; or set quality.answers=0"
            )
        return self

    @model_validator(mode="after")
    def _gain_has_queries(self) -> Self:
        if self.quality.gain and self.queries.holdout == 0:
            raise ValueError("quality.gain: no query is kept out of the training; set queries.holdout, or gain=0")
        return self

    @model_validator(mode="after")
    def _selection_has_scores(self) -> Self:
        section = self.selection
        if section.active and section.by == "judge" and self.judge.kind == "none":
            raise ValueError("selection.by: judge needs a judge; set judge.kind and judge.model")
        if section.active and section.by == "generator" and self.generator.kind == "none":
            raise ValueError("selection.by: generator needs a generator; set generator.kind, or selection.by=judge")
        if section.samples > 1 and self.of_pairs.temperature == 0:
            key = "responses" if self.generator.temperature is None else "generator"
            raise ValueError(f"selection.samples: at {key}.temperature 0 all samples are the same one")
        return self

    @property
    def of_pairs(self) -> Sampled:
        """How the responses that become the alignment pairs are drawn."""
        own = self.generator.temperature
        return self.responses.steered if own is None else self.responses.steered.model_copy(update={"temperature": own})

    @property
    def measures_gain(self) -> bool:
        """Whether there is something to measure: what answers x+ and x- is not the policy as it was."""
        return self.quality.gain > 0 and (self.generator.kind != "none" or self.of_pairs != self.responses.steered)

    def _not_measured(self) -> dict[str, str]:
        """Measures that this recipe does not take, by the beginning of their path, with the way to have them."""
        judge, generates = self.judge.kind, self.generator.kind != "none"
        measures = (
            ("pairs.judge", judge != "none", "a judge; set judge.kind and judge.model (or judge.engine)"),
            ("pairs.checks", judge == "checks", "checks; set judge.kind=checks"),
            ("pairs.judge.flips", judge in ("llm", "none"), "an LLM judge; set judge.kind=llm"),
            (
                "pairs.principle_consistency",
                self.quality.principle_consistency,
                "quality.principle_consistency; set it to true",
            ),
            ("contamination", self.quality.evaluation_files, "files to compare with; set quality.evaluation_files"),
            (
                "headroom",
                self.generator.uses_original,
                "a generator that trains on y_o; set generator.kind=single and generator.objective=sso",
            ),
            ("comparison", generates, "a generator; set generator.kind"),
            (
                "generator.displacement",
                generates and self.training.displacement_steps != 0,
                "a generator and readings; set generator.kind, training.displacement_steps=null",
            ),
            ("gain", self.measures_gain, "a generator and held-out queries; set quality.gain=40, generator.kind"),
            ("bad_generator", self.generator.kind == "dual", "two generators; set generator.kind=dual"),
            (
                "bad_generator.displacement",
                self.training.displacement_steps != 0,
                "readings; set training.displacement_steps=null",
            ),
        )
        return {path: way for path, taken, way in measures if not taken}

    @model_validator(mode="after")
    def _engine_can_hold_what_is_trained(self) -> Self:
        if not runs_already(self.engine):
            return self
        if self.generator.kind != "none" or self.rounds > 1:
            raise ValueError(
                "engine: a server that runs already can't hold the weights that this run trains. Set engine.serve to the"
                " command that serves a model's folder, or use kind vllm; or keep this server for the principles"
                " (principles.engine)"
            )
        if self.principles.source == "generate" and self.principles.model and self.principles.engine is None:
            raise ValueError(
                "principles.model: the server of engine holds another model; give principles an engine of its own"
            )
        return self

    @field_validator("output")
    @classmethod
    def _run_name(cls, output: str) -> str:
        if not RUN_NAME.fullmatch(Path(output).name):
            raise ValueError(
                f"given {output!r}, expected a folder whose own name has 1 to 64 letters, digits, dots, hyphens or"
                " underscores and starts with a letter or digit"
            )
        return output

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with the mistakes put into words (`RecipeError`)."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise RecipeError(text.explain(error, cls, lambda _key: "recipe")) from None


def load(path: str | Path, overrides: Sequence[str] = (), *, given_by: str = text.OVERRIDE) -> Recipe:
    """Read a recipe, with `dotted.key=value` overrides applied before anything is checked.

    path: a file, or the bare name of a recipe that comes with the package (`shipped.names`).
    Values of overrides are YAML. Raises FileNotFoundError and `RecipeError`, which has one line a mistake: file and line or
    `given_by` for an override, dotted key, what was given and what was expected.
    """
    path = shipped.recipe_file(path)
    data, lines = text.read_yaml(path)
    given = [text.parse_override(override, given_by) for override in overrides]
    for override in given:
        data = text.apply_override(data, override)
    overridden = {override.key for override in given}

    def origin(key: str) -> str:
        while key:
            new_section = key not in lines and any(other.startswith(f"{key}.") for other in overridden)
            if key in overridden or new_section:
                return given_by
            if key in lines:
                return f"{path}:{lines[key]}"
            key = key.rpartition(".")[0]
        return str(path)

    try:
        return TypeAdapter(Recipe).validate_python(data)
    except ValidationError as error:
        raise RecipeError(text.explain(error, Recipe, origin)) from None


def describe(recipe: Recipe) -> str:
    """The resolved recipe as commented YAML that loads back as the same recipe; values off their default are marked."""
    return text.describe(recipe)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as plain YAML, every value written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def published(recipe: Recipe) -> str:
    """The same for strangers: of a path on this machine its last part, since the rest says only where it lies here."""
    return yaml.safe_dump(_without_folders(recipe.model_dump(mode="json")), sort_keys=False)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in cast("list[Any]", value)]
    here = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "..")))
    return Path(value).name if here else value
