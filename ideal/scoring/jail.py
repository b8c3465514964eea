"""Runs one Python program shut in, by what Linux gives every user: started by sandbox.py as a script of its own.

    python -I jail.py SETTINGS      SETTINGS: JSON, see `main`; the program's job comes by standard input

The order of the steps is the safety of the whole; any that fails ends in exit status 125 and a line on standard error,
and nothing has run then:

1. a mount namespace (for an ordinary user within a user namespace), in it a new root: a small tmpfs that holds the
   interpreter's files, read-only, and an empty folder to work in; the old root is gone (pivot_root);
2. root becomes an ordinary user: limits on processes do not bind root;
3. user, process, network, IPC and host name namespaces of its own: no network but an unconnected loopback, no other
   process to see, and no power over the mounts of step 1, which belong to the namespace before; no further ones;
4. in a child, which is the process namespace's first, so that all others die with it: limits, no new privileges, and
   the program with an environment of four variables. This process waits outside and kills the child in time.

Only the standard library, and nothing from this package: it is run with -I by whatever interpreter runs the project.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any

FAILED = 125
"""Exit status where the isolation could not be had."""
TIMED_OUT = 124
"""Exit status where the program was killed for its time."""
WORK = "/.work"

# linux/sched.h, sys/mount.h, linux/mount.h, linux/prctl.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR = -100, 0x8000, 442  # the number is the same on all architectures
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    """struct mount_attr"""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def checked(what: str, result: int) -> None:
    """Raises OSError, with what was tried, where a call into the C library failed."""
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)"""
    strings = [None if text is None else text.encode() for text in (source, target, kind)]
    checked(f"mount {target}", libc.mount(*strings, ctypes.c_ulong(flags), None if data is None else data.encode()))


def unshare(flags: int) -> None:
    """unshare(2)"""
    checked("namespaces", libc.unshare(flags))


def die_with_parent() -> None:
    """Asks for SIGKILL when the parent ends; a change of user takes the wish back."""
    checked("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def bind(source: str, target: str) -> None:
    """Shows the file or folder `source`, with all mounts below it, read-only at `target`."""
    mount(source, target, None, MS_BIND | MS_REC)
    wanted = MountAttributes(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    arguments = (AT_FDCWD, target.encode(), AT_RECURSIVE, ctypes.byref(wanted), size)
    checked(f"make {target} read-only", libc.syscall(SYS_MOUNT_SETATTR, *arguments))


def own_mounts() -> None:
    """A mount namespace; an ordinary user gets the right to one by a user namespace in which it is itself."""
    if os.geteuid() == 0:
        unshare(CLONE_NEWNS)
    else:
        user, group = os.geteuid(), os.getegid()
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def new_root(root: str, shown: list[str], size: int, user: int) -> None:
    """Leaves the file system for one that holds `shown` alone, read-only, and an empty folder of `user`.

    size: bytes that can be written in all.
    """
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=4096,mode=755")
    for path in shown:
        target = root + path
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():
            os.symlink(os.readlink(path), target)
            continue
        Path(target).mkdir() if Path(path).is_dir() else Path(target).touch()
        bind(path, target)
    os.mkdir(root + WORK, 0o700)
    os.chown(root + WORK, user, -1)
    os.chdir(root)
    checked("pivot_root", libc.pivot_root(b".", b"."))
    checked("leave the old root", libc.umount2(b".", MNT_DETACH))
    os.chdir(WORK)


def become(user: int) -> None:
    """Root becomes `user` for good."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def limit(limits: dict[str, int]) -> None:
    """Sets resource limits by their names in `resource`, for this process and all that it starts."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def start(command: list[str], limits: dict[str, int]) -> int:
    """The program in a child, the first of its process namespace; the child's number outside."""
    child = os.fork()
    if child:
        return child
    try:
        die_with_parent()
        os.setsid()
        limit(limits)
        checked("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        said = os.dup(2)  # closed when the program starts
        os.dup2(1, 2)
        try:
            # Sets and dictionaries in the same order in every run.
            environment = {"HOME": WORK, "TMPDIR": WORK, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
            os.execve(command[0], command, environment)
        finally:
            os.dup2(said, 2)
    except BaseException as error:  # nothing of this process may go on but the program
        os.write(2, f"{error}\n".encode())
    os._exit(FAILED)


def main(settings: dict[str, Any]) -> int:
    """Runs settings["command"] shut in; the exit status.

    settings: command, with `shown`, the paths that it needs; root, an empty folder to mount on; user, whom root
    becomes; folder_bytes, seconds (of the clock), limits (by their names in `resource`).
    """
    namespaces = os.open("/proc/sys/user", os.O_RDONLY | os.O_DIRECTORY)
    own_mounts()
    user = settings["user"] if os.geteuid() == 0 else os.geteuid()
    new_root(settings["root"], settings["shown"], settings["folder_bytes"], user)
    become(user)
    die_with_parent()
    unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    # Within another user namespace the program could mount, and fill, a file system of any size.
    file = os.open("max_user_namespaces", os.O_WRONLY, dir_fd=namespaces)
    os.write(file, b"0")
    os.close(file)
    os.close(namespaces)
    child = start(settings["command"], settings["limits"])
    ended = os.pidfd_open(child)
    in_time = bool(select.select([ended], [], [], settings["seconds"])[0])
    if not in_time:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (status if status >= 0 else 128 - status) if in_time else TIMED_OUT


if __name__ == "__main__":
    try:
        sys.exit(main(json.loads(sys.argv[1])))
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        sys.exit(FAILED)
