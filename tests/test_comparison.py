"""Arms side by side: what they share is made once, what they measure is of the held-out queries, by hand."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import QUERIES

from selfsteer import comparing
from selfsteer.comparing import ARMS, ArmRun, arm_recipe, check_arms, query_values, summarize
from selfsteer.measures.metrics import RoundMetrics
from selfsteer.measures.verdicts import Verdict
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.text import RecipeError
from selfsteer.records import Pair, side

RecipeOf = Callable[..., dict[str, Any]]
SERVER = {"kind": "openai", "base_url": "http://localhost:1/v1", "model": "large"}
JUDGE = {"kind": "llm", "model": "somewhere"}


def pair(query: str, chosen: float, rejected: float) -> Pair:
    """A pair of two-token responses with these summed log-probabilities."""
    sides = [replace(side("Yes."), logps=logps, tokens=2) for logps in (chosen, rejected)]
    return Pair(query_id=query, kind="alignment", prompt=(), chosen=sides[0], rejected=sides[1])


def test_values_by_hand():
    """exp(-2 / 2) = 0.368 and exp(-4 / 2) = 0.135; margin per token -1 - -2 = 1; a tie is half a win."""
    verdicts = {
        "judge": [
            Verdict(query_id="a", preferred="tie", longer=None),
            Verdict(query_id="b", preferred="chosen", longer=None),
        ]
    }
    values = query_values(iter([pair("a", -2, -4), pair("b", -9, -9)]), verdicts, frozenset("a"))
    assert values["on_policy_chosen"] == {"a": pytest.approx(math.exp(-1))}
    assert values["on_policy_all"] == {"a": pytest.approx((math.exp(-1) + math.exp(-2)) / 2)}
    assert values["margin_per_token"] == {"a": pytest.approx(1.0)}
    assert values["accuracy"] == {"a": 0.5}
    assert values["overlap"] == {"a": 1.0}, "both say Yes."
    assert "repetition" not in values, "a word is no 3-gram"


def test_repetition_by_hand():
    """Of "to be or to be or": to be or, be or to, or to be, to be or: one of four was said before; the other says none."""
    both = pair("a", -2, -4)
    both = replace(both, chosen=replace(both.chosen, messages=side("To be or, to be or!").messages))
    assert query_values(iter([both]), {}, frozenset("a"))["repetition"] == {"a": 0.25}


def test_several_seeds_are_crossed_with_the_queries(recipe_of: RecipeOf, tmp_path: Path):
    """Query a: 0.4 and 0.6 under two seeds, so 0.5; the baseline has 0.2 of a and 0.9 of b: 0.3 apart. Then b as well, of
    which the seeds say 0.8 and 1.0: seeds that disagree by 0.2 on every query leave nearly all open, t(1) being 12.7."""
    recipe = Recipe.model_validate(recipe_of(tmp_path / "all", {"queries.holdout": 2}))

    def runs(*seeds: dict[str, float]) -> list[ArmRun]:
        return [ArmRun({"on_policy_all": values}, RoundMetrics(), []) for values in seeds]

    both = {"sso": runs({"a": 0.4}, {"a": 0.6}), "pbaa": runs({"a": 0.2, "b": 0.9}, {"a": 0.2, "b": 0.9})}
    found = summarize(recipe, both, [0, 1])["arms"]
    assert found["sso"]["measures"]["on_policy_all"].mean == pytest.approx(0.5)
    assert found["sso"]["measures"]["on_policy_all"].n == 1, "two seeds of one query are one query"
    assert found["sso"]["difference"]["on_policy_all"].mean == pytest.approx(0.3)
    assert "difference" not in found["pbaa"]
    wider = both | {"sso": runs({"a": 0.4, "b": 0.8}, {"a": 0.6, "b": 1.0})}
    found = summarize(recipe, wider, [0, 1])["arms"]["sso"]
    assert found["difference"]["on_policy_all"].mean == pytest.approx(0.15)
    low, high = found["difference"]["on_policy_all"][1:3]
    assert low is not None
    assert high is not None
    assert high - low > 1
    assert [each["difference"]["on_policy_all"].mean for each in found["by_seed"].values()] == pytest.approx([0.05, 0.25])


def test_the_win_rate_of_several_seeds_is_crossed_with_the_queries(recipe_of: RecipeOf, tmp_path: Path):
    """Wins on all of two queries under one seed and on none under the other: one half, and all is open, t(1) being 12.7.
    Without a query that both seeds have a verdict on there is no win rate."""
    recipe = Recipe.model_validate(recipe_of(tmp_path / "all", {"queries.holdout": 2}))

    def wins(**of_query: Any) -> list[Verdict]:
        return [Verdict(query_id=query, preferred=preferred, longer=None) for query, preferred in of_query.items()]

    def report(*seeds: list[Verdict]) -> Any:
        runs = [ArmRun({}, RoundMetrics(), verdicts) for verdicts in seeds]
        return summarize(recipe, {"sso": runs}, [*range(len(seeds))])["arms"]["sso"]["wins"]

    found = report(wins(a="chosen", b="chosen"), wins(a="rejected", b="rejected"))
    assert found["pairs"] == 4
    assert found["accuracy"] == (
        pytest.approx(0.5),
        pytest.approx(0.5 - 12.706 / 2, abs=0.01),
        pytest.approx(6.853, abs=0.01),
        2,
    )
    assert "accuracy" not in report(wins(a="chosen", b=None), wins(a=None, b="chosen"))
    assert report(wins(a="chosen", b="chosen"))["accuracy"].low < 1, "of one seed as of any pairs"


def test_an_arm_of_ones_own(recipe_of: RecipeOf, tmp_path: Path):
    changes = {"queries.holdout": 2, "compare.arms": {"gamma_1": {"generator.sft_weight": 1.0}}}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "all", changes))
    check_arms(recipe, ["pbaa", "gamma_1"], [0])
    assert arm_recipe(recipe, "gamma_1", 0).generator.sft_weight == 1.0
    with pytest.raises(ValueError, match=r"there is no arm gamma_2; arms: .*gamma_1"):
        check_arms(recipe, ["gamma_2"], [0])
    wrong = Recipe.model_validate(recipe_of(tmp_path / "all", {**changes, "compare.arms": {"sso": {}}}))
    with pytest.raises(ValueError, match=r"compare\.arms: sso is an arm already"):
        check_arms(wrong, ["pbaa"], [0])
    shared = recipe_of(tmp_path / "all", {**changes, "compare.arms": {"mine": {"policy.system_role": "user"}}})
    with pytest.raises(ValueError, match=r"compare\.arms: mine sets policy\.system_role, which all arms share"):
        check_arms(Recipe.model_validate(shared), ["mine"], [0])
    unknown = Recipe.model_validate(
        recipe_of(tmp_path / "all", {**changes, "compare.arms": {"mine": {"generator.beat": 1}}})
    )
    with pytest.raises(RecipeError, match=r"generator.beat"):
        check_arms(unknown, ["mine"], [0])


@pytest.mark.parametrize(
    ("arms", "changes", "message"),
    [
        (["pbba"], {}, "there is no arm pbba; arms: base, pbaa"),
        (["pbaa"], {"queries.holdout": 0}, "set queries.holdout"),
        (["pbaa", "dual"], {}, "needs training.lora"),
        (["given"], {}, "needs compare.given"),
        (["sso", "sso"], {}, "named twice"),
        (["pbaa", "cooler"], {"responses.temperature": 0.5}, "compare.cooler: 0.5 is not below"),
        (["pbaa", "cooler"], {"generator.temperature": 0.3}, "the other arms, 0.3"),
        (
            ["pbaa"],
            {"engine": SERVER, "generator.kind": "none", "judge": JUDGE, "compare.align": True},
            "can't hold the policies",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    recipe_of: RecipeOf, tmp_path: Path, arms: list[str], changes: dict[str, Any], message: str
):
    recipe = Recipe.model_validate(recipe_of(tmp_path / "all", {"queries.holdout": 2, **changes}))
    with pytest.raises(ValueError, match=message):
        check_arms(recipe, arms, [0])


def test_every_arm_changes_settings_that_exist(recipe_of: RecipeOf, tmp_path: Path):
    changes = {"queries.holdout": 2, "training.lora": {}, "compare.given": "pairs.jsonl"}
    check_arms(Recipe.model_validate(recipe_of(tmp_path / "all", changes)), list(ARMS), [0])


def test_arms_keep_no_rule_that_only_the_whole_recipe_can_follow(recipe_of: RecipeOf, tmp_path: Path):
    """A principle generator of its own, and what ends rounds: without a generator `on_policy_gain` is not measured."""
    changes = {
        "queries.holdout": 2,
        "rounds": 2,
        "principles": {"source": "generate", "engine": SERVER},
        "quality.stop_when": {"on_policy_gain": "< 0"},
    }
    recipe = Recipe.model_validate(recipe_of(tmp_path / "all", changes))
    check_arms(recipe, ["pbaa", "rlcd", "weak_principles"], [0])
    assert arm_recipe(recipe, "pbaa", 0).principles == recipe.principles
    assert arm_recipe(recipe, "weak_principles", 0).principles.engine is None, "the policy itself writes"


def keys(folder: Path, arm: str, stage: str) -> list[str]:
    """The samples that an arm made itself."""
    parts = (folder / f"{arm}-seed0/round-1/{stage}/parts").glob("main-*.jsonl")
    return [json.loads(line)["key"] for part in parts for line in part.read_text().splitlines()]


def test_arms_share_what_they_have_in_common(recipe_of: RecipeOf, tmp_path: Path, tiny_folder: str):
    folder = tmp_path / "all"
    changes = {
        "queries.holdout": 2,
        "training.lora": {"rank": 2},
        "generator.max_steps": 1,
        "alignment.max_steps": 1,
        "compare.align": True,
        "judge": {"kind": "llm", "model": tiny_folder},
    }
    recipe = Recipe.model_validate(recipe_of(folder, changes))
    result = comparing.compare(recipe, ["base", "pbaa", "sso", "dual"], [0])
    trained = len(QUERIES) - 2
    assert len(keys(folder, "pbaa", "2-responses")) == 2 * len(QUERIES) + 2, "and y_o of the held-out ones, unrelated"
    assert len(keys(folder, "sso", "2-responses")) == trained, "y_o alone: y+ and y- are pbaa's"
    assert keys(folder, "dual", "2-responses") == keys(folder, "dual", "3-steering") == []
    manifests = [folder / f"{arm}-seed0/round-1/3-steering/MANIFEST.json" for arm in ("sso", "dual")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes(), "the sealed stage was taken over"
    assert len(keys(folder, "dual", "7-answers")) < len(keys(folder, "pbaa", "7-answers")), "the first policy answers once"
    for arm in ("pbaa", "sso", "dual"):
        found = result["arms"][arm]
        assert found["queries"] <= 2
        assert {"on_policy_all", "accuracy", "principle_consistency"} <= found["measures"].keys()
        assert found["wins"]["pairs"] == 2
    assert result["arms"]["sso"]["difference"]["on_policy_all"].n <= 2
    assert json.loads((folder / "comparison.json").read_text())["arms"].keys() == result["arms"].keys()
    assert "| dual |" in (folder / "comparison.md").read_text()
    before = sorted((file, file.stat().st_mtime_ns) for file in folder.glob("*/round-1/*/MANIFEST.json"))
    comparing.compare(recipe, ["pbaa", "sso", "dual"], [0])
    assert before == sorted((file, file.stat().st_mtime_ns) for file in folder.glob("*/round-1/*/MANIFEST.json"))


def test_without_alignment_pairs_are_made_for_the_held_out_queries_alone(recipe_of: RecipeOf, tmp_path: Path):
    folder = tmp_path / "all"
    recipe = Recipe.model_validate(recipe_of(folder, {"queries.holdout": 2, "generator.max_steps": 1}))
    comparing.compare(recipe, ["pbaa", "sso"], [0])
    for arm in ("pbaa", "sso"):
        assert json.loads((folder / f"{arm}-seed0/round-1/5-preferences/MANIFEST.json").read_text())["wanted"] == 2
    assert len(keys(folder, "pbaa", "2-responses")) == 2 * 2
    assert len(keys(folder, "sso", "2-responses")) == 3 * (len(QUERIES) - 2)
    data = json.loads((folder / "sso-seed0/round-1/4-generator/MANIFEST.json").read_text())
    assert data["wanted"] > 2, "the generator trains on the others"
