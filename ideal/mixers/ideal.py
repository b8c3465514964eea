"""IDEAL's step (arXiv 2505.12762): every domain's volume moves against its influence."""

from collections.abc import Sequence

import numpy as np

from ideal.influence.matrix import fixed_form, objective
from ideal.mixers.base import Mixer, RoundResult, Step
from ideal.mixers.surrogate_step import TIE, surrogate_step


def fixed_step(alpha: np.ndarray, max_change: float) -> np.ndarray:
    """[n] beta = -gamma alpha with gamma = m / max |alpha| (paper, section 3.3); zero where alpha is zero."""
    largest = np.abs(alpha).max()
    return np.zeros_like(alpha) if largest == 0 else -max_change * alpha / largest


def keep_volume(beta: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[n] 1 + beta_j divided by sum_k s_k (1 + beta_k): the same step with trained tokens kept (DESIGN 1)."""
    return (1 + beta) / (shares @ (1 + beta)) - 1


class Ideal(Mixer):
    """alpha = w^T M, centred when the volume is fixed; beta by the paper's rule, or the next mixture by a surrogate."""

    needs_influence = True
    has_budget = True

    @property
    def tie(self) -> float:
        """The surrogate's own, where it chooses."""
        return TIE if self.config.step == "surrogate" else 0.0

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The surrogate's step from all rounds, or the paper's from the last round's influence matrix."""
        last = rounds[-1]
        assert last.influence is not None, "the loop estimates influence for mixers that need it"
        fixed = self.config.budget == "fixed"
        if self.config.step == "surrogate":
            return surrogate_step(rounds, self.setup, fixed, self.config.max_change)
        matrix = fixed_form(last.influence, last.shares) if fixed else last.influence
        alpha = objective(matrix, last.weights)
        beta = fixed_step(alpha, self.config.max_change)
        if fixed:
            beta = keep_volume(beta, last.shares)
        return Step(last.ratios * (1 + beta), beta, alpha)
