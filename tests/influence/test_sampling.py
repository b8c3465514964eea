"""Factors from fewer sequences, as many as it takes, fewer layers, and the joint solver inside the engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import (
    World,
    counted,
    damped_of_few,
    diagonal_spectra,
    difference,
    ekfac_dense,
    ekfac_spectra,
    explicit_matrix,
    kfac_dense,
    logit_curvature,
    make_world,
    mean_gradients,
    padded,
    total_tokens,
    weights_of,
)

from ideal.errors import UserError
from ideal.influence import DomainSample, InfluenceConfig, adaptive, compute_influence, curvature, engine, selection
from ideal.influence.adaptive import DIRECTION_ERROR, LARGEST_STEP, contributions, more_sequences
from ideal.influence.samples import LEAST_SEQUENCES, how_many
from ideal.seeding import generator

EXACT = 1e-10
WHOLE = InfluenceConfig(sample_fraction=1.0, factor_fraction=1.0, error_sequences=0)


def influence(world, seed=0, **options):
    return compute_influence(world.model, world.domains, world.references, replace(WHOLE, **options), seed)


def part_of(world, fraction, seed=0):
    """The world with the rows that the curvature is to be estimated on, standing for their domains."""
    domains = {}
    for name, domain in world.domains.items():
        rows = generator(seed, name, "order").permutation(np.flatnonzero(domain.counts))
        rows = rows[: int(np.ceil(fraction * len(rows)))]
        tokens, counts = domain.examples.trained_tokens, np.zeros(len(domain.counts))
        counts[rows] = domain.counts[rows]
        domains[name] = DomainSample(domain.examples, counts * (domain.counts @ tokens) / (counts @ tokens))
    return World(world.model, domains, world.references)


def signs_of(world, fraction, least=1, seed=0):
    """[m] of the world's rows: how the two halves are told apart of the sequences that eigenvalues come from."""
    found = []
    for name, domain in world.domains.items():
        rows = generator(seed, name, "order").permutation(np.flatnonzero(domain.counts))
        used = min(len(rows), max(least, int(np.ceil(fraction * len(rows)))))
        signs = np.zeros(len(domain.counts))
        signs[rows[:used]] = np.sqrt(1 - used / len(rows)) * (-1.0) ** np.arange(used)
        found.append(signs)
    return torch.tensor(np.concatenate(found))


# Factors from fewer sequences


@pytest.fixture
def unbounded(monkeypatch):
    monkeypatch.setattr(selection, "LEAST_SEQUENCES", 1)
    monkeypatch.setattr(selection, "FACTOR_SEQUENCES", 1)
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 0)


@pytest.mark.parametrize("eigenvalues", [0.7, 1.0])
@pytest.mark.parametrize("factors", ["ekfac", "kfac", "diagonal"])
def test_gradients_from_all_sequences_and_factors_from_parts(world, unbounded, factors, eigenvalues):
    """Against dense matrices, and mean gradients of everything."""
    found = influence(world, factor_fraction=0.4, eigenvalue_fraction=eigenvalues, factors=factors)
    part, larger = part_of(world, 0.4), part_of(world, eigenvalues)
    if factors == "kfac":
        expected = explicit_matrix(world, kfac_dense(part))
    else:
        spectra = ekfac_spectra(larger, part) if factors == "ekfac" else diagonal_spectra(larger)
        expected = explicit_matrix(world, damped_of_few(spectra, signs_of(world, eigenvalues)), damping=0.0)
    assert difference(found.matrix, expected) < EXACT
    present = {name: np.count_nonzero(domain.counts) for name, domain in world.domains.items()}
    fraction, late = eigenvalues if factors == "diagonal" else 0.4, 0.4 if factors == "kfac" else eigenvalues
    assert found.factor_sequences == {name: int(np.ceil(fraction * count)) for name, count in present.items()}
    assert found.eigenvalue_sequences == {name: int(np.ceil(late * count)) for name, count in present.items()}
    assert found.sequences == present
    whole = influence(world, factors=factors)
    assert fraction == 1 or difference(whole.matrix, found.matrix) > 1e-3


