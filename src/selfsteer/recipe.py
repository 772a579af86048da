"""The configuration of a run: one frozen section a stage, every field described, unknown keys refused.

The defaults are the paper's (arXiv 2410.17131v2, section 4.1 and appendix A) wherever it gives a number.
`load` reads a recipe from YAML, `describe` writes it with everything explained. How YAML is read and how errors are put
into words is in `recipe_text.py`; environment references and includes were left out on purpose: a recipe says all it does.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from selfsteer import recipe_text
from selfsteer.recipe_engines import EngineSection, TransformersSection, runs_already
from selfsteer.recipe_judge import JudgeSection
from selfsteer.recipe_launcher import Launcher
from selfsteer.recipe_selection import Selection
from selfsteer.recipe_text import RecipeError, Section
from selfsteer.recipe_training import Alignment, Generator, Training

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Policy(Section):
    """The chat model to align."""

    model: str = Field(min_length=1)
    """A local folder in Hugging Face format, a hub id, a .gguf file, or package:NAME (the GGUF in an installed package)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model."""
    chat_template: str | None = None
    """Path of a Jinja chat template, for tokenizers without one."""
    system_role: Literal["auto", "system", "user"] = "auto"
    """Where a principle goes: the system message, or before the user's first turn for templates without a system role."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class Queries(Section):
    """The requests to answer."""

    path: str = Field(min_length=1)
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


class PrincipleSource(Section):
    """Where the opposing principles come from."""

    source: Literal["library", "generate", "file"] = "library"
    """The built-in library, a language model, or a file."""
    path: str | None = None
    """With source: file, a JSONL file of {"good", "bad", "quality"} pairs; a row with "query" serves that query alone."""
    qualities: list[str] | None = None
    """Only these qualities of the library (or file); all of them when empty."""
    limit: int | None = Field(default=None, ge=1)
    """Only this many pairs of the library (or file), the first ones; 1 is one fixed pair for all queries."""
    model: str | None = None
    """With source: generate, the principle generator; the policy itself when empty."""
    engine: EngineSection | None = None
    """With source: generate, the engine that holds the principle generator; the one of the responses when empty."""
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
    """How responses are drawn, by the policy and by the data generator."""

    temperature: float = Field(default=0.7, ge=0)
    """0 takes the most probable token."""
    top_p: float = Field(default=0.8, gt=0, le=1)
    """Nucleus: the smallest set of tokens with at least this probability."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Limit of a response."""


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
    """Judge, and measure margins after training, on the pairs of at most this many queries, drawn with the seed; of all when
    empty. Margins of a training that is done are not taken again when this changes."""
    principle_consistency: bool = True
    """Measure whether the policy itself tells the responses apart by their principles: a forward pass a pair."""
    evaluation_files: list[str] = Field(default_factory=list[str])
    """Files (.jsonl, .json, .csv, .parquet) that the queries must not overlap with; the overlap is measured."""
    gates: dict[str, str] = Field(default_factory=dict[str, str])
    """Bounds on the measures of a round's pairs, such as accuracy: ">= 0.6"; `docs/quality.md` lists them."""
    on_failure: Literal["stop", "warn"] = "stop"
    """After a failed gate: stop before the policy is aligned (the data stays), or warn and go on."""
    stop_when: dict[str, str] = Field(default_factory=dict[str, str])
    """From the second round on, what ends the rounds with the policy of the round before, such as drift_on_policy: "< 0 at
    95%" (its whole interval); any one that holds does. Names and bounds are those of gates."""

    @field_validator("gates", "stop_when")
    @classmethod
    def _readable_gates(cls, gates: dict[str, str]) -> dict[str, str]:
        if gates:
            from selfsteer.gates import parse  # brings numpy, which the other commands do without

            parse(gates)
        return gates


class ComparisonSection(Section):
    """What `selfsteer compare` does beyond making and measuring the data of every arm."""

    align: bool = False
    """Align a policy on each arm's data as well, and let the judge, if there is one, compare it with the first policy."""
    given: str | None = None
    """Preference data made elsewhere, for the arm "given"."""


class Recipe(Section):
    """A whole run. Defaults are the paper's; `selfsteer show RECIPE` prints every one with its description."""

    output: str = "runs/default"
    """The run folder."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn."""
    rounds: int = Field(default=1, ge=1)
    """Passes of the five steps, each from the policy of the one before."""
    policy: Policy
    queries: Queries
    principles: PrincipleSource = PrincipleSource()
    responses: Sampled = Sampled()
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
    compare: ComparisonSection = ComparisonSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.generator.kind == "dual" and self.training.lora is None:
            raise ValueError(
                "generator.kind: dual trains two adapters on one model and needs training.lora; set training.lora.rank=16"
            )
        if bounds := {**self.quality.stop_when, **self.quality.gates}:
            from selfsteer.gates import unmeasured  # brings numpy

            if mistakes := unmeasured(bounds, self._not_measured()):
                raise ValueError("; ".join(mistakes))
        return self

    @model_validator(mode="after")
    def _selection_has_scores(self) -> Self:
        section = self.selection
        if section.active and section.by == "judge" and self.judge.kind == "none":
            raise ValueError("selection.by: judge needs a judge; set judge.kind and judge.model")
        if section.active and section.by == "generator" and self.generator.kind == "none":
            raise ValueError("selection.by: generator needs a generator; set generator.kind, or selection.by=judge")
        if section.samples > 1 and self.responses.temperature == 0:
            raise ValueError("selection.samples: at responses.temperature 0 all samples are the same one")
        return self

    def _not_measured(self) -> dict[str, str]:
        """Measures that this recipe does not take, by the beginning of their path, with the way to have them."""
        missing = {
            "pairs.judge": "" if self.judge.kind != "none" else "a judge; set judge.kind and judge.model (or judge.engine)",
            "pairs.principle_consistency": ""
            if self.quality.principle_consistency
            else "quality.principle_consistency; set it to true",
            "contamination": "" if self.quality.evaluation_files else "files to compare with; set quality.evaluation_files",
            "comparison": "" if self.generator.kind != "none" else "a generator; set generator.kind",
        }
        return {path: way for path, way in missing.items() if way}

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
        if not _RUN_NAME.fullmatch(Path(output).name):
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
            raise RecipeError(recipe_text.explain(error, cls, lambda _key: "recipe")) from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, with `dotted.key=value` overrides applied before anything is checked.

    Values of overrides are YAML. Raises FileNotFoundError and `RecipeError`, which has one line a mistake: file and line or
    "command line", dotted key, what was given and what was expected.
    """
    path = Path(path)
    data, lines = recipe_text.read_yaml(path)
    given = [recipe_text.parse_override(text) for text in overrides]
    for override in given:
        data = recipe_text.apply_override(data, override)
    overridden = {override.key for override in given}

    def origin(key: str) -> str:
        while key:
            new_section = key not in lines and any(other.startswith(f"{key}.") for other in overridden)
            if key in overridden or new_section:
                return recipe_text.COMMAND_LINE
            if key in lines:
                return f"{path}:{lines[key]}"
            key = key.rpartition(".")[0]
        return str(path)

    try:
        return TypeAdapter(Recipe).validate_python(data)
    except ValidationError as error:
        raise RecipeError(recipe_text.explain(error, Recipe, origin)) from None


def describe(recipe: Recipe) -> str:
    """The resolved recipe as commented YAML that loads back as the same recipe; values off their default are marked."""
    return recipe_text.describe(recipe)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as plain YAML, every value written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
