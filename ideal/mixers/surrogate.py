"""A model of every reference loss over mixtures, from the losses and the influence of all rounds so far.

Letters: N rounds, R capabilities, n domains that take part, K features. Everything is float64 and pure.

The model, per capability r, with p the token shares and V the volume against round 0's:

    log L_r = c_r + sum_j a_rj log p_j  [+ b_r log V where the volume is free]

Its derivative by beta_j, the relative change of domain j's volume, is a_rj - p_j sum_k a_rk [+ p_j b_r]. An influence
matrix is an estimate of the same derivative times L_r, too large by an unknown factor: the scale kappa_r.

Sources: power laws of mixture shares are those of Ye et al. 2024 (arXiv 2403.16952) and Goyal et al. 2024 in a form
linear in its coefficients; regression on values and derivatives is Gaussian conditioning (Bishop 2006, 2.3); the
region that grows and shrinks is a trust region (Conn, Gould, Toint 2000, 6.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from ideal.mixers.goal import Goal

SMALLEST_SHARE = 0.015
"""No proposal goes below it, unless the best round does: at p = 0 the power law has no value."""
EXPONENT, OWN_EXPONENT, EXPONENT_SPREAD = -0.05, -0.25, 0.3
"""Prior mean of a_rj, that of the domain with the capability's name, and the spread of both."""
VOLUME_EXPONENT = -0.2
"""Prior mean of b_r."""
SLOPE_ERROR = 0.2
"""Spread of the error that all influence matrices of a run share: more rounds do not average it out."""
ROUND_ERROR = 0.1
"""Spread of the error of one round's matrix, besides the sampling error that the influence states."""
LARGEST_EXPONENT = 0.4
"""What the largest entry of a capability's row is worth before any change has been observed; this sets kappa then."""
SCALE_SPREAD, OWN_SCALE_SPREAD = 1.0, 0.5
"""Prior spread of log kappa, and of a capability's own around the common one."""
NOISE, NOISE_SPREAD = 0.08, 1.0
"""Prior median and log spread of the noise of log L_r from one training run to another."""
NOISES = np.geomspace(0.005, 0.6, 17)
RADIUS, LEAST_RADIUS, LARGEST_RADIUS = 1.6, 0.1, 2.5
"""Of the region |log p_j - log p_j of the best round|: at first, at least, at most."""
GROWTH, SHRINKAGE = 1.25, 0.6
HELD = 0.5
"""The part of the predicted fall of Q that must be seen for the region to grow."""
LEAST_LOSS = 1e-6
"""Lower losses count as this one: the model is one of logarithms."""


@dataclass(frozen=True)
class Observed:
    """One round as the model sees it, for the n domains that take part.

    shares: [n] p, sum 1. volume: V against round 0's; None where it is fixed. losses: [R] L_r.
    slopes, errors: [R, n] d log L_r / d beta_j by the influence (centred where the volume is fixed), and their
    standard errors; None for a round without influence.
    """

    shares: np.ndarray
    volume: float | None
    losses: np.ndarray
    slopes: np.ndarray | None
    errors: np.ndarray | None

    @property
    def features(self) -> np.ndarray:
        """[K] log p, and log V where it is free."""
        return features(self.shares, self.volume)

    @property
    def derivatives(self) -> np.ndarray:
        """[n, K] of the features by beta: (j = k) - p_j, and p_j of log V."""
        changes = np.eye(len(self.shares)) - self.shares[:, None]
        return changes if self.volume is None else np.column_stack([changes, self.shares])


