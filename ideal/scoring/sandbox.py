"""Runs code that a model has written: in a separate process without network, files, time or memory to speak of.

What is promised, and tested: the code sees the interpreter's own files, read-only, and an empty folder that is gone
afterwards; no file of the user's; no network; no environment; no other process. CPU and wall time, address space,
file size, the folder's size, open files and the number of processes are limited, and every process that it started
is dead when the answer is there. It is isolated by the kernel's namespaces (jail.py), so the kernel's own mistakes
remain; and code passes by reaching its end, so code written to cheat could pass, but not by ending early.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ideal.scoring import jail

MEGABYTE = 1 << 20
USERS = 50_000
"""Where root runs this, the program's user is one of 10,000 from here on, by the process's number: the limit on
processes counts per user, and ranks work at the same time."""
RESULT_BYTES = 100
"""Longer than the token and any exception's name; a longer report is none."""

# Ends with the token on the result's descriptor, which code that stops before never has in its hands.
RUNNER = """\
import json, os, sys
write, leave, result, job = os.write, os._exit, int(sys.argv[1]), json.load(sys.stdin)
sys.stdin = open(os.devnull)
token = job["token"].encode()
try:
    exec(compile(job["source"], "answer", "exec"), {"__name__": "answer"})
except BaseException as error:
    token = type(error).__name__.encode()
write(result, token)
leave(0)
"""


class CannotIsolate(Exception):
    """This machine does not give what isolation needs; nothing has been run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. memory: address space per process; folder: all files together."""

    cpu_seconds: int = 5
    seconds: float = 15
    memory: int = 512 * MEGABYTE
    file: int = 16 * MEGABYTE
    folder: int = 64 * MEGABYTE
    processes: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended. detail: "passed", the name of the exception that ended it, "time" (of the clock),
    "killed" (CPU time), or "ended early"."""

    passed: bool
    detail: str


def run_isolated(source: str, limits: Limits | None = None) -> Outcome:
    """Runs Python `source` to its end or its limits. It has the standard library and no other package.

    Raises CannotIsolate, and has run nothing, where the isolation cannot be had.
    """
    if not sys.platform.startswith("linux"):
        raise CannotIsolate(f"it needs Linux, this is {sys.platform}")
    token = secrets.token_hex(16)
    read, write = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="ideal-") as root:
            job = json.dumps({"source": source, "token": token}).encode(errors="replace")
            status, said = _run_jail(_settings(root, write, limits or Limits()), job, write)
        os.set_blocking(read, False)
        try:
            report = os.read(read, RESULT_BYTES + 1)
        except BlockingIOError:
            report = b""
    finally:
        os.close(read)
        os.close(write)
    if said:  # by the jail: what the program says goes nowhere
        raise CannotIsolate(said)
    found = report.decode(errors="replace") if len(report) <= RESULT_BYTES else ""
    if found == token:
        return Outcome(True, "passed")
    ends = {jail.TIMED_OUT: "time", 128 + signal.SIGKILL: "killed"}
    return Outcome(False, found if found.isidentifier() else ends.get(status, "ended early"))


def _run_jail(settings: dict[str, object], job: bytes, write: int) -> tuple[int, str]:
    """The jail's exit status and what it said; whatever happens here, nothing of it is left behind."""
    command = [sys.executable, "-I", "-S", jail.__file__, json.dumps(settings)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        pass_fds=(write,), start_new_session=True, cwd="/", env={},
    )  # fmt: skip
    try:
        _, said = process.communicate(job)
    finally:
        # The jail dies with its process, the program with the jail; also where we are interrupted.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = said.decode(errors="replace").strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


def _settings(root: str, result: int, limits: Limits) -> dict[str, object]:
    """What jail.py is told."""
    return {
        "command": [str(_interpreter()), "-s", "-P", "-S", "-c", RUNNER, str(result)],
        "shown": _shown(),
        "root": root,
        "user": USERS + os.getpid() % 10_000,
        "folder_bytes": limits.folder,
        "seconds": limits.seconds,
        "limits": _limits(limits),
    }


def _limits(limits: Limits) -> dict[str, int]:
    """By their names in `resource`."""
    return {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": limits.memory,
        "RLIMIT_FSIZE": limits.file,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
    }


def _interpreter() -> Path:
    return Path(sys.executable).resolve()


@cache
def _shown() -> list[str]:
    """What the interpreter needs to start: its own folders, the system's libraries, the null device.

    Raises CannotIsolate where its folders hold the user's home too.
    """
    own = {Path(sys.base_prefix).resolve(), Path(sys.base_exec_prefix).resolve()}
    if any(Path.home().is_relative_to(path) for path in own):
        raise CannotIsolate(f"the Python in {sys.base_prefix} cannot be shown without the user's home")
    system = [Path(path) for path in ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", os.devnull)]
    found: list[Path] = []
    # The shorter first: what lies in a folder that is shown needs no mount of its own.
    for path in sorted({*system, *own, _interpreter()}, key=lambda path: len(path.parts)):
        inside = any(path.resolve().is_relative_to(folder) for folder in found if not folder.is_symlink())
        if path.is_symlink() or (path.exists() and not inside):
            found.append(path)
    return list(map(str, found))


def probe() -> None:
    """Runs a program of ours that tries what must not work. Raises CannotIsolate where isolation cannot be had."""
    wanted = _limits(Limits())
    outcome = run_isolated(f"LIMITS = {wanted!r}\n{PROBE}")
    if not outcome.passed:
        raise CannotIsolate(f"a probe found it open ({outcome.detail})")


# The limits are read as well as tried: a machine may have lower ones of its own, which only happen to hold.
PROBE = f"""\
import os, resource, socket
assert os.getpid() == 1 and os.getcwd() == {jail.WORK!r} and not os.listdir()
assert not os.path.exists("/home") and not os.path.exists("/proc") and not os.path.exists("/root/.ssh")
assert {{name for _, name in socket.if_nameindex()}} <= {{"lo"}}
for name, value in LIMITS.items():
    assert resource.getrlimit(getattr(resource, name)) == (value, value)
try:
    for _ in range(LIMITS["RLIMIT_NPROC"] + 1):
        if os.fork() == 0:
            import time
            time.sleep(60)
    raise AssertionError
except BlockingIOError:
    pass
"""
