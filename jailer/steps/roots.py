"""The root directories: the jail root for the controller, an empty read-only one for supervisor and workers.

mount_namespaces(7), pivot_root(2), open_tree(2), move_mount(2). ``pivot_root(".", ".")`` stacks the old root on the
new one, so that no directory for it is needed.
"""

from __future__ import annotations

import os

from base.errno_text import errno_text
from base.lean_typing import Callable
from jailer import syscalls, walls
from jailer.errors import StepError
from jailer.operations import Operation

#: Where the controller, and where supervisor and workers, see the ipc directory.
CONTROLLER_IPC_DIRECTORY = "/run/cellblock"
WORKER_IPC_DIRECTORY = "/ipc"
_IPC_OPTIONS = (("size", "64k"), ("nr_inodes", "80"))
_EMPTY_OPTIONS = (("source", "cellblock-empty"), ("mode", "0555"), ("size", "4k"), ("nr_inodes", "4"))
_QUIET = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC


def isolate_mounts() -> None:
    """Enter a mount namespace of our own; the host's mounts go on to propagate into it, none back. Raises StepError."""
    try:
        syscalls.unshare(syscalls.CLONE_NEWNS)
    except OSError as error:
        raise StepError(f"Failed to unshare into new mount namespace: {errno_text(error)}") from None
    try:
        syscalls.mount(None, "/", None, syscalls.MS_SLAVE | syscalls.MS_REC)
    except OSError as error:
        raise StepError(f"Failed to change the propagation type to slave: {errno_text(error)}") from None


class IpcTrees:
    """The ipc directory, a small tmpfs, as two detached mounts: writable for the controller, read-only for others."""

    __slots__ = ("controller", "others")

    def __init__(self, uid: int, gid: int, mode: int) -> None:
        """Mount over the current directory for a moment (in a mount namespace of our own). Raises StepError."""
        try:
            owner = (("uid", str(uid)), ("gid", str(gid)), ("mode", f"{mode:o}"))
            options = (("source", "cellblock-ipc"), *_IPC_OPTIONS, *owner)
            mounted = syscalls.mount_detached("tmpfs", options, _QUIET)
            below = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # What is mounted nowhere cannot be cloned.
                syscalls.move_mount(mounted, ".")
                os.fchdir(mounted)
                clone = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH
                self.controller = syscalls.open_tree("", clone, mounted)
                self.others = syscalls.open_tree("", clone, mounted)
                syscalls.umount(".", syscalls.MNT_DETACH)
                os.fchdir(below)
            finally:
                os.close(mounted)
                os.close(below)
            syscalls.mount_setattr(self.others, syscalls.MOUNT_ATTR_RDONLY)
        except OSError as error:
            raise StepError(f"Failed to make the ipc directory: {errno_text(error)}") from None


def clone_read_only(path: str) -> int:
    """Return a detached, read-only mount of a directory: it can be handed into a jail, since it has no ``..``."""
    descriptor = syscalls.open_tree(path, syscalls.OPEN_TREE_CLONE)
    try:
        syscalls.mount_setattr(descriptor, syscalls.MOUNT_ATTR_RDONLY | _QUIET)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _pivot_here() -> None:
    syscalls.pivot_root(".", ".")
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")


def enter_empty_root(ipc_tree: int) -> None:
    """Make an empty tmpfs, mounted over the current directory, with the ipc directory our root, read-only.

    Raises OSError.
    """
    empty = syscalls.mount_detached("tmpfs", _EMPTY_OPTIONS, _QUIET)
    try:
        syscalls.move_mount(empty, ".")
        os.fchdir(empty)
        name = WORKER_IPC_DIRECTORY.lstrip("/")
        os.mkdir(name, 0o555)
        syscalls.move_mount(ipc_tree, name)
        _pivot_here()
        syscalls.mount_setattr(empty, syscalls.MOUNT_ATTR_RDONLY)
    finally:
        os.close(empty)


class EnterJailRoot(Operation):
    """The controller's root: the jail root with what the host mounted inside; no set-user-ID, nothing executable.

    It is the current directory: a mount namespace takes that along, so that no path leads there a second time.
    """

    __slots__ = ()
    step = walls.ROOT

    def describe(self) -> str:
        return "enter the jail root"

    def do(self) -> None:
        isolate_mounts()
        try:
            tree = syscalls.open_tree(".", syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE)
            try:
                syscalls.mount_setattr(tree, syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NOEXEC)
                syscalls.move_mount(tree, ".")
                os.fchdir(tree)
            finally:
                os.close(tree)
        except OSError as error:
            raise StepError(f"Failed to bind mount the jail root directory: {errno_text(error)}") from None
        try:
            _pivot_here()
        except OSError as error:
            raise StepError(f"Failed to pivot root: {errno_text(error)}") from None


class AttachIpcDirectory(Operation):
    """Attach the controller's ipc directory inside the jail root (``directory`` returns a descriptor of the place)."""

    __slots__ = ("_directory", "_tree")
    step = walls.ROOT

    def __init__(self, tree: int, directory: Callable[[], int]) -> None:
        self._tree = tree
        self._directory = directory

    def describe(self) -> str:
        return "attach the ipc directory"

    def do(self) -> None:
        syscalls.move_mount(self._tree, "", self._directory())

    def undo(self) -> None:
        syscalls.umount(CONTROLLER_IPC_DIRECTORY, syscalls.MNT_DETACH)  # or its directory could not be removed
