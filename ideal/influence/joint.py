"""The joint Gauss-Newton system over all tracked layers at once, cross-layer terms included.

    (H + D) V = g        H = (1/T) sum over sequences i of w_i, over i's trained positions of J^T (diag p - p p^T) J

J [vocabulary, all tracked weights] is the Jacobian of a position's logits, p their softmax, T the
weighted trained tokens, and D the layers' dampings: D_l times the identity. EK-FAC leaves out what
lies between layers, and approximates each layer's own block; here both are exact.

H is never formed. Block conjugate gradients (O'Leary 1980), preconditioned by EK-FAC, need only its
products with directions (Pearlmutter 1994; Schraudolph 2002): one for each right-hand side and iteration,
and every right-hand side is solved in the space that all of them span. A product with a direction is
- forward: the tangent of the logits when the weights move along it (forward-mode differentiation),
- at the trained positions: times w (diag p - p p^T),
- backward: with that as the cotangent, the layers' pairs (x, d) as in statistics.py, whose d^T x is the product.

One forward pass per batch serves all directions of a pass: its linear layers' outputs are kept, so each
direction takes what the linear layers' tangents take (a forward pass), and a backward pass.

Suffixes: N positions or trained tokens laid end to end, I in, O out, K right-hand sides.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ideal.distributed import all_gather_objects, all_reduce_, broadcast_, is_initialized, progress, rank, world_size
from ideal.errors import UserError
from ideal.influence.ekfac import Curvature
from ideal.influence.statistics import Batch

Vectors = dict[str, Tensor]
"""Per layer of this rank's own, [K, O, I]."""
Weights = dict[str, Tensor]
"""Per tracked layer, [O, I]: one direction, or its product."""

GRAM_CHUNK = 2**20
"""Entries of each vector that are held in float64 at a time for scalar products."""


@dataclass(frozen=True)
class JointSolution:
    """(H + D)^-1 g, and how it was reached."""

    solutions: Vectors
    """V [K, O, I] of the layers that this rank owns."""
    iterations: int
    residuals: list[list[float]]
    """[iterations][K] after each iteration, sqrt(r^T P r / g^T P g) with P the preconditioner's inverse; 0 for a
    right-hand side that is zero. Near the solution's relative error in the norm of H + D as long as EK-FAC is near
    H: on trained tiny networks .05 went with a cosine of .9995 to the exact influence matrix. Where training data
    are memorised the empirical Fisher is far below H (a tenth), residuals fall slowly."""
    ratios: list[float]
    """[K] v^T (H + D) v / v^T g along what EK-FAC finds, v = P g: how many times as much curvature there is as EK-FAC
    takes it to have; 0 for a right-hand side that is zero. P (H + D) has an eigenvalue at least as large: the larger,
    the more iterations."""


