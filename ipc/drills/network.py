"""Attacks on the network: TAPs, abstract names and services of the host."""

from __future__ import annotations

import fcntl
import os
import struct

from base.lean_std import socket
from base.lean_typing import Callable

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
#: struct ifreq of linux/if.h: the name, then a union of 24 bytes.
_IFREQ = struct.Struct("16sH22x")
assert _IFREQ.size == 40
_VNET_HEADER_SIZE = 12
#: An Ethernet frame to everybody, of the type that IEEE keeps for experiments.
FRAME_TYPE = 0x88B5
FRAME = b"\xff" * 6 + bytes.fromhex("020000000001") + FRAME_TYPE.to_bytes(2, "big") + b"drill".ljust(46, b"\0")
MESSAGE = b"drill"


def _no_tun() -> int:
    raise OSError(0, "no controller")


#: The controller puts there how it takes a TUN descriptor.
take_tun: Callable[[], int] = _no_tun


def _tap(name: str) -> str:
    """Attach to a TAP as a network device does, and send a frame to the host through it."""
    descriptor = take_tun()
    try:
        request = _IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
        fcntl.ioctl(descriptor, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HEADER_SIZE))
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, 0)
        os.write(descriptor, bytes(_VNET_HEADER_SIZE) + FRAME)
    finally:
        os.close(descriptor)
    return f"a frame to {name}"


def _tun_ioctl(name: str) -> str:
    """Ask a TUN descriptor for something that no device needs."""
    descriptor = take_tun()
    try:
        fcntl.ioctl(descriptor, int(name, 16), struct.pack("i", 1))
    finally:
        os.close(descriptor)
    return f"request {name}"


def _abstract_connect(name: str) -> str:
    """Connect to an abstract name of the host and hand our standard error over."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(f"\0{name}")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 2))]
        connection.sendmsg([MESSAGE], ancillary)
    return f"a descriptor to {name}"


def _abstract_send(name: str) -> str:
    """Send a datagram to an abstract name of the host, without a connection: sendto with an address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.sendto(MESSAGE, f"\0{name}")
    return f"a datagram to {name}"


def _abstract_send_message(name: str) -> str:
    """The same by sendmsg."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.sendmsg([MESSAGE], [], 0, f"\0{name}")
    return f"a message to {name}"


#: What listens at a name that a drill has bound; it stays open.
_listening: list[socket.socket] = []


def _abstract_bind(name: str) -> str:
    """Take an abstract name, for whoever connects to it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen()
    _listening.append(listener)
    return f"the name {name}"


def _tcp(port: str) -> str:
    """Connect to a TCP service of the host."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.connect(("127.0.0.1", int(port)))
        connection.send(MESSAGE)
    return f"a message to port {port}"


#: No attempt without a target: sockets.py has them.
ATTEMPTS: dict[str, Callable[[], str]] = {}
AIMED: dict[str, Callable[[str], str]] = {
    "tap": _tap,
    "tun-ioctl": _tun_ioctl,
    "abstract-connect": _abstract_connect,
    "abstract-send": _abstract_send,
    "abstract-send-message": _abstract_send_message,
    "abstract-bind": _abstract_bind,
    "tcp": _tcp,
}
