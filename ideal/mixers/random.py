"""Random mixtures: what an arbitrary mixture gives on average, and what the best of several gives."""

from collections.abc import Sequence

import numpy as np

from ideal.mixers.base import Mixer, RoundResult, Step
from ideal.seeding import generator


class Random(Mixer):
    """Token shares drawn uniformly from the simplex, with the start's trained tokens: one draw, and mixing.rounds more.

    The best one is kept; the report has their mean too (the random ratios of arXiv 2505.12762's table).
    """

    successive = False

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] the first draw."""
        return self.with_shares(drawn_shares(self.setup.seed, 0, ratios > 0), ratios)

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The next draw, whatever the ones before gave."""
        last = rounds[-1]
        return self.step_to(drawn_shares(self.setup.seed, len(rounds), last.ratios > 0), last)


def drawn_shares(seed: int, number: int, taking_part: np.ndarray) -> np.ndarray:
    """[n] draw `number` from Dirichlet(1, ..., 1) over the domains that take part [n]; 0 for the others."""
    shares = np.zeros(len(taking_part))
    shares[taking_part] = generator(seed, "random mixture", number).dirichlet(np.ones(int(taking_part.sum())))
    return shares
