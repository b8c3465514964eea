"""The sums that the hooks gather, against loops over sequences without hooks; and the model afterwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, Rows, layer_pairs, sequence_gradients, summed_loss, tiny_llama, toy_rows, weights_of

from ideal.errors import UserError
from ideal.influence.layers import shared_inputs
from ideal.influence.products import Products
from ideal.influence.statistics import (
    Eigenvalues,
    Gradients,
    Halves,
    InputCovariance,
    InputNorms,
    OutputCovariance,
    Scores,
    Tracker,
    draw_labels,
    frozen,
    make_batch,
    make_positions,
)

CPU = torch.device("cpu")
WEIGHTS = [1.0, 2.0, 0.5, 3.0, 1.0, 0.25]


EXACTLY = Products(torch.float64, bf16=False)


def batch_of(rows, weights=WEIGHTS, uniforms=None):
    sizes = rows.positions.tolist()
    slots = range(len(rows))
    positions = make_positions(0, [list(zip(sizes, weights, slots, strict=False))], CPU, torch.float64)
    weights = list(weights)[: len(rows)]
    return make_batch(rows.rows, sizes, weights, uniforms, positions, CPU, torch.float64)


def zeros(model, shape):
    return {name: torch.zeros(shape(*w.shape), dtype=torch.float64) for name, w in weights_of(model).items()}


def tracker_of(model, names=None):
    layers = {name: model.get_submodule(name) for name in names or weights_of(model)}
    groups = shared_inputs(model, layers, torch.tensor([[1, 2, 3]]))
    return Tracker(model, groups, {group.name: 0 for group in groups}, torch.float64)


def gather(model, rows, weights=WEIGHTS):
    """A, S, gradient, squared sequence gradients and input norms of all layers, from the package."""
    sums = {
        "A": InputCovariance(zeros(model, lambda o, i: (i, i)), EXACTLY),
        "S": OutputCovariance(zeros(model, lambda o, i: (o, o)), EXACTLY),
        "G": Gradients(zeros(model, lambda o, i: (1, o, i)), EXACTLY),
        "squares": Eigenvalues(
            zeros(model, lambda o, i: (o, i)), dict.fromkeys(weights_of(model), (None, None)), EXACTLY,
            zeros(model, lambda o, i: (1, o, i)), of=[0],
        ),
        "norms": InputNorms(zeros(model, lambda o, i: (2,))),
    }  # fmt: skip
    tracker = tracker_of(model)
    with frozen(model), tracker.hooked():
        tracker.run(batch_of(rows, weights), list(sums.values()), [])
    found = {key: accumulator.sums for key, accumulator in sums.items()}
    for key in ("A", "S"):
        # Only the upper triangle is filled.
        found[key] = {name: total.triu() + total.triu(1).mT for name, total in found[key].items()}
    for group in tracker.groups:
        for name in group.layers:
            for key in ("A", "norms"):
                found[key][name] = found[key][group.name]
    found["rotated"] = sums["squares"].gradients
    return found


@pytest.fixture
def rows():
    return Rows([*toy_rows("up", 3, 5).rows, *toy_rows("leap", 3, 5).rows])


def test_sums_are_those_of_a_loop_over_sequences(world, rows):
    found = gather(world.model, rows)
    gradients = sequence_gradients(world.model, rows)
    for name in weights_of(world.model):
        pairs = [layer_pairs(world.model, row, name) for row in rows.rows]
        A = sum(w * sum(torch.outer(x, x) for x in xs) for w, (xs, _) in zip(WEIGHTS, pairs, strict=True))
        S = sum(w * sum(torch.outer(d, d) for d in ds) for w, (_, ds) in zip(WEIGHTS, pairs, strict=True))
        weights = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
        first = sum(w * xs[0] @ xs[0] for w, (xs, _) in zip(WEIGHTS, pairs, strict=True))
        torch.testing.assert_close(found["A"][name], A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["S"][name], S, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["G"][name][0], (weights * gradients[name]).sum(0), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(
            found["squares"][name], (weights * gradients[name] ** 2).sum(0), rtol=1e-11, atol=1e-12
        )
        torch.testing.assert_close(found["rotated"][name], found["G"][name], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found["norms"][name], torch.stack([first, A.trace()]))


def test_a_layer_without_a_part_in_the_loss(rows):
    """Its group waits for it until the backward pass is over; what then comes brings no graph into the sums."""
    model = tiny_llama(layers=2)
    for block in model.model.layers:
        mlp = block.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x).detach())
    # Of one sequence: without padding its pairs are views of the model's own tensors.
    found = gather(model, Rows(rows.rows[:1]))
    used = [name for name in weights_of(model) if "up_proj" not in name]
    gradients = torch.autograd.grad(
        WEIGHTS[0] * summed_loss(model, rows.rows[:1]), [model.get_submodule(name).weight for name in used]
    )
    for name, gradient in zip(used, gradients, strict=True):
        torch.testing.assert_close(found["G"][name][0], gradient, rtol=1e-11, atol=1e-12)
    for sums in found.values():
        assert not any(total.requires_grad for total in sums.values())
    assert all((found["G"][name] == 0).all() for name in weights_of(model) if "up_proj" in name)


def test_layers_that_read_the_same_tensor_share_a_group():
    model = tiny_llama(layers=2)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    groups = shared_inputs(model, {name: model.get_submodule(name) for name in names}, torch.tensor([[1, 2, 3]]))
    shared = [sorted(name.split(".")[-1] for name in group.layers) for group in groups]
    block = [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert shared == [*block, *block, ["lm_head"]]


def test_logits_are_computed_where_labels_are_trained(world, rows):
    """The head sees nothing else, unless it is tracked itself."""
    seen = []
    tracker = tracker_of(world.model)
    with frozen(world.model), tracker.hooked():
        handle = world.model.lm_head.register_forward_hook(lambda m, args, output: seen.append(output.shape[:-1]))
        found = tracker.logits(batch_of(rows))
        handle.remove()
    assert seen == [(1, sum(rows.trained_tokens))]
    ids = [torch.tensor([row["input_ids"]]) for row in rows.rows]
    wanted = [torch.tensor(row["labels"][1:]) != -100 for row in rows.rows]
    expected = [world.model(input_ids=i).logits[0, :-1][w] for i, w in zip(ids, wanted, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected))


def test_a_layer_that_runs_twice_is_refused():
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    layers = {"model.layers.0.mlp.up_proj": model.model.layers[0].mlp.up_proj}
    with pytest.raises(UserError, match="up_proj runs several times"):
        shared_inputs(model, layers, torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("size", [100, 300, 700])
def test_squares_fill_the_upper_triangle(size):
    """Blocks of any number; in bfloat16 an entry is off by at most the inputs' rounding, 2^-8 of sum |a b|."""
    x = torch.randn(50, size, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(50, 1, generator=torch.Generator().manual_seed(1))
    expected = 0.5 * (x.double().mT @ (x * weights).double())
    bound = 0.5 * (x.abs().mT @ (x * weights).abs())
    for bf16, unit in ((False, 50 * 2.0**-24), (True, 2.0**-8)):
        total = torch.zeros(size, size)
        Products(torch.float32, bf16).add_square_(total, x, x * weights, 0.5)
        upper = torch.ones(size, size, dtype=torch.bool).triu()
        assert ((total - expected).abs() <= 2 * unit * bound)[upper].all()


def test_bfloat16_products_sum_in_float32():
    """A thousand ones are a thousand, not 256."""
    products = Products(torch.float32, bf16=True)
    total = torch.zeros(128, 128)
    ones = torch.ones(1, 128)
    for _ in range(1000):
        products.add_(total, ones, ones, 1.0)
    assert (total == 1000).all()


def test_a_sequences_bfloat16_products_sum_in_float32():
    """1001 is no bfloat16 number: neither the sum over positions nor what it is handed on in is rounded."""
    ones = torch.ones(1001, 128)
    assert (Products(torch.float32, bf16=True).outer(ones, ones.bfloat16()) == 1001).all()


def test_prompt_positions_count_and_later_ones_do_not(world):
    """The gradient reaches x at the prompt; what follows the last trained label changes nothing."""
    short = {"input_ids": [0, 5, 6, 7, 8], "labels": [-100, -100, -100, 7, 8]}
    longer = {"input_ids": [*short["input_ids"], 9, 3, 3], "labels": [*short["labels"], -100, -100, -100]}
    found, same = (gather(world.model, Rows([row]), [1.0]) for row in (short, longer))
    for key in found:
        for name in found[key]:
            torch.testing.assert_close(found[key][name], same[key][name], rtol=1e-13, atol=1e-15)
    _, d = layer_pairs(world.model, short, "model.layers.0.mlp.gate_proj")
    assert len(d) == 4
    model = tiny_llama(layers=2)
    _, d = layer_pairs(model, short, "model.layers.0.mlp.gate_proj")
    assert (d[:2].norm(dim=1) > 1e-6 * d.norm()).all()


def test_padding_is_known_from_lengths(world, rows):
    """Token 0 is also a real token, and the padding: only lengths tell them apart."""
    together = gather(world.model, rows)
    alone = [gather(world.model, Rows([row]), [w]) for row, w in zip(rows.rows, WEIGHTS, strict=True)]
    for key in together:
        for name in together[key]:
            torch.testing.assert_close(together[key][name], sum(part[key][name] for part in alone))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_every_pair_once(rows, reentrant):
    model = tiny_llama(layers=2)
    expected = gather(model, rows)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    layer = model.model.layers[0].mlp.gate_proj
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    found = gather(model, rows)
    handle.remove()
    assert len(calls) == 3, (
        "the probe and the forward pass alone: nothing was recomputed, so nothing was tested"
    )
    assert model.is_gradient_checkpointing and all(module.training for module in model.modules())
    for key in found:
        for name in found[key]:
            torch.testing.assert_close(found[key][name], expected[key][name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [True, False])
def test_sampled_labels_under_checkpointing(rows, reentrant):
    """Two backward passes through one graph, each recomputing."""
    uniforms = [np.random.default_rng(i).random(t) for i, t in enumerate(rows.trained_tokens)]

    def covariances(model):
        sampled = OutputCovariance(zeros(model, lambda o, i: (o, o)), EXACTLY)
        true = Gradients(zeros(model, lambda o, i: (1, o, i)), EXACTLY)
        tracker = tracker_of(model)
        with frozen(model), tracker.hooked():
            tracker.run(batch_of(rows, uniforms=uniforms), [true], [sampled])
        return sampled.sums, true.sums

    model = tiny_llama(layers=2)
    expected = covariances(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = covariances(model)
    gradient = gather(tiny_llama(layers=2), rows)["G"]
    for name in weights_of(model):
        torch.testing.assert_close(found[0][name], expected[0][name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[1][name], expected[1][name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[1][name], gradient[name], rtol=1e-12, atol=1e-14)


def test_scores_are_products_with_each_sequences_gradient(world, rows):
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(3, *w.shape, dtype=torch.float64, generator=generator)
        for name, w in weights_of(world.model).items()
    }
    table = torch.zeros(len(rows), 3, dtype=torch.float64)
    streams = {name: torch.zeros(3, 1, dtype=torch.float64) for name in directions}
    tracker = tracker_of(world.model)
    picked = set(range(len(rows))) - {2}
    with frozen(world.model), tracker.hooked():
        tracker.run(batch_of(rows), [Scores([table], [picked], directions, EXACTLY, streams)], [])
    gradients = sequence_gradients(world.model, rows)
    per_layer = {name: gradients[name].flatten(1) @ directions[name].flatten(1).T for name in directions}
    expected = sum(per_layer.values())
    expected[2] = 0
    torch.testing.assert_close(table, expected, rtol=1e-11, atol=1e-12)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    weights[2] = 0
    for name, stream in streams.items():
        torch.testing.assert_close(stream[:, 0], weights @ per_layer[name], rtol=1e-11, atol=1e-12)


def test_layers_with_bias_give_the_weights_gradient():
    model = tiny_llama(mlp_bias=True)
    rows = toy_rows("down", 6, 1)
    found = gather(model, rows, [1.0] * 6)
    for name, gradient in sequence_gradients(model, rows).items():
        torch.testing.assert_close(found["G"][name][0], gradient.sum(0), rtol=1e-11, atol=1e-12)


def test_drawn_labels_follow_the_distribution():
    """Evenly spread uniforms make the counts exact to one: no chance involved."""
    logits = torch.tensor([0.3, -1.0, 2.0, -30.0, 0.0])
    number = 10_000
    uniforms = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    counts = torch.bincount(draw_labels(logits.expand(number, -1), uniforms), minlength=5)
    assert (counts - number * logits.double().softmax(0)).abs().max() <= 1
    assert draw_labels(logits[None], torch.tensor([1.0], dtype=torch.float64)).item() < 5


def test_sampled_fisher_is_the_gauss_newton_matrix_in_expectation(world):
    """E over labels of S and of squared gradients, in any bases, is J^T (diag p - p p^T) J with J the logits' Jacobian.

    A sequence with two trained labels is run with every pair of labels, each weighted by its probability: an
    expectation without chance, products of the two positions' gradients included, which cancel. The example's own
    labels give something else.
    """
    row = toy_rows("up", 1, 9)[0]
    trained = [i for i, label in enumerate(row["labels"]) if label != -100]
    row = {**row, "labels": [label if i in trained[:2] else -100 for i, label in enumerate(row["labels"])]}
    names = list(weights_of(world.model))
    rng = torch.Generator().manual_seed(1)
    some = {size: torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=rng))[0] for size in (16, 24)}
    # Layers of a group share Q_A.
    bases = {name: (some[w.shape[0]], some[w.shape[1]]) for name, w in weights_of(world.model).items()}
    outputs = {}
    handles = [
        world.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    logits = world.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, [i - 1 for i in trained[:2]]]
    for handle in handles:
        handle.remove()
    p = logits.detach().softmax(-1)
    middle = torch.block_diag(*[torch.diag(one) - torch.outer(one, one) for one in p])
    eye = torch.eye(logits.numel(), dtype=torch.float64).view(-1, *logits.shape)

    def jacobian(tensor):
        return torch.autograd.grad(logits, [tensor], eye, is_grads_batched=True, retain_graph=True)[0]

    middles = p.cumsum(-1) - p / 2  # of the intervals of uniforms that give each label
    pairs = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    uniforms = torch.stack([middles[0, pairs[:, 0]], middles[1, pairs[:, 1]]], 1).numpy()
    chances = (p[0, pairs[:, 0]] * p[1, pairs[:, 1]]).tolist()

    def statistics(rows, weights, uniforms):
        sums = OutputCovariance(zeros(world.model, lambda o, i: (o, o)), EXACTLY)
        squares = Eigenvalues(zeros(world.model, lambda o, i: (o, i)), bases, EXACTLY)
        tracker = tracker_of(world.model)
        with frozen(world.model), tracker.hooked():
            both = [sums, squares]
            tracker.run(batch_of(rows, weights, uniforms), *(([], both) if uniforms is not None else (both, [])))
        return sums.sums, squares.sums

    expected = statistics(Rows([row] * len(pairs)), chances, list(uniforms))
    own = statistics(Rows([row]), [1.0], None)
    for name in names:
        basis_O, basis_I = bases[name]
        J_SO = jacobian(outputs[name])[:, 0].transpose(0, 1)
        S = sum(J.T @ middle @ J for J in J_SO).triu()
        J = (basis_O.T @ jacobian(world.model.get_submodule(name).weight) @ basis_I).flatten(1)
        squares = (J * (middle @ J)).sum(0)
        for found, right in ((expected, True), (own, False)):
            for got, exact in ((found[0][name].triu(), S), (found[1][name].flatten(), squares)):
                error = (got - exact).abs().max() / exact.abs().max()
                # 576 terms, each of a few hundred roundings.
                assert error < 1e-11 if right else error > 0.1


def test_halves_of_the_sequences(rows):
    """Even and odd slots apart in one set, half apart in another; together they are the sum over all."""
    model = tiny_llama()
    zero = lambda: zeros(model, lambda o, i: (o, i))  # noqa: E731
    sums, others, whole = zero(), zero(), zero()
    names = list(weights_of(model))
    accumulators = [
        Eigenvalues(sums, dict.fromkeys(names, (None, None)), EXACTLY, halves=Halves(others, [1.0, 0.5])),
        Eigenvalues(whole, dict.fromkeys(names, (None, None)), EXACTLY),
    ]
    tracker = tracker_of(model)
    found = sequence_gradients(model, rows)
    signs = torch.tensor([(-1) ** slot * weight for slot, weight in enumerate(WEIGHTS)])[:, None, None]
    with frozen(model), tracker.hooked():
        for set_index in (0, 1):
            batch = batch_of(rows, WEIGHTS)
            tracker.run(replace(batch, positions=replace(batch.positions, set_index=set_index)), accumulators, [])
    for name in names:
        expected = 1.5 * (signs * found[name] ** 2).sum(0)
        torch.testing.assert_close(sums[name] - others[name], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(sums[name] + others[name], whole[name], rtol=1e-10, atol=1e-12)


class Boom(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(rows, fails):
    model = tiny_llama()
    model.train()
    model.model.norm.eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def picture():
        return (
            [module.training for module in model.modules()],
            [(p.requires_grad, p.grad is None) for p in model.parameters()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
            model.config.use_cache,
        )

    before = picture()
    kept = model.lm_head.weight.grad
    tracker = tracker_of(model)
    gradients = Gradients(zeros(model, lambda o, i: (1, o, i)), EXACTLY)
    if fails:
        gradients.add = lambda *_: (_ for _ in ()).throw(Boom)  # type: ignore[method-assign]
    try:
        with frozen(model), tracker.hooked():
            tracker.run(batch_of(rows), [gradients], [])
    except Boom:
        assert fails
    assert picture() == before
    assert model.lm_head.weight.grad is kept and (kept == 1).all()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_dropout_is_off(rows):
    model = tiny_llama(attention_dropout=0.5)
    expected = gather(model, rows)["G"]
    model.train()
    found = gather(model, rows)["G"]
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_layer_that_sees_some_positions_only_is_refused(rows):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x[:, 1:]).sum(dim=1, keepdim=True) + 0 * x
    with pytest.raises(UserError, match="gate_proj does not see every position"):
        gather(model, rows)
