"""Preference data made in shards (queries.shard) and merged: what one run makes, byte for byte, and nothing asked twice."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from builders import THROUGH, children, manifest, rows, run, samples
from typer.testing import CliRunner

import selfsteer
from selfsteer.cli import app
from selfsteer.given import train_pairs
from selfsteer.merge import in_order, merge
from selfsteer.recipe.sections import Recipe, Share
from selfsteer.reports.verdict import verdict
from selfsteer.stages.costs import Counts, Lengths, Rates, Size, stage_costs
from selfsteer.stages.status import status
from selfsteer.store.folder import RunFolder

RecipeOf = Callable[..., dict[str, Any]]

PAIRS = "5-preferences"


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """11 queries, two of them held out, the others answered twice; some pairs are dropped."""
    queries = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    queries.write_text("".join(json.dumps({"query": f"What is {number} times {number}?"}) + "\n" for number in range(11)))
    return {
        "queries.path": str(queries),
        "queries.holdout": 2,
        "selection.samples": 2,
        "responses.max_new_tokens": 48,
        "filters.max_length_ratio": 1.5,
        "generator.max_steps": 1,
        "alignment.max_steps": 1,
        "quality.gates": {"principle_consistency": ">= 0"},
    }


def shard_run(recipe_of: RecipeOf, folder: Path, shard: str, changes: dict[str, Any], *lenders: Path) -> Any:
    recipe = recipe_of(folder, {**changes, "queries.shard": shard})
    return selfsteer.run(Recipe.model_validate(recipe), borrow=lenders)


@pytest.fixture(scope="module")
def whole(recipe_of: RecipeOf, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run makes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe_of(folder, changes))
    return folder


@pytest.fixture(scope="module")
def shards(recipe_of: RecipeOf, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same in three runs, each with a third of the queries."""
    place = tmp_path_factory.mktemp("shards")
    folders = [place / f"s{number}" for number in (1, 2, 3)]
    shard_run(recipe_of, folders[0], "1/3", changes)
    shard_run(recipe_of, folders[1], "2/3", changes, folders[0])
    shard_run(recipe_of, folders[2], "3/3", changes, folders[0])
    return folders


