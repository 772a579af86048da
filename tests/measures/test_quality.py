import math
import unicodedata
from dataclasses import replace

import numpy as np
import pytest

from selfsteer.measures.estimates import Estimate, mean_estimate, paired_difference, share_estimate
from selfsteer.measures.quality import compare, implicit_reward, measure
from selfsteer.measures.text import HASHES, near_repeats, ngram_hashes, script_mismatch, signature, words
from selfsteer.records import Message, Pair, PairKind, Side, side
from selfsteer.stages.base import measured
from selfsteer.store.columns import TEXTS, pair_row


def pair(chosen: str | Side, rejected: str | Side, *, query: str = "Why?", kind: PairKind = "alignment") -> Pair:
    sides = [each if isinstance(each, Side) else side(each) for each in (chosen, rejected)]
    prompt = (Message(role="user", content=query),)
    return Pair(query_id="q", kind=kind, prompt=prompt, chosen=sides[0], rejected=sides[1])


def scored(chosen: tuple[float, int], rejected: tuple[float, int], query_id: str = "q") -> Pair:
    good = replace(side("a good answer"), logps=chosen[0], tokens=chosen[1])
    return replace(pair(good, replace(side("a bad one"), logps=rejected[0], tokens=rejected[1])), query_id=query_id)


def test_pairs_are_measured_without_token_ids_and_principles():
    one = scored((math.log(0.5), 1), (math.log(0.1), 2))
    row = pair_row(replace(one, chosen=replace(one.chosen, token_ids=(5,), seed=1), rejected=replace(one.rejected, seed=2)))
    some = {name: row[name] for name in TEXTS}
    assert not {"chosen_ids", "rejected_ids", "principles", "chosen_seed", "rejected_seed"} & some.keys()
    assert measured([some]) == measured([row])


def test_on_policy_probability_by_hand():
    """Means of log-probabilities: chosen log 0.5 and log 0.25, rejected log 0.1 twice.

    chosen (0.5 + 0.25) / 2 = 0.375, rejected 0.1, all 0.2375.
    """
    rows = [
        scored((4 * math.log(0.5), 4), (2 * math.log(0.1), 2)),
        scored((3 * math.log(0.25), 3), (5 * math.log(0.1), 5)),
    ]
    found = measure(rows)["on_policy"]
    assert found["chosen"].mean == pytest.approx(0.375)
    assert found["rejected"].mean == pytest.approx(0.1)
    assert found["all"].mean == pytest.approx(0.2375)
    assert found["all"].n == 2


def test_log_probabilities_are_counted_a_token():
    """-1 and -3 of chosen, -2 and -4 of rejected, over four bins from -4 to -1; of 4,000 values no more than 24."""
    rows = [scored((-4, 4), (-4, 2)), scored((-3, 1), (-4, 1))]
    found = measure(rows)["distributions"]["log_probability"]
    assert found["edges"] == pytest.approx([-4, -3.25, -2.5, -1.75, -1])
    assert found["counts"] == {"chosen": [0, 1, 0, 1], "rejected": [1, 0, 1, 0]}
    many = measure(rows * 1000)["distributions"]["log_probability"]
    assert len(many["edges"]) == 25
    assert sum(many["counts"]["chosen"]) == 2000


def test_margins_by_hand():
    """Sums: -2 - -6 = 4 and -9 - -3 = -6, mean -1; per token: -1 - -2 = 1 and -3 - -1 = -2, mean -0.5; one of two above.

    Length differences 2 - 3 = -1 and 3 - 3 = 0: two points, correlation -1.
    """
    margin = measure([scored((-2.0, 2), (-6.0, 3)), scored((-9.0, 3), (-3.0, 3))])["margin"]
    assert margin["sum"].mean == pytest.approx(-1.0)
    assert margin["per_token"].mean == pytest.approx(-0.5)
    assert margin["chosen_above"].mean == 0.5
    assert margin["length_correlation"] == pytest.approx(-1.0)


def test_lengths_are_words_without_tokens_and_tokens_with_them():
    in_words = measure([pair("one two three four", "one two"), pair("one", "one two three")])["length"]
    assert in_words["unit"] == "words"
    assert (in_words["chosen"].mean, in_words["rejected"].mean, in_words["ratio"]) == (2.5, 2.5, 1.0)
    assert in_words["chosen_longer"].mean == 0.5
    in_tokens = measure([scored((-1.0, 9), (-1.0, 3))])["length"]
    assert (in_tokens["unit"], in_tokens["chosen"].mean, in_tokens["ratio"]) == ("tokens", 9.0, 3.0)


