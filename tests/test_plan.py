"""What a run will take: counted as the run then counts, refused where it would not fit, timed by a calibration."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import run, samples
from tiny import other_model_dir

from selfsteer import plan as planning
from selfsteer.comparing import compare
from selfsteer.engines.base import Completion
from selfsteer.given import train_pairs
from selfsteer.models import checkpoint
from selfsteer.recipe.sections import Lora, Recipe
from selfsteer.stages import essentials
from selfsteer.stages.costs import Counts, Lengths, Rates, Size, stage_costs, stage_tokens

RecipeOf = Callable[..., dict[str, Any]]
Usage = namedtuple("Usage", "total used free")


def planned(recipe: dict[str, Any], **options: Any) -> planning.Plan:
    return planning.plan(Recipe.model_validate(recipe), **options)


@pytest.mark.parametrize(
    "changes",
    [{}, {"queries.holdout": 2}, {"generator.kind": "none"}, {"generator.objective": "equation_3", "generator.queries": 3}],
)
def test_as_many_samples_are_planned_as_are_drawn(recipe_of: RecipeOf, tmp_path: Path, changes: dict[str, Any]):
    short = {"generator.max_steps": 1, "alignment.max_steps": 1, **changes}
    found = planned(recipe_of(tmp_path / "run", short), calibrate=False)
    assert found["problems"] == []
    assert not (tmp_path / "run").exists(), "a plan leaves nothing behind"
    stages = run(recipe_of(tmp_path / "run", short))["rounds"][0]["stages"]
    assert [stage["stage"] for stage in found["stages"]] == list(stages)
    wanted = {stage["stage"]: stage["samples"] for stage in found["stages"]}
    assert wanted["2-responses"] == len(set(samples(tmp_path / "run", "2-responses")))
    drawn = wanted["5-preferences"]
    if drawn:  # its journal holds a score for each pair, too
        both = 2 * stages["5-preferences"]["wanted"]
        assert drawn == both


def test_a_calibration_finds_rates_and_times_every_stage(recipe_of: RecipeOf, tmp_path: Path):
    found = planned(recipe_of(tmp_path / "run"))
    assert all(rate is not None and rate > 0 for rate in found["rates"].values())
    assert found["memory"] > 100_000_000, "the libraries are counted, beside which a tiny model is nothing"
    assert 1 <= found["response"] <= 8, "tokens, up to responses.max_new_tokens"
    timed = [stage["seconds"] for stage in found["stages"] if stage["samples"] or stage["scored"] or stage["trained"]]
    assert found["seconds"] == pytest.approx(sum(timed))
    twice = planned(recipe_of(tmp_path / "run", {"rounds": 2}), calibrate=False)
    assert (twice["rounds"], twice["seconds"]) == (2, None)


def test_rounds_that_split_the_queries_have_a_share_each(recipe_of: RecipeOf, tmp_path: Path):
    """Six queries, one held out in both rounds: of the five others three in the first; three responses of each of these, two
    of the one held out, and pairs for all four."""
    changes = {"rounds": 2, "queries.holdout": 1, "queries.split_rounds": True, "training.displacement_steps": 0}
    found = planned(recipe_of(tmp_path / "run", changes), calibrate=False)
    wanted = {stage["stage"]: stage["samples"] for stage in found["stages"]}
    assert found["queries"] == 6
    assert (wanted["2-responses"], wanted["5-preferences"]) == (3 * 3 + 2, 2 * 4)


GEMMA = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Renders turns of user and assistant, and nothing else."""


def test_what_the_template_refuses_is_not_planned(recipe_of: RecipeOf, tmp_path: Path):
    """A system message goes into the user's turn; of three queries, one with two turns of the user is dropped."""
    user, system = {"role": "user", "content": "Why?"}, {"role": "system", "content": "You are a pirate."}
    (tmp_path / "gemma.jinja").write_text(GEMMA)
    path = tmp_path / "queries.jsonl"
    changes = {
        "queries": {"path": str(path), "column": "messages"},
        "policy.chat_template": str(tmp_path / "gemma.jinja"),
    }
    recipe = recipe_of(tmp_path / "run", changes)
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in ([user], [system, user], [user, user])))
    assert planned(recipe, calibrate=False)["queries"] == 2
    path.write_text(json.dumps({"messages": [user, user]}))
    with pytest.raises(ValueError, match=r"renders none of the first 1 queries.* set policy\.chat_template"):
        planned(recipe, calibrate=False)


