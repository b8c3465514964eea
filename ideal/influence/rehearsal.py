"""The outer step on fake tensors: what each phase would hold and compute, at one rank of any number.

The phases are the engine's own. Of each pass one step is run, that of the longest sequences, for its memory, and
one of sequences of mean length, whose work is multiplied; what asks for values is left out.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ideal.distributed import rank, rehearsed, world_size
from ideal.footprint import Footprint, Work
from ideal.influence.config import InfluenceConfig
from ideal.influence.engine import _Engine
from ideal.influence.layers import Group, Layout, deal_out, lay_out, shared_inputs, sizes_of, tracked_layers
from ideal.influence.pairs import KeptPairs
from ideal.influence.passes import Passes
from ideal.influence.products import Products, unrounded
from ideal.influence.samples import SequenceSet
from ideal.influence.scratch import BUFFER_BYTES, Block
from ideal.influence.statistics import Accumulator, Batch, Scores, Tracker, frozen, unpacked
from ideal.influence.storage import Store

TYPICAL = "typical"
"""What is run for its work alone: no phase."""


@dataclass(frozen=True)
class Phase:
    """One phase of the outer step, over all its parts."""

    memory: dict[str, int]
    """Bytes by kind at its peak."""
    work: Work
    sequences: int
    """That go through the model, on all ranks, all passes together."""
    passes: float
    """Over its sequences, and how often on average: once for each part of the layers, or more where gradients take
    turns."""


@dataclass(frozen=True)
class Rehearsal:
    """What the outer step would take at the rank that holds most."""

    phases: dict[str, Phase]
    layout: Layout
    spilled: int
    """Bytes in the store, where it is not with the model."""
    pairs: int
    """Bytes of kept pairs on disk, at most."""


def rehearse(
    model: nn.Module,
    training: list[SequenceSet],
    reference: list[SequenceSet],
    config: InfluenceConfig,
    ranks: int,
    *,
    vocabulary: int,
    pair_room: float,
    on_gpu: bool,
    timed: bool = True,
) -> Rehearsal:
    """Goes through all phases; call it inside `footprint.fake()`, with a model made there.

    Args:
        vocabulary: entries of the last dimension of logits.
        pair_room: bytes of disk that pairs may take.
        on_gpu: whether it will be one that multiplies bfloat16, whatever this machine is.
        timed: whether work is wanted too, which takes twice as long.

    Raises:
        UserError: as compute_influence does.
    """
    layers = tracked_layers(model, config.layers)
    with frozen(model), unpacked(), unrounded():
        groups = shared_inputs(model, layers, torch.zeros(1, 2, dtype=torch.int64))
        busiest = _busiest(groups, config, len(training), len(reference), ranks)
        with rehearsed(busiest, ranks):
            weights = np.full(len(reference), 1 / len(reference))
            engine = _RehearsedEngine(model, groups, training, reference, config, 0, weights)
            return engine.rehearse(vocabulary, pair_room, on_gpu, timed)


def _busiest(groups: list[Group], config: InfluenceConfig, domains: int, capabilities: int, ranks: int) -> int:
    """The rank that owns most bytes."""
    owners, load = deal_out(groups, ranks), np.zeros(ranks)
    at_once = lay_out(groups, owners, config, domains, capabilities, 4).at_once
    for group in groups:
        size = sizes_of(group, config, 4)
        load[owners[group.name]] += size.factors + at_once * size.gradient
    return int(load.argmax())


class _RehearsedEngine(_Engine):
    """The engine without values."""

    passes: "_RehearsedPasses"

    def rehearse(self, vocabulary: int, pair_room: float, on_gpu: bool, timed: bool) -> Rehearsal:
        """All phases."""
        footprint = Footprint(lambda tensor: "logits" if tensor.shape[-1:] == (vocabulary,) else "activations")
        self.passes = passes = _RehearsedPasses(
            self.model, self.passes.owners, self.config, footprint, pair_room, on_gpu, timed
        )
        self.products = passes.products
        store = _RehearsedStore(self.layout.spilled, footprint)
        with footprint:
            self.run(store)
        phases = {
            name: Phase(peak, footprint.work[name], passes.sequences[name], passes.count(name))
            for name, peak in footprint.peaks().items()
            if name not in ("", TYPICAL)
        }
        return Rehearsal(phases, self.layout, store.spilled, int(passes.pairs.most))

    def _until_certain(
        self, part: list[Group], references: dict[str, Tensor], directions: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """At worst all sequences are taken, for the curvature too, and have been kept for that."""
        while self.selection.double_factors():
            self.curvatures.estimate(part, self.selection.factors, self.selection.corrected)
            directions = self._directions(part, references, directions)
        self._domain_pass(part, directions, self._take(self.selection.available), "")
        drawn = self.config.fisher == "sampled"
        _, rest = self.passes.pairs.split(part, self.pools, drawn)
        self.passes.pairs.admit(part, rest, rest, drawn)
        return directions

    def _solve_jointly(self, part: list[Group], gradients: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        """One iteration, on the step of the longest sequences; its work stands for all iterations and steps."""
        work, phase = self.passes.footprint.work, self.passes.footprint.phase
        factors = self.selection.factors
        step = _alone(factors, _longest(factors, self.passes.share))
        before, of_step = work[phase], Work()

        def batches() -> Iterator[Batch]:
            """The step, and what is done with it between two requests."""
            nonlocal of_step
            for batch in self.passes.batches(step, drawn=False):
                at_first = work[phase]
                yield batch
                of_step += work[phase] + at_first.times(-1)

        # The solver makes its vectors itself, [K, O, I] of owned layers and [O, I] of the others.
        usual_kind = self.passes.footprint.kind
        shapes = {layer.weight.shape for group in part for layer in group.layers.values()}
        shapes |= {tensor.shape for tensor in gradients.values()}
        self.passes.footprint.kind = lambda tensor: "gradients" if tensor.shape in shapes else usual_kind(tensor)
        solution = self._joint(part, gradients, batches, 1)
        self.passes.footprint.kind = usual_kind
        between = work[phase] + before.times(-1) + of_step.times(-1)
        every, alone = _lengths(factors), _lengths(step)
        all_steps = of_step.times(every.sum() / alone.sum(), (every**2).sum() / (alone**2).sum())
        work[phase] = before + (between + all_steps).times(self.config.solver_iterations)
        return dict(solution.solutions)


class _RehearsedStore(Store):
    """Shapes instead of tensors where the real one would hold them elsewhere."""

    def __init__(self, elsewhere: bool, footprint: Footprint) -> None:
        super().__init__(torch.device("cpu"), "device")
        self.elsewhere, self.footprint = elsewhere, footprint
        self.shapes: dict[tuple[str, str], tuple[torch.Size, torch.dtype]] = {}

    @property
    def spilled(self) -> int:
        """Bytes that are elsewhere."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.shapes.values())

    def put(self, kind: str, name: str, tensor: Tensor) -> None:
        """Keeps a tensor, or its shape."""
        self.footprint.rename(tensor, "factors")
        if self.elsewhere:
            self.shapes[kind, name] = tensor.shape, tensor.dtype
        else:
            super().put(kind, name, tensor)

    def get(self, kind: str, name: str) -> Tensor:
        """The tensor, or a new one like it."""
        if not self.elsewhere:
            return super().get(kind, name)
        shape, dtype = self.shapes[kind, name]
        tensor = torch.empty(shape, dtype=dtype)
        self.footprint.rename(tensor, "factors")
        return tensor


