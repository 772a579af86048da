"""Selection in a run: what is kept, dropped and counted, and against forwards of the generator written out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from builders import manifest, plain_logps, rows, run, samples
from conftest import QUERIES

from selfsteer.data.exchange import export
from selfsteer.given import train_pairs
from selfsteer.recipe.sections import Recipe
from selfsteer.store.folder import WouldReplace

RecipeOf = Callable[..., dict[str, Any]]
FAST = {
    "generator.objective": "l_plus",
    "generator.max_steps": 3,
    "generator.learning_rate": 1e-2,
    "quality.principle_consistency": False,
    "alignment.max_steps": 1,
}
"""L+ alone: a generator whose implicit reward tells good responses from bad ones after three steps."""


def reasons(folder: Path) -> dict[str, list[str]]:
    """Query ids by the reason they were dropped for."""
    found: dict[str, list[str]] = {}
    for line in (folder / "round-1/5-selection/dropped.jsonl").read_text().splitlines():
        item = json.loads(line)
        found.setdefault(item["reason"], []).append(item["id"])
    return found


def implicit_reward(folder: Path, row: dict[str, Any], side: str) -> float:
    """0.1 * log(pi_generator / pi_ref) of a response given the bare query, by plain forwards."""
    after, _ = plain_logps(str(folder / "round-1/4-generator/model"), row, side)
    return 0.1 * (after - row[f"ref_{side}_logps"])


def margin(folder: Path, row: dict[str, Any]) -> float:
    return implicit_reward(folder, row, "chosen") - implicit_reward(folder, row, "rejected")


@pytest.fixture(scope="module")
def plain(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(recipe_of(folder, FAST | {"queries.holdout": 2}))
    return folder


def test_the_top_share_by_implicit_margin_aligns_the_policy(plain: Path, recipe_of: RecipeOf, tmp_path: Path):
    """Half of four pairs, the two with the largest margins; held-out queries are neither judged nor dropped."""
    changes = FAST | {"queries.holdout": 2, "selection.top_share": 0.5}
    found = run(recipe_of(tmp_path / "run", changes))
    every = rows(tmp_path / "run", "5-preferences")
    assert every == rows(plain, "5-preferences"), "the data of the round is what it was"
    trained = {row["query_id"] for row in rows(plain, "2-responses")}
    candidates = {row["query_id"]: margin(tmp_path / "run", row) for row in every if row["query_id"] in trained}
    kept = [row["query_id"] for row in rows(tmp_path / "run", "5-selection")]
    best = sorted(candidates, key=lambda key: -candidates[key])[: -(-len(candidates) // 2)]
    assert sorted(kept) == sorted(best)
    assert reasons(tmp_path / "run") == {"small margin": [key for key in candidates if key not in kept]}
    sealed = manifest(tmp_path / "run", "5-selection")
    assert (sealed["wanted"], sealed["kept"]) == (len(candidates), len(kept))
    assert manifest(tmp_path / "run", "6-policy")["kept"] == len(kept)
    (this,) = found["rounds"]
    assert this["stages"]["5-selection"]["dropped"] == {"small margin": len(candidates) - len(kept)}
    assert this["alignment"]["pairs"] == len(every), "measured before the selection"
    assert this["selected"]["pairs"] == len(kept)
    assert found["run"]["pairs"].endswith("5-selection/data.parquet")
    exported = export(tmp_path / "run", tmp_path / "out", "jsonl", keep_truncated=True)
    assert exported.written == len(kept)


def test_without_a_rule_there_is_no_selection(plain: Path):
    assert not (plain / "round-1/5-selection").exists()


def test_reversed_pairs_go_and_near_ones_are_turned(plain: Path, recipe_of: RecipeOf, tmp_path: Path):
    """Bounds between the margins of the plain run: the lowest is reversed or not; those within the median are shortened."""
    margins = {row["query_id"]: margin(plain, row) for row in rows(plain, "5-preferences")}
    within = sorted(map(abs, margins.values()))[len(margins) // 2]
    run(recipe_of(tmp_path / "run", FAST | {"selection.drop_reversed": True, "selection.shorter_within": within * 1.0001}))
    kept = {row["query_id"]: row for row in rows(tmp_path / "run", "5-selection")}
    turned = 0
    for row in rows(tmp_path / "run", "5-preferences"):
        value = margin(tmp_path / "run", row)
        near = abs(value) <= within * 1.0001
        if value < 0 and not near:
            assert row["query_id"] not in kept
            continue
        found = kept[row["query_id"]]
        turns = near and row["rejected_tokens"] < row["chosen_tokens"]
        turned += turns
        assert found["chosen"] == row["rejected" if turns else "chosen"]
        assert found["ref_chosen_logps"] == row["ref_rejected_logps" if turns else "ref_chosen_logps"]
    assert turned, "the test has something to say"


def test_best_and_near_worst_of_three_samples(plain: Path, recipe_of: RecipeOf, tmp_path: Path):
    """The first sample is that of a run without more; of three bad ones the worst is taken: the target is below."""
    folder = tmp_path / "run"
    found = run(recipe_of(folder, FAST | {"queries.holdout": 2, "selection.samples": 3}))
    every = rows(folder, "5-preferences")
    by_query: dict[str, list[dict[str, Any]]] = {}
    for row in every:
        by_query.setdefault(row["query_id"], []).append(row)
    trained = {row["query_id"] for row in rows(plain, "2-responses")}
    assert {key: len(each) for key, each in by_query.items()} == {key: 3 if key in trained else 1 for key in by_query}
    assert len(by_query) == len(QUERIES)
    assert [each[0] for each in by_query.values()] == rows(plain, "5-preferences")
    keys = samples(folder, "5-preferences")
    assert len(keys) == len(set(keys))
    kept = {row["query_id"]: row for row in rows(folder, "5-selection")}
    for query, row in kept.items():
        best = max(by_query[query], key=lambda each: implicit_reward(folder, each, "chosen"))
        worst = min(by_query[query], key=lambda each: implicit_reward(folder, each, "rejected"))
        assert (row["chosen"], row["chosen_seed"]) == (best["chosen"], best["chosen_seed"])
        assert (row["rejected"], row["rejected_seed"]) == (worst["rejected"], worst["rejected_seed"])
        assert row["ref_rejected_logps"] == worst["ref_rejected_logps"]
    assert any(row["chosen_seed"] != by_query[key][0]["chosen_seed"] for key, row in kept.items())
    dropped = reasons(folder)
    assert len(kept) + sum(map(len, dropped.values())) == 3 * len(trained)
    assert len(dropped["other samples were taken"]) == 2 * len(kept)
    assert found["rounds"][0]["policy"]["steps"] == 1


def test_a_judge_selects_and_is_not_asked_twice(given: Path, tiny_folder: str, recipe_of: RecipeOf, tmp_path: Path):
    """Pairs made elsewhere have no generator; what the judge said for the measures is taken over."""
    judge = {"kind": "llm", "model": tiny_folder}
    selection = {"by": "judge", "top_share": 0.5}
    changes = {"judge": judge, "selection": selection, "alignment.max_steps": 1}
    train_pairs(given, Recipe.model_validate(recipe_of(tmp_path / "run", changes)))
    assert samples(tmp_path / "run", "5-selection") == samples(tmp_path / "run", "5-quality") != []
    own = list((tmp_path / "run/round-1/5-selection/parts").glob("main-*.jsonl"))
    assert not any(part.read_text() for part in own)
    verdicts = pq.read_table(tmp_path / "run/round-1/5-quality/verdicts.parquet").to_pylist()
    probability = {row["query_id"]: row["chosen_first"] + row["chosen_second"] for row in verdicts if row["by"] == "judge"}
    assert [row["query_id"] for row in rows(tmp_path / "run", "5-selection")] == [
        max(probability, key=probability.__getitem__)
    ]


def test_a_selection_that_would_align_the_policy_anew_is_refused_before_the_judge_is_asked(
    given: Path, tiny_folder: str, recipe_of: RecipeOf, tmp_path: Path
):
    changes = {"judge": {"kind": "llm", "model": tiny_folder}, "alignment.max_steps": 1}
    train_pairs(given, Recipe.model_validate(recipe_of(tmp_path / "run", changes)))
    selecting = recipe_of(tmp_path / "run", {**changes, "selection": {"by": "judge", "top_share": 0.5}})
    with pytest.raises(WouldReplace, match=r"6-policy would be made again; a model would go"):
        train_pairs(given, Recipe.model_validate(selecting))
    assert samples(tmp_path / "run", "5-selection") == []


def test_without_a_generator_its_rewards_select_nothing(given: Path, recipe_of: RecipeOf, tmp_path: Path):
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"selection.top_share": 0.5}))
    with pytest.raises(ValueError, match=r"set selection\.by=judge"):
        train_pairs(given, recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection.top_share": 0.5, "generator.kind": "none"}, "needs a generator"),
        ({"selection": {"by": "judge", "drop_reversed": True}}, "needs a judge"),
        ({"selection": {"by": "judge", "samples": 2}}, "ranked one by one"),
        ({"selection": {"min_margin": 0.0, "top_share": 0.5}}, "two bounds"),
        ({"selection.samples": 2, "responses.temperature": 0}, "the same one"),
    ],
)
def test_what_cannot_be_selected_is_refused(changes: dict[str, Any], message: str, recipe_of: RecipeOf, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(recipe_of(tmp_path / "run", changes))
