"""mixing.step: fixed. The paper's change of the mixture (arXiv 2505.12762), kept within what the user allows."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ideal.influence.matrix import fixed_form, objective
from ideal.mixers.base import RoundResult, Setup, Step
from ideal.mixers.goal import Goal
from ideal.mixers.limits import Demands
from ideal.mixers.nearest import FEASIBLE, Constraints, least_excess, nearest_change
from ideal.mixers.surrogate import LEAST_LOSS, scales
from ideal.mixers.surrogate_step import observed


def fixed_step(alpha: np.ndarray, max_change: float) -> np.ndarray:
    """[n] beta = -gamma alpha with gamma = m / max |alpha| (paper, section 3.3); zero where alpha is zero."""
    largest = np.abs(alpha).max(initial=0.0)
    return np.zeros_like(alpha) if largest == 0 else -max_change * alpha / largest


def keep_volume(beta: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[n] 1 + beta_j divided by sum_k s_k (1 + beta_k): the same step with trained tokens kept (DESIGN 1)."""
    return (1 + beta) / (shares @ (1 + beta)) - 1


def paper_step(
    rounds: Sequence[RoundResult], setup: Setup, goal: Goal, demands: Demands, fixed: bool, max_change: float
) -> Step:
    """The step against the last round's influence; the nearest one that keeps to `demands`, where it does not.

    fixed: whether the total stays. Only the scale of what is predicted comes from the earlier rounds.
    """
    last = rounds[-1]
    assert last.influence is not None, "the loop estimates influence for mixers that need it"
    weights, losses = goal.pull(last.reference_loss), np.maximum(last.reference_loss, LEAST_LOSS)
    wanted = wanted_change(objective(last.influence, weights), last, demands, fixed, max_change)
    kappa = scales(observed(rounds, setup, rounds[0].ratios > 0, fixed))
    slopes = last.influence / (kappa * losses)[:, None]
    found = constraints(last, setup, demands, slopes, max(max_change, np.abs(wanted).max()), fixed)
    beta, warnings = wanted, []
    if not found.allow(wanted):
        excess = least_excess(found)
        if excess > 1e-6:
            warnings.append(
                f"mixing.no_worse: no step after round {last.round} is predicted to bring every capability back to "
                "what it allows; the one that comes nearest is taken"
            )
        found = replace(found, room=found.room + excess + FEASIBLE)
        beta = nearest_change(wanted, found)
    change = last.influence @ beta
    information = {
        "predicted": goal.as_json(setup.capabilities, last.reference_loss + change / kappa),
        "unscaled": goal.as_json(setup.capabilities, last.reference_loss + change),
        "scale": dict(zip(setup.capabilities, map(float, kappa), strict=True)),
        "kept_by_no_worse": kept(setup, demands, found, beta),
    }
    matrix = fixed_form(last.influence, last.shares) if fixed else last.influence
    return Step(last.ratios * (1 + beta), beta, objective(matrix, weights), information, warnings)


def wanted_change(
    alpha: np.ndarray, last: RoundResult, demands: Demands, fixed: bool, max_change: float
) -> np.ndarray:
    """[n] the paper's beta among the domains that can move as it says; 0 for the others.

    alpha: [n] in its free form. A domain whose limits leave no choice, or that is at a limit beyond which it should
    go, neither sets gamma nor takes part in keeping the total: the others' step is that of a mixture without it.
    """
    half = 0.5 / last.pool_sizes  # ratios are known to half an example
    moving = demands.least < demands.most
    while True:
        beta = np.zeros(len(alpha))
        part = last.shares[moving] / last.shares[moving].sum()
        if fixed:
            beta[moving] = keep_volume(fixed_step(fixed_form(alpha[moving], part), max_change), part)
        else:
            beta[moving] = fixed_step(alpha[moving], max_change)
        held = (beta > 0) & (last.ratios + half >= demands.most) | (beta < 0) & (last.ratios - half <= demands.least)
        held &= demands.least < demands.most
        if not (held & (last.ratios > 0)).any():
            return beta
        moving = moving & ~held


def constraints(
    last: RoundResult, setup: Setup, demands: Demands, slopes: np.ndarray, largest: float, fixed: bool
) -> Constraints:
    """What beta must keep to, around the last round. slopes: [R, n] d log L_r / d beta_j. largest: |beta_j| at most."""
    present, used = last.ratios > 0, np.where(last.ratios > 0, last.ratios, 1.0)
    lower = np.where(present, np.clip(demands.least / used - 1, -largest, largest), 0.0)
    upper = np.where(present, np.clip(demands.most / used - 1, -largest, largest), 0.0)
    # A realised mixture may lie outside its limits by its rounding to examples.
    smallest, greatest = last.shares @ lower, last.shares @ upper
    least_growth = float(np.clip(0.0, smallest, greatest)) if fixed else -np.inf
    cap = demands.largest_total / (last.ratios @ setup.pool_tokens) - 1
    most_growth = least_growth if fixed else max(cap, smallest)
    limited = np.isfinite(demands.ceilings)
    room = demands.ceilings[limited] / np.maximum(last.reference_loss[limited], LEAST_LOSS) - 1
    return Constraints(lower, upper, last.shares, least_growth, most_growth, slopes[limited], room)


def kept(setup: Setup, demands: Demands, found: Constraints, beta: np.ndarray) -> list[str]:
    """The capabilities that are predicted to come to what mixing.no_worse allows."""
    names = [c for c, ceiling in zip(setup.capabilities, demands.ceilings, strict=True) if np.isfinite(ceiling)]
    left = found.room - found.slopes @ beta
    return [name for name, room in zip(names, left, strict=True) if room < 1e-6]
