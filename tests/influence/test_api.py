"""influence_of from a training script: the right rows, and a script that does not notice."""

import copy
import random
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import api_ranks
import numpy as np
import processes
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from script import WHOLE, collate, direct, loader, loss_of, picture
from tiny import Rows, difference, tiny_llama, toy_rows
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from ideal.errors import UserError
from ideal.influence import api, influence_of, samples

EXACT = 1e-10
"""As in test_engine.py: batches differ, so sums are rounded in another order."""
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def rows():
    domains = {kind: toy_rows(kind, count, 3) for kind, count in (("up", 9), ("leap", 7), ("noise", 5))}
    return domains, {kind: toy_rows(kind, 4, 4) for kind in ("up", "either")}


@pytest.fixture(scope="module")
def expected(world, rows):
    return direct(world.model, *rows)


def loaders(rows, **options):
    return tuple({name: loader(one, **options) for name, one in sets.items()} for sets in rows)


def probe(model, rows, **options):
    return influence_of(model, *loaders(rows), **WHOLE, **options)


# The right rows


@pytest.mark.parametrize(
    "options",
    [
        {"side": "left"},
        {"batch_size": 1},
        {"batch_size": 100, "shuffle": True},
        {"shuffle": True, "side": "left", "batch_size": 3},
    ],
)
def test_it_is_the_influence_of_the_rows(world, rows, expected, options):
    found = influence_of(world.model, *loaders(rows, **options), **WHOLE)
    assert difference(found.matrix, expected.matrix) < EXACT
    assert (found.sequences, found.tokens) == (expected.sequences, expected.tokens)
    assert found.capabilities == ["up", "either"] and found.domains == ["up", "leap", "noise"]


def packed(rows):
    """All rows of a set as one, with positions that start again; no attention mask."""
    return {
        "input_ids": [sum((row["input_ids"] for row in rows.rows), [])],
        "labels": [sum((row["labels"] for row in rows.rows), [])],
        "position_ids": [sum((list(range(len(row["input_ids"]))) for row in rows.rows), [])],
    }


@pytest.mark.parametrize("make", [lambda rows: rows.rows, lambda rows: [packed(rows)]], ids=["single", "packed"])
def test_rows_by_themselves_and_packed_rows(world, rows, expected, make):
    sets = [{name: make(one) for name, one in kind.items()} for kind in rows]
    assert difference(influence_of(world.model, *sets, **WHOLE).matrix, expected.matrix) < EXACT


def test_the_first_token_is_no_target(world):
    """Labels that are all of a text: the model predicts its second token first."""
    text = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
    rows = {"up": Rows([{**text, "labels": [-100, 6, 7, 8]}])}
    found = influence_of(world.model, {"up": [text]}, {"up": [text]}, **WHOLE)
    assert found.tokens == {"up": 3}
    assert difference(found.matrix, direct(world.model, rows, rows).matrix) < EXACT


def test_sample_depends_on_neither_order_nor_batches(world, rows, monkeypatch):
    monkeypatch.setattr(samples, "LEAST_SEQUENCES", 2)
    options = {"sample_fraction": 0.5, "error_sequences": 4, "seed": 5}
    one = influence_of(world.model, *loaders(rows), **options)
    other = influence_of(world.model, *loaders(rows, batch_size=2, shuffle=True, side="left"), **options)
    assert one.sequences["up"] == 5 and one.tokens == other.tokens
    assert difference(other.matrix, one.matrix) < EXACT


def test_a_batch_without_trained_labels_is_nothing(world, rows, expected):
    masked = collate([{"input_ids": [4, 5, 6], "labels": [-100] * 3}] * 2)
    domains, references = ({name: [masked, *one] for name, one in sets.items()} for sets in loaders(rows))
    found = influence_of(world.model, domains, references, **WHOLE)
    assert difference(found.matrix, expected.matrix) < EXACT
    assert found.tokens == expected.tokens


