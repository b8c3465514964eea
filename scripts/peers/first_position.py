"""EK-FAC's influence matrix with each sequence's first position left out of the curvature, or not.

Attention sinks: in some layers of some models the first position alone holds nearly all of trace(A). Written from
the engine's parts, with nothing sampled, so that the engine itself needs no such option; with nothing left out the
result is the engine's.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exchange import Workload
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ideal.influence import DomainSample, InfluenceConfig  # noqa: E402
from ideal.influence.ekfac import Curvature, damping_of, eigenbasis, inner_products  # noqa: E402
from ideal.influence.layers import Group, deal_out, shared_inputs, tracked_layers  # noqa: E402
from ideal.influence.passes import Passes  # noqa: E402
from ideal.influence.products import Products  # noqa: E402
from ideal.influence.samples import draw_domain, whole_reference  # noqa: E402
from ideal.influence.statistics import (  # noqa: E402
    Accumulator,
    Eigenvalues,
    Gradients,
    InputCovariance,
    OutputCovariance,
    Positions,
    frozen,
    make_positions,
)


class WithoutFirst:
    """Hands on every position but each sequence's first; in one process."""

    def __init__(self, accumulator: Accumulator) -> None:
        self.accumulator = accumulator

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's positions at the layers of a group."""
        keep = torch.ones(len(x_NI), dtype=torch.bool, device=x_NI.device)
        keep[positions.starts] = False
        rows = torch.nonzero(keep)[:, 0]
        sizes = [size - 1 for size in positions.sizes]
        sequences = list(zip(sizes, positions.weights, positions.slots, strict=True))
        rest = make_positions(positions.set_index, [sequences], x_NI.device, positions.position_weights.dtype)
        parts = {name: d_NO.index_select(0, rows) for name, d_NO in outputs.items()}
        self.accumulator.add(group, x_NI.index_select(0, rows), parts, rest)


def matrix_without(workload: Workload, model: Any, config: InfluenceConfig, leave_out: bool) -> np.ndarray:
    """M [R, n], its curvature (A, S and the eigenvalues) without first positions, its gradients with all."""
    training = [
        draw_domain(name, DomainSample(rows, np.ones(len(rows), dtype=int)), 1.0, 0)
        for name, rows in workload.domains.items()
    ]
    reference = [whole_reference(name, rows) for name, rows in workload.references.items()]
    total = sum(chosen.total for chosen in training)
    positions = sum(chosen.positions - leave_out * chosen.weights.sum() for chosen in training)
    curved: Callable[[Accumulator], Accumulator] = WithoutFirst if leave_out else lambda accumulator: accumulator
    with frozen(model):
        some = torch.tensor([next(iter(workload.domains.values())).input_ids[0]], device=workload.device)
        groups = shared_inputs(model, tracked_layers(model, workload.layers), some)
        passes = Passes(model, deal_out(groups, 1), config, 0)
        products = Products(passes.dtype, False)

        def zeros(*leading: int) -> dict[str, Tensor]:
            shapes = {name: (size, group.width) for group in groups for name, size in group.outputs.items()}
            return {
                name: torch.zeros(*leading, *shape, dtype=passes.dtype, device=workload.device)
                for name, shape in shapes.items()
            }

        def square(size: int) -> Tensor:
            return torch.zeros(size, size, dtype=passes.dtype, device=workload.device)

        A = {group.name: square(group.width) for group in groups}
        S = {name: square(size) for group in groups for name, size in group.outputs.items()}
        g_n, g_R = zeros(len(training)), zeros(len(reference))
        factors = [curved(InputCovariance(A, products)), curved(OutputCovariance(S, products))]
        passes.run("covariances", groups, training, [*factors, Gradients(g_n, products)])
        Q_A = {name: eigenbasis(matrix / positions)[1] for name, matrix in A.items()}
        bases = {
            name: (eigenbasis(S[name] / positions)[1], Q_A[group.name]) for group in groups for name in group.layers
        }
        squares = zeros()
        passes.run("eigenvalues", groups, training, [curved(Eigenvalues(squares, bases, products, None))])
        passes.run("references", groups, reference, [Gradients(g_R, products)])
    matrix = torch.zeros(len(reference), len(training), dtype=torch.float64)
    for name, eigenvalues in squares.items():
        eigenvalues = eigenvalues / total
        curvature = Curvature(*bases[name], eigenvalues + damping_of(eigenvalues, config.damping))
        matrix -= inner_products(curvature.solve(g_R[name]), g_n[name]).cpu()
    # g_j is domain j's sum over T_j, and s_j = T_j / T.
    return (matrix / torch.tensor([chosen.total for chosen in reference])[:, None] / total).numpy()
