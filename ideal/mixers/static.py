"""Mixtures that need no round to be known: what every other method is compared with."""

import numpy as np

from ideal.mixers.base import Mixer


class Joint(Mixer):
    """Joint SFT: the sizes as they are (the start ratios, 1 where none is given), trained on once."""


class Uniform(Mixer):
    """As many examples of every domain, repeated where a pool is too small."""

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] total / n examples each, as ratios of the pools."""
        total = float(ratios @ self.setup.pool_sizes)
        return total / len(ratios) / self.setup.pool_sizes
