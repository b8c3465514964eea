"""Covariances from sums of positions, and a trace from more sequences than the eigenvalues."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sampling import EXACT, WHOLE, influence, part_of, signs_of
from tiny import damped_of_few, difference, ekfac_spectra, explicit_matrix, factors, weighted_gradients

from ideal.influence import InfluenceConfig, compute_influence, curvature, selection
from ideal.influence.sketch import Sketch, probes
from ideal.influence.statistics import make_positions
from ideal.seeding import generator

SEQUENCES = [(7, 2.0, 4), (1, 1.0, 0), (5, 3.0, 9)]
"""Positions, weight and slot."""


def positions_of(*per_rank, number=0):
    return make_positions(number, per_rank, torch.device("cpu"), torch.float64)


def matrix_of(seed, domain, slot, size, fraction):
    """P [n, N]: which position is in which sum, and with which sign."""
    count = math.ceil(fraction * size)
    signs = 2 * generator(seed, domain, slot, "sketch").integers(0, 2, size) - 1
    P = torch.zeros(count, size, dtype=torch.float64)
    for position, sign in enumerate(signs):
        P[position % count, position] = float(sign)
    return P


@pytest.fixture
def unbounded(monkeypatch):
    monkeypatch.setattr(selection, "LEAST_SEQUENCES", 1)
    monkeypatch.setattr(selection, "FACTOR_SEQUENCES", 1)
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 0)
    monkeypatch.setattr(curvature, "SUMS_PER_DIMENSION", 0)


# The sums


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.9])
def test_every_position_is_in_one_sum_of_its_sequence(fraction):
    """Against the matrix written out; whatever else is in the batch, and on which rank."""
    x = torch.randn(13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sketch = Sketch(fraction, ["other", "up"], 3)
    found, sums = sketch(x, positions_of(SEQUENCES[:2], SEQUENCES[2:], number=1))
    expected = [
        matrix_of(3, "up", slot, size, fraction) @ part
        for part, (size, _, slot) in zip(x.split([7, 1, 5]), SEQUENCES, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-15, atol=1e-15)
    assert (sums.sizes, sums.weights, sums.slots) == ([len(e) for e in expected], [2.0, 1.0, 3.0], [4, 0, 9])
    alone, _ = sketch(x[8:], positions_of(SEQUENCES[2:], number=1))
    assert torch.equal(alone, found[-len(alone) :])


def test_all_of_the_positions_are_themselves():
    x, positions = torch.ones(13, 2), positions_of(SEQUENCES)
    found, same = Sketch(1.0, ["up"], 0)(x, positions)
    assert found is x and same is positions


def test_the_covariance_is_right_on_average():
    """4,000 draws of 13 positions in 5 sums: every entry of the mean within 5 of its standard errors."""
    x = torch.randn(13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    positions, draws = positions_of(SEQUENCES), []
    for seed in range(4000):
        found, sums = Sketch(0.3, ["up"], seed)(x, positions)
        weighted, factor = sums.weighted(found)
        draws.append(factor * found.T @ weighted)
    drawn = torch.stack(draws)
    expected = x.T @ (x * positions.position_weights[:, None])
    errors = drawn.std(0) / math.sqrt(len(drawn))
    assert bool((errors > 0).all()) and bool(((drawn.mean(0) - expected).abs() < 5 * errors).all())


# Traces


def test_a_trace_is_right_on_average():
    G = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = torch.stack(
        [(probes("up", 12, 13, seed, torch.float64, torch.device("cpu")).T @ G).square().sum() for seed in range(4000)]
    )
    assert float((drawn.mean() - G.square().sum()).abs() * math.sqrt(len(drawn)) / drawn.std()) < 5
    # 2 |G G^T|^2 / K is the variance's upper end (Avron and Toledo 2011); K = 16, 200 / 13 rounded up.
    assert float(drawn.std()) < 1.1 * math.sqrt(2 / 16) * float((G @ G.T).norm())


# In the engine


def sums_of(world, seed, fraction):
    """P for the rows of a world, by their places in the random order that sequences are drawn in."""

    def sums(domain, row, size):
        order = generator(seed, domain, "order").permutation(np.flatnonzero(world.domains[domain].counts))
        return matrix_of(seed, domain, int(np.flatnonzero(order == row)[0]), size, fraction)

    return sums


def scaled_to(dense, whole, part, seed=0):
    """All matrices times what the probes see in `whole` over what they see in `part`, on (geometric) average."""
    logs = []
    for name in dense:
        seen = []
        for these in (whole, part):
            gradients, counts = weighted_gradients(these)
            R = probes(name, gradients[name].shape[1], len(dense), seed, torch.float64, torch.device("cpu"))
            seen.append(counts @ (R.T @ gradients[name]).square().sum((1, 2)))
        logs.append((seen[0] / seen[1]).log())
    return {name: matrix * torch.stack(logs).mean().exp() for name, matrix in dense.items()}


def noise_of(world, sums):
    """Squares of what different positions in the same sum add, over the square of all positions."""
    pairs, every = 0.0, 0.0
    for name, domain in world.domains.items():
        for row in np.flatnonzero(domain.counts):
            size = int(domain.examples.positions[row])
            P = sums(name, row, size)
            pairs += domain.counts[row] ** 2 * float((P.T @ P - torch.eye(size, dtype=torch.float64)).square().sum())
            every += domain.counts[row] * size
    return pairs / every**2


def mixing(values, noise):
    """C - 1, entry by entry."""
    values, k = np.maximum(values, 1e-7 * values.max()), len(values)
    density = [sum(0.1 / np.pi / (np.log(a / b) ** 2 + 0.01) for b in values) for a in values]
    C = np.zeros((k, k))
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if i != j:
                widths = np.pi**2 * noise**2 * density[i] * density[j] * a * b
                C[i, j] = noise * a * b / ((a - b) ** 2 + widths)
        C[i, i] = -C[i].sum()
    return C


def without_basis_noise(world, bases_of, sums, dense):
    """The dense matrices as they are when noise in the bases is taken out."""
    noise, found = noise_of(bases_of, sums), {}
    for name, (basis, squares) in ekfac_spectra(world, bases_of, sums).items():
        A, S, _ = factors(bases_of, name, sums)
        outputs, inputs = (torch.linalg.eigvalsh(matrix).clamp_min(0).numpy() for matrix in (S, A))
        damped = (basis.T @ dense[name] @ basis).diagonal().numpy()
        damping = 0.1 * squares.sum(0).mean().item()
        product = np.kron(outputs, inputs)
        product *= (damped - damping).mean() / product.mean()
        C = np.kron(mixing(outputs, noise), np.eye(len(inputs))) + np.kron(np.eye(len(outputs)), mixing(inputs, noise))
        inverse = 1 / (product + damping)
        ratio = (inverse - C @ inverse) * (product + C @ product + damping)
        found[name] = basis @ torch.diag(torch.tensor(damped / ratio)) @ basis.T
    return found


@pytest.mark.parametrize("fraction", [0.7, 1.0])
@pytest.mark.parametrize("sketch", [0.4, 1.0])
def test_bases_from_sums_and_few_eigenvalues(world, unbounded, fraction, sketch):
    """Against dense matrices; the gradients come with the covariances, or some of them do."""
    options = {"factor_fraction": fraction, "eigenvalue_fraction": 0.4, "sketch_fraction": sketch}
    found = influence(world, **options)
    part, larger = part_of(world, 0.4), part_of(world, fraction)
    sums = sums_of(world, 0, sketch) if sketch < 1 else None
    dense = damped_of_few(ekfac_spectra(part, larger, sums), signs_of(world, 0.4))
    if sums:
        flatter = dense
        dense = without_basis_noise(part, larger, sums, dense)
        assert max(difference(dense[name].numpy(), flatter[name].numpy()) for name in dense) > 1e-3
    scaled = scaled_to(dense, larger, part)
    assert difference(found.matrix, explicit_matrix(world, scaled, damping=0.0)) < EXACT
    plain = explicit_matrix(world, dense, damping=0.0)
    assert difference(found.matrix, plain) > 1e-3, "the trace must have been set right"


def test_sums_do_not_depend_on_batches_parts_or_kept_pairs(world, unbounded):
    options = {"eigenvalue_fraction": 0.4, "sketch_fraction": 0.4, "error_sequences": 5, "sample_fraction": 0.9}
    expected = influence(world, **options)
    for other in ({"batch_size": 3}, {"memory_budget": 40e-6}, {"pair_budget": 0}):
        found = influence(world, **options, **other)
        assert difference(found.matrix, expected.matrix) < EXACT
        np.testing.assert_allclose(found.training_covariance, expected.training_covariance, rtol=1e-8, atol=1e-14)
    assert difference(influence(world, seed=1, **options).matrix, expected.matrix) > 1e-3


@pytest.mark.parametrize("budget", [70e-6, 60e-6, 30e-6])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_the_default_does_not_depend_on_memory(world, monkeypatch, budget, fisher):
    """All domains' gradients beside the curvature, two at a time, the layers in parts."""
    monkeypatch.setattr(selection, "LEAST_SEQUENCES", 1)
    monkeypatch.setattr(curvature, "SUMS_PER_DIMENSION", 1)
    config = InfluenceConfig(sample_fraction=1.0, error_sequences=5, fisher=fisher)
    found, limited = (
        compute_influence(world.model, world.domains, world.references, one, 0)
        for one in (config, replace(config, memory_budget=budget))
    )
    assert found.sketch_fraction == 0.25
    assert sum(found.eigenvalue_sequences.values()) < sum(found.sequences.values()) / 4
    assert difference(limited.matrix, found.matrix) < EXACT