class _RehearsedPairs(KeptPairs):
    """Sizes instead of a file."""

    most = 0.0
    """Bytes on disk at the fullest."""
    buffers: Tensor | None = None
    """[bytes], of pairs on their way there."""

    def admit(
        self, groups: Sequence[Group], sets: Sequence[SequenceSet], again: Sequence[SequenceSet], drawn: bool
    ) -> tuple[list[SequenceSet], list[SequenceSet]]:
        """As in the file."""
        admitted = super().admit(groups, sets, again, drawn)
        self.most = max(self.most, self.used)
        filled = int(min(2 * BUFFER_BYTES, self.most))
        if self.buffers is None or len(self.buffers) < filled:
            self.buffers = torch.empty(filled, dtype=torch.uint8)
        return admitted

    def read(self, group: Group, positions: int) -> tuple[Tensor, dict[str, Tensor]]:
        """x [N, I], and d [N, O] of each layer."""
        kept = partial(torch.empty, dtype=self._dtype(group))
        return kept(positions, group.width), {name: kept(positions, size) for name, size in group.outputs.items()}

    def _write(self, tensor: Tensor, dtype: torch.dtype) -> Block:
        tensor.to(dtype)  # a copy, if it is one
        return Block(0, tensor.shape[1], dtype)


class _RehearsedPasses(Passes):
    """One step for each kind of pass, in place of all."""

    pairs: _RehearsedPairs

    def __init__(
        self,
        model: nn.Module,
        owners: dict[str, int],
        config: InfluenceConfig,
        footprint: Footprint,
        pair_room: float,
        on_gpu: bool,
        timed: bool,
    ) -> None:
        super().__init__(model, owners, config, 0)
        self.products = Products(self.dtype, self.products.bf16, on_gpu)
        self.pairs = _RehearsedPairs(owners, pair_room, self.pair_dtype)
        self.footprint, self.wants_work = footprint, timed
        self.sequences: dict[str, int] = defaultdict(int)
        self.slots: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        """By phase and set, which of its sequences were passed over."""
        # What was found, by what was run: equal parts are run once.
        self.known: dict[Any, tuple[dict[str, int], Work]] = {}
        self.typical: dict[Any, Work] = {}

    def _bar(self, steps: int, text: str) -> "tqdm[Any]":
        return tqdm(disable=True)

    def _replay(
        self,
        groups: Sequence[Group],
        sets: Sequence[SequenceSet],
        accumulators: Sequence[Accumulator],
        bar: "tqdm[Any]",
    ) -> None:
        """Notes memory and work of all steps of `sets`."""

        def step(chosen: Sequence[SequenceSet], accumulators: Sequence[Accumulator]) -> None:
            """The pairs of every batch, the next group's read ahead as in the file."""
            mine = self.owned(groups)
            for batch in self.batches(chosen, drawn=False):
                read = (self.pairs.read(group, sum(batch.positions.sizes)) for group in mine)
                ahead = next(read, None)
                for group in mine:
                    assert ahead is not None
                    (x_NI, outputs), ahead = ahead, next(read, None)
                    for accumulator in accumulators:
                        accumulator.add(group, x_NI, outputs, batch.positions)

        self._note("kept", groups, sets, accumulators, step)

    def _through_model(
        self,
        groups: Sequence[Group],
        sets: Sequence[SequenceSet],
        accumulators: Sequence[Accumulator],
        drawn: bool,
        bar: "tqdm[Any]",
    ) -> None:
        """Notes memory and work of all batches of `sets`."""
        phase = self.footprint.phase
        self.sequences[phase] += sum(len(chosen.rows) for chosen in sets)
        for chosen in sets:
            before = self.slots[phase].get(chosen.name, chosen.slots)
            self.slots[phase][chosen.name] = np.union1d(before, chosen.slots)
        tracker = Tracker(self.model, groups, self.owners, self.dtype)

        def step(chosen: Sequence[SequenceSet], accumulators: Sequence[Accumulator]) -> None:
            """Every batch through the model."""
            for batch in self.batches(chosen, drawn):
                tracker.run(batch, [] if drawn else accumulators, accumulators if drawn else [])

        with tracker.hooked():
            self._note("drawn" if drawn else "own", groups, sets, accumulators, step)

    def _note(
        self,
        kind: str,
        groups: Sequence[Group],
        sets: Sequence[SequenceSet],
        accumulators: Sequence[Accumulator],
        step: "_Step",
    ) -> None:
        """Adds up what `step` would take for all of `sets`; kind: in what else steps of a phase differ."""
        if not any(len(chosen.rows) for chosen in sets):
            return
        phase = self.footprint.phase
        key = phase, kind, self._shapes(groups), tuple(len(chosen.rows) for chosen in sets)
        if key in self.known:
            peak, work = self.known[key]
            self.footprint.passing(peak)
        else:
            of_step = partial(self._of_step, kind, groups)
            peak = self._largest(sets, accumulators, step, of_step)
            work = self._all(sets, accumulators, step, of_step) if self.wants_work else Work()
            self.known[key] = peak, work
        self.footprint.work[phase] += work

    def count(self, description: str) -> float:
        """Passes over a phase's sequences."""
        distinct = sum(map(len, self.slots[description].values()))
        return self.sequences[description] / distinct if distinct else 0.0

    def zeros(self, *shape: int) -> Tensor:
        """A sum that starts."""
        tensor = super().zeros(*shape)
        self.footprint.rename(tensor, "gradients" if len(shape) == 3 else "factors")
        return tensor

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Names the phase."""
        before, self.footprint.phase = self.footprint.phase, phase
        yield
        self.footprint.phase = before

    def _largest(
        self, sets: Sequence[SequenceSet], accumulators: Sequence[Accumulator], step: "_Step", of_step: "_OfStep"
    ) -> dict[str, int]:
        """Runs the steps that need most memory; bytes by kind."""
        phase, start = self.footprint.phase, self.footprint.now
        before = self.footprint.work[phase]
        for chosen in {_longest(sets, self.share), _most_scored(sets, accumulators, self.share)}:
            self.footprint.work[phase] = Work()
            step(_alone(sets, chosen), accumulators)
            if not _scoring_ones(accumulators):
                # Where lengths are all alike this is the typical step too.
                key = of_step(accumulators, _sizes(sets, chosen))
                self.typical[key] = self.footprint.work[phase]
        self.footprint.work[phase] = before
        return self.footprint.peaks(start).get(phase, {})

    def _all(
        self, sets: Sequence[SequenceSet], accumulators: Sequence[Accumulator], step: "_Step", of_step: "_OfStep"
    ) -> Work:
        """The work of all steps, from one of sequences of mean length."""
        lengths = _lengths(sets)
        scoring = _scoring_ones(accumulators)
        plain = [accumulator for accumulator in accumulators if accumulator not in scoring]
        chosen = _typical(sets, float(lengths.mean()), self.share)
        sizes = _sizes(sets, chosen)
        key = of_step(plain, sizes)
        if key not in self.typical:
            before, self.footprint.phase = self.footprint.phase, TYPICAL
            step(_alone(sets, chosen), plain)
            self.footprint.phase = before
            self.typical[key] = self.footprint.work.pop(TYPICAL)
        work = self.typical[key].times(float(lengths.sum() / sizes.sum()), float((lengths**2).sum() / (sizes**2).sum()))
        for accumulator in scoring:
            work += _scoring(accumulator, float(lengths.mean()), self.config.product_dtype == "bfloat16")
        return work

    def _of_step(
        self, kind: str, groups: Sequence[Group], accumulators: Sequence[Accumulator], sizes: np.ndarray
    ) -> object:
        """What decides a step's work: parts of the layers differ in what is summed, seldom in how long it is."""
        return kind, tuple(map(type, accumulators)), self._shapes(groups), tuple(np.sort(sizes))

    def _shapes(self, groups: Sequence[Group]) -> tuple[tuple[int, ...], ...]:
        """What decides how much a pass holds and computes at these layers."""
        return tuple((g.width, *g.outputs.values(), int(self.owners[g.name] == rank())) for g in groups)

    @property
    def share(self) -> int:
        """Sequences of a step, on all ranks."""
        return self.config.batch_size * world_size()


