"""Armed faults of process 1 of a pid namespace: the signals that it has its parent send."""

from __future__ import annotations

import os
import signal

import pytest

from jailer import fault_signals
from tests.harness.processes import Child


def test_a_process_that_is_stopped_goes_on_when_it_is_continued() -> None:
    ours, theirs = fault_signals.pair()
    with Child(lambda: fault_signals.sender(theirs)(signal.SIGSTOP)) as child:
        pidfd = os.pidfd_open(child.pid)
        assert fault_signals.answer(ours, pidfd)
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        child.kill(signal.SIGCONT)
        assert child.join() is None
        os.close(theirs)
        assert not fault_signals.answer(ours, pidfd)  # the end of the channel
        os.close(pidfd)
    os.close(ours)


def test_a_process_is_killed() -> None:
    ours, theirs = fault_signals.pair()
    with Child(lambda: fault_signals.sender(theirs)(signal.SIGKILL)) as child:
        pidfd = os.pidfd_open(child.pid)
        assert fault_signals.answer(ours, pidfd)
        assert child.wait() == -signal.SIGKILL
        os.write(theirs, bytes((signal.SIGKILL,)))
        assert not fault_signals.answer(ours, pidfd)  # it is gone
        os.close(pidfd)
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("number", [0, signal.SIGTERM, 255])
def test_no_other_signal_is_sent(number: int) -> None:
    ours, theirs = fault_signals.pair()
    os.write(theirs, bytes((number,)))
    pidfd = os.pidfd_open(os.getpid())
    assert not fault_signals.answer(ours, pidfd)
    for descriptor in (ours, theirs, pidfd):
        os.close(descriptor)
