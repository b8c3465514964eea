"""What scripts/validate_influence.py counts with: pure functions on arrays.

Letters: S seeds, R capabilities, n domains, E estimates. A correlation is plain numpy in float64; nan where one side
does not vary.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ideal.influence import fixed_form
from ideal.mixers.surrogate import Observed, fit

Array = NDArray[np.float64]

FLAT = 1e-12
"""A spread below this part of the values' size is rounding."""


def relative_change(tokens: ArrayLike, centre: ArrayLike, domain: int) -> float:
    """beta of one domain as it came out after rounding to examples.

    Its trained tokens against the centre's, relative to all others' together: with a fixed volume those shrink as it
    grows, in the free form they stay.

    Args:
        tokens, centre: [n] trained tokens by domain.
    """
    tokens, centre = np.asarray(tokens, dtype=np.float64), np.asarray(centre, dtype=np.float64)
    others = np.arange(len(tokens)) != domain
    return float((tokens[domain] / centre[domain]) / (tokens[others].sum() / centre[others].sum()) - 1)


def central_difference(up: ArrayLike, down: ArrayLike, beta_up: float, beta_down: float) -> Array:
    """(L(beta_up) - L(beta_down)) / (beta_up - beta_down), of any shape."""
    return (np.asarray(up, dtype=np.float64) - np.asarray(down, dtype=np.float64)) / (beta_up - beta_down)


class Summary(NamedTuple):
    """Over seeds: mean, standard error sd / sqrt(S), and their ratio t; nan for one seed."""

    mean: Array
    error: Array
    t: Array


