"""Removal of what a microVM leaves behind: by the janitor (jailer.janitor), or by ``--purge`` afterwards.

Removal never leaves the given directory: descriptors only, no links followed, no mount crossed (openat2(2)), so that a
jail root that an earlier guest prepared, or in which the host mounted something, cannot lead it elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from base.errno_text import errno_text
from base.lean_typing import NamedTuple
from jailer import syscalls
from jailer.errors import CleanupError
from jailer.steps import cgroups
from jailer.steps.worker_cgroups import directories_of

_RESOLVE = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
MAX_DEPTH = 64
#: How long the cells of an ended supervisor may take to leave their cgroups.
EMPTY_TIMEOUT_S = 30.0
_PAUSE_S = 0.005


def remove_tree(directory: int, name: str, depth: int = 0) -> list[str]:
    """Remove ``name`` (one component) below a directory descriptor; return what could not be removed."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=directory)
            return []
        if depth >= MAX_DEPTH:
            return [f"{name}: nested too deeply"]
        descriptor = syscalls.openat2(directory, name, _DIRECTORY, _RESOLVE)
    except FileNotFoundError:
        return []
    except OSError as error:
        crossed = error.errno == errno.EXDEV
        return [f"{name}: {'something is mounted there' if crossed else errno_text(error)}"]
    failures: list[str] = []
    try:
        for entry in os.listdir(descriptor):
            failures.extend(f"{name}/{each}" for each in remove_tree(descriptor, entry, depth + 1))
    finally:
        os.close(descriptor)
    if failures:
        return failures
    try:
        os.rmdir(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        return [f"{name}: {errno_text(error)}"]
    return []


class Leftover(NamedTuple):
    """One thing to remove: ``name`` below the open directory ``parent``; ``path`` is for people."""

    parent: int
    name: str
    path: str
    is_cgroup: bool
    #: Only if it is empty: a directory that other microVMs may share by now.
    only_empty: bool


def leftover(path: str, *, is_cgroup: bool = False, only_empty: bool = False) -> Leftover:
    """Open the parent of something that is to be removed later. Raises OSError."""
    parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return Leftover(parent, os.path.basename(path), path, is_cgroup, only_empty)


def remove(item: Leftover, deadline: float) -> list[str]:
    """Remove one thing; a cgroup that is still in use is waited for. Returns what could not be removed."""
    if not (item.is_cgroup or item.only_empty):
        return remove_tree(item.parent, item.name)
    while True:
        try:
            os.rmdir(item.name, dir_fd=item.parent)
            return []
        except FileNotFoundError:
            return []
        except OSError as error:
            if item.only_empty:
                return []  # somebody else uses it
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                return [f"{item.path}: {errno_text(error)}"]
        time.sleep(_PAUSE_S)


def remove_all(items: list[Leftover]) -> list[str]:
    """Remove everything, in order. Returns what could not be removed."""
    deadline = time.monotonic() + EMPTY_TIMEOUT_S
    failures = []
    for item in items:
        failures.extend(remove(item, deadline))
    return failures


# ---------------------------------------------------------------- purge


def purge(jail_directory: str, exec_name: str, cgroup_name: str) -> list[str]:
    """Remove the jail directory and the cgroups of an ended microVM; return what was removed. Raises CleanupError.

    ``cgroup_name`` is the path of its cgroup below the mounts. The supervisor locks the pid file as long as it lives.
    """
    _refuse_running(jail_directory, f"{exec_name}.pid")
    hierarchies = cgroups.find_hierarchies()
    mounts = dict.fromkeys((*hierarchies.v1.values(), hierarchies.v2))
    own = [os.path.join(mount, cgroup_name) for mount in mounts if mount]
    paths = [jail_directory, *(path for each in own for path in (*directories_of(each), each))]
    items = [leftover(path, is_cgroup=path != jail_directory) for path in paths if os.path.isdir(path)]
    failures = remove_all(items)
    for item in items:
        os.close(item.parent)
    if failures:
        raise CleanupError(f"not removed: {'; '.join(failures)}")
    return [item.path for item in items]


def _refuse_running(jail_directory: str, name: str) -> None:
    """Links are not followed: the directory may belong to the microVM's user."""
    try:
        directory = os.open(jail_directory, _DIRECTORY | os.O_CLOEXEC)
        try:
            resolve = _RESOLVE & ~syscalls.RESOLVE_NO_XDEV  # the jail root may be a mount
            descriptor = syscalls.openat2(directory, f"root/{name}", os.O_RDONLY | os.O_NONBLOCK, resolve)
        finally:
            os.close(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CleanupError(f"Failed to open file {jail_directory}/root/{name}: {errno_text(error)}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(descriptor, 16).decode("ascii", "replace").strip()
        pid = pid if pid.isdecimal() else "unknown"
        raise CleanupError(f"the microVM is still running (pid {pid} as its caller sees it)") from None
    finally:
        os.close(descriptor)
