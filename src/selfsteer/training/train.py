"""From pairs to a model: the one training, for the data generator and for the policy.

Trains the data generator (two steering pairs a query: L_SSO) and the policy (one alignment pair a query). The loss of an
optimizer step is the mean over its queries of the sum over each query's pairs, whatever the micro-batches. Reference
log-probabilities come with the pairs; no reference model is loaded.

    output/checkpoint-N/   complete or not there (checkpoints.py); a stopped training continues from the newest
    output/history.jsonl   one line an optimizer step
    output/model/          the result, an ordinary Hugging Face folder (adapter merged); see export.py
    output/adapter/        with training.lora, the adapter itself, in peft's format
    output/displaced.json  that training.stop_at_displacement was crossed, and the step whose model is delivered

With training.lora.quantize the frozen weights are held in 4 bits (QLoRA, arXiv 2305.14314). The reference has to
be the policy at step 0, or the first margins would be errors of rounding: so it is the policy in 4 bits, too, and the pairs
come with its log-probabilities (`stages/training.py` takes them). What is delivered is the adapter on the full weights, as
engines sample it; its margin there is measured beside that of the training (`Saving`).

Left out on purpose: evaluation during training; the stages measure before and after.
"""

import logging
import math
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed

from selfsteer import runtime
from selfsteer.adapters import with_adapter
from selfsteer.clock import part
from selfsteer.models import (
    compute_dtype,
    end_ids,
    let_go,
    load_configuration,
    load_model,
    pick_device,
    positions_of,
    quantizable,
    tokenizer_of,
)
from selfsteer.prompts import Prompts
from selfsteer.recipe.sections import LossName, Policy, Training, Weighting
from selfsteer.runtime import progress
from selfsteer.store.durable import canonical_json, digest, file_digest, make_folder, read_object, write
from selfsteer.training import checkpoints, parallel
from selfsteer.training.displacement import LARGEST, Meter, Moved, schedule
from selfsteer.training.export import Delivery, Margin, Saving, deliver, lost
from selfsteer.training.logps import Packing, choose_packing, hold_in_half, teach
from selfsteer.training.objective import REFERENCE_FREE, objective
from selfsteer.training.packing import Row, pack, row_tokens, share_prompts
from selfsteer.training.trainer import (
    Collator,
    JobParts,
    Keeper,
    Order,
    PreferenceTrainer,
    Step,
    TokenGroups,
    TrainingDiverged,
    history_of,
    margins,
    on_one_device,
    read_history,
    spread,
    token_groups,
    write_history,
)

log = logging.getLogger(__name__)

