"""The curvature of one linear layer: factors -> eigenbases -> eigenvalues -> damped inverse.

Pure functions of tensors (George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296).
A layer's weight and its gradients are O x I (out x in), and so are the eigenvalues:

    A = Q_A diag(l_A) Q_A^T  [I, I]        S = Q_S diag(l_S) Q_S^T  [O, O]
    H V = Q_S [ Lambda * (Q_S^T V Q_A) ] Q_A^T

Suffixes: I in, O out, K any number of gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SUM_CHUNK = 2**18
"""Entries of a gradient that are held in float64 at a time."""


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [k] (float64, none negative) and eigenvectors [k, k] (columns, in `matrix`'s data type).

    Decomposed in float64; of the symmetric matrix, only what is on and above the diagonal is read.
    """
    values, vectors = torch.linalg.eigh(matrix.double(), UPLO="U")
    return values.clamp_min(0.0), vectors.to(matrix.dtype)


def kfac_eigenvalues(values_O: Tensor, values_I: Tensor, positions: float, tokens: float) -> Tensor:
    """K-FAC's eigenvalues (P / T) l_S l_A^T, [O, I].

    S and A are means over P positions, the Hessian is one of a mean over T trained tokens.
    """
    return positions / tokens * torch.outer(values_O, values_I)


def damping_of(eigenvalues_OI: Tensor, relative: float) -> Tensor:
    """D = relative x mean(Lambda), []."""
    return relative * eigenvalues_OI.mean()


def without_noise(eigenvalues_OI: Tensor, variances_OI: Tensor, damping: Tensor) -> Tensor:
    """Lambda', [O, I], for which 1 / (Lambda' + D) is on average, to second order, what it is without noise in Lambda.

    1 / (Lambda + D) is convex: noise of variance v makes it larger by the factor 1 + v / (Lambda + D)^2 (Taylor's
    second term; the delta method). Where both are zero it stays so.

    Args:
        variances_OI: v, at most Lambda^2.
        damping: D, [].
    """
    return eigenvalues_OI + variances_OI / (eigenvalues_OI + damping).clamp_min(torch.finfo(damping.dtype).tiny)


def inner_products(left_KOI: Tensor, right_LOI: Tensor) -> Tensor:
    """<left_k, right_l>, [K, L], summed in float64."""
    pieces = zip(left_KOI.flatten(1).split(SUM_CHUNK, 1), right_LOI.flatten(1).split(SUM_CHUNK, 1), strict=True)
    return torch.stack([left.double() @ right.double().mT for left, right in pieces]).sum(0)


@dataclass(frozen=True)
class Curvature:
    """H + D of one layer, diagonal in a product of two bases."""

    basis_O: Tensor | None
    """Q_S [O, O]; None: the identity."""
    basis_I: Tensor | None
    """Q_A [I, I]; None: the identity."""
    damped_OI: Tensor | None
    """Eigenvalues of H + D; None: H + D is the identity."""

    def rotate(self, gradients_KOI: Tensor) -> Tensor:
        """Q_S^T V Q_A, [K, O, I]."""
        if self.basis_O is None or self.basis_I is None:
            return gradients_KOI
        return self.basis_O.mT @ gradients_KOI @ self.basis_I

    def rotate_back(self, rotated_KOI: Tensor) -> Tensor:
        """Q_S V Q_A^T, [K, O, I]."""
        if self.basis_O is None or self.basis_I is None:
            return rotated_KOI
        return self.basis_O @ rotated_KOI @ self.basis_I.mT

    def divide(self, rotated_KOI: Tensor) -> Tensor:
        """The inverse in its own basis; zero for a layer without curvature (it saw no token)."""
        if self.damped_OI is None:
            return rotated_KOI
        # Where nothing was seen the gradients are zero too: 0 / 0 is meant to be 0.
        return torch.where(self.damped_OI > 0, rotated_KOI / self.damped_OI, 0.0)

    def solve(self, gradients_KOI: Tensor) -> Tensor:
        """(H + D)^-1 V, [K, O, I]."""
        return self.rotate_back(self.divide(self.rotate(gradients_KOI)))