_Step = Callable[[Sequence[SequenceSet], Sequence[Accumulator]], None]
"""Does one step, of the few sequences that the sets hold."""
_OfStep = Callable[[Sequence[Accumulator], np.ndarray], object]
"""What decides a step's work, from what is summed and the sequences' positions."""
_Chosen = tuple[int, tuple[int, ...]]
"""The number of a set, and the places of some of its sequences."""


def _alone(sets: Sequence[SequenceSet], chosen: _Chosen) -> list[SequenceSet]:
    """The sets with nothing in them but what was chosen."""
    number, places = chosen
    nothing = np.zeros(0, dtype=np.int64)
    return [whole.part(np.array(places) if index == number else nothing) for index, whole in enumerate(sets)]


def _sizes(sets: Sequence[SequenceSet], chosen: _Chosen) -> np.ndarray:
    """Positions of the sequences that were chosen, as floats."""
    number, places = chosen
    return sets[number].examples.positions[sets[number].rows[list(places)]].astype(float)


def _scoring_ones(accumulators: Sequence[Accumulator]) -> list[Scores]:
    """Those whose work depends on which sequences are scored."""
    return [accumulator for accumulator in accumulators if isinstance(accumulator, Scores)]


def _lengths(sets: Sequence[SequenceSet]) -> np.ndarray:
    """Positions of all sequences, as floats."""
    return np.concatenate([chosen.examples.positions[chosen.rows] for chosen in sets]).astype(float)


