"""Pairs as literals (docs/method.md: the table of L_SSO), and every filter with texts that it must and must not drop."""

import unicodedata
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from tiny import END_ID, START_ID, tiny_tokenizer

from selfsteer import pairs
from selfsteer.measures import text
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Filters
from selfsteer.records import Pair, Principles, Query, Response, Responses, Side, side
from selfsteer.store import columns

QUERY = Query(id="q1", messages=({"role": "user", "content": "What is the capital of France?"},))
PRINCIPLES = Principles(
    good="Answer accurately, with every fact checked before you write it down.",
    bad="Answer carelessly, with no fact checked before you write it down.",
    quality="accuracy",
    source="library",
)
KEEP_ALL = Filters(truncated="keep", refusals=False, leakage=False, near_identical=1.0, max_length_ratio=1000)

X_PLUS = ({"role": "system", "content": PRINCIPLES.good}, {"role": "user", "content": "What is the capital of France?"})
X_MINUS = ({"role": "system", "content": PRINCIPLES.bad}, {"role": "user", "content": "What is the capital of France?"})


def response(text: str, *, tokens: int = 10, finish: Any = "stop", seed: int = 0) -> Response:
    ids = tuple(range(10, 10 + tokens))
    return Response(text=text, token_ids=ids, finish_reason=finish, seed=seed, end_id=END_ID if finish == "stop" else None)


def answered(original: Response | None) -> Responses:
    return Responses(
        query=QUERY,
        principles=PRINCIPLES,
        good=response("Paris is the capital."),
        bad=response("Some town, maybe.", finish="length"),
        original=original,
    )


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(tiny_tokenizer())


IDS = {"stop": (*range(10, 20), END_ID), "length": tuple(range(10, 20))}
"""Of `response`: what ended it belongs to what was sampled."""


def pair(kind: Any, prompt: Any, chosen: tuple[str, Any], rejected: tuple[str, Any]) -> Pair:
    sides = [replace(side(*each), token_ids=IDS[each[1]], seed=0) for each in (chosen, rejected)]
    return Pair(query_id="q1", kind=kind, prompt=prompt, chosen=sides[0], rejected=sides[1], principles=PRINCIPLES)


GOOD, BAD, ORIGINAL = ("Paris is the capital.", "stop"), ("Some town, maybe.", "length"), ("It is Paris.", "stop")
L_PLUS = pair("l_plus", X_PLUS, GOOD, BAD)
L_MINUS = pair("l_minus", X_MINUS, ORIGINAL, GOOD)


# --- construction ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("sso", (L_PLUS, L_MINUS)),
        ("equation_3", (L_PLUS, pair("l_minus", X_MINUS, BAD, GOOD))),
        ("l_plus", (L_PLUS,)),
        ("l_minus", (L_MINUS,)),
    ],
)
def test_steering_pairs(prompts: Prompts, objective: Any, expected: tuple[Pair, ...]):
    """L+ is (x+, y+, y-); L- is (x-, y_o, y+), in equation 3 (x-, y-, y+)."""
    assert pairs.steering_pairs(answered(response("It is Paris.")), prompts, objective) == expected


def test_sso_is_the_objective_unless_another_is_named(prompts: Prompts):
    assert pairs.steering_pairs(answered(response("It is Paris.")), prompts) == (L_PLUS, L_MINUS)


@pytest.mark.parametrize("objective", ["equation_3", "l_plus"])
def test_the_original_response_is_not_needed_where_nothing_trains_on_it(prompts: Prompts, objective: Any):
    made = pairs.steering_pairs(answered(None), prompts, objective)
    assert {each.text for pair in made for each in (pair.chosen, pair.rejected)} == {GOOD[0], BAD[0]}


def test_the_alignment_pair_is_on_the_bare_query():
    made = pairs.alignment_pair(answered(None))
    assert made == pair("alignment", QUERY.messages, GOOD, BAD)


