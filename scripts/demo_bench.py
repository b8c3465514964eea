"""One inner loop on the demo for any mixture: what the demo's sweep and table, and the validation, are made of."""

import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ideal.config import Config, read_command
from ideal.data import Data, load_data
from ideal.distributed import progress
from ideal.evaluation import evaluate, weighted
from ideal.mixture import Mixture, build_mixture
from ideal.model import load_model, load_tokenizer
from ideal.preparation import with_demo
from ideal.training import TrainingOutcome, train
from main import ARGUMENTS

Log = Callable[[int, dict[str, float]], None]


def _ignore(*_: Any) -> None:
    """Nobody listens to a single inner loop's events here."""


@dataclass(frozen=True)
class Outcome:
    """What one inner loop gave; losses in nats per trained token."""

    sizes: dict[str, int]
    shares: dict[str, float]
    total_tokens: int
    reference_loss: dict[str, float]
    test_loss: dict[str, float]
    Q: float
    Q_test: float | None
    steps: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a line of JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Bench:
    """The demo's settings, model and data, ready to train on one mixture after the other in this process."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    data: Data

    @staticmethod
    def open(more: Sequence[str] = ()) -> "Bench":
        """The demo as configs/demo.yaml and further arguments of main.py set it (with --config another model and data);
        one thread and no progress bars."""
        torch.set_num_threads(1)
        config = with_demo(read_command(ARGUMENTS, ["--train.disable_tqdm", "true", *more]).config)
        tokenizer = load_tokenizer(config.model)
        return Bench(config, tokenizer, load_data(config.data, tokenizer, config.seed))

    @property
    def domains(self) -> list[str]:
        """The domains in the order in which ratios are given."""
        return list(self.data.pools)

    def mixture(self, ratios: np.ndarray, seed: int, total_tokens: int | None = None) -> Mixture:
        """The mixture of `ratios` [n]; with `total_tokens` the ratios give the proportions alone."""
        trained_tokens = {name: pool.trained_tokens for name, pool in self.data.pools.items()}
        return build_mixture(trained_tokens, ratios, seed=seed, round=0, total_tokens=total_tokens)

    def ratios(self, by_domain: Mapping[str, float]) -> np.ndarray:
        """[n] ratios in the order of `domains`."""
        return np.array([by_domain[name] for name in self.domains])

    def ratios_of_shares(self, shares: np.ndarray) -> np.ndarray:
        """[n] ratios, up to a common factor, whose trained tokens have these shares [n]."""
        return shares / np.array([int(pool.trained_tokens.sum()) for pool in self.data.pools.values()])

    def training(self, arguments: Mapping[str, Any]) -> "Bench":
        """The same bench with further TrainingArguments."""
        train = self.config.train
        return replace(
            self, config=replace(self.config, train=replace(train, arguments={**train.arguments, **arguments}))
        )

    def run(self, mixture: Mixture, seed: int) -> Outcome:
        """Trains the base model on `mixture` and evaluates it."""
        with tempfile.TemporaryDirectory() as scratch:
            trained, model = self.train(mixture, seed, Path(scratch))
        return self.measure(mixture, trained, model)

    def train(
        self, mixture: Mixture, seed: int, scratch: Path, log: Log = _ignore
    ) -> tuple[TrainingOutcome, torch.nn.Module]:
        """Trains the base model on `mixture`; the Trainer's checkpoints, if it makes any, go to scratch/checkpoints."""
        trained = train(
            self.config.model,
            self.config.train,
            self.tokenizer,
            self.data.pools,
            mixture,
            folder=scratch / "model",
            checkpoints=scratch / "checkpoints",
            seed=seed,
            log=log,
            on_step_time=_ignore,
        )
        return trained, self.model(scratch / "model")

    def model(self, checkpoint: Path | None) -> torch.nn.Module:
        """A trained model, or the base one, in float32 and where the Trainer would have it."""
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model: torch.nn.Module = load_model(self.config.model, checkpoint, torch.float32)
        return model.to(accelerator or torch.device("cpu"))

    def measure(self, mixture: Mixture, trained: TrainingOutcome, model: torch.nn.Module) -> Outcome:
        """The losses of a model that was trained on `mixture`."""
        pad_id = int(self.tokenizer.pad_token_id)
        losses = [
            evaluate(model, sets, self.config.evaluation, pad_id=pad_id, description="evaluation")
            for sets in (self.data.references, self.data.tests)
        ]
        reference, test = (weighted(found, self.data.weights) for found in losses)
        assert reference is not None, "every capability has a reference set"
        names = list(mixture.domains)
        return Outcome(
            sizes={name: domain.size for name, domain in mixture.domains.items()},
            shares=dict(zip(names, mixture.shares.tolist(), strict=True)),
            total_tokens=mixture.total_tokens,
            reference_loss=losses[0],
            test_loss=losses[1],
            Q=reference,
            Q_test=test,
            steps=trained.steps,
            seconds=trained.seconds,
        )


class Results:
    """A JSONL file of finished jobs by key, so that the same command goes on where it was stopped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        text = file.read_text() if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole)  # a kill cut the last line short
        self.found: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, whole.splitlines())}

    def add(self, key: str, values: Mapping[str, Any]) -> None:
        """Notes a finished job."""
        self.found[key] = {"key": key, **values}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as lines:
            lines.write(json.dumps(self.found[key]) + "\n")


@dataclass(frozen=True)
class Job:
    """One inner loop to do: ratios [n] by domain, as they are or (with total_tokens) as proportions."""

    key: str
    ratios: dict[str, float]
    seed: int
    total_tokens: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    """Further TrainingArguments."""

    def run(self, bench: Bench) -> dict[str, Any]:
        """Trains and evaluates."""
        bench = bench.training(self.training)
        mixture = bench.mixture(bench.ratios(self.ratios), self.seed, self.total_tokens)
        return {"seed": self.seed, **bench.run(mixture, self.seed).to_json()}


class Task(Protocol):
    """Anything that a worker can do; `Job` is one."""

    @property
    def key(self) -> str:
        """Its name in the results."""

    def run(self, bench: Bench) -> dict[str, Any]:
        """What goes into the results, plain values."""


_bench: Bench | None = None  # a worker process's own


def _open(more: Sequence[str]) -> None:
    global _bench
    # Progress bars of workers would overwrite ours; their exceptions arrive all the same.
    sys.stderr = Path(os.devnull).open("w")
    _bench = Bench.open(more)


def _do(task: Task) -> tuple[str, dict[str, Any]]:
    assert _bench is not None, "_open comes first"
    return task.key, task.run(_bench)


class Workers:
    """Processes that do jobs, each with the demo's model and data of its own; used as a context manager.

    more: further arguments of main.py.
    """

    def __init__(self, processes: int, more: Sequence[str] = ()) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it
        self.pool = multiprocessing.get_context("spawn").Pool(processes, _open, (more,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.terminate()

    def do(self, tasks: Sequence[Task], results: Results, description: str = "inner loops", unit: str = "run") -> None:
        """Does the tasks that `results` lacks and adds them there."""
        missing = [task for task in tasks if task.key not in results.found]
        with progress(len(missing), description, unit=unit) as bar:
            for key, values in self.pool.imap_unordered(_do, missing):
                results.add(key, values)
                bar.update()
