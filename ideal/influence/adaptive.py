"""How many sequences alpha needs: pure functions on its sampling error. Letters: R capabilities, n domains."""

from collections.abc import Sequence

import numpy as np

from ideal.influence.matrix import Array

DIRECTION_ERROR = 0.1
"""Relative error |error| / |alpha| of the fixed-volume alpha that `sample_fraction: auto` is content with, once from
the sampling of training sequences and once from that of the curvature's: an expected cosine of 1 - 0.1^2 = 0.99."""
LARGEST_STEP = 4
"""A domain's sequences grow by this factor at most before its error is looked at again."""


def contributions(training_covariance: Array, shares: Array, weights: Array) -> Array:
    """[n] what the sampling of each domain's sequences adds to E |error of alpha|^2, in the fixed form.

    alpha_j - s_j sum_k alpha_k: an error e_k of alpha_k alone moves entry j by (delta_jk - s_j) e_k.

    Args:
        training_covariance: [n, R, R] of M's columns in the free form.
        shares: [n] s_j.
        weights: [R] the capabilities' in Q.
    """
    variances = np.einsum("r,nrs,s->n", weights, training_covariance, weights)
    form = np.eye(len(shares)) - np.asarray(shares)[:, None]
    return np.asarray(variances * (form**2).sum(axis=0))


def more_sequences(used: Sequence[int], available: Sequence[int], parts: Array) -> list[int] | None:
    """How many sequences of each domain to use next; None if the error is small enough, or there are no more.

    A domain whose part of the squared error exceeds an even share of what is allowed grows in proportion
    to the excess, since its part falls as one over its number.

    Args:
        used: [n] sequences so far.
        available: [n] sequences that there are.
        parts: [n] `contributions` / |alpha|^2.
    """
    allowed = DIRECTION_ERROR**2
    if parts.sum() <= allowed:
        return None
    excess = np.clip(parts * len(parts) / allowed, 1, LARGEST_STEP)
    more = [min(most, int(np.ceil(count * by))) for count, most, by in zip(used, available, excess, strict=True)]
    return None if more == list(used) else more
