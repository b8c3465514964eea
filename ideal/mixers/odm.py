"""ODM (Albalak et al. 2023, "Efficient Online Data Mixing For Language Model Pre-Training", arXiv 2312.02406).

A bandit's arms are the domains, an arm's reward is the training loss of what was drawn from it: what is still hard
is drawn more often. One inner loop, no other model, no evaluation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ideal.mixers.base import Mixer, RoundResult
from ideal.mixers.controller import Controller, SteeredRound, StepStatistics

SMOOTHING = 0.9
"""a, the weight of the rewards so far."""
WARMUP = 0.01
"""Part of the steps that keeps the start's proportions."""


def exploration(step: int, domains: int) -> float:
    """e_t = min(1 / k, sqrt(ln k / (k t))), and 1 / k at t = 0 (Algorithm 1)."""
    return 1 / domains if step == 0 else min(1 / domains, np.sqrt(np.log(domains) / (domains * step)))


def policy(rewards: np.ndarray, step: int) -> np.ndarray:
    """[n] p_i = (1 - k e_t) exp(e_(t-1) R_i) / sum_m exp(e_(t-1) R_m) + e_t (Algorithm 1).

    rewards: [n] R. step: t, counted from 1.
    """
    domains = len(rewards)
    heat = exploration(step - 1, domains) * rewards
    chosen = np.exp(heat - heat.max())
    now = exploration(step, domains)
    return (1 - domains * now) * chosen / chosen.sum() + now


def rewarded(
    rewards: np.ndarray, losses: np.ndarray, probabilities: np.ndarray, present: np.ndarray, smoothing: float
) -> np.ndarray:
    """[n] R_i <- a R_i + (1 - a) L_i / p_i where domain i was drawn, else unchanged (Algorithm 1).

    losses: [n] L, mean loss per trained token (nats). probabilities: [n] those it was drawn with.
    present: [n] whether it was drawn.
    """
    fresh = np.where(present, losses, 0.0) / probabilities
    return np.where(present, smoothing * rewards + (1 - smoothing) * fresh, rewards)


class OdmController(Controller):
    """Draws each step's rows by the bandit's policy."""

    STATE = ("rewards", "step")

    def begin(self, round: SteeredRound) -> None:
        """Rewards of zero, and the start's proportions for the first steps."""
        super().begin(round)
        self.rewards, self.step = np.zeros(round.count), 1

    def probabilities(self) -> np.ndarray:
        """[n] of the next step's rows."""
        warm = self.step <= np.ceil(WARMUP * self.round.steps)
        return self.round.rows if warm else policy(self.rewards, self.step)

    def observe(self, statistics: StepStatistics) -> None:
        """Rewards the domains that were drawn."""
        self.rewards = rewarded(
            self.rewards, statistics.mean_losses, self.probabilities(), statistics.tokens > 0, SMOOTHING
        )
        self.step += 1

    def observed(self) -> dict[str, Any]:
        """The last policy and the rewards behind it."""
        return {
            "probabilities": self.by_name(self.probabilities()),
            "rewards": self.by_name(self.rewards),
        }


class Odm(Mixer):
    """One inner loop whose rows a bandit draws."""

    keeps_limits = False

    def controller(self, number: int, rounds: Sequence[RoundResult]) -> Controller:
        """The bandit."""
        return OdmController()
