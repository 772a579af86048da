"""What several test modules build or read: pairs and trainings, files of a run, reward models, templates."""

import gc
import json
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny import CHAT_TEMPLATE, END_ID, PAD_ID, tiny_model_dir, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

import selfsteer
from selfsteer.judges.reward import RewardModel
from selfsteer.models import checkpoint
from selfsteer.recipe.sections import Policy, Recipe, Training
from selfsteer.records import Message, Pair, side
from selfsteer.store.columns import pair_row
from selfsteer.training.scoring import open_scorer, score
from selfsteer.training.train import TrainingJob
from selfsteer.training.trainer import read_history

FLOAT32 = Training(dtype="float32", scheduler="constant", warmup_ratio=0.0, save_steps=2)


def steering_group(number: int) -> list[Pair]:
    def pair(kind: Any, principle: str, chosen: str, rejected: str) -> Pair:
        prompt = (Message(role="system", content=principle), Message(role="user", content=f"Question {number}?"))
        return Pair(query_id=str(number), kind=kind, prompt=prompt, chosen=side(chosen), rejected=side(rejected))

    good, bad, original = f"Paris, said {number} times." + " Yes." * number, "No idea.", f"Perhaps {number}."
    return [pair("l_plus", "Be accurate.", good, bad), pair("l_minus", "Be vague.", original, good)]


def write_pairs(path: Path, policy: Policy, training: Training, groups: list[list[Pair]]) -> Path:
    with open_scorer(policy, training, training.quantize) as scorer:
        rows = [pair_row(pair) for group in score(scorer, groups) for pair in group]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def training_job(policy: Policy, pairs: Path, output: Path) -> TrainingJob:
    """L_SSO with DPO, in batches of four queries, three epochs."""
    return TrainingJob(
        policy=policy,
        pairs=str(pairs),
        output=str(output),
        loss="dpo",
        beta=0.1,
        sft_weight=0.1,
        learning_rate=1e-3,
        batch_size=4,
        epochs=3,
        max_steps=None,
        training=FLOAT32,
        seed=0,
    )


def seven_queries(folder: Path) -> TrainingJob:
    """The last step of each epoch has three queries, which two processes can't halve; a checkpoint a step."""
    policy = Policy(model=tiny_model_dir(folder / "tiny"))
    pairs = write_pairs(folder / "pairs.parquet", policy, FLOAT32, [steering_group(number) for number in range(7)])
    training = FLOAT32.model_copy(update={"save_steps": 1})
    return replace(training_job(policy, pairs, folder / "run"), training=training)


def curve(job: TrainingJob) -> list[tuple[float, float]]:
    return [(step["loss"], step["grad_norm"]) for step in read_history(Path(job.output) / "history.jsonl")]


def run(recipe: dict[str, Any], *, replace: bool = False) -> Any:
    return selfsteer.run(Recipe.model_validate(recipe), replace=replace)


def rows(run_folder: Path, stage: str, number: int = 1) -> list[dict[str, Any]]:
    return file_rows(run_folder, f"{stage}/data.parquet", number)


def file_rows(run_folder: Path, file: str, number: int = 1) -> list[dict[str, Any]]:
    return pq.read_table(run_folder / f"round-{number}" / file).to_pylist()


def manifest(run_folder: Path, stage: str, number: int = 1) -> dict[str, Any]:
    return json.loads((run_folder / f"round-{number}" / stage / "MANIFEST.json").read_text())


def samples(run_folder: Path, stage: str, number: int = 1) -> list[str]:
    """The keys in the parts of a stage, in their order on disk; twice where a sample was made twice."""
    parts = sorted((run_folder / f"round-{number}" / stage / "parts").glob("*.jsonl"))
    return [json.loads(line)["key"] for part in parts for line in part.read_text().splitlines()]


