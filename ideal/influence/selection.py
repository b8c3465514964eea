"""Which of the domains' sequences serve what in the outer step. Letter: n domains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ideal.influence.config import InfluenceConfig
from ideal.influence.samples import LEAST_SEQUENCES, SequenceSet, how_many

FACTOR_SEQUENCES = 320
"""Eigenvalues are estimated on so many sequences of each domain at least, where they alone tell the curvature's trace.
With 32 of 100 for both, SmolLM2's matrix came out 1.25 times too large (docs/performance.md)."""
POSITIONS_PER_DIMENSION = 48
"""Positions that a factor of k x k entries is estimated on, at least, as multiples of k. With 11 SmolLM2's matrix was
up to 14% of its largest entry off, eigenvalues from all sequences (docs/performance.md)."""


@dataclass
class Selection:
    """The domains' sequences by what they serve, [n] each; with `sample_fraction: auto` there come more."""

    pools: list[SequenceSet]
    """Those that may be used, in random order."""
    widest: int
    """The largest dimension of a factor."""
    factors: list[SequenceSet]
    """For the covariances, standing for their domains."""
    corrected: list[SequenceSet]
    """For the eigenvalues, likewise."""
    training: list[SequenceSet]
    """For the domains' gradients."""
    early: set[int]
    """The domains whose gradients come with the covariances."""
    late: set[int]
    """Those whose gradients come with the eigenvalues."""
    rest: list[SequenceSet]
    """Of `training`, those whose gradients are still to come."""

    @property
    def with_curvature(self) -> bool:
        """Whether the curvature's passes give gradients too."""
        return bool(self.early or self.late)

    @property
    def available(self) -> list[int]:
        """Sequences that there are."""
        return [len(pool.rows) for pool in self.pools]

    def double_factors(self) -> bool:
        """Takes twice as many sequences for the curvature; whether there were more."""
        before = how_many(self.factors)
        fraction = min(1.0, 2 * before / sum(self.available))
        self.corrected = self.factors = factor_parts(self.pools, fraction, self.widest, 1)
        return how_many(self.factors) > before

    def take(self, wanted: Sequence[int]) -> list[SequenceSet]:
        """Adds sequences to `training`, up to these numbers; the new ones, which are then the `rest`."""
        before = self.training
        self.training = [pool.part(np.arange(count)) for pool, count in zip(self.pools, wanted, strict=True)]
        self.rest = [now.without(then) for now, then in zip(self.training, before, strict=True)]
        return self.rest


def select(pools: list[SequenceSet], config: InfluenceConfig, widest: int, room: bool) -> Selection:
    """What a run begins with.

    Args:
        pools: [n] sequences that may be used, in random order.
        widest: the largest dimension of a factor.
        room: whether the domains' gradients fit beside the curvature of all layers.
    """
    training = pools
    if config.sample_fraction == "auto":
        # As few as the factors can do with, and to begin with as many again for the gradients' errors.
        corrected = factors = factor_parts(pools, 0.0, widest, LEAST_SEQUENCES)
        training = [
            pool.part(np.arange(min(len(pool.rows), len(some.rows) + LEAST_SEQUENCES)))
            for pool, some in zip(pools, factors, strict=True)
        ]
    else:
        factors, corrected = _for_curvature(pools, config, widest)
    early, late = _with_curvature(factors, corrected, config) if room else (set[int](), set[int]())
    rest = [
        chosen.without(factors[number]) if number in early
        else chosen.without(corrected[number]) if number in late
        else chosen
        for number, chosen in enumerate(training)
    ]  # fmt: skip
    return Selection(pools, widest, factors, corrected, training, early, late, rest)


def _for_curvature(
    pools: list[SequenceSet], config: InfluenceConfig, widest: int
) -> tuple[list[SequenceSet], list[SequenceSet]]:
    """The covariances' sequences and the eigenvalues'."""
    fractions = config.fractions
    # The joint solver's matrix is that of the factors' sequences, and K-FAC's eigenvalues are theirs too.
    basis_alone = config.factors == "ekfac" and config.solver == "direct"
    least = LEAST_SEQUENCES if basis_alone else FACTOR_SEQUENCES
    factors = factor_parts(pools, fractions.factor_fraction, widest, least)
    corrected = factor_parts(pools, fractions.eigenvalue_fraction, 0, LEAST_SEQUENCES)
    if how_many(corrected) >= how_many(factors) or not basis_alone:
        corrected = factor_parts(pools, fractions.eigenvalue_fraction, 0, FACTOR_SEQUENCES)
    if config.factors == "diagonal" and config.solver == "direct":
        factors = corrected  # there are no covariances
    if config.factors == "kfac":
        corrected = factors  # eigenvalues are the covariances'
    return factors, corrected


def _with_curvature(
    factors: list[SequenceSet], corrected: list[SequenceSet], config: InfluenceConfig
) -> tuple[set[int], set[int]]:
    """The domains whose gradients come with the covariances, and with the eigenvalues.

    With the examples' own labels these passes give gradients too: of each domain those of its covariances'
    sequences or those of its eigenvalues', whichever are more (the others are among them).
    """
    if config.fisher != "empirical" or config.factors not in ("ekfac", "diagonal"):
        return set(), set()
    every = range(len(factors))
    early = {k for k in every if config.factors == "ekfac" and len(factors[k].rows) > len(corrected[k].rows)}
    return early, set(every) - early


def factor_parts(
    training: Sequence[SequenceSet], fraction: float, widest: int, least: int
) -> list[SequenceSet]:
    """The first `fraction` of every domain's sequences, or more where that is too little for the factors.

    Args:
        training: the domains' sequences, in random order.
        fraction: of the sequences, in (0, 1].
        widest: the largest dimension of a factor.
        least: sequences of each domain, if it has them.
    """
    positions = sum(float(chosen.examples.positions[chosen.rows].sum()) for chosen in training)
    fraction = max(fraction, POSITIONS_PER_DIMENSION * widest / max(positions, 1.0))
    return [
        chosen.part(np.arange(min(len(chosen.rows), max(least, math.ceil(fraction * len(chosen.rows))))))
        .rescaled()
        for chosen in training
    ]  # fmt: skip
