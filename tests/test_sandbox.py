"""Model-written code is shut in: whatever it tries is contained and counts as failed, and correct code passes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ideal.scoring import jail, sandbox
from ideal.scoring.sandbox import CannotIsolate, Limits, Outcome, probe, run_isolated

ROOT = Path(__file__).parents[1]
SHORT = Limits(cpu_seconds=1, seconds=4)
MARK = "ideal-test-survivor"


def can_isolate() -> bool:
    try:
        probe()
    except CannotIsolate:
        return False
    return True


pytestmark = pytest.mark.skipif(not can_isolate(), reason="this machine does not give what isolation needs")


def test_correct_code_passes() -> None:
    """With files of its own, processes of its own, and the standard library."""
    source = """
import collections, decimal, heapq, itertools, json, math, os, re, sqlite3, subprocess, threading
with open("notes", "w") as file:
    file.write("kept")
assert open("notes").read() == "kept" and os.path.expanduser("~") == os.getcwd()
found = []
thread = threading.Thread(target=lambda: found.append(1))
thread.start(); thread.join()
if os.fork() == 0:
    os._exit(3)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 3 and found == [1]
print("x" * 100)
if __name__ == "__main__":
    raise SystemExit("nobody started this as a script")
"""
    assert run_isolated(source) == Outcome(True, "passed")
    assert run_isolated("assert not __import__('os').listdir()").passed, "the folder is new each time"


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)\nassert False", "SystemExit"),
        ("import os; os._exit(0)\nassert False", "ended early"),
        ("import os; os._exit(125)", "ended early"),
        ("input()", "EOFError"),
        ("raise type('not a name', (Exception,), {})", "ended early"),
        ("import os; os.write(int(__import__('sys').argv[1]), b'passed')\nassert False", "passedAssertionError"),
        ("while True: pass", "killed"),
        ("import time; time.sleep(60)", "time"),
        ("x = bytearray(10 * 10**9)", "MemoryError"),
        ("x = [0]\nwhile True: x += x", "MemoryError"),
        ("f = open('a', 'wb')\nfor _ in range(10_000): f.write(bytes(2**20))", "OSError"),
        ("for n in range(100):\n  with open(f'{n}', 'wb') as f: f.write(bytes(2**23))", "OSError"),
        ("import sys\nwhile True: sys.stdout.write('flood' * 10**5)", "killed"),
        ("import sys, os\nwhile True: os.write(int(sys.argv[1]), b'flood' * 10**4)", "time"),
        ("open('/tmp/x', 'w')", "FileNotFoundError"),
        ("open('/usr/x', 'w')", "OSError"),
        ("import os; os.mkdir('/usr/lib/x')", "OSError"),
        ("import numpy", "ModuleNotFoundError"),
    ],
)
def test_what_fails(source: str, detail: str) -> None:
    started = time.monotonic()
    found = run_isolated(source, SHORT)
    assert found == Outcome(False, detail)
    assert time.monotonic() - started < 30


def test_no_environment_and_no_file_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password")
    secret.chmod(0o666)
    monkeypatch.setenv("IDEAL_TOKEN", "password")
    seen = f"""
import os
assert set(os.environ) == {{"HOME", "TMPDIR", "LANG", "PYTHONHASHSEED"}}
for path in ({str(secret)!r}, {str(ROOT)!r}, {str(Path.home() / '.ssh')!r}, "/proc", "/sys", "/etc/passwd", "/home"):
    assert not os.path.exists(path), path
try:
    open({str(secret)!r}, "w")
except FileNotFoundError:
    pass
assert [int(name) for name in os.listdir("/") if name.isdigit()] == []
"""
    assert run_isolated(seen) == Outcome(True, "passed")
    assert run_isolated(f"open({str(secret)!r})") == Outcome(False, "FileNotFoundError")
    assert secret.read_text() == "password"


def test_no_network() -> None:
    """Neither a listening port of this machine nor another one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), 5):
            pass
        for address in ("127.0.0.1", "1.1.1.1"):
            source = f"import socket; socket.create_connection(({address!r}, {port}), 3)"
            found = run_isolated(source, SHORT)
            assert not found.passed and found.detail in ("ConnectionRefusedError", "OSError"), found


def test_no_way_to_more_rights() -> None:
    """No second user namespace (in it a file system of any size could be filled), no mount, no other user."""
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000) != 0
assert libc.mount(b"none", b"/.work", b"tmpfs", 0, None) != 0
assert libc.umount2(b"/usr", 2) != 0
for change in (os.setuid, os.setgid):
    try:
        change(0)
    except OSError:
        continue
    raise AssertionError(change)
"""
    assert run_isolated(source) == Outcome(True, "passed")


def processes(mark: str) -> list[int]:
    """Processes with `mark` on their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_fork_bomb_is_contained() -> None:
    python = str(sandbox._interpreter())
    source = f"""
import os
while True:
    try:
        if os.fork() == 0:
            os.execv({python!r}, [{python!r}, "-c", "while True: pass # {MARK}"])
    except OSError:
        pass
"""
    started = time.monotonic()
    found = run_isolated(source, SHORT)
    assert not found.passed and found.detail in ("time", "killed")
    assert time.monotonic() - started < 30
    assert not processes(MARK)


