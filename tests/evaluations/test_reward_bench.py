"""The numbers of RewardBench, RewardBench 2 and LLMBar, by hand."""

import math
from typing import Any

import pytest

from selfsteer.evaluations.reward_bench import SECTIONS, Benchmark, Item, read_benchmark, report, ties_score

PROMPT = ({"role": "user", "content": "x"},)


def pair(subset: str, number: int = 1) -> dict[str, Any]:
    return {"prompt": "x", "chosen": "good", "rejected": "bad", "subset": subset, "id": number}


def item(id: str, correct: int, responses: int, subset: str = "Ties") -> Item:
    return Item(id=id, subset=subset, prompt=PROMPT, responses=tuple("abcdefgh"[:responses]), correct=correct)


def test_sections_weigh_their_subsets():
    """All right but math-prm: Reasoning (6 * 164) / (984 + 6 * 164) = 1/2, the score (1 + 1 + 1 + 1/2) / 4."""
    names = [name for sizes in SECTIONS.values() for name in sizes]
    benchmark = read_benchmark([pair(name) for name in names], "file")
    assert benchmark.format == "rewardbench"
    found = report(benchmark, [(0.0, 1.0) if name == "math-prm" else (1.0, 0.0) for name in names])
    assert {name: section.mean for name, section in found.sections.items()} == {
        "Chat": pytest.approx(1.0),
        "Chat Hard": pytest.approx(1.0),
        "Safety": pytest.approx(1.0),
        "Reasoning": pytest.approx(0.5),
    }
    assert found.score is not None
    assert found.score.mean == pytest.approx(0.875)


def test_a_missing_subset_leaves_its_section_and_the_score_out():
    benchmark = read_benchmark([pair(name) for name in SECTIONS["Safety"]], "file")
    found = report(benchmark, [(1.0, 0.0)] * 5)
    assert set(found.sections) == {"Safety"}
    assert found.score is None
    assert "hep-rust" in found.missing


def test_what_was_not_scored_leaves_the_score_out():
    benchmark = read_benchmark([pair("a", 1), pair("a", 2), pair("a", 3)], "file")
    found = report(benchmark, [(1.0, 0.0), None, (2.0, 2.0)])
    assert (found.items, found.of, found.ties, found.score) == (2, 3, 1, None)
    assert found.subsets["a"].mean == 0.5, "equal scores are no hit"


def test_best_of_four_shares_a_tie():
    """Alone at the top: 1; one of two at the top: 1/2; not at the top: 0."""
    rows = [
        {"prompt": "x", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math", "id": str(i), "num_correct": 1}
        for i in range(3)
    ]
    found = report(read_benchmark(rows, "file"), [(3, 1, 2, 0), (3, 3, 2, 0), (1, 3, 2, 0)])
    assert found.format == "rewardbench2"
    assert found.subsets["Math"].mean == pytest.approx(0.5)
    assert found.score is None
    assert found.missing == ["Factuality", "Precise IF", "Safety", "Focus", "Ties"]


def test_ties_by_hand():
    """ref:1 gap 2, ref:2 gap -1. tied:1 right 5 and 4, wrong 1: gap 3, spread 1. tied:2 right 4 and 2, wrong 1: gap 1,
    spread 2.

    tied right 1, ref right 1/2; gap above spread: tied:1 only, 1/2; smaller gap (2, -1) above spread (1, 2): 1/2.
    0.3 + 0.15 + 0.1 + 0.1 + 0.01 * (tanh(2 - 1) + tanh(-1/2 - 1)) / 2
    """
    scored = [
        (item("ref:1", 1, 2), (3.0, 1.0)),
        (item("ref:2", 1, 2), (1.0, 2.0)),
        (item("tied:1", 2, 3), (5.0, 4.0, 1.0)),
        (item("tied:2", 2, 3), (4.0, 2.0, 1.0)),
    ]
    wanted = 0.65 + 0.01 * (math.tanh(1) + math.tanh(-1.5)) / 2
    assert ties_score(scored).mean == pytest.approx(wanted)
    with pytest.raises(ValueError, match="neither ref:N nor tied:N"):
        ties_score([(item("7", 1, 2), (3.0, 1.0))])


def test_rewardbench_2_is_the_mean_of_its_subsets():
    """Five subsets with one hit each, and Ties of right answers alike: 0.3 + 0.3 + 0.2 + 0.2 + 0.01 tanh(inf)."""
    items = [item(str(i), 1, 4, name) for i, name in enumerate(("Factuality", "Precise IF", "Math", "Safety", "Focus"))]
    scores: list[tuple[float, ...]] = [(1, 0, 0, 0)] * 5
    items += [item("ref:1", 1, 2), item("tied:1", 2, 3)]
    scores += [(2, 1), (2, 2, 1)]
    found = report(Benchmark("rewardbench2", items), scores)
    assert found.subsets["Ties"].mean == pytest.approx(1.01)
    assert found.score is not None
    assert found.score.mean == pytest.approx((5 + 1.01) / 6)


def test_llmbar_and_kappa():
    """Labels 1 1 2 2, choices 1 2 2 2: agreed 3/4, by chance (2 * 1 + 2 * 3) / 16 = 1/2, kappa 1/2."""
    rows = [{"input": "x", "output_1": "a", "output_2": "b", "label": label} for label in (1, 1, 2, 2)]
    benchmark = read_benchmark(rows, "file")
    assert benchmark.items[2].responses == ("b", "a")
    found = report(benchmark, [(1, 0), (0, 1), (1, 0), (1, 0)])
    assert found.score is not None
    assert found.score.mean == 0.75
    assert found.kappa == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        ([{"prompt": "x", "chosen": "a"}], "row 1 has the keys"),
        ([pair("a"), {"input": "x", "output_1": "a", "output_2": "b", "label": 1}], "row 2 has the keys"),
        ([{"input": "x", "output_1": "a", "output_2": "b", "label": 0}], "label 0 is neither"),
        ([{"prompt": "x", "chosen": "a", "rejected": 3, "subset": "a"}], "row 1: a response is not a text"),
    ],
)
def test_what_is_refused(rows: list[dict[str, Any]], said: str):
    with pytest.raises(ValueError, match=said):
        read_benchmark(rows, "file")
