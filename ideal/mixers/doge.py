"""DoGE (Fan et al. 2023, "DoGE: Domain Reweighting with Generalization Estimation", arXiv 2310.15393).

A proxy is trained while domains gain weight whose gradients agree with the target's. The weights' mean over the
proxy's training is the mixture of the final model. The target is the reference sets with their weights.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ideal.draws import token_shares
from ideal.mixers.base import Mixer, RoundResult, Step
from ideal.mixers.controller import Controller, Measurement, SteeredRound

STEP_SIZE = 0.01
"""lr / mu at the highest learning rate: the authors' 5e-4 and 0.05. Fine-tuning's rates would move nothing."""
HIGHEST_SCORE = 5.0


def scores_of(alignment: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """[n] s_j = clip(W_j / (mean_j |g_j| + 1e-6), 0, 5).

    alignment: [n] W_j = <g_j, g_V>. norms: [n] |g_j|.
    """
    return np.clip(alignment / (norms.mean() + 1e-6), 0, HIGHEST_SCORE)


def updated(weights: np.ndarray, scores: np.ndarray, step_size: float) -> np.ndarray:
    """[n] alpha <- softmax(log alpha + s / mu): mirror descent with entropy (Algorithm 1)."""
    heat = np.log(weights) + step_size * scores
    moved = np.exp(heat - heat.max())
    return moved / moved.sum()


class DogeController(Controller):
    """Trains the proxy: rows of all domains alike, losses weighted by alpha.

    weights: [n] alpha. total: [n] the sum of all alphas so far. alignment, norms: [n] the last ones measured.
    """

    STATE = ("weights", "total", "counted", "alignment", "norms")
    measures = "alignment"

    def begin(self, round: SteeredRound) -> None:
        """alpha is the start's shares of trained tokens."""
        super().begin(round)
        self.weights, self.total, self.counted = round.shares, np.zeros(round.count), 0
        self.alignment, self.norms = np.zeros(round.count), np.full(round.count, np.nan)

    def probabilities(self) -> np.ndarray:
        """[n] uniform: the weights act on the losses, so that every domain is measured in every step."""
        return np.full(self.round.count, 1 / self.round.count)

    def measured(self, measurement: Measurement) -> None:
        """Moves alpha before the step that it weights; a domain without rows keeps its last measurement."""
        assert measurement.alignment is not None and measurement.norms is not None
        present = measurement.tokens > 0
        self.alignment = np.where(present, measurement.alignment, self.alignment)
        self.norms = np.where(present, measurement.norms, self.norms)
        # A domain never measured so far has no norm that could enter the mean, and a score of 0.
        known = ~np.isnan(self.norms)
        scores = np.zeros(self.round.count)
        scores[known] = scores_of(self.alignment[known], self.norms[known])
        self.weights = updated(self.weights, scores, STEP_SIZE * measurement.rate)
        self.total, self.counted = self.total + self.weights, self.counted + 1

    def loss_weights(self) -> np.ndarray:
        """[n] alpha_j / q_j with q the tokens' shares as drawn: the proxy trains on sum_j alpha_j L_j."""
        return self.weights / token_shares(self.probabilities(), self.round.mean_tokens)

    def observed(self) -> dict[str, Any]:
        """The mean, which is the output, and the last weights."""
        return {"shares": self.by_name(self.total / self.counted), "last_weights": self.by_name(self.weights)}


class Doge(Mixer):
    """Proxies, each from the last one's output, then the final model: mixing.rounds + 1 inner loops."""

    whole_gradients = True
    successive = False
    extends = False

    def is_result(self, number: int) -> bool:
        """A proxy is trained for its weights alone."""
        return number == self.last_round()

    def controller(self, number: int, rounds: Sequence[RoundResult]) -> Controller | None:
        """The proxy's."""
        return None if self.is_result(number) else DogeController()

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The mixture of the proxy's output."""
        found = rounds[-1].observed["shares"]
        shares = np.array([found.get(name, 0.0) for name in self.setup.domains])
        return self.step_to(shares, rounds[-1], information={"shares": found})
