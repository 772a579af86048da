"""Log-probabilities of preference pairs under a model, without gradient: computed once, journalled.

The reference log-probabilities of both trainings and the on-policy measures come from here, through the same packed forward
as training. The unit is a query's pairs together: packed alike and in the same dtype, the first training pass repeats these
numbers bit for bit.

With several processes each scores every n-th group, into parts of its own of the journal:

    <stage>/scoring/groups.jsonl   what is to be scored: a key and its pairs a line
    <stage>/scoring/job.json       the model, and how it computes
    <stage>/scoring/PARENT, GROUP  who lives (`parallel.py`)

Nothing has to be agreed on, so nothing is: a process that is killed leaves what it had finished, and the same command
scores the rest, with as many processes as the recipe then says. Left out on purpose: machines that do not see the folder of
the run.
"""

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, chain, groupby, islice, pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from selfsteer import runtime
from selfsteer.clock import count, part, timed
from selfsteer.models import (
    compute_dtype,
    end_ids,
    let_go,
    load_model,
    pick_device,
    position_limit,
    quantizable,
    tokenizer_of,
)
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Launcher, Policy, Quantization, Training
from selfsteer.records import Checkpoint, Pair, Scored
from selfsteer.runtime import progress, raise_if_stopped, stop_requested
from selfsteer.store import columns
from selfsteer.store.columns import pair_row
from selfsteer.store.durable import canonical_json, digest, make_folder, replacing, write
from selfsteer.store.folder import SCHEMA_VERSION
from selfsteer.store.journal import Journal
from selfsteer.training.logps import Packing, casting_once, choose_packing, hold_in_half, teach, to_device
from selfsteer.training.packing import Rows, TokenPair, row_tokens, share_prompts, together
from selfsteer.training.parallel import run_group, take_in, taking_part, wait_for_group


class Group(NamedTuple):
    """The pairs of one query that are computed together, as training will compute them."""

    key: str
    pairs: Sequence[Pair]
    edges: tuple[int, ...] = ()
    """Of each response the beginnings of so many tokens are scored, too (`prefixes`)."""


class Scorer(NamedTuple):
    """The model that scores, and how it computes."""

    model: Checkpoint
    policy: Policy
    """The recipe's policy section, from which the model is loaded."""
    prompts: Prompts
    training: Training
    launcher: Launcher = Launcher()
    """Whose processes score."""
    quantize: Quantization | None = None
    """As `training.lora.quantize`, for the reference of such a training; measures are of the full weights."""

    def group(self, pairs: Sequence[Pair], edges: tuple[int, ...] = ()) -> Group:
        """The pairs under a key of what determines their log-probabilities."""
        content: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "model": self.model.digest,
            "prompts": self.prompts.digest,
            "dtype": str(compute_dtype(self.training.dtype, pick_device())),
            "prefix_sharing": self.training.prefix_sharing,
            "pairs": [_identity(pair) for pair in pairs],
        }
        if self.quantize is not None:
            content["quantize"] = self.quantize
        return Group(digest(content | ({"edges": edges} if edges else {})), pairs, edges)

    def by_query(self, pairs: Iterable[Pair]) -> Iterator[Group]:
        """The pairs of each query, which stand next to each other, as a group."""
        for _, of_query in groupby(pairs, key=lambda pair: pair.query_id):
            yield self.group(list(of_query))


def _identity(pair: Pair) -> dict[str, Any]:
    """What of a pair determines its log-probabilities."""
    sides = (
        {"text": side.text, "finish": side.finish} if side.token_ids is None else {"ids": side.token_ids}
        for side in (pair.chosen, pair.rejected)
    )
    return {"prompt": pair.prompt, "responses": list(sides)}


def score_missing(scorer: Scorer, groups: Iterable[Group], journal: Journal, *, description: str, total: int) -> None:
    """Score every group that the journal lacks; the model is loaded only when there is one.

    total, the number of groups, is for the progress bar. Raises Interrupted when a signal asked to stop.
    """
    settle(journal)
    lacking = journal.lacking(groups, key=lambda group: group.key)
    if lacking is None:
        return
    policy = scorer.policy.model_copy(update={"model": scorer.model.path})
    if scorer.launcher.kind == "accelerate":
        scoring = Scoring(policy, scorer.training, description, scorer.quantize)
        score_shared(lacking, journal, scoring, scorer.launcher)
    else:
        with progress(description, total, unit="queries") as advance:
            score_into(journal, lacking, (policy, scorer.training, scorer.quantize), advance)
        let_go()
    raise_if_stopped()


def scores(journal: Journal, group: Group) -> list[Pair]:
    """The group's pairs with the journalled log-probabilities, in their order."""
    found = map(_whole, prefixes(journal, group)) if group.edges else journal.get(group.key)["scores"]
    return [_scored(pair, numbers) for pair, numbers in zip(group.pairs, found, strict=True)]


class Prefixes(NamedTuple):
    """Both responses of a pair, scored up to each of the group's edges that they go beyond, and last as a whole."""

    chosen: tuple[Scored, ...]
    rejected: tuple[Scored, ...]


