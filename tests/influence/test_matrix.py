"""The matrix's forms, its sampling errors, and its sign against retraining a convex model exactly."""

import numpy as np
import pytest
import torch

from ideal.influence import fixed_form, objective
from ideal.influence.matrix import (
    NORMAL_95,
    Errors,
    matrix_errors,
    objective_errors,
    ratio_covariance,
    uncertain_signs,
)


def test_fixed_form_ignores_the_volume():
    rng = np.random.default_rng(0)
    matrix, shares = rng.normal(size=(3, 4)), rng.dirichlet(np.ones(4))
    fixed = fixed_form(matrix, shares)
    np.testing.assert_allclose(fixed.sum(axis=1), 0, atol=1e-14)
    np.testing.assert_allclose(fixed[1, 2], matrix[1, 2] - shares[2] * sum(matrix[1]))
    np.testing.assert_allclose(fixed_form(matrix + 5 * shares, shares), fixed)
    weights = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(objective(fixed, weights), fixed_form(objective(matrix, weights), shares))


def lengths_and_scores(rng, count, directions=2):
    """Trained tokens as uneven as in real data (log-normal), and scores with tails (Student's t, 4 degrees)."""
    tokens = np.ceil(np.exp(rng.normal(3, 0.7, size=count)))
    truth = np.arange(1.0, directions + 1)
    return tokens, tokens[:, None] * (truth + rng.standard_t(4, size=(count, directions)))


@pytest.mark.parametrize("population", [None, 99], ids=["unlimited", "finite"])
@pytest.mark.parametrize("scored", [33, 20], ids=["all scored", "part scored"])
def test_ratio_intervals_cover(population, scored):
    """33 sequences, 4000 draws: 95% intervals cover 90 to 98 times in 100, their width is within 10%.

    Against the spread of the ratios themselves, known to 1 / sqrt(2 x 4000) = 1.1%.
    """
    rng = np.random.default_rng(1)
    tokens, values = lengths_and_scores(rng, population or 20000)
    truth = values.sum(0) / tokens.sum()
    ratios, errors = [], []
    for _ in range(4000):
        drawn = rng.choice(len(tokens), size=33, replace=False)
        ratio = values[drawn].sum(0) / tokens[drawn].sum()
        known = drawn[:scored]
        covariance = ratio_covariance(values[known], tokens[known], ratio, used=33, population=population)
        ratios.append(ratio)
        errors.append(np.sqrt(np.diag(covariance)))
    covered = np.mean(np.abs(np.array(ratios) - truth) <= NORMAL_95 * np.array(errors), axis=0)
    assert ((covered >= 0.90) & (covered <= 0.98)).all(), covered
    np.testing.assert_allclose(np.mean(errors, axis=0), np.std(ratios, axis=0), rtol=0.1)


def test_ratio_covariance_between_directions():
    """The covariance of two ratios of the same draws, 4000 times; a correlation known to 0.016."""
    rng = np.random.default_rng(2)
    tokens, values = lengths_and_scores(rng, 400)
    values[:, 1] += 0.8 * values[:, 0]
    ratios, claimed = [], []
    for _ in range(4000):
        drawn = rng.choice(400, size=60, replace=False)
        ratios.append(values[drawn].sum(0) / tokens[drawn].sum())
        claimed.append(ratio_covariance(values[drawn], tokens[drawn], ratios[-1], used=60, population=400))
    expected, found = np.cov(np.transpose(ratios)), np.mean(claimed, axis=0)
    correlation = expected[0, 1] / np.sqrt(expected[0, 0] * expected[1, 1])
    assert correlation > 0.5
    assert found[0, 1] / np.sqrt(found[0, 0] * found[1, 1]) == pytest.approx(correlation, abs=0.05)
    np.testing.assert_allclose(found, found.T)


def test_ratio_covariance_by_hand():
    """Each sequence against the ratio of the others: y - t x (the others' y) / (the others' t)."""
    tokens, values = np.array([1.0, 2.0, 5.0]), np.array([[3.0], [1.0], [2.0]])
    left_out = [3 - 1 * 3 / 7, 1 - 2 * 5 / 6, 2 - 5 * 4 / 3]
    expected = (1 - 3 / 10) * np.var(left_out, ddof=1) / (3 * (8 / 3) ** 2)
    found = ratio_covariance(values, tokens, [6 / 8], used=3, population=10)
    np.testing.assert_allclose(found, [[expected]], rtol=1e-12)
    # With equal lengths: a mean's variance, but for the m / (m - 1) of leaving one out.
    plain = ratio_covariance(values, np.ones(3), [2.0], used=3, population=None)
    np.testing.assert_allclose(plain, [[np.var([3, 1, 2], ddof=1) / 3 * (3 / 2) ** 2]], rtol=1e-12)


def test_ratio_covariance_without_doubt_or_without_data():
    none = np.zeros((0, 2)), np.zeros(0), [1.0, 1.0]
    assert ratio_covariance(*none, used=9, population=9).tolist() == [[0, 0], [0, 0]]
    assert np.isnan(ratio_covariance(*none, used=9, population=20)).all()
    assert np.isnan(ratio_covariance(np.ones((1, 2)), [1.0], [1.0, 1.0], used=1, population=None)).all()


