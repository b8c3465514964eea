"""RegMix (Liu et al. 2025, arXiv 2407.01492): regress the losses of short runs on their mixtures, then take the best.

For SFT, and so in three points other than the paper: the proxies are short inner loops of the model itself (with its
adapters, if any), the regression is ridge of log losses on quadratics of log shares (there are tens of proxies, not
hundreds), and the search draws from the distribution that the proxies were drawn from, where the regression was fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ideal.errors import UserError
from ideal.mixers.base import Mixer, RoundResult, Step
from ideal.seeding import generator

LARGEST = 15.0
"""Upper limit of a share / the start's."""
PRIOR_POWER = 0.5
"""The start's shares enter the Dirichlet to this power, which draws small domains more often."""
STRENGTHS = np.geomspace(0.1, 5.0, 15)
"""Of the Dirichlet: the smaller, the nearer to one domain alone."""
SMALLEST = 2e-4
"""Shares are multiples of it, and those below are 0."""
OVERSAMPLED = 100
"""Candidates per proxy, of which near copies are dropped before the proxies are picked."""
TOO_NEAR = 1e-5
"""L1 distance of copies."""
SEARCHED, AVERAGED = 100_000, 128
"""Draws whose losses are predicted, and how many of the best the final shares are the mean of."""
PENALTIES = np.geomspace(1e-4, 1e3, 15)
"""Of the ridge, per proxy; leave-one-out chooses."""
SOFTENED = 0.01
"""Added to shares before their logarithm is taken: far below it, less of a domain makes no difference any more."""
FOLDS = 10
LOW_CORRELATION = 0.5
"""Spearman's correlation of predictions with held-out losses below which a search by them is a search in noise."""


class RegMix(Mixer):
    """mixing.rounds proxies, the first on the start's shares, then the result's round on the shares predicted best."""

    successive = False
    extends = False

    def length(self, number: int) -> float:
        """mixing.proxy_length of an inner loop for proxies."""
        return self.config.proxy_length if number < self.config.rounds else 1.0

    def is_result(self, number: int) -> bool:
        """The last round's alone: proxies are too short."""
        return number == self.config.rounds

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] as given. Raises UserError for fewer proxies than a regression on the shares could use."""
        least = int(np.count_nonzero(ratios)) + 2
        if self.config.rounds < least:
            raise UserError(
                f"mixing.rounds: regmix cannot learn from {self.config.rounds} proxy runs; give at least {least}, "
                f"better {8 * (least - 2)} to {16 * (least - 2)}"
            )
        return ratios

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The next proxy's shares; after the last proxy, those predicted best."""
        if len(rounds) == self.config.rounds:
            return self.result(rounds)
        proxies = proxy_shares(rounds[0].shares, self.config.rounds - 1, self.setup.seed)
        return self.step_to(proxies[len(rounds) - 1], rounds[-1])

    def result(self, rounds: Sequence[RoundResult]) -> Step:
        """The step to the shares predicted best, with how well the predictions hold."""
        shares = np.array([r.shares for r in rounds])
        losses = np.array([r.reference_loss for r in rounds])
        order = generator(self.setup.seed, "regmix folds").permutation(len(rounds))
        held_out = np.array([held_out_predictions(shares, found, order) for found in losses.T]).T
        quality = {
            name: spearman(predicted, found)
            for name, predicted, found in zip(self.setup.capabilities, held_out.T, losses.T, strict=True)
        }
        weights = self.setup.weights
        quality_of_q = spearman(held_out @ weights, losses @ weights)
        models = [fit(shares, found) for found in losses.T]
        draws = searched(rounds[0].shares, SEARCHED, generator(self.setup.seed, "regmix search"))
        predicted = np.array([model.predict(draws) for model in models]).T @ weights
        best = draws[np.argsort(predicted, kind="stable")[:AVERAGED]].mean(0)
        final = [float(model.predict(best[None])[0]) for model in models]
        information = {
            "held_out_spearman": quality,
            "held_out_spearman_of_Q": quality_of_q,
            "penalty": dict(zip(self.setup.capabilities, [model.penalty for model in models], strict=True)),
            "predicted_proxy_loss": dict(zip(self.setup.capabilities, final, strict=True)),
            "predicted_proxy_Q": float(weights @ final),
            "shares": dict(zip(self.setup.domains, best.tolist(), strict=True)),
        }
        return self.step_to(best, rounds[-1], information=information, warnings=doubts(quality, quality_of_q))


def doubts(quality: dict[str, float], quality_of_q: float) -> list[str]:
    """Warnings where predictions of held-out proxies are ranked badly."""
    low = [f"{name} {found:.2f}" for name, found in quality.items() if found < LOW_CORRELATION]
    lines = [f"regmix: rank correlation with held-out proxies is low for {', '.join(low)}"] if low else []
    if quality_of_q < LOW_CORRELATION:
        lines.append(
            f"regmix: the regression ranks held-out mixtures badly (Spearman {quality_of_q:.2f} for Q), so its choice"
            " is little better than a random one; set mixing.rounds or mixing.proxy_length higher"
        )
    return lines


