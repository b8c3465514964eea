"""What a run will take, in words, before its first expensive step."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from ideal.config import Config
from ideal.data import Data
from ideal.distributed import world_size
from ideal.influence.layers import deal_out, lay_out, peak_bytes, shared_inputs, tracked_layers
from ideal.mixers import MIXERS
from ideal.mixture import Mixture
from ideal.model import DTYPES, checkpoint_config, stored_dtype, with_adapters
from ideal.training import RoundPlan

WEIGHT_COPIES_IN_TRAINING = 4
"""Weights, gradients, and AdamW's two moments."""
LITTLE_ROOM = 1.1
"""Free disk / disk needed below which the estimate says so."""


def empty_model(config: Config) -> torch.nn.Module:
    """The model's layers without their weights, adapters included."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            checkpoint_config(config.model), trust_remote_code=config.model.trust_remote_code
        )
        return with_adapters(model, config.model.lora)


def estimate(config: Config, data: Data, mixture: Mixture, arguments: TrainingArguments) -> str:
    """Rows and tokens per round, steps, memory and disk; the time follows once a step was measured.

    Raises UserError where influence.layers match nothing, or a layer exceeds influence.memory_budget.
    """
    plan = RoundPlan.of(mixture.total_rows, mixture.total_tokens, config.train)
    model = empty_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loops = config.mixing.rounds + 1 if MIXERS[config.mixing.method].moves() else 1
    size = DTYPES[config.model.dtype].itemsize
    shards = world_size() if arguments.fsdp else 1
    held = (parameters - trained) * size + trained * size * WEIGHT_COPIES_IN_TRAINING
    disk = parameters * stored_dtype(config.model).itemsize
    kept = 2 if config.keep_models == "final" else loops + 1
    lines = [
        f"inner loops: {loops} of {plan.steps:,} steps; a step is {config.train.global_batch_size} sequences"
        f" ({arguments.per_device_train_batch_size} per process x {world_size()} process(es)"
        f" x {arguments.gradient_accumulation_steps} accumulation)",
        f"round 0: {mixture.total_rows:,} examples, {mixture.total_tokens:,} trained tokens per epoch"
        + ("; later rounds hold as many tokens" if config.mixing.budget == "fixed" else "; later rounds may differ"),
        f"memory per process: training about {gigabytes(held / shards)} and activations"
        f" ({parameters / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained)",
    ]
    if MIXERS[config.mixing.method].needs_influence:
        lines[-1] += "; " + _outer_step(config, data, model)
    lines.append(f"disk: about {gigabytes(kept * disk)} for {kept} models{_room(config, kept * disk)}")
    lines.append("time: said as soon as a step has been measured")
    return "\n".join(lines)


def _outer_step(config: Config, data: Data, model: torch.nn.Module) -> str:
    layers = tracked_layers(model, config.influence.layers)
    groups = shared_inputs(model, layers, torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    owners, sizes = deal_out(groups, world_size()), (len(data.pools), len(data.references), 4)
    parts = lay_out(groups, owners, config.influence, *sizes).gradient_parts
    largest = peak_bytes(groups, owners, config.influence, *sizes)
    in_parts = f" in {len(parts)} parts" if len(parts) > 1 else ""
    return f"outer step about {gigabytes(largest)} of statistics for {len(layers)} layers{in_parts} and the model"


def _room(config: Config, needed: float) -> str:
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return "" if free > LITTLE_ROOM * needed else f" (only {gigabytes(free)} are free!)"


def gigabytes(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