def test_a_domain_that_is_used_whole_has_no_noise(world, monkeypatch):
    """Ten sequences of each: all of one domain, a quarter of the others."""
    few = replace(world.domains["down"], counts=world.domains["down"].counts * (np.arange(48) < 13))
    world = replace(world, domains={**world.domains, "down": few})
    for name in ("LEAST_SEQUENCES", "FACTOR_SEQUENCES"):
        monkeypatch.setattr(selection, name, 10)
    found = influence(world, eigenvalue_fraction=1e-3)
    assert found.eigenvalue_sequences == {"up": 10, "down": np.count_nonzero(few.counts), "noise": 10}
    domains = {}
    for name, domain in world.domains.items():
        rows = generator(0, name, "order").permutation(np.flatnonzero(domain.counts))[:10]
        tokens, counts = domain.examples.trained_tokens, np.zeros(len(domain.counts))
        counts[rows] = domain.counts[rows]
        domains[name] = DomainSample(domain.examples, counts * (domain.counts @ tokens) / (counts @ tokens))
    spectra = ekfac_spectra(replace(world, domains=domains), world)
    signs = signs_of(world, 1e-3, least=10)
    assert set(signs[48:96].tolist()) == {0.0}
    whole = explicit_matrix(world, damped_of_few(spectra, signs), damping=0.0)
    # Each layer's trace is set to the common factor of all layers', which probes tell (test_sketch.py).
    factor = found.matrix / whole
    np.testing.assert_allclose(factor, factor[0, 0], rtol=EXACT)


def test_noise_of_few_eigenvalues_does_not_enlarge_the_matrix(large, monkeypatch):
    """A tenth of 300 sequences of each domain, the same bases; the trace of all of them, exactly."""
    whole, few = influence(large).matrix, {"eigenvalue_fraction": 0.1, "error_sequences": 0}
    monkeypatch.setattr(curvature.Curvatures, "_set_scale", lambda self: None)

    def factor(seed):
        found = influence(large, seed=seed, **few).matrix
        return float((found * whole).sum() / (whole * whole).sum())

    corrected = [factor(seed) for seed in range(4)]
    monkeypatch.setattr(curvature, "without_noise", lambda eigenvalues, variances, damping: eigenvalues)
    plain = [factor(seed) for seed in range(4)]
    print(corrected, plain)
    assert np.mean(plain) > 1.02 and abs(np.mean(corrected) - 1) < 0.5 * (np.mean(plain) - 1)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_a_part_in_parts(world, unbounded, fisher):
    """Which sequences are used for what does not depend on how the layers are laid out."""
    found = influence(world, factor_fraction=0.4, eigenvalue_fraction=0.7, fisher=fisher)
    in_parts = influence(world, factor_fraction=0.4, eigenvalue_fraction=0.7, fisher=fisher, memory_budget=40e-6)
    assert difference(in_parts.matrix, found.matrix) < EXACT


def test_the_widest_layer_asks_for_positions(world, monkeypatch):
    """Eight for each of 24 dimensions, whatever the fraction."""
    monkeypatch.setattr(selection, "LEAST_SEQUENCES", 1)
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 8)
    found = influence(world, factor_fraction=1e-3)
    positions = 0
    for name, domain in world.domains.items():
        rows = generator(0, name, "order").permutation(np.flatnonzero(domain.counts))
        positions += domain.examples.positions[rows[: found.factor_sequences[name]]].sum()
    assert 0.8 * 8 * 24 < positions < 1.5 * 8 * 24
    assert sum(found.factor_sequences.values()) < sum(found.sequences.values())


# What is left out in the configuration

BY_ITSELF = dict.fromkeys(("factor_fraction", "sketch_fraction", "eigenvalue_fraction"))


def test_by_itself_all_sequences_serve_the_bases_and_a_fifth_the_eigenvalues(large):
    """A quarter of the positions would be fewer sums than 12 for each of 24 dimensions."""
    found = influence(large, **BY_ITSELF)
    present = {name: np.count_nonzero(domain.counts) for name, domain in large.domains.items()}
    assert found.factor_sequences == found.sequences == present
    assert found.eigenvalue_sequences == {name: int(np.ceil(0.2 * count)) for name, count in present.items()}
    assert min(present.values()) > 5 * LEAST_SEQUENCES
    assert 12 * 24 < 0.25 * sum(domain.examples.positions[domain.counts > 0].sum() for domain in large.domains.values())
    assert found.sketch_fraction == 0.25
    given = influence(large, factor_fraction=1.0, sketch_fraction=0.25, eigenvalue_fraction=0.2)
    np.testing.assert_array_equal(found.matrix, given.matrix)


ELSEWHERE = {
    "K-FAC": {"factors": "kfac"},
    "the diagonal": {"factors": "diagonal"},
    "the joint solver": {"solver": "cg", "solver_iterations": 1},
    "all eigenvalues": {"eigenvalue_fraction": 1.0},
    "a part that was asked for": {"factor_fraction": 0.1},
}


@pytest.mark.parametrize("which", ELSEWHERE)
def test_elsewhere_few_sequences_serve_the_bases(large, which, monkeypatch):
    """All positions of a tenth, and the eigenvalues of all where they are not the covariances'."""
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 0)
    monkeypatch.setattr(selection, "FACTOR_SEQUENCES", LEAST_SEQUENCES)
    config = InfluenceConfig(sample_fraction=1.0, error_sequences=0, **ELSEWHERE[which])
    found = compute_influence(large.model, large.domains, large.references, config, 0)
    present = {name: np.count_nonzero(domain.counts) for name, domain in large.domains.items()}
    few = {name: max(LEAST_SEQUENCES, int(np.ceil(0.1 * count))) for name, count in present.items()}
    assert all(few[name] < count for name, count in present.items())
    assert found.factor_sequences == (present if which == "the diagonal" else few)
    assert found.eigenvalue_sequences == (few if which == "K-FAC" else present)
    assert found.sketch_fraction == 1.0


