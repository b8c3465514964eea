"""Pairs (x, d) that wait in a file, so that sequences which are needed again go through the model once.

The outer step needs some sequences several times: for the covariances, for the eigenvalues in their bases, for
errors. Getting their pairs, a forward and a backward pass, is about half of the work each time. Each rank keeps
the pairs of its own layers, and all ranks those of the same sequences.

On a GPU that is no gain: a layer of 4,096 x 14,336 weights takes 0.6 us per position to compute its pairs anew
(4 FLOP per weight, 400 TFLOP/s), and 3 us to send them out and back in bfloat16 (25 GB/s).
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ideal.distributed import world_size
from ideal.errors import UserError
from ideal.influence.layers import Group
from ideal.influence.samples import SequenceSet
from ideal.influence.scratch import Block, Rows, ScratchFile
from ideal.influence.statistics import Accumulator, Positions

DEFAULT_GIGABYTES = 32.0
"""For each process, where the model is in host memory."""
FREE_PART = 0.5
"""Part of the free disk that all processes' files may take."""

IN_MEMORY = ("tmpfs", "ramfs")
"""File systems whose files take memory."""
KEPT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_Key = tuple[str, int, bool]
"""A set's name, its examples' identity, and whether it is a reference set: each of them numbers its own slots."""


_NONE = np.zeros(0, dtype=np.int64)


def room_for_pairs(gigabytes: float | None, on_gpu: bool) -> float:
    """Bytes per process that `influence.pair_budget` allows."""
    if gigabytes is None:
        return 0.0 if on_gpu or _in_memory(tempfile.gettempdir()) else DEFAULT_GIGABYTES * 1e9
    return gigabytes * 1e9


def free_room(beside: int) -> float:
    """Bytes that each of `beside` processes may take in the folder for temporary files."""
    return FREE_PART * shutil.disk_usage(tempfile.gettempdir()).free / beside