def test_costs_by_hand():
    """PBAA, 10 queries: two responses each of 20 tokens; scored are prompt and both; one epoch of the same is trained."""
    recipe = Recipe.model_validate(
        {
            "policy": {"model": "m"},
            "queries": {"path": "q.jsonl"},
            "generator": {"kind": "none"},
            "quality": {"principle_consistency": False},
            "training": {"displacement_steps": 0},
        }
    )
    counts = Counts(10, Lengths(5, 9), Lengths(15, 19), 20.0)
    rates = Rates(sampled=40.0, scored=45.0, trained=9.0, loading=1.0)
    costs = {each["stage"]: each for each in stage_costs(recipe, counts, Size(1000, 1000, 2, 8, 32), rates, half=False)}
    assert (costs["2-responses"]["samples"], costs["2-responses"]["sampled"]) == (20, 400)
    assert costs["2-responses"]["seconds"] == pytest.approx(400 / 40 + 1)
    assert costs["5-preferences"]["scored"] == 10 * (5 + 2 * 20)
    assert costs["6-policy"]["trained"] == 450
    assert costs["6-policy"]["disk"] == 4 * 1000, "float32"


def test_a_selection_scores_every_sample_of_what_trains():
    """Of 10 queries 2 are held out; of the others 3 pairs each, a prompt of 5 tokens with two responses of 20."""
    recipe = Recipe.model_validate(
        {
            "policy": {"model": "m"},
            "queries": {"path": "q.jsonl", "holdout": 2},
            "selection": {"by": "generator", "samples": 3},
        }
    )
    counts = Counts(10, Lengths(5, 9), Lengths(15, 19), 20.0)
    assert stage_tokens(recipe, counts, "5-selection").scored == 8 * 3 * (5 + 2 * 20)


CHUNK = 8 * 2**22
"""Logits, 8 bytes each."""


def test_memory_by_hand():
    """1000 weights in float32, 100 of them the output layer's: 16 bytes a weight to train (weights, gradients, AdamW).

    Responses of 12 tokens, the longest of 128 expected to have 20, the limit (12 * (log 128 + 0.58) = 65). Trained are, of a
    query, two prompts of at most 19 tokens with two responses each, three of them of 12 and one of 20; and the bare prompt
    of at most 9 with one of 20 and one of 12. A token keeps 100 bytes; the output layer a gradient more; the libraries hold
    7. The allocator keeps 35 % more of all but these.
    """
    recipe = Recipe.model_validate(
        {
            "policy": {"model": "m"},
            "queries": {"path": "q.jsonl"},
            "responses": {"max_new_tokens": 20},
            "engine": {"batch_size": 2},
        }
    )
    counts, size = Counts(64, Lengths(5, 9), Lengths(15, 19), 12.0), Size(1000, 1000, 2, 8, 32, 100)
    rates = Rates(kept=100.0, libraries=7)

    def memory(of: Recipe = recipe, key: str = "memory", *, half: bool = False) -> dict[str, float]:
        """Without the libraries and what the allocator keeps; of stages that score or train without the chunk of logits."""
        found = {each["stage"]: each[key] for each in stage_costs(of, counts, size, rates, half=half)}
        return {name: (held - 7) / 1.35 if held else 0 for name, held in found.items()}

    found = memory()
    assert found["4-generator"] == pytest.approx(16 * 1000 + 100 * (2 * 19 + 3 * 12 + 20) + CHUNK + 4 * 100)
    assert found["6-policy"] == pytest.approx(16 * 1000 + 100 * (9 + 12 + 20) + CHUNK + 4 * 100)
    assert found["3-steering"] == pytest.approx(4 * 1000 + CHUNK)
    assert found["2-responses"] == pytest.approx(4 * (1000 + 2 * (19 + 20) * 32), abs=1)
    assert found["1-principles"] == 0, "no model there, nothing is said"
    assert memory(key="memory_most")["6-policy"] == pytest.approx(16 * 1000 + 100 * (9 + 2 * 20) + CHUNK + 4 * 100)
    assert memory(half=True)["3-steering"] == pytest.approx(4 * 1000 + 2 * 100 + CHUNK), (
        "as loaded, and the output layer's copy"
    )
    to_a_budget = recipe.model_copy(update={"training": recipe.training.model_copy(update={"tokens_per_batch": 500})})
    assert memory(to_a_budget)["4-generator"] == pytest.approx(16 * 1000 + 100 * 500 + CHUNK + 4 * 100)
    adapter = recipe.model_copy(update={"training": recipe.training.model_copy(update={"lora": Lora()})})
    size = size._replace(trained=10, linear=700)
    held = memory(adapter, "memory_most", half=True)
    assert held["4-generator"] == pytest.approx(4 * 300 + 2 * 700 + 12 * 10 + 100 * (2 * 19 + 4 * 20) + CHUNK + 2 * 100)
    assert held["6-policy"] == pytest.approx(8 * 1000 + CHUNK + 2 * 100), "as delivered, beside what is rounded"


