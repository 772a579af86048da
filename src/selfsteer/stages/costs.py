"""What a round will take, stage by stage: samples, tokens, memory, disk, time. Pure arithmetic over counts and rates.

Everything is of one round; a run of several takes it as many times (`run_disk` alone adds up what stays). Of a shard's run
its share is counted, and what it takes over is no work. Memory is what the libraries, the weights, the optimizer, the cache,
the activations and the output layer hold at most, with what the allocator keeps beside it: for responses as long as they are
expected, and for as long as they may be. Left out on purpose: files that are mapped, whose memory the system takes back; how
counts and rates are found (`plan.py`), what this machine has (`essentials.py`), and judges, benchmarks and stage 4-gain.
"""

import math
from collections.abc import Iterable, Sequence, Sized
from typing import NamedTuple, Self, TypedDict

from selfsteer.recipe.sections import Alignment, Generator, Recipe, Share, Training
from selfsteer.stages.status import (
    GAIN,
    GENERATORS,
    PASSES,
    POLICY,
    PREFERENCES,
    PRINCIPLES,
    QUALITY,
    RESPONSES,
    SELECTION,
    STEERING,
    TRAININGS,
    method_of,
    stage_names,
)
from selfsteer.stages.steering import HEADROOM_QUERIES
from selfsteer.training.checkpoints import KEPT
from selfsteer.training.displacement import LARGEST, schedule
from selfsteer.training.trainer import margin_queries, reward_queries

_ADAM = 8
"""Bytes of AdamW's two moments, for each trained weight in float32."""

_FOUR_BITS = 4.127 / 8
"""Bytes of a weight in 4 bits and of its share in the quantized scale of its block (arXiv 2305.14314, section 3)."""

_ACTIVATIONS = 34
"""Bytes a token, layer and unit of width that half precision keeps for the backward pass (arXiv 2205.05198, section 4.1,
without the attention scores, which are never stored)."""

_KEPT_FREE = 0.35
"""Of what a stage holds beside the libraries, so much more was freed and stays with the allocator: 8 to 50 % were measured,
more after more steps (docs/log.md)."""

_CHUNK = 8 * 2**22
"""Bytes of a chunk of logits (`training.logps.CHUNK_ELEMENTS`) in float32, in half precision, and of its gradient."""

_MARGIN_PASSES = 4
"""How often margins are taken before a training and when its model is saved, at most (`training/export.py`)."""


class Size(NamedTuple):
    """Of a model."""

    parameters: int
    trained: int
    """Parameters that a training changes: all, or those of the adapter."""
    layers: int
    width: int
    cached: int
    """Numbers that the cache of a token takes, over all layers."""
    output: int = 0
    """Weights of the output layer."""
    linear: int = 0
    """Of the parameters, those that take less room where nothing trains them (`models.quantizable`)."""


class Lengths(NamedTuple):
    """In tokens."""

    mean: float
    most: int

    @classmethod
    def of(cls, texts: Iterable[Sized]) -> Self:
        """Of some texts as token ids."""
        lengths = list(map(len, texts))
        return cls(sum(lengths) / len(lengths), max(lengths))


class Counts(NamedTuple):
    """What a round is given."""

    queries: int
    bare: Lengths
    """Prompts of the bare query."""
    steered: Lengths
    """Prompts of the query under a principle."""
    response: float
    """Tokens of a response, on average."""

    def longest(self, limit: float) -> float:
        """Tokens of the longest of two responses a query, as expected where lengths are exponential; `limit` at most."""
        return min(limit, self.response * (math.log(2 * max(1, self.queries)) + _EULER))


_EULER = 0.5772
"""The expected maximum of n exponential lengths of mean 1 is about log n + this."""


class Rates(NamedTuple):
    """Tokens a second, each None where it is not known, and the seconds that loading the model takes."""

    sampled: float | None = None
    scored: float | None = None
    """Prompt and completions, forward alone."""
    trained: float | None = None
    loading: float = 0.0
    kept: float | None = None
    """Bytes a token that a forward pass keeps for the backward pass; None where it was not measured."""
    libraries: int = 0
    """Bytes of memory that the process holds without a model; 0 on a GPU, of which the memory is another."""