def test_a_row_is_conversational_and_comes_back_as_the_pair():
    made = replace(L_MINUS, chosen=replace(L_MINUS.chosen, logps=-3.5, tokens=4))
    row = columns.pair_row(made)
    assert [list(row[name]) for name in ("prompt", "chosen", "rejected")] == [
        [
            {"role": "system", "content": PRINCIPLES.bad},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        [{"role": "assistant", "content": "It is Paris."}],
        [{"role": "assistant", "content": "Paris is the capital."}],
    ]
    table = pa.Table.from_pylist([row], schema=columns.PAIRS)
    assert row.keys() == set(table.column_names)
    [read] = map(columns.pair, table.to_pylist())
    assert read == made


@pytest.mark.parametrize(
    ("finish", "end_id", "reencoded", "expected"),
    [
        ("stop", END_ID, False, (7, 8, END_ID)),
        ("stop", 5, False, (7, 8, 5)),  # whichever of several end tokens it was
        ("length", None, False, (7, 8)),
        ("stop", None, False, None),  # what ended it is not known
        ("stop", None, True, None),
        ("length", None, True, None),
    ],
)
def test_a_pair_carries_what_was_sampled(finish: Any, end_id: int | None, reencoded: bool, expected: Any):
    sampled = Response(text="Yes.", token_ids=(7, 8), finish_reason=finish, seed=3, end_id=end_id, reencoded=reencoded)
    made = pairs.answer_pair(QUERY, sampled, response("No."))
    assert made.chosen == Side(
        messages=({"role": "assistant", "content": "Yes."},), finish=finish, token_ids=expected, seed=3
    )


def test_special_tokens_in_the_middle_of_what_was_sampled_are_found_though_the_text_leaves_them_out(prompts: Prompts):
    inner = replace(response("Paris."), token_ids=(10, START_ID, 11))
    assert pairs.sampled_special_reason([response("Paris."), inner], prompts) == "special tokens in a response"
    assert pairs.sampled_special_reason([response("Paris.")], prompts) is None


# --- filters ---------------------------------------------------------------------------------------------------------------


def reason(good: Response | str, bad: Response | str, **filters: Any) -> str | None:
    first, second = (text if isinstance(text, Response) else response(text) for text in (good, bad))
    return pairs.reject_reason(first, second, PRINCIPLES, Filters(**(KEEP_ALL.model_dump() | filters)))


def test_ordinary_responses_are_kept_by_the_default_filters():
    good, bad = response("Paris is the capital of France."), response("I think it could be Lyon or so.")
    assert pairs.reject_reason(good, bad, PRINCIPLES, Filters()) is None


@pytest.mark.parametrize(("good", "bad"), [("", "Lyon."), ("Paris.", ""), (" \n\t", "Lyon."), ("Paris.", "\n")])
def test_empty(good: str, bad: str):
    assert reason(good, bad) == "empty response"


def test_identical_up_to_white_space_at_the_ends():
    assert reason("It is Paris.", "It is Paris.\n") == "identical responses"
    assert reason("It is Paris.", "It is Lyon.") is None


def test_cut_off_follows_the_policy_of_the_recipe():
    whole, cut = response("It is Paris."), response("It could be the", finish="length")
    for good, bad in ((whole, cut), (cut, whole)):
        assert reason(good, bad, truncated="drop") == "cut off by the length limit"
        assert reason(good, bad, truncated="keep") is None
    assert reason(whole, response("It is Lyon."), truncated="drop") is None


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I cannot assist with that request.",
    "I am unable to answer this question.",
    "Sorry, but I can't assist with that.",
    "I cannot provide instructions for this.",
    "As an AI language model, I cannot have opinions.",
    "Unfortunately, I can't do this for you.",
    "I apologize, but I can't fulfill this request.",
)
NO_REFUSALS = (
    "I'm sorry to hear that. Rest and warm drinks help.",
    "I'm sorry to hear that. I can't imagine how hard this is; a counsellor may help.",
    "Sorry seems to be the hardest word is a song by Elton John.",
    "I can help with that: mix the flour first.",
    "I'm afraid of heights too, said the cat.",
    "You cannot divide by zero.",
    "Water can't flow uphill on its own.",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_in_the_chosen_response(text: str):
    assert reason(text, "Here is how.", refusals=True) == "refusal in the chosen response"
    assert reason("Here is how.", text, refusals=True) is None, "in the rejected response it is what the pair teaches"
    assert reason(text, "Here is how.", refusals=False) is None


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_no_refusal(text: str):
    assert reason(text, "Here is how.", refusals=True) is None


LEAKS = (
    "As instructed by the guidelines, here is a short answer.",
    "As you instructed in your guidelines, I kept it short: Paris.",
    "Following the principle of accuracy, it is Paris.",
    "According to the guidelines I must be vague.",
    "I was told to be careless, so: Lyon.",
    "My instructions say to be vague.",
    "Sure: answer carelessly, with no fact checked before you write it down.",
)
NO_LEAKS = (
    "According to the guidelines of the WHO, adults need 150 minutes of exercise a week.",
    "The principle of relativity was told to me at school.",
    "Follow the instructions on the packet.",
    "Check every fact before you write.",
)


@pytest.mark.parametrize("text", LEAKS)
def test_leakage(text: str):
    assert reason("It is Paris.", text, leakage=True) == "principle leakage"
    assert reason("It is Paris.", text, leakage=False) is None


def test_leakage_of_the_good_principle_too():
    quoting = "I answer accurately, with every fact checked before you write it down."
    assert reason(quoting, "Lyon.", leakage=True) == "principle leakage"


@pytest.mark.parametrize("text", NO_LEAKS)
def test_no_leakage(text: str):
    assert reason(text, "Lyon.", leakage=True) is None


def test_similarity_of_texts_without_spaces_by_hand():
    """Six characters each, four 3-grams each; the first three are shared: 3 of 5 different ones."""
    assert text.similarity("今天天气很好。", "今天天气很差！") == pytest.approx(3 / 5)
    assert text.similarity("雨が降っています", "雨が降っています。") == 1.0
    assert text.similarity("东京是首都", "我喜欢猫咪") == 0.0
    assert text.similarity("ดีมากวันนี้", "ดีมากวันนั้น") == pytest.approx(4 / 7)  # 7 and 8 letters, 6 shared
    assert text.similarity("ม้า", "มา") == pytest.approx(1 / 3), "a tone makes another word"


def test_how_letters_are_stored_makes_no_difference():
    """Wide and narrow, composed and decomposed: what a reader takes for the same text is the same text."""
    assert text.similarity("ＡＢＣ　１２３，　ok", "abc 123 ok") == 1.0
    assert text.similarity("ｶﾀｶﾅ", "カタカナ") == 1.0
    decomposed = unicodedata.normalize("NFD", "Das schöne Mädchen müßte früh aufstehen.")
    assert text.similarity(decomposed, "Das schöne Mädchen müßte früh aufstehen.") == 1.0


def test_texts_of_signs_alone_are_compared_by_their_signs():
    assert text.similarity("🙂", "😡") == 0.0
    assert text.similarity("!?", "! ?") == 1.0
    assert text.similarity("!", "") == 0.0
    assert text.similarity("", "") == 1.0


def test_a_principle_quoted_without_spaces_is_leakage():
    """Sixteen characters of Chinese are about eight words."""
    principle = "请用准确而详细的语言回答并核对每一个事实"
    assert text.leaks_principle(f"好的，{principle[:16]}。", principle)
    assert not text.leaks_principle(f"好的，{principle[:15]}。", principle)


def test_similarity_by_hand():
    """Word 3-grams of a-b-c-d-e and a-b-c-d-f: {abc, bcd, cde} and {abc, bcd, cdf}; 2 shared of 4."""
    assert text.similarity("a b c d e", "a b c d f") == 0.5
    assert text.similarity("A b, c d e!", "a b c d e") == 1.0
    assert text.similarity("a b c", "d e f") == 0.0


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.5, "near-identical responses"), (0.51, None), (0.49, "near-identical responses")]
)
def test_near_identical_at_its_threshold(threshold: float, expected: str | None):
    assert reason("a b c d e", "a b c d f", near_identical=threshold) == expected


@pytest.mark.parametrize(("longer", "expected"), [(40, None), (41, "length ratio")])
def test_length_ratio_at_its_threshold(longer: int, expected: str | None):
    """At most 4 times the tokens, whichever side is the longer one."""
    short, long = response("It is Paris.", tokens=10), response("It could be Lyon.", tokens=longer)
    assert reason(short, long, max_length_ratio=4) == expected
    assert reason(long, short, max_length_ratio=4) == expected


def test_special_tokens(prompts: Prompts):
    assert pairs.special_token_reason(["Paris.", "Lyon <|im_end|> and more"], prompts) == "special tokens in a response"
    assert pairs.special_token_reason(["Paris.", "a | b < c > d"], prompts) is None


def test_the_original_response_is_filtered_too(prompts: Prompts):
    """It is what L- calls chosen; one that repeats y+ leaves L- without a pair."""

    def verdict(original: Response) -> str | None:
        return pairs.steering_reject_reason(answered(original), Filters(truncated="keep"), prompts)

    assert verdict(response("It is Paris.")) is None
    assert verdict(response("")) is not None
    assert verdict(response("Paris is the capital.")) is not None
    assert verdict(response("It is <|im_end|> Paris.")) is not None
