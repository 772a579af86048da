"""What a run names is found once; what is sent is rendered once, and what is read back is not rendered at all."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

import selfsteer
from selfsteer import models
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.sampling import Sampler, request, sample
from selfsteer.judges.base import RecipeJudge
from selfsteer.judges.llm import judge_template, sampled_verdicts
from selfsteer.prompts import Prompts
from selfsteer.recipe.engines import OpenAISection
from selfsteer.recipe.sections import JudgeSection, Policy, Recipe
from selfsteer.records import Message, Pair, side
from selfsteer.stages import training
from selfsteer.store import folder as store
from selfsteer.store.folder import Stage
from selfsteer.store.journal import Journal

RecipeOf = Callable[..., dict[str, Any]]


class Words:
    """An engine that answers with one text, and keeps what it was asked."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: list[Request] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for each in requests:
            self.asked.append(each)
            yield Completion(key=each.key, text=self.text, token_ids=(1,), finish_reason="stop")


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The last turn of every conversation that any tokenizer renders from now on."""
    found: list[str] = []
    plain = PreTrainedTokenizerBase.apply_chat_template

    def counting(self: Any, conversation: Any, **options: Any) -> Any:
        found.append(conversation[-1]["content"])
        return plain(self, conversation, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", counting)
    return found


def test_a_request_is_rendered_when_it_is_sent_and_never_again(renderings: list[str], tmp_path: Path):
    prompts = Prompts(tiny_tokenizer())
    renderings.clear()
    texts = ["What is rain?", "Who reads letters?", "Where is the sea?"]
    messages = [(Message(role="user", content=text),) for text in texts]
    wanted = [request(prompts, each, model_digest="m", sampling=Sampling(), seed=1) for each in messages]
    assert renderings == []
    engine = Words("Perhaps.")
    with Journal(tmp_path) as journal:
        sample(Sampler(lambda: engine, prompts), wanted[:2], journal, description="", total=2)
        assert renderings == texts[:2]
        sample(Sampler(lambda: engine, prompts), wanted, journal, description="", total=3)
    assert renderings == texts
    assert [each.prompt_ids for each in engine.asked] == [prompts.prompt_ids(each) for each in messages]


def test_a_key_depends_on_all_that_the_tokens_depend_on():
    one, other = Prompts(tiny_tokenizer()), Prompts(tiny_tokenizer(), system_role="user")
    renamed = tiny_tokenizer()
    renamed.add_tokens(["a-new-token"])
    messages = (Message(role="user", content="What is rain?"),)

    def key(prompts: Prompts, model: str = "m") -> str:
        return request(prompts, messages, model_digest=model, sampling=Sampling(), seed=1).key

    assert key(one) == key(Prompts(tiny_tokenizer()))
    assert len({key(one), key(other), key(Prompts(renamed)), key(one, "other")}) == 4


def test_a_judge_renders_what_it_sends(renderings: list[str], tmp_path: Path):
    """Two prompts a pair, each checked and sent as one rendering; with two retries of nonsense, four more; to read, two."""
    server = OpenAISection(kind="openai", base_url="http://localhost/v1", model="j")
    judge = RecipeJudge(
        section=JudgeSection(kind="llm", engine=server, retries=2),
        model=None,
        template=judge_template(),
        policy=Policy(model="j"),
        prompts=Prompts(tiny_tokenizer()),
    )
    pairs = [
        Pair(
            query_id="q",
            kind="given",
            prompt=(Message(role="user", content="?"),),
            chosen=side("Yes."),
            rejected=side("No."),
        )
    ]

    def verdicts() -> list[str | None]:
        renderings.clear()
        with Journal(tmp_path) as journal:
            found = list(sampled_verdicts(judge, lambda: pairs, lambda: Words("Hm."), journal, total=1))
        return [each.error for each in found]

    assert verdicts() == ["unreadable answer"]
    harmless = renderings.count("a")  # what special tokens are expected, once for all conversations of one form
    assert (harmless, len(renderings) - harmless) == (1, 6)
    assert verdicts() == ["unreadable answer"]
    assert len(renderings) == 2


def test_most_prompts_fit_without_being_tokenised():
    prompts = Prompts(tiny_tokenizer())
    for text in ("What is rain?", "Was ist Regen für dich?", "\u96e8\u306f\u4f55\u3067\u3059\u304b" * 9):
        messages = (Message(role="user", content=text),)
        length = len(prompts.prompt_ids(messages))
        assert prompts.length_beyond(messages, length) is None
        assert prompts.length_beyond(messages, length - 1) == length
        assert prompts.length_beyond(messages, 10_000) is None


def test_weights_are_hashed_once_a_model_and_held_out_queries_drawn_once(
    recipe_of: RecipeOf, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The policy also judges; three models are hashed: the policy, the generator, the aligned policy."""
    hashed: Counter[str] = Counter()
    read: Counter[str] = Counter()
    digest_of, column = store.file_digest, Stage.column

    def counting(path: Path) -> str:
        if path.suffix == ".safetensors":
            hashed[str(path)] += 1
        return digest_of(path)

    def columns(self: Stage, name: str) -> list[Any]:
        read[f"{self.path.name} {name}"] += 1
        return column(self, name)

    for module in (models, store, training):
        monkeypatch.setattr(module, "file_digest", counting)
    monkeypatch.setattr(Stage, "column", columns)
    judge = {"kind": "llm", "model": tiny_folder, "dtype": "float32"}
    recipe = recipe_of(tmp_path / "run", {"judge": judge, "queries.holdout": 2, "alignment.max_steps": 1})
    selfsteer.run(Recipe.model_validate(recipe))
    trained = [str(tmp_path / f"run/round-1/{stage}/model/model.safetensors") for stage in ("4-generator", "6-policy")]
    assert hashed == {f"{tiny_folder}/model.safetensors": 1, **dict.fromkeys(trained, 1)}
    assert read["1-principles query_id"] == 2, "once to hold out, once to draw the generator's queries"
    hashed.clear()
    selfsteer.run(Recipe.model_validate(recipe))
    assert hashed == {f"{tiny_folder}/model.safetensors": 1, **dict.fromkeys(trained, 1)}, "verified, no more"


def test_a_finished_run_reads_no_pairs_again(recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"generator.max_steps": 1, "alignment.max_steps": 1}))
    before = selfsteer.run(recipe)

    def never(*_: object) -> Iterator[Any]:
        pytest.fail("pairs are read again")

    for name in ("rows", "written"):
        monkeypatch.setattr(Stage, name, never)
    monkeypatch.setattr("selfsteer.store.columns.file_rows", never)
    assert selfsteer.run(recipe) == before
