"""`selfsteer clean`: what nothing loads any more goes, and every command goes on as if it were there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import manifest, run, samples

import selfsteer
from selfsteer.clean import clean, freed, removable
from selfsteer.recipe.sections import Recipe
from selfsteer.store.folder import HISTORY, RunFolder, RunFolderBusy, StageDamaged

RecipeOf = Callable[..., dict[str, Any]]
Command = Callable[..., Any]

SHORT = {"generator.max_steps": 1, "alignment.max_steps": 1, "responses.max_new_tokens": 12, "queries.holdout": 2}
GENERATOR = "4-generator"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_of: RecipeOf) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe_of(folder, SHORT))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """One's own copy of the run: what a test cleans is whole in the next."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def cleaned(folder: Path) -> None:
    clean(removable([folder]))


def tree(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def test_without_yes_nothing_is_deleted(copied: Path, command: Command):
    before = tree(copied)
    said = command("clean", str(copied)).out
    assert tree(copied) == before
    size = sum(size for name, size in before.items() if name.startswith(f"round-1/{GENERATOR}/model/"))
    assert f"round-1/{GENERATOR}: {size / 1e6:,.1f} MB\n" in said
    assert f"selfsteer clean {copied} --yes" in said


def test_only_the_generator_goes(copied: Path, command: Command):
    before = tree(copied)
    said = command("clean", str(copied), "--yes").out
    gone = before.keys() - tree(copied).keys()
    assert gone == {name for name in before if name.startswith(f"round-1/{GENERATOR}/model/")}
    assert "MB freed" in said
    assert sorted(manifest(copied, GENERATOR)["cleaned"]) == sorted(
        name.removeprefix(f"round-1/{GENERATOR}/") for name in gone
    )
    assert command("clean", str(copied)).out.startswith("nothing to delete")


def test_the_same_command_makes_nothing_again(copied: Path, recipe_of: RecipeOf):
    before = {file.parent.name: manifest(copied, file.parent.name) for file in copied.glob("round-1/*/MANIFEST.json")}
    cleaned(copied)
    metrics = run(recipe_of(copied, SHORT))
    for name, was in before.items():
        found = manifest(copied, name)
        ignored = {"sha256", "cleaned"} if name == GENERATOR else set[str]()
        assert {key: value for key, value in found.items() if key not in ignored} == {
            key: value for key, value in was.items() if key not in ignored
        }
    assert metrics["rounds"][0]["stages"][GENERATOR]["disk"] < 1e6


def test_an_alignment_with_other_settings_needs_no_generator(copied: Path, recipe_of: RecipeOf):
    cleaned(copied)
    run(recipe_of(copied, {**SHORT, "alignment.learning_rate": 1e-4}), replace=True)
    assert manifest(copied, GENERATOR)["cleaned"]


def test_where_it_is_needed_it_is_trained_again_to_the_same_weights(
    copied: Path, recipe_of: RecipeOf, caplog: pytest.LogCaptureFixture
):
    """Other filters make stage 5 again, of the same samples: a generator is there again, bit for bit."""
    before = manifest(copied, GENERATOR)
    asked = samples(copied, "5-preferences")
    cleaned(copied)
    caplog.set_level("INFO", logger="selfsteer")
    run(recipe_of(copied, {**SHORT, "filters.refusals": False}), replace=True)
    found = manifest(copied, GENERATOR)
    assert {**found["outputs"], HISTORY: ""} == {**before["outputs"], HISTORY: ""}, "its steps took other times"
    assert found["cleaned"] == []
    assert (copied / "round-1" / GENERATOR / "model" / "model.safetensors").is_file()
    assert samples(copied, "5-preferences") == asked, "nothing is sampled twice"
    assert f"{GENERATOR}: its model was cleaned, and 5-preferences is made with it: trained again" in caplog.text


def test_a_measure_that_needs_it_gives_up_nothing(copied: Path, recipe_of: RecipeOf):
    """quality.gain compares the generator with the policy: pairs and policy stay as they are, without --replace."""
    before = {name: manifest(copied, name) for name in ("5-preferences", "6-policy")}
    cleaned(copied)
    run(recipe_of(copied, {**SHORT, "quality.gain": 2}))
    assert manifest(copied, GENERATOR)["cleaned"] == []
    assert manifest(copied, "4-gain")["kept"] == 2
    assert {name: manifest(copied, name) for name in before} == before


def test_what_is_still_to_be_read_stays(copied: Path):
    (copied / "round-1" / "5-preferences" / "MANIFEST.json").unlink()
    assert removable([copied]) == []


def test_a_kill_while_deleting_leaves_what_the_next_call_deletes(copied: Path):
    model = copied / "round-1" / GENERATOR / "model"
    shutil.copytree(model, copied.parent / "kept")
    cleaned(copied)
    shutil.copytree(copied.parent / "kept", model)
    before = manifest(copied, GENERATOR)
    (found,) = removable([copied])
    assert {file.name for file in found.files} == {file.name for file in model.iterdir()}
    cleaned(copied)
    assert not model.exists()
    assert manifest(copied, GENERATOR) == before


def test_files_that_another_run_shares_free_nothing_until_both_are_cleaned(copied: Path, tmp_path: Path, command: Command):
    other = Path(shutil.copytree(copied, tmp_path / "other", copy_function=os.link))
    assert set(freed(removable([copied])).values()) == {0}
    both = sum(freed(removable([copied, other])).values())
    assert both == sum(file.stat().st_size for file in (copied / "round-1" / GENERATOR / "model").iterdir())
    assert "shared with another run" in command("clean", str(copied)).out


def test_damage_is_still_found_beside_what_was_cleaned(copied: Path, recipe_of: RecipeOf):
    cleaned(copied)
    history = copied / "round-1" / GENERATOR / "history.jsonl"
    history.write_text("")
    with pytest.raises(StageDamaged, match=r"history\.jsonl"):
        run(recipe_of(copied, SHORT))


def test_a_run_under_way_and_a_shard_are_refused(copied: Path, recipe_of: RecipeOf, tmp_path: Path):
    with RunFolder(copied), pytest.raises(RunFolderBusy):
        cleaned(copied)
    shard = tmp_path / "shard"
    run(recipe_of(shard, {**SHORT, "queries.holdout": 0, "queries.shard": "1/2"}))
    with pytest.raises(ValueError, match=r"shard 1/2.*selfsteer merge"):
        removable([shard])
    with pytest.raises(ValueError, match="no run here"):
        removable([tmp_path / "nothing"])


def test_both_models_of_a_dual_generator_with_adapters_go(recipe_of: RecipeOf, tmp_path: Path):
    folder = tmp_path / "run"
    changes = {**SHORT, "generator.kind": "dual", "training.lora": {"rank": 4}}
    run(recipe_of(folder, changes))
    cleaned(folder)
    for name in ("4-generator-good", "4-generator-bad"):
        stage = folder / "round-1" / name
        assert not (stage / "model").exists()
        assert not (stage / "adapter").exists()
    run(recipe_of(folder, changes))


def test_a_lender_that_was_cleaned_lends_its_samples_and_not_its_model(copied: Path, recipe_of: RecipeOf, tmp_path: Path):
    cleaned(copied)
    recipe = recipe_of(tmp_path / "next", {**SHORT, "filters.refusals": False})
    selfsteer.run(Recipe.model_validate(recipe), borrow=[copied])
    assert (tmp_path / "next" / "round-1" / GENERATOR / "model" / "model.safetensors").is_file()
    assert manifest(tmp_path / "next", GENERATOR)["cleaned"] == []
