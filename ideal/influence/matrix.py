"""The influence matrix as numbers: its fixed-volume form, objectives on it, its sampling errors.

Pure numpy in float64. Letters: R capabilities, n domains, m sequences, K directions.

M[r, j] is uncertain for two reasons that have nothing to do with each other: which training sequences
of domain j were sampled (C_j [R, R], the covariance of column j; domains are drawn independently), and
which rows the reference set of r holds (C_r [n, n], the covariance of row r; capabilities are
independent). Everything below is linear in M, so that its variances follow exactly. The factors are
taken as known: what their own sampling adds is not in the errors.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

NORMAL_95 = 1.96
"""Standard errors on either side of an estimate that hold 95% of a normal distribution."""


class Errors(NamedTuple):
    """Standard errors of the same numbers, by where they come from; nan where unknown."""

    training: Array
    """From the sampling of training sequences out of the mixture; 0 where the mixture was used whole."""
    reference: Array
    """From the sampling of reference rows out of everything the capability could be measured on."""

    @property
    def combined(self) -> Array:
        """Both together: independent, so in quadrature."""
        return np.hypot(self.training, self.reference)


def fixed_form(matrix: ArrayLike, shares: ArrayLike) -> Array:
    """The derivative when the mixture's trained tokens are renormalised to their old total.

    M_fixed[r, j] = M[r, j] - s_j sum_k M[r, k], so every row sums to zero: growing all domains
    alike changes nothing.

    Args:
        matrix: [R, n] or [n], free form: dL_r / dbeta_j.
        shares: [n], the domains' shares of the trained tokens; sum 1.
    """
    matrix, shares = np.asarray(matrix, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    return matrix - shares * matrix.sum(axis=-1, keepdims=True)


def objective(matrix: ArrayLike, weights: ArrayLike) -> Array:
    """alpha_j = dQ / dbeta_j = sum_r w_r M[r, j].

    Args:
        matrix: [R, n], free or fixed form.
        weights: [R], the capabilities' weights in Q.

    Returns:
        [n]
    """
    return np.asarray(weights, dtype=np.float64) @ np.asarray(matrix, dtype=np.float64)


def ratio_covariance(
    values: ArrayLike, tokens: ArrayLike, ratio: ArrayLike, used: int, population: int | None
) -> Array:
    """Covariance of the ratio estimators sum_i y_i / sum_i t_i over randomly drawn sequences.

    Cochran, Sampling Techniques (1977), sections 6.4 and 6.13 (linearised variance), with each residual
    taken against the ratio of the other sequences, as in a jackknife (section 6.17):

        (1 - f) cov(e) / (used t^2),    e_i = (y_i - ratio t_i) / (1 - t_i / sum_k t_k),    t = mean t_i

    cov with m - 1 in the denominator. The plain residual makes the errors too small by a fifth where 33
    sequences differ in length as sequences do: the longest ones pull the ratio towards themselves.
    f = used / population where the sequences were drawn without replacement from a finite population,
    and 0 where they stand for an unlimited one.

    Args:
        values: [m, K], y_i of the sequences that cov(e) is estimated on.
        tokens: [m], their t_i, positive.
        ratio: [K], the estimates, from all sequences used.
        used: number of sequences in the estimates (m or more).
        population: number of sequences they were drawn from; None: unlimited.

    Returns:
        [K, K]; nan where fewer than two sequences are known, zero if the population was used whole.
    """
    values, tokens = np.asarray(values, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    ratio = np.asarray(ratio, dtype=np.float64)
    finite = 1.0 if population is None else 1.0 - used / population
    if finite == 0.0:
        return np.zeros((len(ratio), len(ratio)))
    if len(tokens) < 2:
        return np.full((len(ratio), len(ratio)), np.nan)
    residuals = (values - np.outer(tokens, ratio)) / (1 - tokens / tokens.sum())[:, None]
    centred = residuals - residuals.mean(axis=0)
    return finite / used * (centred.T @ centred) / (len(tokens) - 1) / tokens.mean() ** 2


def matrix_errors(
    training_covariance: ArrayLike, reference_covariance: ArrayLike, shares: ArrayLike | None = None
) -> Errors:
    """Standard errors [R, n] of M; with `shares`, of its fixed form.

    M_fixed = M F^T with F[j, k] = (j = k) - s_j. For the free form F is the identity.

        training:   var M_fixed[r, j] = sum_k F[j, k]^2 C_k[r, r]
        reference:  var M_fixed[r, j] = sum_kl F[j, k] C_r[k, l] F[j, l]

    Args:
        training_covariance: [n, R, R], of each column of M in its free form.
        reference_covariance: [R, n, n], of each row.
        shares: [n], for the fixed form.
    """
    of_columns = np.asarray(training_covariance, dtype=np.float64)
    of_rows = np.asarray(reference_covariance, dtype=np.float64)
    form = _form(len(of_columns), shares)
    rows = [_row_errors(form, of_columns[:, r, r], of_row) for r, of_row in enumerate(of_rows)]
    return Errors(np.stack([row.training for row in rows]), np.stack([row.reference for row in rows]))


def objective_errors(
    training_covariance: ArrayLike,
    reference_covariance: ArrayLike,
    weights: ArrayLike,
    shares: ArrayLike | None = None,
) -> Errors:
    """Standard errors [n] of alpha = w^T M; with `shares`, of its fixed form F alpha.

    A training sequence's gradient meets all capabilities' at once, so a column's entries err together;
    a reference set's gradient meets all domains', so a row's entries do:

        training:   var alpha_j = w^T C_j w,  independent between domains
        reference:  cov alpha = sum_r w_r^2 C_r

    Args:
        training_covariance: [n, R, R], of each column of M in its free form.
        reference_covariance: [R, n, n], of each row.
        weights: [R], the capabilities' weights in Q.
        shares: [n], for the fixed form.
    """
    of_columns = np.asarray(training_covariance, dtype=np.float64)
    of_rows = np.asarray(reference_covariance, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.float64)
    training = np.array([_variance(weights, of_column) for of_column in of_columns])
    counted = weights != 0
    reference = np.einsum("r,rjk->jk", weights[counted] ** 2, of_rows[counted])
    return _row_errors(_form(len(of_columns), shares), training, reference)


def uncertain_signs(values: ArrayLike, errors: Errors) -> NDArray[np.bool_]:
    """Where the 95% interval around a value holds zero, or is unknown."""
    return ~(np.abs(np.asarray(values, dtype=np.float64)) > NORMAL_95 * errors.combined)


def _form(domains: int, shares: ArrayLike | None) -> Array:
    """F [n, n], for which F @ row is a row of M in the form wanted."""
    identity = np.eye(domains)
    return identity if shares is None else identity - np.asarray(shares, dtype=np.float64)[:, None]


def _row_errors(form: Array, training: Array, reference: Array) -> Errors:
    """Errors [n] of F x, for independent variances [n] of x and a covariance [n, n] of x."""
    of_training = np.diag(training)
    variances = [[_variance(part, of) for part in form] for of in (of_training, reference)]
    # Rounding may leave a vanishing variance below zero.
    return Errors(*np.sqrt(np.maximum(variances, 0.0)))


def _variance(coefficients: Array, covariance: Array) -> float:
    """c^T C c; what has no part in the sum may be unknown."""
    used = coefficients != 0
    return float(coefficients[used] @ covariance[np.ix_(used, used)] @ coefficients[used])
