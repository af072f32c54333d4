"""What a microVM leaves behind, and who removes it: the janitor of ``--cleanup``, or ``--purge`` afterwards.

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
from base.lean_std import signal
from base.lean_typing import NamedTuple
from jailer import syscalls
from jailer.errors import CleanupError, JailerError
from jailer.seccomp.install import Filter, install
from jailer.steps import cgroups, identity, process
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


# ---------------------------------------------------------------- janitor

# Lines of the life line, jailer → janitor: a kind, a space, a path. READY comes last; then only the end follows.
_TREE = "tree"
_CGROUP = "cgroup"
_EMPTY = "empty"
_READY = "ready"
_MAX_LINES_SIZE = 64 << 10
#: CAP_DAC_OVERRIDE and CAP_FOWNER: the jail root belongs to another user.
_JANITOR_CAPABILITIES = 1 << 1 | 1 << 3


class Janitor:
    """The supervisor's side: say what to remove when this end of the life line closes, however that happens."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def tree(self, path: str) -> None:
        """A directory with everything in it."""
        self._tell(_TREE, path)

    def cgroup(self, path: str) -> None:
        """A cgroup, as soon as nobody is in it."""
        self._tell(_CGROUP, path)

    def empty(self, path: str) -> None:
        """A directory, if nobody else uses it by then."""
        self._tell(_EMPTY, path)

    def ready(self) -> None:
        """Nothing more will be added."""
        self._tell(_READY, "")

    def _tell(self, kind: str, path: str) -> None:
        try:
            os.write(self.descriptor, os.fsencode(f"{kind} {path}") + b"\0")
        except OSError as error:
            raise CleanupError(f"the janitor is gone: {errno_text(error)}") from None


def start_janitor(chosen: Filter | None) -> Janitor:
    """Fork the janitor, detached, while this process is small and in no cgroup of the microVM. Raises OSError."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    middle = os.fork()
    if middle == 0:
        status = 1
        try:
            os.close(write_end)
            os.setsid()
            status = 0 if os.fork() else _janitor(read_end, chosen)
        finally:
            os._exit(status)
    os.close(read_end)
    _, status = os.waitpid(middle, 0)
    if status:
        os.close(write_end)
        raise CleanupError("cannot start the janitor")
    return Janitor(write_end)


def _janitor(life_line: int, chosen: Filter | None) -> int:
    """Collect what to remove until the life line ends, then remove it, newest first."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        process.keep_only((life_line,))
        identity.set_name("cellblock-clean")
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.chdir("/")
        items = _collect(life_line, chosen)
        failures = remove_all(items[::-1])
    except (JailerError, OSError) as error:
        failures = [str(error)]
    for failure in failures:
        os.write(2, f"cleanup: not removed: {failure}\n".encode("utf-8", "replace"))
    return 1 if failures else 0


def _collect(life_line: int, chosen: Filter | None) -> list[Leftover]:
    items = []
    pending = b""
    while data := os.read(life_line, _MAX_LINES_SIZE):
        *lines, pending = (pending + data).split(b"\0")
        for line in lines:
            kind, _, path = os.fsdecode(line).partition(" ")
            if kind == _READY:
                _confine_janitor(chosen)
            else:
                items.append(leftover(path, is_cgroup=kind == _CGROUP, only_empty=kind == _EMPTY))
    return items


def _confine_janitor(chosen: Filter | None) -> None:
    if os.getuid() == 0:
        syscalls.capabilities_set(_JANITOR_CAPABILITIES)
    identity.set_no_new_privileges()
    if chosen is not None:
        install(chosen)


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
