"""Attacks by way of sockets: families that a cell has no use for, names of others, options of its own channels."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

from base.lean_std import socket
from base.lean_typing import Callable
from ipc.drills.calls import NUMBERS, Attempt, buffer, call, refuse, system_call

_STREAM, _DGRAM, _RAW, _SEQPACKET = 1, 2, 3, 5
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_PACKET = 1, 2, 10, 16, 17
_AF_ALG, _AF_VSOCK, _AF_XDP, _AF_BLUETOOTH, _AF_KEY = 38, 40, 44, 31, 15
_SOL_SOCKET = 1
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_MAX_DESCRIPTORS = 128
_INET_ADDRESS = struct.pack("=HH4s8x", _AF_INET, 0x5000, b"\x7f\0\0\1")


def _socket() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        return f"descriptor {connection.fileno()}"


def channel() -> int:
    """Return a socket that this cell has, -1 if it has none."""
    for descriptor in range(3, _MAX_DESCRIPTORS):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return descriptor
        except OSError:
            continue
    return -1


def _socketpair() -> str:
    made = (ctypes.c_int * 2)()
    system_call(NUMBERS["socketpair"], _AF_UNIX, _STREAM, 0, ctypes.cast(made, ctypes.POINTER(ctypes.c_char * 8))[0])
    return f"descriptors {made[0]} and {made[1]}"


def _inet_connect() -> str:
    made = system_call(NUMBERS["socket"], _AF_INET, _STREAM | 0x800, 0)
    try:
        system_call(NUMBERS["connect"], made, _INET_ADDRESS, len(_INET_ADDRESS))
    finally:
        os.close(made)
    return "127.0.0.1:80"


def _peer() -> str:
    """What the kernel tells of whoever is at the other end of a channel."""
    if (descriptor := channel()) < 0:
        raise refuse(errno.ENOTSOCK)
    size = buffer(struct.pack("=I", 12))
    system_call(NUMBERS["getsockopt"], descriptor, _SOL_SOCKET, 17, buffer(b"", 12), size)
    return "SO_PEERCRED"


def _opens(family: int, kind: int, protocol: int = 0) -> Attempt:
    return call("socket", family, kind, protocol)


ATTEMPTS: dict[str, Attempt] = {
    "socket": _socket,
    "socket-inet-stream": _opens(_AF_INET, _STREAM),
    "socket-inet6": _opens(_AF_INET6, _DGRAM),
    "socket-raw": _opens(_AF_INET, _RAW, 1),
    "socket-packet": _opens(_AF_PACKET, _RAW),
    "socket-netlink-route": _opens(_AF_NETLINK, _RAW, 0),
    "socket-netlink-diag": _opens(_AF_NETLINK, _DGRAM, 4),
    "socket-netlink-audit": _opens(_AF_NETLINK, _RAW, 9),
    "socket-vsock": _opens(_AF_VSOCK, _STREAM),
    "socket-alg": _opens(_AF_ALG, _SEQPACKET),
    "socket-xdp": _opens(_AF_XDP, _RAW),
    "socket-bluetooth": _opens(_AF_BLUETOOTH, _RAW),
    "socket-key": _opens(_AF_KEY, _RAW, 2),
    "socketpair": _socketpair,
    "connect-inet": _inet_connect,
    "peer-credentials": _peer,
    "attach-filter": call(
        "setsockopt", channel, _SOL_SOCKET, _SO_ATTACH_FILTER, bytes(16), 16, reached=(errno.EINVAL, errno.EFAULT)
    ),
    "receive-buffer-force": call("setsockopt", channel, _SOL_SOCKET, _SO_RCVBUFFORCE, struct.pack("=i", 1 << 24), 4),
}
AIMED: dict[str, Callable[[str], str]] = {}
