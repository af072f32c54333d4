"""An eventfd that another process has made blocking and full: the write to it ends when a signal comes, and says so."""

from __future__ import annotations

import os
import signal

import pytest

from ipc.errors import BlockedEventError
from ipc.shared_event import raise_event
from vmm import stall_watch

_FULL = (1 << 64) - 2


def test_it_adds_one_and_a_full_counter_is_signalled_already() -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    raise_event(event)
    raise_event(event)
    assert os.eventfd_read(event) == 2
    os.eventfd_write(event, _FULL)
    raise_event(event)
    assert os.eventfd_read(event) == _FULL
    os.close(event)


def _blocked() -> int:
    """In a child, whose timer and signals nobody else has: write to an eventfd that is full and blocks."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        stall_watch.STALL_S = stall_watch.AGAIN_S = 0.01
        stall_watch.catch()
        stall_watch.alive()
        event = os.eventfd(0)
        os.eventfd_write(event, _FULL)
        with pytest.raises(BlockedEventError, match="made an eventfd blocking"):
            raise_event(event)
        stall_watch.off()
        status = 0 if signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) else 2
    finally:
        os._exit(status)


def test_a_write_that_waits_is_interrupted() -> None:
    assert _blocked() == 0


def test_without_a_handler_no_timer_runs() -> None:
    before = signal.getitimer(signal.ITIMER_REAL)[1]
    stall_watch.alive()
    stall_watch.off()
    assert signal.getitimer(signal.ITIMER_REAL)[1] == before
