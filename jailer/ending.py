"""How the visible process ends where an exit status does not say it: by the signal that it was sent."""

from __future__ import annotations

import os

from base.lean_std import signal
from jailer import cli


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
