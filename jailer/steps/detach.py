"""Becoming the visible process: ``--daemonize``, ``--new-pid-ns`` and the pid file.

The process that the client started stays until the launch has succeeded or failed, and ends with the status that
says so; Firecracker's jailer ends at once and cannot tell.
"""

from __future__ import annotations

import fcntl
import os

from base import threads
from base.errno_text import errno_text
from base.lean_typing import Callable
from jailer import syscalls
from jailer.errors import StepError
from jailer.operations import NO_JOURNAL, Journal, Operation

_READY = b"\1"


class Launcher:
    """The pipe by which the process that will be visible tells the one that the client waits for."""

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def ready(self) -> None:
        """The launch succeeded: let the client's process end with status 0."""
        if self._descriptor >= 0:
            try:
                os.write(self._descriptor, _READY)
            except OSError:
                pass  # the client's process was killed meanwhile
            os.close(self._descriptor)
            self._descriptor = -1


def _wait_for_launch(read_end: int) -> None:
    """In the client's process: wait for the outcome and end with it."""
    ready = os.read(read_end, 1)
    os._exit(0 if ready == _READY else 1)


def detach(daemonize: bool, new_pid_namespace: bool) -> Launcher:
    """Fork as the flags ask for; returns in the process that becomes the supervisor. Raises StepError."""
    if not (daemonize or new_pid_namespace):
        return Launcher(-1)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        if daemonize:
            if os.fork():
                os.close(write_end)
                _wait_for_launch(read_end)
            os.setsid()
            if os.fork():
                os._exit(0)
        if new_pid_namespace:
            leads_session = os.getsid(0) == os.getpid()
            syscalls.unshare(syscalls.CLONE_NEWPID)
            if os.fork():
                if daemonize:
                    os._exit(0)  # the client waits for the first process, not for this one
                os.close(write_end)
                _wait_for_launch(read_end)
            if leads_session:
                os.setsid()  # or the terminal would hang up on us when the leader ends
    except OSError as error:
        raise StepError(f"Failed cloning into a new child process: {threads.explain(error)}") from None
    os.close(read_end)
    return Launcher(write_end)


def leave_pid_namespace() -> None:
    """Let every process that we fork from now on be in a new pid namespace; its first is process 1. Raises StepError.

    When process 1 ends, the kernel kills the others. We stay where we are, hence can make no thread any more.
    """
    try:
        syscalls.unshare(syscalls.CLONE_NEWPID)
    except OSError as error:
        raise StepError(f"Failed to unshare into new pid namespace: {errno_text(error)}") from None


def outer_pid() -> int:
    """Return our pid as the namespace sees it that mounted /proc. Raises OSError."""
    return int(os.readlink("/proc/self"))


def redirect_standard_descriptors(null: int, descriptors: tuple[int, ...]) -> None:
    """Replace standard descriptors by /dev/null. Raises OSError."""
    for each in descriptors:
        os.dup2(null, each)


class WritePidFile(Operation):
    """EXECNAME.pid in the jail root, never over an existing one; a lock on it shows that the microVM lives."""

    __slots__ = ("_journal", "_name", "_pid", "_root", "descriptor")

    def __init__(self, root: Callable[[], int], name: str, pid: int, journal: Journal = NO_JOURNAL) -> None:
        """``root`` returns a descriptor of the jail root when the file is to be made."""
        self._journal = journal
        self._root = root
        self._name = f"{name}.pid"
        self._pid = pid
        self.descriptor = -1

    def describe(self) -> str:
        return f"write {self._name}"

    def do(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._journal.file(self._root(), self._name)
        try:
            writable = os.open(self._name, flags, 0o666, dir_fd=self._root())
        except OSError as error:
            self._journal.not_made()
            raise StepError(f"Failed to open file /{self._name}: {errno_text(error)}") from None
        try:
            # What the supervisor keeps for the lock cannot be written by.
            self.descriptor = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root())
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(writable, str(self._pid).encode())
        except OSError as error:
            self.undo()
            raise StepError(f"Failed to write to /{self._name}: {errno_text(error)}") from None
        finally:
            os.close(writable)

    def undo(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        os.unlink(self._name, dir_fd=self._root())
