"""Measured peaks for test_plan.py: one phase in processes of its own, alone or as ranks.

What is measured is resident memory as the kernel keeps it (VmHWM; ru_maxrss would start at the parent's, which
survives exec). The base that is subtracted is the same phase of the same program with a model of almost nothing,
just before: interpreter, libraries (many load at first use), threads, process group. The mmap threshold is fixed:
glibc raises it by itself up to 32 MB as blocks are freed, and then keeps freed tensors.
"""

import ctypes
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from ideal.data import ExampleSet
from ideal.demo import BASE_MODEL
from ideal.distributed import rank
from ideal.influence import DomainSample, InfluenceConfig, compute_influence
from ideal.mixture import build_mixture
from ideal.model import LoraConfig, ModelConfig, shard, with_adapters
from ideal.training import TrainConfig, train, training_arguments

M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 65536
"""Of mallopt(3)."""
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 512}  # fmt: skip
MASKED = 4
"""Labels at the start of each row that are not trained."""


@dataclass(frozen=True)
class Task:
    """What is run, and on how much.

    model: a configuration's arguments, a Llama's unless `model_type` says otherwise, or a folder. domains,
    references: rows per set; length: tokens of the longest row. arguments: train.* keys; influence: influence.* keys.
    rank: of LoRA adapters.
    """

    model: dict[str, Any] | str
    domains: dict[str, int]
    references: dict[str, int]
    length: int
    arguments: dict[str, Any]
    influence: dict[str, Any]
    rank: int = 0

    @property
    def lora(self) -> LoraConfig:
        """The adapters, if any."""
        return LoraConfig(rank=self.rank)

    @property
    def train(self) -> TrainConfig:
        """The inner loop's settings."""
        given = dict(self.arguments)
        return TrainConfig(given.pop("global_batch_size"), given)


def make_set(name: str, rows: int, length: int, vocabulary: int) -> ExampleSet:
    """Random tokens; lengths from half of `length` to all of it, the longest always among them."""
    drawn = np.random.default_rng([len(name), rows])
    lengths = np.sort(drawn.integers(length // 2, length + 1, rows))
    lengths[-1] = length
    ids = [drawn.integers(0, vocabulary, size).tolist() for size in lengths]
    labels = [[-100] * MASKED + row[MASKED:] for row in ids]
    return ExampleSet(
        name,
        datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}),
        lengths=lengths,
        trained_tokens=lengths - MASKED,
        positions=lengths - 1,
    )


def configuration(shape: dict[str, Any]) -> PretrainedConfig:
    """Of a model of these sizes."""
    return AutoConfig.for_model(**{"model_type": "llama", **shape})


def make_model(shape: dict[str, Any] | str, folder: Path) -> Path:
    """A folder with a model of these sizes."""
    if isinstance(shape, str):
        return Path(shape)
    if rank() == 0 and not folder.exists():
        AutoModelForCausalLM.from_config(configuration(shape)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return folder


def run_training(task: Task, model: Path, out: Path) -> None:
    """An inner loop as the program runs it."""
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    pools = {name: make_set(name, rows, task.length, vocabulary) for name, rows in task.domains.items()}
    tokens = {name: pool.trained_tokens for name, pool in pools.items()}
    train(
        ModelConfig(name_or_path=str(model), lora=task.lora),
        task.train,
        AutoTokenizer.from_pretrained(BASE_MODEL),
        pools,
        build_mixture(tokens, np.ones(len(pools)), seed=0, round=0),
        folder=out / "model",
        checkpoints=out / "checkpoints",
        seed=0,
        log=lambda step, values: None,
        on_step_time=lambda seconds, steps: None,
    )


def run_influence(task: Task, model: Path, out: Path, sharded: bool = False) -> dict[str, float]:
    """An outer step as the program runs it; seconds per phase."""
    loaded = with_adapters(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), task.lora)
    if sharded:
        shard(loaded, torch.device("cpu"))
    vocabulary = loaded.config.vocab_size
    domains = {
        name: DomainSample(make_set(name, rows, task.length, vocabulary), np.ones(rows, dtype=int))
        for name, rows in task.domains.items()
    }
    references = {name: make_set(name, rows, task.length, vocabulary) for name, rows in task.references.items()}
    return compute_influence(loaded, domains, references, InfluenceConfig(**task.influence), 0).seconds


RUN = {"training": run_training, "influence": run_influence, "sharded": partial(run_influence, sharded=True)}


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def on_rank(phase: str, out: Path) -> None:
    """Writes {"base", "peak", "seconds", "phases"} of this rank to `out`."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    torch.set_num_threads(1)
    task = Task(**json.loads((out / "task.json").read_text()))
    training_arguments(task.train, out / "checkpoints", 0)  # starts the process group, as the loop does
    same_kind = {} if isinstance(task.model, str) else {**task.model, **TINY}
    small, large = make_model({**TINY, **same_kind}, out / "tiny"), make_model(task.model, out / "base")
    RUN[phase](task, small, out / "small")
    base = resident("VmRSS")
    started = time.monotonic()
    phases = RUN[phase](task, large, out / "large")
    found = {"base": base, "peak": resident("VmHWM"), "seconds": time.monotonic() - started, "phases": phases}
    (out / f"rank{rank()}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
