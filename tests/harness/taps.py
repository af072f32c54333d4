"""TAP devices of the test's own network namespace, made by ioctl (linux/if_tun.h, netdevice(7)); needs root."""

from __future__ import annotations

import fcntl
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1
_IFREQ = struct.Struct("16sH22x")


@contextmanager
def tap(owner: int) -> Iterator[str]:
    """Make a TAP that this user may attach to, and set it up; return its name, which no other test has."""
    name = f"tap{secrets.token_hex(4)}"
    request = _IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
    # One for each: it belongs to the network namespace that we are in now.
    with open("/dev/net/tun", "rb+", buffering=0) as first, open("/dev/net/tun", "rb+", buffering=0) as last:
        fcntl.ioctl(first, _TUNSETIFF, request)
        fcntl.ioctl(first, _TUNSETOWNER, owner)
        fcntl.ioctl(first, _TUNSETPERSIST, 1)
        first.close()
        try:
            _set_up(name)
            yield name
        finally:
            fcntl.ioctl(last, _TUNSETIFF, request)
            fcntl.ioctl(last, _TUNSETPERSIST, 0)


def _set_up(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = _IFREQ.unpack(fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0)))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(name.encode(), flags | _IFF_UP))


@contextmanager
def listening(name: str, frame_type: int) -> Iterator[socket.socket]:
    """Return a packet socket that receives the frames of this type that come from a TAP."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(frame_type)) as packets:
        packets.bind((name, frame_type))
        packets.settimeout(30)
        yield packets