MECHANICS = {
    *("micro_batch_size", "tokens_per_batch", "prefix_sharing", "gradient_checkpointing"),
    *("save_steps", "save_dtype", "report_to"),
}
"""Of the training section, what may change between a stop and its continuation; `save_dtype` makes other files of the same
weights, the others nothing but other roundings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One training, from pairs to a model; `as_json` is all of it."""

    policy: Policy
    """The model to start from; `policy.model` is a local folder."""
    pairs: str
    """Parquet with the columns of `columns.PAIRS`, the rows of one query together; their log-probabilities are those of
    the reference, loaded as this training loads the policy (`scoring.open_scorer` with `training.lora.quantize`)."""
    output: str
    loss: LossName
    beta: float
    sft_weight: float
    learning_rate: float
    batch_size: int
    """Queries an optimizer step."""
    epochs: float
    max_steps: int | None
    training: Training
    seed: int
    weighting: Weighting = "none"
    unrelated: tuple[Row, ...] = ()
    """Responses to queries that train nothing, one completion a row: what displacement is measured on (displacement.py)."""

    def as_json(self) -> dict[str, Any]:
        """The job as JSON values."""
        return _JSON.dump_python(self, mode="json")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the log-probabilities of a reference model."""
        return self.loss not in REFERENCE_FREE

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainingJob":
        """The job that `as_json` gave."""
        return _JSON.validate_python(values)

    def digest(self) -> str:
        """sha256 of what determines the result, no paths; of how prompts are rendered the output folder tells."""
        content = self.as_json()
        policy = {file.name: file_digest(file) for file in sorted(Path(self.policy.model).glob("*.safetensors"))}
        pairs = file_digest(Path(self.pairs))
        del content["output"]
        return digest(content | {"policy": policy, "pairs": pairs, "training": identity_of(self.training)})


_JSON = TypeAdapter(TrainingJob)


def identity_of(training: Training, mechanics: Collection[str] = MECHANICS) -> dict[str, Any]:
    """What of the section determines the result; a setting that earlier versions had not is there where it is used."""
    found = training.model_dump(mode="json", exclude=set(mechanics))
    if training.lora is not None and training.lora.quantize is None:
        del found["lora"]["quantize"]
    return found


class TrainingResult(NamedTuple):
    """What a training made."""

    model: str
    """The folder of the trained model."""
    history: str
    """JSONL, one `Step` a line."""
    steps: int
    queries: int
    """Queries in the pairs file."""
    shared: bool
    """Prompts were computed once for their completions."""
    first: Step
    last: Step
    saving: Saving | None
    """What saving cost; None in a process of a group that is not the first."""
    moved: Moved | None
    """How far the responses of the displacement meter have moved under what is delivered; None where it is off."""
    crossed: int | None
    """The step at which training.stop_at_displacement was found crossed; `last` and `steps` are of the reading before it."""


def train(job: TrainingJob) -> TrainingResult:
    """Run a training, or continue it where it stopped; in every process of a group alike (`launch.py`).

    Raises `runtime.Interrupted` when asked to stop (a complete checkpoint is on disk), `TrainingDiverged` for a loss or
    gradient that is not finite, or for a displacement beyond its bound at the first reading already, ValueError for pairs
    that can't be trained on.
    """
    make_folder(Path(job.output))
    result = _train(job)
    if result is None:
        log.warning(
            "%s: the training ends at training.stop_at_displacement; its model is that of the reading before", job.output
        )
        result = _train(job)
    assert result is not None, "what goes back to a checkpoint takes no step"
    return result


def check_optimizer(name: str) -> None:
    """Raises ValueError for an optimizer that can't be had here; before anything is sampled for its training."""
    if name.startswith("schedule_free"):  # what is delivered would be the weights of its last step and not their average
        raise ValueError(f"training.optimizer: {name} averages weights, which is not done here; take adamw_torch")
    try:
        with TemporaryDirectory() as folder:
            Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(output_dir=folder, optim=name, use_cpu=True))
    except (ImportError, ValueError) as error:
        raise ValueError(f"training.optimizer: {error}") from error


class _Start(NamedTuple):
    """Where a training begins, or goes on."""

    identity: str
    """The digest of the job."""
    resume: Path | None
    """The checkpoint that it goes on from."""
    crossed: int | None
    """It went too far at this step; what is delivered is `resume`."""

    @property
    def done(self) -> int:
        """Optimizer steps that were taken before."""
        return checkpoints.step_of(self.resume) if self.resume else 0


def _train(job: TrainingJob) -> TrainingResult | None:
    """None where the displacement went too far; called again, it goes back and delivers."""
    output = Path(job.output)
    args = _arguments(job)  # first of all: it makes the processes of a group know each other
    start = parallel.agree(lambda: _starting_point(job, output))
    if start.crossed is not None:
        args.max_steps = start.done
    tokenizer = tokenizer_of(job.policy)
    data = _groups(job, tokenizer)
    set_seed(job.seed)
    model, packing = _prepare_model(job, data)
    pairs = margins(data, Collator(packing), beta=job.beta, weighted=job.weighting != "none")
    at_first = pairs(model)  # zero where the reference is this model
    planned = round(len(data) * job.epochs) if job.max_steps is None else job.max_steps * job.batch_size
    meter = _meter(job, data, packing, planned)
    if meter is not None:
        with part("measure"):
            meter.begin(model)
    keeper = Keeper(output, start.identity, start.resume, job.training.stop_at_displacement)
    with _progress(max(1, planned - start.done * job.batch_size)) as advance:
        parts = JobParts(
            order=_order(job, data, args),
            collator=Collator(packing),
            loss=objective(job.loss, beta=job.beta, sft_weight=job.sft_weight),
            beta=job.beta,
            sft_weight=job.sft_weight,
            weighted=job.weighting != "none",
            meter=meter,
            advance=advance,
        )
        trainer = _trainer(job, model, args, data, parts)
        _refuse_otherwise_sharded(start.resume, sharded=trainer.is_fsdp_enabled)
        trainer.add_callback(keeper)
        trainer.train(resume_from_checkpoint=str(start.resume) if start.resume else None)
    if stopped := parallel.stop_signal():
        raise runtime.Interrupted(stopped)
    taken = trainer.state.global_step
    if keeper.crossed:
        _turn_back(output, keeper, taken)
        return None
    with part("measure"):
        moved = None if meter is None else meter.moved(cast(torch.nn.Module, trainer.model_wrapped))
    saving = _export(trainer, tokenizer, job, data, lambda trained: pairs(trained) - at_first)
    history = read_history(output / "history.jsonl")
    return TrainingResult(
        model=str(output / "model"),
        history=str(output / "history.jsonl"),
        steps=taken,
        queries=len(data),
        shared=packing is pack,
        first=history[0],
        last=next(step for step in reversed(history) if step["step"] == taken),
        saving=saving,
        moved=moved,
        crossed=start.crossed,
    )


