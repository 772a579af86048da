"""The displacement meter: what a training does to responses on its way, those among them that it is not about.

Preference losses win their gap downwards as well, and what goes down takes along responses that nobody spoke of (likelihood
displacement). So of a few training pairs, and of a few unrelated responses (the policy's own to queries that train nothing),
the log-probability is taken before the first step and at chosen ones, through the packed forward of the training itself.

The readings go into the history, step by step. Left out on purpose: intervals, and what to say about it (the stages).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from selfsteer.recipe.sections import Training
from selfsteer.training import parallel
from selfsteer.training.logps import Packing, casting_once, to_device
from selfsteer.training.packing import Batch, Row, Rows, row_tokens, together

LARGEST = 16
"""Queries whose pairs, and unrelated responses, that are measured; fewer in short trainings."""

FEWEST = 4
"""Responses of each kind in a reading at least, also in trainings of a few steps, where they cost more than the budget."""

BUDGET = 0.04
"""Of the tokens that a training computes, those that the readings may cost where the recipe does not say how often."""


Moved = dict[str, list[tuple[float, int]]]
"""Of "chosen", "rejected" and "unrelated" responses each: log pi(y | x) now - at the training's start, and its tokens."""


class Schedule(NamedTuple):
    """How much is measured, and how often."""

    size: int
    """Queries whose pairs, and unrelated responses, at most."""
    every: int
    """Optimizer steps; the last step is measured in any case."""


def schedule(reading: float, training: float, *, steps: int, every: int | None) -> Schedule:
    """As the recipe says (every); else as much and as often as BUDGET allows.

    reading: tokens of one query's pairs and of one unrelated response; training: of all queries that are trained, in `steps`
    optimizer steps. A forward pass is a third of what a training step costs. At least three readings are taken: before, at
    the last step, and of what is delivered; never of fewer than FEWEST, since one response says nothing.
    """
    if every is not None:
        return Schedule(LARGEST, every)
    for size in range(LARGEST, FEWEST - 1, -1):
        readings = int(BUDGET * 3 * training / (size * reading)) - 2
        if readings >= 1:
            return Schedule(size, max(1, math.ceil(steps / readings)))
    return Schedule(FEWEST, steps)


class Meter:
    """Reads the same responses again and again."""

    def __init__(
        self, pairs: Sequence[Rows], unrelated: Sequence[Row], packing: Packing, training: Training, *, every: int
    ) -> None:
        """pairs: of some queries; training: how much shares a forward pass; every: optimizer steps between two readings."""
        self.every = every
        self._batches: list[Batch] = []
        self._starts: list[int] = []
        self._chosen: list[int] = []
        self._rejected: list[int] = []
        self._tokens: list[int] = []
        for each in pairs:
            self._chosen += (len(self._tokens) + index for index in each.chosen)
            self._rejected += (len(self._tokens) + index for index in each.rejected)
            self._tokens += (len(completion) for row in each.rows for completion in row.completions)
        self._unrelated = range(len(self._tokens), len(self._tokens) + len(unrelated))
        self._tokens += (len(row.completions[0]) for row in unrelated)
        units = [*(each.rows for each in pairs), *((row,) for row in unrelated)]
        start = 0
        for batch in together(units, row_tokens, count=training.micro_batch_size, budget=training.tokens_per_batch):
            rows = [row for unit in batch for row in unit]
            self._batches.append(packing(rows))
            self._starts.append(start)
            start += sum(len(row.completions) for row in rows)
        self._before: list[float] = []

    def begin(self, model: torch.nn.Module) -> None:
        """Take the log-probabilities that all others are held against."""
        self._before = self._logps(model)

    def moved(self, model: torch.nn.Module) -> Moved:
        """Since `begin`; in every process of a group alike, which share the work."""
        nats = [now - before for now, before in zip(self._logps(model), self._before, strict=True)]
        moved = list(zip(nats, self._tokens, strict=True))
        places = {"chosen": self._chosen, "rejected": self._rejected, "unrelated": self._unrelated}
        return {name: [moved[index] for index in indices] for name, indices in places.items()}

    def _logps(self, model: torch.nn.Module) -> list[float]:
        """Of every response, without dropout."""
        rank, count = parallel.place()
        device = next(model.parameters()).device
        logps = torch.zeros(len(self._tokens), dtype=torch.float64)
        training = model.training
        model.eval()
        with torch.no_grad(), casting_once(device):
            for turn in range(-(-len(self._batches) // count)):
                mine = turn * count + rank
                # Every process as often as the others: weights that are sharded are gathered by all of them.
                batch = to_device(self._batches[min(mine, len(self._batches) - 1)], device)
                found: Tensor = model(**cast("dict[str, Any]", batch))
                if mine < len(self._batches):
                    # Of weighted pairs the first row; see `logps.teach`.
                    values = (found if found.dim() == 1 else found[0]).double().cpu()
                    logps[self._starts[mine] : self._starts[mine] + len(values)] = values
        model.train(training)
        return parallel.summed(logps).tolist()


def averages(moved: Moved) -> dict[str, float]:
    """Of a reading, for the history: nats a response, and a token (each response counts alike)."""
    found: dict[str, float] = {}
    for name, responses in moved.items():
        if responses:
            found[f"{name}_moved"] = sum(nats for nats, _ in responses) / len(responses)
            found[f"{name}_moved_token"] = sum(nats / tokens for nats, tokens in responses) / len(responses)
    return found