def prefixes(journal: Journal, group: Group) -> list[Prefixes]:
    """The journalled log-probabilities of a group with edges, pair by pair."""
    return [
        Prefixes(*(tuple(Scored(*each) for each in side) for side in pair)) for pair in journal.get(group.key)["prefixes"]
    ]


def prefix_lengths(tokens: int, edges: Sequence[int]) -> tuple[int, ...]:
    """Where a response of so many tokens is scored."""
    return (*(edge for edge in edges if edge < tokens), tokens)


# --- in this process -------------------------------------------------------------------------------------------------------


class OpenScorer(NamedTuple):
    """A model that scores pairs; `open_scorer` makes it."""

    model: PreTrainedModel
    """Taught by `logps.teach`."""
    prompts: Prompts
    training: Training
    """The mechanics that training will use, so that both compute alike."""


@contextmanager
def open_scorer(policy: Policy, training: Training, quantize: Quantization | None = None) -> Generator[OpenScorer]:
    """The policy (a local folder) ready to score; the model is let go of when the block ends."""
    device = pick_device()
    tokenizer = tokenizer_of(policy)
    # Master weights in float32 and autocast, as in training: weights rounded beforehand would give other numbers.
    trust = policy.trust_remote_code
    model = load_model(policy.model, dtype=torch.float32, device=device, trust_remote_code=trust, quantize=quantize)
    teach(model, compute_dtype(training.dtype, device))
    yield OpenScorer(model, Prompts.of(policy, tokenizer, end_ids(policy.model, tokenizer)), training)


@part("render")
def tokenize(pair: Pair, prompts: Prompts, positions: int | None = None) -> TokenPair:
    """The pair as token ids: those that were sampled, else those of the text behind its prompt.

    Raises ValueError for a completion without a single token, and for more tokens than the model has positions: at those it
    would fail, or compute something that it was never trained on.
    """
    chosen, rejected = (prompts.response_ids(side, pair.prompt) for side in (pair.chosen, pair.rejected))
    if not chosen or not rejected:
        raise ValueError(
            f"query {pair.query_id}: an empty {'rejected' if chosen else 'chosen'} response can't be scored; drop it"
        )
    prompt = prompts.prompt_ids(pair.prompt)
    length = len(prompt) + max(len(chosen), len(rejected))
    if positions is not None and length > positions:
        raise ValueError(
            f"query {pair.query_id}: {length:,} tokens are too long for the model, which has {positions:,} positions"
        )
    return TokenPair(prompt, chosen, rejected)


def score(scorer: OpenScorer, groups: Iterable[Sequence[Pair]]) -> Iterator[list[Pair]]:
    """The pairs of each query with their log-probabilities, in order; one query after the other is read and computed.

    groups: the pairs of a query together, as they are trained. Where several queries share a forward pass
    (`training.micro_batch_size`, `training.tokens_per_batch`) training, which shuffles, repeats the numbers only up to
    rounding.
    """
    for group, found in _score(scorer, (Group("", pairs) for pairs in groups)):
        yield [_scored(pair, _whole(each)) for pair, each in zip(group.pairs, found, strict=True)]


def _score(scorer: OpenScorer, groups: Iterable[Group]) -> Iterator[tuple[Group, list[Prefixes]]]:
    model, prompts, training = scorer
    positions = position_limit(model.config)
    tokens = ((group, share_prompts([tokenize(pair, prompts, positions) for pair in group.pairs])) for group in groups)
    first = next(tokens, None)
    if first is None:
        return
    packing = choose_packing(model, first[1].rows, sharing=training.prefix_sharing)
    hold_in_half(model, quantizable(model), compute_dtype(training.dtype, model.device))
    batches = together(
        chain([first], tokens),
        lambda each: row_tokens(each[1].rows),
        count=training.micro_batch_size,
        budget=training.tokens_per_batch,
    )
    for batch in batches:
        yield from _score_batch(model, batch, packing)


def _score_batch(
    model: PreTrainedModel, groups: Sequence[tuple[Group, Rows]], packing: Packing
) -> Iterator[tuple[Group, list[Prefixes]]]:
    batch = to_device(packing([row for _, rows in groups for row in rows.rows]), model.device)
    lengths = [
        prefix_lengths(len(completion), group.edges)
        for group, rows in groups
        for row in rows.rows
        for completion in row.completions
    ]
    count("score", sum(ends[-1] for ends in lengths))
    # The model sums what the layout takes for a completion: the parts between the edges.
    parts = [end - start for ends in lengths for start, end in pairwise((0, *ends))]
    batch["layout"] = replace(batch["layout"], tokens=tuple(parts))
    with torch.no_grad():
        logps: list[float] = model(**batch).tolist()
    if not all(map(math.isfinite, logps)):
        raise ValueError(
            f"{model.config.name_or_path}: log-probabilities that are not finite, at query"
            f" {groups[0][0].pairs[0].query_id} or next to it. Look at the model's weights; in half precision, set"
            " training.dtype=float32"
        )
    summed = iter(logps)
    numbers = [tuple(map(Scored, accumulate(islice(summed, len(ends))), ends)) for ends in lengths]
    start = 0
    for group, rows in groups:
        places = zip(rows.chosen, rows.rejected, strict=True)
        yield group, [Prefixes(numbers[start + chosen], numbers[start + rejected]) for chosen, rejected in places]
        start += sum(len(row.completions) for row in rows.rows)


