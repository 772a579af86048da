"""From responses to preference pairs, and the filters that say why not.

`steering_pairs` is the method's core: seen as data, L_SSO is two ordinary preference pairs for each query.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from selfsteer.prompts import Prompts
from selfsteer.recipe import Filters
from selfsteer.recipe_training import ObjectiveName
from selfsteer.records import Message, PairKind, PairRow, PreferencePair, Principles, Query, Response, Responses


def steering_pairs(responses: Responses, prompts: Prompts, objective: ObjectiveName = "sso") -> tuple[PreferencePair, ...]:
    """The pairs whose summed losses are L_SSO (arXiv 2410.17131, equations 1, 2 and 4).

    prompt  chosen  rejected  teaches the data generator to
    x+      y+      y-        answer well when told how
    x-      y_o     y+        fall short of y+ when told to, yet stay on-policy

    With objective "equation_3" the second pair is the obvious one, (x-, y-, y+), which drifts off-policy (the paper's
    Table 4); "l_plus" and "l_minus" keep one half.
    """
    query, principles = responses.query, responses.principles
    good_prompt = prompts.steer(query.messages, principles.good)
    bad_prompt = prompts.steer(query.messages, principles.bad)
    plus = _pair(query, "l_plus", good_prompt, (responses.good, responses.bad))
    if objective == "l_plus":
        return (plus,)
    if objective == "equation_3":
        return (plus, _pair(query, "l_minus", bad_prompt, (responses.bad, responses.good)))
    assert responses.original is not None, "L- needs y_o"
    minus = _pair(query, "l_minus", bad_prompt, (responses.original, responses.good))
    return (minus,) if objective == "l_minus" else (plus, minus)


def alignment_pair(query: Query, good: Response, bad: Response) -> PreferencePair:
    """The bare query with the good-principle response above the bad-principle one: what the policy is aligned on."""
    return _pair(query, "alignment", query.messages, (good, bad))


def _pair(query: Query, kind: PairKind, prompt: tuple[Message, ...], ranked: tuple[Response, Response]) -> PreferencePair:
    chosen, rejected = ranked
    return PreferencePair(
        query_id=query.id,
        kind=kind,
        prompt=prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_finish=chosen.finish_reason,
        rejected_finish=rejected.finish_reason,
    )


def pair_row(pair: PreferencePair) -> PairRow:
    """The pair in the conversational form that TRL reads, as a row of a sealed Parquet file."""
    return PairRow(
        prompt=list(pair.prompt),
        chosen=[Message(role="assistant", content=pair.chosen)],
        rejected=[Message(role="assistant", content=pair.rejected)],
        query_id=pair.query_id,
        kind=pair.kind,
        chosen_finish=pair.chosen_finish,
        rejected_finish=pair.rejected_finish,
    )


# --- filters: each answers "why not" ---------------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"""^\W*(?:
        (?:(?:(?:i['’]?m|i\ am)\ )?(?:really\ |very\ |so\ )?(?:sorry|afraid)|i\ apologi[sz]e)\b
        [^.!?]{0,80}?\b(?:can(?:no|['’])?t|unable|not\ able)
      | (?:i['’]?m|i\ am)\ (?:unable|not\ able)\ to\b
      | i\ (?:can(?:no|['’])?t|won['’]?t|will\ not)\ (?:assist|help|provide|answer|fulfil|comply|do\ that|create|write)
      | (?:as\ an\ ai(?:\ language\ model|\ assistant)?|unfortunately),?
        \ i\ (?:can(?:no|['’])?t|am\ (?:unable|not\ able)|do\ not|don['’]t)
    )""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
"""An opening that declines the request; "I'm sorry to hear that" is none."""

_LEAKAGE = re.compile(
    r"""\b(?:as|like)\ (?:i\ was\ |you\ |you['’]ve\ |you\ have\ )?(?:instructed|directed|told|required|requested|asked)\b
        .{0,40}\b(?:guideline|principle|instruction|system\ (?:prompt|message))
      | \b(?:according\ to|following|based\ on|in\ line\ with|per|under)\ (?:the|my|these|those|your)
        \ (?:given\ |provided\ |above\ |system\ )?(?:guidelines(?!\ (?:of|from|by|for|in|on|set|issued|published)\b)
          |principles?|system\ (?:prompt|message|instructions))\b
      | \bi\ (?:was|am|have\ been|['’]ve\ been)\ (?:instructed|told|directed|asked)\ (?:not\ )?to
        \ (?:be|give|answer|respond|write|keep|avoid)\b
      | \bmy\ (?:instructions|guidelines|system\ prompt)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""A response that speaks of having been given a principle."""

_QUOTED_WORDS = 8
"""A response that repeats this many consecutive words of its principle quotes it."""


def is_refusal(text: str) -> bool:
    """Whether a response opens by declining the request."""
    return _REFUSAL.match(text[:200]) is not None


def leaks_principle(text: str, principle: str | None = None) -> bool:
    """Whether a response speaks of its principle, or quotes eight words of it in a row."""
    if _LEAKAGE.search(text) is not None:
        return True
    return principle is not None and not _ngrams(text, _QUOTED_WORDS).isdisjoint(_ngrams(principle, _QUOTED_WORDS))


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the word 3-grams of two texts, 0 to 1; of the words where a text is shorter than that."""
    size = 3 if min(len(a.split()), len(b.split())) >= 3 else 1
    first, second = _ngrams(a, size), _ngrams(b, size)
    return len(first & second) / len(first | second) if first or second else 1.0


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
    if filters.leakage and (leaks_principle(good.text, principles.good) or leaks_principle(bad.text, principles.bad)):
        return "principle leakage"
    if similarity(good.text, bad.text) >= filters.near_identical:
        return "near-identical responses"
    return None


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
    return special_token_reason((response.text for response in sampled if response is not None), prompts)


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


def special_token_reason(texts: Iterable[str], prompts: Prompts) -> str | None:
    """Why these completions must not be trained on (they would be read as containing special tokens), or None."""
    return "special tokens in a response" if any(prompts.contains_special(text) for text in texts) else None


def _ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
