"""Files that the host sees as they are, and the controller under a mount that takes something from them.

The jail root belongs to the controller's user, so it could replace or open what is in it. A file that is a mount can be
neither unlinked nor renamed nor replaced in the mount namespace where it is one: EBUSY (namei.c, is_local_mountpoint).
The host, where it is none, may do what it likes with it. mount_setattr(2).
"""

from __future__ import annotations

import os

from jailer import syscalls, walls
from jailer.operations import Operation
from jailer.steps.devices import MakeDirectory

_READ_ONLY = (
    syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
)


class _Cover(Operation):
    """Mount a file over itself, in a mount namespace of our own."""

    __slots__ = ("_attributes", "_directory", "_path")

    def __init__(self, directory: MakeDirectory, path: str, attributes: int) -> None:
        self._directory = directory
        self._path = path
        self._attributes = attributes

    def describe(self) -> str:
        return f"cover {self._path} in the jail"

    def do(self) -> None:
        directory, name = self._directory.descriptor, os.path.basename(self._path)
        tree = syscalls.open_tree(name, syscalls.OPEN_TREE_CLONE | syscalls.AT_SYMLINK_NOFOLLOW, directory)
        try:
            syscalls.mount_setattr(tree, self._attributes)
            syscalls.move_mount(tree, name, directory)
        finally:
            os.close(tree)

    def undo(self) -> None:
        syscalls.umount(self._path, syscalls.MNT_DETACH)  # or the file could not be removed


class CoverPidFile(_Cover):
    """Clients read the pid file to find, and to signal, the visible process: not for the controller to choose."""

    __slots__ = ()
    step = walls.PID_FILE

    def __init__(self, directory: MakeDirectory, path: str) -> None:
        super().__init__(directory, path, _READ_ONLY)


class CoverDevice(_Cover):
    """A device node that is there because Firecracker's jailer makes it: no cell opens it, and none can."""

    __slots__ = ()
    step = walls.UNUSED_DEVICES

    def __init__(self, directory: MakeDirectory, path: str) -> None:
        super().__init__(directory, path, syscalls.MOUNT_ATTR_NODEV)
