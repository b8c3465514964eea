"""The outer step's influence matrix: phases over layers and sequences.

    M[r, j] = dL_r / dbeta_j = - s_j g_r^T (H + D)^-1 g_j,        summed over the tracked layers

1 covariances and 2 eigenbases, 3 eigenvalues, from part of the domains' sequences; 4 the capabilities'
gradients g_r, and 5 V_r = (H + D)^-1 g_r; 6 the domains' other sequences; 7 M; 8 the reference sets once
more, for the standard errors. A layer's statistics exist on one rank, its group's owner. Suffixes: R
capabilities, n domains, I in, O out; the rest in statistics.py.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ideal.distributed import all_reduce_, rank, world_size
from ideal.errors import UserError
from ideal.influence.config import InfluenceConfig
from ideal.influence.ekfac import Curvature, damped, eigenbasis, inner_products, kfac_eigenvalues
from ideal.influence.layers import Group, deal_out, lay_out, shared_inputs, tracked_layers
from ideal.influence.matrix import ratio_covariance
from ideal.influence.passes import Passes
from ideal.influence.products import Products
from ideal.influence.samples import (
    DomainSample,
    Examples,
    SequenceSet,
    draw_domain,
    factor_parts,
    picked_for_errors,
    whole_reference,
)
from ideal.influence.statistics import (
    Accumulator,
    Eigenvalues,
    Gradients,
    InputCovariance,
    InputNorms,
    OutputCovariance,
    Scores,
    frozen,
)
from ideal.influence.storage import Store, opened_store

BASIS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """Those that the curvature was estimated on."""
    tokens: dict[str, int]
    """The sequences' trained tokens, per domain; a repeated sequence counts once."""
    reference_sequences: dict[str, int]
    """Sequences used, per capability."""
    reference_tokens: dict[str, int]
    """Their trained tokens, per capability."""
    solver: dict[str, object]
    """Of the joint solver: its iterations and residuals; empty without it."""
    seconds: dict[str, float]
    """Per phase."""


def compute_influence(
    model: nn.Module,
    domains: Mapping[str, DomainSample],
    references: Mapping[str, Examples],
    config: InfluenceConfig,
    seed: int,
) -> Influence:
    """The influence of every domain's volume on every capability's loss, at the model's parameters.

    Every rank calls it with the same arguments and gets the same result. The model is left as it was.

    Args:
        model: a causal language model as in transformers, not wrapped in DDP; on one device.
        domains: the mixture that it was trained on, per domain.
        references: the reference set of each capability; all rows are used.
        config: the estimator.
        seed: decides which rows are sampled and, for the sampled Fisher, their labels.

    Raises:
        UserError: no trained token in the mixture or in a reference set, `config.layers` match no
            linear layer, one layer alone exceeds `config.memory_budget`, or the curvature is not finite.
    """
    # With auto all rows are drawn, in random order, and taken from the front.
    fraction = 1.0 if config.sample_fraction == "auto" else config.sample_fraction
    training = [draw_domain(name, domain, fraction, seed) for name, domain in domains.items()]
    reference = [whole_reference(name, examples) for name, examples in references.items()]
    _check_tokens(training, reference)
    layers = tracked_layers(model, config.layers)
    with frozen(model):
        first = next(chosen for chosen in training if len(chosen.rows))
        ids = torch.tensor([first.examples[int(first.rows[0])]["input_ids"]], device=next(model.parameters()).device)
        engine = _Engine(model, shared_inputs(model, layers, ids), training, reference, config, seed)
        with opened_store(engine.passes.device, engine.layout.spilled, config.spill) as store:
            return engine.run(store)


def _check_tokens(training: list[SequenceSet], reference: list[SequenceSet]) -> None:
    if not sum(domain.total for domain in training):
        raise UserError("influence: the mixture has no trained token")
    for capability in reference:
        if not capability.total:
            raise UserError(f"influence: the reference set of {capability.name!r} has no trained token")


@dataclass
class _Sample:
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
        return ratio_covariance(
            repeats[:, None] * self.scores.cpu().numpy()[slots],
            repeats * self.sequences.tokens,
            inner,
            used=len(whole.rows),
            population=whole.population,
        )


