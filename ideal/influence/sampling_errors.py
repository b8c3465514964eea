"""Standard errors of M: the sequences that they are estimated on, and what these sequences' scores say.

Letters: R capabilities, n domains, K either of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ideal.distributed import all_reduce_
from ideal.influence.matrix import ratio_covariance
from ideal.influence.samples import SequenceSet
from ideal.seeding import generator


@dataclass
class Sample:
    """The sequences of a set that its standard errors are estimated on."""

    sequences: SequenceSet
    scores: Tensor
    """[slots, K] <G_i, V> over the layers so far, float64; rows of other sequences stay zero."""

    @property
    def slots(self) -> set[int]:
        """Which rows are scored."""
        return set(self.sequences.slots.tolist())

    def covariance(self, whole: SequenceSet, inner: np.ndarray) -> np.ndarray:
        """[K, K] of <g, V>, for g the whole set's mean gradient.

        Args:
            inner: [K] <g, V>.
        """
        slots, repeats = self.sequences.slots, self.sequences.repeats
        scores = all_reduce_(self.scores.clone()).cpu().numpy()[slots]
        return ratio_covariance(
            repeats[:, None] * scores,
            repeats * self.sequences.tokens,
            inner,
            used=len(whole.rows),
            population=whole.population,
        )


def picked_for_errors(chosen: SequenceSet, rest: SequenceSet, wanted: int, kind: str, seed: int) -> SequenceSet:
    """The sequences that a set's standard errors are estimated on.

    Taken from `rest`, the part that is passed over anyway, if it has enough.
    """
    source = rest if len(rest.rows) >= wanted else chosen
    wanted = min(wanted, len(source.rows))
    pick = generator(seed, chosen.name, kind, "errors").choice(len(source.rows), wanted, replace=False)
    return source.part(np.sort(pick))


def training_covariance(
    matrix: np.ndarray, shares: np.ndarray, training: Sequence[SequenceSet], samples: Sequence[Sample], scored: bool
) -> np.ndarray:
    """[n, R, R], of -s_j <g_j, V_r> in g_j.

    Args:
        matrix: [R, n] M.
        shares: [n] s_j.
        training: [n] the sequences behind g_j.
        samples: [n] some of them, scored along V_r.
        scored: whether they were; if not, what a domain's sampling adds is unknown unless it is used whole.
    """
    found = np.full((len(training), *[len(matrix)] * 2), math.nan)
    for number, (chosen, sample, share) in enumerate(zip(training, samples, shares, strict=True)):
        if not share or chosen.whole:
            found[number] = 0.0  # nothing was left out
        elif scored:
            found[number] = share**2 * sample.covariance(chosen, -matrix[:, number] / share)
    return found


def reference_covariance(
    matrix: np.ndarray, shares: np.ndarray, reference: Sequence[SequenceSet], samples: Sequence[Sample], scored: bool
) -> np.ndarray:
    """[R, n, n], of -s_j <g_r, V_j> in g_r; arguments as above, [R] sets, scored along V_j."""
    found = np.full((len(reference), *[len(shares)] * 2), math.nan)
    if not scored:
        return found
    inner = np.divide(-matrix, shares, out=np.zeros_like(matrix), where=shares > 0)
    for number, (chosen, sample) in enumerate(zip(reference, samples, strict=True)):
        found[number] = np.outer(shares, shares) * sample.covariance(chosen, inner[number])
    return found
