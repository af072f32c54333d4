"""One timer of the event loop, for a device that knows nothing of the loop."""

from __future__ import annotations

from base.event_manager import EventOps, Events, Timer
from base.lean_typing import Callable


class HostTimer:
    """Subscriber: ``set`` replaces the only deadline (CLOCK_MONOTONIC ns, None: none), then ``fired`` is called."""

    def __init__(self) -> None:
        self.fired: Callable[[], None] = lambda: None
        self._ops: EventOps | None = None
        self._timer: Timer | None = None
        #: When it is to fire (CLOCK_MONOTONIC); None: not at all.
        self.deadline_ns: int | None = None

    def set(self, deadline_ns: int | None) -> None:
        """Replace the deadline; what is set before the loop knows us begins to count then."""
        self.deadline_ns = deadline_ns
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline_ns is not None and self._ops is not None:
            self._timer = self._ops.add_timer(deadline_ns, self._over)

    def _over(self) -> None:
        self._timer = None
        self.deadline_ns = None
        self.fired()

    def init(self, ops: EventOps) -> None:
        """Subscriber: there may be a deadline already."""
        self._ops = ops
        self.set(self.deadline_ns)

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: it has no descriptor."""
