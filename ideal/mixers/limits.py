"""What a mixture may be: the least and the largest ratio of every domain, and shares brought within them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Limits:
    """least, most: [n] ratios (size / pool); 0 and inf where there is none, both 0 for a domain that stays out.

    Sizes keep to them as rounded to whole examples.
    """

    least: np.ndarray
    most: np.ndarray

    def sizes(self, pool_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] the least and [n] the most examples, halves rounded up as sizes are. pool_sizes: [n]."""
        return np.floor(self.least * pool_sizes + 0.5), np.floor(self.most * pool_sizes + 0.5)


def hold_total(amounts: np.ndarray, least: np.ndarray, most: np.ndarray, total: float) -> np.ndarray:
    """[n] amounts within limits that add up to `total`, in the proportions of `amounts` where no limit binds.

    clip(f amounts, least, most) with the one factor f that gives the total: of all that keep to the limits this is
    the nearest to `amounts` in Kullback-Leibler divergence (its stationarity condition is that form). The sum is
    piecewise linear in f with kinks where a domain meets a limit, so f is exact. What the domains with an amount
    cannot hold goes to those without, evenly. A total that the limits do not allow counts as the nearest that they
    do: realised mixtures are off by their rounding to examples.

    Args:
        amounts: [n], 0 or more, not all 0. least, most: [n], 0 <= least <= most, most may be inf. total: above 0.
    """
    total = float(np.clip(total, least.sum(), most.sum()))
    some = amounts > 0
    if most[some].sum() + least[~some].sum() < total:
        full = np.where(some, most, 0.0)
        full[~some] = hold_total(np.ones((~some).sum()), least[~some], most[~some], total - full.sum())
        return full
    unit = np.where(some, amounts, 1.0)
    enters, leaves = least / unit, most / unit
    kinks = np.unique(np.concatenate([[0.0], enters[some], leaves[some & np.isfinite(most)]]))
    sums = np.array([np.clip(factor * amounts, least, most).sum() for factor in kinks])
    before = int(np.searchsorted(sums, total, side="right")) - 1
    slope = amounts[some & (enters <= kinks[before]) & (kinks[before] < leaves)].sum()
    factor = kinks[before] + ((total - sums[before]) / slope if slope else 0.0)
    return np.clip(factor * amounts, least, most)


@dataclass(frozen=True)
class Demands:
    """What the next mixture must keep to, for n domains and R capabilities.

    least, most: [n] ratios. ceilings: [R] L_r at most, noise included; inf where there is none. largest_total: trained
    tokens at most; inf without a cap.
    """

    least: np.ndarray
    most: np.ndarray
    ceilings: np.ndarray
    largest_total: float
