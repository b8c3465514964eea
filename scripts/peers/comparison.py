"""Two influence matrices side by side, and the benchmark's tables."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ideal.influence import fixed_form, objective  # noqa: E402

LARGEST_ERROR, LEAST_COSINE = 1e-4, 0.99999
"""What two float32 computations of the same matrix must reach."""


@dataclass(frozen=True)
class Agreement:
    """How much a matrix [R, n] is another one."""

    error: float
    """The largest entry's difference, relative to the other's largest entry."""
    cosine: float
    """Of the entries off the diagonal: those of a capability and another domain than its own."""
    alpha_free: float
    """The cosine of the two alphas, all capabilities weighing the same."""
    alpha_centred: float
    """The same with the total of trained tokens fixed."""

    @property
    def same(self) -> bool:
        """Whether both are the same computation in float32."""
        return self.error <= LARGEST_ERROR and self.cosine >= LEAST_COSINE


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of two arrays' entries; torch's clamps norms at 1e-8, and influence matrices can be smaller."""
    return float((first * second).sum() / np.sqrt((first * first).sum() * (second * second).sum()))


def agreement(found: Any, expected: Any, shares: Any, own: np.ndarray) -> Agreement:
    """Compares two influence matrices [R, n] in their free form; `own` [R, n] marks what is on the diagonal."""
    largest = np.abs(np.asarray(expected, dtype=np.float64)).max()
    one, other = (np.asarray(matrix, dtype=np.float64) / largest for matrix in (found, expected))
    weights = np.full(len(one), 1 / len(one))
    centred = [objective(fixed_form(matrix, shares), weights) for matrix in (one, other)]
    return Agreement(
        error=float(np.abs(one - other).max()),
        cosine=cosine(one[~own], other[~own]),
        alpha_free=cosine(objective(one, weights), objective(other, weights)),
        alpha_centred=cosine(*centred),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def median(runs: Sequence[Mapping[str, Any]], key: str = "seconds") -> float:
    """Of one number of every run."""
    return float(np.median([run[key] for run in runs]))


def timing_table(answers: Mapping[str, list[dict[str, Any]]]) -> str:
    """Medians, their ratios to the floors, and the engine's to them."""
    floors = [median(answers[name]) if name in answers else None for name in ("floor", "padded-floor")]
    engine = median(answers["engine"]) if "engine" in answers else None
    rows = []
    for name, runs in answers.items():
        times = [run["seconds"] for run in runs]
        ratios = [f"{median(runs) / floor:.2f}" if floor else "" for floor in floors]
        peak = max(run["peak"] for run in runs) / 1e6
        speed = f"{engine / median(runs):.2f}" if engine else ""
        spread = f"{min(times):.2f} to {max(times):.2f}"
        rows.append([name, f"{median(runs):.2f}", spread, *ratios, speed, f"{median(runs, 'cpu'):.2f}", f"{peak:.0f}"])
    header = ["side", "s (median)", "s (all)", "x floor", "x padded floor", "x as fast as engine", "CPU s", "peak MB"]
    return table(header, rows)


def solver_table(answers: Mapping[str, list[dict[str, Any]]]) -> str:
    """How the joint solver's residuals fell, in each side's last run, and how far from EK-FAC it began.

    Empty if none used it.
    """
    rows = []
    for name, runs in answers.items():
        solver = runs[-1].get("solver", {})
        largest = [max(row) for row in solver.get("residuals", [])]
        shown = [number for number in (1, 2, 5, 10, 20, 50, 100) if number < len(largest)] + [len(largest)]
        ratio = f"{max(solver['ratios']):.4g}" if largest else ""
        rows += [[name, number, f"{largest[number - 1]:.3f}", ratio] for number in shown if number]
    return table(["side", "iterations", "largest residual", "largest ratio"], rows) if rows else ""


def speed_table(answers: Mapping[str, list[dict[str, Any]]], peers: Sequence[str]) -> str:
    """How many times faster our sides are than the peers."""
    ours = [name for name in answers if "matrix" in answers[name][0] and name not in peers]
    peers = [name for name in answers if name in peers]
    rows = [[name, *[f"{median(answers[peer]) / median(answers[name]):.2f}" for peer in peers]] for name in ours]
    return table(["times faster than", *peers], rows)


def phase_table(
    answers: Mapping[str, list[dict[str, Any]]], flops: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Median seconds of each phase of each side that has any; with FLOPs by side and phase, achieved TFLOP/s."""
    rows = []
    for name, runs in answers.items():
        for phase in runs[0]["phases"]:
            seconds = median([run["phases"] for run in runs], phase)
            work = (flops or {}).get(name, {}).get(phase)
            rows.append([name, phase, f"{seconds:.3f}"])
            if flops is not None:
                rows[-1].append(f"{work / seconds / 1e12:.3g}" if work else "")
    return table(["side", "phase", "s (median)", *(["TFLOP/s"] if flops is not None else [])], rows)


def sink_table(shares: Mapping[str, float], most: int = 8) -> str:
    """The layers with the largest part of trace(A) in the first positions, and the median of all."""
    order = sorted(shares, key=lambda name: -shares[name])
    rows = [[name, f"{shares[name]:.3f}"] for name in order[:most]]
    middle = f"median of all {len(shares)}"
    return table(
        ["layer", "first position's share of trace(A)"], [*rows, [middle, f"{np.median([*shares.values()]):.3f}"]]
    )


def agreement_table(found: Mapping[str, Agreement]) -> str:
    """One line for each comparison."""
    rows = [
        [
            name,
            f"{one.error:.2g}",
            f"{one.cosine:.8f}",
            f"{one.alpha_free:.6f}",
            f"{one.alpha_centred:.6f}",
            "yes" if one.same else "no",
        ]
        for name, one in found.items()
    ]
    header = ["side", "largest error / largest entry", "off-diagonal cosine", "alpha free", "alpha centred", "same"]
    return table(header, rows)
