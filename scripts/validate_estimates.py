"""Every estimator's influence matrix at one trained model, each pass over the data made once for all dampings.

The parts are the engine's own (ideal.influence); what it does with one damping is done here with several. Suffixes: R
capabilities, n domains, O out, I in.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from validate_source import Averaging, Segment, clipped_rates, effective_factor, source_products

from ideal.influence import DomainSample, Examples, InfluenceConfig, compute_influence
from ideal.influence.curvature import Curvatures
from ideal.influence.ekfac import Curvature, damping_of, inner_products
from ideal.influence.layers import Group, deal_out, shared_inputs, tracked_layers
from ideal.influence.passes import Passes
from ideal.influence.products import Products
from ideal.influence.samples import SequenceSet, draw_domain, whole_reference
from ideal.influence.statistics import Gradients, frozen
from ideal.influence.storage import opened_store

ALL_LINEAR = ["*_proj"]
"""Attention's projections beside the MLP's."""
DAMPINGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
JOINT_DAMPINGS = (1.0,)
SOURCE_AVERAGING: tuple[Averaging, ...] = ("mean", "energy")


def whole(**settings: object) -> InfluenceConfig:
    """The engine's settings with all of the mixture in every estimate and without standard errors."""
    return replace(
        InfluenceConfig(sample_fraction=1.0, factor_fraction=1.0, error_sequences=0, batch_size=50),
        **settings,  # type: ignore[arg-type]
    )


FAMILIES: dict[str, InfluenceConfig] = {
    "identity": whole(factors="identity"),
    "diagonal": whole(factors="diagonal"),
    "K-FAC": whole(factors="kfac"),
    "EK-FAC": whole(factors="ekfac"),
    "EK-FAC, sampled labels": whole(factors="ekfac", fisher="sampled"),
    "identity, all linear layers": whole(factors="identity", layers=ALL_LINEAR),
    "EK-FAC, all linear layers": whole(factors="ekfac", layers=ALL_LINEAR),
}
JOINT: dict[str, InfluenceConfig] = {
    # Dear: half of the rows, as the engine takes by itself, and fewer iterations.
    "joint": whole(solver="cg", sample_fraction=0.5, solver_iterations=10, batch_size=250, fisher="sampled")
}
"""The Fisher preconditions and sets the damping; the matrix that is solved has no labels in it. On a trained model the
empirical one is far smaller than that matrix, and the solver comes nowhere."""


def label(family: str, damping: float) -> str:
    """An estimator's name."""
    return f"{family} {damping:g}"


def family_of(name: str) -> str:
    """The family in an estimator's name."""
    head, _, last = name.rpartition(" ")
    return head if last.replace(".", "").replace("e-", "").isdigit() else name


@dataclass(frozen=True)
class Mixed:
    """What a model was trained on and is measured by."""

    samples: Mapping[str, DomainSample]
    references: Mapping[str, Examples]
    seed: int

    @property
    def pools(self) -> list[SequenceSet]:
        """[n] all rows of the mixture."""
        return [draw_domain(name, sample, 1.0, self.seed) for name, sample in self.samples.items()]

    @property
    def sets(self) -> list[SequenceSet]:
        """[R] the reference sets."""
        return [whole_reference(name, examples) for name, examples in self.references.items()]

    @property
    def shares(self) -> np.ndarray:
        """[n] s_j."""
        totals = np.array([pool.total for pool in self.pools])
        return totals / totals.sum()


@dataclass(frozen=True)
class Probe:
    """One model, ready for passes over its tracked layers."""

    groups: list[Group]
    passes: Passes
    mixed: Mixed
    config: InfluenceConfig

    def gradients(self, sets: Sequence[SequenceSet]) -> dict[str, Tensor]:
        """Per layer [sets, O, I] mean gradients per trained token."""
        sums = self.passes.per_layer(self.groups, len(sets))
        self.passes.run("gradients", self.groups, sets, [Gradients(sums, self._products)])
        seen = torch.tensor([chosen.seen for chosen in sets], dtype=torch.float64)
        return {name: total / seen.to(total.dtype)[:, None, None] for name, total in sums.items()}

    def curvature(self) -> dict[str, tuple[Curvature, Tensor | None]]:
        """Per layer the bases and the undamped eigenvalues [O, I]; None: the identity's."""
        names = [name for group in self.groups for name in group.layers]
        if self.config.factors == "identity":
            return {name: (Curvature(None, None, None), None) for name in names}
        pools = [pool.rescaled() for pool in self.mixed.pools]
        with opened_store(self.passes.device, False, "disk") as store:
            total = sum(pool.total for pool in pools)
            available = [len(pool.rows) for pool in pools]
            curvatures = Curvatures(
                self.passes, self._products, store, self.config, total, self.groups, available
            )
            curvatures.estimate(self.groups, pools, pools)
            return {
                name: (curvature, store.get("eigenvalues", name))
                for group in self.groups
                for name, curvature in curvatures.of(group).items()
            }

    @property
    def _products(self) -> Products:
        return Products(self.passes.dtype, False)


@contextmanager
def probed(model: nn.Module, mixed: Mixed, config: InfluenceConfig) -> Iterator[Probe]:
    """The model frozen, as the engine has it."""
    layers = tracked_layers(model, config.layers)
    first = mixed.pools[0]
    ids = torch.tensor([first.examples[int(first.rows[0])]["input_ids"]])
    with frozen(model):
        groups = shared_inputs(model, layers, ids)
        yield Probe(groups, Passes(model, deal_out(groups, 1), config, mixed.seed), mixed, config)


