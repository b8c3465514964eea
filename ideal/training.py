"""The inner loop: a base model and a mixture -> a trained model, by transformers' Trainer.

The objective is DESIGN 1's: each optimizer step's loss is the summed token loss over the global batch divided by
a constant of the round, the mean number of trained tokens per global batch. So every trained token weighs the
same, whatever the batch size, the number of processes and accumulation, and a domain's weight is its token share.
"""

import dataclasses
import difflib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from pydantic import Field, TypeAdapter, ValidationError
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ideal.data import ExampleSet, collate
from ideal.distributed import all_gather_objects, is_main, world_size
from ideal.errors import UserError
from ideal.mixture import Mixture, training_rows
from ideal.model import DTYPES, ModelConfig, load_model, save_model, stored_dtype
from ideal.objective import IGNORED, summed_token_loss
from ideal.online import Places, SteeredRows, SteeredTrainer, Steering
from ideal.seeding import generator

TRAINER_KEYS = {f.name: f for f in dataclasses.fields(TrainingArguments)}
# What other keys, or the objective itself, decide: key -> what to do instead.
NOT_FOR_USERS = {
    "output_dir": "use output_dir",
    "seed": "use seed",
    "data_seed": "use seed",
    "gradient_accumulation_steps": "it follows from train.global_batch_size",
    "average_tokens_across_devices": "the objective fixes it",
    "label_smoothing_factor": "influence is that of the plain token loss",
    "neftune_noise_alpha": "influence is that of the plain token loss",
    "train_sampling_strategy": "the order follows from the mixture and the seed",
    "dataloader_drop_last": "the last batch is filled with masked rows",
    "remove_unused_columns": "rows hold tokens and labels alone",
    "label_names": "rows hold tokens and labels alone",
    "auto_find_batch_size": "it would change the global batch; set train.per_device_train_batch_size",
    "resume_from_checkpoint": "the same command resumes by itself",
    "load_best_model_at_end": "the best round is kept by reference loss",
    "do_train": "the loop trains",
    "do_eval": "the loop evaluates",
    "do_predict": "the loop evaluates",
    "eval_strategy": "the loop evaluates after each round",
    "eval_steps": "the loop evaluates after each round",
    "eval_on_start": "the loop evaluates the base model",
    "push_to_hub": "upload the finished model folder",
    "deepspeed": "use train.fsdp",
    "local_rank": "torchrun sets it",
}
# How long ranks wait for each other: rank 0 encodes the data, saves models and draws the report alone.
PATIENCE_SECONDS = 4 * 3600
NOT_NEGATIVE = {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "num_train_epochs"}
# Log events whose mean is the training loss at the end: one alone is noisy.
LAST_LOGS = 10
# fsdp is annotated as a string, and True is what its own documentation asks for.
WIDER_TYPES: dict[str, Any] = {"fsdp": bool | str | None}


@dataclass
class TrainConfig:
    """`train.*`: TrainingArguments by their own names, and the global batch.

    Raises ValueError for a key that TrainingArguments lacks or that something else decides, and for a value of
    the wrong type.
    """

    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """sequences per optimizer step over all processes; gradient accumulation follows from it"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """every other train.* key: see transformers.TrainingArguments"""

    def __post_init__(self) -> None:
        self.arguments = {key: check_argument(key, value) for key, value in self.arguments.items()}

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps per round where a number is asked for, else None: epochs decide."""
        steps = self.arguments.get("max_steps", -1)
        return steps if steps > 0 else None

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """bfloat16 with train.bf16, else None: that of the weights."""
        return torch.bfloat16 if self.arguments.get("bf16") else None


