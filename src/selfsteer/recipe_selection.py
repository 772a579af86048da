"""The recipe's section on which pairs align the policy."""

from typing import Literal, Self

from pydantic import Field, model_validator

from selfsteer.recipe_text import Section


class Selection(Section):
    """Which of the pairs that the filters kept align the policy: all of them, unless a rule is set here.

    Measures and gates are of the pairs before it; held-out queries take no part in it.
    """

    by: Literal["generator", "judge"] = "generator"
    """What scores responses. generator: the implicit reward beta * log(pi_generator(y|x) / pi(y|x)) given the bare query,
    with generator.beta (arXiv 2305.18290). judge: the recipe's; of an LLM, 2 * probability that chosen is better - 1."""
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
