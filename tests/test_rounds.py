"""Several rounds: their queries, their reference, what ends them, and kills on the way."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from builders import THROUGH, children, plain_logps
from safetensors.torch import load_file

import selfsteer
from selfsteer import cli
from selfsteer.pipeline import GateFailed
from selfsteer.recipe.sections import Recipe
from selfsteer.stages.status import status

RecipeOf = Callable[..., dict[str, Any]]
ROUNDS = (1, 2, 3)
STAGES = ("1-principles", "2-responses", "3-steering", "5-preferences")


def rows(run: Path, number: int, stage: str) -> list[dict[str, Any]]:
    return pq.read_table(run / f"round-{number}" / stage / "data.parquet").to_pylist()


def ids(run: Path, number: int, stage: str) -> set[str]:
    return {row["query_id"] for row in rows(run, number, stage)}


def history(run: Path, number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"round-{number}/6-policy/history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Any]]:
    """Eleven queries and one that is unusable, two of them held out: three for each of three rounds."""
    path = tmp_path_factory.mktemp("eleven") / "queries.jsonl"
    path.write_text("".join(json.dumps({"query": f"What is {number}?"}) + "\n" for number in range(11)) + '{"query": ""}\n')
    changes = {
        "rounds": 3,
        "queries": {"path": str(path), "holdout": 2, "split_rounds": True},
        "generator.max_steps": 1,
        "alignment": {"learning_rate": 1e-2, "batch_size": 8, "max_steps": 2, "reference": "first", "weighting": "wpo"},
        "quality.principle_consistency": False,
    }
    return lambda folder: recipe_of(folder, changes)


@pytest.fixture(scope="module")
def three(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "run"
    selfsteer.run(Recipe.model_validate(recipe(folder)))
    return folder


def test_each_round_has_a_share_of_its_own_and_the_held_out_queries(three: Path):
    asked = [ids(three, number, "1-principles") for number in ROUNDS]
    trained = [ids(three, number, "2-responses") for number in ROUNDS]
    spared = set.intersection(*asked)
    assert len(spared) == 2
    assert [len(each) for each in trained] == [3, 3, 3]
    assert len(set.union(*trained)) == 9, "disjoint, and nothing left over"
    for every, own in zip(asked, trained, strict=True):
        assert every == own | spared
    for number in ROUNDS:
        assert spared <= ids(three, number, "5-preferences"), "pairs are made on them"
        sealed = json.loads((three / f"round-{number}/6-policy/MANIFEST.json").read_text())
        assert sealed["kept"] <= 3, "and none trains"
    dropped = [
        json.loads((three / f"round-{number}/1-principles/MANIFEST.json").read_text())["dropped"] for number in ROUNDS
    ]
    assert [sum(each.values()) for each in dropped] == [1, 0, 0], "the unusable query is named once"


def test_the_reference_is_the_first_policy_in_every_round(three: Path, tiny_folder: str):
    """The margin of round 2 before its first update: beta times how far its policy is from the first, by plain forwards."""
    assert history(three, 1)[0]["margin"] == 0.0
    spared = set.intersection(*(ids(three, number, "1-principles") for number in ROUNDS))
    gaps = []
    for row in rows(three, 2, "5-preferences"):
        if row["query_id"] in spared:
            continue
        policy = str(three / "round-1/6-policy/model")
        assert row["ref_chosen_logps"] == pytest.approx(plain_logps(policy, row, "chosen")[0], rel=1e-5)
        ratios = [row[f"ref_{side}_logps"] - plain_logps(tiny_folder, row, side)[0] for side in ("chosen", "rejected")]
        gaps.append(ratios[0] - ratios[1])
    assert history(three, 2)[0]["margin"] == pytest.approx(0.1 * sum(gaps) / len(gaps), rel=1e-3, abs=1e-6)
    assert not math.isclose(history(three, 2)[0]["margin"], 0.0, abs_tol=1e-4)
    assert all(0 < step["weight"] < 1 for number in ROUNDS for step in history(three, number)), "alignment.weighting is wpo"
    assert "weight of a pair" in (three / "report.html").read_text()


def test_another_reference_changes_later_rounds_alone(three: Path, recipe: Any, tmp_path: Path):
    """Round 1 has but one policy; round 2 aligns anew, from the data that it has; round 3 starts from another policy."""
    run = Path(shutil.copytree(three, tmp_path / "run"))
    changed = recipe(run)
    changed["alignment"] = {**changed["alignment"], "reference": "round"}
    selfsteer.run(Recipe.model_validate({**changed, "rounds": 3}), replace=True)
    for number, stage, same in ((1, "6-policy", True), (2, "5-preferences", True), (2, "6-policy", False)):
        manifests = [(folder / f"round-{number}/{stage}/MANIFEST.json").read_bytes() for folder in (three, run)]
        assert (manifests[0] == manifests[1]) is same
    assert history(run, 2)[0]["margin"] == 0.0


def test_killed_in_the_second_round_and_continued(three: Path, recipe: Any, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path / "run")))
    places = ("round-2/2-responses", "round-2/4-generator", "round-2/6-policy")
    ended, said = children(path, *(f"2:SIGKILL:{place}" for place in places), THROUGH)
    assert [child.status for child in ended] == [-9] * len(places) + [0], said
    for number in ROUNDS:
        for stage in STAGES:
            assert rows(tmp_path / "run", number, stage) == rows(three, number, stage)
    weights = [load_file(run / "round-3/6-policy/model/model.safetensors") for run in (three, tmp_path / "run")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


# --- the end of the rounds -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lengths "grow" by more than -1000 tokens: round 2 is the end."""
    folder = tmp_path_factory.mktemp("ended")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(ending(recipe_of, folder / "run")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_configure_logging", lambda *, verbose: None)
        patch.setattr(sys, "argv", ["selfsteer", "run", str(folder / "recipe.yaml")])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 0, "a run that ends as its recipe says is complete"
    return folder / "run"


def ending(recipe_of: RecipeOf, folder: Path, **quality: Any) -> dict[str, Any]:
    chosen = {"stop_when": {"drift_length_chosen": "> -1000"}, "principle_consistency": False} | quality
    return recipe_of(folder, {"rounds": 3, "generator.max_steps": 1, "alignment.max_steps": 1, "quality": chosen})


def test_rounds_end_where_the_drift_says_so(ended: Path):
    """Round 2 keeps its data and its measures; the result, wherever it is named, is the policy of round 1."""
    metrics = json.loads((ended / "metrics.json").read_text())
    first, second = metrics["rounds"]
    assert "policy" in first
    assert "policy" not in second
    assert second["alignment"]["pairs"] > 0
    assert [each["passed"] for each in second["stop_when"]] == [True]
    run = metrics["run"]
    assert (run["policy_round"], run["policy_folder"]) == (1, str(ended / "round-1/6-policy/model"))
    assert run["ended"].startswith("round 2 did not align the policy: drift_length_chosen")
    assert run["ended"].endswith("is > -1000")
    card = (ended / "round-1/6-policy/model/README.md").read_text()
    assert "This is the policy of round 1 of 3. The rounds ended there, because round 2 did not align the policy:" in card
    assert "did not align the policy" in (ended / "report.html").read_text()
    assert not (ended / "round-2/6-policy").exists()
    found = status(ended)
    assert found["next"] == f"nothing: {run['ended']}"
    assert {stage["round"] for stage in found["stages"]} == {1, 2}
    assert {stage["state"] for stage in found["stages"]} == {"sealed"}


def test_a_condition_that_does_not_hold_lets_the_rounds_go_on(ended: Path, recipe_of: RecipeOf, tmp_path: Path):
    """`> 1000` never holds; the same folder goes on from round 2's data."""
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    before = (run / "round-2/5-preferences/MANIFEST.json").read_bytes()
    changed = ending(recipe_of, run, stop_when={"drift_length_chosen": "> 1000"}) | {"rounds": 2}
    metrics = selfsteer.run(Recipe.model_validate(changed))
    assert (run / "round-2/5-preferences/MANIFEST.json").read_bytes() == before
    assert metrics["run"]["policy_round"] == 2
    assert "ended" not in metrics["run"]
    assert status(run)["next"] == "nothing: the run is complete"


def test_a_gate_that_fails_in_a_later_round_leaves_the_policy_of_the_round_before(
    ended: Path, recipe_of: RecipeOf, tmp_path: Path
):
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    with pytest.raises(GateFailed, match="drift_length_chosen"):
        selfsteer.run(Recipe.model_validate(ending(recipe_of, run, gates={"drift_length_chosen": "<= -1000"})))
    facts = json.loads((run / "metrics.json").read_text())["run"]
    assert facts["policy_round"] == 1
    assert "is not <= -1000" in facts["ended"]
    assert "is not <= -1000" in (run / "round-1/6-policy/model/README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality.stop_when": {"drift_accuracy": "< 0"}}, "needs a judge"),
        ({"quality.stop_when": {"drift_on_polcy": "< 0"}}, "did you mean drift_on_policy"),
        ({"alignment.reference": "last"}, "expected 'round' or 'first'"),
    ],
)
def test_what_cannot_end_rounds_is_refused(changes: dict[str, Any], message: str, recipe_of: RecipeOf, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(recipe_of(tmp_path / "run", {"rounds": 2, **changes}))


def test_more_rounds_than_queries_are_refused(recipe_of: RecipeOf, tmp_path: Path):
    changes = {"rounds": 5, "queries.holdout": 2, "queries.split_rounds": True}
    with pytest.raises(ValueError, match="4 queries to train on are too few for 5 rounds"):
        selfsteer.run(Recipe.model_validate(recipe_of(tmp_path / "run", changes)))
