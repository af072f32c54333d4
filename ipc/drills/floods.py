"""Attacks that take memory until there is no more: of a cell itself, and of the one that reads what it sends."""

from __future__ import annotations

import errno
import gc
import os
import select
import struct

from base.lean_typing import Callable
from ipc import exit_ring
from ipc.drills.calls import Attempt, system_call

_LIMIT = 1 << 30
_SENDTO = 44
_SERIAL_STATUS = 0x3FD
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


def _block(what: str) -> str:
    """Fill eventfds that the controller writes to and make them blocking; ``ring``: and have it write to one."""
    if what == "ring":
        producers = [each for each in gc.get_objects() if type(each).__name__ == "ExitRingProducer"]
        for producer in producers:
            _fill(producer._completion)
            producer.words[exit_ring.WORD_WAITING] = producer._sequence + 1
            producer._publish(exit_ring.KIND_PIO_READ, _SERIAL_STATUS, 1, 0, exit_ring.FLAG_SYNCHRONOUS, 1, 0)
        return f"{len(producers)} rings"
    lines = next(each._interrupts for each in gc.get_objects() if type(each).__name__ == "Machine")
    for eventfd in lines.values():
        _fill(eventfd)
    return f"{len(lines)} interrupts"


def _fill(eventfd: int) -> None:
    os.set_blocking(eventfd, False)
    try:
        os.eventfd_write(eventfd, (1 << 64) - 2)
    except BlockingIOError:
        os.eventfd_read(eventfd)
        os.eventfd_write(eventfd, (1 << 64) - 2)
    os.set_blocking(eventfd, True)


ATTEMPTS: dict[str, Attempt] = {}
AIMED: dict[str, Callable[[str], str]] = {"exhaust": _exhaust, "flood": _flood, "block-events": _block}
