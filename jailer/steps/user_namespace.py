"""A user namespace for the users of workers and device cells, one for each (docs/adr/uid-per-cell.md).

Its map names those users and the controller's, as they are outside. The supervisor enters it, and what it keeps of
capabilities there is worth nothing beyond: it makes cells these users and no others, and may signal and look at them.
It belongs to user 0, who made it, or the user of the controller would have every capability in it. user_namespaces(7)
"""

from __future__ import annotations

import errno
import os

from base import threads
from base.errno_text import errno_text
from base.lean_std import signal
from base.lean_typing import NamedTuple
from ipc.launch_plan import CELL_UIDS
from jailer import syscalls, walls
from jailer.errors import StepError
from jailer.operations import Step
from jailer.steps import identity

#: Users that nobody else gives away: above systemd's containers (to 0x6fffffff) and the ids that SSSD and FreeIPA make
#: of those of a directory (to 2000200000), below systemd's foreign ids (from 0x7ffe0000).
FIRST_UID, END_UID = 0x78000000, 0x7FFE0000
#: From here on the kernel numbers namespaces, each by the lowest number that is free: PROC_DYNAMIC_FIRST in its
#: fs/proc/generic.c.
_FIRST_NAMESPACE = 0xF0000000
#: CAP_SETGID and CAP_SETUID to write the maps, CAP_SYS_ADMIN to enter.
_NEEDED = 1 << 6 | 1 << 7 | 1 << 21
_MAX_NAMESPACES = "/proc/sys/user/max_user_namespaces"


class UserNamespace(NamedTuple):
    """A namespace that nobody is in yet, or (descriptor -1) why there is none. ``first_uid`` as in the launch plan."""

    descriptor: int = -1
    first_uid: int = 0
    unavailable: str = ""

    def unavailable_walls(self) -> tuple[tuple[str, str], ...]:
        """Return the wall that is missing without it, and why."""
        return ((walls.CELL_IDENTITY, self.unavailable),) if self.unavailable else ()


def make(uid: int, gid: int, first_uid: int, capabilities: int) -> UserNamespace:
    """Make the namespace. ``uid`` and ``gid`` are the controller's, ``first_uid`` is 0 if the launch is to choose.

    A launch without a choice does without where the kernel or who starts us cannot have one. ``capabilities`` is our
    permitted set. Raises StepError.
    """
    if capabilities & _NEEDED != _NEEDED:
        return _without("CAP_SETUID, CAP_SETGID and CAP_SYS_ADMIN on the host are needed", first_uid)
    try:
        pid, stack = syscalls.clone_waiting(syscalls.CLONE_NEWUSER)
    except OSError as error:
        text = f"no user namespace can be made: {errno_text(error)}"
        if _is_absent(error.errno or 0):
            return _without(text, first_uid)
        raise StepError(f"Failed to unshare into new user namespace: {threads.explain(error)}") from None
    descriptor = -1
    try:
        descriptor = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        first = first_uid or _choose(os.fstat(descriptor).st_ino)
        if first <= uid < first + CELL_UIDS or first <= gid < first + CELL_UIDS:
            raise StepError(f"users {first} to {first + CELL_UIDS - 1} are those of the cells: --uid or --gid is one")
        _map(pid, "gid_map", first, gid)
        _map(pid, "uid_map", first, uid)
    except OSError as error:
        _close(descriptor)
        return _without(f"users cannot be mapped: {errno_text(error)}", first_uid)
    except StepError:
        _close(descriptor)
        raise
    finally:
        with Step("end the process that made the user namespace"):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        del stack
    return UserNamespace(descriptor, first)


def _choose(namespace: int) -> int:
    """Return the first user of a namespace by its number, which no other has on this kernel as long as it lives.

    It lives as long as a process is in it: no two microVMs share a user, whatever pid namespaces they were started in.
    """
    first = FIRST_UID + (namespace - _FIRST_NAMESPACE) * CELL_UIDS
    if not FIRST_UID <= first <= END_UID - CELL_UIDS:
        raise StepError(f"no users are left for the cells of user namespace {namespace}: name some by --cell-uids")
    return first


def _map(pid: int, name: str, first: int, own: int) -> None:
    descriptor = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, f"{first} {first} {CELL_UIDS}\n{own} {own} 1\n".encode())
    finally:
        os.close(descriptor)


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _is_absent(number: int) -> bool:
    """Is this error the host's decision that there are no user namespaces, rather than a lack of something?"""
    if number == errno.ENOSPC:
        try:
            with open(_MAX_NAMESPACES, encoding="ascii") as file:
                return file.read().strip() == "0"
        except OSError:
            return False
    return number in (errno.EINVAL, errno.EPERM)


def _without(reason: str, asked_for: int) -> UserNamespace:
    if asked_for:
        raise StepError(f"--cell-uids {asked_for}: {reason}")
    return UserNamespace(unavailable=reason)


def enter(namespace: UserNamespace, *, bounded: bool) -> None:
    """Enter it with every capability in it, for good, and close the descriptor. Raises OSError.

    ``bounded``: nobody gets a capability by executing a program; the kernel has filled the bounding set again.
    """
    syscalls.setns(namespace.descriptor, syscalls.CLONE_NEWUSER)
    os.close(namespace.descriptor)
    if bounded:
        identity.clear_bounding_set()