def test_variety_by_hand():
    """chosen "a b a b a b": words 2 of 6 different; 2-grams ab ba ab ba ab, 2 of 5; 3-grams aba bab aba bab, 2 of 4.

    Its repetition is 1 - 2/4 = 0.5; the rejected response says nothing twice.
    """
    found = measure([pair("a b a b a b", "u v w x y z")])
    chosen, rejected = found["variety"]["chosen"], found["variety"]["rejected"]
    assert (chosen["distinct_1"], chosen["distinct_2"], chosen["distinct_3"]) == (2 / 6, 2 / 5, 2 / 4)
    assert chosen["repetition"].mean == 0.5
    assert rejected["distinct_3"] == 1.0
    assert found["variety_words"] == 6


def test_no_n_gram_crosses_responses():
    """Two responses of two words hold two 2-grams and no 3-gram."""
    found = measure([pair("a b", "c d"), pair("a b", "e f")])["variety"]["chosen"]
    assert found["distinct_2"] == 0.5
    assert "distinct_3" not in found
    assert "repetition" not in found


def test_distinct_n_is_taken_over_equally_many_words():
    """The longer side counts only as far as the shorter one goes, or length alone would lower it."""
    found = measure([pair("a b c a b c a b c", "d e f")])
    assert found["variety"]["chosen"]["distinct_1"] == 1.0
    assert found["variety_words"] == 3


def test_overlap_duplicates_and_dirt():
    rows = [
        pair("the same four words", "the same four words!"),
        pair(side("I'm sorry, I cannot help with that.", "length"), "As instructed by the guidelines: no."),
        pair("the same four words", "quite another text here"),
        pair("the same four words", "quite another text here"),
    ]
    found = measure(rows)
    assert found["near_identical"].mean == 0.25
    assert (found["repeated_pairs"], found["repeated_chosen"], found["repeated_rejected"]) == (1, 2, 1)
    assert (found["truncated"]["chosen"].mean, found["truncated"]["rejected"].mean) == (0.25, 0.0)
    assert (found["refusals"]["chosen"].mean, found["refusals"]["rejected"].mean) == (0.25, 0.0)
    assert (found["leakage"]["chosen"].mean, found["leakage"]["rejected"].mean) == (0.0, 0.25)


def test_what_was_not_measured_is_absent():
    assert measure([]) == {"pairs": 0}
    one = measure([pair("yes", "no")])
    assert one["length"]["chosen"] == Estimate(1.0, None, None, 1)
    assert "on_policy" not in one
    assert "margin" not in one
    given = [pair(side("yes", "length"), "no", kind="given")] * 3
    assert "truncated" not in measure(given), "nobody knows how they ended"
    assert measure([pair("yes", "no"), *given])["truncated"]["chosen"].mean == 0.0


def test_rows_without_scores_are_left_out_of_the_scores_only():
    found = measure([scored((-1.0, 1), (-2.0, 1)), pair("yes", "no")])
    assert found["pairs"] == 2
    assert found["on_policy"]["all"].n == 1
    assert found["length"]["unit"] == "words"


@pytest.mark.parametrize(("logps", "tokens"), [(math.nan, 3), (-math.inf, 3), (-1.0, 0)])
def test_impossible_scores_are_refused_by_name(logps: float, tokens: int):
    with pytest.raises(ValueError, match="query abc"):
        measure([scored((logps, tokens), (-1.0, 3), "abc")])


def test_implicit_reward_by_hand():
    """beta 0.5; chosen -10 -> -8: 0.5 * 2 = 1; rejected -9 -> -12: 0.5 * -3 = -1.5; margin 2.5.

    Before, chosen was the less probable one (margin -1); after, the more probable one (margin 4).
    """
    after = [scored((-8.0, 2), (-12.0, 3))]
    found = implicit_reward([scored((-10.0, 2), (-9.0, 3))], after, beta=0.5)
    assert (found["reward"]["chosen"].mean, found["reward"]["rejected"].mean) == (1.0, -1.5)
    assert found["reward"]["margin"].mean == 2.5
    assert (found["before"]["margin"].mean, found["before"]["accuracy"].mean) == (-1.0, 0.0)
    assert (found["after"]["margin"].mean, found["after"]["accuracy"].mean) == (4.0, 1.0)
    assert found["after"]["on_policy"]["chosen"].mean == pytest.approx(math.exp(-4))


