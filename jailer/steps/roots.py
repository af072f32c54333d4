"""The root directories: the jail root for the controller, an empty read-only one for supervisor and workers.

mount_namespaces(7), pivot_root(2), open_tree(2), move_mount(2). ``pivot_root(".", ".")`` stacks the old root on the
new one, so that no directory for it is needed.
"""

from __future__ import annotations

import os

from base.errno_text import errno_text
from jailer import syscalls, walls
from jailer.errors import StepError
from jailer.operations import Operation

#: Where the controller, and where supervisor and workers, see the ipc directory.
CONTROLLER_IPC_DIRECTORY = "/run/cellblock"
WORKER_IPC_DIRECTORY = "/ipc"
_IPC_OPTIONS = "mode=0700,size=64k,nr_inodes=80,uid={uid},gid={gid}"
_QUIET = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC


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

    def __init__(self, scratch: str, uid: int, gid: int) -> None:
        """Mount over ``scratch`` for a moment (we are in a mount namespace of our own). Raises StepError."""
        try:
            syscalls.mount("cellblock-ipc", scratch, "tmpfs", _QUIET, _IPC_OPTIONS.format(uid=uid, gid=gid))
            try:
                self.controller = syscalls.open_tree(scratch, syscalls.OPEN_TREE_CLONE)
                self.others = syscalls.open_tree(scratch, syscalls.OPEN_TREE_CLONE)
            finally:
                syscalls.umount(scratch, syscalls.MNT_DETACH)
            syscalls.mount_setattr(self.others, syscalls.MOUNT_ATTR_RDONLY)
        except OSError as error:
            raise StepError(f"Failed to make the ipc directory: {errno_text(error)}") from None


def clone_read_only(path: str) -> int:
    """Return a detached, read-only mount of a directory: it can be handed into a jail, since it has no ``..``."""
    descriptor = syscalls.open_tree(path, syscalls.OPEN_TREE_CLONE)
    quiet = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
    try:
        syscalls.mount_setattr(descriptor, syscalls.MOUNT_ATTR_RDONLY | quiet)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _pivot_here() -> None:
    syscalls.pivot_root(".", ".")
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")


def enter_empty_root(scratch: str, ipc_tree: int) -> None:
    """Make an empty tmpfs with the ipc directory our root, read-only. Raises OSError."""
    syscalls.mount("cellblock-empty", scratch, "tmpfs", _QUIET, "mode=0555,size=4k,nr_inodes=4")
    os.chdir(scratch)
    name = WORKER_IPC_DIRECTORY.lstrip("/")
    os.mkdir(name, 0o555)
    syscalls.move_mount(ipc_tree, name)
    _pivot_here()
    syscalls.mount(None, "/", None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | _QUIET)


class EnterJailRoot(Operation):
    """The controller's root: the jail root with what the host mounted inside; no set-user-ID, nothing executable."""

    __slots__ = ("_root",)
    step = walls.ROOT

    def __init__(self, root: str) -> None:
        self._root = root

    def describe(self) -> str:
        return f"enter jail root {self._root}"

    def do(self) -> None:
        isolate_mounts()
        try:
            syscalls.mount(self._root, self._root, None, syscalls.MS_BIND | syscalls.MS_REC)
            flags = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_NOSUID | syscalls.MS_NOEXEC
            os.chdir(self._root)
            syscalls.mount(None, ".", None, flags)
        except OSError as error:
            raise StepError(f"Failed to bind mount the jail root directory: {errno_text(error)}") from None
        try:
            _pivot_here()
        except OSError as error:
            raise StepError(f"Failed to pivot root: {errno_text(error)}") from None


class AttachIpcDirectory(Operation):
    """Attach the controller's ipc directory inside the jail root (the directory was made before)."""

    __slots__ = ("_path", "_tree")
    step = walls.ROOT

    def __init__(self, tree: int, path: str) -> None:
        self._tree = tree
        self._path = path

    def describe(self) -> str:
        return f"attach the ipc directory at {self._path}"

    def do(self) -> None:
        syscalls.move_mount(self._tree, self._path)
