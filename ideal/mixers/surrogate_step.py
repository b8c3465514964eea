"""mixing.step: surrogate. The step to the lowest point of a model of all rounds, and what to say about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ideal.influence.matrix import NORMAL_95, fixed_form, objective
from ideal.mixers.base import RoundResult, Setup, Step, ratios_of_shares, relative_change
from ideal.mixers.goal import Goal
from ideal.mixers.limits import Demands
from ideal.mixers.surrogate import (
    LEAST_LOSS,
    RADIUS,
    Model,
    Observed,
    Region,
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


def surrogate_step(
    rounds: Sequence[RoundResult], setup: Setup, goal: Goal, demands: Demands, fixed: bool, volume_change: float
) -> Step:
    """The step from the last of `rounds` to the mixture of lowest expected Q, or what else the goal is, near the best
    round's.

    fixed: whether the total stays. volume_change: the largest relative change of the total where it does not.
    """
    last, part = rounds[-1], rounds[0].ratios > 0
    seen = observed(rounds, setup, part, fixed)
    found = learn(seen, goal, own_domains(setup, part), demands.ceilings)
    region = region_around(seen[found.best], found.radius, volume_change)
    region = within(region, demands, setup, part, float(rounds[0].ratios @ setup.pool_tokens))
    point, reached = lowest_point(found.model, goal, seen[found.best].features, region)
    shares = np.zeros(len(part))
    shares[part] = np.exp(point[: part.sum()])
    volume = 1.0 if fixed else float(np.exp(point[-1]))
    ratios = ratios_of_shares(shares, volume * (rounds[0].ratios @ setup.pool_tokens), setup.pool_tokens)
    information = what_it_rests_on(found, setup, goal, part, point)
    alpha = None
    if last.influence is not None:
        matrix = fixed_form(last.influence, last.shares) if fixed else last.influence
        alpha = objective(matrix, goal.pull(last.reference_loss))
    warnings = [] if reached else [
        f"mixing.no_worse: no mixture near round {rounds[found.best].round}'s is predicted to keep to what it allows; "
        "the next one is predicted to be no worse than that round where it does not"
    ]  # fmt: skip
    return Step(ratios, relative_change(last.ratios, ratios), alpha, information, warnings)


def within(region: Region, demands: Demands, setup: Setup, part: np.ndarray, start: float) -> Region:
    """The region less what `demands` does not allow. start: round 0's trained tokens."""
    with np.errstate(divide="ignore"):
        least, most = (
            np.log(ratios[part] * setup.pool_tokens[part] / start) for ratios in (demands.least, demands.most)
        )
        ceilings = np.log(demands.ceilings)
    lower, upper, n = region.lower.copy(), region.upper.copy(), int(part.sum())
    if len(lower) == n:
        # With a fixed total a domain's volume is its share: limits are bounds.
        upper = np.minimum(upper, most)
        lower = np.minimum(np.maximum(lower, least), upper)
        least, most = np.full(n, -np.inf), np.full(n, np.inf)
    else:
        upper[n] = min(upper[n], np.log(demands.largest_total / start))
        lower[n] = min(lower[n], upper[n])
    return Region(lower, upper, least, most, ceilings)


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
    """[R] the domain among those that take part that serves each capability: the one it names, else the one of its
    name, whose own reference set made it."""
    names = [name for name, takes_part in zip(setup.domains, part, strict=True) if takes_part]
    serving = [setup.served_by.get(name, name) for name in setup.capabilities]
    return [names.index(name) if name in names else None for name in serving]


def learn(seen: Sequence[Observed], goal: Goal, own: Sequence[int | None], ceilings: np.ndarray) -> Learnt:
    """The model of all rounds, and the region that follows from how the models before each round predicted it.

    own: [R] the domain that serves each capability. ceilings: [R] of the losses; the best round keeps to them.
    """
    objectives = [goal.value(found.losses) for found in seen]
    allowed = [bool((found.losses <= ceilings).all()) for found in seen]
    radius = RADIUS
    for number in range(1, len(seen)):
        model, best = fit(seen[:number], own), best_round(objectives[:number], TIE, allowed[:number])
        here, before = (goal.value(model.losses(seen[i].features)) for i in (number, best))
        noise = np.sqrt(2) * noise_of_objective(model, seen[best].losses, goal)
        radius = next_radius(radius, float(here - before), objectives[number] - objectives[best], float(noise))
    return Learnt(seen, fit(seen, own), best_round(objectives, TIE, allowed), radius)


def what_it_rests_on(
    found: Learnt, setup: Setup, goal: Goal, part: np.ndarray, point: np.ndarray
) -> Mapping[str, Any]:
    """The content of step.json: what is predicted of the next round, from what, and whether it is worth its cost."""
    model, best = found.model, found.rounds[found.best]
    names = [d for d, takes_part in zip(setup.domains, part, strict=True) if takes_part]
    predicted, at_best = model.losses(point), model.losses(best.features)
    gain = goal.value(at_best) - goal.value(predicted)
    noise = float(np.sqrt(2)) * noise_of_objective(model, best.losses, goal)
    what = "Q" if goal.target is None else "the objective"
    terms = names if best.volume is None else [*names, "total"]
    pull, error = pull_of_domains(model, best, goal)

    def by(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
        return dict(zip(names, map(float, values), strict=True))

    return {
        "best_round": found.best,
        "predicted": goal.as_json(setup.capabilities, predicted),
        "predicted_at_best_round": goal.as_json(setup.capabilities, at_best),
        "noise": {"log_loss": by(setup.capabilities, model.noise), what.removeprefix("the "): noise},
        "expected_gain": gain,
        "advice": advice(gain, noise, goal.value(best.losses), what),
        "scale": by(setup.capabilities, model.scale),
        "radius": found.radius,
        "exponents": {c: by(terms, row[1:]) for c, row in zip(setup.capabilities, model.mean, strict=True)},
        "pull": by(names, pull),
        "pull_error": by(names, error),
        "uncertain": [name for name, p, e in zip(names, pull, error, strict=True) if abs(p) < NORMAL_95 * e],
    }


def pull_of_domains(model: Model, here: Observed, goal: Goal) -> tuple[np.ndarray, np.ndarray]:
    """[n] dQ / dbeta, or of what else the goal is, by the model at a round, and its standard error [n], capabilities
    taken as independent."""
    changes = np.column_stack([np.zeros(len(here.shares)), here.derivatives])
    parts = goal.pull(here.losses) * here.losses
    slopes = parts @ (model.mean @ changes.T)
    variances = np.einsum("r,jk,rkl,jl->j", parts**2, changes, model.covariance, changes)
    return slopes, np.sqrt(variances)


def advice(gain: float, noise: float, level: float, what: str) -> str:
    """Whether another run is worth its cost, in words. noise: of a difference between two runs; level: `what` now."""
    part = f" ({gain / level:.1%})" if what == "Q" else ""  # the worst capability's distance may well be 0
    expected = f"another run is expected to lower {what} by {gain:.4f}{part}"
    against = f"a difference of two runs is uncertain by {noise:.4f} from training noise alone"
    if gain < noise / 2:
        return f"{expected}, and {against}: little is left to gain, consider to stop here"
    return f"{expected}, and {against}: worth another run"
