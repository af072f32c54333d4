"""Directories and device nodes in the jail root, made by the controller's process when it is inside, still as root.

By descriptors of directories that belong to nobody else until all is made (jailer.steps.directories): what an earlier
microVM of the same id planted there, or its user swaps meanwhile, leads nowhere.
"""

from __future__ import annotations

import os
import stat

from base.errno_text import errno_text
from base.lean_typing import Callable, Iterable
from jailer import walls
from jailer.errors import CleanupError, StepError
from jailer.operations import NO_JOURNAL, Journal, Operation
from jailer.steps.directories import Taken, open_directory
from jailer.steps.roots import CONTROLLER_IPC_DIRECTORY

#: (path, major, minor, is a failure only a warning)
Node = tuple[str, int, int, bool]
DEVICES: tuple[Node, ...] = (
    ("/dev/net/tun", 10, 200, False),
    ("/dev/kvm", 10, 232, False),
    ("/dev/urandom", 1, 9, True),
)
DIRECTORIES = ("/", "/dev", "/dev/net", "/run")
_PROC_MISC = "/proc/misc"


def userfaultfd_minor(path: str = _PROC_MISC) -> int | None:
    """Return the minor number of /dev/userfaultfd on this host, None if it has none. Raises StepError."""
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                number, _, name = line.strip().partition(" ")
                if name == "userfaultfd" and number.isdecimal():
                    return int(number)
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    except OSError as error:
        raise StepError(f"Failed to read {path}: {errno_text(error)}") from None
    return None


class MakeDirectory(Operation):
    """mkdir, chmod 0700; ours until :class:`GiveDirectories`. One without a parent is the current directory."""

    __slots__ = ("_made", "_mounts", "_name", "_parent", "_taken", "journal", "path")

    def __init__(
        self, path: str, parent: MakeDirectory | None = None, *, mounts: bool = False, journal: Journal = NO_JOURNAL
    ) -> None:
        """``mounts``: the host may have mounted something there."""
        self.path = path
        self.journal = journal
        self._parent = parent
        self._name = os.path.basename(path)
        self._mounts = mounts
        self._made = False
        self._taken: Taken | None = None

    @property
    def descriptor(self) -> int:
        """The directory, once it is made."""
        assert self._taken is not None
        return self._taken.descriptor

    def describe(self) -> str:
        return f"make directory {self.path} in the jail"

    def do(self) -> None:
        if self._parent is not None:
            self.journal.directory(self._parent.descriptor, self._name)
            try:
                os.mkdir(self._name, 0o700, dir_fd=self._parent.descriptor)
                self._made = True
            except FileExistsError:
                self.journal.not_made()
            except OSError as error:
                self.journal.not_made()
                raise StepError(f"Failed to create directory {self.path}: {errno_text(error)}") from None
        try:
            self._taken = Taken(self._open(), self.journal)
        except CleanupError:
            self.undo()
            raise
        except OSError as error:
            self.undo()
            raise StepError(f"Failed to change owner for {self.path}: {errno_text(error)}") from None

    def _open(self) -> int:
        if self._parent is None:
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return open_directory(self._parent.descriptor, self._name, mounts=self._mounts)

    def undo(self) -> None:
        if self._taken is not None:
            self._taken.give_back()
            self._taken = None
        if self._made:
            assert self._parent is not None
            os.rmdir(self._name, dir_fd=self._parent.descriptor)


class GiveDirectories(Operation):
    """chown to the user of the microVM, when nothing more is made in them."""

    __slots__ = ("_directories", "_gid", "_passages", "_uid")

    def __init__(self, directories: Iterable[MakeDirectory], uid: int, gid: int, passages: tuple[str, ...]) -> None:
        """``passages``: paths of directories that cells of other users pass through."""
        self._directories = tuple(directories)
        self._passages = passages
        self._uid = uid
        self._gid = gid

    def describe(self) -> str:
        return "give the directories in the jail to its user"

    def do(self) -> None:
        for directory in reversed(self._directories):
            try:
                os.fchown(directory.descriptor, self._uid, self._gid)
                if directory.path in self._passages:
                    os.fchmod(directory.descriptor, 0o711)
            except OSError as error:
                raise StepError(f"Failed to change owner for {directory.path}: {errno_text(error)}") from None


class MakeDevice(Operation):
    """mknod 0600, chown."""

    __slots__ = ("_directory", "_gid", "_made", "_major", "_minor", "_name", "_optional", "_uid", "path")
    step = walls.DEVICES

    def __init__(
        self, directory: MakeDirectory, path: str, number: tuple[int, int], owner: tuple[int, int], *, optional: bool
    ) -> None:
        self.path = path
        self._directory = directory
        self._name = os.path.basename(path)
        self._major, self._minor = number
        self._optional = optional
        self._uid, self._gid = owner
        self._made = False

    def describe(self) -> str:
        return f"make device {self.path} ({self._major}:{self._minor}) in the jail"

    def do(self) -> None:
        directory = self._directory.descriptor
        self._directory.journal.file(directory, self._name)
        try:
            os.mknod(self._name, stat.S_IFCHR | 0o600, os.makedev(self._major, self._minor), dir_fd=directory)
            self._made = True
        except OSError as error:
            self._directory.journal.not_made()
            if self._optional:
                return
            raise StepError(f"Failed to create {self.path} via mknod inside the jail: {errno_text(error)}") from None
        try:
            os.chown(self._name, self._uid, self._gid, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            self.undo()
            raise StepError(f"Failed to change owner for {self.path}: {errno_text(error)}") from None

    def undo(self) -> None:
        if self._made:
            os.unlink(self._name, dir_fd=self._directory.descriptor)


def nodes() -> tuple[Node, ...]:
    """Return the device nodes that a jail root is to have on this host. Raises StepError."""
    minor = userfaultfd_minor()
    return DEVICES if minor is None else (*DEVICES, ("/dev/userfaultfd", 10, minor, False))


def unused(wanted: Iterable[Node]) -> tuple[str, ...]:
    """Return the paths of the nodes that no cell opens (nobody is harmed by /dev/urandom)."""
    return tuple(path for path, _, _, optional in wanted if not optional)


def paths(wanted: Iterable[Node]) -> tuple[str, ...]:
    """Return the paths of all nodes."""
    return tuple(path for path, _, _, _ in wanted)


def operations(
    wanted: Iterable[Node],
    owner: tuple[int, int],
    *,
    mounts: bool,
    journal: Journal,
    make: Callable[[MakeDirectory, str], Operation | None] | None = None,
) -> tuple[list[MakeDirectory], list[Operation]]:
    """Return what makes the directories, from the root down, and the device nodes.

    ``mounts``: what is mounted at the first level of the jail root is the host's own choice. ``make``: how a node comes
    into a directory, where mknod(2) is not the way; None if it does not.
    """
    made: dict[str, MakeDirectory] = {}
    for path in (*DIRECTORIES, CONTROLLER_IPC_DIRECTORY):
        parent = None if path == "/" else made[os.path.dirname(path)]
        made[path] = MakeDirectory(path, parent, mounts=mounts and path.count("/") == 1, journal=journal)
    devices: list[Operation] = []
    for path, major, number, optional in wanted:
        directory = made[os.path.dirname(path)]
        if make is None:
            devices.append(MakeDevice(directory, path, (major, number), owner, optional=optional))
        elif (node := make(directory, path)) is not None:
            devices.append(node)
    return list(made.values()), devices
