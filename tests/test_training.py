"""The inner loop's objective: every trained token weighs the same, whatever batch, ranks and accumulation.

What train() does is compared with plain autograd: a loop over rows, the summed token loss of each, divided by
the round's constant.
"""

from pathlib import Path
from typing import Any

import inner_loops
import processes
import pytest
import torch
import torch.nn.functional as F
from inner_loops import ADAM, SGD, TWO_RANKS, Case, make_mixture, make_pools, run_case
from transformers import AutoModelForCausalLM

from ideal.errors import UserError
from ideal.mixture import training_rows
from ideal.training import RoundPlan, RoundRows, TrainConfig, check_argument, training_arguments

TOKENS = sum(map(sum, inner_loops.ROWS.values()))
ROWS = sum(map(len, inner_loops.ROWS.values()))
ONE_PROCESS = {
    "bigram 1": Case("bigram", 1, 1),
    "bigram 4": Case("bigram", 4, 4),
    "bigram 4 = 2 x 2": Case("bigram", 4, 2),
    "bigram 4 = 1 x 4": Case("bigram", 4, 1),
    "bigram 64": Case("bigram", 64, 64),
    "bigram 64 = 8 x 8": Case("bigram", 64, 8),
    "gpt2 1": Case("gpt2", 1, 1),
    "gpt2 4": Case("gpt2", 4, 4, ADAM),
    "gpt2 4 = 1 x 4": Case("gpt2", 4, 1, ADAM),
    "gpt2 4, sgd": Case("gpt2", 4, 4),
    "gpt2 4 = 2 x 2, sgd": Case("gpt2", 4, 2),
    "gpt2 64": Case("gpt2", 64, 16),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    inner_loops.make_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("one_process")
    return {name: run_case(models, case, out / name) for name, case in ONE_PROCESS.items()}


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two real processes holds after each case."""
    out = tmp_path_factory.mktemp("two_ranks")
    processes.run(inner_loops.on_rank, models, out, ranks=2)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


def start_of(models: Path, name: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64)


def summed_loss(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    """Cross entropy summed over one row's trained tokens, without the package's loss."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    terms = [
        F.cross_entropy(logits[place - 1 : place], torch.tensor([label]))
        for place, label in enumerate(row["labels"])
        if label != -100
    ]
    return torch.stack(terms).sum()


def weight_of_each_token(models: Path, after: torch.Tensor, steps: int) -> torch.Tensor:
    """[TOKENS] what each trained token's gradient was multiplied by in the epoch, over steps x learning rate.

    In the bigram model a token's gradient, softmax - one hot, stands in its own input's row of the table, and
    each row is moved once: so the weight can be read off, token by token.
    """
    before = start_of(models, "bigram").table.weight.detach()
    update = (before - after) / SGD["learning_rate"]
    weights = []
    for pool in make_pools().values():
        for row in (pool[i] for i in range(len(pool))):
            for place, label in enumerate(row["labels"]):
                if label != -100:
                    source = row["input_ids"][place - 1]
                    gradient = before[source].softmax(0) - F.one_hot(torch.tensor(label), len(before))
                    weight = (update[source] @ gradient) / (gradient @ gradient)
                    torch.testing.assert_close(update[source], weight * gradient, rtol=0, atol=1e-12)
                    weights.append(weight / steps)
    return torch.stack(weights)


def steps_of(name: str) -> int:
    return -(-ROWS // {**ONE_PROCESS, **TWO_RANKS}[name].global_batch)


@pytest.mark.parametrize("name", [n for n in ONE_PROCESS if n.startswith("bigram")])
def test_every_token_weighs_the_same_on_one_process(models, one_process, name):
    weights = weight_of_each_token(models, one_process[name]["table.weight"], steps_of(name))
    assert len(weights) == TOKENS
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / TOKENS), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [n for n in TWO_RANKS if n.startswith("bigram")])
def test_every_token_weighs_the_same_on_two_processes(models, two_ranks, name):
    weights = weight_of_each_token(models, two_ranks[0][name]["table.weight"], steps_of(name))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / TOKENS), rtol=1e-9, atol=0)


