"""From responses to preference pairs, and the filters that say why not.

`steering_pairs` is the method's core: seen as data, L_SSO is two ordinary preference pairs for each query.
"""

from collections.abc import Callable, Iterable, Iterator

from selfsteer.measures.text import is_refusal, leaks_principle, similarity
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Filters, ObjectiveName
from selfsteer.records import Message, Pair, PairKind, Principles, Query, Response, Responses, Side


def steering_pairs(responses: Responses, prompts: Prompts, objective: ObjectiveName = "sso") -> tuple[Pair, ...]:
    """The pairs whose summed losses are L_SSO (arXiv 2410.17131, equations 1, 2 and 4).

    prompt  chosen  rejected  teaches the data generator to
    x+      y+      y-        answer well when told how
    x-      y_o     y+        fall short of y+ when told to, yet stay on-policy

    With objective "equation_3" the second pair is the obvious one, (x-, y-, y+), which drifts off-policy (the paper's
    Table 4); "l_plus" and "l_minus" keep one half.
    """
    query, principles = responses.query, responses.principles
    good_prompt = prompts.steer(query.messages, principles.good_message)
    bad_prompt = prompts.steer(query.messages, principles.bad_message)
    plus = _pair(responses, "l_plus", good_prompt, (responses.good, responses.bad))
    if objective == "l_plus":
        return (plus,)
    if objective == "equation_3":
        return (plus, _pair(responses, "l_minus", bad_prompt, (responses.bad, responses.good)))
    assert responses.original is not None, "L- needs y_o"
    minus = _pair(responses, "l_minus", bad_prompt, (responses.original, responses.good))
    return (minus,) if objective == "l_minus" else (plus, minus)


def alignment_pair(responses: Responses) -> Pair:
    """The bare query with the good-principle response above the bad-principle one: what the policy is aligned on."""
    return _pair(responses, "alignment", responses.query.messages, (responses.good, responses.bad))


def answer_pair(query: Query, answer: Response, other: Response) -> Pair:
    """Two answers to the bare query, neither of them steered."""
    chosen, rejected = response_side(answer), response_side(other)
    return Pair(query_id=query.id, kind="alignment", prompt=query.messages, chosen=chosen, rejected=rejected)


def _pair(responses: Responses, kind: PairKind, prompt: tuple[Message, ...], ranked: tuple[Response, Response]) -> Pair:
    chosen, rejected = map(response_side, ranked)
    return Pair(
        query_id=responses.query.id,
        kind=kind,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        principles=responses.principles,
    )


def response_side(response: Response) -> Side:
    """The response as a side of a pair."""
    turn = (Message(role="assistant", content=response.text),)
    return Side(messages=turn, finish=response.finish_reason, token_ids=response.sampled, seed=response.seed)


def reject_reason(good: Response, bad: Response, principles: Principles, filters: Filters) -> str | None:
    """Why these two responses must not become a pair, or None to keep them. The cheap reasons come first."""
    if not good.text.strip() or not bad.text.strip():
        return "empty response"
    if good.text.strip() == bad.text.strip():
        return "identical responses"
    if filters.truncated == "drop" and "length" in (good.finish_reason, bad.finish_reason):
        return "cut off by the length limit"
    shorter, longer = sorted((max(1, len(good.token_ids)), max(1, len(bad.token_ids))))
    if longer > filters.max_length_ratio * shorter:
        return "length ratio"
    if filters.refusals and is_refusal(good.text):
        return "refusal in the chosen response"
    if filters.leakage and (
        leaks_principle(good.text, principles.good_message) or leaks_principle(bad.text, principles.bad_message)
    ):
        return "principle leakage"
    if similarity(good.text, bad.text) >= filters.near_identical:
        return "near-identical responses"
    return None


def pair_reject_reason(responses: Responses, filters: Filters, prompts: Prompts) -> str | None:
    """Why y+ and y- must not become a pair that the policy is aligned on, or None to keep them."""
    reason = reject_reason(responses.good, responses.bad, responses.principles, filters)
    return reason or sampled_special_reason((responses.good, responses.bad), prompts)


def steering_reject_reason(responses: Responses, filters: Filters, prompts: Prompts) -> str | None:
    """Why these responses must not train the generator, or None to keep them."""
    reason = reject_reason(responses.good, responses.bad, responses.principles, filters)
    if reason is not None:
        return reason
    if responses.original is not None:
        if not responses.original.text.strip():
            return "empty response"
        if filters.truncated == "drop" and responses.original.finish_reason == "length":
            return "cut off by the length limit"
        if responses.original.text.strip() == responses.good.text.strip():
            return "original identical to the good response"
    sampled = (responses.good, responses.bad, responses.original)
    return sampled_special_reason((response for response in sampled if response is not None), prompts)


def usable(
    items: Iterable[Responses], reason: Callable[[Responses], str | None], reasons: dict[tuple[str, int], str]
) -> Iterator[Responses]:
    """Those that are kept; why the others are not is in `reasons` from then on, by `item_key`: texts are judged once."""
    for item in items:
        found = reason(item)
        if found is None:
            yield item
        else:
            reasons[item_key(item)] = found


def item_key(item: Responses) -> tuple[str, int]:
    """The query and, since it may be answered several times, a seed of this time."""
    return item.query.id, item.good.seed


def sampled_special_reason(responses: Iterable[Response], prompts: Prompts) -> str | None:
    """The same of responses, whose text leaves out the special tokens that were sampled in the middle of them."""
    for response in responses:
        if not prompts.special_ids.isdisjoint(response.token_ids):
            return "special tokens in a response"
        if (reason := special_token_reason((response.text,), prompts)) is not None:
            return reason
    return None


def special_token_reason(texts: Iterable[str], prompts: Prompts) -> str | None:
    """Why these completions must not be trained on (they would be read as containing special tokens), or None."""
    return "special tokens in a response" if any(prompts.contains_special(text) for text in texts) else None