@dataclass
class _Engine:
    """The phases, and what they hand on."""

    model: nn.Module
    groups: list[Group]
    training: list[SequenceSet]
    reference: list[SequenceSet]
    config: InfluenceConfig
    seed: int
    store: Store = field(init=False)
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """[n, O, I] the domains' summed gradients so far, per owned layer."""
    norms: dict[str, Tensor] = field(default_factory=dict)
    """Per group, squared norms of first and of all inputs."""

    def __post_init__(self) -> None:
        self.passes = Passes(self.model, deal_out(self.groups, world_size()), self.config, self.seed)
        self.dtype, self.device = self.passes.dtype, self.passes.device
        self.products = Products(self.dtype, self.config.product_dtype == "bfloat16")
        sizes = len(self.training), len(self.reference), self.dtype.itemsize
        self.layout = lay_out(self.groups, self.passes.owners, self.config, *sizes)
        widest = max(max(group.width, *group.outputs.values()) for group in self.groups)
        self.factors = factor_parts(self.training, self.config.factor_fraction, widest)
        self.total = sum(chosen.total for chosen in self.training)
        self.shares = np.array([chosen.total / self.total for chosen in self.training])
        # With the examples' own labels the pass for the eigenvalues gives these sequences' gradients too.
        self.reuse = (
            self.config.factors in ("ekfac", "diagonal") and self.config.fisher == "empirical" and self.layout.whole
        )
        self.rest = [
            chosen.without(factors) if self.reuse else chosen
            for chosen, factors in zip(self.training, self.factors, strict=True)
        ]

    def run(self, store: Store) -> Influence:
        """All phases."""
        self.store = store
        if self.config.factors != "identity":
            for number, part in enumerate(self.layout.factor_parts):
                self._estimate_curvature(part, _label(number, self.layout.factor_parts))
        dropped = self._least_important()
        self._pick_sequences()
        for number, part in enumerate(self.layout.gradient_parts):
            kept = [group.only(set(group.layers) - dropped) for group in part]
            self._add_matrices([group for group in kept if group.layers], _label(number, self.layout.gradient_parts))
        return self._result(dropped)

    def owned(self, groups: list[Group]) -> list[Group]:
        """Those whose statistics are this rank's."""
        return [group for group in groups if self.passes.owners[group.name] == rank()]

    # 1 to 3: the curvature

    def _estimate_curvature(self, part: list[Group], label: str) -> None:
        owned = self.owned(part)
        names = [name for group in owned for name in group.layers]
        bases: dict[str, tuple[Tensor | None, Tensor | None]] = dict.fromkeys(names, (None, None))
        eigenvalues = {}
        if self.config.factors in ("ekfac", "kfac"):
            for name, (basis_O, basis_I, values_O, values_I) in self._eigenbases(part, label).items():
                bases[name] = basis_O, basis_I
                if self.config.factors == "kfac":
                    positions = sum(chosen.positions for chosen in self.factors)
                    eigenvalues[name] = kfac_eigenvalues(values_O, values_I, positions, self.total).to(self.dtype)
        if self.config.factors != "kfac":
            eigenvalues = self._corrected_eigenvalues(part, bases, label)
        for group in owned:
            for name in group.layers:
                self.store.put("eigenvalues", name, eigenvalues[name])
                self._put_basis("basis_O", name, bases[name][0])
            self._put_basis("basis_I", group.name, bases[group.name][1])

    def _eigenbases(self, part: list[Group], label: str) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Per owned layer Q_S, Q_A, l_S, l_A; the bases take the factors' place in memory."""
        inputs = {group.name: self._zeros(group.width, group.width) for group in self.owned(part)}
        outputs = {name: self._zeros(size, size) for group in self.owned(part) for name, size in group.outputs.items()}
        accumulators: list[Accumulator] = [
            InputCovariance(inputs, self.products),
            OutputCovariance(outputs, self.products),
        ]
        self._factor_pass("covariances", part, accumulators, label)
        positions = sum(chosen.positions for chosen in self.factors)
        dtype = self.dtype if self.config.basis_dtype == "float32" else BASIS_DTYPES[self.config.basis_dtype]
        with self.passes.timed("eigenbases"):
            of_inputs = {name: self._decompose(total, positions, dtype) for name, total in _consumed(inputs)}
            of_outputs = {name: self._decompose(total, positions, dtype) for name, total in _consumed(outputs)}
        return {
            name: (of_outputs[name][1], of_inputs[group.name][1], of_outputs[name][0], of_inputs[group.name][0])
            for group in self.owned(part)
            for name in group.layers
        }

    def _decompose(self, total: Tensor, positions: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        total /= positions
        if not bool(total.isfinite().all()):
            raise UserError("influence: the layers' statistics are not finite; did training diverge?")
        values, vectors = eigenbasis(total)
        return values, vectors.to(dtype)

    def _corrected_eigenvalues(
        self, part: list[Group], bases: dict[str, tuple[Tensor | None, Tensor | None]], label: str
    ) -> dict[str, Tensor]:
        """Per owned layer Lambda [O, I]; with `reuse`, the domains' gradients of these sequences too."""
        shapes = {name: (size, group.width) for group in self.owned(part) for name, size in group.outputs.items()}
        sums = {name: self._zeros(*shape) for name, shape in shapes.items()}
        if self.reuse:
            self.gradients = {name: self._zeros(len(self.training), *shape) for name, shape in shapes.items()}
        gradients = self.gradients if self.reuse else None
        self._factor_pass("eigenvalues", part, [Eigenvalues(sums, bases, self.products, gradients)], label)
        for name, rotated in self.gradients.items():
            curvature = Curvature(*bases[name], None)
            for number, factors in enumerate(self.factors):
                rotated[number] = curvature.rotate_back(rotated[number]) / (factors.scale or 1.0)
        return {name: total / self.total for name, total in sums.items()}

    def _factor_pass(self, description: str, part: list[Group], accumulators: list[Accumulator], label: str) -> None:
        accumulators = [*accumulators, *self._norms_of(part)]
        sampled = accumulators if self.config.fisher == "sampled" else []
        self.passes.run(description, part, self.factors, [] if sampled else accumulators, sampled, label)

    def _norms_of(self, part: list[Group]) -> list[InputNorms]:
        """An accumulator of the inputs' norms, unless they are known."""
        missing = [group for group in self.owned(part) if group.name not in self.norms]
        new = {group.name: self._zeros(2) for group in missing}
        self.norms.update(new)
        return [InputNorms(new)] if new else []

    def _curvatures(self, group: Group) -> dict[str, Curvature]:
        """H + D of each of the group's layers."""
        if self.config.factors == "identity":
            return {name: Curvature(None, None, None) for name in group.layers}
        basis_I = self._stored_basis("basis_I", group.name)
        return {
            name: Curvature(
                self._stored_basis("basis_O", name),
                basis_I,
                damped(self.store.get("eigenvalues", name), self.config.damping),
            )
            for name in group.layers
        }

    def _put_basis(self, kind: str, name: str, basis: Tensor | None) -> None:
        if basis is not None:
            self.store.put(kind, name, basis)

    def _stored_basis(self, kind: str, name: str) -> Tensor | None:
        if self.config.factors == "diagonal":
            return None
        return self.store.get(kind, name).to(self.dtype)

    def _least_important(self) -> set[str]:
        """The layers that `keep_layers` leaves out: those whose eigenvalues vary most."""
        names = [name for group in self.groups for name in group.layers]
        kept = math.ceil(self.config.keep_layers * len(names))
        if kept == len(names) or self.config.factors == "identity":
            return set()
        variances = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        owned = {name for group in self.owned(self.groups) for name in group.layers}
        for number, name in enumerate(names):
            if name in owned:
                variances[number] = self.store.get("eigenvalues", name).double().var()
        order = np.argsort(all_reduce_(variances).cpu().numpy(), kind="stable")
        return {names[number] for number in order[kept:]}

    # 4 to 8: gradients, the matrix and its errors

    def _pick_sequences(self) -> None:
        """Which sequences are scored: in the streamed form all of the domains', else those for the errors."""
        wanted = self.config.error_sequences
        n, R = len(self.training), len(self.reference)
        picks = [
            # A domain that is used whole has no sampling error.
            chosen
            if self.layout.streamed
            else picked_for_errors(
                chosen, rest, 0 if len(chosen.rows) == chosen.population else wanted, "domain", self.seed
            )
            for chosen, rest in zip(self.training, self.rest, strict=True)
        ]
        self.training_samples = [self._sample(pick, whole, R) for pick, whole in zip(picks, self.training, strict=True)]
        picks = [picked_for_errors(chosen, chosen, wanted, "reference", self.seed) for chosen in self.reference]
        self.reference_samples = [
            self._sample(pick, whole, n) for pick, whole in zip(picks, self.reference, strict=True)
        ]

    def _sample(self, sequences: SequenceSet, whole: SequenceSet, directions: int) -> _Sample:
        return _Sample(sequences, torch.zeros(len(whole.rows), directions, dtype=torch.float64, device=self.device))

    def _add_matrices(self, part: list[Group], label: str) -> None:
        """These layers' parts of M, and of the scores."""
        directions = self._reference_gradients(part, label)
        with self.passes.timed("inverse"):
            self._solve_(part, directions)
        if not self.layout.streamed and not self.reuse:
            self.gradients = self._per_layer(part, len(self.training))
        streams = {name: torch.zeros(len(self.reference), len(self.training), dtype=torch.float64, device=self.device) for name in directions} if self.layout.streamed else None  # fmt: skip
        self._domain_pass(part, directions, streams, label)
        seen = torch.tensor([chosen.seen or 1.0 for chosen in self.training], dtype=torch.float64, device=self.device)
        with self.passes.timed("matrix"):
            if streams is None:
                for sums in self.gradients.values():
                    sums /= seen.to(self.dtype)[:, None, None]
                products = {name: inner_products(directions[name], self.gradients[name]) for name in directions}
            else:
                products = {name: stream / seen for name, stream in streams.items()}
            self._note(part, products)
        directions.clear()
        if self.config.error_sequences and not self.layout.streamed and self.config.solver == "direct":
            with self.passes.timed("inverse"):
                self._solve_(part, self.gradients)
            self._score("reference errors", part, self.reference_samples, self.gradients, label)
        self.gradients = {}

    def _reference_gradients(self, part: list[Group], label: str) -> dict[str, Tensor]:
        """[R, O, I] the capabilities' mean gradients, per owned layer."""
        sums = self._per_layer(part, len(self.reference))
        self.passes.run("reference gradients", part, self.reference, [Gradients(sums, self.products)], part=label)
        for tensor in sums.values():
            for number, chosen in enumerate(self.reference):
                tensor[number] /= chosen.seen
        return sums

    def _solve_(self, part: list[Group], gradients: dict[str, Tensor]) -> None:
        """(H + D)^-1 V in place of the owned layers' V [K, O, I]."""
        for group in self.owned(part):
            for name, curvature in self._curvatures(group).items():
                # One at a time: what the solution needs on the way is one gradient's size, not K.
                for gradient_OI in gradients[name]:
                    gradient_OI.copy_(curvature.solve(gradient_OI))

    def _domain_pass(
        self, part: list[Group], directions: dict[str, Tensor], streams: dict[str, Tensor] | None, label: str
    ) -> None:
        """The domains' gradients, or in the streamed form their products with V_r, and the picked scores."""
        samples = self.training_samples
        inside = [
            np.isin(sample.sequences.slots, rest.slots).all() for sample, rest in zip(samples, self.rest, strict=True)
        ]
        accumulators: list[Accumulator] = [*self._norms_of(part)]
        if streams is None:
            accumulators.append(Gradients(self.gradients, self.products))
        if streams is not None or self.config.error_sequences:
            picked = [sample.slots if here else set() for sample, here in zip(samples, inside, strict=True)]
            tables = [sample.scores for sample in samples]
            accumulators.append(Scores(tables, picked, directions, self.products, streams))
        self.passes.run("domain gradients", part, self.rest, accumulators, part=label)
        if not all(inside) and self.config.error_sequences:
            nothing = np.zeros(0, dtype=np.int64)
            left = [
                _Sample(sample.sequences.part(nothing), sample.scores) if here else sample
                for sample, here in zip(samples, inside, strict=True)
            ]
            self._score("domain errors", part, left, directions, label)

    def _score(
        self, description: str, part: list[Group], samples: list[_Sample], directions: dict[str, Tensor], label: str
    ) -> None:
        """Adds these layers' part to the samples' scores along V [K, O, I]."""
        tables, picked = [sample.scores for sample in samples], [sample.slots for sample in samples]
        sets = [sample.sequences for sample in samples]
        self.passes.run(description, part, sets, [Scores(tables, picked, directions, self.products)], part=label)

    def _note(self, part: list[Group], products: dict[str, Tensor]) -> None:
        """Takes up the layers' parts of M from their owners' <V_r, g_j>, [R, n] each."""
        for group in part:
            for name in group.layers:
                shape = len(self.reference), len(self.training)
                table = products.get(name, torch.zeros(shape, dtype=torch.float64, device=self.device))
                self.layers[name] = -self.shares * all_reduce_(table).cpu().numpy()
                if not np.isfinite(self.layers[name]).all():
                    raise UserError(f"influence: the statistics of {name} are not finite; did training diverge?")

    def _result(self, dropped: set[str]) -> Influence:
        """What all parts give together."""
        matrix = np.sum(list(self.layers.values()), axis=0)
        return Influence(
            domains=[domain.name for domain in self.training],
            capabilities=[capability.name for capability in self.reference],
            matrix=matrix,
            training_covariance=self._training_covariance(matrix),
            reference_covariance=self._reference_covariance(matrix),
            shares=self.shares,
            layers=self.layers,
            dropped_layers=[name for group in self.groups for name in group.layers if name in dropped],
            first_position_share=self._first_position_share(),
            sequences={domain.name: len(domain.rows) for domain in self.training},
            factor_sequences={
                domain.name: len(domain.rows) if self.config.factors != "identity" else 0 for domain in self.factors
            },
            tokens={domain.name: int(domain.tokens.sum()) for domain in self.training},
            reference_sequences={capability.name: len(capability.rows) for capability in self.reference},
            reference_tokens={capability.name: int(capability.tokens.sum()) for capability in self.reference},
            solver={},
            seconds=self.passes.seconds,
        )

    def _training_covariance(self, matrix: np.ndarray) -> np.ndarray:
        """[n, R, R], of -s_j <g_j, V_r> in g_j."""
        found = np.full((len(self.training), *[len(self.reference)] * 2), math.nan)
        if not self.config.error_sequences:
            return found
        for number, (chosen, sample) in enumerate(zip(self.training, self.training_samples, strict=True)):
            all_reduce_(sample.scores)
            share = self.shares[number]
            found[number] = 0.0
            if share:
                found[number] = share**2 * sample.covariance(chosen, -matrix[:, number] / share)
        return found

    def _reference_covariance(self, matrix: np.ndarray) -> np.ndarray:
        """[R, n, n], of -s_j <g_r, V_j> in g_r."""
        found = np.full((len(self.reference), *[len(self.training)] * 2), math.nan)
        if not self.config.error_sequences or self.layout.streamed or self.config.solver != "direct":
            return found
        inner = np.divide(-matrix, self.shares, out=np.zeros_like(matrix), where=self.shares > 0)
        for number, (chosen, sample) in enumerate(zip(self.reference, self.reference_samples, strict=True)):
            all_reduce_(sample.scores)
            found[number] = np.outer(self.shares, self.shares) * sample.covariance(chosen, inner[number])
        return found

    def _first_position_share(self) -> dict[str, float]:
        shares: dict[str, float] = {}
        for group in self.groups:
            first, every = all_reduce_(self.norms.get(group.name, self._zeros(2))).tolist()
            shares |= dict.fromkeys(group.layers, first / every if every else math.nan)
        return shares

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _per_layer(self, part: list[Group], count: int) -> dict[str, Tensor]:
        """Zeros [count, O, I] for each owned layer."""
        return {
            name: self._zeros(count, size, group.width)
            for group in self.owned(part)
            for name, size in group.outputs.items()
        }


def _label(number: int, parts: list[list[Group]]) -> str:
    return f", part {number + 1}/{len(parts)}" if len(parts) > 1 else ""


def _consumed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Items that are let go of as soon as the next one is asked for."""
    while tensors:
        name = next(iter(tensors))
        yield name, tensors.pop(name)
