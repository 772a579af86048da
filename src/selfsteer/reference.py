"""Log-probabilities of pairs, computed once and journalled.

One number serves both purposes: the reference log-probability of the trainings, and the on-policy measure of the data.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from selfsteer.durable import digest
from selfsteer.interrupt import raise_if_stopped
from selfsteer.journal import Journal
from selfsteer.models import compute_dtype, pick_device
from selfsteer.pairs import pair_row
from selfsteer.progress import progress
from selfsteer.prompts import Prompts
from selfsteer.quality import ScoredPair
from selfsteer.recipe import Launcher, Policy, Training
from selfsteer.records import Checkpoint, PreferencePair, Scored
from selfsteer.scoring import score_into
from selfsteer.shares import Scoring, score_shared, settle

SCHEMA = 1
"""Version of the journalled scores; part of every key."""


class Group(NamedTuple):
    """The pairs of one query that are computed together, as training will compute them."""

    key: str
    pairs: Sequence[PreferencePair]


class Judge(NamedTuple):
    """The model that scores, and how it computes."""

    model: Checkpoint
    policy: Policy
    """The recipe's policy section, from which the model is loaded."""
    prompts: Prompts
    training: Training
    launcher: Launcher = Launcher()
    """Whose processes score."""

    def group(self, pairs: Sequence[PreferencePair]) -> Group:
        """The pairs under a key of what determines their log-probabilities."""
        content = {
            "schema": SCHEMA,
            "model": self.model.digest,
            "prompts": self.prompts.digest,
            "dtype": str(compute_dtype(self.training.dtype, pick_device())),
            "prefix_sharing": self.training.prefix_sharing,
            "pairs": [pair_row(pair) for pair in pairs],
        }
        return Group(key=digest(content), pairs=pairs)


def score_missing(judge: Judge, groups: Iterable[Group], journal: Journal, *, description: str, total: int) -> None:
    """Score every group that the journal lacks; the model is loaded only when there is one.

    total, the number of groups, is for the progress bar. Raises Interrupted when a signal asked to stop.
    """
    settle(journal)
    lacking = (group for group in groups if group.key not in journal)
    first = next(lacking, None)
    if first is None:
        return
    policy = judge.policy.model_copy(update={"model": judge.model.path})
    missing = chain([first], lacking)
    if judge.launcher.kind == "accelerate":
        score_shared(_each_once(missing), journal, Scoring(policy, judge.training, description), judge.launcher)
    else:
        with progress(description, total, unit="queries") as advance:
            score_into(journal, missing, (policy, judge.training), advance)
    raise_if_stopped()


def _each_once(groups: Iterable[Group]) -> Iterator[Group]:
    seen: set[str] = set()
    for group in groups:
        if group.key not in seen:
            seen.add(group.key)
            yield group


def scores(journal: Journal, group: Group) -> list[ScoredPair]:
    """The journalled scores of a group's pairs, in their order."""
    return [
        ScoredPair(Scored(logps=chosen, tokens=chosen_tokens), Scored(logps=rejected, tokens=rejected_tokens))
        for chosen, chosen_tokens, rejected, rejected_tokens in journal.get(group.key)["scores"]
    ]