WEIGHTS, SHARES = np.array([0.7, 0.3]), np.array([0.5, 0.3, 0.2])


def covariances(seed=4):
    """Of a 2 x 3 matrix: for each column [3, 2, 2], for each row [2, 3, 3]."""
    rng = np.random.default_rng(seed)
    columns, rows = rng.normal(size=(3, 2, 4)), rng.normal(size=(2, 3, 5))
    return columns @ columns.mT, rows @ rows.mT


@pytest.mark.parametrize("form", ["free", "fixed"])
@pytest.mark.parametrize("source", ["training", "reference"])
def test_errors_are_the_spread_of_drawn_matrices(form, source):
    """M drawn 200,000 times with exactly these covariances; a spread is then known to 0.16%."""
    of_columns, of_rows = covariances()
    rng = np.random.default_rng(5)
    drawn = np.zeros((200_000, 2, 3))
    if source == "training":
        for j, covariance in enumerate(of_columns):
            drawn[:, :, j] = rng.multivariate_normal(np.zeros(2), covariance, size=len(drawn))
    else:
        for r, covariance in enumerate(of_rows):
            drawn[:, r] = rng.multivariate_normal(np.zeros(3), covariance, size=len(drawn))
    shares = SHARES if form == "fixed" else None
    if form == "fixed":
        drawn = fixed_form(drawn, SHARES)
    of_matrix = matrix_errors(of_columns, of_rows, shares)
    of_alpha = objective_errors(of_columns, of_rows, WEIGHTS, shares)
    np.testing.assert_allclose(getattr(of_matrix, source), drawn.std(axis=0), rtol=0.01)
    alphas = np.einsum("r,drj->dj", WEIGHTS, drawn)
    np.testing.assert_allclose(getattr(of_alpha, source), alphas.std(axis=0), rtol=0.01)


def test_fixed_errors_by_hand():
    """Training: a domain's own error times 1 - s_j, every other's times s_j. One capability of weight 1."""
    of_columns = np.array([[[4.0]], [[9.0]], [[0.0]]])
    of_rows = np.zeros((1, 3, 3))
    of_rows[0] = [[1, 1, 0], [1, 1, 0], [0, 0, 0]]  # the first two domains' entries err as one
    errors = objective_errors(of_columns, of_rows, [1.0], SHARES)
    expected = [np.hypot(0.5 * 2, 0.5 * 3), np.hypot(0.3 * 2, 0.7 * 3), np.hypot(0.2 * 2, 0.2 * 3)]
    np.testing.assert_allclose(errors.training, expected)
    # x (1, 1, 0) -> x (1 - 2 x 0.5, 1 - 2 x 0.3, -2 x 0.2)
    np.testing.assert_allclose(errors.reference, [0.0, 0.4, 0.4], atol=1e-15)
    np.testing.assert_allclose(errors.combined, np.hypot(expected, [0.0, 0.4, 0.4]))
    np.testing.assert_allclose(errors, np.stack(matrix_errors(of_columns, of_rows, SHARES))[:, 0])


def test_what_is_unknown_stays_unknown_and_nothing_else_does():
    of_columns, of_rows = covariances()
    of_columns[1], of_rows[0] = np.nan, np.nan
    free = matrix_errors(of_columns, of_rows)
    assert np.isnan(free.training).tolist() == [[False, True, False]] * 2
    assert np.isnan(free.reference).tolist() == [[True] * 3, [False] * 3]
    assert np.isnan(free.combined[0]).all() and np.isnan(free.combined).sum() == 4
    # In the fixed form every entry depends on every domain, but for a domain without tokens ...
    shares = np.array([0.6, 0.4, 0.0])
    fixed = matrix_errors(of_columns, of_rows, shares)
    assert np.isnan(fixed.training).tolist() == [[True, True, False]] * 2
    np.testing.assert_allclose(fixed.training[:, 2], free.training[:, 2])
    # ... and the objective on every capability, but for one of weight zero.
    assert np.isnan(objective_errors(of_columns, of_rows, [0.5, 0.5]).reference).all()
    alone = objective_errors(of_columns, of_rows, [0.0, 1.0])
    np.testing.assert_allclose(alone.reference, free.reference[1])
    assert np.isnan(alone.training).tolist() == [False, True, False]


def test_signs_are_uncertain_within_the_interval_or_without_one():
    errors = Errors(np.array([0.3, 0.3, np.nan, 0.0]), np.array([0.4, 0.4, 0.1, 0.0]))
    assert uncertain_signs([0.97, -0.99, 5.0, -1e-9], errors).tolist() == [True, False, True, False]


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
        fit = sum(v * s * self.loss(theta, d) for v, s, d in zip(volumes, self.shares, self.domains, strict=True))
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
        return sum(w * float(problem.loss(theta, d)) for w, d in zip(weights, problem.references, strict=True))

    measured = [(q(step * unit) - q(-step * unit)) / (2 * step) for unit in np.eye(3)]
    matrix = problem.matrix()
    predicted = objective(matrix if form == "free" else fixed_form(matrix, problem.shares), weights)
    np.testing.assert_allclose(predicted, measured, atol=1e-7)
    assert np.abs(predicted).min() > 1e-4