def solve_joint(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Callable[[], Iterable[Batch]],
    gradients: Mapping[str, Tensor],
    curvature: Mapping[str, Curvature],
    damping: Mapping[str, float],
    tokens: float,
    iterations: int,
    tolerance: float,
    owners: Mapping[str, int] | None = None,
    at_once: int = 1,
) -> JointSolution:
    """Solves (H + D) V = g for all right-hand sides together.

    Every rank calls it, with `frozen(model)` active. Gradient checkpointing is off inside: the
    activations of one batch are held. A layer with damping 0 saw no token: its V is zero.

    Memory beyond that of a forward and backward pass, in numbers of the size of the tracked weights:
    an owner holds 4 K per layer of its own (V, the residual, the direction, the product; the residual
    takes the place of `gradients`), and K more for one layer at a time; every rank holds 2 x `at_once`
    per layer that is not its own (the directions in work and their products). One process takes all K
    at once, in place. A batch needs its activations and four times [trained tokens, vocabulary].

    Vectors and products are float32 (float64 for a float64 model), scalars float64. A bf16 model's
    forward, tangent and backward passes are bf16: its products are right to about 2% of the largest
    entry, and the true residual lies above the one that is reported (on a trained tiny network .08 for a
    reported .05, where the matrix has a cosine of .998 to the exact one).

    Args:
        model: a causal language model, as for `compute_influence`; on every rank, also if sharded.
        layers: the tracked layers, the same on every rank.
        batches: gives this rank's batches anew for every pass; with sharded parameters as many as any other rank's.
        gradients: the right-hand sides g [K, O, I] of this rank's own layers. **Overwritten.**
        curvature: EK-FAC's H + D of this rank's own layers, the preconditioner.
        damping: D_l of this rank's own layers, in the units of H (nats per trained token).
        tokens: T, the weighted trained tokens of all ranks' batches.
        iterations: at most so many.
        tolerance: ends when every right-hand side's residual is at most this; see `JointSolution.residuals`.
        owners: the rank of each layer; None: one process.
        at_once: directions that several ranks work on in one pass over the batches.

    Raises:
        UserError: an operation of the model has no forward derivative, a layer does not see every
            position, or a product is not finite.
    """
    owners = owners or dict.fromkeys(layers, 0)
    residual = {name: gradients[name] for name in layers if owners[name] == rank()}
    count = max(all_gather_objects(max((len(tensor) for tensor in residual.values()), default=0)))
    for name, tensor in residual.items():
        if not damping[name]:
            tensor.zero_()
    at_once = count if world_size() == 1 else min(at_once, count)
    with _Products(model, layers, batches, owners, at_once).ready() as products:

        def multiply(direction: Vectors, product: Vectors, numbers: Sequence[int]) -> None:
            """(H + D) times the directions with these numbers of K, into `product`."""
            products.sum(direction, product, numbers)
            for name, tensor in product.items():
                tensor.div_(tokens).add_(direction[name], alpha=damping[name])

        gram = _Gram(count, products.device, products.dtype)
        with progress(0, "joint curvature") as products.bar:
            products.passes = iterations * -(-count // at_once)
            return _conjugate_gradients(multiply, residual, curvature, gram, iterations, tolerance)


def _conjugate_gradients(
    multiply: Callable[[Vectors, Vectors, Sequence[int]], None],
    residual: Vectors,
    curvature: Mapping[str, Curvature],
    gram: "_Gram",
    iterations: int,
    tolerance: float,
) -> JointSolution:
    """`residual` is the right-hand sides on entry; `multiply` writes the products of some of K directions.

    With P the directions, Q = (H + D) P, R the residuals and Z the preconditioned ones, as columns:
    X += P a and R -= Q a with P^T Q a = P^T R; then P <- Z + P b with P^T Q b = - Q^T Z. Starting at zero, so
    the first iterate is the best combination of what EK-FAC finds for the right-hand sides.
    """
    solution = {name: torch.zeros_like(tensor) for name, tensor in residual.items()}
    direction = {name: _solve(curvature[name], tensor) for name, tensor in residual.items()}
    product = {name: torch.zeros_like(tensor) for name, tensor in residual.items()}
    initial = gram.of(residual, direction).diagonal().clone()
    numbers = [number for number, value in enumerate(initial.tolist()) if value]
    residuals: list[list[float]] = []
    ratios = [0.0] * len(initial)
    while numbers and len(residuals) < iterations and (not residuals or max(residuals[-1]) > tolerance):
        multiply(direction, product, numbers)
        curved = gram.of(direction, product)
        if not residuals:
            ratios = _over(curved.diagonal(), initial).tolist()
        inverse = gram.inverse(curved)
        step = inverse @ gram.of(direction, residual)
        overlap = gram.zeros()
        for name, tensor in residual.items():
            _add_(solution[name], direction[name], step)
            _add_(tensor, product[name], -step)
            preconditioned = _solve(curvature[name], tensor)
            _add_gram_(overlap, product[name], preconditioned)
            # From here on the preconditioned residual stands in the product's place, then the next direction.
            product[name].copy_(preconditioned)
        squared = gram.of(residual, product).diagonal()
        turn = -inverse @ all_reduce_(overlap)
        for name, tensor in product.items():
            _add_(tensor, direction[name], turn)
        direction, product = product, direction
        residuals.append(_over(squared, initial).clamp_min(0.0).sqrt().tolist())
    return JointSolution(solution, len(residuals), residuals, ratios)


def _over(some: Tensor, initial: Tensor) -> Tensor:
    """some_k / initial_k, [K]; 0 for a right-hand side that is zero."""
    return torch.where(initial > 0, some / initial, 0.0)


@dataclass(frozen=True)
class _Gram:
    """[K, K] scalar products of vectors over all layers of all ranks, float64."""

    count: int
    device: torch.device
    dtype: torch.dtype
    """The vectors'."""

    def zeros(self) -> Tensor:
        """Where they are added up."""
        return torch.zeros(self.count, self.count, dtype=torch.float64, device=self.device)

    def of(self, left: Vectors, right: Vectors) -> Tensor:
        """<left_k, right_l>."""
        total = self.zeros()
        for name, tensor in left.items():
            _add_gram_(total, tensor, right[name])
        return all_reduce_(total)

    def inverse(self, matrix: Tensor) -> Tensor:
        """Of P^T Q: pseudo-inverted where directions depend on each other to within rounding.

        They do if capabilities' gradients are alike, and for right-hand sides that are zero or solved.
        """
        if not bool(matrix.isfinite().all()):
            raise UserError("influence.solver: the Gauss-Newton products are not finite; did training diverge?")
        scale = torch.where(matrix.diagonal() > 0, matrix.diagonal().rsqrt(), 0.0)
        values, vectors = torch.linalg.eigh(scale[:, None] * (matrix + matrix.mT) / 2 * scale)
        inverses = torch.where(values > self.count * torch.finfo(self.dtype).eps, 1 / values, 0.0)
        return scale[:, None] * (vectors * inverses) @ vectors.mT * scale


def _solve(curvature: Curvature, gradients_KOI: Tensor) -> Tensor:
    # One at a time: what the solution needs on the way is one gradient's size, not K.
    return torch.stack([curvature.solve(gradient_OI) for gradient_OI in gradients_KOI])


def _add_gram_(total: Tensor, left_KOI: Tensor, right_KOI: Tensor) -> None:
    # In pieces: float64 copies of all K of a large layer would be what memory is sized by.
    pieces = (tensor.flatten(1).split(GRAM_CHUNK, dim=1) for tensor in (left_KOI, right_KOI))
    for one, other in zip(*pieces, strict=True):
        total += one.double() @ other.double().mT


def _add_(vectors_KOI: Tensor, others_KOI: Tensor, factors: Tensor) -> None:
    """vectors_k += sum over l of others_l factors[l, k], in place."""
    vectors_KOI.view(len(factors), -1).addmm_(factors.mT.to(others_KOI), others_KOI.flatten(1))


class _Products:
    """Products with T x H: passes over all ranks' batches."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        batches: Callable[[], Iterable[Batch]],
        owners: Mapping[str, int],
        at_once: int,
    ) -> None:
        self.model = model
        self.layers = layers
        self.batches = batches
        self.owners = owners
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        self.device = weight.device
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.passes = 0
        self.bar: Any
        self.head = model.get_output_embeddings()  # type: ignore[operator]
        names = {module: name for name, module in layers.items()}
        self.linear = {
            module: _Linear(self, module, names.get(module))
            for module in model.modules()
            # A subclass that computes otherwise (quantised) is left to forward-mode differentiation itself.
            if isinstance(module, nn.Linear) and (module in names or type(module).forward is nn.Linear.forward)
        }
        other = [name for name in layers if owners[name] != rank()]
        # What other ranks own: directions as they are sent here, and this rank's part of their products.
        self.received = [self._empty(other) for _ in range(at_once)]
        self.partial = [self._empty(other) for _ in range(at_once)]
        self.batch: Batch
        self.direction: Weights | None = None
        self.product: Weights = {}

    def _empty(self, names: Iterable[str]) -> Weights:
        shapes = {name: (self.layers[name].out_features, self.layers[name].in_features) for name in names}
        return {
            name: torch.empty(shape, dtype=self.dtype, device=self.layers[name].weight.device)
            for name, shape in shapes.items()
        }

    @contextmanager
    def ready(self) -> Iterator["_Products"]:
        """The model's linear layers keep outputs and take tangents, for as long as it lasts."""
        # Gradient checkpointing, which alone `frozen` leaves in training mode.
        training = [module for module in self.model.modules() if module.training]
        with ExitStack() as stack:
            for module in training:
                stack.callback(setattr, module, "training", True)
                module.training = False
            for module, linear in self.linear.items():
                stack.callback(_restore_forward, module, vars(module).get("forward"))
                module.forward = linear.forward  # type: ignore[assignment]
            # It and its linear layers know each other: what they hold would wait for the garbage collector.
            stack.callback(self._let_go)
            yield self

    def _let_go(self) -> None:
        for linear in self.linear.values():
            linear.outputs.clear()
        self.received, self.partial, self.direction, self.product = [], [], None, {}

    def sum(self, direction: Vectors, product: Vectors, numbers: Sequence[int]) -> None:
        """Writes T x H times the directions with these numbers of K to `product`, at the owners."""
        width = len(self.received)
        for start in range(0, len(numbers), width):
            chunk = numbers[start : start + width]
            directions = self._whole(direction, self.received, chunk)
            products = self._whole(product, self.partial, chunk)
            for one, other in zip(directions, products, strict=True):
                for name, owner in self.owners.items():
                    broadcast_(one[name], owner)
                    other[name].zero_()
            for batch in self.batches():
                self._add(batch, directions, products)
                self.bar.update()
            if not self.bar.total:
                # Only now is it known how many batches a pass has.
                self.bar.total = self.bar.n * self.passes
            for other in products:
                for name, owner in self.owners.items():
                    _reduce_(other[name], owner)

    def _whole(self, vectors: Vectors, elsewhere: list[Weights], chunk: Sequence[int]) -> list[Weights]:
        """Some of K over all layers: views of what is this rank's own, and buffers for the rest."""
        return [
            {name: vectors[name][number] if name in vectors else buffers[name] for name in self.layers}
            for number, buffers in zip(chunk, elsewhere, strict=False)
        ]

    def _add(self, batch: Batch, directions: list[Weights], products: list[Weights]) -> None:
        """Adds this batch's part of every direction's product."""
        self.batch = batch
        for linear in self.linear.values():
            linear.outputs.clear()
        self.direction = None
        logits_NV = self._logits()
        p_NV = logits_NV.detach().softmax(dim=-1)
        wp_NV = p_NV * batch.label_weights.to(self.dtype)[:, None]
        for number, (self.direction, self.product) in enumerate(zip(directions, products, strict=True)):
            tangent_NV = self._tangent()
            # w (diag p - p p^T) t = w p (t - <p, t>)
            tangent_NV -= torch.linalg.vecdot(p_NV, tangent_NV)[:, None]
            logits_NV.backward(tangent_NV.mul_(wp_NV), retain_graph=number + 1 < len(directions))

    def _logits(self) -> Tensor:
        """[N, vocabulary] at the trained positions."""
        batch = self.batch
        output = self.model(input_ids=batch.input_ids, use_cache=False)
        logits = output.logits.flatten(0, -2)
        # The last layer has already been given the trained positions alone, if it is an ordinary one.
        return (logits if self.head in self.linear else logits.index_select(0, batch.trained)).to(self.dtype)

    @torch.no_grad()
    def _tangent(self) -> Tensor:
        """[N, vocabulary] the derivative of the logits along the direction."""
        for linear in self.linear.values():
            linear.calls = 0
        try:
            # Of the attention kernels, the one made of plain products has a forward derivative.
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(self._logits()).tangent
        except NotImplementedError as error:
            raise UserError(
                "influence.solver: cg needs forward derivatives, and an operation of this model has none: load the"
                f" model with attn_implementation sdpa or eager, or set direct ({str(error).splitlines()[0]})"
            ) from error
        assert tangent is not None, "no tracked layer reaches the logits"
        return tangent

    def check(self, name: str, x: Tensor) -> None:
        """Whether the layer's gradients can be told from its input alone."""
        if x.shape[:-1].numel() != self.batch.input_ids.numel():
            raise UserError(
                f"influence.layers: {name} does not see every position of a batch (is it an expert that"
                " tokens are routed to?), so its gradients cannot be told apart: leave it out"
            )

    def rows(self, module: nn.Linear, tensor: Tensor) -> Tensor:
        """[N, I or O] a tracked layer's positions; the last layer is given the trained ones alone."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        if module is not self.head and self.batch.index is not None:
            flat = flat.index_select(0, self.batch.index)
        return flat.to(self.dtype)


class _Linear:
    """A linear layer's forward: as it is, its outputs kept; then, with a direction, their tangents alone."""

    def __init__(self, products: _Products, module: nn.Linear, name: str | None) -> None:
        """`name`: of a tracked layer."""
        self.products = products
        self.module = module
        self.name = name
        self.plain = module.forward
        self.outputs: list[Tensor] = []
        """Of the batch at hand, one for each time that the layer was called."""
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """In place of the module's own."""
        if self.name is not None:
            self.products.check(self.name, x)
        if self.module is self.products.head:
            x = x.flatten(0, -2).index_select(0, self.products.batch.trained)
        return self._keep(x) if self.products.direction is None else self._tangent(x, self.products.direction)

    def _keep(self, x: Tensor) -> Tensor:
        output = self.plain(x)
        self.outputs.append(output.detach())
        if self.name is not None:
            output.register_hook(partial(self._receive, self.name, x.detach()))
        return output

    @torch.no_grad()
    def _receive(self, name: str, x: Tensor, d: Tensor) -> None:
        x_NI, d_NO = (self.products.rows(self.module, tensor) for tensor in (x, d))
        self.products.product[name].addmm_(d_NO.mT, x_NI)

    def _tangent(self, x: Tensor, direction: Weights) -> Tensor:
        output = self.outputs[self.calls]
        self.calls += 1
        primal, before = forward_ad.unpack_dual(x)
        parts = []
        if before is not None:
            parts.append(nn.functional.linear(before, self.module.weight))
        if self.name is not None:
            parts.append(nn.functional.linear(primal, direction[self.name].to(primal.dtype)))
        return forward_ad.make_dual(output, sum(parts[1:], parts[0])) if parts else output


def _restore_forward(module: nn.Module, own: Any) -> None:
    del module.forward
    if own is not None:
        module.forward = own


def _reduce_(tensor: Tensor, owner: int) -> None:
    """Sums `tensor` over all ranks, at its owner; elsewhere it is used up."""
    if is_initialized():
        dist.reduce(tensor, owner)