# As many as it takes


def test_contributions_are_the_variance_of_the_fixed_form():
    """Against errors drawn from the covariances: 40,000 draws know a variance to 1.5% (two standard errors)."""
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(3, 2, 2))
    covariance = roots @ roots.transpose(0, 2, 1)
    shares, weights = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.4])
    parts = contributions(covariance, shares, weights)
    for domain in range(3):
        errors = np.zeros((40_000, 3))
        errors[:, domain] = rng.normal(size=(40_000, 2)) @ roots[domain].T @ weights
        fixed = errors - shares * errors.sum(1, keepdims=True)
        assert parts[domain] == pytest.approx((fixed**2).sum(1).mean(), rel=0.03)


def test_domains_with_large_errors_get_more():
    allowed = DIRECTION_ERROR**2
    assert more_sequences([10, 10], [100, 100], np.array([0.4, 0.5]) * allowed) is None
    assert more_sequences([10, 10], [100, 100], np.array([1.0, 0.1]) * allowed) == [20, 10]
    assert more_sequences([10, 10], [100, 25], np.array([9.0, 9.0]) * allowed) == [10 * LARGEST_STEP, 25]
    assert more_sequences([100, 25], [100, 25], np.array([9.0, 9.0]) * allowed) is None


@pytest.fixture(scope="module")
def large():
    return make_world(count=400)


def test_auto_ends_with_all_sequences_if_it_must(large, monkeypatch):
    """Then it is the whole computation, with no sampling error left."""
    monkeypatch.setattr(adaptive, "DIRECTION_ERROR", 0.0)
    monkeypatch.setattr("ideal.influence.engine.DIRECTION_ERROR", 0.0)
    found, expected = influence(large, sample_fraction="auto"), influence(large)
    assert found.sequences == found.factor_sequences == found.eigenvalue_sequences == expected.sequences
    assert difference(found.matrix, expected.matrix) < EXACT
    assert np.abs(found.training_covariance).max() == 0


def test_auto_is_content_with_few_sequences_where_they_agree(large, capsys, monkeypatch):
    """Domains whose rows are all alike need no more than the least; a scattered one gets more."""
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 8)
    alike = {
        name: DomainSample(type(domain.examples)([domain.examples[0]] * 300), np.ones(300, dtype=int))
        for name, domain in large.domains.items()
    }
    world = World(large.model, {**alike, "noise": large.domains["noise"]}, large.references)
    found = influence(world, sample_fraction="auto")
    assert found.sequences["up"] == found.sequences["down"] == 64 < found.sequences["noise"]
    said = [line for line in capsys.readouterr().out.splitlines() if "relative error" in line]
    assert f"{sum(found.sequences.values()):,} of" in said[-1]


@pytest.mark.parametrize("error_sequences", [0, 32])
def test_auto_scores_every_sequence_once_along_its_last_direction(large, monkeypatch, error_sequences):
    """Against scores taken once more: after the curvature has been estimated anew, none along an earlier V is left,
    and sequences that came first are not counted again with those that came later."""
    original, seen = engine._Engine._until_certain, []

    def compared(self, part, references, directions):
        last = original(self, part, references, directions)
        again = [
            self._sample(sample.sequences, pool, len(self.reference))
            for sample, pool in zip(self.training_samples, self.pools, strict=True)
        ]
        self._score("again", part, again, last, "")
        for sample, expected in zip(self.training_samples, again, strict=True):
            torch.testing.assert_close(sample.scores, expected.scores, rtol=1e-9, atol=1e-12)
        seen.append([how_many(sets) for sets in (self.selection.factors, self.selection.training)])
        return last

    monkeypatch.setattr(engine._Engine, "_until_certain", compared)
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 8)
    influence(large, sample_fraction="auto", error_sequences=error_sequences)
    least = 3 * LEAST_SEQUENCES
    assert min(seen[0]) > least, "both the curvature's and the gradients' sequences must have grown"


def test_auto_is_as_certain_as_it_says(large):
    """Over ten seeds, alpha's error against the whole computation is near what is promised."""
    whole = influence(large)

    def alpha(found):
        return (found.matrix - found.shares * found.matrix.sum(1, keepdims=True)).mean(0)

    errors, used = [], []
    for seed in range(10):
        found = influence(large, seed=seed, sample_fraction="auto")
        errors.append(np.linalg.norm(alpha(found) - alpha(whole)) / np.linalg.norm(alpha(whole)))
        used.append(sum(found.sequences.values()))
    # Two sources of at most 0.1 each; the root mean square over ten seeds scatters by about a quarter.
    assert np.sqrt(np.mean(np.square(errors))) < 0.1 * np.sqrt(2) * 1.5
    assert np.mean(used) < sum(whole.sequences.values())