def test_processes_are_counted() -> None:
    """The limit binds root too, whose processes count for no limit."""
    source = """
import os, time
started = 0
try:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(60)
        started += 1
except BlockingIOError:
    assert 10 <= started < 16, started
    raise KeyError
"""
    assert run_isolated(source, SHORT) == Outcome(False, "KeyError")


def test_nothing_survives_its_parent() -> None:
    """A process in a session of its own is dead when the code has ended, well or not."""
    sleeper = [str(sandbox._interpreter()), "-c", f"import time; time.sleep(300) # {MARK}"]
    source = f"import subprocess\nassert subprocess.Popen({sleeper}, start_new_session=True).poll() is None"
    assert run_isolated(source, SHORT) == Outcome(True, "passed")
    assert run_isolated(f"{source}\nassert False", SHORT) == Outcome(False, "AssertionError")
    assert not processes(MARK)


def test_nothing_survives_us() -> None:
    """Killed without a chance to clean up, we take the code with us."""
    code = "from ideal.scoring.sandbox import run_isolated; run_isolated('import time; time.sleep(200)')"
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    ending = time.monotonic() + 30
    while time.monotonic() < ending and len(workers(ours.pid)) < 2:
        time.sleep(0.05)
    shut_in = workers(ours.pid)
    assert len(shut_in) == 2, "the jail and the program"
    time.sleep(0.3)
    ours.kill()
    ours.wait()
    while time.monotonic() < ending and any(Path(f"/proc/{process}").exists() for process in shut_in):
        time.sleep(0.05)
    assert not [process for process in shut_in if Path(f"/proc/{process}").exists()]


def workers(parent: int) -> list[int]:
    """All processes below one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(path.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    found, open_ones = [], [parent]
    while open_ones:
        below = children.get(open_ones.pop(), [])
        found += below
        open_ones += below
    return found


@pytest.fixture
def public_python() -> Iterator[str]:
    """An interpreter that every user may run."""
    python = shutil.which("python3", path="/usr/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs to be root, to become someone else, and a Python that everyone may run")
    yield python


def test_an_ordinary_user_too(public_python: str) -> None:
    """Root drops its rights in another way than a user, who never had them."""
    folder = Path("/tmp") / f"ideal-test-{os.getpid()}"
    try:
        shutil.copytree(ROOT / "ideal" / "scoring", folder / "ideal" / "scoring",
                        ignore=lambda _, names: [n for n in names if n not in ("jail.py", "sandbox.py")])  # fmt: skip
        (folder / "ideal" / "scoring" / "__init__.py").touch()
        code = """
import os
from ideal.scoring.sandbox import Limits, probe, run_isolated
assert os.getuid() == 65534
probe()
short = Limits(cpu_seconds=1, seconds=4)
for source in ("assert 1 == 1", "while True: pass", "open('/tmp/x', 'w')", "bytearray(10**10)"):
    print(run_isolated(source, short).detail)
"""
        options = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": folder, "env": {"PYTHONPATH": str(folder)}}
        done = subprocess.run([public_python, "-B", "-c", code], capture_output=True, text=True, **options)  # type: ignore[call-overload]
        assert done.stdout.split() == ["passed", "killed", "FileNotFoundError", "MemoryError"], done.stderr
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing runs then: the program would have left a file."""
    source = f"open({str(tmp_path / 'ran')!r}, 'w')"
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CannotIsolate, match="needs Linux"):
        run_isolated(source)
    monkeypatch.undo()
    broken = tmp_path / "jail.py"
    text = Path(jail.__file__).read_text()
    for step in ("own_mounts()", "new_root(", "become(user)", "unshare(CLONE_NEWUSER | CLONE_NEWPID"):
        assert text.count(f"    {step}") == 1
        broken.write_text(text.replace(f"    {step}", f"    raise OSError(1, 'not allowed here')\n    {step}"))
        monkeypatch.setattr(jail, "__file__", str(broken))
        with pytest.raises(CannotIsolate, match="not allowed here"):
            run_isolated(source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('    checked("leave the old root", libc.umount2(b".", MNT_DETACH))\n', "not permitted"),
        (" | CLONE_NEWPID", "AssertionError"),
        (" | CLONE_NEWNET", "AssertionError"),
        ("        limit(limits)\n", "AssertionError"),
    ],
)
def test_the_probe_sees_what_is_missing(line: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "jail.py"
    text = Path(jail.__file__).read_text()
    assert text.count(line) == 1
    broken.write_text(text.replace(line, ""))
    monkeypatch.setattr(jail, "__file__", str(broken))
    with pytest.raises(CannotIsolate, match=found):
        probe()
