"""Steered inner loops on tiny models with real processes: the same whatever ranks, accumulation and kills."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import inner_loops
import numpy as np
import pytest
import steered
import torch
from inner_loops import SGD, Case, make_pools
from steered import CONTROLLERS, ONE_STEP_FROM_THE_END, run_steered
from transformers import AutoModelForCausalLM

from ideal.draws import Draws
from ideal.mixers.controller import Controller, StepStatistics
from ideal.objective import summed_token_loss
from ideal.online import FILLER, dealt, pieces

TOKENS = sum(map(sum, inner_loops.ROWS.values()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    steered.make_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("one_process")
    case = Case("gpt2", 4, 4, ONE_STEP_FROM_THE_END)
    return {name: run_steered(models, make(), case, out / name) for name, make in CONTROLLERS.items()}


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two_ranks")
    script = Path(steered.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [*command, *map(str, (script, models, out))], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-8) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=bound)


def assert_same_observed(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same_observed(found[key], expected[key])
    elif isinstance(expected, list):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-7, atol=1e-9)
    else:
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)


class Fixed(Controller):
    """The same probabilities and loss weights in every step, and a note of all it is told."""

    def __init__(self, probabilities: list[float], weights: list[float]) -> None:
        self.p, self.w, self.seen = np.array(probabilities), np.array(weights), list[StepStatistics]()

    def probabilities(self) -> np.ndarray:
        return self.p

    def loss_weights(self) -> np.ndarray:
        return self.w

    def observe(self, statistics: StepStatistics) -> None:
        self.seen.append(statistics)

    def observed(self) -> dict[str, Any]:
        return {}


def test_weights_and_statistics_are_those_of_plain_autograd(models, tmp_path):
    """SGD written out: weighted summed losses of each step's rows by the round's constant."""
    controller = Fixed([0.75, 0.25], [2.0, 0.5])
    found, outcome = run_steered(models, controller, Case("gpt2", 4, 2, {**SGD, "num_train_epochs": 2}), tmp_path)
    pools = make_pools()
    constant = TOKENS / 3
    draws = Draws({n: p.trained_tokens for n, p in pools.items()}, constant, inner_loops.SEED, 0)
    model = AutoModelForCausalLM.from_pretrained(models / "gpt2", dtype=torch.float64)
    assert len(controller.seen) == outcome.steps == 6
    for statistics in controller.seen:
        model.zero_grad()
        losses, tokens, rows = np.zeros(2), np.zeros(2), np.zeros(2)
        for domain, row in draws.next(controller.p):
            example = list(pools.values())[domain][row]
            ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
            loss = summed_token_loss(model(input_ids=ids).logits, labels)
            (controller.w[domain] * loss / constant).backward()
            losses[domain] += loss.item()
            tokens[domain] += int((labels != -100).sum())
            rows[domain] += 1
        np.testing.assert_allclose(statistics.losses, losses, rtol=1e-10)
        np.testing.assert_array_equal(statistics.tokens, tokens)
        np.testing.assert_array_equal(statistics.rows, rows)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= SGD["learning_rate"] * parameter.grad
    assert_same(found, {name: p.detach() for name, p in model.named_parameters()}, 1e-10)
    assert list(outcome.observed["trained_tokens"].values()) == draws.tokens.tolist()
    assert list(outcome.observed["rows"].values()) == draws.drawn.tolist()


@pytest.mark.parametrize("name", CONTROLLERS)
def test_ranks_and_accumulation_change_nothing(name, models, one_process, two_ranks, tmp_path):
    """4 rows at once, 1 at a time with accumulation, on two ranks without and with accumulation."""
    weights, outcome = one_process[name]
    accumulated = run_steered(models, CONTROLLERS[name](), Case("gpt2", 4, 1, ONE_STEP_FROM_THE_END), tmp_path)
    assert_same(accumulated[0], weights)
    assert_same_observed(accumulated[1].observed, outcome.observed)
    for per_device in (1, 2):
        first = torch.load(two_ranks / f"{name}{per_device}.rank0.pt")
        assert_same(first, weights)
        for key, tensor in torch.load(two_ranks / f"{name}{per_device}.rank1.pt").items():
            assert torch.equal(tensor, first[key])
        told = [json.loads((two_ranks / f"{name}{per_device}.rank{r}.json").read_text()) for r in (0, 1)]
        assert told[0] == told[1], "controllers must be the same on all ranks"
        assert_same_observed(told[0], outcome.observed)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_killed_steered_loop_continues(name, models, one_process, tmp_path):
    class Killed(Exception):
        pass

    def kill(step: int, values: dict[str, float]) -> None:
        if step == 8:
            raise Killed

    case = Case("gpt2", 4, 4, {**ONE_STEP_FROM_THE_END, "save_strategy": "steps", "save_steps": 5})
    with pytest.raises(Killed):
        run_steered(models, CONTROLLERS[name](), case, tmp_path, log=kill)
    assert (tmp_path / "checkpoints" / "checkpoint-5").is_dir()
    steps: list[int] = []
    weights, outcome = run_steered(
        models, CONTROLLERS[name](), case, tmp_path, log=lambda step, values: steps.append(step)
    )
    assert min(steps) == 6, "the second run must not start over"
    assert_same(weights, one_process[name][0])
    assert_same_observed(outcome.observed, one_process[name][1].observed)


def test_rows_are_dealt_evenly_and_all():
    rows = [(0, number) for number in range(7)]
    parts = [dealt(rows, 4, part) for part in range(4)]
    assert {len(part) for part in parts} == {2}
    assert sorted(row for part in parts for row in part if row != FILLER) == rows
    assert [len(dealt(rows[:4], 4, part)) for part in range(4)] == [1] * 4
    assert [dealt(rows[:1], 3, part) for part in range(3)] == [[(0, 0)], [FILLER], [FILLER]]


def test_pieces_hold_few_rows_and_no_needless_padding():
    lengths = torch.tensor([3, 2, 5])
    mask = (torch.arange(5) < lengths[:, None]).long()
    batch = {"input_ids": mask * 7, "attention_mask": mask, "labels": mask, "weights": torch.ones(3)}
    cut = pieces(batch, 2)
    assert [tuple(part["input_ids"].shape) for part in cut] == [(2, 3), (1, 5)]
    assert [len(part["weights"]) for part in cut] == [2, 1]
