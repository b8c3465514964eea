"""What a forward and backward pass over sequences tells about the tracked linear layers.

Every position of a sequence gives a layer a pair (x, d): its input, and the gradient of the *summed*
token loss with respect to its output. Hooks hand each pair, once, to the accumulators of the pass.
Parameters are frozen: no weight gradient is ever computed, a sequence's gradient is sum d x^T.

Suffixes: B sequences of a batch, N their positions laid end to end (no padding), I in, O out,
K directions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ideal.distributed import all_reduce_
from ideal.errors import UserError

CDF_CHUNK = 256
"""Positions whose distribution is held in float64 at a time when labels are drawn."""


class Examples(Protocol):
    """A set of encoded examples; `ideal.data.ExampleSet` is one."""

    @property
    def positions(self) -> np.ndarray:
        """[rows] index of the last trained label: the positions before it carry statistics."""

    @property
    def trained_tokens(self) -> np.ndarray:
        """[rows] labels that are not masked."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]:
        """`input_ids` and `labels`, lists of int of the same length; labels[i] is input_ids[i] or -100."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one set, right padded to S tokens, and where their positions and labels are."""

    set_index: int
    input_ids: Tensor
    """[B, S]"""
    attention_mask: Tensor
    """[B, S], from lengths."""
    sizes: list[int]
    """[B] positions of each sequence; N is their sum."""
    weights: list[float]
    """[B] how often a sequence counts."""
    slots: list[int]
    """[B] the sequences' numbers within their set."""
    index: Tensor
    """[N] where the positions are in B x S."""
    position_weights: Tensor
    """[N] the weight of each position's sequence."""
    starts: Tensor
    """[B] where the sequences begin in N."""
    trained: Tensor
    """[trained tokens] where the positions that predict a trained label are in B x S."""
    targets: Tensor
    """[trained tokens] those labels."""
    uniforms: Tensor | None
    """[trained tokens] in [0, 1), float64: what labels are drawn with; None: they are not."""

    def sequence_gradients(self, x_NI: Tensor, d_NO: Tensor) -> Iterator[Tensor]:
        """G = sum of d x^T over the positions of each sequence, [O, I] B times."""
        for x, d in zip(x_NI.split(self.sizes), d_NO.split(self.sizes), strict=True):
            yield d.mT @ x


