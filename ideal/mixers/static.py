"""Mixtures that need no round to be known: what every other method is compared with."""

import numpy as np

from ideal.mixers.base import Mixer


class Joint(Mixer):
    """Joint SFT: the sizes as they are (the start ratios, 1 where none is given), trained on once."""


class Uniform(Mixer):
    """As many examples of every domain, repeated where a pool is too small, with the start's trained tokens."""

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] ratios of equal sizes."""
        return self.with_shares((ratios > 0) * self.setup.pool_tokens / self.setup.pool_sizes, ratios)


class Temperature(Mixer):
    """Sizes between the start's and equal ones: temperature-scaled mixing (Raffel et al. 2020, arXiv 1910.10683,
    section 3.5.2, without its limit on the sizes), with the start's trained tokens."""

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] ratios of sizes in proportion to (start size)^(1/T)."""
        sizes = tempered(ratios * self.setup.pool_sizes, self.config.temperature)
        return self.with_shares(sizes * self.setup.pool_tokens / self.setup.pool_sizes, ratios)


def tempered(sizes: np.ndarray, temperature: float) -> np.ndarray:
    """[n] sizes^(1/T) relative to the largest, so that no power overflows; 0 stays 0."""
    return (sizes / sizes.max()) ** (1 / temperature)
