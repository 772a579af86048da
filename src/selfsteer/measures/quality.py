"""What pairs are worth, measured on the rows alone: on-policy probability, margins, lengths, variety, overlap, dirt.

On-policy probability and accuracy of the data follow the paper (arXiv 2410.17131, figure 3). The log-probabilities are
read from the rows; a measure whose inputs are missing is absent, never zero. Left out on purpose: models and judges.

Rows are streamed; what stays in memory is about a hundred bytes a pair, a bounded sample of words, and signatures of the
first responses, at most 26 MB.
"""

import hashlib
import json
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfsteer.measures.estimates import (
    Distribution,
    Estimate,
    distribution,
    mean_estimate,
    mean_of,
    paired_difference,
    share_of,
)
from selfsteer.measures.metrics import (
    Both,
    Comparison,
    ImplicitReward,
    Length,
    Margin,
    Measures,
    OnPolicy,
    Preference,
    Reward,
    Variety,
)
from selfsteer.measures.text import (
    HASHES,
    is_refusal,
    leaks_principle,
    near_repeats,
    repetition,
    script_mismatch,
    signature,
    similarity,
    words,
)
from selfsteer.records import Pair, Scored, Side

NEAR_IDENTICAL = 0.9
"""Word 3-gram Jaccard overlap above which two responses hardly differ."""

NEAR_REPEAT_ROWS = 100_000
"""Near-duplicates across pairs are sought among the first responses of a side, at most this many."""

WORD_BUDGET = 200_000
"""distinct-n falls as text grows, so it is taken over equally many words of both sides, at most this many."""


def _numbers() -> "array[float]":
    return array("d")


@dataclass(slots=True)
class _Responses:
    """What is gathered about the chosen, or about the rejected responses, one number a row."""

    words: "array[float]" = field(default_factory=_numbers)
    tokens: "array[float]" = field(default_factory=_numbers)
    repetition: "array[float]" = field(default_factory=_numbers)
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    vocabulary_ids: "array[int]" = field(default_factory=lambda: array("q"))
    """The words of the first responses as numbers, up to WORD_BUDGET; -1 ends a response."""
    signatures: bytearray = field(default_factory=bytearray)
    """MinHash signatures of the first responses, up to NEAR_REPEAT_ROWS."""
    truncated: int = 0
    refusals: int = 0
    leaks: int = 0
    scripts: int = 0
    """Responses whose writing system could be compared with the query's."""
    mismatches: int = 0

    def add(self, side: Side, query: str, vocabulary: dict[str, int]) -> None:
        """Take in one response; `vocabulary` numbers the words and grows."""
        text = side.text
        text_words = words(text)
        self.words.append(len(text_words))
        if side.tokens is not None:
            self.tokens.append(side.tokens)
        repeated = repetition(text_words)
        if repeated is not None:
            self.repetition.append(repeated)
        self.digests.append(_digest(text))
        if len(self.vocabulary_ids) < WORD_BUDGET:
            self.vocabulary_ids.extend(vocabulary.setdefault(word, len(vocabulary)) for word in text_words[:WORD_BUDGET])
            self.vocabulary_ids.append(-1)
        if len(self.signatures) < NEAR_REPEAT_ROWS * HASHES:
            self.signatures += signature(text_words)
        mismatch = script_mismatch(query, text)
        self.scripts += mismatch is not None
        self.mismatches += mismatch is True
        self.refusals += is_refusal(text)
        self.leaks += leaks_principle(text)


@dataclass(slots=True)
class _Scores:
    """What the log-probabilities of the scored rows say, one number a row."""

    chosen: "array[float]" = field(default_factory=_numbers)
    rejected: "array[float]" = field(default_factory=_numbers)
    margin: "array[float]" = field(default_factory=_numbers)
    per_token: "array[float]" = field(default_factory=_numbers)
    length_difference: "array[float]" = field(default_factory=_numbers)

    def add(self, chosen: Scored, rejected: Scored) -> None:
        """Take in one scored pair."""
        self.chosen.append(chosen.mean_logps)
        self.rejected.append(rejected.mean_logps)
        self.margin.append(chosen.logps - rejected.logps)
        self.per_token.append(chosen.mean_logps - rejected.mean_logps)
        self.length_difference.append(chosen.tokens - rejected.tokens)


