"""Checks in the pipeline, on the tiny model: what is judged, sealed, reported, refused."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import file_rows, rows, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfsteer
from selfsteer import comparing
from selfsteer.given import train_pairs
from selfsteer.recipe.sections import Recipe, load

RecipeOf = Callable[..., dict[str, Any]]

LIMIT = 15
SHORT = {"name": "selfsteer:number_characters", "relation": "at most", "num_characters": LIMIT}
PRINCIPLES = [
    {"good": "Answer in a few words.", "bad": "Answer in many words.", "quality": "short", "check": SHORT},
    {
        "good": "Say it in no words.",
        "bad": "Say it in a word.",
        "check": {"name": "selfsteer:like", "pattern": "no such text"},
    },
    {"good": "Be good.", "bad": "Be bad."},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    queries = folder / "queries.jsonl"
    queries.write_text("".join(json.dumps({"query": f"Say something about {n}."}) + "\n" for n in range(36)))
    principles = folder / "principles.jsonl"
    principles.write_text("".join(json.dumps(row) + "\n" for row in PRINCIPLES))
    return {"queries.path": str(queries), "principles.path": str(principles)}


def checked(files: dict[str, str], **changes: Any) -> dict[str, Any]:
    fixed = {"principles.source": "file", "principles.concision": 0.5, "judge": {"kind": "checks"}}
    quality = {"quality.principle_consistency": False}
    return {**files, **fixed, **quality, "generator.max_steps": 1, "alignment.max_steps": 1, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf, files: dict[str, str]) -> Path:
    """A whole run of SSO, judged by checks, with 12 of 36 queries held out and up to 6 of those answered."""
    folder = tmp_path_factory.mktemp("checked") / "run"
    changes = {
        "queries.holdout": 12,
        "quality.answers": 6,
        "quality.gates": {"accuracy": ">= 0", "passes": ">= 0", "check_wins": ">= 0"},
        "training.warmup_ratio": 0,
        "alignment.learning_rate": 0.05,  # so that the answers change
    }
    run(recipe_of(folder, checked(files, **changes)))
    return folder


def test_held_out_queries_without_a_check_are_named_once_they_have_their_principles(
    recipe_of: RecipeOf, files: dict[str, str], tmp_path: Path
):
    """One held out, and one principle in 31 with a check: the policy is not asked anything."""
    principles = tmp_path / "principles.jsonl"
    without = [{"good": f"Be good in way {number}.", "bad": "Be bad."} for number in range(30)]
    principles.write_text("".join(json.dumps(row) + "\n" for row in [PRINCIPLES[0], *without]))
    changes = {"principles.path": str(principles), "queries.holdout": 1, "quality.answers": 1}
    with pytest.raises(ValueError, match=r"quality\.answers: none of the 1 held-out queries has a principle with checks"):
        run(recipe_of(tmp_path / "run", checked(files, **changes)))
    assert not (tmp_path / "run/round-1/2-responses").exists()


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["rounds"][0]


def short(text: str) -> bool:
    return 0 < len(text.strip()) <= LIMIT


def passes(row: dict[str, Any], text: str) -> bool:
    """By hand: one principle asks for at most LIMIT characters, the other for what no answer is."""
    return row["principles"]["good"].startswith(PRINCIPLES[0]["good"]) and short(text)


def with_checks(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in found if not row["principles"]["good"].startswith("Be good.")]


def test_every_row_of_every_stage_carries_the_checks(folder: Path):
    wanted = {row["good"]: [row["check"]] if "check" in row else [] for row in PRINCIPLES}
    for file in ("1-principles", "2-responses", "3-steering", "5-preferences"):
        for row in rows(folder, file):
            [good] = [good for good in wanted if row["principles"]["good"].startswith(good)]
            assert [json.loads(text) for text in row["principles"]["checks"]] == wanted[good]


@pytest.mark.parametrize(
    ("name", "file"), [("pbaa", "3-steering/policy-pairs.parquet"), ("alignment", "5-preferences/data.parquet")]
)
def test_accuracy_is_that_chosen_passes_and_rejected_does_not_a_tie_counting_half(folder: Path, name: str, file: str):
    held_out = {row["query_id"] for row in rows(folder, "5-preferences")}
    held_out -= {row["query_id"] for row in rows(folder, "3-steering")}
    judged = [row for row in file_rows(folder, file) if row["query_id"] in held_out]
    both = [
        (passes(row, row["chosen"][0]["content"]), passes(row, row["rejected"][0]["content"])) for row in with_checks(judged)
    ]
    found = metrics(folder)[name]
    assert found["judge"]["accuracy"]["mean"] == pytest.approx(sum((1 + c - r) / 2 for c, r in both) / len(both))
    assert found["judge"]["errors"] == ({"its principle has no check": n} if (n := len(judged) - len(both)) else {})
    checks = found["checks"]
    assert (checks["pairs"], checks["unchecked"]) == (len(both), len(judged) - len(both))
    for key, hits in {
        "chosen": sum(c for c, _ in both),
        "rejected": sum(r for _, r in both),
        "win": sum(c and not r for c, r in both),
        "loss": sum(r and not c for c, r in both),
        "both_fail": sum(not c and not r for c, r in both),
    }.items():
        assert checks[key]["mean"] == pytest.approx(hits / len(both)), key


def test_policy_and_generator_are_compared_on_the_same_held_out_queries(folder: Path):
    """Accuracy and on-policy probability of both, and the paired differences: by hand from the sealed rows."""
    trained = {row["query_id"] for row in rows(folder, "2-responses")}
    sets = {"pairs": "5-preferences/data.parquet", "baseline": "3-steering/policy-pairs.parquet"}
    found = {
        name: {row["query_id"]: row for row in file_rows(folder, file) if row["query_id"] not in trained}
        for name, file in sets.items()
    }
    assert all(row["ref_chosen_logps"] is not None for each in found.values() for row in each.values())
    shared = sorted(found["pairs"].keys() & found["baseline"].keys())
    assert len(shared) > 6, "of 12 held out"

    def points(row: dict[str, Any]) -> float:
        return (1 + passes(row, row["chosen"][0]["content"]) - passes(row, row["rejected"][0]["content"])) / 2

    def on_policy(row: dict[str, Any]) -> float:
        return sum(math.exp(row[f"ref_{side}_logps"] / row[f"{side}_tokens"]) for side in ("chosen", "rejected")) / 2

    def mean(values: Iterable[float]) -> Any:
        listed = list(values)
        return pytest.approx(sum(listed) / len(listed), rel=1e-5)

    judged = metrics(folder)["judged_comparison"]["judge"]
    checked = [query for query in shared if with_checks([found["pairs"][query]])]
    assert judged["difference"]["n"] == len(checked)
    compared = metrics(folder)["comparison"]
    assert (compared["held_out"], compared["queries"]) == (True, len(shared))
    for name, each in found.items():
        assert judged["both"][name]["mean"] == mean(points(each[query]) for query in checked)
        assert compared["both"][name]["mean"] == mean(on_policy(each[query]) for query in shared)
    assert judged["difference"]["mean"] == pytest.approx(
        judged["both"]["pairs"]["mean"] - judged["both"]["baseline"]["mean"]
    )


def test_held_out_answers_of_the_policy_train_nothing(folder: Path):
    spared = {row["query_id"] for row in file_rows(folder, "2-responses/held-out.parquet")}
    assert len(spared) == 12
    assert all(row["original"] is None for row in file_rows(folder, "2-responses/held-out.parquet"))
    for stage in ("2-responses", "3-steering"):
        assert spared.isdisjoint(row["query_id"] for row in rows(folder, stage))
    compared = spared.intersection(row["query_id"] for row in file_rows(folder, "3-steering/policy-pairs.parquet"))
    dropped = [json.loads(line) for line in (folder / "round-1/3-steering/held-out-dropped.jsonl").read_text().splitlines()]
    assert compared | {row["id"] for row in dropped} == spared
    assert len(compared) + len(dropped) == len(spared)
    assert all(row["reason"] for row in dropped)


def test_steering_pairs_are_judged_too_with_the_bare_answers_beside_them(folder: Path):
    steering = with_checks(rows(folder, "3-steering"))
    plus = [row for row in steering if row["kind"] == "l_plus"]
    minus = [row for row in steering if row["kind"] == "l_minus"]
    found = metrics(folder)["steering"]["checks"]
    assert found["chosen"]["mean"] == pytest.approx(
        sum(passes(row, row["chosen"][0]["content"]) for row in plus) / len(plus)
    )
    bare = [passes(row, row["chosen"][0]["content"]) for row in minus]  # y_o
    assert found["original"]["mean"] == pytest.approx(sum(bare) / len(bare))
    assert 0 < sum(bare) < len(bare), "the check tells nothing apart on the tiny model; change LIMIT"


def test_a_principle_whose_check_nothing_passes_is_reported_as_useless(folder: Path, caplog: pytest.LogCaptureFixture):
    listed = {each["principle"]: each for each in metrics(folder)["pbaa"]["checks"]["principles"]}
    useless = listed[PRINCIPLES[1]["good"]]
    assert useless["useless"].startswith("no chosen response and no rejected one of ")
    selfsteer.run(load(folder / "recipe.yaml"))  # a run that is complete says so again
    assert f"the principle {PRINCIPLES[1]['good']!r} tell nothing apart among the pbaa pairs: no chosen" in caplog.text


def test_held_out_answers_before_and_after_by_hand(folder: Path):
    sealed = rows(folder, "7-checks")
    preferences = {row["query_id"] for row in rows(folder, "3-steering")}
    assert 0 < len(sealed) <= 6
    assert not preferences & {row["query_id"] for row in sealed}, "answered on queries that trained the generator"
    found = metrics(folder)["answers"]
    assert found["queries"] == len(sealed)
    values = {which: [passes(row, row[which]["text"]) for row in sealed] for which in ("before", "after", "prompted")}
    for which, each in values.items():
        assert found["passing"][which]["mean"] == pytest.approx(sum(each) / len(each)), which
    change = [after - before for after, before in zip(values["after"], values["before"], strict=True)]
    assert found["passing"]["change"]["mean"] == pytest.approx(sum(change) / len(change))
    assert any(row["before"]["text"] != row["after"]["text"] for row in sealed), "the policy did not move"
    assert any(row["before"]["text"] != row["prompted"]["text"] for row in sealed), "the principle was not sent"
    assert {each["check"] for each in found["checks"]} <= {check for row in sealed for check in row["principles"]["checks"]}
    page = (folder / "report.html").read_text()
    assert "Answers before and after the alignment" in page


def test_each_answer_is_scored_by_the_first_policy_told_to(folder: Path, tiny_folder: str):
    """By one forward an answer, behind the query under its good principle."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    values: dict[str, list[float]] = {"before": [], "after": [], "prompted": []}
    for row in rows(folder, "7-checks"):
        told = [{"role": "system", "content": row["principles"]["good"]}, *row["messages"]]
        prompt = tokenizer.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for which, each in values.items():
            response = row[which]
            ids = response["token_ids"] + ([response["end_id"]] if response["finish_reason"] == "stop" else [])
            with torch.no_grad():
                log_probs = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
            found = [log_probs[len(prompt_ids) + i - 1, token].item() for i, token in enumerate(ids)]
            each.append(sum(found) / len(found))
            assert row[f"{which}_told"] == pytest.approx(each[-1], rel=1e-4)
    told = metrics(folder)["answers"]["told"]
    mean = {which: sum(each) / len(each) for which, each in values.items()}
    assert {which: told[which]["mean"] for which in values} == pytest.approx(mean, rel=1e-4)
    assert told["gap"]["mean"] == pytest.approx(mean["prompted"] - mean["after"], rel=1e-3)


