"""Models that think before they answer: what is trained, measured and judged is never their thought."""

import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ALWAYS, DATED, UNLESS_TOLD
from transformers import AutoModelForCausalLM

from selfsteer.comparing import compare
from selfsteer.engines.base import Failed, Request, Sampling
from selfsteer.engines.sampling import response, spoken
from selfsteer.given import measure_pairs, train_pairs
from selfsteer.judges.find import find_judge
from selfsteer.judges.reward import RewardModel, open_renderer
from selfsteer.models import load_tokenizer, resolve
from selfsteer.pipeline import dated, run
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import JudgeSection, Policy, Recipe
from selfsteer.records import Message, Response
from selfsteer.stages.preferences import usable_pairs
from selfsteer.store import columns
from selfsteer.store.folder import RunFolder, began
from selfsteer.store.journal import Journal

RecipeOf = Callable[..., dict[str, Any]]


def template(folder: Path, text: str) -> str:
    (folder / "template.jinja").write_text(text)
    return str(folder / "template.jinja")


@pytest.mark.parametrize(
    ("written", "way_out"),
    [(ALWAYS, r"policy\.chat_template"), (UNLESS_TOLD, r"policy\.template_arguments")],
    ids=["always", "unless told"],
)
def test_a_run_with_such_a_template_does_not_begin(written: str, way_out: str, recipe_of: RecipeOf, tmp_path: Path):
    recipe = recipe_of(tmp_path / "run", {"policy.chat_template": template(tmp_path, written)})
    with pytest.raises(ValueError, match=way_out):
        run(Recipe.model_validate(recipe))
    assert not (tmp_path / "run").exists()


def test_told_not_to_think_it_is_sampled_and_trained_behind_one_header(
    recipe_of: RecipeOf, tiny_folder: str, tmp_path: Path
):
    """The closed thought stands in every prompt, and training begins at the margins that scoring found: zero."""
    changes = {
        "policy.chat_template": template(tmp_path, UNLESS_TOLD),
        "policy.template_arguments": NOT,
        "queries.limit": 2,
        "training.micro_batch_size": 1,
    }
    run(Recipe.model_validate(recipe_of(tmp_path / "run", changes)))
    made = RunFolder.view(tmp_path / "run")
    history = (made.stage(1, "6-policy").path / "history.jsonl").read_text().splitlines()
    assert json.loads(history[0])["margin"] == 0
    prompts = Prompts(load_tokenizer(tiny_folder, chat_template=str(changes["policy.chat_template"])), arguments=NOT)
    for row in made.stage(1, "5-preferences").rows():
        pair = columns.pair(row)
        ids = prompts.prompt_ids(pair.prompt)
        assert prompts.tokenizer.decode(list(ids)).endswith("assistant\n<think>\n\n</think>\n\n")
        assert pair.chosen.score.logps == pytest.approx(plain_logps(tiny_folder, ids, pair.chosen.token_ids), abs=1e-4)


NOT = {"enable_thinking": False}


def plain_logps(folder: str, prompt: tuple[int, ...], response: tuple[int, ...] | None) -> float:
    assert response is not None
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[*prompt, *response]])).logits[0]
    found = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return sum(found[number, token].item() for number, token in enumerate(response))


ANSWERS = {
    "plain": "A fox.",
    "thought": "<think>\nHm.\n</think>\n\nA fox.",
    "cut": "<think>Hm. A fo",
    "apart": "A cat.",
}


@pytest.fixture
def answered(tmp_path: Path) -> Callable[[Callable[..., Response | Failed]], dict[str, str]]:
    """What a reader of the journal makes of each answer: its text, or why there is none."""

    def read(how: Callable[..., Response | Failed]) -> dict[str, str]:
        found: dict[str, str] = {}
        with Journal(tmp_path / "parts") as journal:
            rest = {"token_ids": [5], "finish_reason": "stop", "end_id": 2, "reencoded": False}
            kept = {key: {"text": text, **rest} for key, text in ANSWERS.items()}
            kept["apart"]["thought"] = True  # the server keeps it apart
            journal.append([(key, data) for key, data in kept.items() if key not in journal])
            for key in ANSWERS:
                answer = how(journal, Request(key=key, messages=(), sampling=Sampling(), seed=0))
                found[key] = answer.reason if isinstance(answer, Failed) else answer.text
        return found

    return read