def measure(pairs: Iterable[Pair]) -> Measures:
    """Every measure that the pairs allow. ValueError, naming the query, where a log-probability is not finite."""
    chosen, rejected, scores = _Responses(), _Responses(), _Scores()
    vocabulary: dict[str, int] = {}
    overlaps, digests = array("d"), array("Q")
    sampled = 0
    for pair in pairs:
        query = pair.prompt[-1]["content"]
        chosen.add(pair.chosen, query, vocabulary)
        rejected.add(pair.rejected, query, vocabulary)
        if pair.kind != "given":
            sampled += 1
            chosen.truncated += pair.chosen.finish == "length"
            rejected.truncated += pair.rejected.finish == "length"
        overlaps.append(similarity(pair.chosen.text, pair.rejected.text))
        digests.append(_digest(json.dumps([pair.prompt, chosen.digests[-1], rejected.digests[-1]])))
        if pair.scored:
            scores.add(pair.chosen.score, pair.rejected.score)
    if not digests:
        return Measures(pairs=0)

    def both(share: Callable[[_Responses], Estimate]) -> Both:
        return Both(chosen=share(chosen), rejected=share(rejected))

    n = len(digests)
    length, lengths = _length(chosen, rejected)
    varieties, counted = _variety(chosen, rejected)
    distributions = {"length": lengths}
    measures = Measures(
        pairs=n,
        length=length,
        variety=varieties,
        variety_words=counted,
        overlap=mean_of(overlaps),
        near_identical=share_of(sum(value > NEAR_IDENTICAL for value in overlaps), n),
        repeated_pairs=_repeats(digests),
        repeated_chosen=_repeats(chosen.digests),
        repeated_rejected=_repeats(rejected.digests),
        near_repeated=both(_near_repeats),
        refusals=both(lambda side: share_of(side.refusals, n)),
        leakage=both(lambda side: share_of(side.leaks, n)),
        distributions=distributions,
    )
    if chosen.scripts and rejected.scripts:
        measures["language_mismatch"] = both(lambda side: share_of(side.mismatches, side.scripts))
    if sampled:
        measures["truncated"] = both(lambda side: share_of(side.truncated, sampled))
    if scores.margin:
        measures["on_policy"] = _on_policy(scores)
        measures["margin"] = _margin(scores)
        distributions["log_probability"] = distribution(chosen=scores.chosen, rejected=scores.rejected)
        distributions["margin"] = distribution(margin=scores.per_token)
    return measures


class Rewards(NamedTuple):
    """beta * (log pi - log pi_ref) of both responses (arXiv 2305.18290)."""

    chosen: float
    rejected: float


def rewards_of(reference: Pair, trained: Pair, *, beta: float) -> Rewards:
    """The implicit rewards of a pair that both models have scored."""
    chosen = trained.chosen.score.logps - reference.chosen.score.logps
    return Rewards(beta * chosen, beta * (trained.rejected.score.logps - reference.rejected.score.logps))


def implicit_reward(before: Iterable[Pair], after: Iterable[Pair], *, beta: float) -> ImplicitReward:
    """Compare the reference's log-probabilities, `before`, with the trained model's of the same pairs in the same order.

    Pairs without reference log-probabilities are left out; `pairs` counts the others. ValueError when the lengths differ.
    """
    before_scores, after_scores = _Scores(), _Scores()
    rewards = array("d"), array("d")
    for reference, trained in zip(before, after, strict=True):
        if not reference.scored:
            continue
        before_scores.add(reference.chosen.score, reference.rejected.score)
        after_scores.add(trained.chosen.score, trained.rejected.score)
        found = rewards_of(reference, trained, beta=beta)
        rewards[0].append(found.chosen)
        rewards[1].append(found.rejected)
    n = len(before_scores.margin)
    if n == 0:
        return ImplicitReward(pairs=0, beta=beta)
    margins = np.asarray(rewards[0]) - np.asarray(rewards[1])
    return ImplicitReward(
        pairs=n,
        beta=beta,
        before=_preference(before_scores),
        after=_preference(after_scores),
        reward=Reward(
            margin=mean_of(margins),
            accuracy=share_of(int((margins > 0).sum()), n),
            chosen=mean_of(rewards[0]),
            rejected=mean_of(rewards[1]),
        ),
    )


def compare(pairs: Iterable[Pair], baseline: Iterable[Pair]) -> Comparison:
    """How much more on-policy `pairs` are than `baseline` (PBAA, say), query by query; those without scores are left out."""
    first, second = _by_query(pairs), _by_query(baseline)
    comparison = Comparison(queries=len(first.keys() & second.keys()))
    for index, name in enumerate(("chosen", "rejected", "all", "margin_per_token")):
        difference = paired_difference(
            {query: values[index] for query, values in first.items()},
            {query: values[index] for query, values in second.items()},
        )
        if difference is not None:
            comparison[name] = difference
    shared = sorted(first.keys() & second.keys())
    if shared:
        both = {"pairs": first, "baseline": second}
        comparison["both"] = {
            name: mean_of(np.asarray([side[query][_ALL] for query in shared])) for name, side in both.items()
        }
    return comparison


