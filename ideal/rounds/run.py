"""What the rounds of a run share, and what they ask of its folder."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ideal.config import Config
from ideal.data import Data
from ideal.distributed import all_gather_objects, say
from ideal.mixers import MIXERS, Mixer, Setup
from ideal.mixers.limits import Limits
from ideal.run_folder import RunFolder, read_json


@dataclass
class Run:
    """Everything that the rounds share."""

    config: Config
    folder: RunFolder
    tokenizer: PreTrainedTokenizerBase
    data: Data
    ratios: np.ndarray
    """[n] the start ratios as the user gave them, in the order of data.pools."""
    arguments: TrainingArguments
    limits: Limits | None = None
    """of the ratios; None where no domain has one."""
    target: np.ndarray | None = None
    no_worse: np.ndarray | None = None
    """[R] the losses of mixing.target and mixing.no_worse; None where none are given."""
    warnings: list[str] = field(default_factory=list)

    @property
    def mixer(self) -> Mixer:
        """The configured method, with the base model's losses once they are known."""
        losses = None
        if self.folder.base_evaluation.is_file():
            losses = reference_losses(self, read_json(self.folder.base_evaluation))
        setup = Setup(
            seed=self.config.seed,
            domains=tuple(self.data.pools),
            capabilities=tuple(self.data.references),
            weights=self.weights,
            pool_sizes=np.array([len(pool) for pool in self.data.pools.values()], dtype=np.float64),
            pool_tokens=np.array([tokens.sum() for tokens in self.trained_tokens.values()], dtype=np.float64),
            base_loss=losses,
            served_by=self.data.served_by,
            limits=self.limits,
            target=self.target,
            no_worse=self.no_worse,
        )
        return MIXERS[self.config.mixing.method](self.config.mixing, setup)

    @property
    def weights(self) -> np.ndarray:
        """[R] w_r, sum 1."""
        return np.array([self.data.weights[name] for name in self.data.references])

    @property
    def size_limits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """[n] least and [n] most examples of each domain; None where there is no limit."""
        pools = np.array([len(pool) for pool in self.data.pools.values()])
        return None if self.limits is None else self.limits.sizes(pools)

    @property
    def trained_tokens(self) -> dict[str, np.ndarray]:
        """Per domain, [pool] trained tokens of each example."""
        return {name: pool.trained_tokens for name, pool in self.data.pools.items()}

    def warn(self, text: str) -> None:
        """Says a warning once, and keeps it for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
            say(f"warning: {text}")


def reference_losses(run: Run, evaluation: dict[str, Any]) -> np.ndarray:
    """[R] L_ref,r of an evaluation.json."""
    return np.array([evaluation["reference_loss"][name] for name in run.data.references])


def exists(path: Path) -> bool:
    """Whether rank 0 sees `path`: all ranks must decide alike, and rank 0 writes."""
    return bool(all_gather_objects(path.exists())[0])


def plain(value: Any) -> Any:
    """Arrays as lists, and what is not a number as null: JSON knows no NaN."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
