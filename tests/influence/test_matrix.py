"""The matrix's forms, its sampling error, and its sign against retraining a convex model exactly."""

import numpy as np
import pytest
import torch

from ideal.influence import fixed_form, objective
from ideal.influence.matrix import ratio_error


def test_fixed_form_ignores_the_volume():
    rng = np.random.default_rng(0)
    matrix, shares = rng.normal(size=(3, 4)), rng.dirichlet(np.ones(4))
    fixed = fixed_form(matrix, shares)
    np.testing.assert_allclose(fixed.sum(axis=1), 0, atol=1e-14)
    np.testing.assert_allclose(fixed[1, 2], matrix[1, 2] - shares[2] * sum(matrix[1]))
    np.testing.assert_allclose(fixed_form(matrix + 5 * shares, shares), fixed)
    weights = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(objective(fixed, weights), fixed_form(objective(matrix, weights), shares))


@pytest.mark.parametrize("population", [None, 120])
def test_ratio_error_is_the_spread_of_the_ratio(population):
    """Against 4000 draws: their own spread is known to 1 / sqrt(2 x 4000) = 1.1%, five of these allowed.

    The formula itself is linearised and noisy at 60 sequences: its mean is off by a few per cent.
    """
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, 20, size=120).astype(float)
    values = tokens[:, None] * rng.normal([1.0, -2.0], 0.3, size=(120, 2)) + rng.normal(size=(120, 2))
    ratios, errors = [], []
    for _ in range(4000):
        drawn = rng.choice(120, size=60, replace=population is None)
        ratio = values[drawn].sum(0) / tokens[drawn].sum()
        ratios.append(ratio)
        errors.append(ratio_error(values[drawn], tokens[drawn], ratio, tokens[drawn].mean(), 60, population))
    np.testing.assert_allclose(np.mean(errors, axis=0), np.std(ratios, axis=0), rtol=0.055 + 0.03)


def test_ratio_error_without_doubt_or_without_data():
    assert ratio_error(np.ones((1, 2)), [1.0], [1.0, 1.0], 1.0, used=9, population=9).tolist() == [0, 0]
    assert np.isnan(ratio_error(np.ones((1, 2)), [1.0], [1.0, 1.0], 1.0, used=1, population=None)).all()


class Softmax:
    """Softmax regression on three domains with a quadratic proximal term: exact argmin, exact Hessian."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.classes, self.features = 3, 4
        truth = rng.normal(size=(3, self.features, self.classes))
        self.domains = [self.draw(rng, truth[j], 30 + 20 * j) for j in range(3)]
        self.references = [self.draw(rng, truth[r] + 0.3 * truth[(r + 1) % 3], 25) for r in range(2)]
        tokens = np.array([len(y) for _, y in self.domains])
        self.shares = tokens / tokens.sum()
        self.start = torch.zeros(self.features * self.classes, dtype=torch.float64)
        scale = rng.uniform(0.05, 0.2, size=len(self.start))
        self.damping = torch.diag(torch.tensor(scale))

    def draw(self, rng, truth, count):
        x = rng.normal(size=(count, self.features))
        y = (x @ truth + rng.gumbel(size=(count, self.classes))).argmax(1)
        return torch.tensor(x), torch.tensor(y)

    def loss(self, theta, data):
        x, y = data
        return torch.nn.functional.cross_entropy(x @ theta.view(self.features, self.classes), y)

    def inner(self, theta, volumes):
        fit = sum(
            v * s * self.loss(theta, d) for v, s, d in zip(volumes, self.shares, self.domains, strict=True)
        )
        return fit + 0.5 * (theta - self.start) @ self.damping @ (theta - self.start)

    def argmin(self, volumes):
        theta = self.start.clone()
        for _ in range(50):
            gradient = torch.func.grad(self.inner)(theta, volumes)
            if gradient.norm() < 1e-13:
                break
            theta = theta - torch.linalg.solve(torch.func.hessian(self.inner)(theta, volumes), gradient)
        assert gradient.norm() < 1e-12
        return theta

    def matrix(self):
        """M[r, j] = - s_j g_r^T (H + D)^-1 g_j with the exact Hessian (here equal to Gauss-Newton)."""
        theta = self.argmin(np.ones(3))
        curvature = torch.func.hessian(self.inner)(theta, np.ones(3))
        g = torch.stack([torch.func.grad(self.loss)(theta, data) for data in self.domains])
        g_ref = torch.stack([torch.func.grad(self.loss)(theta, data) for data in self.references])
        return -self.shares * (g_ref @ torch.linalg.solve(curvature, g.T)).numpy()


@pytest.mark.parametrize("form", ["free", "fixed"])
def test_derivative_of_the_true_argmin(form):
    """dQ / dbeta_j by central differences: error of order step^2 (1e-8) and rounding / step (1e-9)."""
    problem, weights, step = Softmax(), np.array([0.7, 0.3]), 1e-4

    def q(beta):
        volumes = 1 + beta
        if form == "fixed":
            volumes = volumes / (problem.shares @ volumes)
        theta = problem.argmin(volumes)
        return sum(
            w * float(problem.loss(theta, d)) for w, d in zip(weights, problem.references, strict=True)
        )

    measured = [(q(step * unit) - q(-step * unit)) / (2 * step) for unit in np.eye(3)]
    matrix = problem.matrix()
    predicted = objective(matrix if form == "free" else fixed_form(matrix, problem.shares), weights)
    np.testing.assert_allclose(predicted, measured, atol=1e-7)
    assert np.abs(predicted).min() > 1e-4