def _in_memory(folder: str) -> bool:
    """Whether a folder's files lie in memory, where the system says so."""
    mounts = Path("/proc/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    place = Path(folder).resolve()
    around = [(len(path), kind) for _, path, kind, *_ in lines if place.is_relative_to(path)]
    return max(around, default=(0, ""))[1] in IN_MEMORY


@dataclass
class _Step:
    """The pairs of one batch: of each group the input, and d of its layers."""

    key: _Key
    positions: Positions
    groups: list[tuple[Group, Block, dict[str, Block]]] = field(default_factory=list)


class KeptPairs:
    """An accumulator that writes the pairs of a pass to a file, from which other accumulators get them later."""

    def __init__(self, owners: Mapping[str, int], room: float, dtype: torch.dtype | None) -> None:
        """Args:
        owners: the rank of each group, by its name.
        room: bytes that the rank whose layers are widest may write.
        dtype: what pairs are kept in; None: what their layer computes in.
        """
        self.owners, self.room, self.dtype = owners, room, dtype
        self.file: ScratchFile | None = None
        self._forget()

    def _forget(self) -> None:
        # Of which layers the pairs are, and whether of drawn labels; of which sequences, on all ranks.
        self.of: tuple[object, bool] | None = None
        self.slots: dict[_Key, np.ndarray] = {}
        self.steps: list[_Step] = []
        # Of the pass that is being kept: its sets, its latest batch, and where that has no fillers.
        self.keys: list[_Key] = []
        self.step_of: Positions | None = None
        self.ranges: list[tuple[int, int]] = []
        # Bytes admitted at the rank that writes most.
        self.used = 0.0
        if self.file is not None:
            with self._explained():
                self.file.clear()

    def close(self) -> None:
        """Drops everything."""
        if self.file is not None:
            self.file.close()
            self.file = None
        self._forget()

    # Which sequences: decided from what all ranks know

    def split(
        self, groups: Sequence[Group], sets: Sequence[SequenceSet], drawn: bool
    ) -> tuple[list[SequenceSet], list[SequenceSet]]:
        """The sequences whose pairs at `groups` are here, and the others.

        drawn: whether the pairs are wanted that belong to labels drawn from the model.
        """
        here = self.slots if self.of == (_names(groups), drawn) else {}
        kept = [np.isin(chosen.slots, here.get(_key(chosen), _NONE)) for chosen in sets]
        return _divided(sets, kept)

    def admit(
        self, groups: Sequence[Group], sets: Sequence[SequenceSet], again: Sequence[SequenceSet], drawn: bool
    ) -> tuple[list[SequenceSet], list[SequenceSet]]:
        """Those of `sets`, which are about to be passed over, whose pairs will be kept, and the others.

        Pairs of other layers or labels are dropped for them.

        Args:
            again: the sequences that will be needed again.
        """
        coming: dict[_Key, list[np.ndarray]] = {}
        for chosen in again:
            coming.setdefault(_key(chosen), [_NONE]).append(chosen.slots)
        wanted = [np.isin(chosen.slots, np.concatenate(coming.get(_key(chosen), [_NONE]))) for chosen in sets]
        sizes = [chosen.examples.positions[chosen.rows] * mask for chosen, mask in zip(sets, wanted, strict=True)]
        most = self._bytes_per_position(groups) * sum(float(size.sum()) for size in sizes)
        if not most or not self.room:
            return _divided(sets, [np.zeros_like(mask) for mask in wanted])
        if self.of != (_names(groups), drawn):
            self._forget()
            self.of = _names(groups), drawn
        part = min(1.0, (self.room - self.used) / most)
        # The same part of every set.
        kept = [mask & (np.cumsum(size) <= part * size.sum()) for mask, size in zip(wanted, sizes, strict=True)]
        self.keys = [_key(chosen) for chosen in sets]
        for chosen, mask, size in zip(sets, kept, sizes, strict=True):
            before = self.slots.get(_key(chosen), _NONE)
            self.slots[_key(chosen)] = np.concatenate([before, chosen.slots[mask]])
            self.used += self._bytes_per_position(groups) * float(size[mask].sum())
        return _divided(sets, kept)

    def _bytes_per_position(self, groups: Sequence[Group]) -> float:
        """At the rank that writes most."""
        sizes = [0] * world_size()
        for group in groups:
            numbers = group.width + sum(group.outputs.values())
            sizes[self.owners[group.name]] += numbers * self._dtype(group).itemsize
        return max(sizes)

    def _dtype(self, group: Group) -> torch.dtype:
        of_weights = next(iter(group.layers.values())).weight.dtype
        # Quantised layers take in and give out floats all the same.
        return self.dtype or (of_weights if of_weights in KEPT_DTYPES else torch.float32)

    # Pairs

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Keeps a step's positions, without the fillers."""
        if self.step_of is not positions:
            self.step_of = positions
            real = {slot: weight for slot, weight in zip(positions.slots, positions.weights, strict=True) if weight}
            kept, self.ranges = positions.picked(positions.set_index, real)
            self.steps.append(_Step(self.keys[positions.set_index], kept))
        dtype = self._dtype(group)
        blocks = {name: self._write(d_NO, dtype) for name, d_NO in outputs.items()}
        self.steps[-1].groups.append((group, self._write(x_NI, dtype), blocks))

    def steps_of(self, sets: Sequence[SequenceSet]) -> int:
        """About how many steps `replay` takes."""
        keys = {_key(chosen) for chosen in sets if len(chosen.rows)}
        return sum(step.key in keys for step in self.steps)

    def replay(
        self, sets: Sequence[SequenceSet], accumulators: Sequence[Accumulator], device: torch.device
    ) -> Iterator[None]:
        """Hands the pairs of `sets`, with the weights that they have there, to accumulators; yields after each step."""
        places = {_key(chosen): index for index, chosen in enumerate(sets) if len(chosen.rows)}
        weights = {
            key: dict(zip(sets[index].slots.tolist(), sets[index].weights.tolist(), strict=True))
            for key, index in places.items()
        }
        for step in self.steps:
            if step.key not in places:
                continue
            positions, ranges = step.positions.picked(places[step.key], weights[step.key])
            if positions.sizes:
                for group, x_NI, outputs in self._read(step, ranges):
                    x_NI, outputs = x_NI.to(device), {name: d_NO.to(device) for name, d_NO in outputs.items()}
                    for accumulator in accumulators:
                        accumulator.add(group, x_NI, outputs, positions)
            yield

    def _write(self, tensor: Tensor, dtype: torch.dtype) -> Block:
        with self._explained():
            if self.file is None:
                self.file = ScratchFile()
            return self.file.write(tensor, self.ranges, dtype)

    def _read(self, step: _Step, rows: Rows) -> Iterator[tuple[Group, Tensor, dict[str, Tensor]]]:
        """Of each group the input, and d of its layers."""
        assert self.file is not None
        tensors = self.file.read_ahead(([of_input, *outputs.values()], rows) for _, of_input, outputs in step.groups)
        for group, _, outputs in step.groups:
            with self._explained():
                x_NI, *every_NO = next(tensors)
            yield group, x_NI, dict(zip(outputs, every_NO, strict=True))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what to do about a disk that fails."""
        try:
            yield
        except OSError as error:
            size = 0 if self.file is None else self.file.end
            raise UserError(
                f"influence.pair_budget: the temporary file of {size / 1e9:.1f} GB in {tempfile.gettempdir()} failed"
                f" ({error}); set a smaller budget (0: no file), or TMPDIR to another folder"
            ) from error


def _divided(sets: Sequence[SequenceSet], masks: Sequence[np.ndarray]) -> tuple[list[SequenceSet], list[SequenceSet]]:
    """The sequences where a set's mask [m] is true, and the others."""
    pairs = list(zip(sets, masks, strict=True))
    return (
        [chosen.part(np.flatnonzero(mask)) for chosen, mask in pairs],
        [chosen.part(np.flatnonzero(~mask)) for chosen, mask in pairs],
    )


def _names(groups: Sequence[Group]) -> object:
    return tuple((group.name, *group.layers) for group in groups)


def _key(chosen: SequenceSet) -> _Key:
    return chosen.name, id(chosen.examples), chosen.population is None