def make_batch(
    set_index: int,
    rows: Sequence[dict[str, Any]],
    sizes: Sequence[int],
    weights: Sequence[float],
    slots: Sequence[int],
    uniforms: Sequence[np.ndarray] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """Cuts each row to its first `size` tokens, which predict labels 1 to `size`, and pads on the right.

    All indices are made from lengths on the host, so the device never waits for them.
    """
    padded = max(sizes)
    # Any id will do as padding: no statistic and, in a causal model, no earlier position sees it.
    input_ids = np.zeros((len(rows), padded), dtype=np.int64)
    labels = np.full((len(rows), padded), -100, dtype=np.int64)
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        input_ids[number, :size] = row["input_ids"][:size]
        labels[number, :size] = row["labels"][1 : size + 1]
    lengths = np.asarray(sizes)
    valid = np.arange(padded) < lengths[:, None]
    trained = np.flatnonzero(labels != -100)

    def tensor(array: np.ndarray, to: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=to, non_blocking=True)

    return Batch(
        set_index=set_index,
        input_ids=tensor(input_ids),
        attention_mask=tensor(valid),
        sizes=list(sizes),
        weights=list(weights),
        slots=list(slots),
        index=tensor(np.flatnonzero(valid)),
        position_weights=tensor(np.repeat(np.asarray(weights, dtype=np.float64), lengths), dtype),
        starts=tensor(np.cumsum(lengths) - lengths),
        trained=tensor(trained),
        targets=tensor(labels.reshape(-1)[trained]),
        uniforms=None if uniforms is None else tensor(np.concatenate(uniforms), torch.float64),
    )


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


def _recomputes(module: nn.Module) -> bool:
    """Whether a block uses gradient checkpointing, which transformers does in training mode only.

    Such a block alone (not what is inside it) is left in training mode, unless it drops out by itself.
    """
    drops = any(
        "drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()
    )
    return bool(getattr(module, "gradient_checkpointing", False)) and not drops


class Accumulator(Protocol):
    """Sums something over all (x, d) pairs of a pass."""

    def add(self, layer: str, x_NI: Tensor, d_NO: Tensor, batch: Batch) -> None:
        """Adds a batch's positions at one layer."""

    def reduce_(self) -> None:
        """Adds up all ranks' sums, in place."""


class Sums:
    """One tensor of sums per layer."""

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self.sums = sums

    def reduce_(self) -> None:
        """Adds up all ranks' sums, in place."""
        for tensor in self.sums.values():
            all_reduce_(tensor)


class InputCovariance(Sums):
    """sum w x x^T, [I, I]."""

    def add(self, layer: str, x_NI: Tensor, d_NO: Tensor, batch: Batch) -> None:
        """Adds a batch's positions at one layer."""
        self.sums[layer].addmm_((x_NI * batch.position_weights[:, None]).mT, x_NI)


class OutputCovariance(Sums):
    """sum w d d^T, [O, O]."""

    def add(self, layer: str, x_NI: Tensor, d_NO: Tensor, batch: Batch) -> None:
        """Adds a batch's positions at one layer."""
        self.sums[layer].addmm_((d_NO * batch.position_weights[:, None]).mT, d_NO)


class InputNorms(Sums):
    """sum w |x|^2 over first positions and over all positions, [2]."""

    def add(self, layer: str, x_NI: Tensor, d_NO: Tensor, batch: Batch) -> None:
        """Adds a batch's positions at one layer."""
        norms_N = x_NI.square().sum(dim=1) * batch.position_weights
        self.sums[layer] += torch.stack([norms_N[batch.starts].sum(), norms_N.sum()])


class Gradients(Sums):
    """sum w d x^T for each set, [sets, O, I]."""

    def add(self, layer: str, x_NI: Tensor, d_NO: Tensor, batch: Batch) -> None:
        """Adds a batch's positions at one layer."""
        self.sums[layer][batch.set_index].addmm_((d_NO * batch.position_weights[:, None]).mT, x_NI)


class Eigenvalues(Sums):
    """sum over sequences of w (Q_S^T G Q_A)^2, entry by entry, [O, I]."""

    def __init__(
        self, sums: dict[str, Tensor], bases: Mapping[str, tuple[Tensor | None, Tensor | None]]
    ) -> None:
        """`bases`: per layer Q_S [O, O] and Q_A [I, I]; None stands for the identity."""
        super().__init__(sums)
        self.bases = bases

    def add(self, layer: str, x_NI: Tensor, d_NO: Tensor, batch: Batch) -> None:
        """Adds a batch's positions at one layer."""
        basis_O, basis_I = self.bases[layer]
        # Rotating positions is cheaper than rotating gradients: sequences are shorter than layers are wide.
        x_NI = x_NI if basis_I is None else x_NI @ basis_I
        d_NO = d_NO if basis_O is None else d_NO @ basis_O
        for gradient_OI, weight in zip(batch.sequence_gradients(x_NI, d_NO), batch.weights, strict=True):
            self.sums[layer].addcmul_(gradient_OI, gradient_OI, value=weight)


class Scores:
    """<G_i, V_k> of each sequence i and direction k, summed over layers; [sequences, K] per set."""

    def __init__(self, scores: list[Tensor], directions: dict[str, Tensor]) -> None:
        """`scores`: per set, what is added to, float64. `directions`: per layer V [K, O, I]."""
        self.scores = scores
        self.directions = directions

    def add(self, layer: str, x_NI: Tensor, d_NO: Tensor, batch: Batch) -> None:
        """Adds a batch's sequences at one layer."""
        flat = self.directions[layer].flatten(1)
        scores = self.scores[batch.set_index]
        gradients = batch.sequence_gradients(x_NI, d_NO)
        for gradient_OI, weight, slot in zip(gradients, batch.weights, batch.slots, strict=True):
            scores[slot] += weight * (flat @ gradient_OI.flatten()).to(scores.dtype)

    def reduce_(self) -> None:
        """Adds up all ranks' scores, in place."""
        for tensor in self.scores:
            all_reduce_(tensor)


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


class Tracker:
    """Runs batches through a model and hands the (x, d) pairs of its tracked layers to accumulators."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear], dtype: torch.dtype) -> None:
        """`dtype`: what losses and statistics are computed in; float32, or float64 for a float64 model."""
        self.model = model
        self.layers = layers
        self.dtype = dtype
        self.batch: Batch
        self.accumulators: Sequence[Accumulator] = ()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the tracked layers, for as long as it lasts."""
        handles = [
            layer.register_forward_hook(partial(self._forward, name)) for name, layer in self.layers.items()
        ]
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
        self.batch = batch
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = output.logits.flatten(0, 1).index_select(0, batch.trained).to(self.dtype)
        if true:
            self.accumulators = true
            loss = nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
            loss.backward(retain_graph=bool(sampled))
        if sampled:
            self.accumulators = sampled
            assert batch.uniforms is not None
            drawn = draw_labels(logits.detach(), batch.uniforms)
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()

    def _forward(self, name: str, module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.shape[:-1].numel() != self.batch.input_ids.numel():
            raise UserError(
                f"influence.layers: {name} does not see every position of a batch (is it an expert that"
                " tokens are routed to?), so its sequences cannot be told apart: leave it out"
            )
        return _Capture.apply(output, args[0], partial(self._receive, name))

    @torch.no_grad()
    def _receive(self, name: str, x: Tensor, d: Tensor) -> None:
        index = self.batch.index
        x_NI = x.reshape(-1, x.shape[-1]).index_select(0, index).to(self.dtype)
        d_NO = d.reshape(-1, d.shape[-1]).index_select(0, index).to(self.dtype)
        for accumulator in self.accumulators:
            accumulator.add(name, x_NI, d_NO, self.batch)


@torch.no_grad()
def draw_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels [k] from the softmax of `logits` [k, vocabulary]: its inverse distribution at `uniforms` [k]."""
    drawn = []
    for part, uniform in zip(logits.split(CDF_CHUNK), uniforms.split(CDF_CHUNK), strict=True):
        cdf = part.double().softmax(dim=-1).cumsum(dim=-1)
        label = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
        drawn.append(label[:, 0].clamp_max(part.shape[-1] - 1))
    return torch.cat(drawn)