def test_implicit_reward_refuses_scores_of_other_rows():
    with pytest.raises(ValueError, match="argument"):
        implicit_reward([scored((-1.0, 1), (-1.0, 1))], [], beta=0.1)
    assert implicit_reward([], [], beta=0.1) == {"pairs": 0, "beta": 0.1}


def test_compare_pairs_by_query():
    """q1: 0.5 - 0.25; q2 in the first set only; q3: mean(0.8, 0.6) - 0.6. Mean (0.25 + 0.1) / 2 = 0.175."""

    def row(query_id: str, probability: float) -> Pair:
        return scored((math.log(probability), 1), (math.log(0.1), 1), query_id)

    found = compare(
        [row("q1", 0.5), row("q2", 0.9), row("q3", 0.8), row("q3", 0.6)],
        [row("q3", 0.6), row("q1", 0.25)],
    )
    assert found["queries"] == 2
    assert found["chosen"].mean == pytest.approx(0.175)
    assert found["rejected"].mean == pytest.approx(0.0)
    assert compare([row("q1", 0.5)], [row("q2", 0.5)]) == {"queries": 0}


def test_wilson_interval_by_hand():
    """5 of 10, z = 1.96: middle 0.5, half-width 1.96 / 1.38415 * sqrt(0.025 + 0.0096036) = 0.26340."""
    found = share_estimate(5, 10)
    assert found is not None
    assert found.low == pytest.approx(0.23659, abs=1e-4)
    assert found.high == pytest.approx(0.76341, abs=1e-4)
    assert share_estimate(0, 10)[1] == 0.0  # type: ignore[index]
    assert share_estimate(0, 0) is None


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    """300 samples of 60 values of an exponential with mean 1: about 95% of the intervals hold 1 (93% for a skewed one)."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(300):
        found = mean_estimate(rng.exponential(size=60))
        assert found is not None
        held += found.low <= 1.0 <= found.high  # type: ignore[operator]
    assert 0.88 <= held / 300 <= 0.98


def test_intervals_are_seeded_and_the_two_methods_agree():
    values = np.random.default_rng(1).normal(size=5_000)
    bootstrap, again = mean_estimate(values), mean_estimate(values)
    assert bootstrap == again
    normal = mean_estimate(np.append(values, values.mean()))
    assert bootstrap is not None
    assert normal is not None
    assert bootstrap.low == pytest.approx(normal.low, abs=3e-3)
    assert bootstrap.high == pytest.approx(normal.high, abs=3e-3)


def test_paired_difference_is_narrower_than_the_values():
    """Queries differ widely, the difference is always 0.1: the interval has no width."""
    a = {str(i): float(i) + 0.1 for i in range(50)}
    b = {str(i): float(i) for i in range(50)}
    found = paired_difference(a, b)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert paired_difference(a, {}) is None


TEXT = [f"word{number}" for number in range(200)]


def altered(text_words: list[str], *places: int) -> list[str]:
    return [f"other{place}" if place in places else word for place, word in enumerate(text_words)]


def test_near_repeats_are_later_texts_that_overlap_enough():
    """200 words have 198 3-grams. Another word in the middle changes 3: overlap 195 / 201 = 0.970; ten of them: 168 / 228.

    The last word changes one: 197 / 199 = 0.990. Only the second and the third text repeat the first.
    """
    texts = [
        TEXT,
        altered(TEXT, 100),
        altered(TEXT, 199),
        altered(TEXT, *range(5, 195, 19)),
        altered(TEXT, *range(0, 200, 3)),
    ]
    signatures = b"".join(map(signature, texts))
    assert len(signatures) == 5 * HASHES
    assert near_repeats(signatures, 0.9) == 2
    assert near_repeats(signatures[:HASHES], 0.9) == 0
    assert near_repeats(b"", 0.9) == 0


def test_signatures_estimate_the_overlap():
    """Overlaps of 0.97, 0.83 and 0.48: bytes agree to that share and, of the others, by chance; error at most 0.044."""
    for changed, overlap in (((100,), 195 / 201), (range(10, 190, 30), 180 / 216), (range(3, 199, 9), 132 / 264)):
        one, other = (np.frombuffer(signature(text), np.uint8) for text in (TEXT, altered(TEXT, *changed)))
        assert abs((one == other).mean() - (overlap + (1 - overlap) / 256)) < 0.13


def test_signatures_repeat_and_short_texts_have_one():
    assert signature(["yes"]) == signature(["yes"]) != signature(["no"])
    assert signature(["a", "b"]) == signature(["b", "a"])
    assert near_repeats(signature(["yes"]) + signature(["no"]) + signature(["yes"]) + signature([]), 0.9) == 1
    assert signature(["fixed", "once", "and", "for", "all"]).hex()[:16] == "e12256b16d7d9940"


def test_ngram_hashes_tell_order_and_length_apart():
    assert len(ngram_hashes(TEXT, 3)) == len(set(ngram_hashes(TEXT, 3).tolist())) == 198
    assert ngram_hashes(["a", "b", "c"], 3) != ngram_hashes(["c", "b", "a"], 3)
    assert ngram_hashes(["a", "b"], 3).tolist() == ngram_hashes(["a", "b"], 2).tolist()
    assert ngram_hashes(["a", "b"], 3)[0] not in ngram_hashes(["a", "b", "c"], 3)
    assert ngram_hashes([], 3).tolist() == []


def test_near_repeats_across_pairs_are_measured_by_side():
    """Of four chosen, the second nearly repeats the first, the fourth the third word for word; the rejected differ."""
    chosen = [TEXT, altered(TEXT, 100), ["quite", "short"], ["quite", "short"]]
    rejected = [altered(TEXT, *range(start, 200, 4)) for start in range(4)]
    found = measure(pair(" ".join(good), " ".join(bad)) for good, bad in zip(chosen, rejected, strict=True))
    assert found["near_repeated"]["chosen"].mean == 0.5
    assert found["near_repeated"]["rejected"].mean == 0.0
    assert found["near_repeated"]["chosen"].n == 4


ENGLISH, RUSSIAN, CHINESE = "Where does the sun rise?", "Где восходит солнце?", "太阳从哪里升起来呢请你告诉我"
JAPANESE = "太陽はどこから昇りますか、教えてください"


@pytest.mark.parametrize(
    ("query", "response", "mismatch"),
    [
        (ENGLISH, "It rises in the east.", False),
        (ENGLISH, RUSSIAN, True),
        (RUSSIAN, "It rises in the east.", True),
        (CHINESE, "太阳从东方升起这是大家都知道的事情", False),
        (CHINESE, JAPANESE, True),
        (JAPANESE, "太陽は東から昇ります。毎朝見られます", False),
        (ENGLISH, "Ｉｔ ｒｉｓｅｓ ｉｎ ｔｈｅ ｅａｓｔ", False),
        (RUSSIAN, "Солнце восходит на востоке: print('east')", False),
        # Unseen, as the docstring says: another language in the same script.
        (ENGLISH, "Il se lève à l'est, comme toujours.", False),
        # Nothing to go by: too few letters, or a query that mixes scripts.
        (ENGLISH, "42 + 1 = 43", None),
        ("1 + 1 = ?", RUSSIAN, None),
        (f"Translate into English: {RUSSIAN}", RUSSIAN, None),
    ],
)
def test_script_mismatch(query: str, response: str, mismatch: bool | None):
    assert script_mismatch(query, response) is mismatch


def test_language_mismatch_counts_the_rows_that_can_be_told():
    rows = [
        pair("It rises in the east.", RUSSIAN, query=ENGLISH),
        pair("It rises in the east.", "42", query=ENGLISH),
    ]
    found = measure(rows)["language_mismatch"]
    assert (found["chosen"].mean, found["chosen"].n) == (0.0, 2)
    assert (found["rejected"].mean, found["rejected"].n) == (1.0, 1)
    assert "language_mismatch" not in measure([pair("It rises in the east.", RUSSIAN)])


def test_words_of_languages_without_spaces():
    assert words("Hello, World") == ("hello", "world")
    assert words("自转 ok") == ("自", "转", "ok")


def test_words_of_ascii_are_those_that_any_text_has():
    """One letter that is not ASCII, behind the text, has it split as all others are."""
    every = "".join(map(chr, range(128)))
    text = " ".join(f"{first}{second}x" for first in every for second in every)
    assert words(text) == words(f"{text} é")[:-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ไทยม้า", ("ไ", "ท", "ย", "ม้", "า")),
        ("ខ្ញុំ", ("ខ្", "ញុំ")),
        ("हिन्दी में", ("हिन्दी", "में")),  # vowel signs are no letters to `re`
        ("كَتَبَ", ("كَتَبَ",)),
        ("ＡＢ　１２", ("ab", "12")),
        ("ｶﾞｷﾞ", ("ガ", "ギ")),
        (unicodedata.normalize("NFD", "Mädchen 안녕 が"), ("mädchen", "안녕", "が")),
    ],
)
def test_marks_are_parts_of_words_and_widths_do_not_matter(text: str, expected: tuple[str, ...]):
    assert words(text) == expected
