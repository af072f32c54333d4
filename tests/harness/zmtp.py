"""ZMTP 3.0 by hand (https://rfc.zeromq.org/spec/23/): what a hostile peer sends that libzmq would not."""

from __future__ import annotations

import contextlib
import socket
import struct

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
GREETING = SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
MORE = 1
LONG = 2
COMMAND = 4


def frame(body: bytes, flags: int = 0) -> bytes:
    """Return one ZMTP frame."""
    if len(body) > 255 or flags & LONG:
        return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body
    return bytes([flags, len(body)]) + body


def command(name: bytes, data: bytes = b"") -> bytes:
    """Return a command frame."""
    return frame(bytes([len(name)]) + name + data, COMMAND)


def ready(socket_type: bytes = b"PAIR") -> bytes:
    """Return the READY command of the NULL mechanism."""
    return command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", len(socket_type)) + socket_type)


def connect(path: str) -> socket.socket:
    """Connect to an ipc endpoint without saying anything."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.connect(path)  # without a time limit: a full backlog is an error at once then
    raw.settimeout(10)
    return raw


def handshake(path: str) -> socket.socket:
    """Connect and do everything that a PAIR peer does before its first message.

    It must wait for the other side's READY: what comes earlier ends the connection.
    """
    raw = connect(path)
    raw.sendall(GREETING + ready())
    answer = bytearray()
    while len(answer) < len(GREETING) + len(ready()):
        received = raw.recv(4096)
        if not received:
            break
        answer += received
    return raw


def send_all_of(raw: socket.socket, data: bytes) -> bool:
    """Send; False if the other side closed the connection."""
    with contextlib.suppress(ConnectionError):
        raw.sendall(data)
        return True
    return False