def check_argument(key: str, value: Any) -> Any:
    """`value` as TrainingArguments' type for `key`; raises ValueError in one line."""
    if key in NOT_FOR_USERS:
        raise ValueError(f"train.{key} is not for the user to set: {NOT_FOR_USERS[key]}")
    if key not in TRAINER_KEYS:
        near = difflib.get_close_matches(key, [*TRAINER_KEYS, "global_batch_size"], 1)
        hint = f"; did you mean train.{near[0]}?" if near else " (see transformers.TrainingArguments)"
        raise ValueError(f"unknown key train.{key}{hint}")
    kind = WIDER_TYPES.get(key, TRAINER_KEYS[key].type)
    try:
        checked = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        detail = error.errors()[0]["msg"]
        raise ValueError(f"train.{key}: {value!r} does not fit: {detail[0].lower()}{detail[1:]}") from None
    if isinstance(checked, float) and not math.isfinite(checked):
        raise ValueError(f"train.{key}: {value!r} is not a finite number")
    if key in NOT_NEGATIVE and checked < 0:
        raise ValueError(f"train.{key}: {value!r} is negative")
    return checked


def training_arguments(config: TrainConfig, folder: Path, seed: int) -> TrainingArguments:
    """The Trainer's arguments for this machine; making them also starts the process group.

    Raises UserError where the global batch does not divide, or the Trainer would not see all of torchrun's ranks.
    """
    given = dict(config.arguments)
    given.setdefault("use_cpu", not torch.accelerator.is_available())
    given.setdefault("per_device_train_batch_size", min(8, config.global_batch_size))
    given.setdefault("logging_steps", 10)
    given.setdefault("save_strategy", "no")
    given["remove_unused_columns"] = False  # a model may take its inputs by **kwargs
    given.setdefault("ddp_timeout", PATIENCE_SECONDS)
    given.setdefault("disable_tqdm", False)  # quiet libraries would mean no bar
    given.setdefault("ddp_find_unused_parameters", False)  # a search at every step, for nothing
    given.setdefault("dataloader_pin_memory", not given["use_cpu"])
    try:
        arguments = TrainingArguments(output_dir=str(folder), seed=seed, **given)
        processes = arguments.world_size
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"train: {str(error).strip().splitlines()[0]}") from error
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != wanted:
        raise UserError(
            f"train.use_cpu: the Trainer sees {processes} process(es) where torchrun started {wanted}, so each rank "
            "would train a copy of its own; on a machine without accelerator leave train.use_cpu out or true"
        )
    if arguments.n_gpu > 1:
        raise UserError(
            f"this process sees {arguments.n_gpu} GPUs; start one process per GPU: "
            f"torchrun --nproc_per_node={arguments.n_gpu} main.py (or choose one with CUDA_VISIBLE_DEVICES)"
        )
    per_step = arguments.per_device_train_batch_size * processes
    if config.global_batch_size % per_step:
        raise UserError(
            f"train.global_batch_size: {config.global_batch_size} is not a multiple of "
            f"train.per_device_train_batch_size x processes = {arguments.per_device_train_batch_size} x {processes}"
        )
    arguments.gradient_accumulation_steps = config.global_batch_size // per_step
    return arguments


@dataclass(frozen=True)
class RoundPlan:
    """How a mixture becomes optimizer steps.

    steps_per_epoch: global batches per epoch, the last one filled up with masked rows.
    steps: optimizer steps in all. tokens_per_step: the constant that each step's summed loss is divided by.
    """

    steps_per_epoch: int
    steps: int
    tokens_per_step: float

    @property
    def epochs(self) -> float:
        """How often each row of the mixture is seen."""
        return self.steps / self.steps_per_epoch

    @staticmethod
    def of(rows: int, trained_tokens: int, config: TrainConfig, length: float = 1.0) -> "RoundPlan":
        """The plan for an epoch of `rows` examples holding `trained_tokens`; `length`: the part of all its steps."""
        steps_per_epoch = math.ceil(rows / config.global_batch_size)
        epochs = config.arguments.get("num_train_epochs", TRAINER_KEYS["num_train_epochs"].default)
        whole = config.max_steps or max(1, math.ceil(epochs * steps_per_epoch))
        return RoundPlan(steps_per_epoch, math.ceil(length * whole), trained_tokens / steps_per_epoch)


