"""Trainings in two gloo processes: the same curve as in one, stops, kills and continuations with another number of them."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import curve, seven_queries
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from waiting import stop_amid_training, until

from selfsteer import clock
from selfsteer.recipe.sections import Launcher, Lora, Policy
from selfsteer.training import checkpoints
from selfsteer.training.launch import launch
from selfsteer.training.parallel import accelerate_command, is_free
from selfsteer.training.train import TrainingJob, train
from selfsteer.training.trainer import TrainingDiverged, read_history

ONE, TWO = Launcher(), Launcher(kind="accelerate", processes=2)
SECONDS = 300
"""How long a group may take; nearly all of it is importing torch on a machine that does other things."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return seven_queries(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module", params=[None, Lora(rank=4)], ids=["full", "lora"])
def job(request: pytest.FixtureRequest, base: TrainingJob) -> TrainingJob:
    """The whole model, whose output layer is tied to its embedding, and an adapter on one where it stands alone."""
    return replace(
        base,
        policy=base.policy if request.param is None else untied(base.policy),
        output=str(Path(base.output).with_name(f"run-{request.param_index}")),
        training=base.training.model_copy(update={"lora": request.param}),
    )


def untied(policy: Policy) -> Policy:
    """The same weights, two of them in layers of their own."""
    folder = shutil.copytree(policy.model, f"{policy.model}-untied")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return policy.model_copy(update={"model": folder})


@pytest.fixture(scope="module")
def alone(job: TrainingJob) -> TrainingJob:
    """Trained by one process."""
    done = replace(job, output=job.output + "-alone")
    train(done)
    return done


@pytest.fixture(scope="module")
def together(job: TrainingJob) -> TrainingJob:
    """Trained by two, each with half of every batch."""
    done = replace(job, output=job.output + "-together")
    launch(done, TWO)
    return done


def near(expected: TrainingJob) -> list[tuple[Any, Any]]:
    return [(pytest.approx(loss, abs=1e-4), pytest.approx(norm, rel=1e-4)) for loss, norm in curve(expected)]


def test_two_processes_train_as_one(alone: TrainingJob, together: TrainingJob):
    """Losses, gradient norms, and the model; every number over all processes, nothing counted twice."""
    assert curve(together) == near(alone)
    ours, theirs = (read_history(Path(each.output) / "history.jsonl") for each in (together, alone))
    assert [step["tokens"] for step in ours] == [step["tokens"] for step in theirs]
    for name in ("margin", "accuracy", "chosen_logps", "rejected_logps", "sft"):
        assert [step[name] for step in ours] == [pytest.approx(step[name], abs=1e-3) for step in theirs]
    weights, expected = (load_file(Path(each.output) / "model" / "model.safetensors") for each in (together, alone))
    assert weights.keys() == expected.keys()
    assert all((weights[name] - expected[name]).abs().max() < 1e-5 for name in expected)


@pytest.mark.usefixtures("forked")
def test_two_processes_share_packed_micro_batches(alone: TrainingJob, job: TrainingJob):
    """Steps of four queries and of three, in two micro-batches a process at most, by their tokens."""
    training = job.training.model_copy(update={"tokens_per_batch": 150})
    packed = replace(job, output=job.output + "-packed", training=training)
    before = clock.spent()
    clock.begin_peaks()
    launch(packed, TWO)
    assert curve(packed) == near(alone)
    spent = clock.since(before, {})
    history = read_history(Path(packed.output) / "history.jsonl")
    assert spent["forward"].tokens == sum(step["tokens"] for step in history), "of both processes"
    assert 0 < spent["forward"].seconds + spent["backward"].seconds < sum(step["seconds"] for step in history), "of one"
    assert clock.peaks()["ram"] > 2 * 200e6, "of both together"
    assert not list(Path(packed.output).glob("spent-*"))


SHARDED = """
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_reshard_after_forward: true,
  fsdp_state_dict_type: SHARDED_STATE_DICT, fsdp_cpu_ram_efficient_loading: false, fsdp_offload_params: false}
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""


def test_sharded_weights_train_as_one(job: TrainingJob, alone: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FSDP2 through an accelerate configuration file: torch shards on a CPU, accelerate has to be made to (sharded.py)."""
    (tmp_path / "fsdp.yaml").write_text(SHARDED)
    command = accelerate_command(
        Launcher(kind="accelerate", config=str(tmp_path / "fsdp.yaml")), "selfsteer.training.launch"
    )
    assert command[-2:] == ["--module", "selfsteer.training.launch"]
    sharding = [*command[:-2], str(Path(__file__).parents[1] / "sharded.py")]
    monkeypatch.setattr("selfsteer.training.parallel.accelerate_command", lambda *_: sharding)
    sharded = replace(job, output=str(tmp_path / "run"))
    result = launch(sharded, TWO)
    assert curve(sharded) == near(alone)
    weights, expected = (load_file(Path(each.output) / "model" / "model.safetensors") for each in (sharded, alone))
    assert weights.keys() == expected.keys()
    assert all((weights[name] - expected[name]).abs().max() < 1e-5 for name in expected)
    last = checkpoints.latest(Path(sharded.output))
    assert last is not None
    assert len(list(last.rglob("*.distcp"))) == 4, "weights and optimizer, a part from each process"
    assert result.steps == 6
    with pytest.raises(ValueError, match=r"checkpoint-6: written with FSDP, and the training would go on without"):
        train(sharded)


