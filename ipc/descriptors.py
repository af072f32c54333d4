"""Descriptors over an inherited AF_UNIX SEQPACKET channel (SCM_RIGHTS), with an owner for every descriptor.

Descriptors flow downwards (supervisor → controller → worker). A receiver that expects none receives without room
for them; what a peer sends all the same is dropped by the kernel and the message is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from base.errno_text import errno_text
from base.lean_std import socket
from base.lean_typing import Sequence
from ipc.errors import DescriptorError
from ipc.schema import MAX_FRAME_SIZE

#: SCM_MAX_FD of the kernel is 253; no message of ours needs more than a few.
MAX_DESCRIPTORS = 64
ADVICE = "raise the limit on open files (--resource-limit no-file, RLIMIT_NOFILE)"
_INT_SIZE = struct.calcsize("i")


class OwnedDescriptors:
    """Received descriptors. What is not taken is closed with the set."""

    def __init__(self, descriptors: Sequence[int] = ()) -> None:
        self._descriptors: list[int] = list(descriptors)

    def __len__(self) -> int:
        return len(self._descriptors)

    def take(self) -> int:
        """Hand the next descriptor over to the caller. Raises DescriptorError when there is none left."""
        if not self._descriptors:
            raise DescriptorError("fewer descriptors came than were announced")
        return self._descriptors.pop(0)

    def close(self) -> None:
        """Close what nobody took."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> OwnedDescriptors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new SEQPACKET channel (close-on-exec)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, frame: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one message with descriptors; they stay open here. Raises DescriptorError."""
    assert len(descriptors) <= MAX_DESCRIPTORS
    assert frame, "an empty frame would read as the end of the channel"
    ancillary = []
    if descriptors:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(descriptors)}i", *descriptors))]
    try:
        channel.sendmsg([frame], ancillary, socket.MSG_NOSIGNAL)
    except OSError as error:
        raise DescriptorError(f"cannot send on the descriptor channel: {errno_text(error)}") from None


def receive(
    channel: socket.socket, maximum: int = 0, flags: int = 0, *, maximum_size: int = MAX_FRAME_SIZE
) -> tuple[bytes, OwnedDescriptors]:
    """Receive one message of at most ``maximum_size`` bytes with at most ``maximum`` descriptors.

    An empty frame means that the peer closed the channel. BlockingIOError passes through on a non-blocking channel.
    Raises DescriptorError if the message was cut or brought descriptors that were not expected.
    """
    room = socket.CMSG_SPACE(maximum * _INT_SIZE) if maximum else 0
    flags |= socket.MSG_CMSG_CLOEXEC
    try:
        try:
            frame, ancillary, received_flags, _ = channel.recvmsg(maximum_size, room, flags)
        except ConnectionResetError:
            # The peer ended and left something unread. The kernel says so once, ahead of what the peer has sent.
            frame, ancillary, received_flags, _ = channel.recvmsg(maximum_size, room, flags)
    except (BlockingIOError, InterruptedError):
        raise
    except ConnectionResetError:
        return b"", OwnedDescriptors()
    except OSError as error:
        raise DescriptorError(f"cannot receive on the descriptor channel: {errno_text(error)}") from None
    numbers: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers += struct.unpack_from(f"{len(data) // _INT_SIZE}i", data)
    owned = OwnedDescriptors(numbers)
    if len(owned) > maximum:  # CMSG_SPACE rounds up: the kernel fills the room for one with two
        owned.close()
        raise DescriptorError(f"message brought {len(numbers)} descriptors, at most {maximum} are expected")
    if received_flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        if maximum and _no_room(channel):
            owned.close()
            raise DescriptorError(f"no descriptor can be received: {errno_text(errno.EMFILE)}: {ADVICE}")
        owned.close()
        raise DescriptorError("message was cut: too long, or descriptors that nobody expects")
    return frame, owned


def _no_room(channel: socket.socket) -> bool:
    """Tell whether this process may have no more descriptors: then the kernel drops what a message brings."""
    try:
        os.close(fcntl.fcntl(channel.fileno(), fcntl.F_DUPFD_CLOEXEC, 0))
    except OSError:
        return True
    return False