def _groups(job: TrainingJob, tokenizer: PreTrainedTokenizerBase) -> TokenGroups:
    """The pairs of each query as token ids."""
    prompts = Prompts.of(job.policy, tokenizer, end_ids(job.policy.model, tokenizer))
    positions = positions_of(job.policy.model, trust_remote_code=job.policy.trust_remote_code)
    tokens = Path(job.output) / ".tokens"
    return token_groups(Path(job.pairs), prompts, tokens, needs_reference=job.needs_reference, positions=positions)


def _trainer(
    job: TrainingJob, model: PreTrainedModel | PeftModel, args: TrainingArguments, data: TokenGroups, parts: JobParts
) -> PreferenceTrainer:
    args.gradient_accumulation_steps = parts.order.each
    args.per_device_train_batch_size = -(-job.batch_size // (args.world_size * parts.order.each))  # what trackers show
    trainer = PreferenceTrainer(model, args, data, parts)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        log.warning("accelerate does not shard on this kind of device: every process holds the whole model")
    if trainer.is_fsdp_enabled:
        if job.training.quantize is not None:
            raise ValueError(
                "training.lora.quantize: FSDP can't shard weights in 4 bits; set it to null, or share the batch alone"
            )
        # `teach` casts where it is right to: FSDP's own policy would round the log-probabilities that the model returns.
        cast(Any, trainer.accelerator.state.fsdp_plugin).mixed_precision_policy = None
    trainer.remove_callback(PrinterCallback)
    return trainer


def _refuse_otherwise_sharded(resume: Path | None, *, sharded: bool) -> None:
    """FSDP's checkpoints are read by FSDP alone, and it reads no others."""
    if resume is not None and any(resume.glob("pytorch_model_fsdp*")) != sharded:
        ours, theirs = ("with it", "without") if sharded else ("without it", "with")
        raise ValueError(
            f"{resume}: written {theirs} FSDP, and the training would go on {ours}. Set the launcher as it was, or delete"
            f" {resume.parent} to begin the training anew."
        )


_DISPLACED = "displaced.json"


def _starting_point(job: TrainingJob, output: Path) -> _Start:
    """Steps behind the checkpoint that it goes on from are forgotten, unless they show why it goes back to it."""
    identity = job.digest()
    resume = checkpoints.resume_point(output, identity)
    found = read_object(output / _DISPLACED) if (output / _DISPLACED).exists() else {}
    if found.get("training") == identity and checkpoints.is_complete(back := checkpoints.at_step(output, found["step"])):
        if not any(step["step"] == found["step"] for step in _history(output)):
            write_history(output / "history.jsonl", history_of(back))
        return _Start(identity, back, found["crossed"])
    (output / _DISPLACED).unlink(missing_ok=True)
    write_history(output / "history.jsonl", history_of(resume) if resume else [])
    return _Start(identity, resume, None)


def _history(output: Path) -> list[Step]:
    """The steps in an output folder; none where they are damaged."""
    try:
        return read_history(output / "history.jsonl")
    except ValueError:
        return []


def _turn_back(output: Path, keeper: Keeper, crossed: int) -> None:
    """Make durable that the training went too far at step `crossed`, and that its model is of the reading before.

    Raises TrainingDiverged where there was none.
    """
    if keeper.within is None:
        raise TrainingDiverged(
            f"step {crossed}: unrelated responses have lost more than training.stop_at_displacement at the first reading."
            " Lower the learning rate, read more often (training.displacement_steps), or raise the bound."
        )
    if parallel.is_first():
        history = output / "history.jsonl"
        write_history(history, read_history(history))
        write(output / _DISPLACED, canonical_json({"training": keeper.training, "step": keeper.within, "crossed": crossed}))
    parallel.wait()


def _meter(job: TrainingJob, data: TokenGroups, packing: Packing, planned: int) -> Meter | None:
    """The displacement meter, unless it is off. planned: queries that will be trained on."""
    if job.training.stop_at_displacement is not None and not job.unrelated:
        raise ValueError("training.stop_at_displacement: no unrelated response can be measured here; set queries.holdout")
    if job.training.displacement_steps == 0:
        return None
    groups = [share_prompts(data[index].pairs) for index in spread(len(data), LARGEST)]
    of_pairs = sum(row_tokens(group.rows) for group in groups) / len(groups)
    of_unrelated = row_tokens(job.unrelated) / max(1, len(job.unrelated))
    size, every = schedule(
        of_pairs + of_unrelated,
        of_pairs * planned,
        steps=max(1, math.ceil(planned / job.batch_size)),
        every=job.training.displacement_steps,
    )
    pairs = [groups[index] for index in spread(len(groups), size)]
    return Meter(pairs, job.unrelated[:size], packing, job.training, every=every)


def _progress(queries: int) -> AbstractContextManager[Callable[[int], None]]:
    if parallel.is_first():
        return progress("training", queries, unit="queries")
    return nullcontext(lambda _: None)


def _prepare_model(
    job: TrainingJob, data: TokenGroups, *, to_train: bool = True
) -> tuple[PreTrainedModel | PeftModel, Packing]:
    """The policy, with its adapter where one is trained. to_train: weights that are frozen need not be in float32."""
    training = job.training
    device = pick_device()
    model = load_model(
        job.policy.model,
        dtype=torch.float32,
        device=device,
        trust_remote_code=job.policy.trust_remote_code,
        quantize=training.quantize if to_train else None,
    )
    dtype = compute_dtype(training.dtype, device)
    teach(model, dtype, job.weighting)
    rows = share_prompts(data[0].pairs).rows
    packing = choose_packing(model, rows, sharing=training.prefix_sharing)
    if training.lora is None:
        return model, packing
    layers = quantizable(model)
    adapted = with_adapter(model, training.lora)
    if type(model.get_output_embeddings()) is not torch.nn.Linear:
        raise ValueError("training.lora.target_modules: the output layer can't carry an adapter; leave it out")
    if to_train and os.environ.get("ACCELERATE_USE_FSDP") != "true":  # which shards weights of one dtype together
        with adapted.disable_adapter():
            hold_in_half(model, layers, dtype)
    return adapted, packing


def _arguments(job: TrainingJob) -> TrainingArguments:
    training = job.training
    device = pick_device()
    dtype = compute_dtype(training.dtype, device)
    args = TrainingArguments(
        output_dir=job.output,
        learning_rate=job.learning_rate,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps or -1,
        optim=training.optimizer,
        lr_scheduler_type=training.scheduler,
        # 1 would mean one step.
        warmup_steps=min(training.warmup_ratio, math.nextafter(1.0, 0.0)),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_steps=training.save_steps,
        ddp_find_unused_parameters=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=training.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        seed=job.seed,
        accelerator_config={"even_batches": False},  # `Order` sees to it that all processes have as many
    )
    on_one_device(args)
    if job.batch_size % args.world_size:
        raise ValueError(f"batch_size {job.batch_size} can't be shared by {args.world_size} processes; take a multiple")
    return args


def _order(job: TrainingJob, data: TokenGroups, args: TrainingArguments) -> Order:
    training, share = job.training, job.batch_size // args.world_size
    micro = max(size for size in range(1, min(share, training.micro_batch_size) + 1) if share % size == 0)
    order = Order(data, job.batch_size, processes=args.world_size, seed=job.seed, micro=micro)
    if training.tokens_per_batch is not None:
        epochs = job.epochs if job.max_steps is None else job.max_steps * job.batch_size / len(data)
        order.pack(training.tokens_per_batch, epochs=math.ceil(epochs))
        log.info("micro-batches of at most %d tokens: %d a step and process", training.tokens_per_batch, order.each)
    elif micro != training.micro_batch_size:
        log.info("micro-batches of %d, so that they make up a batch of %d", micro, share)
    return order


def _export(
    trainer: PreferenceTrainer, tokenizer: PreTrainedTokenizerBase, job: TrainingJob, data: TokenGroups, margin: Margin
) -> Saving | None:
    """What the first process delivers; None in the others."""
    model = _whole_model(trainer, job)
    if model is None:
        return None
    if not trainer.is_fsdp_enabled:
        _forget_optimizer(trainer, model)
    given = load_configuration(job.policy.model, trust_remote_code=job.policy.trust_remote_code)
    to = Delivery(Path(job.output) / "model", given, job.training.save_dtype, tokenizer)
    if trainer.is_fsdp_enabled:
        return deliver(model, to, None)
    if all(weights.dtype == torch.float32 for weights in model.parameters()):
        return deliver(model, to, margin)
    assert isinstance(model, PeftModel)
    if job.training.quantize is None:
        return deliver(_on_full_weights(model, job, data)[0], to, margin)
    quantized = margin(model)
    whole, packing = _on_full_weights(model, job, data)
    pairs = margins(data, Collator(packing), beta=job.beta, weighted=job.weighting != "none")
    with whole.disable_adapter():
        at_first = pairs(whole)  # its reference is the policy in 4 bits
    saving = deliver(whole, to, lambda trained: pairs(trained) - at_first)
    saving["quantized"] = quantized
    _tell_of_full_weights(quantized, saving["trained"])
    return saving


_UNLIKE = 0.25
"""Of the margin; where the full weights change it by more, a warning says so."""


def _tell_of_full_weights(quantized: float, trained: float | None) -> None:
    assert trained is not None
    said = "the adapter's margin is %.3g on the weights in 4 bits, on which it was trained, and %.3g on the full ones"
    if lost(quantized, trained) <= _UNLIKE:
        log.info(said, quantized, trained)
        return
    log.warning(f"{said}; where that is too little, set training.lora.quantize=null", quantized, trained)


def _on_full_weights(model: PeftModel, job: TrainingJob, data: TokenGroups) -> tuple[PeftModel, Packing]:
    """The adapter on the weights of the policy as they are.

    Those that it was trained on are let go of: `model` is of no use any more.
    """
    adapter = {name: weights.cpu() for name, weights in get_peft_model_state_dict(model).items()}
    for weights in (*model.parameters(), *model.buffers()):
        weights.data = weights.data.new_empty(0)  # the trainer and its parts still refer to it
    whole, packing = _prepare_model(job, data, to_train=False)
    assert isinstance(whole, PeftModel)
    set_peft_model_state_dict(whole, adapter)
    return whole, packing


def _forget_optimizer(trainer: PreferenceTrainer, model: torch.nn.Module) -> None:
    """Before the model is delivered, which takes a copy of its weights: what its optimizer holds is twice as large."""
    if trainer.optimizer is not None:
        cast(torch.optim.Optimizer, trainer.optimizer).state.clear()
    model.zero_grad(set_to_none=True)
    let_go()


def _whole_model(trainer: PreferenceTrainer, job: TrainingJob) -> PreTrainedModel | PeftModel | None:
    """The trained model with all its weights in the first process; None in the others."""
    accelerator = trainer.accelerator
    if not trainer.is_fsdp_enabled:
        model = accelerator.unwrap_model(cast(torch.nn.Module, trainer.model))
        return cast(PreTrainedModel | PeftModel, model) if parallel.is_first() else None
    weights = accelerator.get_state_dict(trainer.model_wrapped)
    if not parallel.is_first():
        return None
    whole = load_model(job.policy.model, dtype=torch.float32, trust_remote_code=job.policy.trust_remote_code)
    if job.training.lora is not None:
        whole = with_adapter(whole, job.training.lora)
    whole.load_state_dict(weights)
    return whole
