"""The outer step's influence matrix: which passes run over which sequences, on which rank.

    M[r, j] = dL_r / dbeta_j = - s_j g_r^T (H + D)^-1 g_j,        summed over the tracked layers

Three passes: domains (covariances and every domain's gradient at once), domains again (corrected
eigenvalues), references (gradients); a fourth over a few sequences gives standard errors. Suffixes:
R capabilities, n domains, I in, O out; the rest in statistics.py.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ideal.distributed import broadcast_, progress, rank, world_size
from ideal.errors import UserError
from ideal.influence.ekfac import Curvature, damped, eigenbasis, kfac_eigenvalues
from ideal.influence.matrix import ratio_error
from ideal.influence.statistics import (
    Accumulator,
    Batch,
    Eigenvalues,
    Examples,
    Gradients,
    InputCovariance,
    InputNorms,
    OutputCovariance,
    Scores,
    Tracker,
    frozen,
    make_batch,
)
from ideal.seeding import generator
from ideal.settings import STRICT

LEAST_SEQUENCES = 32
"""A domain is never sampled down to fewer sequences than this."""


@dataclass
class InfluenceConfig:
    """How the influence of the domains' volumes is estimated."""

    __pydantic_config__ = STRICT

    factors: Literal["ekfac", "kfac", "diagonal", "identity"] = "ekfac"
    """Curvature: EK-FAC, K-FAC, its diagonal in the weights' own basis, or none (plain gradient products)."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Labels in the curvature: the examples' own, or drawn from the model (one more backward pass)."""
    damping: Annotated[float, Field(gt=0)] = 0.1
    """Added to the curvature's eigenvalues, relative to each layer's mean eigenvalue."""
    sample_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of the mixture's rows used (sigma), drawn per domain; at least 32 rows of each, or all."""
    layers: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["*.mlp.*_proj"])
    """Names of the tracked linear layers, or of modules around them; * is any text, ? a character.
    In a model with LoRA: the adapters' own layers in them."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Sequences per forward pass and process."""
    error_sequences: Annotated[int, Field(ge=0)] = 32
    """Sequences of each domain and reference set used for the standard errors; 0: no standard errors."""
    memory_budget: Annotated[float, Field(gt=0)] | None = None
    """GB per process for the layers' statistics: what does not fit takes more passes. None: no limit."""


@dataclass(frozen=True)
class DomainSample:
    """One domain as the mixture has it."""

    examples: Examples
    counts: np.ndarray
    """[rows] how often each example stands in the mixture; 0: it does not."""


@dataclass(frozen=True)
class Influence:
    """What the volume of each domain does to each capability's loss, to first order."""

    domains: list[str]
    capabilities: list[str]
    matrix: np.ndarray
    """[R, n] M in its free form: dL_r / dbeta_j, nats per trained token; negative: more of j lowers L_r."""
    standard_errors: np.ndarray
    """[R, n] of M, from the sampling of training sequences and of reference rows; nan where unknown."""
    shares: np.ndarray
    """[n] s_j, the domains' shares of the mixture's trained tokens; sum 1."""
    layers: dict[str, np.ndarray]
    """[R, n] each tracked layer's part of M."""
    first_position_share: dict[str, float]
    """Per tracked layer, the part of trace(A) that the first positions hold; nan if it saw no token."""
    sequences: dict[str, int]
    """Distinct sequences used, per domain."""
    tokens: dict[str, int]
    """Their trained tokens, per domain; a repeated sequence counts once."""
    reference_sequences: dict[str, int]
    """Sequences used, per capability."""
    reference_tokens: dict[str, int]
    """Their trained tokens, per capability."""
    seconds: dict[str, float]
    """Per phase."""


