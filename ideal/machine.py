"""How fast a device is and how much it holds: measured here, or from a table."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from ideal.footprint import Work
from ideal.settings import STRICT

MEASURED_SECONDS = 0.2
"""For each of four short measurements."""
EFFICIENCY = 0.5
"""Part of a GPU's peak, in products and in memory traffic, that training code usually reaches."""


@dataclass
class PlanConfig:
    """`plan.*`: what `--stage plan` plans for, if not for this machine and the processes that were started."""

    __pydantic_config__ = STRICT

    processes: Annotated[int, Field(ge=1)] | None = None
    """processes, one per device; none: as many as were started"""
    device: Literal["here", "a100", "h100", "h200"] = "here"
    """what each process runs on; here: this machine, measured for a second"""
    flops: Annotated[float, Field(gt=0)] | None = None
    """FLOP/s that a process reaches in matrix products, in place of what was measured or half the device's peak"""


@dataclass(frozen=True)
class Machine:
    """One process's device."""

    name: str
    wide: float
    """FLOP/s that products in float32 reach."""
    narrow: float
    """FLOP/s that products in bfloat16 reach."""
    moved: float
    """Bytes per second that other operations read and write."""
    eigen: float
    """Seconds that an eigendecomposition in float64 takes, over the cube of its size."""
    memory: float | None
    """Bytes; None: unknown."""
    gpu: bool = False

    def seconds(self, work: Work) -> float:
        """How long `work` takes, nothing overlapping."""
        in_attention = self.narrow if work.narrow > work.wide else self.wide
        return (
            work.wide / self.wide
            + work.narrow / self.narrow
            + work.attention / in_attention
            + work.moved / self.moved
            + work.eigen * self.eigen
        )


def _gpu(name: str, wide: float, narrow: float, bandwidth: float, memory: float) -> Machine:
    # cuSOLVER's syevd is bound by memory traffic; about 30 s for 16384 rows on an A100.
    return Machine(name, EFFICIENCY * wide, EFFICIENCY * narrow, EFFICIENCY * bandwidth, 7e-12, memory, gpu=True)


# Dense peaks from NVIDIA's data sheets: float32 without TF32, bfloat16, memory bandwidth, memory.
DEVICES = {
    "a100": _gpu("A100 80 GB", 19.5e12, 312e12, 2.0e12, 80e9),
    "h100": _gpu("H100 80 GB", 67e12, 989e12, 3.35e12, 80e9),
    "h200": _gpu("H200 141 GB", 67e12, 989e12, 4.8e12, 141e9),
}


def machine_of(config: PlanConfig) -> Machine:
    """The device that `config` names."""
    machine = measured() if config.device == "here" else DEVICES[config.device]
    if config.flops is None:
        return machine
    return replace(machine, wide=config.flops, narrow=config.flops)


def measured() -> Machine:
    """This process's own device; takes about a second."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    size = 1024 if device.type == "cpu" else 8192

    def product(dtype: torch.dtype) -> float:
        """FLOP/s of square products in it."""
        a = torch.rand(size, size, device=device, dtype=dtype)
        return 2 * size**3 / _seconds(lambda: a @ a, device)

    block = torch.rand(2**25, device=device)  # larger than caches
    copy = torch.empty_like(block)
    rows = size // 4
    symmetric = torch.rand(rows, rows, device=device, dtype=torch.float64)
    symmetric += symmetric.mT.clone()
    memory = (
        float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if device.type == "cpu"
        else float(torch.cuda.get_device_properties(device).total_memory)
    )
    return Machine(
        name=f"this machine ({device.type}, {torch.get_num_threads()} thread(s))",
        wide=product(torch.float32),
        narrow=product(torch.bfloat16),
        moved=2 * block.nbytes / _seconds(lambda: copy.copy_(block), device),
        eigen=_seconds(lambda: torch.linalg.eigh(symmetric), device) / rows**3,
        memory=memory,
        gpu=device.type != "cpu",
    )


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The least seconds that `action` took: others may use the machine too."""
    best, until = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