# Fewer layers


def test_kept_layers_are_those_of_least_eigenvalue_variance():
    world = make_world(layers=2)
    dense = ekfac_dense(world)
    variances = {name: float(torch.linalg.eigvalsh(matrix).var()) for name, matrix in dense.items()}
    whole, found = influence(world), influence(world, keep_layers=0.5)
    dropped = set(sorted(variances, key=lambda name: variances[name])[3:])
    assert set(found.dropped_layers) == dropped
    kept = {name: matrix for name, matrix in dense.items() if name not in dropped}
    assert difference(found.matrix, explicit_matrix(world, kept)) < EXACT
    assert set(found.layers) == set(kept)
    # gate and up share their input's basis, also when one of them is dropped alone.
    for fraction in (0.2, 0.7, 0.9):
        found = influence(world, keep_layers=fraction)
        parts = [part for name, part in whole.layers.items() if name not in found.dropped_layers]
        assert difference(found.matrix, np.sum(parts, axis=0)) < EXACT


# The joint solver


def joint_matrix(world, names, damping):
    """M with the dense joint Gauss-Newton matrix of these layers, each layer's damping on its diagonal."""
    tokens = total_tokens(world)
    weights = {name: weights_of(world.model)[name] for name in names}
    H = torch.zeros(sum(w.numel() for w in weights.values()), dtype=torch.float64).diag()
    for domain in world.domains.values():
        for row, count in counted(domain):
            if not count:
                continue
            ids, labels = padded([row])
            logits = world.model(input_ids=ids).logits[0, :-1][labels[0, 1:] != -100]
            eye = torch.eye(logits.numel(), dtype=torch.float64).view(-1, *logits.shape)
            jacobians = torch.autograd.grad(logits, list(weights.values()), eye, is_grads_batched=True)
            J = torch.cat([jacobian.flatten(1) for jacobian in jacobians], dim=1)
            H += count * logit_curvature(logits, J) / sum(tokens.values())
    D = torch.cat([torch.full((w.numel(),), damping[name], dtype=torch.float64) for name, w in weights.items()])
    reference, domain = mean_gradients(world)
    joined = [torch.cat([found[name].flatten(1) for name in names], dim=1) for found in (reference, domain)]
    shares = np.array(list(tokens.values())) / sum(tokens.values())
    return -shares * (joined[0] @ torch.linalg.solve(H + D.diag(), joined[1].T)).numpy()


def test_joint_solver_is_the_dense_joint_inverse(world, monkeypatch):
    """Also what the engine hands over: sequences, weights, total, right-hand sides, damping."""
    monkeypatch.setattr("ideal.influence.engine.JOINT_RESIDUAL", 1e-9)
    names = [name for name in weights_of(world.model) if "down" in name or "up" in name]
    options = {"layers": ["*.up_proj", "*.down_proj"]}
    found = influence(world, solver="cg", solver_iterations=2000, batch_size=100, **options)
    damping = {name: 0.1 * float(matrix.trace()) / len(matrix) for name, matrix in ekfac_dense(world).items()}
    assert difference(found.matrix, joint_matrix(world, names, damping)) < 1e-6
    assert difference(found.matrix, influence(world, **options).matrix) > 0.05
    assert found.solver["iterations"] == len(found.solver["residuals"]) > 20


def test_a_joint_system_that_is_not_solved_says_so(world, capsys):
    """With what helps; a solved one does not, and the residual said is the largest one."""
    largest = max(influence(world, solver="cg", solver_iterations=1, error_sequences=0).solver["residuals"][-1])
    said = capsys.readouterr().out
    assert largest > 0.1 and f"ended after 1 iterations with a residual of {largest:.2f} (near or above 1" in said
    assert all(f"influence.{key}" in said for key in ("solver_iterations", "damping", "factor_fraction"))
    influence(world, solver="cg", solver_iterations=200, error_sequences=0)
    assert "residual" not in capsys.readouterr().out


# Nothing to work on


def test_layers_that_never_run_are_refused(world, monkeypatch):
    """Such as adapters that were merged or disabled: a matrix of zeros would look like an answer."""
    mlp = world.model.model.layers[0].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: x)
    with pytest.raises(UserError, match="none of the 3 tracked layers takes part"):
        influence(world)


def test_no_reference_set_is_refused(world):
    with pytest.raises(UserError, match="there is no reference set"):
        influence(World(world.model, world.domains, {}))
