"""Nothing is destroyed by a second try: a changed recipe in the folder of a run is refused before anything is made again."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import children, manifest, rows, run, samples
from tiny import tiny_model_dir

import selfsteer
from selfsteer.comparing import compare
from selfsteer.given import train_pairs
from selfsteer.recipe.sections import Recipe
from selfsteer.store.folder import StageDamaged, WouldReplace

RecipeOf = Callable[..., dict[str, Any]]

SHORT = {"generator.max_steps": 1, "alignment.max_steps": 1}


@pytest.fixture(scope="module")
def finished(recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe_of(folder, SHORT))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """All but the lock, which says who looked last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "LOCK")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(recipe: dict[str, Any]) -> str:
    with pytest.raises(WouldReplace) as error:
        run(recipe)
    return str(error.value)


def test_a_changed_setting_is_refused_with_its_price_and_both_ways_out(folder: Path, recipe_of: RecipeOf):
    before = contents(folder)
    said = refused(recipe_of(folder, {**SHORT, "generator.beta": 0.2}))
    assert said == (
        f"{folder} holds what other settings made. Changed since:\n"
        "  generator.beta: 0.1 -> 0.2\n"
        "4-generator, 5-preferences, 5-quality, 6-policy would be made again; 6 pairs and 2 models would go.\n"
        f"Keep them: another folder, which borrows the samples that still hold: output={folder}-2 --borrow {folder}\n"
        "Give them up: --replace (in Python replace=True)"
    )
    assert contents(folder) == before, "a refusal leaves no trace"
    assert refused(recipe_of(folder, {**SHORT, "generator.beta": 0.2})) == said, "the second time as the first"


def test_replace_gives_them_up(folder: Path, recipe_of: RecipeOf):
    old = manifest(folder, "6-policy")["outputs"]
    run(recipe_of(folder, {**SHORT, "alignment.learning_rate": 2e-3}), replace=True)
    assert manifest(folder, "6-policy")["outputs"] != old
    run(recipe_of(folder, {**SHORT, "alignment.learning_rate": 2e-3}))  # and then it is theirs


def test_another_folder_borrows_what_still_holds(folder: Path, recipe_of: RecipeOf, tmp_path: Path):
    other = tmp_path / "other"
    selfsteer.run(Recipe.model_validate(recipe_of(other, {**SHORT, "generator.beta": 0.2})), borrow=[folder])
    for stage in ("1-principles", "2-responses", "3-steering"):
        assert manifest(other, stage)["outputs"] == manifest(folder, stage)["outputs"]
        assert not list((other / "round-1" / stage / "parts").glob("main-*")), "nothing was asked again"
    assert manifest(other, "4-generator")["outputs"] != manifest(folder, "4-generator")["outputs"]
    third = tmp_path / "third"  # what was lent can be lent on
    queries = tmp_path / "fewer.jsonl"
    lines = Path(recipe_of(folder)["queries"]["path"]).read_text().splitlines(keepends=True)
    queries.write_text("".join(lines[:4]))
    selfsteer.run(Recipe.model_validate(recipe_of(third, {**SHORT, "queries.path": str(queries)})), borrow=[other])
    assert len(rows(third, "2-responses")) == 4
    assert not list((third / "round-1/2-responses/parts").glob("main-*")), "nothing was asked again"
    assert set(samples(third, "2-responses")) == set(samples(folder, "2-responses"))


def test_what_costs_nothing_is_not_refused(folder: Path, recipe_of: RecipeOf):
    """Other measures, and settings that no result depends on."""
    old = manifest(folder, "6-policy")
    changes = {"quality.principle_consistency": True, "quality.gates": {"length_chosen": "> 0"}, "training.save_steps": 3}
    changes |= {"training.micro_batch_size": 2, "training.tokens_per_batch": 4096}
    run(recipe_of(folder, {**SHORT, **changes}))
    run(recipe_of(folder, {**SHORT, **changes, "quality.principle_consistency": False}))
    assert manifest(folder, "6-policy") == old


def test_files_that_a_kill_left_behind_and_nothing_sealed_are_not_read(folder: Path, recipe_of: RecipeOf):
    """Of a first try with queries held out and evaluation files: neither goes into what is made without them."""
    before, here = manifest(folder, "3-steering")["outputs"], folder / "round-1"
    for stage in ("2-responses", "3-steering", "5-quality"):
        (here / stage / "MANIFEST.json").unlink()
    shutil.copy(here / "2-responses/data.parquet", here / "2-responses/held-out.parquet")
    (here / "5-quality/contamination.json").write_text("{}")
    found = run(recipe_of(folder, SHORT))
    assert manifest(folder, "3-steering")["outputs"] == before
    assert "contamination" not in found["rounds"][0]


