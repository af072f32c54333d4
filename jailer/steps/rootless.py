"""A launch by an ordinary user: a user namespace in which that user has what a jail is built with. user_namespaces(7).

Only the user's own ids are mapped, so what needs other ids cannot be had: docs/jailer.md ("Rootless") has the list, and
a launch names what it goes without.
"""

from __future__ import annotations

import errno
import os

from base.errno_text import errno_text
from jailer import syscalls
from jailer.errors import ArgumentError, StepError
from jailer.operations import Operation
from jailer.steps.devices import MakeDirectory

_CAP_SYS_ADMIN = 21
_MAPS = "/proc/self"
#: What may forbid user namespaces, and what allows them (sysctl).
REMEDY = (
    "run jailer as root, or let ordinary users make user namespaces: user.max_user_namespaces above 0, and, where the "
    "host has them, kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0"
)


def is_needed() -> bool:
    """Is this an ordinary user, without the capabilities that a jail is built with? Raises OSError."""
    if os.geteuid() == 0:
        return False
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    return not int(effective.split()[1], 16) >> _CAP_SYS_ADMIN & 1


def enter(uid: int, gid: int) -> None:
    """Enter a user namespace that maps the caller's uid and gid to themselves, with a mount namespace of its own.

    ``uid`` and ``gid`` are what the cells are to be: the caller's own, no others are mapped. Raises ArgumentError for
    others, StepError.
    """
    own = os.geteuid(), os.getegid()
    for flag, asked, mapped in (("uid", uid, own[0]), ("gid", gid, own[1])):
        if asked != mapped:
            raise ArgumentError(
                f"--{flag} {asked} is not yours: without root the cells can only be who you are (--{flag} {mapped})"
            )
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    except OSError as error:
        raise StepError(f"Failed to unshare into new user namespace: {errno_text(error)}; {REMEDY}") from None
    # Without CAP_SETGID outside, a group may only be mapped by who gives setgroups(2) up.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{own[0]} {own[0]} 1"), ("gid_map", f"{own[1]} {own[1]} 1")):
        try:
            _write(f"{_MAPS}/{name}", text)
        except OSError as error:
            raise StepError(f"Failed to write {_MAPS}/{name}: {errno_text(error)}; {REMEDY}") from None


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def shortcomings(*, own_processes: bool, own_cgroup: bool) -> str:
    """Say what this launch goes without; the arguments say what it was told to have."""
    without = ["device nodes are the host's own"]
    if not own_processes:
        without.append("the supervisor sees the host's /proc")
    if os.getgroups():
        without.append(f"supplementary groups stay ({', '.join(map(str, os.getgroups()))})")
    if not own_cgroup:
        without.append("no cgroup of its own")
    return f"Rootless: {'; '.join(without)}."


def clone_proc() -> int:
    """Return a detached mount of the host's /proc, read-only: a user namespace may mount none for the host's processes.

    Raises StepError.
    """
    flags = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
    try:
        descriptor = syscalls.open_tree("/proc", syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE)
        syscalls.mount_setattr(descriptor, flags | syscalls.MOUNT_ATTR_RDONLY, recursive=True)
    except OSError as error:
        raise StepError(f"Failed to clone the mount of /proc: {errno_text(error)}") from None
    return descriptor


def clone_nodes(paths: tuple[str, ...]) -> dict[str, int]:
    """Return a detached mount of each device node that the host has (mknod(2) is not for a user namespace).

    Raises StepError.
    """
    trees = {}
    for path in paths:
        try:
            trees[path] = syscalls.open_tree(path, syscalls.OPEN_TREE_CLONE)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise StepError(f"Failed to clone the mount of {path}: {errno_text(error)}") from None
    return trees


class MountDevice(Operation):
    """The host's device node, mounted over an empty file in the jail."""

    __slots__ = ("_directory", "_made", "_mounted", "_name", "_tree", "path")

    def __init__(self, directory: MakeDirectory, path: str, tree: int) -> None:
        """``tree`` is a detached mount of the node; it is closed when it is mounted."""
        self.path = path
        self._directory = directory
        self._name = os.path.basename(path)
        self._tree = tree
        self._made = self._mounted = False

    def describe(self) -> str:
        return f"mount device {self.path} in the jail"

    def do(self) -> None:
        directory = self._directory.descriptor
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        journal = self._directory.journal
        try:
            journal.file(directory, self._name)
            os.close(os.open(self._name, flags, 0o600, dir_fd=directory))
            self._made = True
            syscalls.move_mount(self._tree, self._name, directory)
            self._mounted = True
        except OSError as error:
            if not self._made:
                journal.not_made()
            self.undo()
            raise StepError(f"Failed to mount {self.path} inside the jail: {errno_text(error)}") from None
        finally:
            os.close(self._tree)

    def undo(self) -> None:
        if self._mounted:
            syscalls.umount(self.path, syscalls.MNT_DETACH)
        if self._made:
            os.unlink(self._name, dir_fd=self._directory.descriptor)