def test_nothing_but_trained_inputs_moves(models, one_process):
    """Prompts, last tokens, and the rows that fill the last batch (pad is token 0) leave no trace."""
    pools = make_pools().values()
    rows = [pool[i] for pool in pools for i in range(len(pool))]
    inputs = {i for row in rows for i in row["input_ids"][1:-1]}
    rest = [i for i in range(inner_loops.VOCABULARY) if i not in inputs]
    assert 0 in rest and 3 in rest
    before = start_of(models, "bigram").table.weight
    assert torch.equal(one_process["bigram 64"]["table.weight"][rest], before[rest])


def trained_by_autograd(models: Path, name: str, global_batch: int) -> dict[str, torch.Tensor]:
    """One epoch of SGD written out: summed loss of the rows of each global batch / the round's constant."""
    pools = make_pools()
    order = training_rows(make_mixture(pools), inner_loops.SEED, 0)
    assert len(order) == ROWS
    constant = TOKENS / -(-ROWS // global_batch)
    model = start_of(models, name)
    for start in range(0, ROWS, global_batch):
        model.zero_grad()
        for domain, row in order[start : start + global_batch]:
            (summed_loss(model, pools[domain][row]) / constant).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= SGD["learning_rate"] * parameter.grad
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_weights(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-10
) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["gpt2 1", "gpt2 4, sgd", "gpt2 4 = 2 x 2, sgd", "gpt2 64"])
def test_weights_are_those_of_plain_autograd(models, one_process, name):
    expected = trained_by_autograd(models, "gpt2", ONE_PROCESS[name].global_batch)
    moved = max((expected[n] - p).abs().max() for n, p in start_of(models, "gpt2").named_parameters())
    assert moved > 1e-2, "a training that moves nothing would prove nothing"
    assert_same_weights(one_process[name], expected)


def test_two_processes_give_the_weights_of_plain_autograd(models, two_ranks):
    assert_same_weights(two_ranks[0]["gpt2 4 = 2 x 2, sgd"], trained_by_autograd(models, "gpt2", 4))


def test_ranks_and_accumulation_change_nothing(one_process, two_ranks):
    """AdamW, two epochs, a schedule: 1 x 4, 2 x 2, and both with accumulation."""
    expected = one_process["gpt2 4"]
    assert_same_weights(one_process["gpt2 4 = 1 x 4"], expected, 1e-8)
    assert_same_weights(two_ranks[0]["gpt2 4 = 2 x 2"], expected, 1e-8)
    assert_same_weights(two_ranks[0]["gpt2 4 = 2 x 1 x 2"], expected, 1e-8)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_ranks_hold_the_same_weights(two_ranks, name):
    """Each case evaluated before it trained."""
    for key, weights in two_ranks[0][name].items():
        assert torch.equal(weights, two_ranks[1][name][key])


def test_ranks_that_drift_apart_end_the_run(two_ranks):
    """Trainer.evaluate() before train() turns DDP off without a word; ours does not stay silent."""
    for found in two_ranks:
        assert "weights differ" in found["drift"]


def test_reported_loss_is_per_trained_token(models, tmp_path):
    """With a learning rate of zero and one batch, the logged loss is the mean over all trained tokens."""
    seen: list[dict[str, float]] = []
    case = Case("gpt2", 64, 4, {**SGD, "learning_rate": 0.0})
    run_case(models, case, tmp_path, log=lambda step, values: seen.append(values))
    model, pools = start_of(models, "gpt2"), make_pools()
    total = sum(summed_loss(model, pool[i]).item() for pool in pools.values() for i in range(len(pool)))
    assert [v["loss"] for v in seen if "loss" in v] == pytest.approx([total / TOKENS], rel=1e-6)


