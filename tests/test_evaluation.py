"""Losses: summed token loss / trained tokens, whatever the batches; Q as their weighted mean."""

import json
from dataclasses import replace

import inner_loops
import processes
import pytest
import sharded
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ideal.evaluation import EvaluationConfig, evaluate, weighted


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.3, **shape)).eval()


def by_hand(model: torch.nn.Module, examples: inner_loops.ExampleSet) -> float:
    """One example at a time, one trained token at a time."""
    total, tokens = 0.0, 0
    for i in range(len(examples)):
        row = examples[i]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for place, label in enumerate(row["labels"]):
            if label != -100:
                total += F.cross_entropy(logits[place - 1], torch.tensor(label)).item()
                tokens += 1
    return total / tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("pad_id", [0, 3])
def test_loss_is_per_trained_token(model, batch_size, pad_id):
    """Pad may equal a token of the text (3 begins every example)."""
    sets = inner_loops.make_pools()
    found = evaluate(model, sets, EvaluationConfig(batch_size), pad_id=pad_id, description="")
    assert list(found) == list(sets)
    for name, examples in sets.items():
        assert found[name] == pytest.approx(by_hand(model, examples), rel=1e-6)


def test_mean_of_batch_means_would_differ(model):
    """The rows differ so much in length that a wrong mean cannot hide."""
    examples = inner_loops.make_pools()["long"]
    rows = [
        by_hand(model, replace(examples, examples=examples.examples.select([i])))
        for i in range(len(examples))
    ]
    assert abs(sum(rows) / len(rows) - by_hand(model, examples)) > 1e-3


def test_evaluation_leaves_the_model_as_it_was(model):
    model.train()
    evaluate(model, inner_loops.make_pools(), EvaluationConfig(), pad_id=0, description="")
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()


def test_sharded_model_has_the_same_losses(model, tmp_path):
    """Two ranks take part in each other's forward passes to the end, also where one has a batch less."""
    model.save_pretrained(tmp_path / "model")
    processes.run(sharded.on_rank, tmp_path, ranks=2)
    sets = inner_loops.make_pools()
    assert any(len(examples) % 2 for examples in sets.values()), "some set must be uneven"
    expected = evaluate(model, sets, EvaluationConfig(8), pad_id=0, description="")
    for rank in range(2):
        for losses in json.loads((tmp_path / f"rank{rank}.json").read_text()).values():
            assert losses == pytest.approx(expected, rel=1e-6)


def test_weighted():
    assert weighted({"a": 1.0, "b": 3.0}, {"a": 0.25, "b": 0.75}) == 2.5
    assert weighted({"a": 1.0}, {"a": 1.0, "b": 0.0}) == 1.0, "what does not count may be missing"
    assert weighted({"a": 1.0}, {"a": 0.5, "b": 0.5}) is None
    assert weighted({}, {}) is None