class StageCost(TypedDict):
    """What one stage takes."""

    stage: str
    samples: int
    """Responses that are sampled."""
    sampled: int
    """Tokens of them."""
    scored: int
    """Tokens, prompts included, that pass forward through the model."""
    trained: int
    """The same of the trainings, every epoch."""
    memory: int
    """Bytes at the peak, with responses as long as expected; 0 where no model is held by this process."""
    memory_most: int
    """The same with every response as long as it may be."""
    disk: int
    """Bytes that stay."""
    passing_disk: int
    """Bytes beside these at the peak: checkpoints."""
    seconds: float | None
    """None where a rate is not known."""


def stage_costs(recipe: Recipe, counts: Counts, size: Size, rates: Rates, *, half: bool) -> list[StageCost]:
    """The stages of a round, in order. half: whether matrix products run in half precision."""
    found: list[StageCost] = []
    model = _Model(size, rates, half)
    longest = counts._replace(response=float(recipe.responses.max_new_tokens))
    for name in stage_names(recipe, method_of(recipe)):
        work = _share_of_work(recipe, counts, name)
        tokens = stage_tokens(recipe, counts, name)
        trains = name in TRAININGS
        found.append(
            StageCost(
                stage=name,
                samples=work.samples,
                sampled=round(tokens.sampled),
                scored=round(tokens.scored),
                trained=round(tokens.trained),
                memory=_memory(recipe, name, work, counts, model),
                memory_most=_memory(recipe, name, work, longest, model),
                disk=model_disk(recipe, size) if trains else _BYTES_A_SAMPLE * work.samples,
                passing_disk=checkpoints_disk(size) if tokens.trained else 0,
                seconds=None if name in UNTIMED else _seconds(tokens, rates),
            )
        )
    return found


UNTIMED = (GAIN, QUALITY)
"""Stages whose work is left out."""


class Tokens(NamedTuple):
    """What a stage computes, in tokens as `StageCost` counts them."""

    sampled: float
    scored: float
    trained: float


def stage_tokens(recipe: Recipe, counts: Counts, name: str) -> Tokens:
    """Of one stage; none of what a shard takes over."""
    work = _share_of_work(recipe, counts, name)
    if name not in TRAININGS or not work.queries:
        return Tokens(work.samples * counts.response, work.scored, 0.0)
    section = recipe.alignment if name == POLICY else recipe.generator
    trained = _trained(section, work)
    return Tokens(0.0, _passes(recipe, counts, work, trained, section), trained)


_BYTES_A_SAMPLE = 2000
"""Of a response in the journal and the sealed table; a few thousand at most."""


class _Work(NamedTuple):
    samples: int = 0
    queries: int = 0
    """That are trained on."""
    each: float = 0.0
    """Tokens of one query's pairs, prompts shared."""
    scored: float = 0.0


def training_queries(recipe: Recipe, queries: int) -> int:
    """How many queries of a round train its generator."""
    rest = queries - spared_queries(recipe, queries)
    return max(0, rest if recipe.generator.queries is None else min(rest, recipe.generator.queries))