def test_a_damaged_model_that_is_trained_again_as_the_message_says_replaces_nothing(folder: Path, recipe_of: RecipeOf):
    """The same weights come out, in other seconds: pairs and policy were made from them and stay."""
    before = {name: manifest(folder, name) for name in ("5-preferences", "5-quality", "6-policy")}
    weights = folder / "round-1/4-generator/model/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(StageDamaged, match=r"delete \S+4-generator/MANIFEST.json and run the same command again"):
        run(recipe_of(folder, SHORT))
    (folder / "round-1/4-generator/MANIFEST.json").unlink()
    run(recipe_of(folder, SHORT))
    assert weights.read_bytes() == whole
    assert {name: manifest(folder, name) for name in before} == before


def test_an_unfinished_stage_with_nothing_lost_goes_on(recipe_of: RecipeOf, tmp_path: Path):
    """Killed while it sampled: no pair and no model is there yet."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path / "run", SHORT)))
    [child], _ = children(recipe, "1:SIGKILL:3-steering/parts/")
    assert child.status == -signal.SIGKILL
    run(recipe_of(tmp_path / "run", {**SHORT, "responses.temperature": 1.3}))


def test_an_unfinished_training_is_something_to_lose(recipe_of: RecipeOf, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path / "run")))
    [child], _ = children(recipe, "1:SIGKILL:checkpoint-2/COMPLETE")
    assert child.status == -signal.SIGKILL
    said = refused(recipe_of(tmp_path / "run", {"generator.beta": 0.2}))
    assert "4-generator would be made again; what an unfinished training has learned would go." in said
    said = refused(recipe_of(tmp_path / "run", {"responses.temperature": 1.3}))
    assert "2-responses, 3-steering, 4-generator would be made again; what an unfinished" in said
    run(recipe_of(tmp_path / "run"))


def test_changed_inputs_are_told_in_words(finished: Path, recipe_of: RecipeOf, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    queries = tmp_path / "queries.jsonl"
    queries.write_text(json.dumps({"query": "Another one?"}) + "\n")
    assert "queries.path:" in refused(recipe_of(folder, {**SHORT, "queries.path": str(queries)}))

    model = Path(shutil.copytree(recipe_of(folder)["policy"]["model"], tmp_path / "model"))
    own = tmp_path / "own"
    original = Path(recipe_of(folder)["queries"]["path"]).read_text()
    queries.write_text(original)
    recipe = recipe_of(own, {**SHORT, "queries.path": str(queries), "policy.model": str(model)})
    run(recipe)
    queries.write_text(original + json.dumps({"query": "Another one?"}) + "\n")
    said = refused(recipe)
    assert "Changed since:\n  the queries: the file is not what it was\n1-principles, 2-responses" in said
    queries.write_text(original)
    tiny_model_dir(model, seed=7, max_positions=2048)
    assert "  the policy: its weights are not what they were\n" in refused(recipe)


def test_a_replacement_that_was_broken_off_blames_no_file(
    folder: Path, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch
):
    """Behind other principles stands what was made with the earlier ones."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = recipe_of(folder, {**SHORT, "principles.concision": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr("selfsteer.pipeline.responses_stage", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, replace=True)
    assert "Changed since:\n  what the stage before handed on (principles)\n2-responses, 3-steering" in refused(recipe)


def test_training_on_pairs_made_elsewhere_is_guarded_too(recipe_of: RecipeOf, tmp_path: Path, given: Path):
    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", SHORT))
    train_pairs(given, recipe)
    given.write_text(given.read_text().replace("A fox.", "A dog."))
    with pytest.raises(WouldReplace) as error:
        train_pairs(given, recipe)
    assert "the pairs: their file is not what it was\n5-preferences, 6-policy would be made again" in str(error.value)
    assert "2 pairs and a model would go." in str(error.value)
    train_pairs(given, recipe, replace=True)


def test_a_comparison_is_guarded_and_lends_its_runs(recipe_of: RecipeOf, tmp_path: Path):
    folder = tmp_path / "both"
    changes = {**SHORT, "queries.holdout": 2}
    compare(Recipe.model_validate(recipe_of(folder, changes)), ["pbaa"], [0])
    warmer = {**changes, "responses.temperature": 1.3}
    with pytest.raises(WouldReplace) as error:
        compare(Recipe.model_validate(recipe_of(folder, warmer)), ["pbaa"], [0])
    assert f"output={folder}-2 --borrow {folder}" in str(error.value)
    compare(Recipe.model_validate(recipe_of(tmp_path / "both-2", changes)), ["pbaa"], [0], borrow=[folder])
    parts = tmp_path / "both-2" / "pbaa-seed0" / "round-1" / "2-responses" / "parts"
    assert not list(parts.glob("main-*"))


def test_the_command_ends_with_status_2_and_one_message(
    folder: Path, recipe_of: RecipeOf, tmp_path: Path, command: Callable[..., Any]
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(folder, SHORT)))
    arguments = ["run", str(recipe), "alignment.learning_rate=0.002"]
    ended = command(*arguments)
    assert ended.status == 2
    assert ended.err.count("selfsteer: error:") == 1
    assert "Traceback" not in ended.err
    assert "6-policy would be made again; a model would go." in ended.err
    missing = command(*arguments, "--borrow", "nosuch")
    assert (missing.status, "nosuch: no run here" in missing.err) == (2, True)