@dataclass(frozen=True)
class _Set:
    """The sequences that stand for a domain or a capability, [m]."""

    name: str
    examples: Examples
    rows: np.ndarray
    repeats: np.ndarray
    """How often each row counts in its own set's mean."""
    total: float
    """Trained tokens of all the set's rows, repeats included: T_j."""
    population: int | None
    """Rows that `rows` were drawn from; None: a reference set, itself a sample of its capability."""

    @property
    def tokens(self) -> np.ndarray:
        """[m] trained tokens."""
        return self.examples.trained_tokens[self.rows]

    @property
    def weights(self) -> np.ndarray:
        """[m] repeats, scaled so that the weighted trained tokens are the set's total."""
        seen = float(self.repeats @ self.tokens)
        return self.repeats * (self.total / seen if seen else 0.0)

    @property
    def positions(self) -> float:
        """The positions that go with the set's total: P_j, estimated."""
        return float(self.weights @ self.examples.positions[self.rows])

    def part(self, pick: np.ndarray) -> "_Set":
        """Some of the sequences, all with weight 1."""
        rows = self.rows[pick]
        tokens = float(self.examples.trained_tokens[rows].sum())
        return replace(self, rows=rows, repeats=np.ones(len(rows)), total=tokens)

    def error(self, pick: np.ndarray, scores: np.ndarray, inner: np.ndarray) -> np.ndarray:
        """Standard errors [K] of <g, V>, for g this set's mean gradient.

        Args:
            pick: [m] which of the sequences the scores belong to.
            scores: [m, K] their <G_i, V>.
            inner: [K] <g, V>.
        """
        repeats = self.repeats[pick]
        return ratio_error(
            repeats[:, None] * scores,
            repeats * self.tokens[pick],
            inner,
            mean_tokens=float(self.repeats @ self.tokens) / len(self.rows),
            used=len(self.rows),
            population=self.population,
        )


@dataclass
class _ErrorSample:
    """The sequences of a set that its standard errors are estimated on."""

    picked: np.ndarray
    """[m] which of the set's."""
    scores: np.ndarray
    """[m, K] <G_i, V> over the layers so far."""


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
    training = [_sample(name, domain, config.sample_fraction, seed) for name, domain in domains.items()]
    reference = [_whole(name, examples) for name, examples in references.items()]
    _check_tokens(training, reference)
    layers = tracked_layers(model, config.layers)
    engine = _Engine(model, training, reference, config, seed)
    with frozen(model):
        groups = partitions(layers, config, len(training), len(reference), engine.dtype.itemsize)
        for number, group in enumerate(groups):
            engine.part = f", part {number + 1}/{len(groups)}" if len(groups) > 1 else ""
            engine.estimate(group)
    return engine.result()


def tracked_layers(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose name, or the name of a module around them, matches one of the patterns.

    In a model with LoRA adapters only the adapters' own layers count: the others were not trained.

    Raises:
        UserError: a pattern matches none.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapters = {name: module for name, module in linear.items() if ".lora_A." in name or ".lora_B." in name}
    linear = adapters or linear
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in linear if any(fnmatchcase(part, pattern) for part in _and_parents(name))}
        if not matching:
            some = ", ".join(list(linear)[:8]) or "none"
            kind = "LoRA layer" if adapters else "linear layer"
            raise UserError(
                f"influence.layers: {pattern!r} (of {', '.join(map(repr, patterns))}) matches no {kind};"
                f" the model has for example: {some}"
            )
        chosen |= matching
    return {name: module for name, module in linear.items() if name in chosen}


def _and_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def partitions(
    layers: dict[str, nn.Linear], config: InfluenceConfig, domains: int, capabilities: int, itemsize: int
) -> list[dict[str, nn.Linear]]:
    """Consecutive groups of layers whose statistics fit `config.memory_budget` together.

    Raises:
        UserError: a layer does not fit by itself.
    """
    budget = math.inf if config.memory_budget is None else config.memory_budget * 1e9
    groups: list[dict[str, nn.Linear]] = []
    left = 0.0
    for name, layer in layers.items():
        size = statistics_bytes(layer, config, domains, capabilities, itemsize)
        if size > budget:
            raise UserError(
                f"influence.memory_budget: {config.memory_budget:g} GB, but the statistics of {name} alone"
                f" take {size / 1e9:.3g} GB: allow at least that, or leave the layer out of influence.layers"
            )
        if not groups or size > left:
            groups.append({})
            left = budget
        groups[-1][name] = layer
        left -= size
    return groups