def test_killed_inner_loop_continues_at_its_row(models, one_process, tmp_path):
    class Killed(Exception):
        pass

    def kill(step: int, values: dict[str, float]) -> None:
        if step == 4:
            raise Killed

    case = Case("gpt2", 4, 4, {**ADAM, "save_strategy": "steps", "save_steps": 2})
    with pytest.raises(Killed):
        run_case(models, case, tmp_path, log=kill)
    assert (tmp_path / "checkpoints" / "checkpoint-2").is_dir()
    steps: list[int] = []
    weights = run_case(models, case, tmp_path, log=lambda step, values: steps.append(step))
    assert min(steps) >= 3, "the second run must not start over"
    assert_same_weights(weights, one_process["gpt2 4"], 1e-8)


def test_rows_come_in_whole_batches_and_each_once(models):
    pools = make_pools()
    mixture = make_mixture(pools)
    config = TrainConfig(4, {"num_train_epochs": 2})
    plan = RoundPlan.of(mixture.total_rows, mixture.total_tokens, config)
    assert (plan.steps_per_epoch, plan.steps, plan.tokens_per_step) == (3, 6, TOKENS / 3)
    rows = RoundRows(pools, mixture, plan, 4, pad_id=0, seed=1)
    assert len(rows) == 24
    everything = sorted(pool[i]["input_ids"] for pool in pools.values() for i in range(len(pool)))
    epochs = [[rows[i] for i in range(12)], [rows[i] for i in range(12, 24)]]
    for epoch in epochs:
        assert epoch[11] == {"input_ids": [0], "labels": [-100]}
        assert sorted(row["input_ids"] for row in epoch[:11]) == everything
    assert epochs[0] != epochs[1]
    # Ranks and workers ask in any order.
    assert [rows[i] for i in (13, 2, 20, 5)] == [epochs[1][1], epochs[0][2], epochs[1][8], epochs[0][5]]


def test_max_steps_and_parts_of_epochs():
    assert RoundPlan.of(10, 100, TrainConfig(4, {"max_steps": 7})).steps == 7
    assert RoundPlan.of(10, 100, TrainConfig(4, {"num_train_epochs": 0.5})).steps == 2
    # A part of the steps, rounded up, with the constant of a whole inner loop.
    assert RoundPlan.of(10, 100, TrainConfig(4, {"max_steps": 7}), 0.25) == RoundPlan(3, 2, 100 / 3)
    assert RoundPlan.of(10, 100, TrainConfig(4), 0.01).steps == 1
    assert RoundPlan.of(10, 100, TrainConfig(4)).steps == 9, "TrainingArguments' own default is three epochs"


def test_accumulation_follows_from_the_global_batch(tmp_path):
    config = TrainConfig(12, {"per_device_train_batch_size": 3, "use_cpu": True})
    assert training_arguments(config, tmp_path, 0).gradient_accumulation_steps == 4
    with pytest.raises(UserError, match=r"^train\.global_batch_size: 10 is not a multiple .* 4 x 1$"):
        training_arguments(TrainConfig(10, {"per_device_train_batch_size": 4, "use_cpu": True}), tmp_path, 0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rat", 1, "unknown key train.learning_rat; did you mean train.learning_rate?"),
        ("learning_rate", "fast", "train.learning_rate: 'fast' does not fit"),
        ("gradient_accumulation_steps", 2, "it follows from train.global_batch_size"),
        ("label_smoothing_factor", 0.1, "influence is that of the plain token loss"),
    ],
)
def test_arguments_are_checked(key, value, message):
    with pytest.raises(ValueError, match="train") as caught:
        check_argument(key, value)
    assert message in str(caught.value)


def test_arguments_take_their_own_type():
    assert check_argument("learning_rate", "1e-5") == 1e-5
    assert check_argument("bf16", "true") is True
    assert check_argument("num_train_epochs", "2") == 2.0
