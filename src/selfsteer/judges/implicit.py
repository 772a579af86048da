"""Judges that need no other model: the implicit reward of a trained policy, its likelihood, its view of the principles.

    likelihood               log pi(y|x) / |y|                                              the baseline of all others
    implicit reward          beta * [log pi(y|x) - log pi_ref(y|x)]                        (arXiv 2305.18290)
    principle consistency    log pi(y|x+) - log pi(y|x-): log-odds of y written under p+   (arXiv 2402.11907)

Of both, the margin is that of chosen above rejected. The consistency margin is the log-odds of "y+ under p+ and y- under
p-" against the exchanged assignment, so sums over the tokens are the right statistic. Responses sampled by the same
policy under these principles are consistent by construction more often than not: the number says how well the principles
tell the responses apart, not how good those are. To compare data sets, take one policy for all of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from selfsteer.judges.base import Pairs, not_refused, with_refused
from selfsteer.measures.quality import rewards_of
from selfsteer.measures.verdicts import Verdict, by_margin, failure
from selfsteer.pairs import special_token_reason
from selfsteer.prompts import Prompts
from selfsteer.records import Pair
from selfsteer.store.journal import Journal
from selfsteer.training.scoring import Group, Scorer, score_missing, scores


def implicit_verdicts(before: Iterable[Pair], after: Iterable[Pair], *, beta: float) -> Iterator[Verdict]:
    """The response whose log-probability training has raised more.

    before: the pairs with their reference log-probabilities; after: the same with those of the trained model, in the same
    order. ValueError when the lengths differ.
    """
    for reference, trained in zip(before, after, strict=True):
        if not reference.scored:
            yield failure(reference, "no reference log-probabilities")
            continue
        rewards = rewards_of(reference, trained, beta=beta)
        yield by_margin(reference, rewards.chosen - rewards.rejected)


def likelihood_verdicts(pairs: Iterable[Pair]) -> Iterator[Verdict]:
    """The response of which the policy is surer, token by token: what probability alone knows, without any training."""
    for pair in pairs:
        yield by_margin(pair, pair.chosen.score.mean_logps - pair.rejected.score.mean_logps)


def consistency_verdicts(scorer: Scorer, pairs: Pairs, journal: Journal, *, total: int) -> Iterator[Verdict]:
    """Does log pi(y|x+) - log pi(y|x-) rank chosen above rejected? One forward pass a query, journalled.

    pairs: with the principles that they were sampled under; total, their number, is for the progress bar. Raises
    Interrupted, with all scores durable, when a signal asked to stop.
    """
    refused: dict[int, str] = {}

    def group(pair: Pair) -> Group:
        return scorer.group(_under_both(pair, scorer.prompts))

    def verdict(pair: Pair) -> Verdict:
        plus, minus = scores(journal, group(pair))
        chosen = plus.chosen.score.logps - minus.chosen.score.logps
        return by_margin(pair, chosen - (plus.rejected.score.logps - minus.rejected.score.logps))

    asked = map(group, not_refused(pairs, lambda pair: _refusal(pair, scorer.prompts), refused))
    score_missing(scorer, asked, journal, description="principle consistency", total=total)
    yield from with_refused(pairs, refused, verdict)


def _refusal(pair: Pair, prompts: Prompts) -> str | None:
    """Why this pair must not be scored under its principles, or None."""
    plus, minus = _under_both(pair, prompts)
    texts = plus.chosen.text, plus.rejected.text
    reason = prompts.quarantine_reason(plus.prompt) or special_token_reason(texts, prompts)
    if reason is None and not all(text.strip() for text in texts):
        reason = "empty response"
    return reason or prompts.quarantine_reason(minus.prompt)


def _under_both(pair: Pair, prompts: Prompts) -> tuple[Pair, Pair]:
    """Both responses under x+, and under x-: two rows with a shared prompt each."""
    assert pair.principles is not None, "pairs made elsewhere are not asked"
    plus, minus = (
        prompts.steer(pair.prompt, which) for which in (pair.principles.good_message, pair.principles.bad_message)
    )
    return (replace(pair, prompt=plus), replace(pair, prompt=minus))