@pytest.fixture(scope="module")
def merged(shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        no_models(patch)
        merge([shards[2], shards[0], shards[1]], folder)
    return folder


def no_models(patch: pytest.MonkeyPatch) -> None:
    """Whoever opens an engine or a scorer fails."""

    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was opened")

    patch.setattr("selfsteer.engines.open.open_engine", opened)
    patch.setattr("selfsteer.training.scoring.open_scorer", opened)


def without_times(value: Any) -> Any:
    """Metrics, less what another folder and another hour may change."""
    if isinstance(value, dict):
        gone = {"seconds", "parts", "memory", "disk", "folder", "policy_folder", "pairs_folder", "tokens_per_second"}
        return {key: without_times(each) for key, each in value.items() if key not in gone}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def test_a_share_is_every_nth_query():
    assert [list(Share(number, 3).places(7)) for number in (1, 2, 3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_shards_share_one_generator_and_split_the_queries(whole: Path, shards: list[Path]):
    queries = [row["query_id"] for row in rows(whole, "1-principles")]
    for number, folder in enumerate(shards):
        found = manifest(folder, PAIRS)
        held_out = {row["query_id"] for row in rows(whole, "2-responses")}
        assert found["wanted"] == sum(2 - (each not in held_out) for each in queries[number::3]), "held-out ones once"
        assert {row["query_id"] for row in rows(folder, PAIRS)} <= set(queries[number::3])
        assert not (folder / "round-1/5-quality").exists()
        assert not (folder / "round-1/6-policy").exists()
        for stage in ("1-principles", "2-responses", "3-steering", "4-generator"):
            assert manifest(folder, stage)["fingerprint"] == manifest(whole, stage)["fingerprint"]
            assert manifest(folder, stage)["outputs"] == manifest(shards[0], stage)["outputs"]
    for folder in shards[1:]:
        assert not list((folder / "round-1/2-responses/parts").glob("main-*")), "taken over, not asked again"
        assert not list((folder / f"round-1/{PAIRS}/parts").glob("s1-*")), "of other queries: nothing to take over"
    keys = [set(samples(folder, PAIRS)) for folder in shards]
    assert sum(map(len, keys)) == len(set[str]().union(*keys)), "no query is answered twice"


def test_a_merged_run_seals_what_one_run_seals(whole: Path, shards: list[Path], merged: Path):
    found, expected = manifest(merged, PAIRS), manifest(whole, PAIRS)
    assert expected["dropped"], "or this test shows less than it should"
    assert expected["kept"] > 2
    one, other = (pq.read_table(folder / f"round-1/{PAIRS}/data.parquet") for folder in (merged, whole))
    assert one.equals(other)
    for name in ("outputs", "settings", "wanted", "kept", "dropped"):
        assert found[name] == expected[name], "the same bytes, measures among them"
    assert set(samples(merged, PAIRS)) == set(samples(whole, PAIRS))
    assert found["seconds"] >= sum(manifest(folder, PAIRS)["seconds"] for folder in shards), "of all machines together"
    tokens = [manifest(folder, PAIRS)["parts"]["sample"][1] for folder in shards]
    assert found["parts"]["sample"][1] == sum(tokens) == expected["parts"]["sample"][1]
    assert "queries.shard" not in (merged / "recipe.yaml").read_text()


def test_the_run_goes_on_from_the_merged_pairs(whole: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(merged, tmp_path / "run"))
    assert status(folder)["next"] == "begin round 1, 5-quality"

    def entered(_: Any) -> Any:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr("selfsteer.engines.embedded.TransformersEngine.__enter__", entered)
    found = selfsteer.run(folder / "recipe.yaml", f"output={folder}")
    assert manifest(folder, PAIRS) == manifest(merged, PAIRS), "not made again"
    for stage in (PAIRS, "5-quality", "5-selection", "6-policy"):
        assert manifest(folder, stage)["outputs"].keys() == manifest(whole, stage)["outputs"].keys()
    for stage in ("5-quality", "5-selection"):
        assert manifest(folder, stage)["outputs"] == manifest(whole, stage)["outputs"]
    weights = "model/model.safetensors"
    assert manifest(folder, "6-policy")["outputs"][weights] == manifest(whole, "6-policy")["outputs"][weights]
    expected = json.loads((whole / "metrics.json").read_text())
    assert without_times(json.loads((folder / "metrics.json").read_text())["rounds"]) == without_times(expected["rounds"])
    assert "shard" not in found["run"]


def test_a_shard_says_what_it_is(recipe_of: RecipeOf, changes: dict[str, Any], shards: list[Path]):
    found = status(shards[1])
    assert found["next"] == "nothing: shard 2 of 3 is made; when all are: selfsteer merge RUN... --output RUN"
    assert [stage["name"] for stage in found["stages"]] == [
        *("1-principles", "2-responses", "3-steering", "4-generator", PAIRS)
    ]
    metrics = json.loads((shards[1] / "metrics.json").read_text())
    assert metrics["run"]["shard"] == "2/3"
    assert "gates" not in metrics["rounds"][0] or not metrics["rounds"][0]["gates"], "gates are held on all pairs"
    again = shard_run(recipe_of, shards[1], "2/3", changes)
    lines = verdict(again)
    assert "from 11 queries, shard 2/3 of them made in" in lines[0]
    assert any(line == f"next    selfsteer merge {shards[1]} ... --output RUN" for line in lines)
    assert (shards[1] / "report.html").is_file()


def test_items_are_put_in_the_order_of_the_queries():
    """Queries a to e in two shards; b has nothing, c two."""
    found = in_order("abcde", [iter(["a1", "c1", "c2", "e1"]), iter(["d1"])], lambda item: item[0])
    assert list(found) == ["a1", "c1", "c2", "d1", "e1"]
    with pytest.raises(ValueError, match="shard 2: the query c is not one of its queries, or out of order"):
        list(in_order("abcde", [iter(["a1"]), iter(["b1", "c1"])], lambda item: item[0]))


# --- killed ----------------------------------------------------------------------------------------------------------------


def test_a_killed_merge_goes_on(shards: list[Path], merged: Path, tmp_path: Path):
    """At the end of an adopted stage, of the linked samples, of the pairs, and before the manifest."""
    command = ["merge", *map(str, shards), "--output", str(tmp_path / "run")]
    moments = [
        *("1:SIGKILL:run/recipe.yaml", "1:SIGKILL:1-principles", "4:SIGKILL:4-generator", "1:SIGKILL:5-preferences/parts"),
        *("1:SIGKILL:5-preferences/data.parquet", "1:SIGKILL:5-preferences/MANIFEST", THROUGH, THROUGH),
    ]
    found, said = children(tmp_path / "recipe.yaml", *moments, command=command)
    assert [child.status for child in found] == [-signal.SIGKILL] * 6 + [0, 0], said
    assert [child.sealed for child in found] == [0, 0, 3, 4, 4, 4, 5, 5]
    outputs = [manifest(folder, PAIRS)["outputs"] for folder in (tmp_path / "run", merged)]
    assert outputs[0] == outputs[1]
    assert sorted(samples(tmp_path / "run", PAIRS)) == sorted(samples(merged, PAIRS))


def test_a_shard_begun_on_another_day_is_told_the_day_of_the_first(
    recipe_of: RecipeOf, changes: dict[str, Any], shards: list[Path], tmp_path: Path
):
    """As where a template asks for the date: other prompts could not be merged."""
    first = Path(shutil.copytree(shards[0], tmp_path / "first"))
    described = json.loads((first / "run.json").read_text())
    described["sessions"][0] |= {"date": "2025-01-31", "started": "2025-01-31T12:00:00+00:00"}
    (first / "run.json").write_text(json.dumps(described))
    for _ in range(2):
        shard_run(recipe_of, tmp_path / "second", "2/3", changes, first)
        assert yaml.safe_load((tmp_path / "second/recipe.yaml").read_text())["policy"]["date"] == "2025-01-31"


# --- refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["9/8", "0/8", "x", "1/0", "3", "1/2/3", ""])
def test_what_is_no_shard_is_refused(recipe_of: RecipeOf, tmp_path: Path, shard: str):
    with pytest.raises(ValueError, match=f"queries.shard: .*'{shard}' is no shard; write the third of eight as 3/8"):
        shard_run(recipe_of, tmp_path / "run", shard, {})


@pytest.mark.parametrize(
    ("unfit", "said"),
    [
        ({"rounds": 2}, "queries.shard: a second round begins from the policy that all shards together align"),
        ({"generator.kind": "none"}, "queries.shard: what is split is the work of the generator"),
    ],
)
def test_what_can_not_be_split_is_refused(recipe_of: RecipeOf, tmp_path: Path, unfit: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        shard_run(recipe_of, tmp_path / "run", "1/3", unfit)


def test_more_shards_than_queries_are_refused(recipe_of: RecipeOf, changes: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=r"queries.shard: 12 shards of 11 queries; take fewer"):
        shard_run(recipe_of, tmp_path / "run", "1/12", changes)
    assert not (tmp_path / "run/round-1/2-responses").exists()


def test_only_a_run_is_split(recipe_of: RecipeOf, tmp_path: Path, given: Path):
    from selfsteer.comparing import compare

    recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"queries.shard": "1/3"}))
    with pytest.raises(ValueError, match=r"queries.shard: a comparison is not split"):
        compare(recipe, ["pbaa"], [0])
    with pytest.raises(ValueError, match=r"queries.shard: pairs made elsewhere are not split"):
        train_pairs(given, recipe)
    assert not (tmp_path / "run").exists()


def test_a_shard_trains_no_generator_of_its_own(
    recipe_of: RecipeOf, changes: dict[str, Any], shards: list[Path], tmp_path: Path
):
    folder = tmp_path / "run"
    said = r"queries.shard: 2/3 takes the generator over from the run of shard 1/3: name it with --borrow RUN, once its"
    with pytest.raises(ValueError, match=said):
        shard_run(recipe_of, folder, "2/3", changes)
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"1-principles is of other settings: seed: 0 -> 1\. Borrow the run of shard 1/3"):
        shard_run(recipe_of, folder, "2/3", {**changes, "seed": 1}, shards[0])


