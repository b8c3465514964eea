"""The curvature of the tracked layers, estimated at their owners and kept until it is asked for.

1 covariances and 2 eigenbases, 3 eigenvalues; the mathematics is in ekfac.py, what is summed in
statistics.py. Suffixes: n domains, I in, O out.
"""

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ideal.distributed import all_reduce_
from ideal.errors import UserError
from ideal.influence.config import InfluenceConfig
from ideal.influence.ekfac import (
    Curvature,
    damping_of,
    eigenbasis,
    kfac_eigenvalues,
    without_basis_noise,
    without_noise,
)
from ideal.influence.layers import Group, widest
from ideal.influence.passes import Passes
from ideal.influence.products import Products
from ideal.influence.samples import SequenceSet, how_many
from ideal.influence.sketch import SUMS_PER_DIMENSION, Sketch, probes
from ideal.influence.statistics import (
    Accumulator,
    Eigenvalues,
    Gradients,
    Halves,
    InputCovariance,
    InputNorms,
    OutputCovariance,
    Traces,
)
from ideal.influence.storage import Store

BASIS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Bases = dict[str, tuple[Tensor | None, Tensor | None]]
"""Per layer Q_S [O, O] and Q_A [I, I]; None stands for the identity."""


class FirstPositions:
    """How much of trace(A) the first positions hold, per layer: attention sinks live there."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.norms: dict[str, Tensor] = {}

    def accumulators(self, part: Sequence[Group]) -> list[Accumulator]:
        """For one pass, of the owned groups that no pass has seen yet."""
        new = {g.name: self.passes.zeros(2) for g in self.passes.owned(part) if g.name not in self.norms}
        self.norms.update(new)
        return [InputNorms(new)] if new else []

    def shares(self, groups: Sequence[Group]) -> dict[str, float]:
        """Per layer; nan if it saw no token."""
        norms = torch.stack([self.norms.get(group.name, self.passes.zeros(2)) for group in groups])
        shares: dict[str, float] = {}
        for group, (first, every) in zip(groups, all_reduce_(norms).tolist(), strict=True):
            shares |= dict.fromkeys(group.layers, first / every if every else math.nan)
        return shares


class Curvatures:
    """H + D of every owned layer, from part of the domains' sequences."""

    def __init__(
        self,
        passes: Passes,
        products: Products,
        store: Store,
        config: InfluenceConfig,
        total: float,
        groups: Sequence[Group],
        available: Sequence[int],
    ) -> None:
        """Args:
        total: T, the mixture's trained tokens, which the sequences' weights sum to.
        groups: all that have a curvature, of all ranks.
        available: [n] sequences of each domain that eigenvalues might be estimated on.
        """
        self.passes, self.products, self.store, self.config, self.total = passes, products, store, config, total
        self.first_positions = FirstPositions(passes)
        self.widest, self.layers = widest(groups), sum(len(group.layers) for group in groups)
        self.available = available
        # Per owned layer D [], and the trace that the covariances' sequences have over that of the eigenvalues'.
        self.damping: dict[str, Tensor] = {}
        self.ratios: dict[str, float] = {}
        self.scale = 1.0
        # Of the part's covariances: sums as part of the positions, the noise of these, and per owned layer the
        # eigenvalues [O] and [I].
        self.sketch_fraction, self.noise = 1.0, 0.0
        self.spectra: dict[str, tuple[Tensor, Tensor]] = {}

    def estimate(
        self,
        part: list[Group],
        factors: list[SequenceSet],
        corrected: list[SequenceSet],
        gradients: dict[str, Tensor] | None = None,
        early: Collection[int] = (),
        label: str = "",
        again: Sequence[SequenceSet] = (),
    ) -> None:
        """Phases 1 to 3 for these layers; replaces an earlier estimate.

        Args:
            factors: the covariances' sequences, [n], weighted so that they stand for the domains.
            corrected: the eigenvalues', likewise.
            gradients: per owned layer [n, O, I]; takes up sums of gradients G times their repeats, those of
                `factors` for the domains in `early`, and Q_S^T G Q_A of those of `corrected` for the others.
            again: sequences that these layers will need after this.
        """
        if self.config.factors == "identity":
            return
        self.store.drop({name for group in part for name in group.layers})
        bases: Bases = {name: (None, None) for group in self.passes.owned(part) for name in group.layers}
        traces: list[Traces] = []
        if self.config.factors in ("ekfac", "kfac"):
            if self.config.factors == "ekfac" and how_many(factors) > how_many(corrected):
                traces = self._traces(part)
            taking = [Gradients(gradients, self.products, early)] if gradients and early else []
            needed = [*corrected, *again] if self.config.factors == "ekfac" else again
            bases = self._eigenbases(part, factors, [*traces[:1], *taking], label, needed)
        if self.config.factors in ("ekfac", "diagonal"):
            late = set(range(len(corrected))).difference(early)
            self._correct_eigenvalues(part, corrected, bases, gradients, late, traces, label, again)
            with self.passes.timed("eigenvalues"):
                for sums in (gradients or {}).values():
                    for number, total in enumerate(sums):
                        total /= (factors if number in early else corrected)[number].scale or 1.0
        self._set_scale()

    def _traces(self, part: list[Group]) -> list[Traces]:
        """For the covariances' sequences and for the eigenvalues'.

        Few sequences tell the shape of the spectrum better than its size, which scales the damped inverse: some
        gradients are much larger than the others, and so at all layers.
        """
        sizes = {name: size for group in self.passes.owned(part) for name, size in group.outputs.items()}
        drawn = {
            name: probes(name, size, self.layers, self.passes.seed, self.passes.dtype, self.passes.device)
            for name, size in sizes.items()
        }
        zero = torch.zeros((), dtype=torch.float64, device=self.passes.device)
        return [Traces({name: zero.clone() for name in sizes}, drawn) for _ in range(2)]

    def _eigenbases(
        self,
        part: list[Group],
        factors: list[SequenceSet],
        beside: Sequence[Accumulator],
        label: str,
        again: Sequence[SequenceSet],
    ) -> Bases:
        """Q_S and Q_A, which take the factors' place in memory; with K-FAC the eigenvalues too.

        beside: what sees the same pass.
        """
        zeros, owned = self.passes.zeros, self.passes.owned(part)
        inputs = {group.name: zeros(group.width, group.width) for group in owned}
        outputs = {name: zeros(size, size) for group in owned for name, size in group.outputs.items()}
        sketch, self.noise = self._sketch(factors)
        accumulators: list[Accumulator] = [
            InputCovariance(inputs, self.products, sketch),
            OutputCovariance(outputs, self.products, sketch),
            *beside,
        ]
        self._run("covariances", part, factors, accumulators, label, again)
        positions = sum(chosen.positions for chosen in factors)
        with self.passes.timed("eigenbases"):
            self._check([*inputs.values(), *outputs.values()])
            of_inputs = {name: self._decompose(total, positions) for name, total in _consumed(inputs)}
            of_outputs = {name: self._decompose(total, positions) for name, total in _consumed(outputs)}
        bases: Bases = {}
        for group in owned:
            values_I, basis_I = of_inputs[group.name]
            self.store.put("basis_I", group.name, basis_I)
            for name in group.layers:
                values_O, basis_O = of_outputs[name]
                self.store.put("basis_O", name, basis_O)
                bases[name] = basis_O, basis_I
                self.spectra[name] = values_O, values_I
                if self.config.factors == "kfac":
                    eigenvalues = kfac_eigenvalues(values_O, values_I, positions, self.total)
                    self._keep(name, eigenvalues.to(self.passes.dtype))
        return bases

    def _sketch(self, factors: list[SequenceSet]) -> tuple[Sketch, float]:
        """Of as many sums as the widest layer asks for, whatever the configuration says; and its noise."""
        sizes = np.concatenate([chosen.examples.positions[chosen.rows] for chosen in factors])
        weights = np.concatenate([chosen.weights for chosen in factors])
        least = SUMS_PER_DIMENSION * self.widest / max(float(sizes.sum()), 1.0)
        self.sketch_fraction = min(1.0, max(self.config.fractions.sketch_fraction, least))
        sketch = Sketch(self.sketch_fraction, [chosen.name for chosen in factors], self.passes.seed)
        return sketch, sketch.noise(sizes, weights)

    def _check(self, totals: Sequence[Tensor]) -> None:
        """Whether all ranks' covariances are finite: they decide together, and wait for a GPU once."""
        bad = torch.zeros((), dtype=torch.float64, device=self.passes.device)
        for total in totals:
            bad += ~total.isfinite().all()
        if not bool(all_reduce_(bad) == 0):
            raise UserError("influence: the layers' statistics are not finite; did training diverge?")

    def _decompose(self, total: Tensor, positions: float) -> tuple[Tensor, Tensor]:
        values, vectors = eigenbasis(total.div_(positions))
        exact = self.passes.dtype == torch.float64
        return values, vectors if exact else vectors.to(BASIS_DTYPES[self.config.basis_dtype])

    def _correct_eigenvalues(
        self,
        part: list[Group],
        corrected: list[SequenceSet],
        bases: Bases,
        gradients: dict[str, Tensor] | None,
        late: Collection[int],
        traces: list[Traces],
        label: str,
        again: Sequence[SequenceSet],
    ) -> None:
        """Lambda, and the gradients of the domains in `late`, in the bases."""
        shapes = {name: (size, g.width) for g in self.passes.owned(part) for name, size in g.outputs.items()}
        sums = {name: self.passes.zeros(*shape) for name, shape in shapes.items()}
        most, halves = self._halves(shapes, corrected)
        accumulator = Eigenvalues(sums, bases, self.products, gradients, late, halves)
        self._run("eigenvalues", part, corrected, [accumulator, *traces[1:]], label, again)
        with self.passes.timed("eigenvalues"):
            for name, total in _consumed(sums):
                variances = None
                if halves:
                    other = halves.sums.pop(name)
                    variances = (total - other).div_(self.total).square_().mul_(most)
                    total += other
                self._keep(name, total.div_(self.total), variances)
        if traces:
            known, here = (torch.stack([*trace.sums.values()]).tolist() if shapes else [] for trace in traces)
            self.ratios |= {
                name: one / other for name, one, other in zip(shapes, known, here, strict=True) if one and other
            }

    def _halves(
        self, shapes: dict[str, tuple[int, int]], corrected: list[SequenceSet]
    ) -> tuple[float, Halves | None]:
        """The second sums [O, I] per layer, and the finite-population factor of the domain that is left out most.

        (0.0, None) where all sequences are used: then the eigenvalues have no noise.
        """
        counts = zip(corrected, self.available, strict=True)
        left_out = [1 - len(some.rows) / every if every else 0.0 for some, every in counts]
        most = max(left_out)
        if not most:
            return most, None
        zeros = {name: self.passes.zeros(*shape) for name, shape in shapes.items()}
        return most, Halves(zeros, [math.sqrt(share / most) for share in left_out])

    def _keep(self, name: str, eigenvalues_OI: Tensor, variances_OI: Tensor | None = None) -> None:
        """Puts Lambda and D where `of` finds them. variances: [O, I] of Lambda about that of all sequences."""
        self.damping[name] = damping_of(eigenvalues_OI, self.config.damping)
        if variances_OI is not None:
            eigenvalues_OI = without_noise(eigenvalues_OI, variances_OI, self.damping[name])
        if self.noise and self.config.factors == "ekfac":
            eigenvalues_OI = without_basis_noise(eigenvalues_OI, self.damping[name], *self.spectra[name], self.noise)
        self.store.put("eigenvalues", name, eigenvalues_OI)

    def _set_scale(self) -> None:
        """What Lambda and D are multiplied with: the layers' geometric mean, since one alone has few probes."""
        logs = torch.tensor([sum(map(math.log, self.ratios.values())), len(self.ratios)], dtype=torch.float64)
        total, count = all_reduce_(logs.to(self.passes.device)).tolist()
        self.scale = math.exp(total / count) if count else 1.0

    def _run(
        self,
        description: str,
        part: list[Group],
        sets: list[SequenceSet],
        sums: list[Accumulator],
        label: str,
        again: Sequence[SequenceSet],
    ) -> None:
        sums = [*sums, *self.first_positions.accumulators(part)]
        self.passes.run(description, part, sets, sums, self.config.fisher == "sampled", label, again)

    def of(self, group: Group) -> dict[str, Curvature]:
        """H + D of each of an owned group's layers."""
        if self.config.factors == "identity":
            return {name: Curvature(None, None, None) for name in group.layers}
        basis_I = self._basis("basis_I", group.name)
        return {
            name: Curvature(
                self._basis("basis_O", name),
                basis_I,
                (self.store.get("eigenvalues", name) + self.damping[name]) * self.scale,
            )
            for name in group.layers
        }

    def damping_of(self, groups: Sequence[Group]) -> dict[str, float]:
        """D_l of each of these owned groups' layers, in the units of H."""
        names = [name for group in groups for name in group.layers]
        values = torch.stack([self.damping[name] for name in names]).tolist() if names else []
        return {name: value * self.scale for name, value in zip(names, values, strict=True)}

    def _basis(self, kind: str, name: str) -> Tensor | None:
        return None if self.config.factors == "diagonal" else self._exact(self.store.get(kind, name))

    def _exact(self, basis: Tensor | None) -> Tensor | None:
        return None if basis is None else basis.to(self.passes.dtype)

    def least_important(self, groups: list[Group]) -> set[str]:
        """The layers that `keep_layers` leaves out: those whose eigenvalues vary most."""
        names = [name for group in groups for name in group.layers]
        kept = math.ceil(self.config.keep_layers * len(names))
        if kept == len(names) or self.config.factors == "identity":
            return set()
        variances = torch.zeros(len(names), dtype=torch.float64, device=self.passes.device)
        owned = {name for group in self.passes.owned(groups) for name in group.layers}
        for number, name in enumerate(names):
            if name in owned:
                variances[number] = self.store.get("eigenvalues", name).double().var()
        order = np.argsort(all_reduce_(variances).cpu().numpy(), kind="stable")
        return {names[number] for number in order[kept:]}


def _consumed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Items that are let go of as soon as the next one is asked for."""
    while tensors:
        name = next(iter(tensors))
        yield name, tensors.pop(name)
