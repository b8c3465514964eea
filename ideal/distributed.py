"""The few things ranks do together, and who talks: rank 0.

The process group itself is accelerate's (`PartialState`), so that the Trainer and we share one.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from ideal.errors import UserError

Result = TypeVar("Result")


_rehearsed: tuple[int, int] | None = None
"""Rank and number of ranks that a rehearsal plays."""


@contextmanager
def rehearsed(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of several that are not there: what they would send has its size, but no values."""
    global _rehearsed
    before, _rehearsed = _rehearsed, (rank, ranks)
    try:
        yield
    finally:
        _rehearsed = before


def is_initialized() -> bool:
    """Whether several processes could work together now."""
    return _rehearsed is None and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 without torchrun."""
    if _rehearsed is not None:
        return _rehearsed[0]
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without torchrun."""
    if _rehearsed is not None:
        return _rehearsed[1]
    return dist.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that talks and writes files; torchrun says so before ranks know each other."""
    return rank() == 0 if is_initialized() else os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Prints a line on rank 0, above any progress bar."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(total: int, description: str, unit: str = "batch") -> "tqdm[Any]":
    """A progress bar with an estimate, on rank 0 alone; call `.update()`, use as a context manager."""
    return tqdm(total=total, desc=description, unit=unit, disable=not is_main(), dynamic_ncols=True, leave=False)


def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over all ranks, in place."""
    if is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Overwrites `tensor` with rank `source`'s, in place."""
    if is_initialized():
        dist.broadcast(tensor, source)
    return tensor


def exchange(
    tensors: list[list[torch.Tensor]], counts: list[int], like: torch.Tensor
) -> Callable[[], list[torch.Tensor]]:
    """Begins to send `tensors[r]` to every rank r.

    Args:
        counts: how many numbers each rank sends here.
        like: of the data type and on the device of all of them.

    Returns:
        What waits for the numbers that the ranks send here, and gives those of each, flat; to be called once.
    """
    sent = torch.cat([like.new_empty(0), *(tensor.flatten() for to_one in tensors for tensor in to_one)])
    received = like.new_empty(sum(counts))
    # As bytes, since gloo does not know every data type.
    size = sent.element_size()
    work: dist.Work | None = None
    if _rehearsed is None:
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [count * size for count in counts],
            [sum(tensor.numel() for tensor in to_one) * size for to_one in tensors],
            async_op=True,
        )
    # Once it is waited for, nothing holds what was sent; the work does, while it lives.
    under_way = [(work, sent)]

    def arrived() -> list[torch.Tensor]:
        work, _ = under_way.pop()
        if work is not None:
            work.wait()
        return list(received.split(counts))

    return arrived


def all_gather_objects(value: Result) -> list[Result]:
    """Every rank's `value`, in the order of ranks (small things: they are pickled among our own processes)."""
    if not is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for all ranks."""
    if is_initialized():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Runs the body on rank 0 before the others, which then find its cache filled."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def together(action: Callable[[], Result]) -> Result:
    """Runs `action` on every rank; if it is a UserError on any, it is that error on all.

    So no rank waits in a collective for one that has already given up.
    """
    error: UserError | None = None
    result: Any = None
    try:
        result = action()
    except UserError as caught:
        error = caught
    failed = [(number, str(e)) for number, e in enumerate(all_gather_objects(error)) if e is not None]
    if failed:
        number, text = failed[0]
        raise UserError(text if number == 0 else f"{text} (on rank {number})") from error
    return result