def refused(runs: list[Path], output: Path) -> str:
    there = output.exists()
    with pytest.raises(ValueError, match=r"\S") as error:
        merge(runs, output)
    assert output.exists() == there
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_merge_wants_every_shard_once(
    recipe_of: RecipeOf, changes: dict[str, Any], whole: Path, shards: list[Path], tmp_path: Path
):
    output = tmp_path / "run"
    one, two, three = shards
    assert refused([one, two, whole], output).startswith(f"{whole} is no shard: its recipe has no queries.shard")
    assert refused([one, two, two, three], output) == f"{two} (2/3) and {two} (2/3) are the same shard: name one of them."
    assert refused([one, three], output) == (
        "1 of 3 shards are missing: 2/3. Make them, such as:"
        f" selfsteer run {one}/recipe.yaml queries.shard=2/3 output={output}-2 --borrow {one}"
    )
    assert refused([tmp_path / "nosuch"], output).startswith(f"{tmp_path / 'nosuch'}: no run here")
    half = tmp_path / "half"
    shard_run(recipe_of, half, "2/2", changes, one)
    lent = [path.name for path in (half / f"round-1/{PAIRS}/parts").glob("*.jsonl")]
    assert {"-s1-main-" in name for name in lent} == {True, False}, "with another number, shards lend samples"
    assert len(samples(half, PAIRS)) == len(set(samples(half, PAIRS)))
    assert refused([one, two, half], output).startswith(f"{one} (1/3) and {half} (2/2) are not shards of one run: ")
    unfinished = Path(shutil.copytree(three, tmp_path / "unfinished"))
    (unfinished / f"round-1/{PAIRS}/MANIFEST.json").unlink()
    said = f"{unfinished} (3/3) has not made its pairs yet: continue it with the command that began it, then merge."
    assert refused([one, two, unfinished], output) == said
    shutil.copy(three / f"round-1/{PAIRS}/MANIFEST.json", unfinished / f"round-1/{PAIRS}")
    (unfinished / "round-1/3-steering/MANIFEST.json").unlink()
    assert refused([one, two, unfinished], output) == said, "the steering pairs are being made again"


