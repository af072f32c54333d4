"""Running a test's event loop until something has happened."""

from __future__ import annotations

import time

from base.event_manager import EventManager

SECOND_NS = 1_000_000_000
PATIENCE_NS = 10 * SECOND_NS


def run_until(events: EventManager, done) -> None:
    """Run the loop until ``done()``, which may itself do what the other side does."""
    deadline = time.monotonic_ns() + PATIENCE_NS
    while not done():
        assert time.monotonic_ns() < deadline, "did not happen"
        events.run(1)


def is_idle(events: EventManager, turns: int = 3) -> bool:
    """Tell whether the loop has nothing to do: a registration that reports for ever would keep it spinning."""
    return [events.run(0) for _ in range(turns)][-1] == 0
