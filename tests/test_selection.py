import pytest

from selfsteer.pairs import pair_row
from selfsteer.records import Dropped, Message, PairRow, PreferencePair
from selfsteer.selection import (
    Picked,
    Sample,
    best_and_near_worst,
    margin_reason,
    prefer_shorter,
    reversed_reason,
    select,
    top_share,
    turned,
)
from selfsteer.verdicts import Orders, by_orders, failure


def pair(query_id: str = "q", chosen: str = "a longer answer", rejected: str = "short") -> PreferencePair:
    return PreferencePair(
        query_id=query_id,
        kind="alignment",
        prompt=(Message(role="user", content="Why?"),),
        chosen=chosen,
        rejected=rejected,
        chosen_finish="length",
    )


def row(query_id: str = "q", **columns: object) -> PairRow:
    made = pair_row(pair(query_id))
    made.update(columns)  # type: ignore[typeddict-item]
    return made


def test_pairs_that_the_judge_reverses_are_dropped_with_the_reason():
    """Both orders for rejected: reversed. Orders that disagree are a tie, and an error is no verdict: both are kept."""
    pairs = [pair(name) for name in "abcd"]
    verdicts = [
        by_orders(pairs[0], Orders(0.9, 0.8)),
        by_orders(pairs[1], Orders(0.2, 0.1)),
        by_orders(pairs[2], Orders(0.9, 0.1)),
        failure(pairs[3], "unreadable"),
    ]
    kept = list(select(map(pair_row, pairs), map(reversed_reason, verdicts)))
    assert [isinstance(item, Dropped) for item in kept] == [False, True, False, False]
    assert kept[1] == Dropped(id="b", reason="order reversed by the judge")


def test_no_row_goes_without_an_answer():
    with pytest.raises(ValueError, match="argument"):
        list(select([row()], []))


def test_pairs_are_kept_by_margin():
    """The top half of 4, 1, 3, 2 begins at 3."""
    margins = [4.0, 1.0, 3.0, 2.0]
    bound = top_share(margins, 0.5)
    assert bound == 3.0
    assert [margin_reason(margin, at_least=bound) for margin in margins] == [None, "small margin", None, "small margin"]


@pytest.mark.parametrize(("share", "n", "kept"), [(0.1, 30, 3), (0.1, 31, 4), (1.0, 7, 7), (0.01, 5, 1)])
def test_top_share_rounds_up(share: float, n: int, kept: int):
    margins = [float(number) for number in range(n)]
    assert sum(margin >= top_share(margins, share) for margin in margins) == kept


@pytest.mark.parametrize(("margins", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.5)])
def test_impossible_shares_are_refused(margins: list[float], share: float):
    with pytest.raises(ValueError, match="share"):
        top_share(margins, share)


def test_turning_exchanges_every_column_of_the_responses():
    made = row(
        ref_chosen_logps=-1.0, ref_rejected_logps=-2.0, chosen_tokens=9, rejected_tokens=3, chosen_seed=7, rejected_seed=8
    )
    found = turned(made)
    assert (found["chosen"][0]["content"], found["rejected"][0]["content"]) == ("short", "a longer answer")
    assert (found["chosen_finish"], found["rejected_finish"]) == ("stop", "length")
    assert (found["ref_chosen_logps"], found["ref_rejected_logps"]) == (-2.0, -1.0)
    assert (found["chosen_tokens"], found["rejected_tokens"]) == (3, 9)
    assert (found["chosen_seed"], found["rejected_seed"]) == (8, 7)  # type: ignore[typeddict-item]
    assert (found["prompt"], found["query_id"], found["kind"]) == (made["prompt"], "q", "alignment")
    assert turned(found) == made
    assert list(found) == list(made)


def test_the_shorter_of_near_equal_responses_is_chosen():
    made = row()
    assert prefer_shorter(made, 0.1, within=0.1)["chosen"][0]["content"] == "short"
    assert prefer_shorter(made, -0.1, within=0.1)["chosen"][0]["content"] == "short"
    assert prefer_shorter(made, 0.2, within=0.1) == made
    in_tokens = row(chosen_tokens=2, rejected_tokens=5)
    assert prefer_shorter(in_tokens, 0.0, within=0.1) == in_tokens


def test_of_few_samples_the_worst_is_rejected():
    """Scores 1 to 5: mean 3, deviation 1.414, so 3 - 2 * 1.414 = 0.17 lies below all."""
    samples = [Sample(score, 10) for score in (3.0, 5.0, 1.0, 4.0, 2.0)]
    assert best_and_near_worst(samples) == Picked(chosen=1, rejected=2)


def test_of_many_samples_the_near_worst_is_rejected():
    """One wreck of -10, 48 between 0 and 1, one 2: mean 0.32, deviation 1.55, target -2.78; nearer to 0 than to -10."""
    scores = [-10.0, *(number % 2 for number in range(48)), 2.0]
    picked = best_and_near_worst([Sample(score, 10) for score in scores])
    assert picked is not None
    assert picked.chosen == 49
    assert scores[picked.rejected] == 0.0
    assert best_and_near_worst([Sample(score, 10) for score in scores], deviations=5.0) == Picked(49, 0)


def test_the_shortest_of_the_near_best_is_chosen_and_none_of_them_rejected():
    samples = [Sample(1.0, 50), Sample(0.95, 20), Sample(0.5, 5)]
    assert best_and_near_worst(samples, within=0.1) == Picked(chosen=1, rejected=2)
    assert best_and_near_worst(samples[:2], within=0.1) is None
    assert best_and_near_worst([Sample(1.0, 5), Sample(1.0, 6)]) is None
    assert best_and_near_worst([]) is None
