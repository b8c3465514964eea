"""Steered inner loops on tiny models with real processes: the same whatever ranks, accumulation and kills."""

import json
from pathlib import Path
from typing import Any

import inner_loops
import numpy as np
import processes
import pytest
import steered
import torch
from inner_loops import SGD, Case, make_pools
from steered import CONTROLLERS, FOUR_PASSES, run_steered
from transformers import AutoModelForCausalLM

from ideal.draws import Draws
from ideal.mixers.controller import Controller, Measurement, StepStatistics
from ideal.mixture import row_order
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
    case = Case("gpt2", 4, 4, FOUR_PASSES)
    return {name: run_steered(models, make(), case, out / name) for name, make in CONTROLLERS.items()}


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two_ranks")
    processes.run(steered.on_rank, models, out, ranks=2, timeout=300)
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
    accumulated = run_steered(models, CONTROLLERS[name](), Case("gpt2", 4, 1, FOUR_PASSES), tmp_path)
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

    case = Case("gpt2", 4, 4, {**FOUR_PASSES, "save_strategy": "steps", "save_steps": 5})
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


class Watching(Fixed):
    """Keeps what it is told of each step to come."""

    def __init__(self, what: Any) -> None:
        super().__init__([0.5, 0.5], [1.0, 1.0])
        self.measures = what
        self.told: list[Measurement] = []

    def measured(self, measurement: Measurement) -> None:
        self.told.append(measurement)


def test_weights_act_in_the_step_that_was_measured_for_them(models, tmp_path):
    """Set when the step's rows are measured, they are in its gradients."""

    class Late(Watching):
        def measured(self, measurement: Measurement) -> None:
            self.w = np.array([3.0, 0.25])

    case = Case("gpt2", 4, 2, {**SGD, "max_steps": 1})
    late, _ = run_steered(models, Late("excess"), case, tmp_path / "late")
    known, _ = run_steered(models, Fixed([0.5, 0.5], [3.0, 0.25]), case, tmp_path / "known")
    other, _ = run_steered(models, Fixed([0.5, 0.5], [1.0, 1.0]), case, tmp_path / "other")
    assert_same(late, known, 1e-12)
    assert max((known[name] - other[name]).abs().max() for name in known) > 1e-3


def first_step(models: Path, what: str, out: Path) -> tuple[Measurement, list[tuple[int, int]], torch.nn.Module]:
    """What is measured before the first step, the step's rows, and the model."""
    controller = Watching(what)
    run_steered(models, controller, Case("gpt2", 4, 2, {**SGD, "max_steps": 1}), out)
    tokens = {name: pool.trained_tokens for name, pool in make_pools().items()}
    rows = Draws(tokens, TOKENS / 3, inner_loops.SEED, 0).next(controller.p)
    model = AutoModelForCausalLM.from_pretrained(models / "gpt2", dtype=torch.float64)
    return controller.told[0], rows, model


def losses_of(model: torch.nn.Module, example: dict[str, list[int]]) -> torch.Tensor:
    """Each trained token's loss, without the package's."""
    logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
    return torch.stack([-logits[k - 1, label] for k, label in enumerate(example["labels"]) if label != -100])


def test_excess_is_clipped_token_by_token_and_then_summed(models, tmp_path):
    found, rows, model = first_step(models, "excess", tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(models / "gpt2 reference", dtype=torch.float64)
    expected, unclipped, tokens = np.zeros(2), np.zeros(2), np.zeros(2)
    for domain, row in rows:
        example = list(make_pools().values())[domain][row]
        difference = (losses_of(model, example) - losses_of(reference, example)).detach()
        expected[domain] += difference.clamp(min=0).sum().item()
        unclipped[domain] += difference.sum().clamp(min=0).item()
        tokens[domain] += len(difference)
    np.testing.assert_allclose(found.excess, expected, rtol=1e-10)
    np.testing.assert_array_equal(found.tokens, tokens)
    assert expected[1] > 1.05 * unclipped[1], "the case must tell the order of clip and sum"


def test_alignment_is_that_of_explicit_gradients(models, tmp_path):
    """Mean loss of each domain's rows, sum_r w_r mean loss of the target's, clipped to norm 1."""
    found, rows, model = first_step(models, "alignment", tmp_path)
    pools = list(make_pools().values())
    weight = model.get_output_embeddings().weight

    def clipped_gradient(sums: list[tuple[float, list[torch.Tensor]]]) -> torch.Tensor:
        loss = sum(w * torch.cat(parts).mean() for w, parts in sums)
        (gradient,) = torch.autograd.grad(loss, [weight])
        return gradient / max(gradient.norm().item(), 1.0)

    target = []
    for pool in pools:
        order = row_order(inner_loops.SEED, pool.name, len(pool))[:4]
        target.append((0.5, [losses_of(model, pool[int(row)]) for row in order]))
    towards = clipped_gradient(target)
    for domain, pool in enumerate(pools):
        own = clipped_gradient([(1.0, [losses_of(model, pool[row]) for d, row in rows if d == domain])])
        assert found.alignment[domain] == pytest.approx((own * towards).sum().item(), rel=1e-9)
        assert found.norms[domain] == pytest.approx(own.norm().item(), rel=1e-9)
    assert found.rate == 1.0