def summary(values: ArrayLike) -> Summary:
    """values: [S, ...]."""
    values = np.asarray(values, dtype=np.float64)
    mean = values.mean(axis=0)
    if len(values) < 2:
        return Summary(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return Summary(mean, error, np.divide(mean, error, out=np.full_like(mean, np.nan), where=error > 0))


def others_mean(values: ArrayLike) -> Array:
    """[S, ...] for each seed the mean over all *other* seeds (leave-one-out)."""
    values = np.asarray(values, dtype=np.float64)
    return (values.sum(axis=0) - values) / (len(values) - 1)


def pearson(left: ArrayLike, right: ArrayLike) -> float:
    """Pearson's correlation of two sets of values of any one shape."""
    pair = [np.asarray(values, dtype=np.float64).ravel() for values in (left, right)]
    centred = [values - values.mean() for values in pair]
    sizes = [float(np.linalg.norm(values)) for values in centred]
    if any(size <= FLAT * np.linalg.norm(values) for size, values in zip(sizes, pair, strict=True)):
        return float("nan")
    # Scaled first: influence matrices may be tiny, and products of tiny numbers vanish.
    return float((centred[0] / sizes[0]) @ (centred[1] / sizes[1]))


def spearman(left: ArrayLike, right: ArrayLike) -> float:
    """Spearman's rank correlation; ties share their mean rank."""
    return pearson(*(rankdata(np.asarray(values, dtype=np.float64).ravel()) for values in (left, right)))


def row_wise(left: ArrayLike, right: ArrayLike) -> float:
    """Mean over the rows of two matrices [R, n] of their Pearson correlations."""
    pairs = zip(np.asarray(left), np.asarray(right), strict=True)
    return float(np.mean([pearson(one, other) for one, other in pairs]))


def size_ratio(predicted: ArrayLike, measured: ArrayLike) -> float:
    """Slope through the origin of predicted on measured values: how many times too large predictions are."""
    predicted, measured = (np.asarray(values, dtype=np.float64).ravel() for values in (predicted, measured))
    return float(predicted @ measured / (measured @ measured))


def split_half(values: ArrayLike, correlation: Callable[[Array, Array], float] = pearson) -> float:
    """Reliability of the mean of half the seeds: the correlation of the two halves' means, over all ways to halve.

    As it is, without the Spearman-Brown correction. With an odd number the halves differ by one; nan below two seeds.

    Args:
        values: [S, ...].
    """
    values = np.asarray(values, dtype=np.float64)
    seeds = range(len(values))
    found = []
    for half in combinations(seeds, len(values) // 2):
        if not half or (len(values) % 2 == 0 and half[0] != 0):  # each way to halve once
            continue
        rest = [seed for seed in seeds if seed not in half]
        found.append(correlation(values[list(half)].mean(axis=0), values[rest].mean(axis=0)))
    return float(np.mean(found)) if found else float("nan")


def ceiling(half: float) -> float:
    """What a perfect prediction's correlation with the mean of all seeds is expected to be, from split_half.

    Spearman-Brown gives the reliability of the whole, 2 r / (1 + r); a noiseless quantity correlates with the noisy
    one by its square root. nan where the halves do not agree at all.
    """
    return float(np.sqrt(2 * half / (1 + half))) if half > 0 else float("nan")


def off_diagonal(capabilities: list[str], domains: list[str]) -> NDArray[np.bool_]:
    """[R, n] where the capability is not the domain's own, which is the one of its name."""
    return np.array([[capability != domain for domain in domains] for capability in capabilities])


def baselines(shares: ArrayLike, losses: ArrayLike, own_losses: ArrayLike) -> dict[str, Array]:
    """Predictions [R, n] in the free form that need no gradient: -L_r b_j, so that w^T M is -b up to a factor.

    Args:
        shares: [n] s_j.
        losses: [R] the centre's reference losses.
        own_losses: [n] those of the domains' own capabilities.
    """
    shares, losses, own = (np.asarray(values, dtype=np.float64) for values in (shares, losses, own_losses))
    per_domain = {
        "share x loss": shares * own,
        "loss": own,
        "1 / share": 1 / shares,
        "constant": np.ones_like(shares),
    }
    return {name: -np.outer(losses, values) for name, values in per_domain.items()}


def in_form(matrix: ArrayLike, shares: ArrayLike, volume: str) -> Array:
    """A free-form prediction [R, n] as the derivative at this volume, free or fixed."""
    return fixed_form(matrix, shares) if volume == "fixed" else np.asarray(matrix, dtype=np.float64)


def first_step(
    matrix: ArrayLike, shares: ArrayLike, losses: ArrayLike, own: Sequence[int | None], volume: str
) -> Array:
    """[R, n] what the surrogate (ideal/mixers/surrogate.py) expects after one round with this influence, in the form
    of the volume: the influence scaled and drawn towards the prior.

    Args:
        matrix: [R, n] the influence in its free form. shares: [n]. losses: [R].
        own: [R] the domain of each capability's name, None where there is none.
    """
    shares, losses = np.asarray(shares, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    slopes = in_form(matrix, shares, volume) / losses[:, None]
    seen = Observed(shares, 1.0 if volume == "free" else None, losses, slopes, np.zeros_like(slopes))
    coefficients = fit([seen], own).mean[:, 1:]
    return np.asarray(losses[:, None] * (coefficients @ seen.derivatives.T))


MEASURES = ("vector", "vector_spearman", "off_diagonal", "off_diagonal_spearman", "rows", "size")


def agreement(
    predicted: ArrayLike, measured: ArrayLike, weights: ArrayLike, off: NDArray[np.bool_]
) -> dict[str, float]:
    """How well one prediction agrees with a measured matrix, by MEASURES.

    vector: w^T M. off_diagonal: all entries that are not a domain's effect on its own capability, in nats, so that
    capabilities with large effects count for more. rows: capability by capability. size: of the vector.

    Args:
        predicted, measured: [R, n], of the same form.
        weights: [R].
        off: [R, n], from `off_diagonal`.
    """
    predicted, measured = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    vectors = np.asarray(weights) @ predicted, np.asarray(weights) @ measured
    return {
        "vector": pearson(*vectors),
        "vector_spearman": spearman(*vectors),
        "off_diagonal": pearson(predicted[off], measured[off]),
        "off_diagonal_spearman": spearman(predicted[off], measured[off]),
        "rows": row_wise(predicted, measured),
        "size": size_ratio(*vectors),
    }


def worst_mean(by_setting: Mapping[str, ArrayLike]) -> float:
    """The lowest, over settings, of an estimator's mean over seeds; an undefined correlation counts as -1."""
    return min(float(np.nan_to_num(np.asarray(values), nan=-1.0).mean()) for values in by_setting.values())


def chosen(table: Mapping[str, Mapping[str, ArrayLike]]) -> str:
    """The estimator whose worst setting is best; of equals the first.

    Args:
        table: by estimator, by setting, [S] its vector correlations with the choosing seeds.
    """
    return max(table, key=lambda name: worst_mean(table[name]))


def best_baseline(table: Mapping[str, ArrayLike]) -> str:
    """The name of the highest mean correlation over the reported seeds, so the comparison is hard on the others."""
    return max(table, key=lambda name: float(np.nan_to_num(np.asarray(table[name]), nan=-1.0).mean()))
