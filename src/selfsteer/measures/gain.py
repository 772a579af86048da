"""What training a generator has changed, apart from chance: the expected on-policy log-probability of the next token.

Sampled responses differ from each other far more than a generator differs from its policy. So nothing is sampled: at given
contexts, the beginnings of the policy's own responses, the expectation over the whole vocabulary is taken,

    Q(model, prompt) = sum over tokens v of  model(v | prompt, context) * log pi(v | x, context),

with the model's probabilities as it samples (temperature and nucleus) and pi the policy, given the bare query x. That is
the log of the on-policy probability of Figure 3 (arXiv 2410.17131), and its change comes apart into two:

    gain         Q(generator, x+ or x-) - Q(policy, x+ or x-)
    same prompt  Q(generator, x) - Q(policy, x)     what no principle has a part in: sharpening, displacement
    steering     gain - same prompt                 what comes from the principle and the bare query meeting

Beside them stands what must not be paid for it. Following: how much more the model's tokens belong to their own principle
than to the opposite one, the expectation of log pi(v | own) - log pi(v | opposite). Entropy: how many choices it leaves.
Displacement: what answers to bare queries have lost, the expectation of log generator(v | x) - log pi(v | x) over what the
policy samples. Left out on purpose: the forward passes (`training/gain.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from selfsteer.measures.estimates import mean_of
from selfsteer.measures.metrics import Gain
from selfsteer.records import Change

VALUES: Mapping[str, Callable[[Change], float]] = {
    "gain": lambda each: each.after.on_policy - each.before.on_policy,
    "same_prompt": lambda each: each.after.bare - each.before.bare,
    "steering": lambda each: (each.after.on_policy - each.before.on_policy) - (each.after.bare - each.before.bare),
    "following": lambda each: each.after.following - each.before.following,
    "entropy": lambda each: each.after.entropy - each.before.entropy,
    "displacement": lambda each: each.after.unrelated - each.before.unrelated,
}
"""The changes, by the name of their estimate."""


def query_changes(responses: Sequence[Change]) -> dict[str, float]:
    """Of one query: the means over its responses, each of which counts alike."""
    return {name: sum(map(change, responses)) / len(responses) for name, change in VALUES.items()}


def gain(queries: Sequence[Sequence[Change]]) -> Gain | None:
    """Over all queries, which count alike; None of no query."""
    changes = [query_changes(responses) for responses in queries]
    if not changes:
        return None
    before = [sum(each.before.following for each in responses) / len(responses) for responses in queries]
    found = {name: mean_of([each[name] for each in changes]) for name in VALUES}
    contexts = sum(each.tokens for responses in queries for each in responses)
    return cast(Gain, {"queries": len(queries), "contexts": contexts, **found, "following_before": mean_of(before)})


def in_words(found: Gain) -> str:
    """What the parts say, in a sentence."""
    whole, steering, same = found["gain"], found["steering"], found["same_prompt"]
    if any(each.low is None for each in (whole, steering, same)):
        return "one query is too few to say what the training has changed"
    if whole.above_zero:
        if not steering.above_zero:
            return "more on-policy, but not by steering: it is what the model would show without any principle"
        share = "mostly by steering" if steering.mean > same.mean else "mostly by sharpening, the rest by steering"
        return f"more on-policy, {share}"
    if whole.below_zero:
        return "less on-policy" + (": what steering gained, displacement took" if steering.above_zero else "")
    both = steering.above_zero and same.below_zero
    return "steering gained, and displacement took it" if both else "no change shown"
