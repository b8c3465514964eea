"""What the outer step's estimate consists of."""

from dataclasses import dataclass

import numpy as np

NO_SOLUTION = "near or above 1 is no solution"
"""What to say of the joint solver's residuals (docs/performance.md)."""


@dataclass(frozen=True)
class Influence:
    """What the volume of each domain does to each capability's loss, to first order."""

    domains: list[str]
    capabilities: list[str]
    matrix: np.ndarray
    """[R, n] M in its free form: dL_r / dbeta_j, nats per trained token; negative: more of j lowers L_r."""
    training_covariance: np.ndarray
    """[n, R, R] of each column of M, from the sampling of training sequences; nan where unknown. Columns are
    independent; the curvature is taken as known."""
    reference_covariance: np.ndarray
    """[R, n, n] of each row of M, from the sampling of reference rows; nan where unknown. Rows are independent."""
    shares: np.ndarray
    """[n] s_j, the domains' shares of the mixture's trained tokens; sum 1."""
    layers: dict[str, np.ndarray]
    """[R, n] each tracked layer's part of M."""
    dropped_layers: list[str]
    """Tracked layers that `keep_layers` left out."""
    first_position_share: dict[str, float]
    """Per tracked layer, the part of trace(A) that the first positions hold; nan if it saw no token."""
    sequences: dict[str, int]
    """Distinct sequences used, per domain."""
    factor_sequences: dict[str, int]
    """Those that the covariances were estimated on."""
    sketch_fraction: float
    """Sums that stood for their positions there, as part of them; 1: every position stood alone."""
    eigenvalue_sequences: dict[str, int]
    """Those that the eigenvalues (or the diagonal) were estimated on: with K-FAC the covariances'."""
    tokens: dict[str, int]
    """The sequences' trained tokens, per domain; a repeated sequence counts once."""
    reference_sequences: dict[str, int]
    """Sequences used, per capability."""
    reference_tokens: dict[str, int]
    """Their trained tokens, per capability."""
    solver: dict[str, object]
    """Of the joint solver: its iterations, residuals and ratios (`joint.JointSolution`), and `error_` ones, of the
    solutions for the reference rows' standard errors; empty without it."""
    seconds: dict[str, float]
    """Per phase."""
