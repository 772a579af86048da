"""A whole run on a server that misbehaves; how one request meets each misdeed is in test_engine_openai.py."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from misbehaving import Call, MisbehavingServer, Reply, chat, error

import selfsteer
from selfsteer.engines.openai import ServerError
from selfsteer.recipe.sections import Recipe
from selfsteer.store.folder import RunFolder

TEXTS = [f"What is the sum of {number} and {number + 1}?" for number in range(20)]
WANTED = 2 * len(TEXTS)
CONCURRENCY = 4


@pytest.fixture
def recipe(recipe_of: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in TEXTS))
    changes = {"generator.kind": "none", "alignment.max_steps": 1, "queries.path": str(path)}
    return recipe_of(tmp_path / "run", changes)


def run(recipe: dict[str, Any], base_url: str) -> None:
    engine = {"kind": "openai", "base_url": base_url, "model": "m", "concurrency": CONCURRENCY, "tries": 3}
    limits = {"first_pause": 0.01, "total_seconds": 5.0, "idle_seconds": 1.0}
    selfsteer.run(Recipe.model_validate(recipe | {"engine": engine | limits}))


def words(call: Call) -> Reply:
    """Words that depend on the request only."""
    numbers = hashlib.sha256(json.dumps([call.body["messages"], call.body["seed"]]).encode()).digest()
    return chat(" ".join(("rain", "light", "fox", "letter", "water", "slow", "deep")[n % 7] for n in numbers[:12]))


def bodies(server: MisbehavingServer) -> list[str]:
    return [json.dumps(call.body, sort_keys=True) for call in server.calls]


def keys(folder: Path) -> list[str]:
    parts = sorted((folder / "round-1/2-responses/parts").glob("*.jsonl"))
    return [json.loads(line)["key"] for part in parts for line in part.read_text().splitlines()]


def test_dead_from_the_start_then_dying_halfway_then_a_storm(recipe: dict[str, Any], tmp_path: Path):
    """Three servers, one run. What the dying one had answered is not asked again; of the storm nothing is lost."""
    with MisbehavingServer(words) as dead:
        dead.die()
        with pytest.raises(ServerError):
            run(recipe, dead.base_url)
    assert dead.calls == []
    assert keys(tmp_path / "run") == []

    def dies(call: Call) -> Reply:
        if call.number == 25:
            dying.die()
            return Reply(ending="nothing")
        return words(call)

    with MisbehavingServer(dies) as dying, pytest.raises(ServerError, match="same command continues"):
        run(recipe, dying.base_url)
    durable = keys(tmp_path / "run")
    assert 24 - CONCURRENCY <= len(durable) <= 24

    def storms(call: Call) -> Reply:
        return error(429, Retry_After="0") if call.nth == 1 and call.number % 3 else words(call)

    with MisbehavingServer(storms) as stormy:
        run(recipe, stormy.base_url)
    assert keys(tmp_path / "run")[: len(durable)] == durable
    assert len(keys(tmp_path / "run")) == len(set(keys(tmp_path / "run"))) == WANTED
    asked = Counter(bodies(stormy))
    assert len(asked) == WANTED - len(durable), "nothing durable is asked again"
    assert max(asked.values()) <= 2, "and nothing that was answered"
    sealed = RunFolder.view(tmp_path / "run").stage(1, "2-responses").verify()
    assert (sealed.wanted, sealed.kept) == (len(TEXTS), len(TEXTS))
    with MisbehavingServer(words) as idle:
        run(recipe, idle.base_url)
    assert idle.calls == [], "a finished run asks nothing, whatever the address"


def test_slow_endless_and_refused_answers_cost_rows_not_the_run(recipe: dict[str, Any], tmp_path: Path):
    """One query is refused, one gets silence and one a never-ending body at first: the first is dropped with its reason."""

    def script(call: Call) -> Reply:
        if call.prompt == TEXTS[3]:
            return error(400, "not this one")
        if call.prompt == TEXTS[5] and call.nth == 1:
            return Reply(body=b'{"choices": ', ending="silent")
        if call.prompt == TEXTS[7] and call.nth == 1:
            return Reply(body=b"{", ending="endless")
        return words(call)

    with MisbehavingServer(script) as server:
        run(recipe, server.base_url)
    sealed = RunFolder.view(tmp_path / "run").stage(1, "2-responses").verify()
    assert (sealed.wanted, sealed.kept, sum(sealed.dropped.values())) == (len(TEXTS), len(TEXTS) - 1, 1)
    ((reason, _),) = sealed.dropped.items()
    assert "refused" in reason
    assert len(keys(tmp_path / "run")) == len(set(keys(tmp_path / "run"))) == WANTED
    asked = Counter(body for body in bodies(server) if '"max_tokens": 1,' not in body)  # without the check of a refusal
    assert len(asked) == WANTED
    assert asked.total() == WANTED + 4, "y+ and y- of two queries were asked for twice"
