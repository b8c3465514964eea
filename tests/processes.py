"""Functions in processes of their own that find the libraries imported, alone or as ranks.

To start Python and to import torch and transformers takes longer than most of what a test lets a process do, so a
server of multiprocessing's imports them once and forks. torchrun itself starts ranks in test_loop.py and test_cli.py.
"""

import os
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["ideal.cli", "transformers.models.llama.modeling_llama"])


def attempt(
    function: Callable[..., object], *arguments: Any, ranks: int | None = None, timeout: float = 240
) -> "CompletedProcess[str]":
    """Calls a module's function in a process, or as torchrun does in `ranks` of them: one that fails ends the others.

    Returns:
        The first exit status that is not zero, and what all processes wrote.

    Raises:
        TimeoutError: it took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        started = [
            CONTEXT.Process(target=_call, args=(function, arguments, environment, outputs), daemon=True)
            for environment in _environments(ranks)
        ]
        for process in started:
            process.start()
        try:
            _wait(started, time.monotonic() + timeout)
            status = next((process.exitcode for process in started if process.exitcode), 0)
        except TimeoutError as error:
            raise TimeoutError(outputs[1].read_text()[-3000:]) from error
        finally:
            for process in started:
                process.kill()
                process.join()
        return CompletedProcess([function, *arguments], status, *(path.read_text() for path in outputs))


def run(function: Callable[..., object], *arguments: Any, ranks: int | None = None, timeout: float = 240) -> None:
    """As `attempt`, of what must not fail."""
    done = attempt(function, *arguments, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def _wait(started: list[Any], deadline: float) -> None:
    """Until all have ended, or one has failed."""
    while alive := [process for process in started if process.exitcode is None]:
        if any(process.exitcode for process in started):
            return
        if not wait([process.sentinel for process in alive], max(0.0, deadline - time.monotonic())):
            raise TimeoutError


def _environments(ranks: int | None) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    if ranks is None:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _call(
    function: Callable[..., object], arguments: tuple[Any, ...], environment: dict[str, str], outputs: list[Path]
) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        # Appending, ranks do not overwrite each other.
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    function(*arguments)