def test_a_sampled_response_with_a_thought_becomes_a_dropped_row(answered: Callable[..., dict[str, str]]):
    """Its ids were sampled behind the thought; behind the bare prompt they would be another model's."""
    reason = "a thought in the response"
    assert answered(response) == {"plain": "A fox.", "thought": reason, "cut": reason, "apart": reason}


def test_who_reads_the_text_alone_reads_behind_the_thought(answered: Callable[..., dict[str, str]]):
    without = "a thought without an answer"
    assert answered(spoken) == {"plain": "A fox.", "thought": "A fox.", "cut": without, "apart": "A cat."}


def test_of_pairs_made_elsewhere_the_text_behind_the_thought_is_taken(tiny_folder: str, tmp_path: Path):
    rows = [
        {"prompt": "Hi", "chosen": ANSWERS["thought"], "rejected": "A dog."},
        {"prompt": "Hi", "chosen": "A fox.", "rejected": ANSWERS["cut"]},
    ]
    file, plain = tmp_path / "pairs.jsonl", tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text(json.dumps(rows[0] | {"chosen": "A fox."}) + "\n")
    one, other = usable_pairs(file, Prompts(load_tokenizer(tiny_folder)), None, None)
    assert (one.chosen.text, one.rejected.text) == ("A fox.", "A dog.")
    assert other.reason == "empty rejected"
    assert measure_pairs(file, tiny_folder)["on_policy"] == measure_pairs(plain, tiny_folder)["on_policy"]


# --- arguments and dates in a recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"template_arguments": {"messages": []}}, "messages can't be given"),
        ({"template_arguments": {"since": date(2025, 1, 31)}}, "JSON values"),
        ({"date": "31.1.2025"}, "write it as 2025-01-31"),
    ],
)
def test_arguments_that_will_not_do(given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        Policy.model_validate({"model": "m", **given})


def test_a_day_that_yaml_has_read_is_one():
    assert Policy.model_validate({"model": "m", "date": date(2025, 1, 31)}).date == "2025-01-31"


def test_a_run_keeps_the_day_on_which_it_began(recipe_of: RecipeOf, tmp_path: Path):
    """Also below the folder of a comparison; a day in the recipe goes before it."""
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"policy.chat_template": template(tmp_path, DATED)}))
    with RunFolder(tmp_path / "run/sso-seed0") as arm:
        arm.describe("", {})
    told = json.loads((arm.path / "run.json").read_text())
    told["sessions"][0]["started"] = "2025-01-31T23:59:59+00:00"
    (arm.path / "run.json").write_text(json.dumps(told))
    assert dated(recipe).policy.date == "2025-01-31"
    said = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"date": "2024-12-24"})})
    assert dated(said).policy.date == "2024-12-24"


@pytest.mark.parametrize("way", ["run", "compare", "train_pairs"])
def test_who_borrows_keeps_the_day_of_the_lender(way: str, given: Path, recipe_of: RecipeOf, tmp_path: Path):
    """Its samples stand behind prompts of that day; of another day none would be taken over."""
    with RunFolder(tmp_path / "earlier") as lender:
        lender.describe("", {"date": "2025-01-31"})
    changes = {"generator.kind": "none", "alignment.max_steps": 1, "queries.holdout": 2 if way == "compare" else 0}
    recipe, made = Recipe.model_validate(recipe_of(tmp_path / "run", changes)), tmp_path / "run"
    match way:
        case "run":
            run(recipe, borrow=[lender.path])
        case "compare":
            compare(recipe, ["pbaa"], [0], borrow=[lender.path])
            made /= "pbaa-seed0"
        case _:
            train_pairs(given, recipe, borrow=[lender.path])
    assert began(made) == "2025-01-31"


def test_a_judge_is_told_the_day_of_the_run(tiny_folder: str, tmp_path: Path):
    """In its prompts, which key its verdicts, and where a reward model reads."""
    policy = Policy(model=tiny_folder, date="2025-01-31")
    written = template(tmp_path, DATED)
    judge = find_judge(JudgeSection(kind="llm", model=tiny_folder, chat_template=written), policy)
    assert judge is not None
    assert judge.prompts is not None
    model = RewardModel(model=resolve(policy), policy=policy.model_copy(update={"chat_template": written}))
    asked = (Message(role="user", content="Why?"),)
    for ids in (judge.prompts.prompt_ids(asked), open_renderer(model).ids(asked)):
        assert load_tokenizer(tiny_folder).decode(list(ids)).startswith("Today is 31 Jan 2025.")
    assert judge.policy.date == "2025-01-31"