def test_a_row_that_comes_twice_counts_twice(world, rows):
    domains, references = rows
    doubled = {**domains, "up": Rows([*domains["up"].rows, *domains["up"].rows[:3]])}
    twice = {**references, "up": Rows([*references["up"].rows, references["up"].rows[1]])}
    found = probe(world.model, (doubled, twice))
    assert found.sequences["up"] == 9 and found.reference_sequences["up"] == 5
    assert difference(found.matrix, direct(world.model, doubled, twice).matrix) < EXACT


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("kind", ["distributed", "shuffled", "shard", "split"])
def test_what_samplers_repeat_is_left_out(size, parts, kind):
    """All ranks' loaders together give every row of the data set once, in batches that do not divide it."""
    rows = Rows([{"input_ids": [1, number], "labels": [-100, number]} for number in range(size)])
    found = []
    for rank in range(parts):
        if kind in ("distributed", "shuffled"):
            sampler = DistributedSampler(rows.rows, parts, rank, shuffle=kind == "shuffled")
            part = loader(rows, sampler=sampler)
        else:
            batches = BatchSampler(SequentialSampler(rows.rows), 4 if kind == "shard" else 6, drop_last=False)
            shard = BatchSamplerShard(batches, parts, rank, split_batches=kind == "split")
            part = DataLoader(rows.rows, batch_sampler=shard, collate_fn=collate)
        read = api._read("", part)
        assert (read.number, read.parts) == (rank, parts)
        found += read.rows.elements()
    assert sorted(found) == api_rows(rows)


def api_rows(rows):
    return sorted(api._read("", rows.rows).rows.elements())


def test_a_collate_function_that_makes_more_rows_keeps_them_all():
    """Their places in the sampler's order are unknown, so none can be told to be a repeat."""
    rows = toy_rows("up", 5, 0)
    double = DataLoader(
        rows.rows,
        2,
        sampler=DistributedSampler(rows.rows, 2, 1),
        collate_fn=lambda batch: collate([*batch, *batch]),
    )
    assert api._read("", double).rows.total() == 6


# A script that does not notice


def awkward_model(world):
    """In training, with dropout, a frozen layer, a module in evaluation mode, a hook and half its gradients."""
    model = tiny_llama(attention_dropout=0.3)
    model.load_state_dict(world.model.state_dict())
    model.train()
    model.model.norm.eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    model.model.layers[0].self_attn.q_proj.register_full_backward_hook(lambda *_: None)
    with torch.random.fork_rng():
        loss_of(model, toy_rows("up", 3, 0).rows).backward()
    return model


class Boom(Exception):
    pass


def failing_at(model, call):
    """A hook that raises at the model's n-th forward pass."""
    calls = iter(range(call + 1))

    def hook(*_):
        if next(calls) == call:
            raise Boom

    return model.model.layers[0].mlp.down_proj.register_forward_hook(hook)


def precisions():
    """What float32 products take in; torch's older setting cannot be read where the newer ones differ."""
    settings = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    with suppress(RuntimeError):
        settings.append(torch.get_float32_matmul_precision())
    return settings


