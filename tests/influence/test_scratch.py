"""The file in which pairs wait: what is read is what was written, however a system does it, and nothing is left."""

import errno
import fcntl
import os
import tempfile
import threading
from unittest.mock import patch

import pytest
import torch

from ideal.influence import scratch
from ideal.influence.scratch import ALIGNMENT, PAGE, ScratchFile

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=[PAGE, 3 * PAGE, 2**23])
def file(request, monkeypatch):
    monkeypatch.setattr(scratch, "BUFFER_BYTES", request.param)
    opened = ScratchFile()
    yield opened
    opened.close()


def tensors(seed: int, count: int = 40) -> list[torch.Tensor]:
    """Of all kinds of numbers; some less than a page, some many; some rows no whole number of anything; transposed."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        rows, width = torch.randint(1, 70, (2,), generator=draw).tolist()
        tensor = torch.randn(width, rows, generator=draw, dtype=torch.float64).T
        made.append(tensor.to(DTYPES[number % 4]) if number % 3 else tensor)
    return made


def whole(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return [(0, len(tensor))]


def test_what_is_read_is_what_was_written(file):
    given = tensors(0)
    dtypes = [DTYPES[number % 3] for number in range(len(given))]
    blocks = [file.write(tensor, whole(tensor), dtype) for tensor, dtype in zip(given, dtypes, strict=True)]
    assert all(block.start % ALIGNMENT == 0 for block in blocks)
    assert 0 <= file.end - sum(t.numel() * d.itemsize for t, d in zip(given, dtypes, strict=True)) < 8 * len(given)
    for group in ([3], [0, 1, 2], range(len(given)), reversed(range(len(given)))):
        order = list(group)
        read = [found for (found,) in file.read_ahead(([blocks[k]], whole(given[k])) for k in order)]
        for k, found in zip(order, read, strict=True):
            assert found.dtype == dtypes[k] and torch.equal(found, given[k].to(dtypes[k]))


def test_rows_alone_are_written_and_read(file):
    tensor = torch.arange(900.0).reshape(300, 3)
    block = file.write(tensor, [(0, 10), (20, 300)], torch.float32)
    kept = torch.cat([tensor[:10], tensor[20:]])
    assert file.end == kept.nbytes
    for rows in ([(0, 290)], [(5, 6)], [(289, 290)], [(0, 3), (7, 200), (201, 202)]):
        ((found,),) = file.read_ahead([([block], rows)])
        assert torch.equal(found, torch.cat([kept[start:end] for start, end in rows]))


def test_writing_goes_on_after_reading(file):
    """Behind a last page that is on disk already, and again from the beginning once all is forgotten."""
    for seed in range(3):
        given = tensors(seed)
        blocks = []
        for number, tensor in enumerate(given):
            blocks.append(file.write(tensor, whole(tensor), torch.float64))
            for back in (0, number // 2, number):
                ((found,),) = file.read_ahead([([blocks[back]], whole(given[back]))])
                assert torch.equal(found, given[back].to(torch.float64))
        file.clear()
        assert file.end == 0


def test_what_was_read_stays_when_more_is(file):
    """The consumer may keep it."""
    given = [torch.full((50, 40), float(number)) for number in range(20)]
    blocks = [file.write(tensor, whole(tensor), torch.float32) for tensor in given]
    read = list(file.read_ahead(([block], whole(given[0])) for block in blocks))
    assert all(torch.equal(found, expected) for (found,), expected in zip(read, given, strict=True))


def test_the_next_is_read_while_one_is_used(file):
    block = file.write(torch.ones(50, 40), [(0, 50)], torch.float32)
    right, reads = os.preadv, []
    second = threading.Event()

    def counted(*args):
        reads.append(threading.current_thread() is threading.main_thread())
        if len(reads) == 2:
            second.set()
        return right(*args)

    with patch.object(os, "preadv", counted):
        ahead = file.read_ahead([([block], [(0, 50)])] * 4)
        next(ahead)
        assert second.wait(60), "nobody reads the second one"
        # Nothing is read that far ahead that it would take more memory.
        assert len(list(ahead)) == 3 and len(reads) == 4
    assert not any(reads)


def test_a_system_that_does_a_part_at_a_time(file):
    write, read = os.pwrite, os.preadv

    def part(size):
        return max(PAGE, size // 3 // PAGE * PAGE)

    given = torch.randn(3000, 7)
    with (
        patch.object(os, "pwrite", lambda number, data, place: write(number, data[: part(len(data))], place)),
        patch.object(os, "preadv", lambda number, data, place: read(number, [data[0][: part(len(data[0]))]], place)),
    ):
        block = file.write(given, whole(given), torch.float32)
        ((found,),) = file.read_ahead([([block], whole(given))])
    assert torch.equal(found, given)


def flags(opened: ScratchFile) -> int:
    return fcntl.fcntl(opened.number, fcntl.F_GETFL) & os.O_DIRECT


@pytest.mark.parametrize("refused", ["flag", "write", "read"])
def test_a_file_system_without_direct_access(monkeypatch, refused):
    """It says so when the file is opened so, or only when it is used."""

    def refusing(*args):
        raise OSError(errno.EINVAL, "Invalid argument")

    control = fcntl.fcntl
    with monkeypatch.context() as inside:
        if refused == "flag":
            inside.setattr(
                fcntl, "fcntl", lambda *args: refusing() if args[-1] & os.O_DIRECT and args[1:-1] else control(*args)
            )
        else:
            inside.setattr(os, "pwrite" if refused == "write" else "preadv", refusing)
        opened = ScratchFile()
    assert not flags(opened)
    given = torch.randn(3000, 7)
    block = opened.write(given, whole(given), torch.float32)
    ((found,),) = opened.read_ahead([([block], whole(given))])
    opened.close()
    assert torch.equal(found, given)


def test_an_ordinary_disk_is_written_directly(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    probe = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    try:
        fcntl.fcntl(probe, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip(f"{tmp_path} is on a file system without direct access")
    finally:
        os.close(probe)
    opened = ScratchFile()
    assert flags(opened)
    opened.close()


def test_a_failed_write_is_raised_and_nothing_is_left(file, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    given = torch.randn(2**21, 2)
    with patch.object(os, "pwrite", full), pytest.raises(OSError, match="No space left"):
        block = file.write(given, whole(given), torch.float32)
        list(file.read_ahead([([block], whole(given))]))
    file.close()
    assert file.file.closed and "ideal-pairs" not in " ".join(thread.name for thread in threading.enumerate())


def test_a_file_that_was_cut_short_is_no_endless_loop(file):
    given = torch.randn(3000, 7)
    block = file.write(given, whole(given), torch.float32)
    list(file.read_ahead([([block], [(0, 1)])]))
    os.ftruncate(file.number, PAGE)
    with pytest.raises(OSError, match="ends too early"):
        list(file.read_ahead([([block], whole(given))]))
