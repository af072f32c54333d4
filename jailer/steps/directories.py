"""Steps on the jail root, as root, outside the jail: openat2(2), and descriptors from there on.

What is above the jail root belongs to root, as a rule; the jail root itself to the user of the microVM, and maybe of an
earlier one. Such a user can leave links and files there, move directories with mounts of the host on them, and swap
names while we act. It cannot mount, so a mount at the first level is the host's own: the directory that it is in, the
jail root, cannot have been moved, unless the directory above belongs to that user, too.
"""

from __future__ import annotations

import errno
import os
import stat

from base.errno_text import errno_text
from jailer import syscalls
from jailer.errors import CleanupError, StepError
from jailer.operations import NO_JOURNAL, Journal, Operation

_ATTEMPTS = 100


def make_directories(
    path: str, mode: int = 0o755, journal: Journal = NO_JOURNAL, *, is_cgroup: bool = False
) -> list[str]:
    """``mkdir -p``; return the directories that were made, outermost first. ``is_cgroup``: of one microVM alone.

    A parent may disappear in between, when the janitor of another microVM removes it as empty: then once more.
    Raises StepError.
    """
    for _ in range(_ATTEMPTS):
        missing = []
        current = path
        while not os.path.lexists(current):
            missing.append(current)
            current = os.path.dirname(current)
        made: list[str] = []
        try:
            for each in reversed(missing):
                made += make_directory(each, mode, journal, is_cgroup=is_cgroup and each == path)
            if stat.S_ISDIR(os.stat(path).st_mode):
                return made
            raise NotADirectoryError(errno.ENOTDIR, "")
        except FileNotFoundError:
            remove_empty(made)
        except CleanupError:
            remove_empty(made)
            raise
        except OSError as error:
            remove_empty(made)
            raise StepError(f"Failed to create directory {path}: {errno_text(error)}") from None
    raise StepError(f"Failed to create directory {path}: its parent keeps disappearing")


def make_directory(path: str, mode: int, journal: Journal, *, is_cgroup: bool = False) -> list[str]:
    """mkdir; return what was made: nothing, if another launch made it meanwhile. Raises OSError, CleanupError."""
    name = os.path.basename(path)
    parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        (journal.cgroup if is_cgroup else journal.directory)(parent, name)
        try:
            os.mkdir(name, mode, dir_fd=parent)
        except OSError as error:
            journal.not_made()
            if isinstance(error, FileExistsError):
                return []
            raise
    finally:
        os.close(parent)
    return [path]


def remove_empty(directories: list[str]) -> None:
    """Remove directories, innermost first, that are still empty."""
    for each in reversed(directories):
        try:
            os.rmdir(each)
        except OSError:
            return  # in use by somebody else now


def open_directory(parent: int, name: str, *, links: bool = False, mounts: bool = False) -> int:
    """Open one directory below another. ``links``, ``mounts``: may it be a symbolic link, may a mount be on it?

    Raises OSError (ELOOP for a link, EXDEV for a mount, ENOTDIR).
    """
    resolve = syscalls.RESOLVE_NO_MAGICLINKS
    if not links:
        resolve |= syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_BENEATH
    if not mounts:
        resolve |= syscalls.RESOLVE_NO_XDEV
    return syscalls.openat2(parent, name, os.O_RDONLY | os.O_DIRECTORY, resolve)


def is_trusted(directory: int) -> bool:
    """Can nobody but root (or who we are) change what the names in this directory mean?"""
    status = os.fstat(directory)
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class Taken:
    """A directory that is ours alone for as long as the launch acts in it: so no name in it changes meanwhile.

    It may have belonged to the user of an earlier microVM, who may have processes that wait for this moment.
    """

    __slots__ = ("_mode", "_owner", "descriptor")

    def __init__(self, descriptor: int, journal: Journal) -> None:
        """Take over the descriptor. Raises OSError, CleanupError; then nothing has changed, and it is closed."""
        self.descriptor = descriptor
        try:
            status = os.fstat(descriptor)
            self._owner = status.st_uid, status.st_gid
            self._mode = stat.S_IMODE(status.st_mode)
            journal.owner(descriptor, *self._owner, self._mode)
        except (OSError, CleanupError):
            self.close()
            raise
        try:
            os.fchown(descriptor, os.geteuid(), os.getegid())
            os.fchmod(descriptor, 0o700)
        except OSError:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Make it what it was, and close it. Raises OSError."""
        try:
            os.fchmod(self.descriptor, self._mode)
            os.fchown(self.descriptor, *self._owner)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the descriptor."""
        os.close(self.descriptor)
        self.descriptor = -1


