"""What a forward and backward pass over sequences tells about the tracked linear layers.

Every position of a sequence gives a layer a pair (x, d): its input, and the gradient of the *summed*
token loss with respect to its output. Hooks hand each pair, once, to the accumulators of the pass, on
the rank that owns the layer. Parameters are frozen: no weight gradient is ever computed, a sequence's
gradient is sum d x^T.

Suffixes: B sequences of a batch, N their positions laid end to end (no padding), I in, O out,
K directions.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import masking_utils

from ideal.distributed import exchange, rank, world_size
from ideal.errors import UserError
from ideal.influence.layers import Group
from ideal.influence.products import Products

CDF_CHUNK = 256
"""Positions whose distribution is held in float64 at a time when labels are drawn."""
SCORE_CHUNK = 8
"""Sequences whose gradients are held at a time when they are scored."""
OUTBOX_BYTES = 2**24
"""Pairs that may wait on a rank before they go to the layers' owners: blocks of memory this small are used again, where
glibc maps those above 32 MB anew each time."""


@dataclass(frozen=True)
class Positions:
    """The positions of all ranks' batches of one step, laid end to end: whose they are, and what they count."""

    set_index: int
    sizes: list[int]
    """[B] positions of each sequence; N is their sum."""
    weights: list[float]
    """[B] how often a sequence counts."""
    slots: list[int]
    """[B] the sequences' numbers within their set."""
    ranks: list[int]
    """[ranks] how many of the N positions each rank has."""
    position_weights: Tensor
    """[N] the weight of each position's sequence."""
    starts: Tensor
    """[B] where the sequences begin in N."""

    def sequences(self, x_NI: Tensor, d_NO: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each sequence's part of x and d."""
        return zip(x_NI.split(self.sizes), d_NO.split(self.sizes), strict=True)

    def weighted(self, tensor: Tensor) -> tuple[Tensor, float]:
        """(t, a) such that a t is the tensor [N, any] times its positions' weights."""
        if len(set(self.weights)) == 1:
            return tensor, self.weights[0]
        return tensor * self.position_weights[:, None], 1.0

    def picked(self, set_index: int, weights: Mapping[int, float]) -> tuple["Positions", list[tuple[int, int]]]:
        """The positions of some sequences as a set's of its own, and the ranges of N that they are.

        Args:
            weights: of these sequences, by slot. A sequence of weight zero here is a filler: it stays behind.
        """
        places = [k for k, slot in enumerate(self.slots) if self.weights[k] and slot in weights]
        chosen = [(self.sizes[k], weights[self.slots[k]], self.slots[k]) for k in places]
        ends = np.cumsum(self.sizes).tolist()
        ranges: list[tuple[int, int]] = []
        for k in places:
            start = ends[k] - self.sizes[k]
            # Neighbours are one range.
            first = ranges.pop()[0] if ranges and ranges[-1][1] == start else start
            ranges.append((first, ends[k]))
        device, dtype = self.position_weights.device, self.position_weights.dtype
        return make_positions(set_index, [chosen], device, dtype), ranges


@dataclass(frozen=True)
class Batch:
    """One rank's sequences of a step, right padded to S tokens, and where their positions and labels are."""

    input_ids: Tensor
    """[B, S]"""
    index: Tensor | None
    """[n] where the positions are in B x S; None: everywhere."""
    trained: Tensor
    """[trained tokens] where the positions that predict a trained label are in B x S."""
    targets: Tensor
    """[trained tokens] those labels."""
    label_weights: Tensor
    """[trained tokens] the weight of each label's sequence."""
    uniforms: Tensor | None
    """[trained tokens] in [0, 1), float64: what labels are drawn with; None: they are not."""
    positions: Positions
    """Those of all ranks."""


def make_positions(
    set_index: int, per_rank: Sequence[Sequence[tuple[int, float, int]]], device: torch.device, dtype: torch.dtype
) -> Positions:
    """per_rank: for each rank the (positions, weight, slot) of its sequences."""
    every = [sequence for sequences in per_rank for sequence in sequences]
    lengths = np.array([size for size, _, _ in every], dtype=np.int64)
    weights = np.array([weight for _, weight, _ in every])
    return Positions(
        set_index=set_index,
        sizes=[size for size, _, _ in every],
        weights=[weight for _, weight, _ in every],
        slots=[slot for _, _, slot in every],
        ranks=[sum(size for size, _, _ in sequences) for sequences in per_rank],
        position_weights=on_device(np.repeat(weights, lengths), device, dtype),
        starts=on_device(np.cumsum(lengths) - lengths, device),
    )


def make_batch(
    rows: Sequence[dict[str, Any]],
    sizes: Sequence[int],
    weights: Sequence[float],
    uniforms: Sequence[np.ndarray] | None,
    positions: Positions,
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """Cuts each row to its first `size` tokens, which predict labels 1 to `size`, and pads on the right.

    All indices are made from lengths on the host, so the device never waits for them. No mask is needed: in a
    causal model nothing that counts sees what comes after it.
    """
    padded = max(sizes)
    # Any id will do as padding: no statistic and, in a causal model, no earlier position sees it.
    input_ids = np.zeros((len(rows), padded), dtype=np.int64)
    labels = np.full((len(rows), padded), -100, dtype=np.int64)
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        input_ids[number, :size] = row["input_ids"][:size]
        labels[number, :size] = row["labels"][1 : size + 1]
    valid = np.arange(padded) < np.asarray(sizes)[:, None]
    trained = np.flatnonzero(labels != -100)
    return Batch(
        input_ids=on_device(input_ids, device),
        index=None if valid.all() else on_device(np.flatnonzero(valid), device),
        trained=on_device(trained, device),
        targets=on_device(labels.reshape(-1)[trained], device),
        label_weights=on_device(np.asarray(weights)[trained // padded], device, dtype),
        uniforms=None if uniforms is None else on_device(np.concatenate(uniforms), device, torch.float64),
        positions=positions,
    )


def on_device(array: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of these numbers; from pinned memory a GPU fetches them while the host goes on."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without weight gradients, such that a backward pass still reaches every layer.

    The model is given back as it was (modes, requires_grad, gradients), also after an exception.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        model.eval()
        for module in model.modules():
            if _recomputes(module):
                module.training = True
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def unpacked() -> Iterator[None]:
    """Keeps transformers from asking the device in every forward pass whether rows are packed, which it waits for.

    Ours are not: each is one sequence, whose positions count from zero.
    """
    asks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asks


def _recomputes(module: nn.Module) -> bool:
    """Whether a block uses gradient checkpointing, which transformers does in training mode only.

    Such a block alone (not what is inside it) is left in training mode, unless it drops out by itself.
    """
    drops = any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
    return bool(getattr(module, "gradient_checkpointing", False)) and not drops


class Accumulator(Protocol):
    """Sums something over all (x, d) pairs of a pass, for the layers that this rank owns."""

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's positions at the layers of a group: their input, and d_NO of each."""


Sketch = Callable[[Tensor, Positions], tuple[Tensor, Positions]]
"""Stands for the rows of a tensor [N, any] by fewer ones, and says whose these are."""


def every_position(tensor: Tensor, positions: Positions) -> tuple[Tensor, Positions]:
    """Themselves."""
    return tensor, positions


class InputCovariance:
    """sum w x x^T per group, [I, I]; only the upper triangle is filled."""

    def __init__(self, sums: dict[str, Tensor], products: Products, sketch: Sketch = every_position) -> None:
        self.sums, self.products, self.sketch = sums, products, sketch

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's positions."""
        x_NI, positions = self.sketch(x_NI, positions)
        self.products.add_square_(self.sums[group.name], x_NI, *positions.weighted(x_NI))


class OutputCovariance:
    """sum w d d^T per layer, [O, O]; only the upper triangle is filled."""

    def __init__(self, sums: dict[str, Tensor], products: Products, sketch: Sketch = every_position) -> None:
        self.sums, self.products, self.sketch = sums, products, sketch

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's positions."""
        for name, d_NO in outputs.items():
            d_nO, rows = self.sketch(d_NO, positions)
            self.products.add_square_(self.sums[name], d_nO, *rows.weighted(d_nO))


class InputNorms:
    """sum w |x|^2 over first positions and over all positions, per group, [2]."""

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self.sums = sums

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's positions."""
        total = self.sums[group.name]
        norms_N = torch.linalg.vector_norm(x_NI, dim=1, dtype=total.dtype).square() * positions.position_weights
        total += torch.stack([norms_N[positions.starts].sum(), norms_N.sum()])


class Traces:
    """An estimate of sum over sequences of w |G|^2 per layer, [], float64: the trace of the curvature."""

    def __init__(self, sums: dict[str, Tensor], probes: Mapping[str, Tensor]) -> None:
        """probes: per layer R [O, K] with E |R^T G|^2 = |G|^2."""
        self.sums, self.probes = sums, probes

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's sequences."""
        for name, d_NO in outputs.items():
            probes_OK, total = self.probes[name], self.sums[name]
            probed_NK, x_NI = d_NO.to(probes_OK.dtype) @ probes_OK, x_NI.to(probes_OK.dtype)
            for (x, probed), weight in zip(positions.sequences(x_NI, probed_NK), positions.weights, strict=True):
                total += weight * torch.linalg.vector_norm(probed.mT @ x, dtype=total.dtype).square()


class Gradients:
    """sum w d x^T for each set and layer, [sets, O, I]."""

    def __init__(self, sums: dict[str, Tensor], products: Products, of: Collection[int] | None = None) -> None:
        """of: the sets; None: all."""
        self.sums, self.products, self.of = sums, products, of

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's positions."""
        if self.of is not None and positions.set_index not in self.of:
            return
        weighted_NI, factor = positions.weighted(x_NI)
        for name, d_NO in outputs.items():
            self.products.add_(self.sums[name][positions.set_index], d_NO, weighted_NI, factor)


@dataclass(frozen=True)
class Halves:
    """Sums over every other sequence of each set, whose difference tells how certain those over all are."""

    sums: dict[str, Tensor]
    """Per layer [O, I]."""
    apart: Sequence[float]
    """Per set, in [0, 1]: 1 where a sequence goes to one of the two sums, 0 where half of it goes to either."""


class Eigenvalues:
    """sum over sequences of w (Q_S^T G Q_A)^2 per layer, entry by entry, [O, I]."""

    def __init__(
        self,
        sums: dict[str, Tensor],
        bases: Mapping[str, tuple[Tensor | None, Tensor | None]],
        products: Products,
        gradients: dict[str, Tensor] | None = None,
        of: Collection[int] = (),
        halves: "Halves | None" = None,
    ) -> None:
        """Args:
        bases: per layer Q_S [O, O] and Q_A [I, I]; None stands for the identity. Layers of a group share Q_A.
        gradients: per layer [sets, O, I]; takes up sum w Q_S^T G Q_A, which costs next to nothing here.
        of: the sets for which it does.
        halves: takes up part of what would go to `sums`.
        """
        self.sums, self.products, self.gradients, self.of, self.halves = sums, products, gradients, of, halves
        # One copy of what layers share.
        distinct = {id(basis): basis for pair in bases.values() for basis in pair}
        given = {key: self.products.basis(basis) for key, basis in distinct.items()}
        self.bases = {name: (given[id(basis_O)], given[id(basis_I)]) for name, (basis_O, basis_I) in bases.items()}

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's positions."""
        # Rotating positions is cheaper than rotating gradients: sequences are shorter than layers are wide.
        x_NI = self.products.rotate(x_NI, self.bases[group.name][1])
        for name, d_NO in outputs.items():
            d_NO = self.products.rotate(d_NO, self.bases[name][0])
            sequences = zip(positions.sequences(x_NI, d_NO), positions.weights, positions.slots, strict=True)
            for (x, d), weight, slot in sequences:
                gradient_OI = self.products.outer(d, x)
                for sums, part in self._shared(positions.set_index, slot):
                    sums[name].addcmul_(gradient_OI, gradient_OI, value=part * weight)
                if self.gradients is not None and positions.set_index in self.of:
                    self.gradients[name][positions.set_index].add_(gradient_OI, alpha=weight)

    def _shared(self, set_index: int, slot: int) -> list[tuple[dict[str, Tensor], float]]:
        """Which sums a sequence goes to, and with what part of it."""
        if self.halves is None:
            return [(self.sums, 1.0)]
        larger, smaller = ((1 + sign * self.halves.apart[set_index]) / 2 for sign in (1, -1))
        first, second = (smaller, larger) if slot % 2 else (larger, smaller)
        return [(sums, part) for sums, part in ((self.sums, first), (self.halves.sums, second)) if part]


class Scores:
    """<G_i, V_k> of each picked sequence i and direction k, summed over layers; [sequences, K] per set."""

    def __init__(
        self,
        scores: list[Tensor],
        picked: list[set[int]],
        directions: dict[str, Tensor],
        products: Products,
        streams: dict[str, Tensor] | None = None,
    ) -> None:
        """Args:
        scores: per set what is added to, a row per slot, float64.
        picked: per set the slots that are scored.
        directions: per layer V [K, O, I].
        streams: per layer [K, sets], float64; takes up sum w <G_i, V_k>.
        """
        self.scores, self.picked, self.directions, self.products = scores, picked, directions, products
        self.streams = streams

    def add(self, group: Group, x_NI: Tensor, outputs: dict[str, Tensor], positions: Positions) -> None:
        """Adds a step's sequences."""
        picked = self.picked[positions.set_index]
        # A sequence of weight zero is a filler that another step scores.
        chosen = [
            number
            for number, (slot, weight) in enumerate(zip(positions.slots, positions.weights, strict=True))
            if slot in picked and weight
        ]
        scores = self.scores[positions.set_index]
        slots = on_device(np.array(positions.slots)[chosen], scores.device)
        weights = on_device(np.array(positions.weights)[chosen], scores.device, scores.dtype)
        for name, d_NO in outputs.items():
            pairs = list(positions.sequences(x_NI, d_NO))
            flat = self.directions[name].flatten(1)
            for start in range(0, len(chosen), SCORE_CHUNK):
                part = slice(start, start + SCORE_CHUNK)
                gradients = torch.stack([self.products.outer(d, x) for x, d in (pairs[i] for i in chosen[part])])
                found = (gradients.flatten(1) @ flat.mT).to(scores.dtype)
                scores.index_add_(0, slots[part], found)
                if self.streams is not None:
                    self.streams[name][:, positions.set_index] += weights[part] @ found


class _Capture(torch.autograd.Function):
    """The identity, which hands (x, d) over in the backward pass.

    x is kept the way autograd keeps activations, so gradient checkpointing drops and recomputes it
    too; and since only the backward pass hands pairs over, a second forward counts nothing twice.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.receive(x, gradients[0])
        return gradients[0], None, None


@dataclass
class _Pairs:
    """What the layers of a group have handed over so far in a backward pass."""

    x: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Shipment:
    """Pairs that are on their way to their owners, while the model goes on."""

    arrived: Callable[[], list[Tensor]]
    own: list[tuple[Group, _Pairs]]
    """This rank's part of what it will have."""


class Tracker:
    """Runs batches through a model and hands the (x, d) pairs of its tracked layers to their owners."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], owners: Mapping[str, int], dtype: torch.dtype
    ) -> None:
        """Args:
        owners: the rank of each group, by its name.
        dtype: what losses are computed in; float32, or float64 for a float64 model.
        """
        self.model, self.groups, self.owners, self.dtype = model, groups, owners, dtype
        self.layers = {name: layer for group in groups for name, layer in group.layers.items()}
        self.group_of = {name: group for group in groups for name in group.layers}
        self.batch: Batch
        self.accumulators: Sequence[Accumulator] = ()
        self.pending: dict[str, _Pairs] = {}
        self.outbox: list[tuple[Group, _Pairs]] = []
        self.under_way: _Shipment | None = None
        self.selected = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the tracked layers, for as long as it lasts."""
        handles = [layer.register_forward_hook(partial(self._forward, name)) for name, layer in self.layers.items()]
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        tracked = set(self.layers.values())
        if head is not None and tracked.isdisjoint(head.modules()):
            handles.append(head.register_forward_pre_hook(self._select))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batch: Batch, true: Sequence[Accumulator], sampled: Sequence[Accumulator]) -> None:
        """One forward pass, and a backward pass for each kind of labels that somebody wants.

        Args:
            batch: with `uniforms` if there are `sampled`.
            true: what sees the gradients of the loss on the examples' own labels.
            sampled: what sees those of labels drawn from the model's distribution (its true Fisher).
        """
        logits = self.logits(batch)
        if true:
            loss = nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
            self.backward(loss, true, retain_graph=bool(sampled))
        if sampled:
            assert batch.uniforms is not None
            drawn = draw_labels(logits.detach(), batch.uniforms)
            self.backward(nn.functional.cross_entropy(logits, drawn, reduction="sum"), sampled)

    def logits(self, batch: Batch) -> Tensor:
        """[trained tokens, vocabulary], those of the positions that predict a trained label."""
        self.batch, self.selected = batch, False
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
        return (logits if self.selected else logits.index_select(0, batch.trained)).to(self.dtype)

    def backward(self, loss: Tensor, accumulators: Sequence[Accumulator], retain_graph: bool = False) -> None:
        """Hands the pairs that `loss` gives to the accumulators, which have all of them when it returns."""
        self.accumulators = accumulators
        loss.backward(retain_graph=retain_graph)
        with torch.no_grad():
            # Layers of a group that had no part in the loss keep it waiting.
            for name in list(self.pending):
                self._complete(self.group_of[name])
            self._deliver()
            self._unload()

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Logits are computed where a label is trained, and nowhere else."""
        if args[0].shape[:2] != self.batch.input_ids.shape:
            return None
        self.selected = True
        return args[0].flatten(0, 1).index_select(0, self.batch.trained)[None], *args[1:]

    def _forward(self, name: str, module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.shape[:-1].numel() != self.batch.input_ids.numel():
            raise UserError(
                f"influence.layers: {name} does not see every position of a batch (is it an expert that"
                " tokens are routed to?), so its sequences cannot be told apart: leave it out"
            )
        return _Capture.apply(output, args[0], partial(self._receive, name))

    @torch.no_grad()
    def _receive(self, name: str, x: Tensor, d: Tensor) -> None:
        group = self.group_of[name]
        if group.name not in self.pending:
            self.pending[group.name] = _Pairs(self._at_positions(x))
        pairs = self.pending[group.name]
        pairs.outputs[name] = self._at_positions(d)
        if len(pairs.outputs) == len(group.layers):
            self._complete(group)

    def _at_positions(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.batch.index is None else flat.index_select(0, self.batch.index)

    def _complete(self, group: Group) -> None:
        pairs = self.pending.pop(group.name)
        if world_size() == 1:
            self._accumulate(group, pairs)
            return
        self.outbox.append((group, pairs))
        # A function of what all ranks know, so that all send at the same time.
        waiting = sum(_width(group, pairs) for group, pairs in self.outbox) * max(self.batch.positions.ranks)
        if waiting * pairs.x.element_size() > OUTBOX_BYTES:
            self._deliver()

    def _deliver(self) -> None:
        """Sends the waiting pairs to their owners, and accumulates what was sent before them."""
        if not self.outbox:
            return
        positions = self.batch.positions
        own = [(group, pairs) for group, pairs in self.outbox if self.owners[group.name] == rank()]
        sent: list[list[Tensor]] = [[] for _ in range(world_size())]
        for group, pairs in self.outbox:
            if self.owners[group.name] != rank():
                sent[self.owners[group.name]] += [pairs.x, *pairs.outputs.values()]
        width = sum(_width(group, pairs) for group, pairs in own)
        counts = [0 if other == rank() else size * width for other, size in enumerate(positions.ranks)]
        shipment = _Shipment(exchange(sent, counts, self.outbox[0][1].x), own)
        self.outbox.clear()
        self._unload()
        self.under_way = shipment

    def _unload(self) -> None:
        """Accumulates what is under way, once it is here."""
        shipment, self.under_way = self.under_way, None
        if shipment is None:
            return
        arrived, offsets = shipment.arrived(), [0] * world_size()
        for group, own in shipment.own:
            self._accumulate(group, _unpack(arrived, offsets, own, self.batch.positions))

    def _accumulate(self, group: Group, pairs: _Pairs) -> None:
        for accumulator in self.accumulators:
            accumulator.add(group, pairs.x, pairs.outputs, self.batch.positions)


def _unpack(arrived: list[Tensor], offsets: list[int], own: _Pairs, positions: Positions) -> _Pairs:
    """All ranks' pairs of a group, with this rank's own, laid end to end; moves the offsets on."""
    tensors = []
    for mine in (own.x, *own.outputs.values()):
        parts = []
        for number, count in enumerate(positions.ranks):
            if number == rank():
                parts.append(mine)
                continue
            start = offsets[number]
            offsets[number] += mine.shape[1] * count
            parts.append(arrived[number][start : offsets[number]].view(count, mine.shape[1]))
        tensors.append(torch.cat(parts))
    return _Pairs(tensors[0], dict(zip(own.outputs, tensors[1:], strict=True)))


def _width(group: Group, pairs: _Pairs) -> int:
    """Numbers per position."""
    return group.width + sum(group.outputs[name] for name in pairs.outputs)


@torch.no_grad()
def draw_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels [k] from the softmax of `logits` [k, vocabulary]: its inverse distribution at `uniforms` [k]."""
    drawn = []
    for part, uniform in zip(logits.split(CDF_CHUNK), uniforms.split(CDF_CHUNK), strict=True):
        cdf = part.double().softmax(dim=-1).cumsum(dim=-1)
        label = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
        drawn.append(label[:, 0].clamp_max(part.shape[-1] - 1))
    return torch.cat(drawn)