def test_a_shard_of_another_recipe_is_refused(
    recipe_of: RecipeOf, changes: dict[str, Any], shards: list[Path], tmp_path: Path
):
    other = tmp_path / "other"
    shard_run(recipe_of, other, "3/3", {**changes, "generator.temperature": 0.6}, shards[0])
    assert refused([*shards[:2], other], tmp_path / "run") == (
        f"{other} (3/3) is of another run than {shards[0]} (1/3): generator.temperature: null -> 0.6. Make it again with the"
        f" recipe of the others and --borrow {shards[0]}."
    )


def test_other_settings_of_what_follows_are_told(
    recipe_of: RecipeOf, changes: dict[str, Any], shards: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    other = tmp_path / "other"
    shard_run(recipe_of, other, "3/3", {**changes, "alignment.beta": 0.5}, shards[0])
    merge([*shards[:2], other], tmp_path / "run")
    assert f"{other} (3/3): alignment.beta: 0.1 -> 0.5; what follows is done as {shards[0]} (1/3) has it" in caplog.messages
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["alignment"]["beta"] == 0.1


def test_a_merge_touches_no_other_run(whole: Path, shards: list[Path], merged: Path, tmp_path: Path):
    said = "holds another run; give the merged one a folder of its own with --output RUN."
    assert refused(shards, shards[0]) == f"{shards[0]} {said}"
    begun = tmp_path / "begun"
    with RunFolder(begun) as folder:
        folder.describe((whole / "recipe.yaml").read_text().replace("seed: 0", "seed: 1"), {})
    assert refused(shards, begun) == f"{begun} {said}"
    other = Path(shutil.copytree(merged, tmp_path / "other"))
    path = other / "round-1/4-generator/MANIFEST.json"
    path.unlink()
    shutil.copy(whole / "round-1/6-policy/MANIFEST.json", path)
    assert refused(shards, other) == f"{other} {said}"


def test_what_has_been_merged_is_left_as_it_is(shards: list[Path], merged: Path, tmp_path: Path):
    """Other settings may have gone on from it."""
    folder = Path(shutil.copytree(merged, tmp_path / "run"))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("weight_decay: 0.0", "weight_decay: 0.1"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert merge(shards, folder).kept == manifest(merged, PAIRS)["kept"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_damaged_shard_is_named(shards: list[Path], tmp_path: Path):
    damaged = Path(shutil.copytree(shards[1], tmp_path / "damaged"))
    (damaged / f"round-1/{PAIRS}/dropped.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"damaged/round-1/5-preferences/dropped.jsonl: changed since it was sealed"):
        merge([shards[0], damaged, shards[2]], tmp_path / "run")


def test_the_command(shards: list[Path], tmp_path: Path):
    ended = CliRunner().invoke(app, ["merge", *map(str, shards), "--output", str(tmp_path / "run")])
    assert ended.exit_code == 0, ended.output
    found = manifest(tmp_path / "run", PAIRS)
    assert f"run: {found['kept']} pairs of {found['wanted']}, from 3 shards" in ended.output
    assert f"next    selfsteer run {tmp_path / 'run' / 'recipe.yaml'}" in ended.output


# --- what it costs ---------------------------------------------------------------------------------------------------------


def test_a_shard_is_planned_for_its_share(recipe_of: RecipeOf, tmp_path: Path):
    """10 queries in 3 shards: 4, 3 and 3, two responses each; what is taken over costs nothing."""

    def costs(shard: str) -> dict[str, Any]:
        recipe = Recipe.model_validate(recipe_of(tmp_path / "run", {"queries.shard": shard}))
        counts = Counts(10, Lengths(5, 9), Lengths(15, 19), 20.0)
        found = stage_costs(recipe, counts, Size(1000, 1000, 2, 8, 32), Rates(), half=False)
        assert found[-1]["stage"] == PAIRS
        return {each["stage"]: each for each in found}

    first, second = costs("1/3"), costs("2/3")
    assert (first[PAIRS]["samples"], second[PAIRS]["samples"]) == (8, 6)
    assert (first[PAIRS]["scored"], second[PAIRS]["scored"]) == (4 * 45, 3 * 45)
    assert (first["2-responses"]["samples"], second["2-responses"]["samples"]) == (30, 0)
    assert first["4-generator"]["trained"] > 0
    assert (second["4-generator"]["trained"], second["4-generator"]["memory"]) == (0, 0)