def test_checkpoints_hold_what_every_process_wrote(together: TrainingJob):
    folders = sorted(Path(together.output).glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-5", "checkpoint-6"]
    for folder in folders:
        assert checkpoints.is_complete(folder)
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in folder.iterdir()}
        assert (folder / checkpoints.MARKER).stat().st_mtime_ns >= max(
            file.stat().st_mtime_ns for file in folder.iterdir() if file.name != checkpoints.MARKER
        )


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("begun", "continued"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(begun: int, continued: int, alone: TrainingJob, request: Any, tmp_path: Path):
    """From step 5 of 6, in the middle of an epoch."""
    source = alone if begun == 1 else request.getfixturevalue("together")
    going_on = replace(source, output=str(tmp_path / "run"))
    shutil.copytree(source.output, going_on.output)
    shutil.rmtree(Path(going_on.output) / "checkpoint-6")
    shutil.rmtree(Path(going_on.output) / "model")
    launch(going_on, ONE if continued == 1 else TWO)
    steps = read_history(Path(going_on.output) / "history.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert curve(going_on) == near(alone)
    assert curve(going_on)[:5] == curve(source)[:5], "the first five are not trained again"


def test_a_signal_to_the_parent_ends_in_a_complete_checkpoint(base: TrainingJob, tmp_path: Path):
    long = replace(base, output=str(tmp_path / "run"), epochs=300, learning_rate=1e-5)
    stop_amid_training(long, TWO, seconds=SECONDS)
    assert is_free(Path(long.output) / "GROUP"), "the group has ended before its parent"


def test_a_killed_parent_takes_its_group_along(base: TrainingJob, tmp_path: Path):
    """kill -9: the group notices, saves, ends; a training that is started meanwhile waits and goes on from there."""
    long = replace(base, output=str(tmp_path / "run"), max_steps=60, learning_rate=1e-5)
    output = Path(long.output)
    program = (
        "import json, sys; from selfsteer.training.launch import *; from selfsteer.recipe.sections import Launcher;"
        "launch(TrainingJob.from_json(json.load(open(sys.argv[1]))), Launcher(kind='accelerate', processes=2))"
    )
    given = tmp_path / "given.json"
    given.write_text(json.dumps(long.as_json()))
    with subprocess.Popen([sys.executable, "-c", program, str(given)], stderr=subprocess.DEVNULL) as parent:
        until(lambda: read_history(output / "history.jsonl"), "the first step", seconds=SECONDS)
        parent.kill()
    until(lambda: is_free(output / "GROUP"), "the end of the group", seconds=SECONDS)
    last = checkpoints.latest(output)
    assert last is not None
    stopped_at = checkpoints.step_of(last)
    assert stopped_at == len(curve(long)) < 60
    assert train(replace(long, max_steps=60)).steps == 60


@pytest.mark.usefixtures("forked")
def test_what_is_not_finite_in_one_process_stops_both(base: TrainingJob, tmp_path: Path):
    """One query of seven, so that one process alone computes a loss that is no number."""
    rows = pq.read_table(base.pairs).to_pylist()
    for row in rows[6:8]:
        row["ref_chosen_logps"] = float("nan")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    broken = replace(base, pairs=str(tmp_path / "pairs.parquet"), output=str(tmp_path / "run"))
    started = time.monotonic()
    with pytest.raises(TrainingDiverged, match=r"step [12]: the loss is nan"):
        launch(broken, TWO)
    assert time.monotonic() - started < SECONDS


@pytest.mark.usefixtures("forked")
def test_a_refusal_comes_back_in_words(base: TrainingJob, tmp_path: Path):
    with pytest.raises(ValueError, match="batch_size 3 can't be shared by 2 processes"):
        launch(replace(base, batch_size=3, output=str(tmp_path / "run")), TWO)


@pytest.mark.usefixtures("forked")
def test_weights_are_the_same_in_two_processes(base: TrainingJob):
    """WPO: each process weighs its own pairs; the step is that of one process with all of them."""
    one, two = (replace(base, weighting="wpo", epochs=1, output=f"{base.output}-wpo-{name}") for name in ("one", "two"))
    train(one)
    launch(two, TWO)
    steps = [read_history(Path(job.output) / "history.jsonl") for job in (one, two)]
    for alone, together in zip(*steps, strict=True):
        for key in ("loss", "grad_norm", "weight"):
            assert together[key] == pytest.approx(alone[key], rel=1e-4)
        assert 0 < alone["weight"] < 1  # pyright: ignore[reportTypedDictNotRequiredAccess]
