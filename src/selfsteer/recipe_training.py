"""The recipe's sections on the two trainings: the data generator's, the policy's, and the mechanics that both share."""

from typing import Literal, Self

from pydantic import Field, model_validator

from selfsteer.recipe_engines import DTypeName
from selfsteer.recipe_text import Section

LossName = Literal["dpo", "ipo", "hinge", "simpo", "orpo", "apo_zero", "robust_dpo", "sppo"]
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
    """L_base, the preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference model (tau for IPO)."""
    sft_weight: float = Field(default=0.1, ge=0)
    """gamma, the weight of the SFT term on the chosen response."""
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
    """L_base, the preference loss."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference model (tau for IPO)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of an SFT term on the chosen response."""
    learning_rate: float = Field(default=5e-7, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=256, ge=1)
    """Pairs an optimizer step."""
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


class Training(Section):
    """Mechanics that both trainings share."""

    lora: Lora | None = None
    """Train adapters instead of the full weights."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Queries (generator) or pairs (alignment) a forward pass and device; memory, not mathematics."""
    dtype: DTypeName = "auto"
    """Arithmetic of the forward pass; float32 master weights are kept. auto as in engine.dtype."""
    prefix_sharing: bool = True
    """Compute each prompt once for its completions; switched off by itself where a model does not allow it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    optimizer: str = "adamw_torch_fused"
    """Optimizer, as transformers names it."""
    scheduler: str = "cosine"
    """Learning-rate schedule, as transformers names it."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    save_steps: int = Field(default=50, ge=1)
    """Optimizer steps between checkpoints; a killed training continues from the last complete one."""
    report_to: list[str] = Field(default_factory=list[str])
    """Trackers, as transformers names them (tensorboard, wandb, ...)."""
