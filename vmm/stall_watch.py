"""Gets the controller's loop out of a call that waits for ever (ipc.shared_event): an interval timer and SIGALRM.

The timer is set anew each second while a machine runs, with the heartbeat of its workers; it costs one system call
then, and none anywhere else. Nothing is concluded from the signal itself, for a host may be busy and a process may be
stopped: it interrupts what waits, and the call that is interrupted knows whether it may have waited. It comes again
until then.
"""

from __future__ import annotations

from base.lean_std import signal

#: How long the loop may stand; then again and again.
STALL_S = 3.0
AGAIN_S = 0.5

_caught = False


def catch() -> None:
    """Catch the signal from now on; to be called by the main thread, before the second filter is installed."""
    global _caught
    signal.signal(signal.SIGALRM, _interrupt)
    _caught = True


def alive() -> None:
    """The loop runs: give it time anew. Without :func:`catch` nothing happens."""
    if _caught:
        signal.setitimer(signal.ITIMER_REAL, STALL_S, AGAIN_S)


def off() -> None:
    """There is no machine any more: an idle process has nothing to wake up for."""
    if _caught:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(_number: int, _frame: object) -> None:
    """Python installs handlers without SA_RESTART: that is all that it takes."""
