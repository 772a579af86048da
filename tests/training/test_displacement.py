"""The displacement meter against plain forward passes; trainings that end at its bound, and ways to be killed there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import FLOAT32, steering_group, training_job, write_pairs
from safetensors.torch import load_file
from tiny import tiny_model_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM

from selfsteer import runtime
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import Launcher, Lora, Policy, Training
from selfsteer.store import columns
from selfsteer.training import checkpoints
from selfsteer.training.displacement import Moved, Schedule, averages, schedule
from selfsteer.training.launch import launch
from selfsteer.training.packing import Row
from selfsteer.training.scoring import tokenize
from selfsteer.training.train import TrainingJob, TrainingResult, train
from selfsteer.training.trainer import PreferenceTrainer, TrainingDiverged, margin_queries, read_history, reward_queries

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


UNRELATED = (
    Row(ids("Where is it?"), (ids("No idea at all, none."),)),
    Row(ids("Who knows?"), (ids("No one. No idea."),)),
    Row(ids("Is it so?"), (ids("No."),)),
)
"""Like the rejected responses of the pairs, with which they go down step by step."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """Six queries in steps of six, six steps; a reading at each."""
    folder = tmp_path_factory.mktemp("displacement")
    policy = Policy(model=tiny_model_dir(folder / "tiny"))
    pairs = write_pairs(folder / "pairs.parquet", policy, FLOAT32, [steering_group(number) for number in range(6)])
    job = replace(training_job(policy, pairs, folder / "run"), batch_size=6, epochs=6)
    return measured(replace(job, unrelated=UNRELATED), displacement_steps=1, save_steps=100)


@pytest.fixture
def job(base: TrainingJob, tmp_path: Path) -> TrainingJob:
    return replace(base, output=str(tmp_path / "run"))


def measured(job: TrainingJob, **training: Any) -> TrainingJob:
    return replace(job, training=job.training.model_copy(update=training))


def losses(job: TrainingJob) -> list[float]:
    """What the unrelated responses have lost at each step."""
    return [-step["unrelated_moved"] for step in read_history(Path(job.output) / "history.jsonl")]


def weights(result: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(Path(result.model) / "model.safetensors")


def same(one: TrainingResult, other: TrainingResult) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the meter -------------------------------------------------------------------------------------------------------------


def test_a_schedule_by_hand():
    """A reading of 16 costs 16 * 10 = 160 tokens; 4 % of 3 * 16,000 are 1,920: 12 readings, with before and after."""
    assert schedule(10, 16_000, steps=250, every=None) == Schedule(16, 25)


@pytest.mark.parametrize(
    ("trained", "sample", "after", "saving"),
    [
        (3, 512, 3, 3),
        (16, 512, 16, 4),
        (40, 512, 16, 4),
        (100, 512, 25, 4),
        (4000, 512, 512, 32),
        (4000, None, 1000, 32),
        (40, 2, 2, 4),
    ],
)
def test_margins_are_measured_on_a_share_of_what_was_trained(trained: int, sample: int | None, after: int, saving: int):
    assert reward_queries(trained, sample) == after
    assert min(trained, margin_queries(trained)) == saving


def test_short_trainings_are_measured_on_less_and_once():
    """4 % of 3 * 1,300 are 156 tokens: three readings of five queries (150) are within them, of six (180) not."""
    assert schedule(10, 1300, steps=8, every=None) == Schedule(5, 8)


def test_one_response_would_say_nothing():
    """Four are read, whatever that costs."""
    assert schedule(10, 640, steps=8, every=None) == Schedule(4, 8)
    assert schedule(10, 100, steps=1, every=None) == Schedule(4, 1)


def test_what_the_recipe_says_holds():
    assert schedule(10, 640, steps=8, every=3) == Schedule(16, 3)


def test_averages_by_hand():
    """Nats 2 and -1 over 4 and 2 tokens: 0.5 a response; a token (0.5 - 0.5) / 2 = 0."""
    found = averages({"chosen": [(2.0, 4), (-1.0, 2)], "rejected": [], "unrelated": [(-3.0, 2)]})
    assert found == {"chosen_moved": 0.5, "chosen_moved_token": 0.0, "unrelated_moved": -3.0, "unrelated_moved_token": -1.5}


@pytest.mark.parametrize(
    "training", [{}, {"lora": Lora(rank=4)}, {"prefix_sharing": False}, {"micro_batch_size": 4}], ids=str
)
def test_readings_are_those_of_plain_forwards(training: dict[str, Any], job: TrainingJob):
    result = train(replace(measured(job, **training), epochs=3))
    before = AutoModelForCausalLM.from_pretrained(job.policy.model, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    prompts = Prompts(tiny_tokenizer())
    pairs = [tokenize(columns.pair(row), prompts) for row in pq.read_table(job.pairs).to_pylist()]

    def logps(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        return sum(found[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))

    def moved(prompt: tuple[int, ...], completion: tuple[int, ...]) -> tuple[float, int]:
        return logps(after, prompt, completion) - logps(before, prompt, completion), len(completion)

    expected: Moved = {
        "chosen": [moved(pair.prompt, pair.chosen) for pair in pairs],
        "rejected": [moved(pair.prompt, pair.rejected) for pair in pairs],
        "unrelated": [moved(row.prompt, row.completions[0]) for row in UNRELATED],
    }
    assert result.moved is not None
    for name, responses in expected.items():
        assert [tokens for _, tokens in result.moved[name]] == [tokens for _, tokens in responses]
        found = [nats for nats, _ in result.moved[name]]
        assert found == pytest.approx([nats for nats, _ in responses], abs=2e-4)
    assert averages(result.moved).items() <= {**result.last}.items()
    assert result.last["chosen_moved"] > 0.01 > 0 > result.last["rejected_moved"]


def test_it_changes_nothing_of_the_training(job: TrainingJob):
    without = measured(replace(job, output=job.output + "-without"), displacement_steps=0)
    one, other = train(job), train(without)
    assert same(one, other)
    assert other.moved is None
    assert not [key for key in other.last if "moved" in key]


def test_chosen_steps_and_the_last_one_are_read(job: TrainingJob):
    history = Path(train(measured(job, displacement_steps=4)).history)
    assert [step["step"] for step in read_history(history) if "unrelated_moved" in step] == [4, 6]


# --- the bound -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free(base: TrainingJob) -> TrainingJob:
    """Trained without a bound."""
    done = replace(base, output=base.output + "-free")
    train(done)
    return done


def bounded(job: TrainingJob, free: TrainingJob, step: int) -> TrainingJob:
    """With a bound that is crossed at this step and not before."""
    lost = losses(free)
    bound = (max(lost[: step - 1]) + lost[step - 1]) / 2
    assert bound > 0
    assert lost[step - 1] > bound >= max(lost[: step - 1])
    return measured(job, stop_at_displacement=bound)


@pytest.fixture(params=[None, Lora(rank=4)], ids=["full", "lora"], scope="module")
def of_kind(request: pytest.FixtureRequest, base: TrainingJob) -> tuple[TrainingJob, TrainingJob]:
    """The job, and the same trained without a bound."""
    job = measured(base, lora=request.param)
    done = replace(job, output=f"{base.output}-{request.param_index}-free")
    train(done)
    return job, done


def test_the_model_before_the_bound_is_delivered(of_kind: tuple[TrainingJob, TrainingJob], tmp_path: Path):
    """The same as of a training that was told to end there."""
    job, free = of_kind
    job = bounded(replace(job, output=str(tmp_path / "run")), free, 4)
    result = train(job)
    assert (result.steps, result.crossed, result.last["step"]) == (3, 4, 3)
    told = train(replace(job, output=job.output + "-told", epochs=3, training=free.training))
    assert same(result, told)
    assert result.moved == told.moved
    history = read_history(Path(result.history))
    assert [step["step"] for step in history] == [1, 2, 3, 4]
    assert losses(job) == losses(free)[:4]


def test_however_it_is_killed_the_same_is_delivered(job: TrainingJob, free: TrainingJob, monkeypatch: pytest.MonkeyPatch):
    job = measured(bounded(job, free, 5), save_steps=2)
    whole, output = train(job), Path(job.output)
    shutil.copytree(whole.model, output.with_name("kept"))
    wanted = whole._replace(model=str(output.with_name("kept")))

    def timeless() -> list[dict[str, Any]]:
        return [{**step, "seconds": 0} for step in read_history(output / "history.jsonl")]

    steps = timeless()

    def again() -> None:
        found = train(job)
        assert same(found, wanted)
        assert (found.steps, found.crossed, found.moved) == (4, 5, wanted.moved)
        assert timeless() == steps

    shutil.rmtree(output / "model")  # while the model was written
    again()
    shutil.rmtree(output / "model")  # when the bound was crossed, and nothing of it on the disk
    (output / "displaced.json").unlink()
    again()
    shutil.rmtree(output)  # asked to stop between two steps, before the bound
    step = PreferenceTrainer.log

    def log(self: PreferenceTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        step(self, logs, start_time)
        if self.state.global_step == 3:
            runtime.request_stop()

    with monkeypatch.context() as patched:
        patched.setattr(PreferenceTrainer, "log", log)
        with pytest.raises(runtime.Interrupted), runtime.graceful_stop():
            train(job)
    again()
    shutil.rmtree(output / "model")  # a damaged history is that of the checkpoint again
    (output / "history.jsonl").write_text("no step\n")
    found = train(job)
    assert same(found, wanted)
    assert (found.steps, found.crossed) == (4, 5)
    assert timeless() == steps[:4]


def test_the_checkpoint_before_the_bound_outlives_later_ones(job: TrainingJob, free: TrainingJob):
    """Read at 2, 4 and 6, saved at every step besides: two are kept anyway, and the one to go back to."""
    lost = losses(free)
    job = measured(job, displacement_steps=3, save_steps=1, stop_at_displacement=(lost[2] + lost[5]) / 2)
    result = train(job)
    assert (result.steps, result.crossed) == (3, 6)
    told = train(replace(job, output=job.output + "-told", epochs=3, training=free.training))
    assert same(result, told)


def test_a_bound_that_is_crossed_at_the_first_reading_is_refused(job: TrainingJob, free: TrainingJob):
    job = measured(job, displacement_steps=6, stop_at_displacement=losses(free)[5] / 2)
    with pytest.raises(TrainingDiverged, match=r"step 6: unrelated responses have lost more.*displacement_steps"):
        train(job)


def test_a_bound_without_responses_to_measure_is_refused(job: TrainingJob):
    with pytest.raises(ValueError, match=r"stop_at_displacement.*set queries.holdout"):
        train(replace(measured(job, stop_at_displacement=1.0), unrelated=()))


def test_a_bound_that_holds_changes_nothing(job: TrainingJob, free: TrainingJob):
    result = train(measured(job, stop_at_displacement=1e6))
    assert (result.steps, result.crossed) == (6, None)
    assert losses(job) == losses(free)
    assert checkpoints.latest(Path(job.output)) == Path(job.output) / "checkpoint-6"


@pytest.mark.usefixtures("forked")
def test_two_processes_read_and_stop_as_one(job: TrainingJob, free: TrainingJob):
    job = bounded(job, free, 4)
    result = launch(job, Launcher(kind="accelerate", processes=2))
    assert (result.steps, result.crossed) == (3, 4)
    assert losses(job) == pytest.approx(losses(free)[:4], abs=2e-3)
    alone = train(replace(job, output=job.output + "-alone"))
    found, expected = weights(result), weights(alone)
    start = load_file(Path(job.policy.model) / "model.safetensors")
    for name, tensor in expected.items():
        moved = (tensor - start[name]).abs().mean().item()
        assert (found[name] - tensor).abs().mean().item() < 0.05 * moved, name


def test_the_job_survives_its_file(job: TrainingJob):
    there = TrainingJob.from_json(json.loads(json.dumps(job.as_json())))
    assert there == job
    assert there.digest() == job.digest()
    assert replace(job, unrelated=UNRELATED[:1]).digest() != job.digest()


def test_training_settings_agree():
    with pytest.raises(ValueError, match="stop_at_displacement needs readings"):
        Training(stop_at_displacement=1.0, displacement_steps=0)
