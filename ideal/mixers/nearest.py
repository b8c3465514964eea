"""The change of the mixture nearest to a wanted one that keeps to limits: two small problems, solved by scipy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog, minimize

FEASIBLE = 1e-9
"""What rounding may leave of a constraint."""


@dataclass(frozen=True)
class Constraints:
    """What beta [n] must keep to.

    lower, upper: [n]. shares: [n] s_j, for the total's change s . beta, which lies between least_growth and
    most_growth. slopes: [C, n] predicted relative changes of C losses by beta. room: [C] what they may come to.
    """

    lower: np.ndarray
    upper: np.ndarray
    shares: np.ndarray
    least_growth: float
    most_growth: float
    slopes: np.ndarray
    room: np.ndarray

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """All but the box as G beta <= h: [C + 2, n] and [C + 2]; a side without a limit is inf."""
        matrix = np.vstack([self.slopes, self.shares, -self.shares])
        return matrix, np.concatenate([self.room, [self.most_growth, -self.least_growth]])

    def allow(self, beta: np.ndarray) -> bool:
        """Whether beta [n] keeps to all of them."""
        matrix, most = self.rows
        inside = (beta >= self.lower - FEASIBLE).all() and (beta <= self.upper + FEASIBLE).all()
        return bool(inside and (matrix @ beta <= most + FEASIBLE).all())


def least_excess(found: Constraints) -> float:
    """The least t >= 0 for which some beta has slopes beta <= room + t and keeps to all else (a linear program)."""
    matrix, most = found.rows
    excess = np.zeros(len(most))
    excess[: len(found.room)] = -1.0
    used = np.isfinite(most)
    solved = linprog(
        np.append(np.zeros(len(found.lower)), 1.0),
        A_ub=np.column_stack([matrix, excess])[used],
        b_ub=most[used],
        bounds=[*zip(found.lower, found.upper, strict=True), (0, None)],
    )
    assert solved.status == 0, f"limits that no change keeps to: {solved.message}"
    return float(solved.x[-1])


def nearest_change(wanted: np.ndarray, found: Constraints) -> np.ndarray:
    """[n] the beta nearest to `wanted` [n] (Euclidean) that keeps to the constraints; `wanted` itself where it does.

    Some beta must keep to them (`least_excess` is 0). A convex quadratic program, by scipy's SLSQP: its first
    quadratic model, with the identity as Hessian, is the problem itself.
    """
    if found.allow(wanted):
        return wanted
    matrix, most = found.rows
    used = np.isfinite(most)
    matrix, most = matrix[used], most[used]
    constraint: Mapping[str, Any] = {
        "type": "ineq",
        "fun": lambda beta: most - matrix @ beta,
        "jac": lambda beta: -matrix,
    }
    solved = minimize(
        lambda beta: (0.5 * ((beta - wanted) ** 2).sum(), beta - wanted),
        np.clip(wanted, found.lower, found.upper),
        jac=True,
        method="SLSQP",
        bounds=list(zip(found.lower, found.upper, strict=True)),
        constraints=constraint,
        options={"ftol": 1e-14, "maxiter": 200},
    )
    return np.clip(solved.x, found.lower, found.upper)
