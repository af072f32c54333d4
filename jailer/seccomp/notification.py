"""Report mode: read a notification of a forbidden system call. seccomp_unotify(2)."""

from __future__ import annotations

import fcntl
import struct

from base.lean_typing import NamedTuple

#: struct seccomp_notif: id u64, pid u32, flags u32, then struct seccomp_data: nr i32, arch u32,
#: instruction_pointer u64, args u64[6].
_NOTIF = struct.Struct("=QIIiIQ6Q")
assert _NOTIF.size == 80
SECCOMP_IOCTL_NOTIF_RECV = 0xC0502100


class ForbiddenCall(NamedTuple):
    """One system call that the filter stopped; the thread waits in it."""

    thread: int
    number: int
    arguments: tuple[int, ...]


def receive(listener: int) -> ForbiddenCall | None:
    """Return the notification that waits, None if the thread is gone already."""
    buffer = bytearray(_NOTIF.size)
    try:
        fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, buffer)
    except OSError:
        return None
    _, thread, _, number, _, _, *arguments = _NOTIF.unpack(buffer)
    return ForbiddenCall(thread, number, tuple(arguments))


def describe(call: ForbiddenCall) -> str:
    """Say which call it was: ``execveat(5, 0x7f…, …)``."""
    from jailer.seccomp.names import SYSCALL_NAMES

    name = SYSCALL_NAMES.get(call.number, f"system call {call.number}")
    arguments = ", ".join(str(each) if each < 1 << 16 else hex(each) for each in call.arguments)
    return f"forbidden system call {name}({arguments}) in thread {call.thread}"