def test_a_sketch_has_as_many_sums_as_the_widest_layer_asks_for(world, monkeypatch):
    """With a position per sum it is none; the tiny world has some 30 positions for each of 24 dimensions."""
    few = {"sketch_fraction": 1e-3, "eigenvalue_fraction": 1.0}
    monkeypatch.setattr(curvature, "SUMS_PER_DIMENSION", 10_000)
    assert difference(influence(world, **few).matrix, influence(world).matrix) < EXACT
    seen = []

    class Watched(Sketch):
        def __call__(self, x, positions):
            found, sums = super().__call__(x, positions)
            seen.append((len(x), len(found), x.shape[1]))
            return found, sums

    monkeypatch.setattr(curvature, "SUMS_PER_DIMENSION", 8)
    monkeypatch.setattr(curvature, "Sketch", Watched)
    influence(world, **few)
    counts = sum(found for _, found, width in seen if width == 24) / 3  # down's input, gate's and up's outputs
    # Every sequence has at least one, rounded up.
    assert 8 * 24 <= counts < 8 * 24 + sum(len(domain.counts) for domain in world.domains.values())


def test_a_float32_model_gives_the_same_to_rounding(world):
    """1e-7 of rounding, times the damped inverse's condition of at most 10,000 (damping .1 x mean eigenvalue)."""
    model = world.model
    options = replace(WHOLE, sketch_fraction=0.4, eigenvalue_fraction=0.5)
    expected = compute_influence(model, world.domains, world.references, options, 0)
    try:
        model.float()
        found = compute_influence(model, world.domains, world.references, options, 0)
    finally:
        model.double()
    assert difference(found.matrix, expected.matrix) < 1e-3
