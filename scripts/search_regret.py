"""What scripts/search_benchmark.py's runs come to: curves, regret, differences. Pure functions on what was recorded.

A curve is what one run had reached after each of its rounds; a row is a method with all its runs. Regret is test Q
less the best known mixture's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ideal.compare.leaderboard import (
    RunNumbers,
    exceeds,
    mean_and_error,
    numbers_of,
    paired,
    spread,
    training_run_equivalents,
)
from ideal.report.files import Json, RunFiles

BUDGETS = (1, 2, 3, 5, 8, 10)
"""Training runs."""
GRADIENTS = (
    "ideal", "ideal, m = 0.15", "ideal, m = 0.3", "ideal, surrogate", "ideal, joint solve", "ideal, one run", "doge",
)  # fmt: skip
"""Rows that measure gradients besides training; all others are what these must beat."""
START = "joint"
"""The row whose one run is the start's mixture as it is."""
TOLERANCE = 0.02
"""By how much a cost may exceed a budget: mixtures are rounded to examples, and clocks are not exact."""

Axis = Literal["cost", "loops"]
AXES: tuple[Axis, ...] = ("cost", "loops")


@dataclass(frozen=True)
class Point:
    """What a run has come to after `rounds` rounds.

    loops: trained tokens of all its inner loops, proxies too, over those of joint's one inner loop.
    cost: its training-run equivalents (ideal.compare.leaderboard) over joint's own; both of the same seed and start.
    q, q_test: of the round of lowest Q on the reference sets among those whose model may be the result.
    shares: that round's, by domain.
    """

    rounds: int
    loops: float
    cost: float
    q: float
    q_test: float
    shares: dict[str, float]


Curves = Mapping[int, Sequence[Point]]
"""By seed, of one setting of a method."""


def first_rounds(run: RunFiles, count: int) -> RunFiles:
    """The run as if it had ended after `count` rounds: no outer step follows the last one, nothing was kept yet."""
    kept = list(run.rounds[:count])
    kept[-1] = replace(kept[-1], influence={})
    return replace(run, rounds=kept, mixture={})


def curve_of(run: RunFiles, joint: RunNumbers, seed: int) -> list[Point]:
    """A run's points, from the first round on after which there is a result. Raises ValueError where a cost is unknown.

    joint: the numbers of joint's run from the same start with the same seed.
    """
    unit = training_run_equivalents(joint, joint)
    found = []
    for count in range(1, len(run.rounds) + 1):
        part = first_rounds(run, count)
        if part.best is None:
            continue
        numbers = numbers_of(part, "", seed)
        cost = training_run_equivalents(numbers, joint)
        if cost is None or unit is None or numbers.trained_tokens is None or numbers.Q_test is None:
            raise ValueError(f"{run.folder}: a time, a number of tokens or a test loss is missing")
        loops = numbers.trained_tokens / joint.trained_tokens  # type: ignore[operator]
        found.append(Point(count, loops, cost / unit, numbers.Q, numbers.Q_test, numbers.shares))
    return found


def mean_cost(curves: Curves, index: int, axis: Axis) -> float:
    """What the `index`-th point of a setting's curves costs on average over its seeds."""
    return float(np.mean([getattr(points[index], axis) for points in curves.values()]))


def within(settings: Iterable[Curves], budget: float, axis: Axis) -> dict[int, Point] | None:
    """By seed, the furthest points that a row reaches within a budget; None where even the first costs more.

    Of all settings and numbers of rounds, the one of highest mean cost that the budget allows: how far a method goes
    may follow from the budget, never from what it found.
    """
    allowed = [
        (mean_cost(curves, index, axis), {seed: points[index] for seed, points in curves.items()})
        for curves in settings
        for index in range(min(map(len, curves.values())))
    ]
    allowed = [(cost, points) for cost, points in allowed if cost <= budget * (1 + TOLERANCE)]
    return max(allowed, key=lambda pair: pair[0])[1] if allowed else None


def regrets(
    rows: Mapping[str, Sequence[Curves]], best: float, budget: float, axis: Axis
) -> dict[str, dict[int, float]]:
    """By row and seed, test Q less `best`, of the rows that the budget allows."""
    reached = {row: within(settings, budget, axis) for row, settings in rows.items()}
    return {
        row: {seed: point.q_test - best for seed, point in points.items()}
        for row, points in reached.items()
        if points is not None
    }


def at_budget(found: Mapping[str, Mapping[int, float]]) -> Json:
    """Means and standard errors at one budget, and paired differences to the best row without gradients.

    found: by row and seed, regret. lowest: the row of lowest mean regret. tied: rows whose paired difference to it
    does not exceed two standard errors. rule: the row without gradients of lowest mean, None where there is none.
    against_start: the paired difference to the start's mixture itself.
    """
    means = {row: float(np.mean(list(values.values()))) for row, values in found.items()}
    lowest = min(means, key=means.__getitem__, default=None)
    rule = min((row for row in means if row not in GRADIENTS), key=means.__getitem__, default=None)
    rows = {}
    for row, values in found.items():
        rows[row] = spread(mean_and_error(np.array(list(values.values()))), "regret")
        if rule is not None and row != rule:
            rows[row] |= spread(paired(values, found[rule]), "against_rule")
        if START in found and row != START:
            rows[row] |= spread(paired(values, found[START]), "against_start")
    others = [row for row in found if row != lowest]
    tied = [row for row in others if lowest is not None and not exceeds(*paired(found[row], found[lowest]))]
    return {"lowest": lowest, "tied": tied, "rule": rule, "rows": rows}


def curve_points(settings: Sequence[Curves], best: float) -> list[Json]:
    """A row's line in the figure: loops, cost, mean regret and its standard error at every point, by cost."""
    found = []
    for curves in settings:
        for index in range(min(map(len, curves.values()))):
            regret = np.array([points[index].q_test - best for points in curves.values()])
            costs: Json = {axis: mean_cost(curves, index, axis) for axis in AXES}
            found.append({**costs, **spread(mean_and_error(regret), "regret")})
    return sorted(found, key=lambda point: point["cost"])


def start_content(rows: Mapping[str, Sequence[Curves]], best: float) -> Json:
    """All numbers of one start. rows: by row, its settings' curves."""
    budgets: dict[str, Json] = {
        axis: {str(budget): at_budget(regrets(rows, best, budget, axis)) for budget in BUDGETS} for axis in AXES
    }
    longest = {row: max(p[-1].rounds for curves in found for p in curves.values()) for row, found in rows.items()}
    lines = {row: curve_points(settings, best) for row, settings in rows.items()}
    return {"budgets": budgets, "longest": longest, "curves": lines}


def chosen(values: Mapping[float, Sequence[float]]) -> float:
    """The setting of lowest mean; the first of equal ones. values: by setting, reference Q of the tuning runs."""
    return min(values, key=lambda setting: float(np.mean(values[setting])))
