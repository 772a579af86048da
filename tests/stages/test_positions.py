"""What exceeds the positions of the model is dropped with its reason, as long prompts are; nothing of it is computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUERIES
from tiny import tiny_model_dir

import selfsteer
from selfsteer.given import measure_pairs
from selfsteer.recipe.sections import Policy, Recipe, Training
from selfsteer.records import Message, Pair, side
from selfsteer.training.scoring import open_scorer, score

REASON = "too long for the model"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with 512 positions."""
    return tiny_model_dir(tmp_path_factory.mktemp("short") / "model", max_positions=512)


def test_queries_that_leave_no_room_for_their_answer(short: str, recipe_of: Callable[..., dict[str, Any]], tmp_path: Path):
    """About 900 tokens: less than queries.max_prompt_tokens, more than the positions."""
    file = tmp_path / "queries.jsonl"
    texts = [*QUERIES[:2], "Why is the fox quick? " * 60]
    file.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    changes = {"policy.model": short, "queries.path": str(file), "generator.kind": "none", "alignment.max_steps": 1}
    selfsteer.run(Recipe.model_validate(recipe_of(tmp_path / "run", changes)))
    stage = tmp_path / "run" / "round-1" / "1-principles"
    dropped = [json.loads(line) for line in (stage / "dropped.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in dropped] == [REASON]
    assert "8 new ones, 512 positions" in dropped[0]["detail"]


def test_pairs_that_are_longer(short: str, tmp_path: Path):
    """The response of one is about 900 tokens long."""
    file = tmp_path / "pairs.jsonl"
    rows = [("Why?", "Because.", "No idea."), ("Who?", "The quick brown fox. " * 150, "A dog.")]
    file.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in rows))
    found = measure_pairs(file, short)
    assert found.get("dropped") == {REASON: 1}
    assert found["length"]["chosen"].n == 1


def test_scoring_refuses_them(short: str):
    prompt = (Message(role="user", content="Who?"),)
    pair = Pair(query_id="q7", kind="given", prompt=prompt, chosen=side("fox " * 600), rejected=side("A dog."))
    with (
        open_scorer(Policy(model=short), Training(dtype="float32")) as scorer,
        pytest.raises(ValueError, match=r"query q7: [\d,]+ tokens are too long for the model, which has 512 positions"),
    ):
        list(score(scorer, [[pair]]))
