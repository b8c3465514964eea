"""The outer step's influence matrix: phases over layers and sequences.

    M[r, j] = dL_r / dbeta_j = - s_j g_r^T (H + D)^-1 g_j,        summed over the tracked layers

1 to 3 the curvature (curvature.py): bases from all of the domains' sequences and eigenvalues from few, or the other
way round; with their own labels both give gradients too; 4 the capabilities' gradients g_r, and
5 V_r = (H + D)^-1 g_r; 6 the gradients g_j that did not come with 1 to 3; 7 M; 8 W_j = (H + D)^-1 g_j and some
reference rows once more, for the standard errors. Gradients that all came with 1 to 3 are kept in the eigenbases: M is
found there, and only what scores sequences leaves them. Where there is no room for all g_j and V_r together
they take turns: each W_j meets the reference rows one by one, which gives M and its errors, and V_r
only the sequences that the domains' errors are estimated on. A sequence that several phases need goes through
the model once, while there is room for its pairs (pairs.py). A layer's statistics exist on one rank,
its group's owner. Suffixes: R capabilities, n domains, I in, O out; the rest in statistics.py.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ideal.distributed import all_reduce_, say, world_size
from ideal.errors import UserError
from ideal.influence.adaptive import DIRECTION_ERROR, contributions, more_sequences
from ideal.influence.config import InfluenceConfig
from ideal.influence.curvature import Curvatures
from ideal.influence.ekfac import Curvature, inner_products
from ideal.influence.joint import JointSolution, solve_joint
from ideal.influence.layers import Group, deal_out, lay_out, shared_inputs, tracked_layers, widest
from ideal.influence.matrix import fixed_form, objective
from ideal.influence.passes import Passes
from ideal.influence.products import unrounded
from ideal.influence.result import NO_SOLUTION, Influence
from ideal.influence.samples import DomainSample, Examples, SequenceSet, draw_domain, how_many, whole_reference
from ideal.influence.sampling_errors import Sample, picked_for_errors, reference_covariance, training_covariance
from ideal.influence.selection import select
from ideal.influence.statistics import Accumulator, Batch, Gradients, Scores, frozen, unpacked
from ideal.influence.storage import Store, opened_store

JOINT_RESIDUAL = 5e-2
"""Residual at which conjugate gradients stop: small beside the standard errors."""


def compute_influence(
    model: nn.Module,
    domains: Mapping[str, DomainSample],
    references: Mapping[str, Examples],
    config: InfluenceConfig,
    seed: int,
    weights: Sequence[float] | np.ndarray | None = None,
) -> Influence:
    """The influence of every domain's volume on every capability's loss, at the model's parameters.

    Every rank calls it with the same arguments and gets the same result. The model is left as it was.

    Args:
        model: a causal language model as in transformers, not wrapped in DDP; on one device.
        domains: the mixture that it was trained on, per domain.
        references: the reference set of each capability; all rows are used.
        config: the estimator.
        seed: decides which rows are sampled and, for the sampled Fisher, their labels.
        weights: [R] the capabilities' in Q, for `sample_fraction: auto`; None: all alike.

    Raises:
        UserError: no trained token in the mixture or in a reference set, `config.layers` match no
            linear layer, one layer alone exceeds `config.memory_budget` (with `auto` or the joint solver all of
            them together), or the curvature is not finite.
    """
    # With auto all rows are drawn, in random order, and taken from the front.
    fraction = 1.0 if config.sample_fraction == "auto" else config.sample_fraction
    pools = [draw_domain(name, domain, fraction, seed) for name, domain in domains.items()]
    reference = [whole_reference(name, examples) for name, examples in references.items()]
    _check(pools, reference, config)
    layers = tracked_layers(model, config.layers)
    _say_what_is_tracked(model, layers)
    alike = np.full(len(reference), 1 / len(reference))
    with frozen(model), unpacked(), unrounded():
        groups = shared_inputs(model, layers, _first_ids(pools).to(next(model.parameters()).device))
        engine = _Engine(
            model, groups, pools, reference, config, seed, alike if weights is None else np.asarray(weights)
        )
        with (
            opened_store(engine.passes.device, engine.layout.spilled, config.spill) as store,
            closing(engine.passes.pairs),
        ):
            return engine.run(store)


def _check(pools: list[SequenceSet], reference: list[SequenceSet], config: InfluenceConfig) -> None:
    if not sum(domain.total for domain in pools):
        raise UserError("influence: the mixture has no trained token")
    if not reference:
        raise UserError("influence: there is no reference set")
    for capability in reference:
        if not capability.total:
            raise UserError(f"influence: the reference set of {capability.name!r} has no trained token")
    if config.solver == "cg" and config.factors == "identity":
        raise UserError("influence.solver: cg takes its damping from the curvature; set influence.factors to ekfac")


def _say_what_is_tracked(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """So that a pattern which misses part of a model (its experts, say) does not do so in silence."""
    weights = sum(layer.weight.numel() for layer in layers.values())
    every = sum(parameter.numel() for parameter in model.parameters())
    say(f"influence: {len(layers)} linear layers, {weights:,} weights, {weights / every:.0%} of the model's parameters")


def _first_ids(pools: list[SequenceSet]) -> Tensor:
    """[1, S] some sequence."""
    some = next(chosen for chosen in pools if len(chosen.rows))
    return torch.tensor([some.examples[int(some.rows[0])]["input_ids"]])


@dataclass
class _Engine:
    """The phases, and what they hand on."""

    model: nn.Module
    groups: list[Group]
    pools: list[SequenceSet]
    """[n] the sequences that may be used, in random order."""
    reference: list[SequenceSet]
    config: InfluenceConfig
    seed: int
    weights: np.ndarray
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    solver: dict[str, object] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """[n, O, I] the domains' summed gradients so far, per owned layer; once the curvature is known, all of them in its
    bases (Q_S^T G Q_A) if `in_bases`, or none."""

    def __post_init__(self) -> None:
        self.passes = Passes(self.model, deal_out(self.groups, world_size()), self.config, self.seed)
        self.products = self.passes.products
        sizes = len(self.pools), len(self.reference), self.passes.dtype.itemsize
        self.layout = lay_out(self.groups, self.passes.owners, self.config, *sizes)
        self.auto = self.config.sample_fraction == "auto"
        self.total = sum(chosen.total for chosen in self.pools)
        self.shares = np.array([chosen.total / self.total for chosen in self.pools])
        room = self.layout.holds_beside_curvature(len(self.pools))
        self.selection = select(self.pools, self.config, widest(self.groups), room)
        self.in_bases = self._stays_in_bases()

    def _stays_in_bases(self) -> bool:
        """Whether M is found in the eigenbases: no gradient is to come, and it takes no more rotations."""
        if self.auto or self.config.solver == "cg" or any(len(rest.rows) for rest in self.selection.rest):
            return False
        scored = self.config.error_sequences or self.layout.in_turns
        # Those of `early` and the capabilities' into the bases; else the others and V_r out of them too.
        return bool(scored) or 2 * len(self.selection.early) <= len(self.pools) + len(self.reference)

    def run(self, store: Store) -> Influence:
        """All phases."""
        self.curvatures = Curvatures(
            self.passes, self.products, store, self.config, self.total, self.groups, self.selection.available
        )
        self._pick_sequences()
        if self.selection.with_curvature:
            self.gradients = self.passes.per_layer(self.groups, len(self.pools))
        for number, part in enumerate(self.layout.factor_parts):
            # No name of their own for the gradients: in turns they must be gone before the capabilities' come.
            self.curvatures.estimate(
                part,
                self.selection.factors,
                self.selection.corrected,
                self.gradients if self.selection.with_curvature else None,
                self.selection.early,
                _label(number, self.layout.factor_parts),
                self._again(),
            )
        dropped = self.curvatures.least_important(self.groups)
        for number, part in enumerate(self.layout.gradient_parts):
            kept = [group.only(set(group.layers) - dropped) for group in part]
            self._add_matrices([group for group in kept if group.layers], _label(number, self.layout.gradient_parts))
        return self._result(dropped)

    def _again(self) -> list[SequenceSet]:
        """Sequences whose pairs are needed after the curvature: at the same layers, with the same labels."""
        whole = len(self.layout.factor_parts) == len(self.layout.gradient_parts) == 1 and self.config.keep_layers == 1
        return self._for_domains() if whole and self.config.fisher == "empirical" else []

    def _for_domains(self) -> list[SequenceSet]:
        """Those that the domains' gradients and errors take."""
        return [*self.selection.rest, *(sample.sequences for sample in self.training_samples)]

    def _pick_sequences(self) -> None:
        """Which sequences are scored: with auto all that come, reference rows in turns all, else those for errors."""
        wanted = self.config.error_sequences
        picks = []
        for chosen, rest in zip(self.selection.training, self.selection.rest, strict=True):
            needed = 0 if chosen.whole else wanted
            picks.append(rest if self.auto else picked_for_errors(chosen, rest, needed, "domain", self.seed))
        self.training_samples = [
            self._sample(pick, pool, len(self.reference)) for pick, pool in zip(picks, self.pools, strict=True)
        ]
        in_turns = self.layout.in_turns
        self.reference_samples = [
            self._sample(
                chosen if in_turns else picked_for_errors(chosen, chosen, wanted, "reference", self.seed),
                chosen,
                len(self.pools),
            )
            for chosen in self.reference
        ]

    def _sample(self, sequences: SequenceSet, whole: SequenceSet, directions: int) -> Sample:
        return Sample(sequences, self._table(len(whole.rows), directions))

    def _table(self, *shape: int) -> Tensor:
        """Small sums, over layers and ranks."""
        return torch.zeros(shape, dtype=torch.float64, device=self.passes.device)

    # 4 to 8: gradients, the matrix and its errors

    def _add_matrices(self, part: list[Group], label: str) -> None:
        """These layers' parts of M, and of the scores."""
        early, late = self.selection.early, self.selection.late
        rotation, numbers = (Curvature.rotate, early) if self.in_bases else (Curvature.rotate_back, late)
        if numbers:
            self._apply_(part, self.gradients, rotation, numbers)
        if self.layout.in_turns:
            self._add_in_turns(part, label)
        else:
            self._add_together(part, label)
        self.gradients = {}

    def _add_together(self, part: list[Group], label: str) -> None:
        """All g_j and V_r at once."""
        references = self._reference_gradients(part, range(len(self.reference)), label)
        if self.in_bases:
            self._add_in_bases(part, references, label)
        else:
            directions = self._directions(part, references)
            if not self.selection.with_curvature:
                self.gradients = self.passes.per_layer(part, len(self.pools))
            self._domain_pass(part, directions, self.training_samples, label)
            if self.auto:
                directions = self._until_certain(part, references, directions)
            self._note(part, self._products(directions))
            directions.clear()
        references.clear()
        if self.config.error_sequences:
            solutions = self._domain_solutions(part, range(len(self.pools)))
            self._score("reference errors", part, self.reference_samples, solutions, label)

    def _add_in_bases(self, part: list[Group], references: dict[str, Tensor], label: str) -> None:
        """M, and the domains' scores, from the capabilities' gradients, whose place V_r takes."""
        self._apply_(part, references, lambda curvature, g_OI: curvature.divide(curvature.rotate(g_OI)))
        self._note(part, self._products(references))
        if any(sample.slots for sample in self.training_samples):
            self._apply_(part, references, Curvature.rotate_back)
            self._score("domain errors", part, self.training_samples, references, label)

    def _add_in_turns(self, part: list[Group], label: str) -> None:
        """As many gradients at a time as there is room for: no domain is passed over twice, the reference sets are."""
        products = {
            name: self._table(len(self.reference), len(self.pools))
            for group in self.passes.owned(part)
            for name in group.layers
        }
        for turn in _turns(len(self.pools), self.layout.at_once):
            if not self.selection.with_curvature:
                self.gradients = self.passes.per_layer(part, len(turn))
            self._domain_gradients(part, turn, [], label)
            columns = {name: table.mT[turn.start : turn.stop] for name, table in products.items()}
            # No name for the solutions: they must be gone when the next turn's gradients come.
            self._score(
                "reference scores",
                part,
                self.reference_samples,
                self._domain_solutions(part, turn),
                label,
                turn,
                columns,
                self.reference,
            )
            self.gradients = {}
        seen = torch.tensor([chosen.seen for chosen in self.reference], dtype=torch.float64, device=self.passes.device)
        self._note(part, {name: table / seen[:, None] for name, table in products.items()})
        if not any(len(sample.slots) for sample in self.training_samples):
            return
        for turn in _turns(len(self.reference), self.layout.at_once):
            self._score(
                "domain errors",
                part,
                self.training_samples,
                self._solved(part, self._reference_gradients(part, turn, label)),
                label,
                turn,
                again=self._for_domains(),
            )

    def _reference_gradients(self, part: list[Group], turn: range, label: str) -> dict[str, Tensor]:
        """[K, O, I] the mean gradients of some capabilities, per owned layer."""
        sums = self.passes.per_layer(part, len(turn))
        chosen = [self.reference[number] for number in turn]
        for_errors = self.config.error_sequences and not self.layout.in_turns
        again = [sample.sequences for sample in self.reference_samples] if for_errors else []
        gradients = Gradients(sums, self.products)
        self.passes.run("reference gradients", part, chosen, [gradients], part=label, again=again)
        for tensor in sums.values():
            for total, one in zip(tensor, chosen, strict=True):
                total /= one.seen
        return sums

    def _directions(
        self, part: list[Group], references: dict[str, Tensor], earlier: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """V_r [R, O, I], in the place of the gradients, or of `earlier` V_r; auto may need the gradients again."""
        if not self.auto:
            return self._solved(part, references)
        place = self.passes.per_layer(part, len(self.reference)) if earlier is None else earlier
        for name, tensor in references.items():
            place[name].copy_(tensor)
        return self._solved(part, place)

    def _domain_solutions(self, part: list[Group], turn: range) -> dict[str, Tensor]:
        """W_j [K, O, I] of some domains, in the place of their summed gradients."""
        seen = self._seen()[turn.start : turn.stop]
        for sums in self.gradients.values():
            sums /= seen.to(sums.dtype)[:, None, None]
        if self.in_bases:
            self._apply_(part, self.gradients, lambda curvature, g_OI: curvature.rotate_back(curvature.divide(g_OI)))
            return self.gradients
        return self._solved(part, self.gradients, "error_")

    def _solved(self, part: list[Group], gradients: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """(H + D)^-1 V for the owned layers' V [K, O, I], in their place."""
        if self.config.solver == "cg":
            with self.passes.timed("inverse"):
                return self._solve_jointly(part, gradients, kind)
        self._apply_(part, gradients, Curvature.solve)
        return gradients

    def _apply_(
        self,
        part: list[Group],
        gradients: dict[str, Tensor],
        step: Callable[[Curvature, Tensor], Tensor],
        numbers: Collection[int] | None = None,
    ) -> None:
        """What `step` makes of the owned layers' V [K, O, I], in their place.

        Args:
            numbers: which of K; None: all.
        """
        with self.passes.timed("inverse"):
            for group in self.passes.owned(part):
                for name, curvature in self.curvatures.of(group).items():
                    # One at a time: what is needed on the way is one gradient's size, not K.
                    for number, gradient_OI in enumerate(gradients.get(name, ())):
                        if numbers is None or number in numbers:
                            gradient_OI.copy_(step(curvature, gradient_OI))

    def _solve_jointly(self, part: list[Group], gradients: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        """The joint system's V for the owned layers' [K, O, I]; kind: what its numbers' names begin with."""
        factors = self.selection.factors
        solution = self._joint(
            part, gradients, lambda: self.passes.batches(factors, drawn=False), self.config.solver_iterations
        )
        self.solver |= {
            f"{kind}iterations": solution.iterations,
            f"{kind}residuals": solution.residuals,
            f"{kind}ratios": solution.ratios,
        }
        left = max(solution.residuals[-1], default=0.0) if solution.residuals else 0.0
        if left > 2 * JOINT_RESIDUAL:
            purpose = " for the reference rows' standard errors" if kind else ""
            say(
                f"influence.solver: cg ended{purpose} after {solution.iterations} iterations with a residual of"
                f" {left:.2f} ({NO_SOLUTION}): raise influence.solver_iterations or influence.damping, or give it more"
                " sequences (influence.factor_fraction)"
            )
        return dict(solution.solutions)

    def _joint(
        self,
        part: list[Group],
        gradients: dict[str, Tensor],
        batches: Callable[[], Iterator[Batch]],
        iterations: int,
    ) -> JointSolution:
        owned = self.passes.owned(part)
        return solve_joint(
            self.model,
            {name: layer for group in part for name, layer in group.layers.items()},
            batches,
            gradients,
            {name: one for group in owned for name, one in self.curvatures.of(group).items()},
            self.curvatures.damping_of(owned),
            self.total,
            iterations,
            JOINT_RESIDUAL,
            {name: self.passes.owners[group.name] for group in part for name in group.layers},
        )

    def _domain_pass(
        self, part: list[Group], directions: dict[str, Tensor], samples: list[Sample], label: str
    ) -> None:
        """The gradients of the domains' `rest`; `samples` scored."""
        inside = [
            bool(np.isin(sample.sequences.slots, rest.slots).all())
            for sample, rest in zip(samples, self.selection.rest, strict=True)
        ]
        accumulators: list[Accumulator] = []
        if self.auto or self.config.error_sequences:
            picked = [sample.slots if here else set() for sample, here in zip(samples, inside, strict=True)]
            accumulators.append(Scores([sample.scores for sample in samples], picked, directions, self.products))
        self._domain_gradients(part, range(len(self.pools)), accumulators, label)
        if not all(inside) and self.config.error_sequences:
            left = [
                Sample(sample.sequences.part(np.arange(0)), sample.scores) if here else sample
                for sample, here in zip(samples, inside, strict=True)
            ]
            self._score("domain errors", part, left, directions, label)

    def _domain_gradients(self, part: list[Group], turn: range, more: list[Accumulator], label: str) -> None:
        """Adds the gradients of some domains' `rest` to the sums; `more` sees the same pass."""
        rest = [self.selection.rest[number] for number in turn]
        if any(len(chosen.rows) for chosen in rest):
            gradients = Gradients(self.gradients, self.products)
            first = self.curvatures.first_positions.accumulators(part)
            again = self._for_domains() if self.layout.in_turns else []
            self.passes.run("domain gradients", part, rest, [*first, gradients, *more], part=label, again=again)

    def _score(
        self,
        description: str,
        part: list[Group],
        samples: list[Sample],
        directions: dict[str, Tensor],
        label: str,
        turn: range | None = None,
        streams: dict[str, Tensor] | None = None,
        again: Sequence[SequenceSet] = (),
    ) -> None:
        """Adds these layers' part to the samples' scores along V [K, O, I].

        Args:
            turn: which K of a sample's scores; None: all.
            streams: per layer [K, sets]; takes up the sums of the weighted scores.
            again: sequences that these layers will need after this.
        """
        columns = slice(None) if turn is None else slice(turn.start, turn.stop)
        tables, picked = [sample.scores[:, columns] for sample in samples], [sample.slots for sample in samples]
        sets = [sample.sequences for sample in samples]
        accumulators: list[Accumulator] = [Scores(tables, picked, directions, self.products, streams)]
        self.passes.run(description, part, sets, accumulators, part=label, again=again)

    def _until_certain(
        self, part: list[Group], references: dict[str, Tensor], directions: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Adds sequences until alpha's direction is known to DIRECTION_ERROR, or none is left; V_r at the end.

        The curvature first: scores along an earlier V_r would not tell the error of alpha along this one.
        """
        directions, of_curvature = self._until_curvature_is_certain(part, references, directions)
        while True:
            matrix, alpha = self._alpha(directions)
            size = float(np.linalg.norm(alpha)) or 1.0
            parts = contributions(self._training_covariance(matrix), self.shares, self.weights) / size**2
            self._say_how_certain(parts, of_curvature)
            used = [len(chosen.rows) for chosen in self.selection.training]
            wanted = more_sequences(used, self.selection.available, parts)
            if wanted is None:
                return directions
            self._domain_pass(part, directions, self._take(wanted), "")

    def _until_curvature_is_certain(
        self, part: list[Group], references: dict[str, Tensor], directions: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], float]:
        """V_r, and the relative change of alpha that the last doubling of the curvature's sequences made."""
        alpha, change, doubled = self._alpha(directions)[1], math.inf, False
        while change > DIRECTION_ERROR and self.selection.double_factors():
            self.curvatures.estimate(part, self.selection.factors, self.selection.corrected)
            directions, before, doubled = self._directions(part, references, directions), alpha, True
            alpha = self._alpha(directions)[1]
            # Of nested samples, the larger being twice the smaller: the change has the larger one's variance.
            change = float(np.linalg.norm(alpha - before) / (np.linalg.norm(alpha) or 1.0))
        if doubled:
            for sample in self.training_samples:
                sample.scores.zero_()
            self._score("domain errors", part, self.training_samples, directions, "")
        return directions, change if doubled else 0.0

    def _alpha(self, directions: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """M so far [R, n], and the fixed-volume alpha [n]."""
        matrix = self._sum(self._products(directions))
        return matrix, objective(fixed_form(matrix, self.shares), self.weights)

    def _say_how_certain(self, parts: np.ndarray, of_curvature: float) -> None:
        say(
            f"influence: {how_many(self.selection.training):,} of {sum(self.selection.available):,} sequences,"
            f" {how_many(self.selection.factors):,} for the curvature; alpha's relative error:"
            f" {math.sqrt(parts.sum()):.1%} from the sequences, {of_curvature:.1%} from the curvature"
        )

    def _take(self, wanted: Sequence[int]) -> list[Sample]:
        """Adds sequences to the domains', up to these numbers; the new ones alone, which nothing has scored yet."""
        new = []
        for number, rest in enumerate(self.selection.take(wanted)):
            sample = self.training_samples[number]
            slots = np.concatenate([sample.sequences.slots, rest.slots])
            self.training_samples[number] = Sample(self.pools[number].part(slots), sample.scores)
            new.append(Sample(rest, sample.scores))
        return new

    def _seen(self) -> Tensor:
        """[n] trained tokens behind the domains' gradients; 1 where there is none."""
        return torch.tensor(
            [chosen.seen or 1.0 for chosen in self.selection.training], dtype=torch.float64, device=self.passes.device
        )

    def _products(self, directions: dict[str, Tensor]) -> dict[str, Tensor]:
        """<V_r, g_j> [R, n] of the owned layers."""
        with self.passes.timed("matrix"):
            seen = self._seen()
            return {name: inner_products(directions[name], self.gradients[name]) / seen for name in directions}

    def _sum(self, products: dict[str, Tensor]) -> np.ndarray:
        """[R, n] M of all ranks' layers."""
        table = self._table(len(self.reference), len(self.pools))
        for product in products.values():
            table += product
        return -self.shares * all_reduce_(table).cpu().numpy()

    def _note(self, part: list[Group], products: dict[str, Tensor]) -> None:
        """Takes up the layers' parts of M from their owners."""
        names = [name for group in part for name in group.layers]
        tables = self._table(len(names), len(self.reference), len(self.pools))
        for number, name in enumerate(names):
            if name in products:
                tables[number] = products[name]
        found = dict(zip(names, -self.shares * all_reduce_(tables).cpu().numpy(), strict=True))
        for name, matrix in found.items():
            if not np.isfinite(matrix).all():
                raise UserError(f"influence: the statistics of {name} are not finite; did training diverge?")
        self.layers |= found

    def _result(self, dropped: set[str]) -> Influence:
        """What all parts give together."""
        matrix = np.sum(list(self.layers.values()), axis=0)
        factors, corrected = (
            {chosen.name: 0 if self.config.factors == "identity" else len(chosen.rows) for chosen in sets}
            for sets in (self.selection.factors, self.selection.corrected)
        )
        return Influence(
            domains=[domain.name for domain in self.pools],
            capabilities=[capability.name for capability in self.reference],
            matrix=matrix,
            training_covariance=self._training_covariance(matrix),
            reference_covariance=reference_covariance(
                matrix, self.shares, self.reference, self.reference_samples, self.config.error_sequences > 0
            ),
            shares=self.shares,
            layers=self.layers,
            dropped_layers=[name for group in self.groups for name in group.layers if name in dropped],
            first_position_share=self.curvatures.first_positions.shares(self.groups),
            sequences={domain.name: len(domain.rows) for domain in self.selection.training},
            factor_sequences=factors,
            sketch_fraction=self.curvatures.sketch_fraction,
            eigenvalue_sequences=corrected,
            tokens={domain.name: int(domain.tokens.sum()) for domain in self.selection.training},
            reference_sequences={capability.name: len(capability.rows) for capability in self.reference},
            reference_tokens={capability.name: int(capability.tokens.sum()) for capability in self.reference},
            solver=self.solver,
            seconds=self.passes.seconds,
        )

    def _training_covariance(self, matrix: np.ndarray) -> np.ndarray:
        scored = self.auto or self.config.error_sequences > 0
        return training_covariance(matrix, self.shares, self.selection.training, self.training_samples, scored)


def _label(number: int, parts: list[list[Group]]) -> str:
    return f", part {number + 1}/{len(parts)}" if len(parts) > 1 else ""


def _turns(count: int, at_once: int) -> list[range]:
    """0 to `count` in consecutive ranges of at most `at_once`."""
    return [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]
