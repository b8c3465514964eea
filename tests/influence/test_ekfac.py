"""The pure functions against Kronecker products that are built and inverted as they are."""

import math

import numpy as np
import pytest
import torch

from ideal.influence.ekfac import (
    Curvature,
    damping_of,
    eigenbasis,
    kfac_eigenvalues,
    overlaps,
    without_basis_noise,
    without_noise,
)

OUT, IN, POSITIONS, TOKENS = 5, 7, 30.0, 11.0


def covariance(size: int, seed: int) -> torch.Tensor:
    samples = torch.randn(40, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return samples.T @ samples / 40


@pytest.fixture
def factors():
    return covariance(OUT, 1), covariance(IN, 2)


def test_kfac_inverse_is_that_of_the_kronecker_product(factors):
    S, A = factors
    V = torch.randn(3, OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (values_O, basis_O), (values_I, basis_I) = eigenbasis(S), eigenbasis(A)
    eigenvalues = kfac_eigenvalues(values_O, values_I, POSITIONS, TOKENS)
    found = Curvature(basis_O, basis_I, eigenvalues + damping_of(eigenvalues, 0.1)).solve(V)

    hessian = POSITIONS / TOKENS * torch.kron(S, A)
    inverse = torch.linalg.inv(
        hessian + 0.1 * hessian.diagonal().mean() * torch.eye(OUT * IN, dtype=torch.float64)
    )
    torch.testing.assert_close(found.flatten(1), V.flatten(1) @ inverse.T, rtol=1e-11, atol=1e-11)


def test_corrected_inverse_is_that_of_the_explicit_matrix(factors):
    S, A = factors
    generator = torch.Generator().manual_seed(4)
    eigenvalues = torch.rand(OUT, IN, dtype=torch.float64, generator=generator)
    V = torch.randn(2, OUT, IN, dtype=torch.float64, generator=generator)
    basis_O, basis_I = eigenbasis(S)[1], eigenbasis(A)[1]
    found = Curvature(basis_O, basis_I, eigenvalues + damping_of(eigenvalues, 0.3)).solve(V)

    basis = torch.kron(basis_O, basis_I)
    hessian = basis @ torch.diag(eigenvalues.flatten()) @ basis.T
    inverse = torch.linalg.inv(hessian + 0.3 * eigenvalues.mean() * torch.eye(OUT * IN, dtype=torch.float64))
    torch.testing.assert_close(found.flatten(1), V.flatten(1) @ inverse.T, rtol=1e-11, atol=1e-11)


def test_noise_does_not_enlarge_the_damped_inverse():
    """Squares of 200 normal numbers, 20,000 times: 1 / (Lambda + D) is known to 1e-3 (noise of 0.1 / sqrt(20,000)).

    A variance of 2 / 200 enlarges it by up to 1%, and terms of third order are a tenth of that.
    """
    squares = torch.randn(20_000, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).square()
    halves = squares[:, ::2].sum(1), squares[:, 1::2].sum(1)
    eigenvalues, variances = sum(halves) / 200, (halves[0] - halves[1]).square() / 200**2
    for damping in torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64):
        exact = 1 / (1 + damping)
        plain = (1 / (eigenvalues + damping)).mean() / exact - 1
        corrected = (1 / (without_noise(eigenvalues, variances, damping) + damping)).mean() / exact - 1
        assert plain > 0.8 * 0.01 * exact**2 and abs(corrected) < 0.2 * plain
    assert (without_noise(torch.zeros(3), torch.zeros(3), torch.tensor(0.0)) == 0).all()


def noisy(values, samples, draws, seed):
    """Covariances of normal samples: theta is 1 / samples, and the exact eigenvectors are the unit vectors.

    They are drawn as L L^T with Bartlett's triangular L: normal numbers under roots of chi-square ones.
    """
    draw, size = np.random.default_rng(seed), len(values)
    L = np.tril(draw.standard_normal((draws, size, size)), -1)
    L[:, range(size), range(size)] = np.sqrt(draw.chisquare(samples - np.arange(size), (draws, size)))
    half = values.sqrt()[:, None] * torch.from_numpy(L)
    return torch.linalg.eigh(half @ half.mT / samples)


def test_overlaps_of_distant_eigenvalues():
    """20 eigenvalues from 1 to 100, 2,000 samples, 4,000 draws.

    Of a normal draw's square the standard error is sqrt(2 / 4,000). To second order 1 / distance^2 grows by three times
    the variance of the distance, 4 theta, over its square: by 0.10 for neighbours (0.24 apart) and 0.01 for the third;
    and all lose what the others of their row have, 0.04.
    """
    values = torch.logspace(0, 2, 20, dtype=torch.float64)
    _, vectors = noisy(values, 2000, 4000, 0)
    found, drawn = overlaps(values, 1 / 2000), vectors.square().mean(0).mT
    assert bool((found.sum(1).abs() < 1e-15).all())
    apart = (torch.arange(20)[:, None] - torch.arange(20)).abs()
    for least, within in ((1, 0.14), (3, 0.05)):
        ratio = (drawn / found)[apart >= least]
        assert bool(((ratio - 1).abs() < within + 5 * math.sqrt(2 / 4000)).all())


def test_overlaps_of_a_dense_spectrum():
    """What 100 eigenvalues between 1 and 10 become in bases of 1,000 samples, where neighbours mix completely."""
    values = torch.logspace(0, 1, 100, dtype=torch.float64)
    _, vectors = noisy(values, 1000, 200, 1)
    for function in (values, 1 / values):
        drawn = (vectors.square().mT @ function).mean(0) - function
        found = overlaps(values, 1 / 1000) @ function
        # First order in theta k = 0.1.
        assert float((found - drawn).norm()) < 0.2 * float(drawn.norm())


@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("rough", "left"), [(0.0, 0.2), (0.5, 1.0)])
def test_noise_of_bases_does_not_change_the_inverse(damping, rough, left):
    """S (x) A of 40 x 30 with bases from 12 samples per dimension, 60 draws, gradients of two spectra.

    The first order (theta k = 0.08 and 0.06) is taken out, and a fifth of it may be left of higher ones. Where
    Lambda is not the smooth Kronecker product that noise is thought to act on, it is at least no worse than without.
    """
    rng = torch.Generator().manual_seed(3)
    outputs, inputs = torch.logspace(0, 3, 40, dtype=torch.float64), torch.logspace(0, 2.5, 30, dtype=torch.float64)
    eigenvalues = torch.outer(outputs, inputs) * (rough * torch.randn(40, 30, dtype=torch.float64, generator=rng)).exp()
    D = damping_of(eigenvalues, damping)
    of_outputs, of_inputs = noisy(outputs, 480, 60, 4), noisy(inputs, 480, 60, 5)
    spread = of_outputs[1].square().mT, of_inputs[1].square()
    seen = spread[0] @ eigenvalues @ spread[1]
    for power in (1.0, 1.5):
        squares = eigenvalues**power
        exact = (squares / (eigenvalues + D)).sum()
        met = spread[0] @ squares @ spread[1]
        plain = float((met / (seen + D)).sum((1, 2)).mean() / exact) - 1
        better = [
            (one / (without_basis_noise(found, D, values_O, values_I, 1 / 480) + D)).sum()
            for one, found, values_O, values_I in zip(met, seen, of_outputs[0], of_inputs[0], strict=True)
        ]
        assert plain > 0.01 and abs(float(torch.stack(better).mean() / exact) - 1) < left * plain


def test_a_layer_without_curvature_keeps_none():
    nothing = torch.zeros(3, 2), torch.tensor(0.0), torch.zeros(3, dtype=torch.float64), torch.zeros(2)
    assert bool((without_basis_noise(*nothing, 0.01) == 0).all())


def test_eigenbasis_diagonalises_and_keeps_the_data_type(factors):
    S, _ = factors
    skewed = S + torch.triu(torch.full_like(S, 1e-9), 1)
    values, vectors = eigenbasis(skewed)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, (skewed + skewed.T) / 2)
    values, vectors = eigenbasis(S.float())
    assert values.dtype == torch.float64 and vectors.dtype == torch.float32


def test_rank_deficient_factor_has_no_negative_eigenvalue():
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert eigenbasis(x.T @ x)[0].min() >= 0


def test_without_curvature_the_inverse_is_zero_and_not_nan():
    curvature = Curvature(None, None, torch.zeros(OUT, IN))
    assert torch.equal(curvature.solve(torch.zeros(2, OUT, IN)), torch.zeros(2, OUT, IN))


def test_identity_changes_nothing():
    V = torch.randn(2, OUT, IN)
    assert torch.equal(Curvature(None, None, None).solve(V), V)