_ALL = 2
"""Where `_by_query` has the on-policy probability of both responses."""


def _by_query(pairs: Iterable[Pair]) -> dict[str, NDArray[np.float64]]:
    """On-policy probability of chosen, rejected and both, margin per token, shape (4,): the mean over a query's pairs."""
    gathered: defaultdict[str, list[tuple[float, ...]]] = defaultdict(list)
    for pair in pairs:
        if pair.scored:
            means = pair.chosen.score.mean_logps, pair.rejected.score.mean_logps
            chosen, rejected = map(math.exp, means)
            gathered[pair.query_id].append((chosen, rejected, (chosen + rejected) / 2, means[0] - means[1]))
    return {query: np.mean(values, axis=0) for query, values in gathered.items()}


def _preference(scores: _Scores) -> Preference:
    return Preference(margin=mean_of(scores.margin), accuracy=_above_zero(scores.margin), on_policy=_on_policy(scores))


def _on_policy(scores: _Scores) -> OnPolicy:
    chosen, rejected = (np.array([math.exp(each) for each in side]) for side in (scores.chosen, scores.rejected))
    return OnPolicy(chosen=mean_of(chosen), rejected=mean_of(rejected), all=mean_of((chosen + rejected) / 2))


def _margin(scores: _Scores) -> Margin:
    margin = Margin(sum=mean_of(scores.margin), per_token=mean_of(scores.per_token), chosen_above=_above_zero(scores.margin))
    margins, differences = np.asarray(scores.margin), np.asarray(scores.length_difference)
    if len(margins) > 1 and margins.std() > 0 and differences.std() > 0:
        margin["length_correlation"] = float(np.corrcoef(margins, differences)[0, 1])
    return margin


def _length(chosen: _Responses, rejected: _Responses) -> tuple[Length, Distribution]:
    n = len(chosen.words)
    in_tokens = len(chosen.tokens) == len(rejected.tokens) == n
    sides = (chosen.tokens, rejected.tokens) if in_tokens else (chosen.words, rejected.words)
    good, bad = np.asarray(sides[0]), np.asarray(sides[1])
    length = Length(
        unit="tokens" if in_tokens else "words",
        chosen=mean_of(good),
        rejected=mean_of(bad),
        chosen_median=float(np.median(good)),
        rejected_median=float(np.median(bad)),
        chosen_longer=share_of(int((good > bad).sum()), n),
    )
    if bad.any():
        length["ratio"] = float(good.mean() / bad.mean())
    return length, distribution(chosen=good, rejected=bad)


def _variety(chosen: _Responses, rejected: _Responses) -> tuple[dict[str, Variety], int]:
    ids = {"chosen": np.asarray(chosen.vocabulary_ids), "rejected": np.asarray(rejected.vocabulary_ids)}
    size = min(WORD_BUDGET, *(int((side >= 0).sum()) for side in ids.values()))
    varieties: dict[str, Variety] = {}
    for name, repetitions in (("chosen", chosen.repetition), ("rejected", rejected.repetition)):
        variety = Variety()
        repeated = mean_estimate(repetitions)
        if repeated is not None:
            variety["repetition"] = repeated
        first = ids[name][: np.searchsorted(np.cumsum(ids[name] >= 0), size) + 1]
        for key, n in (("distinct_1", 1), ("distinct_2", 2), ("distinct_3", 3)):
            share = _distinct(first, n)
            if share is not None:
                variety[key] = share
        varieties[name] = variety
    return varieties, size


def _distinct(ids: NDArray[np.int64], n: int) -> float | None:
    """Different n-grams / n-grams of word numbers, shape (words,), none across a -1; None where there is no n-gram."""
    if len(ids) < n:
        return None
    grams = np.lib.stride_tricks.sliding_window_view(ids, n)  # (words - n + 1, n)
    grams = grams[(grams >= 0).all(axis=1)]
    if len(grams) == 0:
        return None
    # Four budgets of words, the most that is ever numbered, are fewer than 2 ** 20, so three numbers fit into 63 bits.
    codes = grams @ (np.int64(1) << np.int64(20) * np.arange(n))
    return len(np.unique(codes)) / len(codes)


def _above_zero(values: "array[float]") -> Estimate:
    return share_of(sum(value > 0 for value in values), len(values))


def _near_repeats(side: _Responses) -> Estimate:
    signatures = bytes(side.signatures)
    return share_of(near_repeats(signatures, NEAR_IDENTICAL), len(signatures) // HASHES)


def _repeats(digests: "array[int]") -> int:
    return len(digests) - len(np.unique(np.asarray(digests)))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
