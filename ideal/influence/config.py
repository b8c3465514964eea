"""The settings of the outer step's estimator."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from ideal.settings import STRICT


@dataclass
class InfluenceConfig:
    """How the influence of the domains' volumes is estimated."""

    __pydantic_config__ = STRICT

    factors: Literal["ekfac", "kfac", "diagonal", "identity"] = "ekfac"
    """Curvature: EK-FAC, K-FAC, its diagonal in the weights' own basis, or none (plain gradient products)."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels in the curvature: the examples' own, or drawn from the model."""
    damping: Annotated[float, Field(gt=0)] = 0.1
    """Added to the curvature's eigenvalues, relative to each layer's mean eigenvalue."""
    solver: Literal["direct", "cg"] = "direct"
    """The inverse: layer by layer, or of the joint Gauss-Newton matrix of all tracked layers by conjugate
    gradients, which the layers' own inverses precondition. Much dearer, and exact about how layers interact once its
    residuals are small: that takes many sequences, a larger damping or many iterations (docs/performance.md)."""
    solver_iterations: Annotated[int, Field(gt=0)] = 20
    """At most so many conjugate-gradient iterations."""
    sample_fraction: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 0.5
    """Part of the mixture's rows used (sigma), drawn per domain; at least 32 rows of each, or all. auto: as
    many as it takes until alpha's direction is known to 10%."""
    factor_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Part of these rows that the covariances are estimated on: at least 32 rows of each domain (320 with K-FAC or the
    joint solver), and 48 positions for each dimension of the widest layer, or all. None: all, since their pass gives
    the domains' gradients too; but a tenth with K-FAC and the joint solver, whose eigenvalues or matrix are those of
    the same rows, and with eigenvalue_fraction 1, whose rows give the gradients. With sample_fraction auto neither
    this nor eigenvalue_fraction counts."""
    sketch_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """For the covariances each sequence's positions are added up, with random signs, to this fraction as many sums:
    worth more than all positions of so many fewer sequences. With EK-FAC their noise is taken out to first order. At
    least 12 sums for each dimension of the widest layer. 1: every position stands alone. None: 0.25 where
    factor_fraction is left to be all, else 1."""
    eigenvalue_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Part of these rows that EK-FAC's eigenvalues (and the diagonal) are estimated on, at least 320 of each domain, or
    all; 32 where the covariances are estimated on more, which then tell the trace. Fewer are faster, and may make the
    matrix a few percent too large, although the noise that they add is taken out to second order. None: 0.2 where
    factor_fraction is left to be all, else 1. (With the examples' own labels, and memory for the domains' gradients
    beside the curvature of all layers, a sequence's gradient comes with its eigenvalues or covariances; elsewhere
    gradients take a pass of their own.)"""
    layers: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["*.mlp.*_proj"])
    """Names of the tracked linear layers, or of modules around them; * is any text, ? a character.
    In a model with LoRA: the adapters' own layers in them."""
    keep_layers: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the tracked layers that the matrix is computed from: those whose eigenvalues vary least."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Sequences per forward pass and process."""
    product_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the statistics' matrix products take in; sums are float32 either way. (float32 is not TF32, whatever the
    training or the process allows.)"""
    basis_dtype: Literal["float32", "bfloat16"] = "float32"
    """What eigenbases are held in."""
    error_sequences: Annotated[int, Field(ge=0)] = 32
    """Sequences of each domain and reference set used for the standard errors; 0: no standard errors. (With solver cg
    those of reference rows take a second solution, of a right-hand side per domain: about as much work again.)"""
    memory_budget: Annotated[float, Field(gt=0)] | None = None
    """GB per process for the layers' statistics: where the domains' and capabilities' gradients do not fit together,
    they take turns, each with a pass over the reference sets; then layers are worked on in parts, each with a pass
    over the domains (but for sample_fraction: auto and solver: cg, which need all together). None: no limit."""
    pair_budget: Annotated[float, Field(ge=0)] | None = None
    """GB per process, of a file in the folder for temporary files (TMPDIR), for what sequences hand to the layers: one
    that is needed again, as for covariances and then eigenvalues, does not go through the model again. At most half of
    what is free there. None: 32, but 0 on a GPU, which computes it faster than it could be fetched, and where that
    folder lies in memory."""
    spill: Literal["cpu", "disk"] = "disk"
    """Where finished eigenbases wait if the budget has no room for them: host memory, or memory-mapped files
    in the folder for temporary files (TMPDIR)."""

    @property
    def fractions(self) -> "Fractions":
        """Numbers for those that were left out, by what is estimated alone: not by memory or processes.

        All rows for the bases, a quarter as many sums and a fifth of the rows for the eigenvalues were measured in
        docs/performance.md.
        """
        bases_alone = self.factors == "ekfac" and self.solver == "direct" and self.sample_fraction != "auto"
        sums = bases_alone and self.factor_fraction is None and self.eigenvalue_fraction != 1
        given = self.factor_fraction, self.sketch_fraction, self.eigenvalue_fraction
        others = (1.0, 0.25, 0.2) if sums else (0.1, 1.0, 1.0)
        return Fractions(*(other if one is None else one for one, other in zip(given, others, strict=True)))


@dataclass(frozen=True)
class Fractions:
    """The fractions of `InfluenceConfig`, each in (0, 1]."""

    factor_fraction: float
    sketch_fraction: float
    eigenvalue_fraction: float
