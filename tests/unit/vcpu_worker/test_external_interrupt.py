"""The worker's end of INTR: who watches the line, who is asked to ask, and that only one of two workers empties it."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from vcpu_worker.external_interrupt import ExternalInterrupt


class End:
    """A worker's end, with its loop's poll."""

    def __init__(self, eventfd: int) -> None:
        self.poll = select.poll()
        self.risen = 0
        self.line = ExternalInterrupt()
        self.line.watch(self.poll)
        self.line.attach(eventfd, self._rose)

    def _rose(self) -> None:
        self.risen += 1

    def turn(self) -> int:
        """One turn of the loop; returns how often the line has risen, as it knows."""
        for descriptor, _ in self.poll.poll(0):
            assert descriptor == self.line.eventfd
            self.line.read()
        return self.risen


@pytest.fixture
def eventfd() -> Iterator[int]:
    descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def test_a_fresh_worker_waits_to_be_told(eventfd):
    end = End(eventfd)
    end.line.listen(ask=False)
    assert end.turn() == 0
    os.eventfd_write(eventfd, 3)
    assert (end.turn(), end.turn()) == (1, 1)


def test_the_line_goes_from_one_worker_to_the_next_and_back(eventfd):
    """Whoever does not run the vCPU leaves the eventfd alone; whoever begins to asks without having been told."""
    predecessor, successor = End(eventfd), End(eventfd)
    predecessor.line.listen(ask=False)
    predecessor.line.ignore()
    predecessor.line.ignore()
    os.eventfd_write(eventfd, 1)
    predecessor.line.read()  # the loop had seen it before
    assert (predecessor.turn(), successor.turn()) == (0, 0)
    successor.line.listen(ask=True)
    assert successor.risen == 1
    assert successor.turn() == 2
    assert predecessor.turn() == 0
    successor.line.ignore()
    predecessor.line.listen(ask=True)
    predecessor.line.listen(ask=True)
    os.eventfd_write(eventfd, 1)
    assert (predecessor.turn(), successor.turn()) == (3, 2)


def test_a_worker_without_vcpu_0_has_no_line():
    end = End(-1)
    end.line.listen(ask=True)
    end.line.ignore()
    end.line.read()
    assert end.turn() == 0
