"""Armed faults of process 1 of a pid namespace: the kernel ignores what it sends to itself, so its parent sends it.

A stream socket pair between the controller and the supervisor, made only if faults are armed: one byte, the number of
the signal, in one direction; one byte when it was sent in the other, for a process that was stopped and goes on.
"""

from __future__ import annotations

import os

from base.lean_std import signal, socket
from base.lean_typing import Callable

#: What the actions of base.faults send.
_SIGNALS = frozenset((signal.SIGKILL, signal.SIGSTOP))
_SENT = b"\0"


def pair() -> tuple[int, int]:
    """Return the supervisor's and the cell's end. Raises OSError."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def sender(channel: int) -> Callable[[int], None]:
    """Return what sends a signal to the calling cell, and waits until it was sent."""

    def send(number: int) -> None:
        os.write(channel, bytes((number,)))
        os.read(channel, 1)

    return send


def answer(channel: int, pidfd: int) -> bool:
    """In the supervisor: send the signal that a cell asks for; False at the end of the channel."""
    try:
        request = os.read(channel, 1)
        if not request or request[0] not in _SIGNALS:
            return False
        signal.pidfd_send_signal(pidfd, request[0])
        os.write(channel, _SENT)
    except (ProcessLookupError, ConnectionError):
        return False
    return True
