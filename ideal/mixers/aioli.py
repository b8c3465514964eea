"""Aioli (Chen et al. 2024, "Aioli: A Unified Optimization Framework for Language Model Data Mixing", arXiv 2411.05735).

How fast each capability's loss falls is taken to be linear in the mixture. The coefficients are measured on the way,
by a few steps on mixtures that favour one domain after the other, and the mixture follows them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ideal.errors import UserError
from ideal.mixers.base import Mixer, RoundResult
from ideal.mixers.controller import Controller, SteeredRound, StepStatistics
from ideal.seeding import generator

STEP_SIZE = 1.0
"""eta."""
MEMORY = 0.1
"""gamma, the weight of the coefficients so far."""
FAVOUR = 0.75
"""f, the part of the rows that a probe draws from its domain."""
PROBING = 1 / 3
"""The part of the steps spent on probes, up to rounding; the authors' scripts spend 13% to 70%."""


def probe_mixture(domain: int, domains: int) -> np.ndarray:
    """[n] P_j: f on one domain, (1 - f) / (n - 1) on each other."""
    mixture = np.full(domains, (1 - FAVOUR) / (domains - 1))
    mixture[domain] = FAVOUR
    return mixture


def solved(drops: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
    """[R, n] A such that A[i] p is the drop of capability i on each probe's mixture p, by least squares.

    drops: [R, n] of each capability after each domain's probe. mixtures: [n, n] as drawn, a row for each probe.
    """
    return np.linalg.lstsq(mixtures, drops.T)[0].T


def normalised(coefficients: np.ndarray) -> np.ndarray:
    """[R, n] not negative and of sum 1: shifted by the least entry if that is negative, then divided by the sum."""
    shifted = coefficients - min(float(coefficients.min()), 0.0)
    total = shifted.sum()
    return shifted / total if total > 0 else np.full(shifted.shape, 1 / shifted.size)


def mixture_of(coefficients: np.ndarray) -> np.ndarray:
    """[n] p_j proportional to exp(eta sum_i A[i, j]), from uniform each time."""
    heat = STEP_SIZE * coefficients.sum(0)
    chosen = np.exp(heat - heat.max())
    return chosen / chosen.sum()


class AioliController(Controller):
    """Each revision: a probe of every domain, in random order, then steps on the mixture that follows.

    before: [R] the losses before the running probe. drops: [R, n]. mixtures: [n, n] rows drawn by each probe.
    coefficients: [R, n] the moving average of A. mixture: [n].
    """

    STATE = ("step", "before", "drops", "mixtures", "coefficients", "revised", "mixture")

    def __init__(self, seed: int, revisions: int) -> None:
        self.seed, self.revisions = seed, max(revisions, 1)

    def begin(self, round: SteeredRound) -> None:
        """Uniform, and how many steps a revision and its probes take.

        Raises UserError where a revision has too few steps for its probes.
        """
        super().begin(round)
        count, capabilities = round.count, len(round.capabilities)
        self.length = round.steps // self.revisions
        if count > 1 and self.length <= count:
            raise UserError(
                f"mixing.rounds: {self.revisions} revision(s) in {round.steps} optimizer steps leave {self.length} "
                f"for each, but aioli probes each of {count} domains and then trains; lower it, or train for longer"
            )
        self.probe = max(1, int(PROBING * self.length / count))
        self.step, self.revised = 1, 0
        self.before, self.mixture = np.zeros(capabilities), np.full(count, 1 / count)
        self.drops, self.coefficients = np.zeros((capabilities, count)), np.zeros((capabilities, count))
        self.mixtures = np.zeros((count, count))

    def probed(self, step: int) -> int | None:
        """The domain that `step` probes, None where it trains."""
        revision, offset = divmod(step - 1, self.length)
        if self.round.count == 1 or revision >= self.revisions or offset >= self.round.count * self.probe:
            return None
        order = generator(self.seed, "aioli", revision).permutation(self.round.count)
        return int(order[offset // self.probe])

    def wants_losses(self, step: int) -> bool:
        """Before and after each probe."""
        return self.probed(step) != self.probed(step - 1) if step > 1 else self.probed(step) is not None

    def evaluated(self, step: int, losses: np.ndarray) -> None:
        """Notes the drop of the probe that is over; after the last one the mixture follows."""
        over, runs = self.probed(step - 1) if step > 1 else None, self.probed(step)
        if over is not None:
            self.drops[:, over] = self.before - losses
        self.before = losses
        if over is not None and runs is None:
            self.revise()
        elif runs is not None:
            self.mixtures[runs] = 0

    def revise(self) -> None:
        """The mixture of all that the probes have shown, the last ones most."""
        drawn = self.mixtures / self.mixtures.sum(1, keepdims=True)
        weighed = self.round.weights[:, None] * len(self.round.weights) * solved(self.drops, drawn)
        fresh = normalised(weighed)
        self.coefficients = (1 - MEMORY) * fresh + MEMORY * self.coefficients if self.revised else fresh
        self.mixture, self.revised = mixture_of(self.coefficients), self.revised + 1

    def probabilities(self) -> np.ndarray:
        """[n] of the next step's rows."""
        probed = self.probed(self.step)
        return self.mixture if probed is None else probe_mixture(probed, self.round.count)

    def observe(self, statistics: StepStatistics) -> None:
        """Counts what a probe has drawn: its mixture as it was is what the drop belongs to."""
        probed = self.probed(self.step)
        if probed is not None:
            self.mixtures[probed] += statistics.rows
        self.step += 1

    def observed(self) -> dict[str, Any]:
        """The last probabilities, and the coefficients behind them by capability and domain."""
        return {
            "probabilities": self.by_name(self.mixture),
            "coefficients": {
                name: self.by_name(row)
                for name, row in zip(self.round.capabilities, self.coefficients, strict=True)
            },
        }


class Aioli(Mixer):
    """One inner loop whose mixture is revised mixing.rounds times from probes on the way."""

    extends = False
    keeps_limits = False

    def controller(self, number: int, rounds: Sequence[RoundResult]) -> Controller:
        """The one of the only round."""
        return AioliController(self.setup.seed, self.config.rounds)