def searched(start: np.ndarray, count: int, draws: np.random.Generator) -> np.ndarray:
    """[count, n] shares from the proxies' distribution around the start's shares [n], before rounding.

    Dirichlet(s q), q the start's shares to the power 1/2, s one of 15 strengths; draws beyond 15 times the start's
    share are thrown away. A domain of share 0 stays out.
    """
    taking_part = start > 0
    prior = start[taking_part] ** PRIOR_POWER
    prior /= prior.sum()
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < count:
        strengths = draws.choice(STRENGTHS, count)
        # A Dirichlet for each strength, as normalised gammas; logarithms, as small strengths underflow.
        parts = log_gamma(strengths[:, None] * prior, draws)
        parts = np.exp(parts - parts.max(1, keepdims=True))
        parts /= parts.sum(1, keepdims=True)
        kept.append(parts[(parts <= LARGEST * start[taking_part]).all(1)])
    shares = np.zeros((count, len(start)))
    shares[:, taking_part] = np.concatenate(kept)[:count]
    return shares


def log_gamma(shape: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Logarithms of Gamma(shape) draws: that of Gamma(shape + 1), and of a uniform number to the power 1 / shape."""
    return np.log(draws.gamma(shape + 1)) + np.log1p(-draws.random(shape.shape)) / shape


def rounded(shares: np.ndarray) -> np.ndarray:
    """[N, n] shares without entries below SMALLEST, in multiples of it (but for the last normalisation)."""
    kept = np.where(shares < SMALLEST, 0, shares)
    steps = np.round(kept / kept.sum(1, keepdims=True) / SMALLEST)
    return steps / steps.sum(1, keepdims=True)


def proxy_shares(start: np.ndarray, count: int, seed: int) -> np.ndarray:
    """[count, n] the shares of the proxies after the first, around the start's [n]: many drawn, near copies dropped."""
    draws = generator(seed, "regmix proxies")
    candidates = rounded(searched(start, OVERSAMPLED * count, draws))
    candidates = candidates[np.lexsort(candidates.T[::-1])]
    apart = np.abs(np.diff(candidates, axis=0)).sum(1) >= TOO_NEAR
    different = candidates[np.concatenate([[True], apart])]
    return different[draws.choice(len(different), count, replace=len(different) < count)]


def features(shares: np.ndarray) -> np.ndarray:
    """[N, n + n (n + 1) / 2] x_j, then the products x_i x_j, i <= j, with x = log(p + SOFTENED) of shares p [N, n]."""
    logs = np.log(shares + SOFTENED)
    first, second = np.triu_indices(shares.shape[1])
    return np.concatenate([logs, logs[:, first] * logs[:, second]], axis=1)


@dataclass(frozen=True)
class Ridge:
    """log loss = intercept + ((features - mean) / scale) @ coefficients, so no loss is predicted below zero."""

    intercept: float
    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    penalty: float

    def predict(self, shares: np.ndarray) -> np.ndarray:
        """[N] predicted losses at shares [N, n]."""
        return np.exp(self.intercept + (features(shares) - self.mean) / self.scale @ self.coefficients)


def fit(shares: np.ndarray, losses: np.ndarray) -> Ridge:
    """Ridge regression of the logarithms of losses [N] on the features of shares [N, n].

    The penalty is the one of least leave-one-out error, which follows without refitting from the residuals e and the
    leverages h as e / (1 - h); features are standardised, the intercept is not penalised.
    """
    found = features(shares)
    mean, scale = found.mean(0), found.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    left, values, right = np.linalg.svd((found - mean) / scale, full_matrices=False)
    logs = np.log(np.maximum(losses, np.finfo(np.float64).tiny))
    centred = logs - logs.mean()
    projected = left.T @ centred
    errors = []
    for penalty in PENALTIES * len(losses):
        kept = values**2 / (values**2 + penalty)
        leverage = 1 / len(losses) + (left**2) @ kept
        errors.append((((centred - left @ (kept * projected)) / (1 - leverage)) ** 2).sum())
    penalty = PENALTIES[int(np.argmin(errors))] * len(losses)
    coefficients = right.T @ (values / (values**2 + penalty) * projected)
    return Ridge(float(logs.mean()), mean, scale, coefficients, float(penalty))


def held_out_predictions(shares: np.ndarray, losses: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[N] each proxy's loss as predicted by a fit, its penalty included, without the proxy's fold; order: [N]."""
    predicted = np.empty(len(losses))
    for fold in np.array_split(order, min(FOLDS, len(losses))):
        rest = np.setdiff1d(order, fold)
        predicted[fold] = fit(shares[rest], losses[rest]).predict(shares[fold])
    return predicted


def ranks(values: np.ndarray) -> np.ndarray:
    """[N] from 0, equal values sharing the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of the ranks of two [N]; 0 where one of them is constant: it ranks nothing."""
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (one, other))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0
