"""Attacks on other processes by descriptors of them: pidfd_open(2), and SO_PEERPIDFD of a socket pair."""

from __future__ import annotations

import errno
import os
import signal
import struct

from base.lean_std import socket
from base.lean_typing import Callable
from ipc.drills import targets
from ipc.drills.calls import Attempt, refuse

#: Linux 6.5.
_SO_PEERPIDFD = 77
_UCRED = struct.Struct("=iII")
assert _UCRED.size == 12  # struct ucred: pid, uid, gid
_MAX_DESCRIPTORS = 128


def _kill_by_pidfd(target: str) -> str:
    """End a process by a descriptor that its number gives."""
    pid = targets.named(target)
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return f"signal {int(signal.SIGKILL)} to process {pid}"


def _kill_peer(target: str) -> str:
    """End the process that made one of our socket pairs: our channels are those of the supervisor."""
    maker = targets.named(target)
    for descriptor in range(3, _MAX_DESCRIPTORS):
        pidfd = _maker(descriptor, maker)
        if pidfd >= 0:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return f"signal {int(signal.SIGKILL)} to the maker of descriptor {descriptor}"
    raise refuse(errno.ENOTSOCK)


def _maker(descriptor: int, wanted: int) -> int:
    """Return a pidfd of the process that made a socket pair, -1 if it is not the wanted one.

    Its number is 0 to whoever is in a pid namespace below it.
    """
    try:
        pair = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return -1  # not open, or no socket
    with pair:
        if pair.family != socket.AF_UNIX or pair.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return -1
        pid, _, _ = _UCRED.unpack(pair.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if pid not in (0, wanted):
            return -1
        return pair.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)


ATTEMPTS: dict[str, Attempt] = {}
AIMED: dict[str, Callable[[str], str]] = {"pidfd-kill": _kill_by_pidfd, "peer-kill": _kill_peer}
