"""The janitor: a process that outlives a launch that fails, and, with ``--cleanup`` or without a jail, the microVM.

The launch tells it of every change before it is made. If the launch ends before the walls of the controller are closed,
however it ends, the janitor takes back what is still there; so it does not matter who was killed, or which of its
privileges the launch had given up. When the walls are closed it forgets that, and ends if it has nothing else to do.
What it acts on came as descriptors; it resolves no path of more than one name.
"""

from __future__ import annotations

import errno
import os
import select
import time

from base import threads
from base.errno_text import errno_text
from base.lean_std import signal, socket
from base.lean_typing import NamedTuple
from ipc import descriptors
from ipc.errors import DescriptorError, IpcError
from jailer import syscalls
from jailer.cleanup import EMPTY_TIMEOUT_S, Leftover, remove, remove_all
from jailer.errors import CleanupError, JailerError
from jailer.operations import Journal, Step
from jailer.seccomp.install import Filter, install
from jailer.steps import identity, process

# Frames of the life line, launch → janitor: a kind, a space, a text (a name, a path, three numbers), and most of them a
# descriptor: of the directory that the name is in, or whose owner is meant.
# What is taken back if the launch fails, newest first:
_FILE, _DIRECTORY, _CGROUP, _OWNER = "made-file", "made-directory", "made-cgroup", "owner"
#: The last of these was not made after all.
_NOT_MADE = "not-made"
# What is removed at the end in any case, newest first:
_TREE, _CGROUP_AT_END, _IF_EMPTY = "tree", "cgroup", "empty"
# What ends the first part, and the janitor: _LAUNCHED if there is nothing to remove at the end, _UNDO always.
_LAUNCHED, _UNDO = "launched", "undo"
_MAX_FRAME = 8 << 10
#: CAP_DAC_OVERRIDE and CAP_FOWNER: the jail root belongs to another user.
_CAPABILITIES = 1 << 1 | 1 << 3


class Janitor(Journal):
    """The launch's side. Each method raises CleanupError if the janitor is gone."""

    __slots__ = ("_channel", "_keeps", "is_over")

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._keeps = False
        #: The launch has succeeded: nothing of it is taken back any more.
        self.is_over = False

    def file(self, directory: int, name: str) -> None:
        self._tell(_FILE, name, directory)

    def directory(self, parent: int, name: str) -> None:
        self._tell(_DIRECTORY, name, parent)

    def cgroup(self, parent: int, name: str) -> None:
        self._tell(_CGROUP, name, parent)

    def owner(self, descriptor: int, uid: int, gid: int, mode: int) -> None:
        self._tell(_OWNER, f"{uid} {gid} {mode}", descriptor)

    def not_made(self) -> None:
        self._tell(_NOT_MADE)

    def remove_tree(self, path: str) -> None:
        """At the end: a directory with everything in it. Raises OSError if its parent cannot be opened."""
        self._at_end(_TREE, path)

    def remove_cgroup(self, path: str) -> None:
        """At the end: a cgroup, as soon as nobody is in it. Raises OSError if its parent cannot be opened."""
        self._at_end(_CGROUP_AT_END, path)

    def remove_empty(self, path: str) -> None:
        """At the end: a directory, if nobody else uses it by then. Raises OSError if its parent cannot be opened."""
        self._at_end(_IF_EMPTY, path)

    def launched(self) -> None:
        """The launch has succeeded. Later calls do nothing."""
        if not self.is_over:
            self._tell(_LAUNCHED)
            self.is_over = True
            if not self._keeps:
                self._channel.close()

    def undo(self) -> None:
        """The launch has failed, and nobody else acts for it any more: have it taken back, and wait for that.

        A cgroup that somebody is still in, maybe we, is removed when it is empty, and not waited for.
        """
        if self.is_over:
            return
        self.is_over = True
        try:
            self._tell(_UNDO)
        except CleanupError:
            return  # then there is nobody to wait for
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.poll(EMPTY_TIMEOUT_S * 1000)

    def _at_end(self, kind: str, path: str) -> None:
        self._keeps = True
        parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._tell(kind, path, parent)
        finally:
            os.close(parent)

    def _tell(self, kind: str, text: str = "", descriptor: int = -1) -> None:
        try:
            descriptors.send(self._channel, os.fsencode(f"{kind} {text}"), (descriptor,) if descriptor >= 0 else ())
        except IpcError as error:
            raise CleanupError(f"the janitor is gone: {self._last_words() or error}") from None

    def _last_words(self) -> str:
        """Return why it has ended, if it has said so."""
        try:
            return os.fsdecode(self._channel.recv(_MAX_FRAME, socket.MSG_DONTWAIT))
        except OSError:
            return ""


