"""Attacks that take memory until there is no more: of a cell itself, and of the one that reads what it sends."""

from __future__ import annotations

import errno
import os
import select
import struct

from base.lean_typing import Callable
from ipc.drills.calls import Attempt, system_call

_LIMIT = 1 << 30
_SENDTO = 44
_BLOCK = 1 << 20
#: ZMTP 3 (RFC 23): flags of a frame.
_MORE, _LONG = 1, 2


def _exhaust(mebibytes: str) -> str:
    """As a fault of the product would: what it raises in the end is MemoryError, which nobody handles."""
    taken = [bytearray(b"x" * _BLOCK) for _ in range(int(mebibytes))]
    return f"{len(taken)} MiB"


def _flood(part_size: str) -> str:
    """Send parts of one message that never ends on our own control channel, past libzmq."""
    size = int(part_size)
    head = struct.pack(">BQ", _MORE | _LONG, size) if size > 255 else bytes((_MORE, size))
    part = head + bytes(size)
    whole = part * max(1, _BLOCK // len(part))
    channel, sent = _find_stream(whole)
    block = memoryview(whole)
    poll = select.poll()
    poll.register(channel, select.POLLOUT)
    rest = block[sent:]
    while sent < _LIMIT:
        try:
            written = os.write(channel, rest)
        except BlockingIOError:
            poll.poll()
            continue
        sent += written
        rest = rest[written:] or block
    return f"{sent >> 20} MiB"


def _find_stream(block: bytes) -> tuple[int, int]:
    """Send on the stream socket; return its descriptor and how much it took.

    Others take no packet of this size, and what is no socket cannot be sent on.
    """
    for descriptor in range(3, 256):
        try:
            return descriptor, system_call(_SENDTO, descriptor, block, len(block), 0, None, 0)
        except OSError:
            pass
    raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))


ATTEMPTS: dict[str, Attempt] = {}
AIMED: dict[str, Callable[[str], str]] = {"exhaust": _exhaust, "flood": _flood}
