"""Rounds for controllers, and whole steered inner loops: in this process, and on two ranks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import inner_loops
import numpy as np
import torch
from inner_loops import ADAM, Case

from ideal.distributed import rank
from ideal.evaluation import EvaluationConfig
from ideal.mixers.aioli import AioliController
from ideal.mixers.controller import Controller, SteeredRound
from ideal.mixers.doge import DogeController
from ideal.mixers.doremi import DoremiController
from ideal.mixers.odm import OdmController
from ideal.mixers.skillit import SkillitController
from ideal.model import ModelConfig, load_model
from ideal.online import Steering
from ideal.training import TrainConfig, TrainingOutcome, training_arguments


def make_round(
    steps: int,
    rows: list[float],
    mean_tokens: list[float] | None = None,
    capabilities: tuple[str, ...] | None = None,
    weights: list[float] | None = None,
    vocabulary: int = 100,
) -> SteeredRound:
    """A round of domains a, b, ...; capabilities of the same names, all of one weight, unless given."""
    names = tuple("abcdefg"[: len(rows)])
    mean = np.array(mean_tokens or [1.0] * len(rows))
    shares = np.array(rows) * mean
    of = capabilities or names
    return SteeredRound(
        steps=steps,
        domains=names,
        capabilities=of,
        weights=np.array(weights or [1 / len(of)] * len(of)),
        rows=np.array(rows),
        shares=shares / shares.sum(),
        mean_tokens=mean,
        vocabulary=vocabulary,
    )


def make_models(folder: Path) -> None:
    """Those of inner_loops.py, and one that differs from its gpt2, for controllers that compare with another."""
    inner_loops.make_models(folder)
    model = load_model(ModelConfig(name_or_path=str(folder / "gpt2")), None, torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "gpt2 reference")


GRAPH = {"short": {"short": 0.5, "long": 0.0}, "long": {"short": 0.1, "long": 0.3}}
CONTROLLERS: dict[str, Any] = {
    "odm": OdmController,
    "doremi": DoremiController,
    "doge": DogeController,
    "skillit": partial(SkillitController, GRAPH, 4),
    "aioli": partial(AioliController, 0, 2),
}
FOUR_PASSES = {**ADAM, "num_train_epochs": 4}


def run_steered(
    models: Path, controller: Controller, case: Case, out: Path, log: Any = lambda step, values: None
) -> tuple[dict[str, torch.Tensor], TrainingOutcome]:
    """The weights that a steered inner loop ends with, and its outcome."""
    pools = inner_loops.make_pools()

    @contextmanager
    def reference_model() -> Iterator[torch.nn.Module]:
        yield load_model(ModelConfig(name_or_path=str(models / "gpt2 reference")), None, torch.float64)

    steering = Steering(
        controller,
        pools,
        {"short": 0.5, "long": 0.5},
        EvaluationConfig(batch_size=4),
        ["lm_head"],
        reference_model if controller.measures == "excess" else None,
    )
    outcomes: list[TrainingOutcome] = []
    weights = inner_loops.run_case(models, case, out, log, steering=steering, outcomes=outcomes)
    return weights, outcomes[0]


def on_rank(models: Path, out: Path) -> None:
    torch.set_num_threads(1)
    training_arguments(TrainConfig(2, {"use_cpu": True, "per_device_train_batch_size": 1}), out, 0)
    for name, make in CONTROLLERS.items():
        for per_device in (1, 2):
            case = Case("gpt2", 4, per_device, FOUR_PASSES)
            weights, outcome = run_steered(models, make(), case, out / f"{name}{per_device}")
            torch.save(weights, out / f"{name}{per_device}.rank{rank()}.pt")
            (out / f"{name}{per_device}.rank{rank()}.json").write_text(json.dumps(outcome.observed))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
