"""The influence matrix as numbers: its fixed-volume form, objectives on it, its sampling error.

Pure numpy in float64. Letters: R capabilities, n domains, m sequences, K directions.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


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


def ratio_error(
    values: ArrayLike,
    tokens: ArrayLike,
    ratio: ArrayLike,
    mean_tokens: float,
    used: int,
    population: int | None,
) -> Array:
    """Standard error of a ratio estimator sum_i y_i / sum_i t_i over randomly drawn sequences.

    With residuals e_i = y_i - ratio t_i, the linearised variance (Cochran, Sampling Techniques,
    1977, section 6.4) is (1 - f) var(e) / (used mean_tokens^2), var with m - 1 in the denominator.
    f = used / population where the sequences were drawn without replacement from a finite
    population, and 0 where they stand for an unlimited one.

    Args:
        values: [m, K], y_i of the m sequences that var(e) is estimated on.
        tokens: [m], their t_i.
        ratio: [K], the estimates.
        mean_tokens: mean t_i of all sequences used.
        used: number of sequences in the estimate (m or more).
        population: number of sequences they were drawn from; None: unlimited.

    Returns:
        [K]; nan where fewer than two sequences are known, unless the population was used whole.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = 1.0 if population is None else 1.0 - used / population
    if finite == 0.0:
        return np.zeros(values.shape[1])
    if len(values) < 2:
        return np.full(values.shape[1], np.nan)
    residuals = values - np.outer(np.asarray(tokens, dtype=np.float64), np.asarray(ratio, dtype=np.float64))
    return np.sqrt(finite * residuals.var(axis=0, ddof=1) / used) / mean_tokens
