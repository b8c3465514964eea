"""The matrix products that statistics are made of, in the precision asked for.

Inputs are rounded to bfloat16 or not; sums over positions are kept in float32 (float64 for a float64
model) in either case.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TRIANGLE_BLOCKS = 4
"""Block columns that a square is computed in: three eighths of the work are left out."""
LEAST_BLOCK = 128
"""Columns below which blocks are not worth a call of their own."""


class Products:
    """Sums of outer products, and rotations.

    Suffixes: N positions, I in, O out.
    """

    def __init__(self, dtype: torch.dtype, bf16: bool, on_gpu: bool = False) -> None:
        """Args:
        dtype: of the sums, float32 or float64.
        bf16: round the inputs to bfloat16 where the hardware gains by it.
        on_gpu: take tensors in host memory for a GPU's, as a plan does.
        """
        self.dtype, self.on_gpu = dtype, on_gpu
        self.bf16 = bf16 and dtype == torch.float32

    def narrow(self, device: torch.device) -> bool:
        """Whether inputs on this device are rounded to bfloat16 tensors."""
        on_gpu = self.on_gpu or device.type != "cpu"
        return self.bf16 and (on_gpu or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))

    def add_(self, total: Tensor, left_NO: Tensor, right_NI: Tensor, factor: float) -> None:
        """total [O, I] += factor left^T right."""
        dtype = self._dtype_of_inputs(total.device)
        left_NO, right_NI = left_NO.to(dtype), right_NI.to(dtype)
        if dtype == torch.bfloat16:
            total.add_(torch.mm(left_NO.mT, right_NI, out_dtype=torch.float32), alpha=factor)
            return
        with _rounding(self.bf16 and total.device.type == "cpu"):
            total.addmm_(left_NO.mT, right_NI, alpha=factor)

    def add_square_(self, total: Tensor, x_NI: Tensor, weighted_NI: Tensor, factor: float) -> None:
        """total [I, I] += factor x^T weighted, which is symmetric: on and above the diagonal."""
        size = len(total)
        block = max(LEAST_BLOCK, -(-size // TRIANGLE_BLOCKS))
        # Once, not in every block.
        dtype = self._dtype_of_inputs(total.device)
        x_NI, weighted_NI = x_NI.to(dtype), weighted_NI.to(dtype)
        for start in range(0, size, block):
            rows = slice(start, min(start + block, size))
            self.add_(total[rows, start:], x_NI[:, rows], weighted_NI[:, start:], factor)

    def basis(self, basis: Tensor | None) -> Tensor | None:
        """A basis as `rotate` wants it."""
        return basis.bfloat16() if basis is not None and self.narrow(basis.device) else basis

    def rotate(self, x_NI: Tensor, basis_II: Tensor | None) -> Tensor:
        """x Q, [N, I]; x itself without a basis."""
        if basis_II is None:
            return x_NI.to(self.dtype)
        dtype = torch.bfloat16 if self.narrow(x_NI.device) else self.dtype
        return x_NI.to(dtype) @ basis_II.to(dtype)

    def outer(self, d_NO: Tensor, x_NI: Tensor) -> Tensor:
        """d^T x of one sequence, [O, I]."""
        dtype = self._dtype_of_inputs(x_NI.device)
        d_NO, x_NI = d_NO.to(dtype), x_NI.to(dtype)
        if dtype == torch.bfloat16:
            return torch.mm(d_NO.mT, x_NI, out_dtype=torch.float32)
        with _rounding(self.narrow(x_NI.device)):
            return d_NO.mT @ x_NI

    def _dtype_of_inputs(self, device: torch.device) -> torch.dtype:
        """bfloat16 where there is a product of such that is float32; the CPU rounds what it is given by itself."""
        return torch.bfloat16 if device.type == "cuda" and self.narrow(device) else self.dtype


@contextmanager
def unrounded() -> Iterator[None]:
    """float32 products as they are, whatever the process has set: TF32 on a GPU, bfloat16 on a CPU."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    # Only now: torch refuses to name its older setting where the newer ones differ from it, and to work there.
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            # Inherited, where that comes to the same (torch does not tell whether it was).
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


@contextmanager
def _rounding(bf16: bool) -> Iterator[None]:
    """float32 products on the CPU with inputs rounded to bfloat16 and float32 sums, for as long as it lasts."""
    if not bf16:
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
