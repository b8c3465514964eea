"""SOURCE, segment-wise unrolled differentiation, for the domains' volumes, adapted to AdamW.

Source: Bae, Lin, Lorraine and Grosse 2024, "Training Data Attribution via Approximate Unrolling", arXiv 2405.12186. The
inner loop is cut into segments in which curvature H_l, gradients and learning rate eta_l are taken as constant (K_l
steps each), and so

    d theta_T / d beta_j = - sum_l [ prod_(m > l) S_m ] r_lj       S_l = exp(-eta_l K_l H_l)
    r_lj = s_j (I - exp(-eta_l K_l H_l)) H_l^-1 g_lj
    M[r, j] = g_r(theta_T)^T d theta_T / d beta_j

where s_j g_lj, the domain's part of a step's mean gradient, stands for the example's g / N. H_l by EK-FAC: both
functions act on its eigenvalues. There is no damping: where H vanishes r is eta K g.

AdamW: a preconditioner P in place of the identity. A step is eta_k P_k g with
P = c / (sqrt(v) + eps), c the factor that gradient clipping leaves of g. A diagonal P does not commute with EK-FAC's
eigenbases, so each layer gets one number in its place, by one of

    mean    the mean of P over its weights
    energy  sum v P / sum v, the factor by which P changes g^T g for gradients as large as v says

Momentum averages gradients without making them larger, so it changes nothing here; weight decay is left out.

Suffixes: R capabilities, n domains, O out, I in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ideal.influence.ekfac import Curvature, inner_products

Averaging = Literal["mean", "energy"]


@dataclass(frozen=True)
class Segment:
    """One layer during one segment."""

    curvature: Curvature
    """The eigenbases; its own damped eigenvalues are not used."""
    eigenvalues_OI: Tensor
    """Lambda, undamped, of the mean loss per trained token."""
    time: float
    """eta_l K_l, the learning rates (times the preconditioner) summed over the segment's steps."""
    gradients_nOI: Tensor
    """The domains' mean gradients per trained token."""


def decay(eigenvalues_OI: Tensor, time: float) -> Tensor:
    """exp(-time l): what is left of an earlier change."""
    return (-time * eigenvalues_OI).exp()


def response(eigenvalues_OI: Tensor, time: float) -> Tensor:
    """(1 - exp(-time l)) / l, and its limit, time, at l = 0."""
    return torch.where(
        eigenvalues_OI > 0, -torch.expm1(-time * eigenvalues_OI) / eigenvalues_OI, torch.full_like(eigenvalues_OI, time)
    )


def source_products(references_ROI: Tensor, segments: Sequence[Segment]) -> Tensor:
    """[R, n] sum_l <g_r, [prod_(m > l) S_m] r_lj / s_j>, one layer's part of M but for -s_j.

    Args:
        references_ROI: the capabilities' mean gradients at the end of training.
        segments: in the order of training.
    """
    total = torch.zeros(len(references_ROI), len(segments[-1].gradients_nOI), dtype=torch.float64)
    carried = references_ROI  # S is symmetric: the references are carried back instead of all domains forward
    for segment in reversed(segments):
        rotated = segment.curvature.rotate(carried)
        answered = segment.curvature.rotate_back(rotated * response(segment.eigenvalues_OI, segment.time))
        total += inner_products(answered, segment.gradients_nOI)
        carried = segment.curvature.rotate_back(rotated * decay(segment.eigenvalues_OI, segment.time))
    return total


def effective_factor(second_moments: Tensor, step: int, beta2: float, epsilon: float, averaging: Averaging) -> float:
    """One number for 1 / (sqrt(v) + eps) of a layer; v with Adam's bias correction.

    Args:
        second_moments: of any shape, the optimizer's exp_avg_sq after `step` steps.
    """
    v = second_moments.double() / (1 - beta2**step)
    inverse = 1 / (v.sqrt() + epsilon)
    return float(inverse.mean() if averaging == "mean" else (v * inverse).sum() / v.sum())


def clipped_rates(rates: Mapping[int, float], norms: Mapping[int, float], most: float, first: int, last: int) -> float:
    """sum over steps first < k <= last of eta_k c_k, with c_k = min(1, most / |g_k|) what clipping leaves of g_k.

    Args:
        rates, norms: by step, the learning rate and the gradient's norm before clipping.
        most: max_grad_norm; 0: no clipping.
    """
    steps = range(first + 1, last + 1)
    return sum(rates[k] * (min(1.0, most / norms[k]) if most and norms[k] else 1.0) for k in steps)
