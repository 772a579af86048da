"""Judges that need no other model: the implicit reward of a trained policy, its likelihood, its view of the principles.

    likelihood               log pi(y|x) / |y|                                              the baseline of all others
    implicit reward          beta * [log pi(y|x) - log pi_ref(y|x)]                        (arXiv 2305.18290)
    principle consistency    log pi(y|x+) - log pi(y|x-): log-odds of y written under p+   (arXiv 2402.11907)

Of both, the margin is that of chosen above rejected. The consistency margin is the log-odds of "y+ under p+ and y- under
p-" against the exchanged assignment, so sums over the tokens are the right statistic; per token, where a longer response
weighs no more than a short one, it is reported beside them at no cost. Responses sampled by the same policy under these
principles are consistent by construction more often than not: the number says how well the principles tell the responses
apart, not how good those are. To compare data sets, take one policy for all of them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from selfsteer.measures.quality import reference_scores
from selfsteer.measures.verdicts import Verdict, by_margin, failure
from selfsteer.pairs import alignment_pair, special_token_reason
from selfsteer.prompts import Prompts
from selfsteer.records import PairRow, PreferencePair, Principles, Responses, ScoredPair
from selfsteer.store.journal import Journal
from selfsteer.training.scoring import Group, Judge, score_missing, scores


def implicit_verdicts(
    rows: Iterable[tuple[PreferencePair, PairRow]], after: Iterable[ScoredPair], *, beta: float
) -> Iterator[Verdict]:
    """The response whose log-probability training has raised more.

    rows: the pairs with the columns of their reference log-probabilities; after: their scores under the trained model, one
    each in the same order. ValueError when the lengths differ.
    """
    for (pair, row), trained in zip(rows, after, strict=True):
        before = reference_scores(row)
        if before is None:
            yield failure(pair, "no reference log-probabilities")
            continue
        rewards = [beta * (now.logps - then.logps) for now, then in zip(trained, before, strict=True)]
        yield by_margin(pair, rewards[0] - rewards[1])


def likelihood_verdicts(pairs: Iterable[tuple[PreferencePair, ScoredPair]]) -> Iterator[Verdict]:
    """The response of which the policy is surer, token by token: what probability alone knows, without any training."""
    for pair, scored in pairs:
        yield by_margin(pair, scored.chosen.mean_logps - scored.rejected.mean_logps)


class Steered(NamedTuple):
    """A pair under its bare query, and the principles that its responses were sampled under."""

    pair: PreferencePair
    principles: Principles


def steered(responses: Responses) -> Steered:
    """The good and the bad response of a query (stage 2)."""
    return Steered(alignment_pair(responses.query, responses.good, responses.bad), responses.principles)


class Consistency(NamedTuple):
    """The same margin, summed over the tokens and of the per-token means."""

    summed: Verdict
    per_token: Verdict


def consistency_verdicts(
    judge: Judge, items: Callable[[], Iterable[Steered]], journal: Journal, *, total: int
) -> Iterator[Consistency]:
    """Does log pi(y|x+) - log pi(y|x-) rank chosen above rejected? One forward pass a query, journalled.

    items: the pairs, each time from the beginning; total, their number, is for the progress bar. Raises Interrupted, with
    all scores durable, when a signal asked to stop.
    """

    refused: dict[int, str] = {}

    def asked() -> Iterator[Group]:
        for number, item in enumerate(items()):
            both = _under_both(item, judge.prompts)
            reason = _refusal(both, judge.prompts)
            if reason is None:
                yield judge.group(both)
            else:
                refused[number] = reason

    score_missing(judge, asked(), journal, description="principle consistency", total=total)
    for number, item in enumerate(items()):
        pair = item.pair
        if number in refused:
            yield Consistency(failure(pair, refused[number]), failure(pair, refused[number]))
            continue
        plus, minus = scores(journal, judge.group(_under_both(item, judge.prompts)))
        summed = [good.logps - bad.logps for good, bad in zip(plus, minus, strict=True)]
        per_token = [good.mean_logps - bad.mean_logps for good, bad in zip(plus, minus, strict=True)]
        yield Consistency(by_margin(pair, summed[0] - summed[1]), by_margin(pair, per_token[0] - per_token[1]))


def _refusal(both: tuple[PreferencePair, PreferencePair], prompts: Prompts) -> str | None:
    """Why these pairs, which differ in their prompts, must not be scored, or None."""
    plus, minus = both
    reason = prompts.quarantine_reason(plus.prompt) or special_token_reason((plus.chosen, plus.rejected), prompts)
    if reason is None and not (plus.chosen.strip() and plus.rejected.strip()):
        reason = "empty response"
    return reason or prompts.quarantine_reason(minus.prompt)


def _under_both(item: Steered, prompts: Prompts) -> tuple[PreferencePair, PreferencePair]:
    """Both responses under x+, and under x-: two rows with a shared prompt each."""
    pair, principles = item
    plus, minus = (prompts.steer(pair.prompt, principle) for principle in (principles.good, principles.bad))
    return (replace(pair, prompt=plus), replace(pair, prompt=minus))
