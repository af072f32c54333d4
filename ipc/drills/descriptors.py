"""Attacks by way of descriptors that a cell has: their flags, their owners, the terminals and files behind them."""

from __future__ import annotations

import errno
import fcntl
import os

from base.lean_typing import Callable
from ipc.drills.calls import Attempt, call
from ipc.drills.sockets import channel

_FIONCLEX = 0x5450
_FIOASYNC = 0x5452
_FIONREAD = 0x541B
_TIOCSTI, _TIOCSCTTY, _TIOCLINUX, _TIOCCONS, _TIOCSETD, _TIOCNOTTY = 0x5412, 0x540E, 0x541C, 0x541D, 0x5423, 0x5422
_FS_IOC_SETFLAGS = 0x40086602
_F_SETFL, _F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 4, 8, 10, 15
_F_SETLEASE, _F_NOTIFY, _F_SETPIPE_SZ, _F_ADD_SEALS = 1024, 1026, 1031, 1033
_NOT_A_TERMINAL = (errno.ENOTTY,)
_MANY = 5000


def _ioctl() -> str:
    fcntl.ioctl(2, _FIONCLEX)
    return "FIONCLEX"


def _blocking() -> str:
    os.set_blocking(2, True)  # FIONBIO
    return "FIONBIO"


def _file_status() -> str:
    fcntl.fcntl(2, _F_SETFL, 0)
    return "F_SETFL"


def _bomb() -> str:
    """Duplicate a descriptor until that is refused; close what was made."""
    made: list[int] = []
    try:
        while len(made) < _MANY:
            made.append(fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3))
    finally:
        for each in made:
            os.close(each)
    return f"{len(made)} descriptors"


def _read(number: str) -> str:
    """Read from a descriptor that the caller of the jailer may have left open."""
    return repr(os.read(int(number), 60))


def _terminal(what: str) -> str:
    """Do something with a terminal that is standard error: ``read``, ``push`` input, ``control`` or ``flood`` it."""
    if what == "read":
        return _read_any((2, 1, 0))
    if what == "push":
        fcntl.ioctl(2, _TIOCSTI, b"x")
    elif what == "control":
        os.write(2, b"\x1b[2J\x9b1mforged\r\xff\n")
    else:
        for _ in range(1 << 12):
            try:
                os.write(2, b"flood " * 100 + b"\n")
            except BlockingIOError:
                continue
    return what


def _read_any(numbers: tuple[int, ...]) -> str:
    """Read by the first descriptor that has something to be read: a terminal can be read by each of them."""
    refused = OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    for number in numbers:
        try:
            if data := os.read(number, 60):
                return repr(data)
        except OSError as error:
            refused = error
    raise refused


def _memfd() -> int:
    """Return a memfd that this cell has, -1 if it has none: only those have seals."""
    for descriptor in range(3, 128):
        try:
            fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            return descriptor
        except OSError:
            continue
    return -1


ATTEMPTS: dict[str, Attempt] = {
    "ioctl": _ioctl,
    "blocking": _blocking,
    "file-status": _file_status,
    "descriptor-bomb": _bomb,
    "dup2-over-channel": call("dup2", 2, channel),
    "fioasync": call("ioctl", channel, _FIOASYNC, b"\1\0\0\0"),
    "fionread": call("ioctl", channel, _FIONREAD, bytes(4)),
    "f-setown": call("fcntl", channel, _F_SETOWN, os.getpid),
    "f-setsig": call("fcntl", channel, _F_SETSIG, 0),
    "f-setown-ex": call("fcntl", channel, _F_SETOWN_EX, bytes(8)),
    "f-setlease": call("fcntl", channel, _F_SETLEASE, 2, reached=(errno.EINVAL,)),
    "f-notify": call("fcntl", channel, _F_NOTIFY, 0, reached=_NOT_A_TERMINAL),
    "f-setpipe-size": call("fcntl", channel, _F_SETPIPE_SZ, 1 << 20, reached=(errno.EBADF,)),
    "f-add-seals": call("fcntl", _memfd, _F_ADD_SEALS, 0, reached=(errno.EBADF,)),
    "ftruncate-memfd": call("ftruncate", _memfd, 0, reached=(errno.EBADF,)),
    "terminal-insert": call("ioctl", 2, _TIOCSTI, b"x", reached=_NOT_A_TERMINAL),
    "terminal-control": call("ioctl", 2, _TIOCSCTTY, 0, reached=_NOT_A_TERMINAL),
    "terminal-leave": call("ioctl", 2, _TIOCNOTTY, 0, reached=_NOT_A_TERMINAL),
    "terminal-linux": call("ioctl", 2, _TIOCLINUX, b"\x0b", reached=_NOT_A_TERMINAL),
    "terminal-console": call("ioctl", 2, _TIOCCONS, 0, reached=_NOT_A_TERMINAL),
    "terminal-discipline": call("ioctl", 2, _TIOCSETD, bytes(4), reached=_NOT_A_TERMINAL),
    "file-flags": call("ioctl", 2, _FS_IOC_SETFLAGS, bytes(8), reached=_NOT_A_TERMINAL),
    "close-range": call("close_range", 200, 210, 0),
}
AIMED: dict[str, Callable[[str], str]] = {"read-descriptor": _read, "terminal": _terminal}