def test_what_a_forward_pass_keeps_is_counted_once_and_without_weights():
    """Two layers on 5 rows of 3 numbers, float32: the input and, once though two layers save it, what tanh gives."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    with planning.keeping(model) as kept:
        model(torch.ones(5, 3))
    assert sum(kept.values()) == 4 * (5 * 3 + 5 * 4)


def answer(tokens: int, finish: Any) -> Completion:
    return Completion(key="k", text="", token_ids=tuple(range(tokens)), finish_reason=finish)


def test_the_expected_length_of_answers_that_were_cut_off():
    """Of 60 tokens in all one ended: 60 on average without a limit, 60 (1 - e^-1) up to 60."""
    answers = [answer(40, "length"), answer(20, "stop")]
    assert planning.expected_length(answers, 60) == pytest.approx(60 * (1 - 2.718281828**-1), rel=1e-6)
    assert planning.expected_length([answer(40, "length")], 500) == 500


def test_what_does_not_fit_is_said_and_refused(recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(tmp_path / "run")
    monkeypatch.setattr(essentials, "available_memory", lambda: 1000)
    (first, *_) = planned(recipe)["problems"]
    assert first.startswith("memory: training ")
    assert "set training.lora.rank=16" in first
    with pytest.raises(ValueError, match=r"memory: training .* set training.lora.rank=16"):
        run(recipe)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(essentials, "available_memory", lambda: 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 0, 1000))
    with pytest.raises(ValueError, match=r"disk: round-1/4-generator, round-1/6-policy need up to .* name another output"):
        run(recipe)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft then sets it
@pytest.mark.parametrize(
    ("kind", "modules", "trained"),
    [
        ("llama", ["self_attn.q_proj"], 2 * 4 * (32 + 32)),
        ("llama", r".*\.mlp\.(gate|up)_proj", 2 * 2 * 4 * (32 + 64)),
        ("gpt2", ["c_fc"], 2 * 4 * (32 + 128)),
    ],
)
def test_weights_of_an_adapter_are_those_that_peft_gives_it(
    tiny_folder: str, recipe_of: RecipeOf, tmp_path: Path, kind: str, modules: Any, trained: int
):
    """Rank 4 on two layers of width 32: rank * (inputs + outputs) of each module, whatever kind of layer it is."""
    model = tiny_folder if kind == "llama" else other_model_dir(tmp_path / kind, kind)
    lora = {"rank": 4, "target_modules": modules}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"training.lora": lora}))
    assert essentials.size_of(checkpoint(Path(model)), recipe).trained == trained
    whole = Recipe.model_validate(recipe_of(tmp_path / "run"))
    size = essentials.size_of(checkpoint(Path(model)), whole)
    assert size.trained == size.parameters


def test_checkpoints_that_are_there_need_no_more_disk(recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """1000 weights: a model of 4,000 bytes and three checkpoints of 12,000, of which two are on the disk."""
    recipe, stages = Recipe.model_validate(recipe_of(tmp_path / "run")), ["round-1/6-policy"]
    size = Size(1000, 1000, 2, 8, 32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(40_000, 24_000, 16_000))
    with pytest.raises(ValueError, match=r"disk: round-1/6-policy need up to 4e-05 GB"):
        essentials.check_disk(recipe, size, stages)
    for step in (1, 2):
        saved = tmp_path / f"run/round-1/6-policy/training-0/checkpoint-{step}/adapter"
        saved.mkdir(parents=True)
        (saved / "weights").write_bytes(bytes(12_000))
    essentials.check_disk(recipe, size, stages)


@pytest.mark.parametrize(("holdout", "said"), [(5, []), (6, ["queries.holdout: 6 of 6 queries; leave some to train on."])])
def test_what_leaves_nothing_to_train_on_is_said_as_the_run_says_it(
    recipe_of: RecipeOf, tmp_path: Path, holdout: int, said: list[str]
):
    recipe = recipe_of(tmp_path / "run", {"queries.holdout": holdout})
    assert planned(recipe, calibrate=False)["problems"] == said
    if said:
        with pytest.raises(ValueError, match=r"queries\.holdout: 6 of 6 queries; leave some to train on"):
            run(recipe)


@pytest.mark.parametrize(
    ("free", "refused", "warned"),
    [(1.1, False, False), (0.9, False, True), (0.45, False, True), (0.3, True, False)],
)
def test_what_may_fit_is_warned_of_and_what_will_not_is_refused(
    recipe_of: RecipeOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    refused: bool,
    warned: bool,
):
    """Half of what the longest responses would take is expected; a fifth less than that is no reason to refuse."""
    most = 10**12

    def costs(*_: Any, **__: Any) -> list[dict[str, Any]]:
        stage = {"samples": 1, "seconds": 1.0, "disk": 0, "passing_disk": 0, "memory": most // 2, "memory_most": most}
        return [stage]

    monkeypatch.setattr(planning, "stage_costs", costs)
    monkeypatch.setattr(planning, "held", lambda: 0)
    monkeypatch.setattr(planning, "device_memory", lambda _: round(free * most))
    found = planned(recipe_of(tmp_path / "run"), calibrate=False)
    assert [problem.startswith("memory: 500.0 GB at the peak, 1000.0 GB where") for problem in found["problems"]] == (
        [True] if refused else []
    )
    assert [warning.startswith("memory: 500.0 GB") for warning in found["warnings"] if "memory" in warning] == (
        [True] if warned else []
    )


@pytest.mark.parametrize(("load", "said"), [(0.1, []), (99.0, ["time: other processes are at work (load 99.0"])])
def test_a_calibration_beside_other_work_says_so(
    recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, said: list[str]
):
    monkeypatch.setattr(planning.os, "getloadavg", lambda: (load, 0.0, 0.0))
    found = planned(recipe_of(tmp_path / "run"), calibrate=False)
    assert found["load"] == load
    assert [warning.partition(" on ")[0] for warning in found["warnings"]] == said


def test_trackers_are_asked_for_before_anything_is_sampled(recipe_of: RecipeOf, tmp_path: Path):
    with pytest.raises(ValueError, match=r"training.report_to: 'wandbb' is no tracker; there are .*wandb"):
        run(recipe_of(tmp_path / "run", {"training.report_to": ["wandbb"]}))
    with pytest.raises(ValueError, match=r"training.report_to: clearml is not installed; pip install clearml"):
        run(recipe_of(tmp_path / "run", {"training.report_to": ["clearml"]}))
    assert not (tmp_path / "run").exists()


def test_what_can_t_be_trained_on_is_refused_before_anything_is_sampled(
    recipe_of: RecipeOf, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Batches that the processes can't share, more of them than devices, DeepSpeed, quantized weights."""
    two = {"launcher": {"kind": "accelerate", "processes": 2}}
    with pytest.raises(ValueError, match=r"alignment\.batch_size: 3 can't be shared by 2 processes .* take a multiple"):
        run(recipe_of(tmp_path / "run", {**two, "alignment.batch_size": 3}))
    (tmp_path / "deepspeed.yaml").write_text("distributed_type: DEEPSPEED")
    with pytest.raises(ValueError, match="DeepSpeed is not supported"):
        run(recipe_of(tmp_path / "run", {"launcher": {"kind": "accelerate", "config": str(tmp_path / "deepspeed.yaml")}}))
    quantized = Path(shutil.copytree(tiny_folder, tmp_path / "quantized"))
    configuration = json.loads((quantized / "config.json").read_text())
    configuration["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantized / "config.json").write_text(json.dumps(configuration))
    with pytest.raises(ValueError, match=r"policy\.model: its weights are quantized \(gptq\), which can't be trained here"):
        run(recipe_of(tmp_path / "run", {"policy.model": str(quantized)}))
    assert not (tmp_path / "run").exists()
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", two))
    essentials.check_processes(recipe, ["round-1/6-policy"])
    monkeypatch.setattr(essentials, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"launcher\.processes: 2, but CUDA devices here: 1; take no more"):
        essentials.check_processes(recipe, ["round-1/6-policy"])


def test_train_and_compare_ask_for_it_as_well(recipe_of: RecipeOf, given: Path, tmp_path: Path):
    """And a comparison that aligns for its benchmarks, before any arm."""
    changes = {"training.report_to": ["clearml"], "queries.holdout": 2}
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", changes))
    for begin in (lambda: train_pairs(given, recipe), lambda: compare(recipe, ["base", "pbaa", "sso"], [0])):
        with pytest.raises(ValueError, match=r"training.report_to: clearml is not installed"):
            begin()
    aligned = {"queries.holdout": 2, "compare.align": True, "evaluation.tasks": ["mt_bench"]}
    with pytest.raises(ValueError, match=r"mt_bench.*judge"):
        compare(Recipe.model_validate(recipe_of(tmp_path / "run", aligned)), ["pbaa"], [0])
    assert not (tmp_path / "run").exists()