Numbers = tuple[float, int, float, int]
"""What the journal keeps of a scored pair: log-probability and tokens of the chosen response, and of the rejected one."""


def _whole(found: Prefixes) -> Numbers:
    chosen, rejected = found.chosen[-1], found.rejected[-1]
    return chosen.logps, chosen.tokens, rejected.logps, rejected.tokens


def _record(group: Group, found: Sequence[Prefixes]) -> dict[str, Any]:
    return {"prefixes": found} if group.edges else {"scores": [_whole(each) for each in found]}


def _scored(pair: Pair, numbers: Numbers) -> Pair:
    """The pair with these numbers, in place of any that it had."""
    chosen, chosen_tokens, rejected, rejected_tokens = numbers
    return replace(
        pair,
        chosen=replace(pair.chosen, logps=chosen, tokens=chosen_tokens),
        rejected=replace(pair.rejected, logps=rejected, tokens=rejected_tokens),
    )


def score_into(
    journal: Journal,
    groups: Iterable[Group],
    how: tuple[Policy, Training, Quantization | None],
    advance: Callable[[int], None],
) -> None:
    """Score every group and append it to the journal; returns early when a signal asked to stop, with all of it durable.

    how: what `open_scorer` takes.
    """
    with open_scorer(*how) as scorer, casting_once(scorer.model.device):
        scored = timed("score", _score(scorer, takewhile(lambda _: not stop_requested(), groups)))
        journal.fill(((group.key, _record(group, found)) for group, found in scored), advance)


# --- in several processes --------------------------------------------------------------------------------------------------


class Scoring(NamedTuple):
    """What is scored with, and what is said meanwhile."""

    policy: Policy
    """`policy.model` is a local folder."""
    training: Training
    description: str
    quantize: Quantization | None = None


_FOLDER, _GROUPS, _SCORING_JOB = "scoring", "groups.jsonl", "job.json"


def settle(journal: Journal) -> None:
    """Wait for processes that a killed parent left behind, and take in what they scored; before asking what is missing."""
    folder = _folder(journal)
    if not folder.is_dir():
        return
    wait_for_group(folder)
    take_in(folder)
    journal.reread()
    shutil.rmtree(folder)


def score_shared(groups: Iterable[Group], journal: Journal, scoring: Scoring, launcher: Launcher) -> None:
    """Score groups that the journal lacks, each key once; returns, or raises, with all that was finished in the journal.

    Raises ChildProcessError when a process ended early, and leaves a stop that was asked for to the caller.
    """
    folder = _folder(journal)
    make_folder(folder)
    with replacing(folder / _GROUPS) as file:
        for key, pairs, edges in groups:
            line = {"key": key, "pairs": [pair_row(pair) for pair in pairs], "edges": edges}
            file.write(canonical_json(line) + b"\n")
    job = {
        "policy": scoring.policy.model_dump(mode="json"),
        "training": scoring.training.model_dump(mode="json"),
        "description": scoring.description,
        "quantize": scoring.quantize,
        "parts": str(journal.folder),
    }
    write(folder / _SCORING_JOB, canonical_json(job))
    status = run_group(launcher, "selfsteer.training.scoring", folder)
    settle(journal)
    if status and not runtime.stop_requested():
        raise ChildProcessError(
            f"{folder.parent}: the processes that score ended early (status {status}); what they said is"
            " above. The same command scores the rest."
        )


def _folder(journal: Journal) -> Path:
    return journal.folder.with_name(_FOLDER)


def main() -> None:
    """Score this process's share."""
    folder = Path(sys.argv[1])
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        job: dict[str, Any] = json.loads((folder / _SCORING_JOB).read_bytes())
    except FileNotFoundError:  # the launcher was killed before this process had begun, and the parent has cleared up
        return
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("selfsteer").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    with (folder / _GROUPS).open("rb") as lines:
        total = len(range(rank, sum(1 for _ in lines), count))
    description = f"{job['description']} (1 of {count} processes)"
    policy, training = Policy.model_validate(job["policy"]), Training.model_validate(job["training"])
    with (
        runtime.graceful_stop(),
        taking_part(folder),
        # What is asked for is what the parent did not find: the other parts need not be read.
        Journal(Path(job["parts"]), writer=f"main-{rank}", read=False) as journal,
        progress(description, total, unit="queries") as advance,
    ):
        score_into(journal, _share(folder, rank, count), (policy, training, job["quantize"]), advance)


def _share(folder: Path, rank: int, count: int) -> Iterator[Group]:
    with (folder / _GROUPS).open("rb") as lines:
        for number, line in enumerate(lines):
            if number % count == rank:
                group = json.loads(line)
                yield Group(group["key"], [columns.pair(row) for row in group["pairs"]], tuple(group["edges"]))


if __name__ == "__main__":
    main()
