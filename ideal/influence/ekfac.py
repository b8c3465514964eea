"""The curvature of one linear layer: factors -> eigenbases -> eigenvalues -> damped inverse.

Pure functions of tensors (George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296).
A layer's weight and its gradients are O x I (out x in), and so are the eigenvalues:

    A = Q_A diag(l_A) Q_A^T  [I, I]        S = Q_S diag(l_S) Q_S^T  [O, O]
    H V = Q_S [ Lambda * (Q_S^T V Q_A) ] Q_A^T

Suffixes: I in, O out, K any number of gradients, k either of I and O.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SUM_CHUNK = 2**18
"""Entries of a gradient that are held in float64 at a time."""
DENSITY_WIDTH = 0.1
"""Of the kernel, in log l, that a spectrum's density is estimated with; a third or three times it changes little."""
SMALLEST = 1e-7
"""Smaller eigenvalues than this part of the largest are taken to be it where a density is asked for."""


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


def overlaps(values_k: Tensor, noise: float) -> Tensor:
    """c_ij^2, [k, k], as expected of the i-th eigenvector of a noisy covariance and the j-th of the exact one, i != j.

    theta l_i l_j / ((l_i - l_j)^2 + G_i G_j), G_i = pi theta l_i (dN / dlog l)(l_i): first-order perturbation theory
    for eigenvalues far apart, and for neighbours what eigenvectors of large random matrices do (Ledoit and Peche 2011,
    arXiv 0911.3010; Bun, Bouchaud and Potters 2018, arXiv 1603.04364). On the diagonal minus the sum of a row's others:
    applied to a function of l, the matrix says how noise changes it.

    Args:
        values_k: l, none negative.
        noise: theta, for which the variance of the entry (i, j) in the exact eigenbasis is theta l_i l_j.
    """
    floor = (SMALLEST * values_k.max()).clamp_min(torch.finfo(values_k.dtype).tiny)
    values_k = values_k.clamp_min(floor)
    apart_kk = values_k.log()[:, None] - values_k.log()
    density_k = (DENSITY_WIDTH / math.pi) * apart_kk.square().add_(DENSITY_WIDTH**2).reciprocal_().sum(1)
    spread_k = math.pi * noise * density_k
    # Numerator and denominator are divided by l_i l_j, which may be too small a number; in place, since k is large.
    distance_kk = apart_kk.div_(2).sinh_().square_().mul_(4).addr_(spread_k, spread_k)
    overlaps_kk = distance_kk.reciprocal_().mul_(noise).fill_diagonal_(0.0)
    overlaps_kk.diagonal().copy_(-overlaps_kk.sum(1))
    return overlaps_kk


def without_basis_noise(
    eigenvalues_OI: Tensor, damping: Tensor, values_O: Tensor, values_I: Tensor, noise: float
) -> Tensor:
    """Lambda', [O, I], for which noisy bases give on average, to first order, the inverse that exact ones would.

    Noisy bases mix directions: eigenvalues in them are C lambda, flatter than lambda, and what is divided by them is
    spread out too. The inverse is right on average if C g = 1 / (lambda + D) for what stands in place of
    1 / (C lambda + D): to first order g = 1 / (lambda + D) - (C - 1) / (lambda + D). Which is how many times as large
    is asked of the Kronecker product of the covariances' eigenvalues, which is smooth; Lambda + D is divided by that.

    Args:
        damping: D, [].
        values_O, values_I: eigenvalues of the noisy S and A.
        noise: theta of both (`overlaps`).
    """
    dtype, mean = eigenvalues_OI.dtype, eigenvalues_OI.mean()
    tiny = torch.finfo(dtype).tiny
    mixing_O, mixing_I = (overlaps(values.to(dtype), noise) for values in (values_O, values_I))
    output_O = values_O.to(dtype) / values_O.mean().to(dtype).clamp_min(tiny)
    input_I = values_I.to(dtype) / values_I.mean().to(dtype).clamp_min(tiny) * mean
    exact_OI = torch.outer(output_O, input_I) + damping
    seen_OI = exact_OI.addr(mixing_O @ output_O, input_I).addr_(output_O, mixing_I @ input_I)
    inverse_OI = exact_OI.clamp_min_(tiny).reciprocal_()
    better_OI = inverse_OI.addmm(mixing_O, inverse_OI, alpha=-1).addmm_(inverse_OI, mixing_I, alpha=-1)
    damped_OI = (eigenvalues_OI + damping).div_(better_OI.mul_(seen_OI))
    return torch.where(mean > 0, damped_OI.sub_(damping), 0.0)


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
