"""What code would take, without running it: live bytes over time, FLOPs, bytes moved.

The code runs on fake tensors: they have shapes, data types and lifetimes, but neither memory nor values. So the
peak is that of the very functions that will run, for any model, and of a 70B model in seconds. What a kernel needs
inside itself is not seen (but for eigh's), nor is what an allocator wastes.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

EIGH_WORK = 16
"""Bytes that LAPACK's syevd needs for each entry of a float64 matrix, beside its input and its result."""


@dataclass(frozen=True)
class Work:
    """Operations, as far as they take time."""

    wide: float = 0.0
    """FLOPs of products of float32 or wider."""
    narrow: float = 0.0
    """FLOPs of products of bfloat16 or float16, or of float32 rounded to it on the way."""
    attention: float = 0.0
    """FLOPs of attention: in proportion to the lengths' squares, all else to the lengths."""
    moved: float = 0.0
    """Bytes that all other operations read and write."""
    eigen: float = 0.0
    """Sum of the cubed sizes of the matrices that are decomposed."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def times(self, lengths: float, squares: float | None = None) -> "Work":
        """So many times the positions, and so many times their lengths' squares."""
        squares = lengths if squares is None else squares
        scale = {"attention": squares}
        return Work(*(getattr(self, f.name) * scale.get(f.name, lengths) for f in fields(Work)))

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return self.wide + self.narrow + self.attention


class _Ones(TorchFunctionMode):
    """Where a fake tensor's values are asked for, they are ones: every check of them is passed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers questions for values, and runs everything else."""
        if args and isinstance(args[0], FakeTensor) and func in _VALUES:
            return _VALUES[func](np.ones(args[0].shape))
        return func(*args, **(kwargs or {}))


_VALUES: dict[Any, Callable[[np.ndarray], Any]] = {
    Tensor.numpy: lambda ones: ones,
    Tensor.tolist: np.ndarray.tolist,
    Tensor.item: np.ndarray.item,
    Tensor.__float__: float,
    Tensor.__bool__: bool,
}


@contextmanager
def fake() -> Iterator[None]:
    """Tensors made inside are fake, and their values ones; real ones are taken as fake too."""
    swap = torch.utils.swap_tensors
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _Ones():

        def forget_and_swap(one: Tensor, other: Tensor) -> None:
            """Module.to swaps fake tensors, which torch refuses where its own notes of them refer to them."""
            mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
            swap(one, other)

        torch.utils.swap_tensors = forget_and_swap
        try:
            yield
        finally:
            torch.utils.swap_tensors = swap


class Footprint(TorchDispatchMode):
    """Records what is allocated, freed, computed and moved while it is active, inside `fake()`."""

    def __init__(self, kind: Callable[[Tensor], str]) -> None:
        """`kind`: what a newly allocated tensor is for."""
        super().__init__()
        self.kind = kind
        self.phase = ""
        """What is going on now, for `peaks`."""
        self.work: dict[str, Work] = defaultdict(Work)
        """Per phase."""
        # (phase, number of the storage, bytes: negative when freed), in the order of time.
        self._events: list[tuple[str, int, int]] = []
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._kinds: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes it."""
        kwargs = kwargs or {}
        if _is_silent(func):
            return func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in given:
            # What was not seen being made was there before: it is not counted.
            self._numbers.setdefault(tensor.untyped_storage(), -1)
        # Without a rule for eigh's shapes, fake tensors would have it decompose a real matrix of zeros.
        result = _empty_eigenvectors(args[0]) if func is _aten._linalg_eigh.default else func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            self._note(tensor)
        self._count(func, args, kwargs, result, given, made)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._numbers:
            return
        size = storage.nbytes()
        number = self._allocate(size, self.kind(tensor))
        self._numbers[storage] = number
        weakref.finalize(storage, self._free, number, size)

    def _allocate(self, size: int, kind: str) -> int:
        self._kinds.append(kind)
        self._events.append((self.phase, len(self._kinds) - 1, size))
        return len(self._kinds) - 1

    def _free(self, number: int, size: int) -> None:
        self._events.append((self.phase, number, -size))

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor], made: list[Tensor]) -> None:
        packet = getattr(func, "_overloadpacket", None)
        if packet in _ATTENTION:
            work = Work(attention=_ATTENTION[packet](*args, **kwargs))
        elif packet in _PRODUCTS:
            flops = _PRODUCTS[packet](*args, **kwargs, out_val=result)
            narrow = given[0].element_size() == 2 or torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
            work = Work(narrow=flops) if narrow else Work(wide=flops)
        elif packet is _aten._linalg_eigh:
            size = given[0].shape[-1]
            work = Work(eigen=float(size) ** 3)
            self.passing({"workspace": EIGH_WORK * size**2})
        else:
            work = Work(moved=sum(t.numel() * t.element_size() for t in given + made))
        self.work[self.phase] += work

    def passing(self, sizes: dict[str, int]) -> None:
        """Notes bytes, by kind, that are allocated now and freed at once."""
        numbers = [(self._allocate(size, kind), size) for kind, size in sizes.items()]
        for number, size in numbers:
            self._free(number, size)

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Says what a tensor is for that was made while this was active."""
        number = self._numbers.get(tensor.untyped_storage(), -1)
        if number >= 0:
            self._kinds[number] = kind

    @property
    def now(self) -> int:
        """A moment, for `peaks`."""
        return len(self._events)

    def peaks(self, since: int = 0, without: str = "") -> dict[str, dict[str, int]]:
        """Per phase, bytes by kind at the moment when most is live, beyond what was there before `since`.

        without: a kind that is left out, as if it took no room.
        """
        live: dict[str, int] = defaultdict(int)
        highest: dict[str, int] = defaultdict(lambda: -1)
        at_peak: dict[str, dict[str, int]] = {}
        total, made = 0, set[int]()
        for phase, number, size in self._events[since:]:
            kind = self._kinds[number]
            if size > 0:
                made.add(number)
            if kind == without or number not in made:
                continue
            live[kind] += size
            total += size
            if total > highest[phase]:
                highest[phase], at_peak[phase] = total, dict(live)
        return at_peak


def _empty_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape[:-1]), torch.empty_like(matrix)


@cache
def _is_silent(func: Any) -> bool:
    """Whether an operation neither makes nor changes anything: a view, or a question."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
        return True
    returns = func._schema.returns
    return not returns or any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _product(first: Tensor, second: Tensor) -> int:
    """FLOPs of a product [..., m, k] x [..., k, n]."""
    return 2 * first.numel() * second.shape[-1]


def _per_head(query: Tensor, *shared: Tensor) -> list[torch.Size]:
    """Shapes [B, heads, S, width] of keys and values as if no heads shared them: torch 2.11 counts no others."""
    return [torch.Size((tensor.shape[0], query.shape[1], *tensor.shape[2:])) for tensor in shared]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, *_per_head(query, key, value)))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, *_per_head(query, key, value)))


_aten = torch.ops.aten
_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# What the registry lacks: products in place.
_PRODUCTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.addmm_: lambda out, first, second, **_: _product(first, second),
    _aten.baddbmm_: lambda out, first, second, **_: _product(first, second),
}