def test_a_run_continues_without_answering_again(folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        selfsteer.run(load(folder / "recipe.yaml"))
    assert "7-checks: sealed, reused" in caplog.text


def test_selection_by_checks_keeps_the_pairs_that_win(tmp_path: Path, recipe_of: RecipeOf, files: dict[str, str]):
    changes = {"generator.kind": "none", "selection": {"by": "judge", "min_margin": 1}}
    run(recipe_of(tmp_path / "run", checked(files, **changes)))
    made = with_checks(rows(tmp_path / "run", "5-preferences"))
    wins = {
        row["query_id"]
        for row in made
        if passes(row, row["chosen"][0]["content"]) and not passes(row, row["rejected"][0]["content"])
    }
    assert wins
    assert {row["query_id"] for row in rows(tmp_path / "run", "5-selection")} == wins


# --- refused at the start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"principles": {}}, "none of the library does"),
        ({"principles": {"source": "generate"}}, "a model writes none"),
        ({"judge": {"kind": "none"}, "quality.answers": 4}, "judge.kind: checks only"),
        ({"quality.answers": 4}, "set queries.holdout"),
        ({"judge": {"kind": "checks", "model": "m"}}, "model and engine judge only with kind: llm or reward_model"),
        ({"judge": {"kind": "none"}, "quality.gates": {"check_wins": ">= 0.1"}}, "set judge.kind=checks"),
        ({"quality.gates": {"flips": "<= 0.5"}}, "an LLM judge"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    tmp_path: Path, recipe_of: RecipeOf, files: dict[str, str], changes: dict[str, Any], message: str
):
    given = {
        key: value for key, value in checked(files).items() if not ("principles" in changes and key.startswith("principles"))
    }
    with pytest.raises(ValueError, match=message):
        run(recipe_of(tmp_path / "run", {**given, **changes}))
    assert not (tmp_path / "run").exists()


def test_a_misspelt_check_is_refused_at_the_start_whoever_judges(tmp_path: Path, recipe_of: RecipeOf, files: dict[str, str]):
    (tmp_path / "p.jsonl").write_text(json.dumps({"good": "G", "bad": "B", "check": "punctuation:no_commas"}) + "\n")
    changes = {"principles.path": str(tmp_path / "p.jsonl"), "judge": {"kind": "none"}}
    with pytest.raises(ValueError, match=r"p\.jsonl: line 1: there is no check .* did you mean 'punctuation:no_comma'"):
        run(recipe_of(tmp_path / "run", checked(files, **changes)))
    assert not (tmp_path / "run").exists()


def test_pairs_made_elsewhere_have_no_principles_to_check(tmp_path: Path, recipe_of: RecipeOf, files: dict[str, str]):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    with pytest.raises(ValueError, match="pairs made elsewhere carry no principles"):
        train_pairs(pairs, Recipe.model_validate(recipe_of(tmp_path / "run", checked(files))))


# --- rounds and comparisons ------------------------------------------------------------------------------------------------


def sampled(stage: Path) -> list[str]:
    """The keys that a stage sampled itself."""
    lines = (line for part in (stage / "parts").glob("main-*.jsonl") for line in part.read_text().splitlines())
    return [entry["key"] for entry in map(json.loads, lines) if "scores" not in entry["data"]]


def test_every_round_is_compared_with_the_first_policy_which_answers_once(
    tmp_path: Path, recipe_of: RecipeOf, files: dict[str, str]
):
    changes = {
        "rounds": 2,
        "generator.kind": "none",
        "queries.holdout": 12,
        "quality.answers": 4,
        "queries.limit": 24,
        "training.warmup_ratio": 0,
    }
    run(recipe_of(tmp_path / "run", checked(files, **changes)))
    first, second = (tmp_path / "run" / f"round-{number}" / "7-checks" for number in (1, 2))
    before = [
        {row["query_id"]: row["before"]["text"] for row in pq.read_table(stage / "data.parquet").to_pylist()}
        for stage in (first, second)
    ]
    assert before[0] == before[1]
    assert (len(sampled(first)), len(sampled(second))) == (12, 4), "three answers a query, then that of the new policy"


def test_a_comparison_shows_each_arms_held_out_answers(tmp_path: Path, recipe_of: RecipeOf, files: dict[str, str]):
    changes = {
        "queries.holdout": 12,
        "quality.answers": 4,
        "queries.limit": 24,
        "training.warmup_ratio": 0,
        "compare.align": True,
    }
    recipe = Recipe.model_validate(recipe_of(tmp_path / "all", checked(files, **changes)))
    arms = comparing.compare(recipe, ["pbaa", "sso", "rlcd"], [0])["arms"]
    assert arms["pbaa"]["measures"]["passes_before"] == arms["sso"]["measures"]["passes_before"]
    assert arms["sso"]["difference"]["passes_after"].n == 4
    assert arms["sso"]["measures"]["accuracy"].n > 0
    assert "passes_after" not in arms["rlcd"]["measures"], "its principles, the library's, carry no checks"
    assert "Held-out answers that pass" in (tmp_path / "all" / "comparison.md").read_text()
    assert len(sampled(tmp_path / "all" / "sso-seed0" / "round-1" / "7-checks")) == 4, "the first policy answers once"