def _longest(sets: Sequence[SequenceSet], share: int) -> _Chosen:
    """The step of the longest sequences."""
    number = max(range(len(sets)), key=lambda k: _sum_of_longest(sets[k], share))
    return number, tuple(_longest_first(sets[number])[:share].tolist())


def _sum_of_longest(chosen: SequenceSet, share: int) -> float:
    return float(np.sort(chosen.examples.positions[chosen.rows])[-share:].sum())


def _longest_first(chosen: SequenceSet) -> np.ndarray:
    return np.argsort(-chosen.examples.positions[chosen.rows], kind="stable")


def _most_scored(sets: Sequence[SequenceSet], accumulators: Sequence[Accumulator], share: int) -> _Chosen:
    """The step in which most sequences are scored; the one of the longest if none is."""
    best = 0, _longest(sets, share)
    for accumulator in accumulators:
        for number, chosen in enumerate(sets):
            if not isinstance(accumulator, Scores) or not accumulator.picked[number]:
                continue
            order = _longest_first(chosen)
            scored = np.isin(chosen.slots[order], list(accumulator.picked[number]))
            counts = np.add.reduceat(scored.astype(int), np.arange(0, len(order), share))
            start = int(counts.argmax()) * share
            if counts.max() > best[0]:
                best = int(counts.max()), (number, tuple(order[start : start + share].tolist()))
    return best[1]


def _typical(sets: Sequence[SequenceSet], length: float, share: int) -> _Chosen:
    """A step of sequences as long as the mean, of the largest set."""
    number = max(range(len(sets)), key=lambda k: len(sets[k].rows))
    distance = np.abs(sets[number].examples.positions[sets[number].rows] - length)
    return number, tuple(np.argsort(distance, kind="stable")[:share].tolist())


def _scoring(scores: Scores, length: float, narrow: bool) -> Work:
    """The work of scoring all picked sequences at this rank's layers: their gradients, and products with K of them."""
    work = Work()
    for directions in scores.directions.values():
        count, outputs, inputs = directions.shape
        size = outputs * inputs
        gradient = Work(narrow=2.0 * size * length) if narrow else Work(wide=2.0 * size * length)
        work += gradient + Work(wide=2.0 * size * count, moved=16.0 * size)
    return work.times(sum(len(picked) for picked in scores.picked))