def statistics_bytes(
    layer: nn.Linear, config: InfluenceConfig, domains: int, capabilities: int, itemsize: int
) -> int:
    """Bytes held for a layer: gradients, eigenvalues, and the factors, which become bases in place."""
    of_weight_size = domains + capabilities
    if config.factors != "identity":
        of_weight_size += 1
    factors = layer.in_features**2 + layer.out_features**2 if config.factors in ("ekfac", "kfac") else 0
    return itemsize * (layer.in_features * layer.out_features * of_weight_size + factors)


def _sample(name: str, domain: DomainSample, fraction: float, seed: int) -> _Set:
    """Rows of the mixture drawn without replacement, each counted as often as the mixture has it."""
    tokens = domain.examples.trained_tokens
    assert len(domain.counts) == len(tokens), f"{name}: counts of {len(domain.counts)} rows for {len(tokens)}"
    rows = np.flatnonzero((domain.counts > 0) & (tokens > 0))
    wanted = max(LEAST_SEQUENCES, math.ceil(fraction * len(rows)))
    population = len(rows)
    if wanted < population:
        rows = np.sort(generator(seed, name, "influence").choice(rows, wanted, replace=False))
    repeats = domain.counts[rows].astype(np.float64)
    return _Set(name, domain.examples, rows, repeats, float(domain.counts @ tokens), population)


def _whole(name: str, examples: Examples) -> _Set:
    rows = np.flatnonzero(examples.trained_tokens > 0)
    return _Set(name, examples, rows, np.ones(len(rows)), float(examples.trained_tokens.sum()), None)


def _check_tokens(training: list[_Set], reference: list[_Set]) -> None:
    if not sum(domain.total for domain in training):
        raise UserError("influence: the mixture has no trained token")
    for capability in reference:
        if not capability.total:
            raise UserError(f"influence: the reference set of {capability.name!r} has no trained token")


