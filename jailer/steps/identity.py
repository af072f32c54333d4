"""Who a cell is: user, group, capabilities, no_new_privs, death signal, dumpability. prctl(2), capabilities(7)."""

from __future__ import annotations

import errno
import os
import resource
import select

import _prctl

from base.lean_std import signal
from jailer import syscalls
from jailer.errors import CellError

_MAX_CAPABILITIES = 64


def clear_bounding_set() -> None:
    """Empty the capability bounding set, while CAP_SETPCAP is still there. Raises OSError.

    Not by python-prctl: it refuses capabilities that are newer than the headers it was built with.
    """
    for capability in range(_MAX_CAPABILITIES):
        try:
            syscalls.drop_from_bounding_set(capability)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return  # one more than the kernel's last capability
            raise


def become(uid: int, gid: int, *, keep_groups: bool = False) -> None:
    """Set every user and group id and drop the supplementary groups, unless they cannot be. Raises OSError."""
    if not keep_groups:
        os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


#: CAP_DAC_OVERRIDE: what an un-jailed controller keeps of root's capabilities. Who starts Firecracker as root may name
#: kernels, drives and sockets of any owner. Nothing else that it does on the host takes one (docs/threat-model.md).
UNJAILED_CAPABILITIES = 1 << 1


#: What the supervisor keeps over its cells alone, in the user namespace of their users (jailer.steps.user_namespace),
#: to make them those users, to signal them and to read their walls: CAP_DAC_READ_SEARCH (their directories in /proc),
#: CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_PTRACE.
SUPERVISOR_CAPABILITIES = 1 << 2 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 19


def keep_capabilities(mask: int) -> None:
    """Make effective and permitted sets equal to ``mask``, a part of the permitted one, and the others empty.

    Raises OSError.
    """
    syscalls.capabilities_set(mask)


def clear_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets, and thereby the ambient set. Raises OSError."""
    syscalls.capabilities_set(0)


def set_no_new_privileges() -> None:
    """PR_SET_NO_NEW_PRIVS: for good, inherited by every child. Raises OSError."""
    _prctl.prctl(_prctl.PR_SET_NO_NEW_PRIVS, 1)


def die_with(life_line: int) -> None:
    """Be killed when the parent ends, and notice if it ended before. Raises CellError.

    ``life_line`` is our end of a socket pair whose other end the parent alone holds: getppid(2) says 0 for a parent
    outside our pid namespace, dead or alive. The kernel forgets the death signal when credentials change, hence this
    comes after everything else.
    """
    _prctl.prctl(_prctl.PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(life_line, 0)  # a hang-up is always told
    if poll.poll(0):
        raise CellError("the supervisor ended while the cell was being made")


def set_dumpable(dumpable: bool) -> None:
    """Allow or forbid tracing by the same user and core files. Raises OSError."""
    _prctl.prctl(_prctl.PR_SET_DUMPABLE, int(dumpable))


def forbid_core_files() -> None:
    """RLIMIT_CORE 0. Raises OSError."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def forbid_processes() -> None:
    """RLIMIT_NPROC 0: no process and no thread can be made any more by this user's processes with this limit.

    The kernel exempts user 0 and whoever has CAP_SYS_RESOURCE or CAP_SYS_ADMIN.
    """
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def set_name(name: str) -> None:
    """Set the name that ps shows (15 bytes)."""
    _prctl.prctl(_prctl.PR_SET_NAME, name[:15])
