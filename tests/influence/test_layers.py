"""Which rank holds which layers' statistics."""

from itertools import product

import numpy as np
import pytest
from torch import nn

from ideal.influence.layers import Group, deal_out


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_eigendecompositions_are_dealt_out_by_cubed_size(ranks, seed):
    """The fullest rank has at most 4/3 - 1/(3 ranks) times the best possible (Graham 1969), over all ways to deal."""
    random = np.random.default_rng(seed)
    groups = []
    for number in range(7):
        width, *outputs = random.integers(8, 400, 1 + random.integers(1, 3)).tolist()
        layers = {f"{number}.{k}": nn.Linear(width, size, device="meta") for k, size in enumerate(outputs)}
        groups.append(Group(f"{number}.0", layers))
    work = [g.width**3 + sum(layer.out_features**3 for layer in g.layers.values()) for g in groups]

    def fullest(owners):
        return max(np.bincount(owners, weights=work, minlength=ranks))

    found = fullest([deal_out(groups, ranks)[group.name] for group in groups])
    best = min(fullest(owners) for owners in product(range(ranks), repeat=len(groups)))
    assert found <= (4 / 3 - 1 / (3 * ranks)) * best * (1 + 1e-12)
