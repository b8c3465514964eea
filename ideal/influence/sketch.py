"""Covariances and traces from fewer numbers than there are positions, without bias.

A count sketch (Charikar et al. 2002; Clarkson and Woodruff 2013, arXiv 1207.6365): the positions of a sequence are
dealt out to a few sums, each with a random sign. In sum X~ = P X the expectation of X~^T X~ is X^T X, because signs
of different positions are independent. What such sums of all sequences say about a covariance is worth more than all
positions of fewer sequences: neighbouring positions are alike, sequences are not.

Suffixes: N positions, n sums, I in, O out, K probes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ideal.influence.statistics import Positions, make_positions, on_device
from ideal.seeding import generator

SUMS_PER_DIMENSION = 12
"""Sums that a covariance of k x k entries is estimated on, at least, as multiples of k (docs/performance.md)."""
PROBES = 200
"""Random vectors that the traces of all layers together are estimated with: one factor is taken from all of them."""
LEAST_PROBES = 4
"""Of them for each layer."""


class Sketch:
    """Makes `fraction` as many sums of the positions of every sequence; the same ones in any batch and on any rank."""

    def __init__(self, fraction: float, names: Sequence[str], seed: int) -> None:
        """Args:
        fraction: of the positions, in (0, 1]; 1: nothing is summed.
        names: of the sets of a pass.
        seed: with a set's name and a sequence's slot, decides the signs.
        """
        self.fraction, self.names, self.seed = fraction, names, seed
        self.latest: tuple[Positions, Positions, Tensor, Tensor] | None = None

    def __call__(self, x_NI: Tensor, positions: Positions) -> tuple[Tensor, Positions]:
        """The sums [n, I], in the data type of the weights, and whose they are; x itself where nothing is summed."""
        if self.fraction == 1.0:
            return x_NI, positions
        if self.latest is None or self.latest[0] is not positions:
            self.latest = positions, *self._dealt(positions)
        _, sums, places, signs = self.latest
        x_nI = torch.zeros(places.shape[1], x_NI.shape[1], dtype=signs.dtype, device=x_NI.device)
        for places_n, signs_n in zip(places, signs, strict=True):
            x_nI.addcmul_(x_NI.index_select(0, places_n).to(signs.dtype), signs_n[:, None])
        return x_nI, sums

    def noise(self, sizes: np.ndarray, weights: np.ndarray) -> float:
        """theta: the entry (i, j) of a covariance, in its exact eigenbasis, has about the variance theta l_i l_j.

        Two positions in the same sum leave x y^T + y x^T over: entries whose squares are 2 l_i l_j on average, as far
        as positions that share a sum are no more alike than others.

        Args:
            sizes: [m] positions of the sequences.
            weights: [m] how much each counts.
        """
        counts = np.maximum(np.ceil(self.fraction * sizes), 1)
        fewer, longer = sizes // counts, sizes % counts
        pairs = longer * (fewer + 1) * fewer + (counts - longer) * fewer * (fewer - 1)
        return float(weights**2 @ pairs / (weights @ sizes) ** 2)

    def _dealt(self, positions: Positions) -> tuple[Positions, Tensor, Tensor]:
        """The sums' sequences, and of each sum the positions and their signs [most, n] (0: none)."""
        counts = [math.ceil(self.fraction * size) for size in positions.sizes]
        most = max(-(-size // count) for size, count in zip(positions.sizes, counts, strict=True))
        places, signs, start = [], [], 0
        for size, count, slot in zip(positions.sizes, counts, positions.slots, strict=True):
            drawn = np.zeros(most * count)
            rng = generator(self.seed, self.names[positions.set_index], slot, "sketch")
            drawn[:size] = 2.0 * rng.integers(0, 2, size) - 1
            # Every count-th position goes to the same sum: far apart, they are least alike.
            signs.append(drawn.reshape(most, count))
            places.append(start + np.minimum(np.arange(most * count), size - 1).reshape(most, count))
            start += size
        sequences = list(zip(counts, positions.weights, positions.slots, strict=True))
        weights = positions.position_weights
        sums = make_positions(positions.set_index, [sequences], weights.device, weights.dtype)
        return (
            sums,
            on_device(np.concatenate(places, 1), weights.device),
            on_device(np.concatenate(signs, 1), weights.device, weights.dtype),
        )


def probes(name: str, size: int, layers: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """R [O, K] of the layer `name`: random signs / sqrt(K). The expectation of |R^T G|^2 is |G|^2 (Hutchinson 1990).

    layers: how many have probes.
    """
    count = max(LEAST_PROBES, math.ceil(PROBES / layers))
    signs = 2.0 * generator(seed, name, "probes").integers(0, 2, (size, count)) - 1
    return on_device(signs / math.sqrt(count), device, dtype)
