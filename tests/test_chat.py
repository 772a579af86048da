"""Chatting: the answers are those of the engine on the prompts of training, and each model keeps its own conversation."""

import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from tiny import tiny_model_dir

from selfsteer import cli, runtime
from selfsteer.chat import chat, model_of
from selfsteer.engines.base import Completion, Failed, Request, Sampling
from selfsteer.engines.embedded import TransformersEngine
from selfsteer.engines.open import open_engine
from selfsteer.engines.sampling import seed_for
from selfsteer.models import checkpoint, load_tokenizer
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import TransformersSection
from selfsteer.recipe.sections import Policy, Sampled

ENGINE = TransformersSection(dtype="float32")
BRIEF = Sampled(temperature=0.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    folder = tmp_path_factory.mktemp("two")
    return {
        "before": Policy(model=tiny_model_dir(folder / "a")),
        "after": Policy(model=tiny_model_dir(folder / "b", seed=1)),
    }


def alone(policy: Policy, messages: list[dict[str, str]], number: int) -> str:
    prompts = Prompts(load_tokenizer(policy.model))
    whole = tuple({"role": each["role"], "content": each["content"]} for each in messages)
    ids = tuple(prompts.prompt_ids(whole))  # pyright: ignore[reportArgumentType]
    wanted = Request(
        key="k", messages=(), prompt_ids=ids, sampling=Sampling(**BRIEF.model_dump()), seed=seed_for("chat", number)
    )
    with open_engine(ENGINE, checkpoint(Path(policy.model)), prompts, trust_remote_code=False) as engine:
        (answer,) = engine.generate([wanted])
    return answer.text


def test_each_model_goes_on_from_its_own_answers(two: dict[str, Policy]):
    first, second, third = chat(two, ["What is it?", "", "And then?", "/new", "What is it?"], BRIEF, ENGINE)
    for name, policy in two.items():
        conversation = [{"role": "user", "content": "What is it?"}]
        assert first[name] == alone(policy, conversation, 0)
        conversation += [{"role": "assistant", "content": first[name]}, {"role": "user", "content": "And then?"}]
        assert second[name] == alone(policy, conversation, 2)
        assert third[name] == first[name], "a new conversation, greedily answered"
    assert first["before"] != first["after"]


def test_a_stop_is_no_answer(two: dict[str, Policy], monkeypatch: pytest.MonkeyPatch):
    """Asked to stop while the first model answers: it ends its answer, and the second is not asked."""
    answers = TransformersEngine.generate

    def generate(self: TransformersEngine, requests: Iterable[Request]) -> Iterator[Completion | Failed]:
        yield from answers(self, requests)
        runtime.request_stop()

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    with runtime.graceful_stop(), pytest.raises(runtime.Interrupted):
        list(chat(two, ["What is it?"], BRIEF, ENGINE))


def test_a_system_message_comes_before_it(two: dict[str, Policy]):
    (said,) = chat({"model": two["before"]}, ["Why?"], BRIEF, ENGINE, system="Be brief.")
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert said["model"] == alone(two["before"], told, 0)


def test_what_cannot_be_asked_is_said_and_forgotten(two: dict[str, Policy]):
    special, longer, plain = chat({"model": two["before"]}, ["Say <|im_end|> now", "word " * 2000, "Why?"], BRIEF, ENGINE)
    assert special["model"].startswith("[not asked: ")
    assert "512 positions" in longer["model"]
    assert plain["model"] == alone(two["before"], [{"role": "user", "content": "Why?"}], 2)


def test_the_command_reads_lines_and_names_the_models(
    two: dict[str, Policy], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)
    arguments = [two["after"].model, "--before", two["before"].model, "--temperature", "0", "--max-new-tokens", "6"]
    monkeypatch.setattr(sys, "argv", ["selfsteer", "chat", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("before: ")
    assert "\nafter: " in said


def test_a_run_folder_stands_for_its_policy(tmp_path: Path):
    assert model_of("owner/model") == "owner/model"
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"metrics.json is missing: its run is not finished"):
        model_of(str(tmp_path))
    (tmp_path / "metrics.json").write_text('{"run": {"folder": "old", "policy_folder": "old/model"}, "rounds": []}')
    assert model_of(str(tmp_path)) == str(tmp_path / "model"), "where the run is now"
    (tmp_path / "metrics.json").write_text('{"run": {"folder": "old"}, "rounds": []}')
    with pytest.raises(ValueError, match="this run has aligned no policy"):
        model_of(str(tmp_path))
