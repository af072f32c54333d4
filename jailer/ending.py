"""How the microVM ends: what its exit code will be, how long its controller has for it, and by what signal it dies."""

from __future__ import annotations

import os
import time

from base.lean_std import signal
from jailer import cli


class Ending:
    """What is known of the microVM's end so far. Its parts are decided once, by whoever knows first."""

    __slots__ = ("deadline", "dies_by", "ended", "exit_code")

    def __init__(self) -> None:
        self.exit_code: int | None = None
        #: The signal that the visible process has to die by, 0 if its exit code says how the microVM ended.
        self.dies_by = 0
        #: Until when the controller has to have ended in order; 0 if it does not have to end.
        self.deadline = 0.0
        #: The controller has ended.
        self.ended = False

    def expect_within(self, seconds: float) -> None:
        """The controller is to end in order within this time, unless it has less already."""
        if not self.deadline:
            self.deadline = time.monotonic() + seconds


def die_by(number: int) -> None:
    """End this process by a signal, as if it had never been held back; returns if the kernel does not let it.

    It does not let process 1 of a process namespace: signals that it sends to itself do nothing there by default.
    By pidfd, since the supervisor's filter allows no other way.
    """
    pidfd = os.pidfd_open(os.getpid())
    signal.signal(number, signal.SIG_DFL)
    signal.pidfd_send_signal(pidfd, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    os.close(pidfd)


def end_interrupted() -> int:
    """Ctrl-C before there was anything to end in order: die by SIGINT; return an exit status where that cannot be."""
    cli.print_error("interrupted")
    die_by(signal.SIGINT)
    return 128 + int(signal.SIGINT)