def plain_logps(folder: str, row: dict[str, Any], side: str) -> tuple[float, int]:
    """log pi(response | bare query) by one forward and a loop."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = row.get(f"{side}_ids")
    if ids is None:  # made elsewhere: the text, and what closes a turn in the tiny template
        ids = [*tokenizer(row[side][0]["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt_ids) + i - 1, token].item() for i, token in enumerate(ids)), len(ids)


CHILDREN = """
import gc, json, os, signal, sys, traceback
from pathlib import Path
import torch, transformers, datasets, peft, pyarrow.parquet, selfsteer
from selfsteer import cli, merge, pipeline, reports
gc.freeze()

def child(recipe, moment):
    count, name, place = moment.split(":")
    left = int(count)

    def counted(sync):
        def step(descriptor):
            nonlocal left
            left -= place in os.readlink(f"/proc/self/fd/{descriptor}")
            if left == 0:
                left = -1
                os.kill(os.getpid(), getattr(signal, name))
            return sync(descriptor)
        return step

    os.fsync = counted(os.fsync)
    sys.argv = ["selfsteer", *command]
    cli.main()

command, recipe, *moments = sys.argv[1:]
command = json.loads(command)
for moment in moments:
    pid = os.fork()
    if pid == 0:
        try:
            child(recipe, moment)
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(ended.code)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sealed = len(list(Path(recipe).parent.glob("run/round-1/*/MANIFEST.json")))
    print('child', status, sealed, flush=True)
"""


class Child(NamedTuple):
    status: int
    sealed: int
    """Stages with a manifest, when it had ended."""


THROUGH = "0:SIGKILL:"
"""Nothing happens to this child."""


def children(recipe: Path, *moments: str, command: Sequence[str] = ()) -> tuple[list[Child], str]:
    """What became of every child, and what they all said. command: what is run, of the run folder beside the recipe."""
    arguments = json.dumps(list(command) or ["run", str(recipe)])
    started = [sys.executable, "-c", CHILDREN, arguments, str(recipe), *moments]
    ended = subprocess.run(started, capture_output=True, text=True, timeout=1200, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = [line.removeprefix("child ").split() for line in ended.stdout.splitlines() if line.startswith("child ")]
    return [Child(int(status), int(sealed)) for status, sealed in lines], ended.stderr


def reward_folder(folder: Path, *, labels: int = 1, pad: int | None = PAD_ID) -> RewardModel:
    """A random two-layer Llama with a score for a head."""
    tokenizer = tiny_tokenizer()
    # The last token is the end token, as in many reward models: taken for padding, it would not be read.
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    state = torch.get_rng_state()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        num_labels=labels,
        pad_token_id=pad,
        eos_token_id=END_ID,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    torch.set_rng_state(state)
    tokenizer.save_pretrained(folder)
    return RewardModel(model=checkpoint(folder), policy=Policy(model=str(folder)), dtype="float32", max_tokens=200)


@contextmanager
def no_model_left() -> Generator[None]:
    """Fails where the block leaves a model in memory, if only for the garbage collector to find."""
    gc.collect()
    before = _models()
    yield
    assert _models() == before


def _models() -> int:
    return sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects())


def own_reward(model: RewardModel, question: str, response: str) -> float:
    """One conversation in a forward pass, without padding, straight from the model."""
    tokenizer = AutoTokenizer.from_pretrained(model.model.path)
    network = AutoModelForSequenceClassification.from_pretrained(model.model.path, dtype=torch.float32)
    asked = (Message(role="user", content=question), Message(role="assistant", content=response))
    messages = [dict(message) for message in asked]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return network(input_ids=torch.tensor([ids])).logits.item()


HEADER = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


ALWAYS = HEADER + "{% if add_generation_prompt %}<think>\n{% endif %}"  # as DeepSeek-R1's


UNLESS_TOLD = (
    HEADER + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)  # Qwen3's


DATED = "{% if strftime_now is defined %}Today is {{ strftime_now('%d %b %Y') }}.{% endif %}" + HEADER
