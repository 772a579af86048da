"""Judges behind servers and engines through whole runs on the tiny model: what they say, and what becomes of it when they
are down, slow, or talk nonsense."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from builders import run
from misbehaving import Call, MisbehavingServer, Reply, chat, error

from selfsteer.pipeline import GateFailed
from selfsteer.recipe.gates import MEASURES
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.text import RecipeError

RecipeOf = Callable[..., dict[str, Any]]
Script = Callable[[Call], Reply]


def judge_at(url: str, **engine: Any) -> dict[str, Any]:
    """A judge section for the scripted server, which loses patience soon."""
    limits = {"tries": 2, "first_pause": 0.01, "total_seconds": 20, "concurrency": 2}
    return {"kind": "llm", "engine": {"kind": "openai", "base_url": url, "model": "judge", **limits, **engine}}


@pytest.fixture
def judged_by(recipe_of: RecipeOf, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe that makes pairs without a generator and has them judged: `judged_by(url, {changes}, tries=1)`."""

    def build(url: str, changes: dict[str, Any] | None = None, **engine: Any) -> dict[str, Any]:
        quick = {"generator.kind": "none", "alignment.max_steps": 1, "quality.principle_consistency": False}
        return recipe_of(tmp_path / "run", {**quick, "judge": judge_at(url, **engine), **(changes or {})})

    return build


def verdicts(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "round-1/5-quality/verdicts.parquet").to_pylist()


def report_of(folder: Path) -> dict[str, Any]:
    (this,) = json.loads((folder / "metrics.json").read_text())["rounds"]
    return this["pbaa"]["judge"]


def letter(call: Call) -> Reply:
    """A judge without log-probabilities, for whom the greater text is the better; lives, when asked whether it does."""
    if call.prompt == "Hello":
        return chat("Hi")
    first, second = (call.prompt.split(f"[response {x} ")[1].split("]\n", 1)[1].split("\n[end")[0] for x in "AB")
    return chat("A" if first > second else "B")


def test_a_server_that_tells_log_probabilities_judges_by_them(judged_by: Callable[..., Any], tmp_path: Path):
    """P(A) = 0.6 in both orders, 0.45 as "A" and 0.15 as " A": position bias, a tie; averaged, one half."""
    top = [("A", 0.45), (" A", 0.15), ("B", 0.4)]
    said = [{"token": token, "logprob": math.log(share)} for token, share in top]
    with MisbehavingServer(lambda _: chat("B", logprobs={"content": [{"token": "B", "top_logprobs": said}]})) as server:
        run(judged_by(server.base_url))
        assert {call.body["top_logprobs"] for call in server.calls} == {20}
        found = verdicts(tmp_path / "run")
        assert len(server.calls) == 2 * len(found)
        assert [(row["chosen_first"], row["chosen_second"]) for row in found] == [pytest.approx((0.6, 0.4))] * len(found)
        assert [row["mass"] for row in found] == pytest.approx([1.0] * len(found))
        report = report_of(tmp_path / "run")
        assert (report["ties"]["mean"], report["flips"]["mean"], report["judged"]["mean"]) == (1, 1, 1)
        assert "of averaged orders" in (tmp_path / "run/report.html").read_text()
        run(judged_by(server.base_url))
        assert len(server.calls) == 2 * len(found), "nothing is asked twice"


def test_a_server_without_log_probabilities_judges_by_the_letter(judged_by: Callable[..., Any], tmp_path: Path):
    with MisbehavingServer(letter) as server:
        run(judged_by(server.base_url, {"judge.top_logps": 0}))
        assert not any("logprobs" in call.body for call in server.calls)
    pairs = {row["query_id"]: row for row in pq.read_table(tmp_path / "run/round-1/5-preferences/data.parquet").to_pylist()}
    found = verdicts(tmp_path / "run")
    assert found
    for row in found:
        chosen, rejected = (pairs[row["query_id"]][side][0]["content"] for side in ("chosen", "rejected"))
        assert row["preferred"] == ("chosen" if chosen > rejected else "rejected")
        assert row["mass"] is None