class _Engine:
    """The phases over one partition of the layers after the other, and what they add up to."""

    def __init__(
        self,
        model: nn.Module,
        training: list[_Set],
        reference: list[_Set],
        config: InfluenceConfig,
        seed: int,
    ) -> None:
        self.model = model
        self.training = training
        self.reference = reference
        self.config = config
        self.seed = seed
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        self.device = weight.device
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.total = sum(domain.total for domain in training)
        self.positions = sum(domain.positions for domain in training)
        self.shares = np.array([domain.total / self.total for domain in training])
        self.part = ""
        self.layers: dict[str, np.ndarray] = {}
        self.first_position_share: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.training_errors = [self._error_sample(chosen, len(reference)) for chosen in training]
        self.reference_errors = [self._error_sample(chosen, len(training)) for chosen in reference]

    def estimate(self, layers: dict[str, nn.Linear]) -> None:
        """All phases for these layers."""
        tracker = Tracker(self.model, layers, self.dtype)
        domain_gradients = Gradients(self._zeros(layers, len(self.training), "O", "I"))
        reference_gradients = Gradients(self._zeros(layers, len(self.reference), "O", "I"))
        norms = InputNorms(self._zeros(layers, 2))
        with tracker.hooked():
            # All kinds of curvature share their first pass with the domains' gradients.
            curvature = CURVATURES[self.config.factors](self, tracker, [domain_gradients, norms])
            self._pass("reference gradients", tracker, self.reference, [reference_gradients])
            self._means(domain_gradients, self.training)
            self._means(reference_gradients, self.reference)
            with self._timed("matrix"):
                self._note_first_positions(norms)
                self._add_matrices(curvature, domain_gradients.sums, reference_gradients.sums)
            if self.config.error_sequences:
                self._add_scores(tracker, self.training, self.training_errors, reference_gradients.sums)
                self._add_scores(tracker, self.reference, self.reference_errors, domain_gradients.sums)

    def result(self) -> Influence:
        """What all partitions give together."""
        matrix = np.sum(list(self.layers.values()), axis=0)
        return Influence(
            domains=[domain.name for domain in self.training],
            capabilities=[capability.name for capability in self.reference],
            matrix=matrix,
            standard_errors=self._standard_errors(matrix),
            shares=self.shares,
            layers=self.layers,
            first_position_share=self.first_position_share,
            sequences={domain.name: len(domain.rows) for domain in self.training},
            tokens={domain.name: int(domain.tokens.sum()) for domain in self.training},
            reference_sequences={capability.name: len(capability.rows) for capability in self.reference},
            reference_tokens={capability.name: int(capability.tokens.sum()) for capability in self.reference},
            seconds=self.seconds,
        )

    # Curvatures: each runs the first pass with what it needs in it

    def _identity(self, tracker: Tracker, first: list[Accumulator]) -> dict[str, Curvature]:
        """H + D = 1."""
        self._pass("domain gradients", tracker, self.training, first)
        return {name: Curvature(None, None, None) for name in tracker.layers}

    def _diagonal(self, tracker: Tracker, first: list[Accumulator]) -> dict[str, Curvature]:
        """The diagonal in the basis of the weights themselves."""
        eigenvalues = Eigenvalues(
            self._zeros(tracker.layers, "O", "I"), dict.fromkeys(tracker.layers, (None, None))
        )
        self._pass("diagonal and domain gradients", tracker, self.training, first, [eigenvalues])
        return {
            name: self._curvature(None, None, total / self.total) for name, total in eigenvalues.sums.items()
        }

    def _kfac(self, tracker: Tracker, first: list[Accumulator]) -> dict[str, Curvature]:
        """Kronecker factors."""
        curvature = {}
        for name, (basis_O, basis_I, values_O, values_I) in self._eigenbases(tracker, first).items():
            eigenvalues = kfac_eigenvalues(values_O, values_I, self.positions, self.total)
            curvature[name] = self._curvature(basis_O, basis_I, eigenvalues.to(self.dtype))
        return curvature

    def _ekfac(self, tracker: Tracker, first: list[Accumulator]) -> dict[str, Curvature]:
        """Kronecker factors' bases with eigenvalues of their own, from a second pass."""
        bases = {name: (found[0], found[1]) for name, found in self._eigenbases(tracker, first).items()}
        eigenvalues = Eigenvalues(self._zeros(tracker.layers, "O", "I"), bases)
        self._pass("eigenvalues", tracker, self.training, [], [eigenvalues])
        return {
            name: self._curvature(*bases[name], total / self.total)
            for name, total in eigenvalues.sums.items()
        }

    def _curvature(self, basis_O: Tensor | None, basis_I: Tensor | None, eigenvalues_OI: Tensor) -> Curvature:
        return Curvature(basis_O, basis_I, damped(eigenvalues_OI, self.config.damping))

    def _eigenbases(
        self, tracker: Tracker, first: list[Accumulator]
    ) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Per layer Q_S, Q_A, l_S, l_A; the bases take the factors' place in memory."""
        inputs = InputCovariance(self._zeros(tracker.layers, "I", "I"))
        outputs = OutputCovariance(self._zeros(tracker.layers, "O", "O"))
        self._pass("covariances and domain gradients", tracker, self.training, [*first, inputs], [outputs])
        factors = [*outputs.sums.values(), *inputs.sums.values()]
        with self._timed("eigenbases"):
            for factor in factors:
                factor /= self.positions
            if not all(bool(factor.isfinite().all()) for factor in factors):
                raise UserError("influence: the layers' statistics are not finite; did training diverge?")
            values = decompose_(factors)
        names = list(tracker.layers)
        values_O, values_I = values[: len(names)], values[len(names) :]
        return {
            name: (outputs.sums[name], inputs.sums[name], values_O[number], values_I[number])
            for number, name in enumerate(names)
        }

    # The matrix and its errors

    @staticmethod
    def _means(gradients: Gradients, sets: list[_Set]) -> None:
        """Sums -> means per trained token, in place; a domain without any stays zero."""
        for tensor in gradients.sums.values():
            for number, chosen in enumerate(sets):
                tensor[number] /= chosen.total or 1.0

    def _add_matrices(
        self, curvature: dict[str, Curvature], domain: dict[str, Tensor], capability: dict[str, Tensor]
    ) -> None:
        """The layers' parts of M, each computed by one rank.

        Afterwards the mean gradients [n, O, I] and [R, O, I] are the preconditioned ones, on every rank,
        if the standard errors need them.
        """
        products = {}
        for number, name in enumerate(curvature):
            shape = len(capability[name]), len(domain[name])
            products[name] = torch.zeros(shape, dtype=torch.float64, device=self.device)
            if number % world_size() == rank():
                solved = curvature[name].solve(capability[name])
                products[name] += solved.flatten(1).double() @ domain[name].flatten(1).double().mT
                capability[name].copy_(solved)
                if self.config.error_sequences:
                    domain[name].copy_(curvature[name].solve(domain[name]))
        for number, name in enumerate(curvature):
            owner = number % world_size()
            self.layers[name] = -self.shares * broadcast_(products[name], owner).cpu().numpy()
            if not np.isfinite(self.layers[name]).all():
                raise UserError(f"influence: the statistics of {name} are not finite; did training diverge?")
            if self.config.error_sequences:
                broadcast_(capability[name], owner)
                broadcast_(domain[name], owner)

    def _note_first_positions(self, norms: InputNorms) -> None:
        for name, tensor in norms.sums.items():
            first, every = tensor.tolist()
            self.first_position_share[name] = first / every if every else math.nan

    def _error_sample(self, chosen: _Set, directions: int) -> _ErrorSample:
        kind = "reference" if chosen.population is None else "domain"
        wanted = min(self.config.error_sequences, len(chosen.rows))
        picked = generator(self.seed, chosen.name, kind, "errors").choice(
            len(chosen.rows), wanted, replace=False
        )
        return _ErrorSample(picked, np.zeros((wanted, directions)))

    def _add_scores(
        self, tracker: Tracker, sets: list[_Set], samples: list[_ErrorSample], directions: dict[str, Tensor]
    ) -> None:
        """These layers' part of the scores along V [K, O, I]."""
        tables = [torch.from_numpy(np.zeros_like(sample.scores)).to(self.device) for sample in samples]
        parts = [chosen.part(sample.picked) for chosen, sample in zip(sets, samples, strict=True)]
        self._pass("standard errors", tracker, parts, [Scores(tables, directions)])
        for sample, table in zip(samples, tables, strict=True):
            sample.scores += table.cpu().numpy()

    def _standard_errors(self, matrix: np.ndarray) -> np.ndarray:
        """[R, n]: s_j times the errors of <g_r, V_j> in g_j and in g_r, combined in quadrature.

        With V = (H + D)^-1 g, m = <g_r, V_j> = <V_r, g_j> is a ratio of sums over sequences in either
        gradient. H is taken as known: the error of its own sampling is left out.
        """
        if not self.config.error_sequences:
            return np.full_like(matrix, math.nan)
        inner = np.divide(matrix, -self.shares, out=np.zeros_like(matrix), where=self.shares > 0)
        of_domains, of_references = np.zeros_like(matrix), np.zeros_like(matrix)
        for number, (chosen, sample) in enumerate(zip(self.training, self.training_errors, strict=True)):
            if chosen.total:
                of_domains[:, number] = chosen.error(sample.picked, sample.scores, inner[:, number])
        for number, (chosen, sample) in enumerate(zip(self.reference, self.reference_errors, strict=True)):
            of_references[number] = chosen.error(sample.picked, sample.scores, inner[number])
        return self.shares * np.hypot(of_domains, of_references)

    # Passes

    def _pass(
        self,
        description: str,
        tracker: Tracker,
        sets: list[_Set],
        true: list[Accumulator],
        curved: Sequence[Accumulator] = (),
    ) -> None:
        """All batches of `sets`; then the ranks' sums are added up.

        Args:
            true: what sees the gradients of the examples' own labels.
            curved: what sees those of the labels that `config.fisher` asks for.
        """
        sampled = list(curved) if self.config.fisher == "sampled" else []
        true = true if sampled else [*true, *curved]
        with self._timed(description), progress(self._batch_count(sets), description + self.part) as bar:
            for batch in self._batches(sets, bool(sampled)):
                tracker.run(batch, true, sampled)
                bar.update()
            for accumulator in [*true, *sampled]:
                accumulator.reduce_()

    def _batch_count(self, sets: list[_Set]) -> int:
        return sum(math.ceil(len(chosen.rows) / (self.config.batch_size * world_size())) for chosen in sets)

    def _batches(self, sets: list[_Set], drawn: bool) -> Iterator[Batch]:
        """This rank's batches: each of one set, of sequences of similar length, dealt out evenly.

        Every rank gets the same number, so that ranks with sharded parameters stay in step: one that
        has nothing left repeats a sequence with weight zero.
        """
        share = self.config.batch_size * world_size()
        for set_index, chosen in enumerate(sets):
            longest_first = np.argsort(-chosen.examples.positions[chosen.rows], kind="stable")
            for start in range(0, len(chosen.rows), share):
                group = longest_first[start : start + share]
                mine = group[rank() :: world_size()]
                weights = chosen.weights[mine] if len(mine) else np.zeros(1)
                yield self._batch(set_index, chosen, mine if len(mine) else group[:1], weights, drawn)

    def _batch(
        self, set_index: int, chosen: _Set, slots: np.ndarray, weights: np.ndarray, drawn: bool
    ) -> Batch:
        rows = chosen.rows[slots].tolist()
        return make_batch(
            set_index,
            [chosen.examples[row] for row in rows],
            chosen.examples.positions[rows].tolist(),
            weights.tolist(),
            slots.tolist(),
            # A stream of its own for each row: the labels do not depend on batches or ranks.
            [
                generator(self.seed, chosen.name, row, "fisher").random(
                    int(chosen.examples.trained_tokens[row])
                )
                for row in rows
            ]
            if drawn
            else None,
            self.device,
            self.dtype,
        )

    def _zeros(self, layers: dict[str, nn.Linear], *shape: str | int) -> dict[str, Tensor]:
        """A zero tensor for each layer; "O" and "I" stand for the layer's sizes."""
        tensors = {}
        for name, layer in layers.items():
            sizes = {"O": layer.out_features, "I": layer.in_features}
            concrete = [sizes[size] if isinstance(size, str) else size for size in shape]
            tensors[name] = torch.zeros(concrete, dtype=self.dtype, device=layer.weight.device)
        return tensors

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Adds a phase's seconds to those of earlier partitions."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


CURVATURES = {
    "ekfac": _Engine._ekfac,
    "kfac": _Engine._kfac,
    "diagonal": _Engine._diagonal,
    "identity": _Engine._identity,
}


def decompose_(matrices: list[Tensor]) -> list[Tensor]:
    """Replaces every matrix by its eigenvectors, in place, and returns the eigenvalues (float64).

    The work is dealt out to the ranks, largest first, each to the rank with the least (size cubed) so far.
    """
    load = [0] * world_size()
    owners = [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda number: -len(matrices[number])):
        owners[number] = load.index(min(load))
        load[owners[number]] += len(matrices[number]) ** 3
    values = []
    for matrix, owner in zip(matrices, owners, strict=True):
        value = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
        if owner == rank():
            value, vectors = eigenbasis(matrix)
            matrix.copy_(vectors)
        values.append(value)
    # After all the work, so that no rank waits for another's matrix before it has done its own.
    for matrix, value, owner in zip(matrices, values, owners, strict=True):
        broadcast_(matrix, owner)
        broadcast_(value, owner)
    return values