@dataclass(frozen=True)
class Part:
    """A round's place in one training run that all rounds share (mixing.start: continue).

    done: optimizer steps before it. total: those of the whole run, over which the learning rate is scheduled.
    checkpoint: the Trainer's, with the optimizer, after `done` steps; None at the start.
    """

    done: int
    total: int
    checkpoint: Path | None


class RoundRows(Dataset):
    """All of a round's rows in the order they are trained on, epoch after epoch, in whole global batches.

    A finite sequence and not a shuffled epoch, so that the rows of step k are the same whatever the number of
    processes and accumulation, and a killed run continues at the same row. The rows that fill the last batch of
    an epoch are masked: they move nothing, and no example is repeated or left out.

    done: optimizer steps of earlier rounds in the same training run. Their places come first, for the Trainer to skip.
    """

    def __init__(
        self,
        pools: Mapping[str, ExampleSet],
        mixture: Mixture,
        plan: RoundPlan,
        global_batch: int,
        pad_id: int,
        seed: int,
        done: int = 0,
    ) -> None:
        self.pools, self.mixture, self.plan, self.seed = pools, mixture, plan, seed
        self.global_batch, self.done = global_batch, done
        self.filler = {"input_ids": [pad_id], "labels": [IGNORED]}
        self.epoch, self.order = -1, training_rows(mixture, seed, 0)

    def __len__(self) -> int:
        return (self.done + self.plan.steps) * self.global_batch

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        own = index - self.done * self.global_batch
        epoch, place = divmod(own, self.plan.steps_per_epoch * self.global_batch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, training_rows(self.mixture, self.seed, epoch)
        if place >= len(self.order):
            return self.filler
        domain, row = self.order[place]
        return self.pools[domain][row]


class InnerLoopTrainer(Trainer):
    """Trainer that takes the rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)


class StepLog(TrainerCallback):
    """Hands the Trainer's logs on, and says once how long the round will take."""

    def __init__(self, log: Callable[[int, dict[str, float]], None], on_step_time: Callable[[float], None]) -> None:
        self.log, self.on_step_time = log, on_step_time
        self.first, self.started = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Notes where this process begins: a continued run's steps are counted from its start."""
        self.first = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock at the second step: the first one warms up."""
        if state.global_step == self.first + 1:
            self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports seconds per step after five of them."""
        if state.global_step == self.first + 6:
            self.on_step_time((time.monotonic() - self.started) / 5)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Hands on the numbers of one log event."""
        if logs:
            self.log(state.global_step, {k: v for k, v in logs.items() if k != "epoch"})


class EndOfPart(TrainerCallback):
    """Stops a training run where a round's part ends, with a checkpoint from which the next one goes on."""

    def __init__(self, last: int) -> None:
        self.last = last

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the part's last step."""
        if state.global_step == self.last:
            control.should_training_stop = True
            control.should_save = self.last < state.max_steps


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar without a line per log event; those go to metrics.jsonl."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Shows the loss beside the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


@dataclass(frozen=True)
class TrainingOutcome:
    """training_loss: mean loss per trained token over the last logged steps; seconds: of the inner loop, and the part
    of them in which a controller's measurements were taken. (Of one that was killed and continued from a checkpoint:
    since then.)

    observed: what the controller left, empty without one.
    """

    steps: int
    training_loss: float | None
    seconds: float
    measuring_seconds: float
    observed: dict[str, Any]


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    pools: Mapping[str, ExampleSet],
    mixture: Mixture,
    *,
    folder: Path,
    checkpoints: Path,
    seed: int,
    log: Callable[[int, dict[str, float]], None],
    on_step_time: Callable[[float, int], None],
    length: float = 1.0,
    part: Part | None = None,
    steering: Steering | None = None,
) -> TrainingOutcome:
    """Trains the base model on `mixture` and writes it to `folder`, in the base checkpoint's data type.

    checkpoints: where the Trainer keeps its own, from which a killed inner loop continues if train.save_strategy asks
    for them. length: the part of an inner loop's steps to take. part: where these steps stand in one training run of
    all rounds; None: they are a run of their own. With it the last checkpoint stays, unless the run has come to its
    end. steering: what decides from within what each step trains on, if anything does;
    without it each step's rows follow from `mixture` alone.
    Raises UserError when the loss is not finite any more.
    """
    plan = RoundPlan.of(mixture.total_rows, mixture.total_tokens, config, length)
    pad_id = int(tokenizer.pad_token_id)
    rows = None
    if steering is not None:
        rows = steered_rows(steering, pools, mixture, plan, tokenizer, seed)
        if steering.reference_model is not None:
            with rows.measuring, steering.reference_model() as reference:
                rows.compare_with(reference, steering.evaluation.batch_size)
    # The reference model's losses are part of what the inner loop takes.
    before = rows.measuring.seconds if rows is not None else 0.0
    round_seed = int(generator(seed, mixture.round, "training").integers(2**31))
    set_seed(round_seed)  # before the model, so that new adapters are the same on every rank and in every rerun
    arguments = training_arguments(config, checkpoints, round_seed)
    part = part or Part(0, plan.steps, None)
    last = part.done + plan.steps
    arguments.max_steps = part.total
    arguments.save_only_model &= last == part.total  # the next part needs the optimizer
    arguments.logging_steps = min(arguments.logging_steps, plan.steps)  # a short inner loop has a loss too
    model = load_model(model_config, None, DTYPES[model_config.dtype], trainable=True)
    shared: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "callbacks": [StepLog(log, lambda seconds: on_step_time(seconds, plan.steps)), EndOfPart(last)],
    }
    trainer: Trainer
    if rows is None:
        trainer = InnerLoopTrainer(
            train_dataset=RoundRows(pools, mixture, plan, config.global_batch_size, pad_id, seed, part.done),
            data_collator=lambda rows: collate(rows, pad_id),
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (
                summed_token_loss(outputs.logits, labels) / plan.tokens_per_step
            ),
            **shared,
        )
    else:
        places = Places(plan.steps * config.global_batch_size)
        trainer = SteeredTrainer(rows=rows, log_step=log, train_dataset=places, **shared)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not arguments.disable_tqdm:
        trainer.add_callback(QuietProgress())
    started = time.monotonic()
    own = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=own or (str(part.checkpoint) if part.checkpoint else None))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] > part.done]
    _check_loss(losses, config)
    _check_equal_weights(trainer)
    state = trainer.accelerator.get_state_dict(trainer.model)
    if is_main():
        save_model(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            folder,
            stored_dtype(model_config),
            state,
        )
    trainer.accelerator.free_memory()
    observed = trainer.rows.observed() if isinstance(trainer, SteeredTrainer) else {}
    return TrainingOutcome(
        plan.steps,
        _mean(losses[-LAST_LOGS:]),
        before + time.monotonic() - started,
        rows.measuring.seconds if rows is not None else 0.0,
        observed,
    )


