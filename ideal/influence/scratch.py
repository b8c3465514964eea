"""A temporary file of tensors, written and read by a thread of its own beside the computation.

It goes past the system's page cache where the file system lets it (O_DIRECT): new pages of the cache cost a processor
0.3 to 3 s per GB, what goes straight to the disk less than 0.1.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

PAGE = 4096
"""Bytes. Direct reads and writes begin and end at multiples of it, in the file and in memory."""
ALIGNMENT = 8
"""Bytes. Where a tensor begins: at a multiple of any number's size."""
BUFFER_BYTES = 2**23
"""Of each of the two buffers: one is filled while the other is written."""

Rows = Sequence[tuple[int, int]]
"""Ranges of rows, each from its first to before its end."""


@dataclass(frozen=True)
class Block:
    """A tensor [rows, width] in the file."""

    start: int
    """Bytes from the file's beginning."""
    width: int
    dtype: torch.dtype


class ScratchFile:
    """Tensors that wait on disk.

    A failed write may be raised by any later call. Whatever raises, `close` is still due.

    Raises:
        OSError: of any method but `close`: the disk is full, or failed.
    """

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="ideal-pairs-", buffering=0)
        self.number = self.file.fileno()
        _go_past_the_cache(self.number)
        self.thread = ThreadPoolExecutor(1, "ideal-pairs")
        self.buffer, self.other = aligned(BUFFER_BYTES), aligned(BUFFER_BYTES)
        self.busy: Future[None] | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets all tensors; the file starts over."""
        self._wait()
        # The buffer's place in the file, how much of it is filled, and up to where the file was sent.
        self.place = self.filled = self.sent = 0

    @property
    def end(self) -> int:
        """Bytes that the tensors take."""
        return self.place + self.filled

    def close(self) -> None:
        """Deletes the file. All that was needed of it has been read: a disk that fails now loses nothing."""
        self.thread.shutdown()
        with suppress(OSError):
            self.file.close()

    # Writing

    def write(self, tensor: Tensor, rows: Rows, dtype: torch.dtype) -> Block:
        """Adds rows of a tensor [N, width] at the file's end."""
        self._fill(-self.end % ALIGNMENT)
        block = Block(self.end, tensor.shape[1], dtype)
        for start, end in rows:
            numbers = tensor[start:end].to("cpu", dtype).reshape(-1)
            while len(numbers):
                part = numbers[: (BUFFER_BYTES - self.filled) // dtype.itemsize]
                size = part.nbytes
                self.buffer[self.filled : self.filled + size].view(dtype).copy_(part)
                self._fill(size)
                numbers = numbers[len(part) :]
        return block

    def _fill(self, size: int) -> None:
        self.filled += size
        if self.filled == BUFFER_BYTES:
            self._send()

    def _send(self) -> None:
        """Has the buffer written, up to its last page, which goes on in the other buffer."""
        self._wait()
        self.sent = self.end
        whole, size = self.filled // PAGE * PAGE, -(-self.filled // PAGE) * PAGE
        self.busy = self.thread.submit(self._write, self.buffer[:size], self.place)
        self.other[: self.filled - whole] = self.buffer[whole : self.filled]
        self.buffer, self.other = self.other, self.buffer
        self.place, self.filled = self.place + whole, self.filled - whole

    def _wait(self) -> None:
        busy, self.busy = self.busy, None
        if busy is not None:
            busy.result()

    def _write(self, content: Tensor, place: int) -> None:
        rest = content.numpy().data
        while rest:
            count = os.pwrite(self.number, rest, place)
            rest, place = rest[count:], place + count

    # Reading

    def read_ahead(self, wanted: Iterable[tuple[Sequence[Block], Rows]]) -> Iterator[list[Tensor]]:
        """The rows of each group of blocks, [N, width] each; the next group is read while one is used."""
        if self.sent < self.end:
            self._send()
        coming: Future[list[Tensor]] | None = None
        for blocks, rows in wanted:
            following = self.thread.submit(self._read_all, blocks, rows)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()

    def _read_all(self, blocks: Sequence[Block], rows: Rows) -> list[Tensor]:
        return [self._read(block, rows) for block in blocks]

    def _read(self, block: Block, rows: Rows) -> Tensor:
        size = block.width * block.dtype.itemsize
        parts = [
            self._bytes(block.start + start * size, block.start + end * size).view(block.dtype) for start, end in rows
        ]
        # Most often the rows are one range, and nothing is copied.
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1, block.width)

    def _bytes(self, start: int, end: int) -> Tensor:
        first = start // PAGE * PAGE
        content = aligned(-(-(end - first) // PAGE) * PAGE)
        rest, place = content.numpy().data, first
        while rest:
            count = os.preadv(self.number, [rest], place)
            if not count:
                raise OSError("the file ends too early")
            rest, place = rest[count:], place + count
        return content[start - first : end - first]


def aligned(size: int) -> Tensor:
    """[size] bytes that begin at a page."""
    content = torch.empty(size + PAGE, dtype=torch.uint8)
    return content[-content.data_ptr() % PAGE :][:size]


def _go_past_the_cache(number: int) -> None:
    """Opens a file for direct access, and tries it.

    Where the file system cannot, or wants other multiples than pages, the file stays an ordinary one.
    """
    flags = fcntl.fcntl(number, fcntl.F_GETFL)
    try:
        fcntl.fcntl(number, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
        page = aligned(PAGE).numpy().data
        os.pwrite(number, page, 0)
        os.preadv(number, [page], 0)
    except OSError:
        fcntl.fcntl(number, fcntl.F_SETFL, flags)