@dataclass(frozen=True)
class Model:
    """The posterior of all coefficients.

    mean: [R, 1 + K] (c, a, b). covariance: [R, 1 + K, 1 + K]. scale: [R] kappa. noise: [R] of log L_r between runs.
    """

    mean: np.ndarray
    covariance: np.ndarray
    scale: np.ndarray
    noise: np.ndarray

    def log_losses(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean [R] and variance [R] of log L_r at features [K], without a run's noise."""
        row = np.concatenate([[1.0], point])
        return self.mean @ row, np.einsum("i,rij,j->r", row, self.covariance, row)

    def losses(self, point: np.ndarray) -> np.ndarray:
        """[R] the expected L_r at features [K]: exp(mean + variance / 2), so what is not known counts against a
        mixture."""
        mean, variance = self.log_losses(point)
        return np.exp(mean + variance / 2)

    def gradients(self, point: np.ndarray) -> np.ndarray:
        """[R, K] of the expected log L_r."""
        row = np.concatenate([[1.0], point])
        return (self.mean + self.covariance @ row)[:, 1:]


def features(shares: np.ndarray, volume: float | None) -> np.ndarray:
    """[K] log p, and log V where the volume is free; a share that rounding made 0 counts as half the smallest."""
    logs = np.log(np.maximum(shares, SMALLEST_SHARE / 2))
    return logs if volume is None else np.append(logs, np.log(volume))


def condition(
    design: np.ndarray, targets: np.ndarray, noise: np.ndarray, mean: np.ndarray, covariance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Posterior mean [k] and covariance [k, k] of x, and the log evidence, after targets = design x + noise.

    x ~ N(mean, covariance), noise ~ N(0, noise). Bishop 2006, equations 2.113 to 2.117, in the form that inverts the
    targets' covariance.

    Args:
        design: [m, k]. targets: [m]. noise: [m, m]. mean: [k]. covariance: [k, k].
    """
    total = design @ covariance @ design.T + noise
    residual = targets - design @ mean
    solved = np.linalg.solve(total, np.column_stack([residual, design @ covariance]))
    spread = design @ covariance
    evidence = -0.5 * (residual @ solved[:, 0] + np.linalg.slogdet(total)[1] + len(targets) * np.log(2 * np.pi))
    return mean + spread.T @ solved[:, 0], covariance - spread.T @ solved[:, 1:], float(evidence)


def scales(rounds: Sequence[Observed]) -> np.ndarray:
    """[R] kappa_r, the factor by which slopes are too large.

    Between two rounds, log L_r should have changed by the slopes' mean along the way, over kappa_r. All pairs are
    compared, N (N - 1) / 2 of them for N - 1 independent differences, so each counts 2 / N. Before there is a pair,
    and as the prior's centre, kappa makes the median capability's largest slope LARGEST_EXPONENT. First one kappa
    for all capabilities, then each one's own around it. 1 where no slope is known or all are 0.
    """
    known = [found for found in rounds if found.slopes is not None]
    sizes = [np.abs(found.slopes).max(1) for found in known if found.slopes is not None]
    centre = float(np.median(np.median(sizes, axis=0))) / LARGEST_EXPONENT if sizes else 0.0
    if centre == 0:
        return np.ones(len(rounds[0].losses))
    tried = np.log(centre) + np.linspace(-4, 4, 161)
    fits = np.zeros((len(rounds[0].losses), len(tried)))
    for first, one in enumerate(known):
        for other in known[first + 1 :]:
            fits += 2 / len(known) * pair_fits(one, other, tried)
    common = posterior_mean(tried, fits.sum(0) - 0.5 * ((tried - np.log(centre)) / SCALE_SPREAD) ** 2)
    own = -0.5 * ((tried - common) / OWN_SCALE_SPREAD) ** 2
    return np.exp([posterior_mean(tried, fit + own) for fit in fits])


def pair_fits(one: Observed, other: Observed, tried: np.ndarray) -> np.ndarray:
    """[R, T] log likelihood of the change between two rounds for each log kappa tried [T].

    The error of the change: two runs' noise, and the slopes' own error along the way.
    """
    assert one.slopes is not None and other.slopes is not None
    way = volumes(other) - volumes(one)
    expected = (one.slopes + other.slopes) / 2 @ way
    change = np.log(other.losses / one.losses)
    variance = 2 * NOISE**2 + SLOPE_ERROR**2 * (way @ way)
    return -0.5 * (change[:, None] - expected[:, None] * np.exp(-tried)) ** 2 / variance


def volumes(found: Observed) -> np.ndarray:
    """[n] logarithms of the domains' own volumes; with a fixed total, of their shares."""
    return features(found.shares, None) + (0.0 if found.volume is None else np.log(found.volume))


def posterior_mean(values: np.ndarray, logs: np.ndarray) -> float:
    """The mean of values [T] under the density exp(logs [T]) on an even grid."""
    density = np.exp(logs - logs.max())
    return float(values @ density / density.sum())


def fit(rounds: Sequence[Observed], own: Sequence[int | None]) -> Model:
    """The model after `rounds`, at least one, with slopes or without.

    own: [R] the domain that is known to serve each capability, None where none is.
    """
    kappa = scales(rounds)
    fitted = [fit_capability(rounds, r, kappa[r], domain) for r, domain in enumerate(own)]
    means, covariances, noises = zip(*fitted, strict=True)
    return Model(np.array(means), np.array(covariances), kappa, np.array(noises))


def fit_capability(
    rounds: Sequence[Observed], r: int, scale: float, own: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Posterior mean [1 + K] and covariance of (c, a, b), and the noise of highest posterior density."""
    count, values = len(rounds), np.log([found.losses[r] for found in rounds])
    slope_design, slopes, slope_noise = slope_equations(rounds, r, scale)
    design = np.concatenate([[[1.0, *found.features] for found in rounds], slope_design])
    mean, covariance = prior(float(values.mean()), design.shape[1] - 1, len(rounds[0].shares), own)
    best: tuple[float, tuple[np.ndarray, np.ndarray, float]] | None = None
    for tried in NOISES:
        noise = np.zeros((len(design), len(design)))
        noise[:count, :count] = tried**2 * np.eye(count)
        noise[count:, count:] = slope_noise
        found, spread, evidence = condition(design, np.concatenate([values, slopes]), noise, mean, covariance)
        density = evidence - 0.5 * float(np.log(tried / NOISE) / NOISE_SPREAD) ** 2
        if best is None or density > best[0]:
            best = density, (found, spread, float(tried))
    assert best is not None
    return best[1]


def slope_equations(rounds: Sequence[Observed], r: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design [m, 1 + K], targets [m] and noise [m, m] of a capability's slopes; m = n times the rounds that have them.

    The noise: an error of each domain's slope that all rounds share, one of each round's, and the sampling error.
    """
    n, width = len(rounds[0].shares), 1 + len(rounds[0].features)
    found = [this for this in rounds if this.slopes is not None and this.errors is not None]
    design, targets, errors = np.zeros((n * len(found), width)), np.zeros(n * len(found)), np.zeros(n * len(found))
    for i, this in enumerate(found):
        assert this.slopes is not None and this.errors is not None
        rows = slice(n * i, n * (i + 1))
        design[rows, 1:] = this.derivatives
        targets[rows], errors[rows] = this.slopes[r] / scale, this.errors[r] / scale
    shared = np.kron(np.ones((len(found), len(found))), np.eye(n)) * SLOPE_ERROR**2
    return design, targets, shared + np.diag(ROUND_ERROR**2 + errors**2)


def prior(level: float, features: int, domains: int, own: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean [1 + K] and covariance of (c, a, b) before anything is known; c as good as free around `level`."""
    mean = np.full(1 + features, EXPONENT)
    mean[0] = level
    mean[1 + domains :] = VOLUME_EXPONENT
    if own is not None:
        mean[1 + own] = OWN_EXPONENT
    spread = np.full(1 + features, EXPONENT_SPREAD)
    spread[0] = 10.0
    return mean, np.diag(spread**2)


def best_round(objectives: Sequence[float], tolerance: float, allowed: Sequence[bool]) -> int:
    """The earliest round whose objective is within `tolerance` (relative) of the lowest, among those that are allowed;
    among all, where none is."""
    found = {i: value for i, value in enumerate(objectives) if allowed[i] or not any(allowed)}
    lowest = min(found.values())
    return next(i for i, value in found.items() if value <= lowest + tolerance * abs(lowest))


def noise_of_objective(model: Model, losses: np.ndarray, goal: Goal) -> float:
    """Standard deviation of the goal from run to run at these losses [R], capabilities taken as independent."""
    return float(np.sqrt(((goal.pull(losses) * losses * model.noise) ** 2).sum()))


def next_radius(radius: float, predicted: float, observed: float, noise: float) -> float:
    """The radius after a run whose Q was predicted to change by `predicted` and changed by `observed`.

    Larger where at least HELD of a predicted fall was seen; smaller where Q rose by more than its noise.
    """
    if observed > noise:
        return max(radius * SHRINKAGE, LEAST_RADIUS)
    if predicted < 0 and observed <= HELD * predicted:
        return min(radius * GROWTH, LARGEST_RADIUS)
    return radius


@dataclass(frozen=True)
class Region:
    """Where the next mixture is looked for: features [K] between lower and upper.

    least, most: [n] limits of each domain's volume against round 0's total, log p_j + log V. ceilings: [R] of the
    expected log L_r. Without a limit: -inf and inf.
    """

    lower: np.ndarray
    upper: np.ndarray
    least: np.ndarray
    most: np.ndarray
    ceilings: np.ndarray


def region_around(best: Observed, radius: float, volume_change: float) -> Region:
    """Shares within exp(radius) of the best round's and not below SMALLEST_SHARE, the volume within 1 + volume_change.

    A share that is below SMALLEST_SHARE already may stay where it is.
    """
    centre = best.features
    reach = np.full(len(centre), radius)
    floor = np.full(len(centre), -np.inf)
    shares = slice(len(best.shares))
    reach[len(best.shares) :] = np.log1p(volume_change)
    floor[shares] = np.minimum(np.log(SMALLEST_SHARE), centre[shares])
    upper = np.minimum(centre + reach, np.where(np.isinf(floor), np.inf, 0.0))
    free = np.full(len(best.shares), np.inf)
    return Region(np.maximum(centre - reach, floor), upper, -free, free, np.full(len(best.losses), np.inf))


def lowest_point(model: Model, goal: Goal, centre: np.ndarray, region: Region) -> tuple[np.ndarray, bool]:
    """[K] the features of lowest expected Q, or what else the goal is, in the region, shares adding up to 1; and
    whether the region's ceilings are kept to there.

    centre: [K]. Where no point is found that keeps to them, those that are exceeded at the centre are raised to what
    is expected there.
    """
    point = search(model, goal, centre, region)
    if point is not None:
        return point, True
    mean, variance = model.log_losses(centre)
    raised = replace(region, ceilings=np.maximum(region.ceilings, mean + variance / 2))
    point = search(model, goal, centre, raised)
    return (centre if point is None else point), False


def search(model: Model, goal: Goal, centre: np.ndarray, region: Region) -> np.ndarray | None:
    """[K] the lowest point found in the region; None where none was found.

    Sequential quadratic programming from the centre [K] and from points towards each domain: shares that add up to
    1 make a curved set of logarithms, on which there may be more than one local minimum.
    """
    domains = len(region.least)
    matrix, most = volume_limits(region)
    limited = np.isfinite(region.ceilings)
    unit = float(np.abs(goal.pull(model.losses(centre))) @ model.losses(centre))

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        losses = model.losses(point)
        return goal.value(losses) / unit, goal.pull(losses) * losses @ model.gradients(point) / unit

    def excess(point: np.ndarray) -> float:
        return float(np.exp(point[:domains]).sum() - 1)

    def excess_gradient(point: np.ndarray) -> np.ndarray:
        return np.concatenate([np.exp(point[:domains]), np.zeros(len(point) - domains)])

    def room(point: np.ndarray) -> np.ndarray:
        mean, variance = model.log_losses(point)
        return np.concatenate([(region.ceilings - mean - variance / 2)[limited], most - matrix @ point])

    def room_gradient(point: np.ndarray) -> np.ndarray:
        return -np.concatenate([model.gradients(point)[limited], matrix])

    constraints = [{"type": "eq", "fun": excess, "jac": excess_gradient}]
    if limited.any() or len(most):
        constraints.append({"type": "ineq", "fun": room, "jac": room_gradient})
    best, lowest = None, np.inf
    if (room(centre) >= 0).all() and ((region.lower <= centre) & (centre <= region.upper)).all():
        best, lowest = centre, objective(centre)[0]
    for begin in [centre, *(towards(centre, j, domains, region) for j in range(domains))]:
        found = minimize(
            objective,
            np.clip(begin, region.lower, region.upper),
            jac=True,
            method="SLSQP",
            bounds=list(zip(region.lower, region.upper, strict=True)),
            constraints=constraints,
            options={"ftol": 1e-10, "maxiter": 200},
        )
        point = np.clip(found.x, region.lower, region.upper)
        kept = np.isfinite(point).all() and abs(excess(point)) < 1e-6 and (room(point) > -1e-6).all()
        if kept and found.fun < lowest:
            best, lowest = point, float(found.fun)
    return best


def volume_limits(region: Region) -> tuple[np.ndarray, np.ndarray]:
    """G [C, K] and h [C] with G x <= h for the limits of log p_j + log V that there are."""
    domains, width = len(region.least), len(region.lower)
    volumes = np.eye(domains, width)
    volumes[:, domains:] = 1.0
    upper, lower = np.isfinite(region.most), np.isfinite(region.least)
    return np.vstack([volumes[upper], -volumes[lower]]), np.concatenate([region.most[upper], -region.least[lower]])


def towards(centre: np.ndarray, domain: int, domains: int, region: Region) -> np.ndarray:
    """[K] a point of the region with more of one domain."""
    moved = centre.copy()
    moved[domain] = min(moved[domain] + 0.5, region.upper[domain])
    shares = np.exp(moved[:domains])
    moved[:domains] = np.log(shares / shares.sum())
    return np.clip(moved, region.lower, region.upper)