def start(chosen: Filter | None) -> Janitor:
    """Fork the janitor, detached, while this process is small and in no cgroup of the microVM. Raises CleanupError."""
    try:
        ours, theirs = descriptors.channel_pair()
        middle = os.fork()
    except OSError as error:
        raise CleanupError(f"Failed to start the janitor: {threads.explain(error)}") from None
    if middle == 0:
        status = 1
        try:
            ours.close()
            os.setsid()
            status = 0 if os.fork() else _run(theirs, chosen)
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    theirs.close()
    with Step("start the janitor"):
        _, status = os.waitpid(middle, 0)
    if status:
        ours.close()
        reason = errno_text(os.WEXITSTATUS(status)) if os.WIFEXITED(status) else f"signal {os.WTERMSIG(status)}"
        raise CleanupError(f"Failed to start the janitor: {reason}")
    return Janitor(ours)


# ---------------------------------------------------------------- in the janitor


class Change(NamedTuple):
    """A change that the launch was about to make. ``descriptor``: see the frames."""

    kind: str
    descriptor: int
    text: str


def take_back(change: Change) -> bool:
    """Undo one change; False if a directory is still in use. Raises OSError."""
    try:
        if change.kind == _OWNER:
            uid, gid, mode = map(int, change.text.split())
            os.fchmod(change.descriptor, mode)
            os.fchown(change.descriptor, uid, gid)
        elif change.kind == _FILE:
            os.unlink(change.text, dir_fd=change.descriptor)
        else:
            os.rmdir(change.text, dir_fd=change.descriptor)
    except FileNotFoundError:
        pass
    except OSError as error:
        if change.kind in (_DIRECTORY, _CGROUP) and error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True


class _Work:
    """What the janitor was told."""

    def __init__(self, channel: socket.socket, chosen: Filter | None) -> None:
        self._channel = channel
        self._chosen = chosen
        self._changes: list[Change] = []
        self._at_end: list[Leftover] = []
        self._launched = False
        self.failures: list[str] = []

    def run(self) -> None:
        """Listen until the end of the launch or of the microVM, then act. Raises IpcError, JailerError, OSError."""
        while self._hear():
            pass
        self._take_back()
        self.failures += remove_all(self._at_end[::-1])

    def failed(self, text: str) -> None:
        """Say why the janitor cannot go on: to the launch, which hears it when it has something to tell, else aloud."""
        try:
            if self._launched:
                os.write(2, f"cleanup: {text}\n".encode("utf-8", "replace"))
            else:
                descriptors.send(self._channel, text.encode("utf-8", "replace"))
        except (OSError, IpcError):
            pass  # nobody listens

    def _receive(self) -> tuple[bytes, descriptors.OwnedDescriptors]:
        """Receive a frame. The kernel may be short of memory for a moment: then once more. Raises DescriptorError."""
        try:
            return descriptors.receive(self._channel, 1, maximum_size=_MAX_FRAME)
        except DescriptorError as error:
            if not isinstance(error.__context__, OSError):
                raise  # a frame came, and is lost
        return descriptors.receive(self._channel, 1, maximum_size=_MAX_FRAME)

    def _hear(self) -> bool:
        frame, owned = self._receive()
        with owned:
            kind, _, text = os.fsdecode(frame).partition(" ")
            if kind in (_FILE, _DIRECTORY, _CGROUP, _OWNER):
                self._changes.append(Change(kind, owned.take(), text))
            elif kind in (_TREE, _CGROUP_AT_END, _IF_EMPTY):
                name = os.path.basename(text)
                self._at_end.append(Leftover(owned.take(), name, text, kind == _CGROUP_AT_END, kind == _IF_EMPTY))
            elif kind == _NOT_MADE:
                os.close(self._changes.pop().descriptor)
            elif kind == _LAUNCHED:
                self._launched = True
                while self._changes:
                    os.close(self._changes.pop().descriptor)
                if not self._at_end:
                    return False
                confine(self._chosen)
        return kind not in ("", _UNDO)

    def _take_back(self) -> None:
        """Undo what was done, newest first. What is in use is tried again, when the launch does not wait any more."""
        in_use = []
        while self._changes:
            change = self._changes.pop()
            try:
                if not take_back(change):
                    in_use.append(change)
            except OSError as error:
                self.failures.append(f"{change.text}: {errno_text(error)}")
        self._channel.close()
        deadline = time.monotonic() + EMPTY_TIMEOUT_S
        for kind, descriptor, name in in_use:
            self.failures += remove(Leftover(descriptor, name, name, kind == _CGROUP, kind != _CGROUP), deadline)


def _run(channel: socket.socket, chosen: Filter | None) -> int:
    work = _Work(channel, chosen)
    try:
        with Step("set up the janitor"):
            _set_up(channel)
        work.run()
    except (JailerError, IpcError, OSError) as error:
        work.failed(errno_text(error) if isinstance(error, OSError) else str(error))
        return 1
    for failure in work.failures:
        os.write(2, f"cleanup: not removed: {failure}\n".encode("utf-8", "replace"))
    return 1 if work.failures else 0


def _set_up(channel: socket.socket) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    process.keep_only((channel.fileno(),))
    identity.set_name("cellblock-clean")
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.chdir("/")


def confine(chosen: Filter | None) -> None:
    """From here on it only waits and removes. Raises OSError, PolicyError."""
    if os.getuid() == 0:
        syscalls.capabilities_set(_CAPABILITIES)
    identity.set_no_new_privileges()
    if chosen is not None:
        install(chosen)