class MakeJailRoot(Operation):
    """BASE/EXECNAME/ID/root; a client may have made it before, to put its kernel there.

    Links are followed, and mounts accepted, where only root can have made them.
    """

    __slots__ = ("_base", "_names", "_path", "_taken", "journal", "made", "mounts_are_hosts")

    def __init__(self, path: str, journal: Journal = NO_JOURNAL) -> None:
        self._path = path
        self.journal = journal
        directory, root = os.path.split(path)
        directory, microvm_id = os.path.split(directory)
        self._base, exec_name = os.path.split(directory)
        self._names = exec_name, microvm_id, root
        self._taken: Taken | None = None
        self.made: list[str] = []
        #: No user can have moved a mount of the host to the first level of the jail root.
        self.mounts_are_hosts = False

    def describe(self) -> str:
        return f"make jail root {self._path}"

    @property
    def descriptor(self) -> int:
        """The jail root, ours until the controller gives it to its user."""
        assert self._taken is not None
        return self._taken.descriptor

    def do(self) -> None:
        self.made = make_directories(self._path, journal=self.journal)
        try:
            self._taken = Taken(self._open(), self.journal)
        except CleanupError:
            remove_empty(self.made)
            raise
        except OSError as error:
            remove_empty(self.made)
            raise StepError(f"Failed to open jail root {self._path}: {errno_text(error)}") from None

    def _open(self) -> int:
        descriptor = os.open(self._base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in self._names:
            parent = descriptor
            try:
                self.mounts_are_hosts = is_trusted(parent)
                descriptor = open_directory(parent, name, links=self.mounts_are_hosts, mounts=True)
            finally:
                os.close(parent)
        return descriptor

    def undo(self) -> None:
        if self._taken is not None:
            self._taken.give_back()
            self._taken = None
        remove_empty(self.made)

    def close(self) -> None:
        """Let go of it: the launch has succeeded."""
        assert self._taken is not None
        self._taken.close()
        self._taken = None


class CopyExecFile(Operation):
    """The exec file in the jail root, where clients look for it. Nothing executes it: the cells are forks of ours.

    The jail root may have belonged to the user of an earlier microVM, so what is in the way is not written to before it
    is known to be a file that has no other name.
    """

    __slots__ = ("_gid", "_made", "_name", "_root", "_source", "_target", "_uid")

    def __init__(self, source: str, root: MakeJailRoot, path: str, uid: int, gid: int) -> None:
        """``path`` is what the jail root is called in texts."""
        self._source = source
        self._name = os.path.basename(source)
        self._target = os.path.join(path, self._name)
        self._root = root
        self._uid = uid
        self._gid = gid
        self._made = False

    def describe(self) -> str:
        return f"copy {self._source} to {self._target}"

    def do(self) -> None:
        content, mode = self._read()
        directory = self._root.descriptor
        self._made = not _exists(self._name, directory)
        if self._made:
            self._root.journal.file(directory, self._name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            descriptor = os.open(self._name, flags, mode, dir_fd=directory)
        except OSError as error:
            if self._made:
                self._root.journal.not_made()
            raise StepError(f"Failed to open {self._target}: {errno_text(error)}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StepError(f"{self._target} is not a file")
            if status.st_nlink > 1:
                raise StepError(f"Detected hard link at: {self._target}")
            os.fchown(descriptor, self._uid, self._gid)
            os.ftruncate(descriptor, 0)
            while content:
                content = content[os.write(descriptor, content) :]
        except OSError as error:
            self.undo()
            raise StepError(f"Failed to copy {self._source} to {self._target}: {errno_text(error)}") from None
        finally:
            os.close(descriptor)

    def _read(self) -> tuple[bytes, int]:
        try:
            with open(self._source, "rb", buffering=0) as file:
                return file.readall(), os.fstat(file.fileno()).st_mode & 0o777
        except OSError as error:
            raise StepError(f"Failed to open {self._source}: {errno_text(error)}") from None

    def undo(self) -> None:
        if self._made:
            os.unlink(self._name, dir_fd=self._root.descriptor)


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