def process():
    """The state that all of a process shares."""
    return (
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        *precisions(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("fails", [None, 0, 6])
def test_model_and_process_are_as_before(world, rows, expected, fails):
    model = awkward_model(world)
    hook = None if fails is None else failing_at(model, fails)
    before, state = list(picture(model)), process()
    if hook is None:
        found = influence_of(model, *loaders(rows, shuffle=True), **WHOLE)
        assert difference(found.matrix, expected.matrix) < EXACT
    else:
        with pytest.raises(Boom):
            influence_of(model, *loaders(rows, shuffle=True), **WHOLE)
    assert list(picture(model)) == before
    assert process() == state


def test_random_states_are_put_back(world, rows, monkeypatch):
    def wild(*_):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        raise Boom

    monkeypatch.setattr(api, "compute_influence", wild)
    state = process()
    with pytest.raises(Boom):
        probe(world.model, rows)
    assert process() == state


def everywhere(precision):
    """As transformers' `TrainingArguments(tf32=True)` does."""
    torch.backends.fp32_precision = precision


def pinned(precision):
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = precision


def at_odds(precision):
    """An older setting, and a newer one that differs."""
    torch.set_float32_matmul_precision("high")
    torch.backends.mkldnn.matmul.fp32_precision = precision


@pytest.mark.parametrize(
    ("allow", "precision"),
    [
        (torch.set_float32_matmul_precision, "medium"),
        (everywhere, "tf32"),
        (pinned, "tf32"),
        (pinned, "ieee"),
        (at_odds, "bf16"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"product_dtype": "bfloat16"}])
def test_float32_is_float32_whatever_the_process_allows(world, rows, allow, precision, options):
    """TF32, and bfloat16 on processors that have it. What was set, and where, is put back."""
    model = copy.deepcopy(world.model).float()
    expected = probe(model, rows, **options).matrix
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(precisions()))
    try:
        allow(precision)
        before = precisions()
        assert (probe(model, rows, **options).matrix == expected).all()
        assert seen and all(one == ["ieee", "ieee", "highest"] for one in seen)
        hook.remove()
        failing_at(model, 3)
        with pytest.raises(Boom):
            probe(model, rows, **options)
        assert precisions() == before
        everywhere("none")
        if allow is everywhere:
            assert precisions() == ["none", "none", "highest"], "inherited settings must stay so"
        if allow is at_odds:
            pinned("ieee")
            assert precisions()[2] == "high", "torch's older setting too, though it could not be read"
    finally:
        everywhere("none")
        torch.set_float32_matmul_precision("highest")
        pinned("none")


def test_a_loader_shuffles_its_next_epoch_as_if_never_read(world, rows):
    domains, references = rows
    shuffled = loader(domains["up"], shuffle=True, generator=torch.Generator().manual_seed(0))
    expected = [batch["input_ids"].tolist() for batch in shuffled]
    shuffled.generator.manual_seed(0)
    influence_of(world.model, {"up": shuffled}, loaders(rows)[1], **WHOLE)
    assert [batch["input_ids"].tolist() for batch in shuffled] == expected


def steps(model, rows, between=None, count=3):
    """Optimizer steps of two accumulated halves, with something in between."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number in range(count):
            loss_of(model, rows[2 * number : 2 * number + 2]).backward()
            if between is not None:
                between()
            loss_of(model, rows[2 * number + 1 : 2 * number + 3]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_training_goes_on_as_if_never_probed(world, rows):
    """Bit for bit, dropout's random numbers included, probed in the middle of gradient accumulation."""
    model = awkward_model(world)
    model.zero_grad()  # a copy would not have its gradients
    other = copy.deepcopy(model)
    found = steps(model, rows[0]["up"].rows, lambda: probe(model, rows))
    assert all(map(torch.equal, found, steps(other, rows[0]["up"].rows)))


@pytest.mark.parametrize(
    "surrounding",
    [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_contexts_of_the_script_do_not_matter(world, rows, surrounding):
    """In float32, which autocast would round to bfloat16; the same products, so the same to the last bit."""
    model = copy.deepcopy(world.model).float()
    expected = probe(model, rows)
    with surrounding():
        state = process()
        found = probe(model, rows)
        assert process() == state
    assert (found.matrix == expected.matrix).all()


def test_compiled_models_run_as_written(world, rows, expected):
    def never(*_):
        raise AssertionError("compiled code was run")

    model = copy.deepcopy(world.model)
    assert difference(probe(torch.compile(model, backend=never), rows).matrix, expected.matrix) < EXACT
    model.model.layers[0].compile(backend=never)
    compiled = model.model.layers[0]._compiled_call_impl
    assert difference(probe(model, rows).matrix, expected.matrix) < EXACT
    assert model.model.layers[0]._compiled_call_impl is compiled


def test_adapters_of_peft(world, rows):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        model = peft.get_peft_model(copy.deepcopy(world.model), config).double()
    before = list(picture(model))
    found = probe(model, rows)
    assert list(picture(model)) == before
    assert len(found.layers) == 2
    assert difference(found.matrix, direct(model, *rows).matrix) < EXACT


# Two ranks


@pytest.fixture(scope="module")
def ranks(world, rows, tmp_path_factory):
    """What two real processes (gloo) found, by api_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save((world.model.state_dict(), *rows), folder / "world.pt")
    processes.run(api_ranks.on_rank, folder, ranks=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("loaders", ["dealt", "same", "apart"])
def test_ranks_rows_are_put_together(ranks, expected, loaders):
    first, second = (found["loaders"][loaders] for found in ranks)
    assert (first.matrix == second.matrix).all()
    assert difference(first.matrix, expected.matrix) < EXACT
    assert (first.sequences, first.tokens) == (expected.sequences, expected.tokens)
    assert first.reference_sequences == expected.reference_sequences


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "mixed"])
def test_distributed_training_goes_on_as_if_never_probed(ranks, expected, kind):
    """Probed in the middle of gradient accumulation, and by a probe that broke off."""
    for found in ranks:
        assert found[kind]["unchanged"]
        assert found[kind]["trains"]
        # Weights rounded to float32 before use.
        assert difference(found[kind]["matrix"], expected.matrix) < (1e-4 if kind == "mixed" else EXACT)


def test_a_mistake_on_one_rank_is_told_on_all(ranks):
    for number, found in enumerate(ranks):
        told = found["mistakes"]
        assert re.fullmatch(r"domains\['up'\], batch 0: it has no labels.*?( \(on rank 1\))?", told["labels"])
        assert "damping=-1: " in told["option"]
        assert "ranks were called differently" in told["names"]
        assert told["empty"] == "domains['up']: the loader gave no rows", number


# Mistakes


def batch(**changes):
    """Two rows, the first padded on the right."""
    return {
        "input_ids": torch.tensor([[4, 5, 0], [6, 7, 8]]),
        "labels": torch.tensor([[-100, 5, -100], [-100, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        **changes,
    }


class BrokenLoader:
    def __iter__(self):
        yield batch()
        raise KeyError("text")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [batch(), batch(labels=None)],
            r"domains\['math'\], batch 1: it has no labels, only input_ids, attention_mask",
        ),
        ([batch(input_ids=None)], "batch 0: it has no input_ids"),
        ([(1, 2)], "batch 0: it is a tuple, not a mapping with input_ids and labels"),
        ([batch(labels=torch.zeros(2))], r"labels is \[1, 2\] and input_ids \[2, 3\]"),
        ([batch(attention_mask=torch.ones(2, 1, 3, 3))], r"attention_mask is \[2, 1, 3, 3\]"),
        ([batch(attention_mask=torch.tensor([[1, 1, 0], [2, 2, 1]]))], "row 1: attention_mask holds more than"),
        ([batch(attention_mask=torch.tensor([[1, 0, 1], [1, 1, 1]]))], "row 0: attention_mask has a gap"),
        ([batch(labels=torch.tensor([[-100, 5, 0], [-100, 7, 8]]))], "row 0: labels of padding"),
        ([batch(labels=torch.tensor([[5, -100, -100], [7, 8, -100]]))], "row 0: labels must be the input_ids of"),
        ([batch(labels=torch.full((2, 3), -100))], "the loader gave 2 rows, but no label that is not -100"),
        ([], "the loader gave no rows"),
        (BrokenLoader(), r"the loader failed after 1 batches: KeyError: 'text'"),
        (5, "the loader failed after 0 batches: TypeError: 'int' object is not iterable"),
    ],
)
def test_what_does_not_fit_is_named(world, given, message):
    before = list(picture(world.model))
    with pytest.raises(UserError, match=message):
        influence_of(world.model, {"math": given}, {"gsm8k": [batch()]})
    with pytest.raises(UserError, match=message.replace("domains", "references").replace("math", "gsm8k")):
        influence_of(world.model, {"math": [batch()]}, {"gsm8k": given})
    assert list(picture(world.model)) == before


def test_empty_mappings_are_named(world):
    with pytest.raises(UserError, match="references is empty"):
        influence_of(world.model, {"math": [batch()]}, {})
    with pytest.raises(UserError, match="the mixture has no trained token"):
        influence_of(world.model, {}, {"gsm8k": [batch()]})


def test_wrong_options_are_named(world):
    with pytest.raises(UserError, match=r"damping=-1: "):
        influence_of(world.model, {"math": [batch()]}, {"gsm8k": [batch()]}, damping=-1)
    with pytest.raises(UserError, match=r"dampening=0.1: "):
        influence_of(world.model, {"math": [batch()]}, {"gsm8k": [batch()]}, dampening=0.1)


def test_weights_are_of_the_capabilities(world, rows, monkeypatch):
    given = []
    monkeypatch.setattr(api, "compute_influence", lambda *arguments: given.append(arguments[-1]))
    probe(world.model, rows, weights={"either": 3, "up": 1})
    probe(world.model, rows)
    assert given == [[0.25, 0.75], None], "in the references' order, of sum 1"
    for wrong in ({"up": 1}, {"up": 1, "either": -1}, {"up": 0, "either": 0}, {"up": 1, "either": 1, "more": 1}):
        with pytest.raises(UserError, match="weights .* must not be negative, and of up, either"):
            probe(world.model, rows, weights=wrong)


def test_a_part_alone_is_refused(world, rows):
    part = loader(rows[0]["up"], sampler=DistributedSampler(rows[0]["up"].rows, 2, 0))
    with pytest.raises(UserError, match="deals the rows to 2 processes, but only 1 of these parts"):
        influence_of(world.model, {"up": part}, loaders(rows)[1])


def test_other_models_are_refused(rows):
    with pytest.raises(UserError, match="Linear is no causal language model of transformers"):
        probe(torch.nn.Linear(3, 3), rows)


# The README


def test_readme_call_runs_as_it_stands(world, rows):
    section = README.read_text().split("## Inside your own training script")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    domains, references = loaders(rows)
    given = {
        "model": world.model,
        "math_loader": domains["up"],
        "code_loader": domains["leap"],
        "gsm8k_loader": references["up"],
        "humaneval_loader": references["either"],
    }
    exec(code, given)
    assert given["influence"].matrix.shape == (2, 2)
    assert given["influence"].domains == ["math", "code"]