def spared_queries(recipe: Recipe, queries: int) -> int:
    """How many no training sees: those held out, or those set aside for the displacement (`drawing.set_aside`)."""
    if recipe.queries.holdout:
        return recipe.queries.holdout
    return 0 if recipe.training.displacement_steps == 0 else min(LARGEST, queries // 32)


class _Model(NamedTuple):
    size: Size
    rates: Rates
    half: bool


def _memory(recipe: Recipe, name: str, work: _Work, counts: Counts, model: _Model) -> int:
    """Bytes that this process holds in a stage; 0 without a model."""
    size, rates, half = model
    if work.queries:
        held = training_memory(recipe, longest_query(recipe, counts, name), size, rates.kept, half=half)
        if recipe.training.lora is not None:  # delivered on the full weights, on a CPU beside a copy that is rounded
            held = max(held, (2 if rates.libraries else 1) * loaded_weights(size) + output_memory(size, half=half))
    elif work.samples and recipe.engine.kind == "transformers":
        held = sampling_memory(recipe, counts, size, half=half)
    elif work.scored:
        held = loaded_weights(size) + output_memory(size, half=half)
    else:
        return 0
    return rates.libraries + round((1 + _KEPT_FREE) * held)


def _share_of_work(recipe: Recipe, counts: Counts, name: str) -> _Work:
    """What a stage does here: a shard beyond the first takes all but its pairs over."""
    share = recipe.queries.share
    return _Work() if share is not None and share.number > 1 and name != PREFERENCES else _work(recipe, counts, name)


def _work(recipe: Recipe, counts: Counts, name: str) -> _Work:
    """What a stage does, the filters left out: they drop what they drop."""
    n, spared, learned = counts.queries, spared_queries(recipe, counts.queries), training_queries(recipe, counts.queries)
    answer, bare, steered = counts.response, counts.bare.mean, counts.steered.mean
    pair = bare + 2 * answer
    lesson = (steered + 2 * answer) * (2 if _both_prompts(recipe) else 1)
    asides = 0 if recipe.training.displacement_steps == 0 else min(LARGEST, spared)
    if name == PRINCIPLES:
        return _Work(samples=n if recipe.principles.source == "generate" else 0)
    if name == RESPONSES:
        if recipe.generator.kind == "none":
            return _Work(samples=2 * n + asides)
        return _Work(samples=learned * (3 if recipe.generator.uses_original else 2) + 2 * recipe.queries.holdout + asides)
    if name == STEERING:
        both_pairs = 2 * (steered + 2 * answer) if recipe.generator.objective in ("sso", "equation_3") else lesson
        originals = min(learned, HEADROOM_QUERIES) * answer if recipe.generator.uses_original else 0
        return _Work(scored=learned * (both_pairs + pair) + originals + recipe.queries.holdout * pair)
    if name in GENERATORS:
        return _Work(queries=learned, each=lesson)
    if name == PREFERENCES:
        own = recipe.generator.kind == "none"
        share = recipe.queries.share or Share(1, 1)
        n = len(share.places(n))
        more = (recipe.selection.samples - 1) * max(0, n - recipe.queries.holdout // share.of)
        return _Work(samples=0 if own else 2 * (n + more), scored=(n + more) * pair)
    if name == SELECTION:
        pairs = max(0, n - recipe.queries.holdout) * recipe.selection.samples
        return _Work(scored=pairs * pair if recipe.selection.by == "generator" else 0)
    if name == POLICY:
        return _Work(queries=max(0, n - spared), each=pair)
    if name == PASSES:
        answered = recipe.quality.answers
        return _Work(samples=3 * answered, scored=answered * (steered + 3 * answer))
    return _Work()


def _both_prompts(recipe: Recipe) -> bool:
    """Whether the pairs of a query train the generator under x+ and under x- together."""
    return recipe.generator.objective in ("sso", "equation_3") and recipe.generator.kind != "dual"


def longest_query(recipe: Recipe, counts: Counts, name: str) -> float:
    """Tokens of the longest query in the training of this stage, prompts shared: one response is the longest of all."""
    longest, other = counts.longest(recipe.responses.max_new_tokens), counts.response
    if name == POLICY:
        return counts.bare.most + longest + other
    prompts = 2 if _both_prompts(recipe) else 1
    return prompts * (counts.steered.most + 2 * other) + longest - other


def _trained(section: Generator | Alignment, work: _Work) -> float:
    queries = work.queries * section.epochs if section.max_steps is None else section.max_steps * section.batch_size
    return queries * work.each


def _passes(recipe: Recipe, counts: Counts, work: _Work, trained: float, section: Generator | Alignment) -> float:
    """Tokens that a training passes forward beside its steps: displacement, margins when saving, margins of its pairs."""
    after = reward_queries(work.queries, recipe.quality.sample) * work.each
    saving = _MARGIN_PASSES * min(work.queries, margin_queries(work.queries)) * work.each
    if recipe.training.quantize is not None:  # the reference is scored anew
        saving += work.queries * work.each
    if recipe.training.displacement_steps == 0 or not work.each:
        return after + saving
    unrelated = counts.bare.mean + counts.response
    steps = max(1, math.ceil(trained / work.each / section.batch_size))
    size, every = schedule(work.each + unrelated, trained, steps=steps, every=recipe.training.displacement_steps)
    return after + saving + (2 + steps // every) * size * (work.each + unrelated)


def _seconds(tokens: Tokens, rates: Rates) -> float | None:
    needed = [(each, rate) for each, rate in zip(tokens, (rates.sampled, rates.scored, rates.trained), strict=True) if each]
    if any(rate is None for _, rate in needed):
        return None
    return sum(each / rate for each, rate in needed if rate) + len(needed) * rates.loading


def sampling_memory(recipe: Recipe, counts: Counts, size: Size, *, half: bool) -> int:
    """Bytes of the embedded engine: the weights and the cache of all that is sampled side by side."""
    engine = recipe.engine
    assert engine.kind == "transformers"
    tokens = counts.steered.most + counts.longest(recipe.responses.max_new_tokens)
    return round((2 if half else 4) * (size.parameters + engine.batch_size * tokens * size.cached))


def output_memory(size: Size, *, half: bool) -> int:
    """Bytes of the output layer's copy in half precision, and of a chunk of logits."""
    return (2 if half else 0) * size.output + _CHUNK


def loaded_weights(size: Size) -> int:
    """Bytes of a model as it is loaded, in float32, in which it is also delivered; the most that scoring holds."""
    return 4 * size.parameters


def training_state(training: Training, size: Size, *, half: bool) -> int:
    """Bytes of the weights as they are trained on, gradients and AdamW: what no setting but LoRA lowers.

    Linear layers that LoRA freezes are held in the products' dtype or in 4 bits, other weights in float32.
    """
    if training.lora is None:
        weights = (4 + (2 if half else 0)) * size.parameters
    else:
        each = _FOUR_BITS if training.quantize is not None else 2 if half else 4
        weights = 4 * (size.parameters - size.linear) + round(each * size.linear)
    return weights + (4 + _ADAM) * size.trained


def training_memory(recipe: Recipe, tokens: float, size: Size, kept: float | None, *, half: bool) -> int:
    """Bytes of a training in one process. tokens: of a query; kept: as in `Rates`."""
    each = size.layers * size.width * (1 if half else 2)
    activations = _ACTIVATIONS * each if kept is None else kept
    if recipe.training.gradient_checkpointing:
        activations = 2 * each
    budget = recipe.training.tokens_per_batch
    together = recipe.training.micro_batch_size * tokens if budget is None else max(budget, tokens)
    gradient = 0 if recipe.training.lora else 4 * size.output  # of the output layer's use; summed with its use as embedding
    state = training_state(recipe.training, size, half=half) + gradient
    return state + round(together * activations) + output_memory(size, half=half)


def model_disk(recipe: Recipe, size: Size) -> int:
    """Bytes of a trained model as it is delivered, in float32 at most, and of its adapter."""
    return 4 * size.parameters + (0 if recipe.training.lora is None else 4 * size.trained)


def checkpoints_disk(size: Size) -> int:
    """Bytes of a training's checkpoints at the peak: those that are kept, and the one that is being written."""
    return (KEPT + 1) * (4 + _ADAM) * size.trained


def run_disk(costs: Sequence[StageCost], rounds: int) -> int:
    """Bytes that a whole run needs at its peak."""
    return rounds * sum(cost["disk"] for cost in costs) + max((cost["passing_disk"] for cost in costs), default=0)
