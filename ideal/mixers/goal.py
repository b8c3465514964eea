"""What the rounds are chosen by, as a function of the reference losses: the mean, or the worst capability."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SOFTNESS = 0.05
"""Relative distances within about this of the largest one count as well: a hard maximum would have ideal's steps jump
from one capability to the next, and let noise choose which."""


@dataclass(frozen=True)
class Goal:
    """weights: [R] w_r, sum 1. target: [R] t_r for the worst capability; None: Q, the mean.

    The worst form is the soft maximum of the relative distances e_r = L_r / t_r - 1,

        F = tau log sum_r w_r exp(e_r / tau),    tau = SOFTNESS,

    between their weighted mean and their maximum over capabilities with a weight; from the maximum it is at most
    tau log(1 / w_r) away.
    """

    weights: np.ndarray
    target: np.ndarray | None = None

    def value(self, losses: np.ndarray) -> float:
        """Of reference losses [R]; lower is better."""
        if self.target is None:
            return float(self.weights @ losses)
        distances, parts = self._distances(losses)
        return float(distances.max() + SOFTNESS * np.log(parts.sum()))

    def pull(self, losses: np.ndarray) -> np.ndarray:
        """[R] its derivative by each loss."""
        if self.target is None:
            return self.weights
        pull = np.zeros(len(self.weights))
        _, parts = self._distances(losses)
        pull[self.weights > 0] = parts / parts.sum() / self.target[self.weights > 0]
        return pull

    def as_json(self, capabilities: Sequence[str], losses: np.ndarray) -> dict[str, Any]:
        """reference_loss by capability, Q and, where it is another one, the objective, as evaluation.json has them."""
        found = {
            "reference_loss": dict(zip(capabilities, map(float, losses), strict=True)),
            "Q": float(self.weights @ losses),
        }
        return found if self.target is None else found | {"objective": self.value(losses)}

    def _distances(self, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """e_r and w_r exp((e_r - max e) / tau) of the capabilities with a weight."""
        assert self.target is not None
        counted = self.weights > 0
        distances = losses[counted] / self.target[counted] - 1
        return distances, self.weights[counted] * np.exp((distances - distances.max()) / SOFTNESS)