def steered_rows(
    steering: Steering,
    pools: Mapping[str, ExampleSet],
    mixture: Mixture,
    plan: RoundPlan,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> SteeredRows:
    """The rows of an inner loop that is steered from within. Raises UserError where its controller refuses it."""
    return SteeredRows(
        steering,
        pools,
        mixture,
        steps=plan.steps,
        passes=plan.epochs,
        tokens_per_step=plan.tokens_per_step,
        vocabulary=len(tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        seed=seed,
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _check_loss(losses: list[float], config: TrainConfig) -> None:
    if losses and not math.isfinite(losses[-1]):
        rate = config.arguments.get("learning_rate", TRAINER_KEYS["learning_rate"].default)
        raise UserError(f"train.learning_rate: the training loss is not finite any more; {rate} is probably too high")


def _check_equal_weights(trainer: Trainer) -> None:
    """All ranks must hold the same weights after training (a Trainer whose DDP is off drifts without a word)."""
    if world_size() == 1 or trainer.is_fsdp_enabled:
        return
    assert trainer.model is not None
    sums = [parameter.detach().double().sum().item() for parameter in trainer.model.parameters()]
    if any(other != sums for other in all_gather_objects(sums)):
        raise RuntimeError("the ranks' weights differ after training: gradients were not averaged over them")