def family_matrices(
    model: nn.Module, mixed: Mixed, config: InfluenceConfig, dampings: Sequence[float]
) -> dict[float, np.ndarray]:
    """By damping, M [R, n] in the free form."""
    with probed(model, mixed, config) as probe:
        domains, references = probe.gradients(mixed.pools), probe.gradients(mixed.sets)
        curvature = probe.curvature()
    return {damping: _matrix(domains, references, curvature, damping, mixed.shares) for damping in dampings}


def _matrix(
    domains: Mapping[str, Tensor],
    references: Mapping[str, Tensor],
    curvature: Mapping[str, tuple[Curvature, Tensor | None]],
    damping: float,
    shares: np.ndarray,
) -> np.ndarray:
    total = torch.zeros(0)
    for name, (bases, eigenvalues) in curvature.items():
        solver = bases
        if eigenvalues is not None:
            solver = replace(bases, damped_OI=eigenvalues + damping_of(eigenvalues, damping))
        part = inner_products(solver.solve(references[name]), domains[name])
        total = part if not len(total) else total + part
    return np.asarray(-shares * total.numpy())


@dataclass(frozen=True)
class Trail:
    """What an inner loop left behind besides its model.

    rates, norms: by step, the learning rate and the gradient's norm before clipping.
    clip: max_grad_norm. steps: of the loop. checkpoints: by step, the folders that the Trainer wrote.
    """

    rates: Mapping[int, float]
    norms: Mapping[int, float]
    clip: float
    steps: int
    checkpoints: Mapping[int, Path]

    def bounds(self, segments: int) -> list[tuple[int, int, int]]:
        """Per segment its first step (exclusive), its last, and the checkpoint nearest to its middle."""
        ends = [round(self.steps * number / segments) for number in range(segments + 1)]
        return [
            (first, last, min(self.checkpoints, key=lambda step: abs(step - (first + last) / 2)))
            for first, last in zip(ends, ends[1:], strict=False)
        ]


def second_moments(checkpoint: Path, model: nn.Module) -> tuple[dict[str, Tensor], float, float]:
    """AdamW's exp_avg_sq by parameter's name, its beta2 and epsilon, from the Trainer's optimizer.pt.

    The Trainer has the decayed parameters (all matrices of a Llama) in its first group, in the model's order.
    """
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    group = state["param_groups"][0]
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    moments = dict(zip(names, (state["state"][number]["exp_avg_sq"] for number in group["params"]), strict=True))
    shapes = dict(model.named_parameters())
    assert all(moments[name].shape == shapes[name].shape for name in names), "the optimizer holds other parameters"
    return moments, group["betas"][1], group["eps"]


def source_matrices(
    model: nn.Module, mixed: Mixed, trail: Trail, checkpoints: Mapping[int, nn.Module], segments: int
) -> dict[Averaging, np.ndarray]:
    """By averaging of the preconditioner, SOURCE's M [R, n] in the free form.

    Args:
        model: at the end of training.
        checkpoints: by step, the models that `trail.bounds` asks for.
    """
    config = FAMILIES["EK-FAC"]
    with probed(model, mixed, config) as probe:
        references = probe.gradients(mixed.sets)
    layers: dict[Averaging, dict[str, list[Segment]]] = {
        averaging: {name: [] for name in references} for averaging in SOURCE_AVERAGING
    }
    for first, last, step in trail.bounds(segments):
        moments, beta2, epsilon = second_moments(trail.checkpoints[step], checkpoints[step])
        rate = clipped_rates(trail.rates, trail.norms, trail.clip, first, last)
        with probed(checkpoints[step], mixed, config) as probe:
            domains, curvature = probe.gradients(mixed.pools), probe.curvature()
        for name, (bases, eigenvalues) in curvature.items():
            assert eigenvalues is not None
            for averaging in SOURCE_AVERAGING:
                factor = effective_factor(moments[f"{name}.weight"], step, beta2, epsilon, averaging)
                layers[averaging][name].append(Segment(bases, eigenvalues, rate * factor, domains[name]))
    return {
        averaging: np.asarray(
            -mixed.shares * sum(source_products(references[name], found[name]).numpy() for name in references)
        )
        for averaging, found in layers.items()
    }


def all_matrices(
    model: nn.Module,
    mixed: Mixed,
    families: Mapping[str, InfluenceConfig],
    dampings: Sequence[float],
    joint: Mapping[str, InfluenceConfig],
    joint_dampings: Sequence[float],
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """M [R, n] by estimator, all but SOURCE; and what the joint solver said of itself."""
    found: dict[str, np.ndarray] = {}
    for family, config in families.items():
        bare = config.factors == "identity"
        matrices = family_matrices(model, mixed, config, dampings[:1] if bare else dampings)
        found |= {family if bare else label(family, damping): matrix for damping, matrix in matrices.items()}
    solver: dict[str, object] = {}
    for family, config in joint.items():
        for damping in joint_dampings:
            settings = replace(config, damping=damping)
            influence = compute_influence(model, mixed.samples, mixed.references, settings, mixed.seed)
            found[label(family, damping)] = influence.matrix
            solver[label(family, damping)] = influence.solver
    return found, solver