def test_nonsense_is_counted_retried_so_often_and_never_again(judged_by: Callable[..., Any], tmp_path: Path):
    with MisbehavingServer(lambda _: chat("Both are fine!")) as server:
        run(judged_by(server.base_url))
        found = verdicts(tmp_path / "run")
        assert {row["error"] for row in found} == {"unreadable answer"}
        assert len(server.calls) == 2 * 3 * len(found)
        assert {row["preferred"] for row in found} == {None}, "never a win"
        run(judged_by(server.base_url))
        assert len(server.calls) == 2 * 3 * len(found)
    report = report_of(tmp_path / "run")
    assert report["errors"] == {"unreadable answer": len(found)}
    assert "accuracy" not in report
    assert "no verdict: unreadable answer" in (tmp_path / "run/report.html").read_text()


def first_pair(server: MisbehavingServer) -> Callable[[Call], bool]:
    """Whether a call is about the pair that was asked first, in either order."""
    return lambda call: call.prompt.split("\n[end of request")[0] == server.calls[0].prompt.split("\n[end of request")[0]


@pytest.mark.parametrize(
    ("trouble", "error_said"),
    [
        (lambda call: Reply(delay=3.0), "no answer (no usable answer)"),
        (lambda _: error(400, "too long"), "no answer (refused by the server)"),
        (lambda _: Reply(body=b"<html>"), "no answer (no usable answer)"),
    ],
)
def test_a_pair_that_fails_costs_itself_and_is_asked_again(
    judged_by: Callable[..., Any], tmp_path: Path, trouble: Script, error_said: str
):
    troubled = True

    def script(call: Call) -> Reply:
        return trouble(call) if troubled and first_pair(server)(call) else letter(call)

    with MisbehavingServer(script) as server:
        run(judged_by(server.base_url, total_seconds=1))
        found = verdicts(tmp_path / "run")
        assert Counter(row["error"] for row in found) == {None: len(found) - 1, error_said: 1}
        assert report_of(tmp_path / "run")["judged"]["mean"] == pytest.approx(1 - 1 / len(found))
        aligned = (tmp_path / "run/round-1/6-policy/MANIFEST.json").read_bytes()
        before, troubled = len(server.calls), False
        run(judged_by(server.base_url, total_seconds=1))
        later = [call.prompt for call in server.calls[before:]]
        assert len(later) == len(set(later)) == 2, "both orders of that pair, and nothing else"
        assert {row["error"] for row in verdicts(tmp_path / "run")} == {None}
        assert (tmp_path / "run/round-1/6-policy/MANIFEST.json").read_bytes() == aligned, "no reason to train again"


