"""Event loops of tests: a subscriber that records, and running until something has happened."""

from __future__ import annotations

import os
import time
from typing import Any

from base.event_manager import IN, EventManager

SECOND = 1_000_000_000
PATIENCE_NS = 10 * SECOND


def run_until(events: EventManager, done) -> None:
    """Run the loop until ``done()``, which may itself do what the other side does."""
    deadline = time.monotonic_ns() + PATIENCE_NS
    while not done():
        assert time.monotonic_ns() < deadline, "did not happen"
        events.run(1)


def is_idle(events: EventManager, turns: int = 3) -> bool:
    """Tell whether the loop has nothing to do: a registration that reports for ever would keep it spinning."""
    return [events.run(0) for _ in range(turns)][-1] == 0


class Recorder:
    """Watches descriptors, records what comes, and may do something on each event."""

    def __init__(self, *fds, event_set=IN, action=None):
        self.fds = fds
        self.event_set = event_set
        self.action = action
        self.seen: list[tuple[int, int, int]] = []
        self.ops: Any = None

    def init(self, ops):
        self.ops = ops
        for number, fd in enumerate(self.fds):
            ops.add(fd, self.event_set, data=number)

    def process(self, events, ops):
        self.seen.append((events.fd, events.data, events.event_set))
        if self.action is not None:
            self.action(events, ops)


def take(events, _ops):
    """Empty an eventfd."""
    os.eventfd_read(events.fd)
