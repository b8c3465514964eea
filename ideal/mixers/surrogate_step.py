"""mixing.step: surrogate. The step to the lowest point of a model of all rounds, and what to say about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ideal.influence.matrix import NORMAL_95, fixed_form, objective
from ideal.mixers.base import RoundResult, Setup, Step, ratios_of_shares, relative_change
from ideal.mixers.surrogate import (
    LEAST_LOSS,
    RADIUS,
    Model,
    Observed,
    best_round,
    fit,
    lowest_point,
    next_radius,
    noise_of_objective,
    region_around,
)

TIE = 0.01
"""Relative difference of Q within which the earlier round counts as the better one."""


@dataclass(frozen=True)
class Learnt:
    """What all rounds so far say together. best: the index of the best round. radius: of the region around it."""

    rounds: Sequence[Observed]
    model: Model
    best: int
    radius: float


def surrogate_step(rounds: Sequence[RoundResult], setup: Setup, fixed: bool, volume_change: float) -> Step:
    """The step from the last of `rounds` to the mixture of lowest expected Q near the best round's.

    fixed: whether the total stays. volume_change: the largest relative change of the total where it does not.
    """
    last, weights = rounds[-1], setup.weights
    part = rounds[0].ratios > 0
    seen = observed(rounds, setup, part, fixed)
    found = learn(seen, weights, own_domains(setup, part))
    centre = seen[found.best].features
    region = region_around(seen[found.best], found.radius, volume_change)
    point = lowest_point(found.model, weights, centre, region, int(part.sum()))
    shares = np.zeros(len(part))
    shares[part] = np.exp(point[: part.sum()])
    volume = 1.0 if fixed else float(np.exp(point[-1]))
    ratios = ratios_of_shares(shares, volume * (rounds[0].ratios @ setup.pool_tokens), setup.pool_tokens)
    assert last.influence is not None, "the loop estimates influence for mixers that need it"
    matrix = fixed_form(last.influence, last.shares) if fixed else last.influence
    information = what_it_rests_on(found, setup, part, point)
    return Step(ratios, relative_change(last.ratios, ratios), objective(matrix, weights), information)


def observed(rounds: Sequence[RoundResult], setup: Setup, part: np.ndarray, fixed: bool) -> list[Observed]:
    """The rounds as the model sees them; part: [n] which domains have a place in it."""
    start = rounds[0].ratios @ setup.pool_tokens
    found = []
    for this in rounds:
        losses = np.maximum(this.reference_loss, LEAST_LOSS)
        slopes = errors = None
        if this.influence is not None:
            matrix = fixed_form(this.influence, this.shares) if fixed else this.influence
            slopes = matrix[:, part] / losses[:, None]
            errors = slope_errors(this, fixed)[:, part] / losses[:, None]
        volume = None if fixed else float(this.ratios @ setup.pool_tokens / start)
        found.append(Observed(this.shares[part], volume, losses, slopes, errors))
    return found


def slope_errors(this: RoundResult, fixed: bool) -> np.ndarray:
    """[R, n] standard errors of M as it is used, columns taken as independent; an unknown one counts as the entry."""
    assert this.influence is not None
    free = np.zeros_like(this.influence) if this.influence_errors is None else this.influence_errors
    free = np.where(np.isnan(free), np.abs(this.influence), free)
    if not fixed:
        return free
    form = np.eye(len(this.shares)) - this.shares[:, None]
    return np.asarray(np.sqrt(free**2 @ (form**2).T))


def own_domains(setup: Setup, part: np.ndarray) -> list[int | None]:
    """[R] the domain of each capability's name among those that take part: its own reference set made it."""
    names = [name for name, takes_part in zip(setup.domains, part, strict=True) if takes_part]
    return [names.index(name) if name in names else None for name in setup.capabilities]


def learn(seen: Sequence[Observed], weights: np.ndarray, own: Sequence[int | None]) -> Learnt:
    """The model of all rounds, and the region that follows from how the models before each round predicted it."""
    objectives = [float(weights @ found.losses) for found in seen]
    radius = RADIUS
    for number in range(1, len(seen)):
        model, best = fit(seen[:number], own), best_round(objectives[:number], TIE)
        here, before = (weights @ model.losses(seen[i].features) for i in (number, best))
        noise = np.sqrt(2) * noise_of_objective(model, seen[best].losses, weights)
        radius = next_radius(radius, float(here - before), objectives[number] - objectives[best], float(noise))
    return Learnt(seen, fit(seen, own), best_round(objectives, TIE), radius)


def what_it_rests_on(found: Learnt, setup: Setup, part: np.ndarray, point: np.ndarray) -> Mapping[str, Any]:
    """The content of step.json: what is predicted of the next round, from what, and whether it is worth its cost."""
    model, best = found.model, found.rounds[found.best]
    weights, names = setup.weights, [d for d, takes_part in zip(setup.domains, part, strict=True) if takes_part]
    predicted, at_best = model.losses(point), model.losses(best.features)
    gain = float(weights @ (at_best - predicted))
    noise = float(np.sqrt(2)) * noise_of_objective(model, best.losses, weights)
    terms = names if best.volume is None else [*names, "total"]
    pull, error = pull_of_domains(model, best, weights)

    def by(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
        return dict(zip(names, map(float, values), strict=True))

    return {
        "best_round": found.best,
        "predicted": {"reference_loss": by(setup.capabilities, predicted), "Q": float(weights @ predicted)},
        "predicted_at_best_round": {"reference_loss": by(setup.capabilities, at_best), "Q": float(weights @ at_best)},
        "noise": {"log_loss": by(setup.capabilities, model.noise), "Q": noise},
        "expected_gain": gain,
        "advice": advice(gain, noise, float(weights @ best.losses)),
        "scale": by(setup.capabilities, model.scale),
        "radius": found.radius,
        "exponents": {c: by(terms, row[1:]) for c, row in zip(setup.capabilities, model.mean, strict=True)},
        "pull": by(names, pull),
        "pull_error": by(names, error),
        "uncertain": [name for name, p, e in zip(names, pull, error, strict=True) if abs(p) < NORMAL_95 * e],
    }


def pull_of_domains(model: Model, here: Observed, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] dQ / dbeta by the model at a round, and its standard error [n], capabilities taken as independent."""
    changes = np.column_stack([np.zeros(len(here.shares)), here.derivatives])
    parts = weights * here.losses
    slopes = parts @ (model.mean @ changes.T)
    variances = np.einsum("r,jk,rkl,jl->j", parts**2, changes, model.covariance, changes)
    return slopes, np.sqrt(variances)


def advice(gain: float, noise: float, level: float) -> str:
    """Whether another run is worth its cost, in words. noise: of a difference between two runs; level: Q now."""
    expected = f"another run is expected to lower Q by {gain:.4f} ({gain / level:.1%})"
    against = f"a difference of two runs is uncertain by {noise:.4f} from training noise alone"
    if gain < noise / 2:
        return f"{expected}, and {against}: little is left to gain, consider to stop here"
    return f"{expected}, and {against}: worth another run"