def test_a_judge_that_is_dead_from_the_start(
    judged_by: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The data is kept and the gates say why they fail; when it lives, the same command asks, and goes on."""
    with MisbehavingServer(letter) as server:
        url = server.base_url
        server.die()
    gates = {"quality.gates": {"accuracy": ">= 0", "judged": ">= 0.9"}}
    with pytest.raises(GateFailed) as failed:
        run(judged_by(url, gates))
    folder = tmp_path / "run/round-1"
    found = verdicts(tmp_path / "run")
    assert {row["error"] for row in found} == {"no answer"}
    said = " ".join(str(failed.value).split())
    assert f"no verdict: {len(found)} no answer" in said
    assert "the judge has gone" in caplog.text
    assert (folder / "5-preferences/MANIFEST.json").exists(), "the data is kept"
    assert not (folder / "6-policy/MANIFEST.json").exists()
    assert "no verdict: no answer" in (tmp_path / "run/report.html").read_text()
    with MisbehavingServer(letter) as server:
        recipe = judged_by(server.base_url, gates)
        (this,) = run(recipe)["rounds"]
        assert len(server.calls) == 2 * len(found)
    assert all(gate.passed for gate in this["gates"])
    assert (folder / "6-policy/MANIFEST.json").exists()


def test_a_judge_that_dies_halfway_is_asked_for_the_rest_alone(judged_by: Callable[..., Any], tmp_path: Path):
    def script(call: Call) -> Reply:
        if call.number == 5:
            server.die()
            return Reply(ending="nothing")
        return letter(call)

    with MisbehavingServer(script) as server:
        run(judged_by(server.base_url, concurrency=1))
        answered = {call.prompt for call in server.calls[:4]}
    found = verdicts(tmp_path / "run")
    assert Counter(row["error"] for row in found) == {None: 2, "no answer": len(found) - 2}
    with MisbehavingServer(letter) as server:
        run(judged_by(server.base_url, concurrency=1))
        assert len(server.calls) == 2 * len(found) - 4
        assert answered.isdisjoint(call.prompt for call in server.calls)
    assert {row["error"] for row in verdicts(tmp_path / "run")} == {None}


def test_nothing_is_selected_by_a_judge_that_has_gone(judged_by: Callable[..., Any], tmp_path: Path):
    """A pair that fails alone is kept without a verdict; a judge that dies ends the run, and is asked for the rest."""
    gone = True

    def script(call: Call) -> Reply:
        if gone and call.number == 3:
            server.die()
            return Reply(ending="nothing")
        return error(400, "too long") if first_pair(server)(call) else letter(call)

    selecting = {"selection": {"by": "judge", "drop_reversed": True}}
    folder = tmp_path / "run/round-1"
    with MisbehavingServer(script) as server, pytest.raises(OSError, match="5-selection: the judge has gone; the same"):
        run(judged_by(server.base_url, selecting, concurrency=1))
    assert not (folder / "5-selection/MANIFEST.json").exists()
    gone = False
    with MisbehavingServer(script) as server:
        run(judged_by(server.base_url, selecting, concurrency=1))
    assert Counter(row["error"] for row in verdicts(tmp_path / "run"))["no answer (refused by the server)"] == 1
    assert (folder / "5-selection/MANIFEST.json").exists()


def test_a_kill_amid_the_retries_repeats_none_that_happened(judged_by: Callable[..., Any], tmp_path: Path):
    """Every first try is unreadable. Killed at the third of the second tries: no first try is made again."""
    killed = False

    def script(call: Call) -> Reply:
        if call.body["temperature"] == 0:
            return chat("Hm.")
        if not killed and sum(each.body["temperature"] > 0 for each in server.calls) >= 3:
            return Reply(delay=60)
        return letter(call)

    with MisbehavingServer(script) as server:
        recipe = judged_by(server.base_url, concurrency=1)
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe))
        process = subprocess.Popen([sys.executable, "-m", "selfsteer", "run", str(file)], start_new_session=True)
        deadline = time.monotonic() + 300
        while sum(call.body["temperature"] > 0 for call in server.calls) < 3:
            assert process.poll() is None, "ended before the third retry"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed, before = True, len(server.calls)
        run(recipe)
        found = verdicts(tmp_path / "run")
        assert {row["error"] for row in found} == {None}
        later = server.calls[before:]
        assert all(call.body["temperature"] > 0 for call in later)
        assert len(later) == 2 * len(found), "the retries that were in flight or not yet durable, and the rest"


def test_a_judge_on_vllm_is_another_model_than_the_policy(
    judged_by: Callable[..., Any], scripted_vllm: Callable[..., str], tiny_folder: str, tmp_path: Path
):
    """Both letters in both orders: the first response is the better one with probability 0.75."""
    tokens = {"A": math.log(0.75), "B": math.log(0.25)}
    said = f"choice['logprobs'] = {{'top_logprobs': [{tokens!r}]}}"
    python = scripted_vllm(during=said)
    run(judged_by("", {"judge": {"kind": "llm", "model": tiny_folder, "engine": {"kind": "vllm", "python": python}}}))
    for row in verdicts(tmp_path / "run"):
        assert (row["chosen_first"], row["chosen_second"]) == pytest.approx((0.75, 0.25))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"kind": "llm"}, "needs judge.model, or judge.engine"),
        ({"engine": {"kind": "vllm"}}, "set judge.kind"),
        ({"kind": "llm", "engine": {"kind": "vllm"}}, "needs judge.model"),
        ({"kind": "llm", "model": "m", "engine": {"kind": "transformers"}}, "set judge.engine=null"),
        ({"kind": "reward_model", "model": "m", "engine": {"kind": "vllm"}}, "a reward model scores in this process"),
        (judge_at("http://h/v1", send="token_ids"), "name it in judge.model"),
        (judge_at("http://h/v1") | {"top_logps": 21}, "judge.top_logps"),
    ],
)
def test_judges_that_cannot_be_meant_are_refused(recipe_of: RecipeOf, tmp_path: Path, judge: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        Recipe.model_validate(recipe_of(tmp_path / "run", {"judge": judge}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge.engine.api_key_env": "NOT_THERE_X"}, "NOT_THERE_X"),
        ({"judge.model": "/nowhere/tokenizer"}, "judge.model: no tokenizer at '/nowhere/tokenizer'"),
        ({"judge.engine.extra": {"top_logprobs": 3}}, "top_logprobs"),
    ],
)
def test_what_a_judge_lacks_is_said_before_anything_is_written(
    judged_by: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        run(judged_by("http://h/v1", changes))
    assert not (tmp_path / "run").exists()


def test_every_gate_finds_its_measure_in_a_real_run(recipe_of: RecipeOf, tmp_path: Path, tiny_folder: str):
    """Two rounds with a generator, a judge and an evaluation file: each bound is one that any value keeps."""
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"question": "Something that nobody has asked here."}) + "\n")
    elsewhere = ("pairs.checks.", "bad_generator.")  # judged by checks; of two generators
    judged = {name: measure for name, measure in MEASURES.items() if not measure.path.startswith(elsewhere)}
    changes = {
        "rounds": 2,
        "generator.max_steps": 1,
        "alignment.max_steps": 1,
        "judge": {"kind": "llm", "model": tiny_folder},
        "quality.evaluation_files": [str(evaluation)],
        "queries.holdout": 2,
        "quality.gain": 2,
        "quality.gates": {name: f">= {max(measure.span.low, -1e9):.0f}" for name, measure in judged.items()},
        "quality.on_failure": "warn",
    }
    last = run(recipe_of(tmp_path / "run", changes))["rounds"][-1]
    assert [gate.name for gate in last["gates"]] == list(judged)
    # Ten letters are needed to tell a script, and pairs of unequal length on which the orders agree: not always there.
    # And of 32 queries without a holdout one is set aside for the displacement meter: of these six none.
    scarce = {"language_mismatch_chosen", "language_mismatch_rejected", "longer_wins", "length_correlation", "displacement"}
    assert {gate.name: gate.reason for gate in last["gates"] if not gate.passed and gate.name not in scarce} == {}


def test_gates_on_checks_find_their_measures(recipe_of: RecipeOf, tmp_path: Path):
    """One pair of principles for all queries: what is written under either has at most 1,000 words."""
    rule = {"name": "length_constraints:number_words", "relation": "at most", "num_words": 1000}
    pair = {"good": "Answer in few words.", "bad": "Answer in many words.", "check": rule}
    (tmp_path / "principles.jsonl").write_text(json.dumps(pair) + "\n")
    changes = {
        "principles": {"source": "file", "path": str(tmp_path / "principles.jsonl")},
        "generator.kind": "none",
        "judge.kind": "checks",
        "quality.gates": {"passes_chosen": ">= 1", "passes_rejected": ">= 1", "check_wins": "<= 0", "accuracy": ">= 0.5"},
    }
    gates = run(recipe_of(tmp_path / "run", changes))["rounds"][-1]["gates"]
    assert [(gate.name, gate.passed, gate.value.mean) for gate in gates] == [
        ("passes_chosen", True, 1.0),
        ("passes_rejected", True, 1.0),
        ("check_wins", True, 0.0),
        ("accuracy", True, 0.5),
    ]
