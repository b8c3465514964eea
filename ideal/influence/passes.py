"""Passes over sequences: which batches they form, on which rank, and how long that takes."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ideal.distributed import all_gather_objects, progress, rank, world_size
from ideal.influence.config import InfluenceConfig
from ideal.influence.layers import Group
from ideal.influence.pairs import KeptPairs, free_room, room_for_pairs
from ideal.influence.products import Products
from ideal.influence.samples import SequenceSet
from ideal.influence.statistics import Accumulator, Batch, Tracker, make_batch, make_positions
from ideal.seeding import generator


class Passes:
    """Runs sets of sequences through a model, for accumulators at the layers' owners."""

    def __init__(self, model: nn.Module, owners: dict[str, int], config: InfluenceConfig, seed: int) -> None:
        self.model, self.owners, self.config, self.seed = model, owners, config, seed
        parameter = next(model.parameters())
        self.device = parameter.device
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.products = Products(self.dtype, config.product_dtype == "bfloat16")
        self.seconds: dict[str, float] = {}
        room = room_for_pairs(config.pair_budget, self.device.type != "cpu")
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        self.pairs = KeptPairs(owners, min(all_gather_objects(min(room, free_room(beside)))), self.pair_dtype)

    @property
    def pair_dtype(self) -> torch.dtype | None:
        """What pairs are kept in; None: what their layer computes in."""
        return torch.bfloat16 if self.products.narrow(self.device) else None

    def owned(self, groups: Sequence[Group]) -> list[Group]:
        """Those whose statistics are this rank's."""
        return [group for group in groups if self.owners[group.name] == rank()]

    def zeros(self, *shape: int) -> Tensor:
        """A sum that starts."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def per_layer(self, part: Sequence[Group], count: int) -> dict[str, Tensor]:
        """Zeros [count, O, I] for each owned layer."""
        return {
            name: self.zeros(count, size, group.width)
            for group in self.owned(part)
            for name, size in group.outputs.items()
        }

    def run(
        self,
        description: str,
        groups: Sequence[Group],
        sets: Sequence[SequenceSet],
        accumulators: Sequence[Accumulator],
        drawn: bool = False,
        part: str = "",
        again: Sequence[SequenceSet] = (),
    ) -> None:
        """All sequences of `sets`, with the pairs at the layers of `groups`.

        Args:
            drawn: whether the gradients are those of labels drawn from the model, not of the examples' own.
            part: which of several runs of this kind it is, for the progress bar.
            again: sequences that will be run again at these layers: their pairs are kept as far as there is room.
        """
        kept, rest = self.pairs.split(groups, sets, drawn)
        admitted, rest = self.pairs.admit(groups, rest, again, drawn)
        steps = self.pairs.steps_of(kept) + self._steps(admitted) + self._steps(rest)
        with self.timed(description), self._bar(steps, description + part) as bar:
            self._replay(groups, kept, accumulators, bar)
            self._through_model(groups, admitted, [*accumulators, self.pairs], drawn, bar)
            self._through_model(groups, rest, accumulators, drawn, bar)

    def _bar(self, steps: int, text: str) -> "tqdm[Any]":
        return progress(steps, text)

    def _replay(
        self,
        groups: Sequence[Group],
        sets: Sequence[SequenceSet],
        accumulators: Sequence[Accumulator],
        bar: "tqdm[Any]",
    ) -> None:
        """Sequences whose pairs at these layers are here."""
        for _ in self.pairs.replay(sets, accumulators, self.device):
            bar.update()

    def _through_model(
        self,
        groups: Sequence[Group],
        sets: Sequence[SequenceSet],
        accumulators: Sequence[Accumulator],
        drawn: bool,
        bar: "tqdm[Any]",
    ) -> None:
        """Sequences whose pairs are not."""
        tracker = Tracker(self.model, groups, self.owners, self.dtype)
        with tracker.hooked():
            for batch in self.batches(sets, drawn):
                tracker.run(batch, [] if drawn else accumulators, accumulators if drawn else [])
                bar.update()

    def _steps(self, sets: Sequence[SequenceSet]) -> int:
        return sum(math.ceil(len(chosen.rows) / (self.config.batch_size * world_size())) for chosen in sets)

    def batches(self, sets: Sequence[SequenceSet], drawn: bool) -> Iterator[Batch]:
        """This rank's batches: each of one set, of sequences of similar length, dealt out evenly.

        Every rank gets the same number, so that ranks stay in step: one that has nothing left repeats a
        sequence with weight zero.
        """
        share = self.config.batch_size * world_size()
        for set_index, chosen in enumerate(sets):
            lengths = chosen.examples.positions[chosen.rows]
            longest_first = np.argsort(-lengths, kind="stable")
            weights = chosen.weights
            for start in range(0, len(chosen.rows), share):
                step = longest_first[start : start + share]
                dealt = [step[number :: world_size()] for number in range(world_size())]
                per_rank = [
                    [(int(lengths[i]), float(weights[i]), int(chosen.slots[i])) for i in mine]
                    or [(int(lengths[step[0]]), 0.0, int(chosen.slots[step[0]]))]
                    for mine in dealt
                ]
                positions = make_positions(set_index, per_rank, self.device, self.dtype)
                mine = dealt[rank()] if len(dealt[rank()]) else step[:1]
                rows = chosen.rows[mine].tolist()
                yield make_batch(
                    [chosen.examples[row] for row in rows],
                    [size for size, _, _ in per_rank[rank()]],
                    [weight for _, weight, _ in per_rank[rank()]],
                    [self._uniforms(chosen, row) for row in rows] if drawn else None,
                    positions,
                    self.device,
                    self.dtype,
                )

    def _uniforms(self, chosen: SequenceSet, row: int) -> np.ndarray:
        """A stream of its own for each row: the labels do not depend on batches or ranks."""
        return generator(self.seed, chosen.name, row, "fisher").random(int(chosen.examples.trained_tokens[row]))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds a phase's seconds to those of earlier ones of that name."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
