"""Looking at a ring a little longer before sleeping, where that pays.

A device that has emptied its ring can sleep until the next notification, or look at the ring for a while. Looking
saves the notification (an exit of the vCPU), the wake-up of this process and often the sleep of the vCPU; it costs a
processor that nobody else wanted. So: look only after a sleep that turned out short, give up after three looks in vain,
and stay away from it ever longer when that happens again. On a machine without a spare processor this ends within
microseconds.
"""

from __future__ import annotations

from time import monotonic_ns as _clock

from virtio.queue import INDEX, Queue

#: How long a device looks, if nothing else is said (ns).
DEFAULT_LOOK_NS = 50_000
SHORTEST_PAUSE_NS = 10_000_000
LONGEST_PAUSE_NS = 1_000_000_000
TRIES = 3


class AdaptivePolling:
    """When to look at one ring, and for how long: at most ``longest_ns``, 0: never."""

    __slots__ = ("_asleep_since", "_in_vain", "_longest_ns", "_not_before", "_pause_ns", "window_ns")

    def __init__(self, longest_ns: int) -> None:
        self._longest_ns = longest_ns
        #: How long the next look may take; 0: there is none.
        self.window_ns = 0
        self._in_vain = self._not_before = self._asleep_since = 0
        self._pause_ns = SHORTEST_PAUSE_NS

    def woken(self) -> None:
        """A notification has arrived."""
        if self._longest_ns and not self.window_ns:
            now = _clock()
            if now - self._asleep_since < 2 * self._longest_ns and now >= self._not_before:
                self.window_ns = self._longest_ns
                self._in_vain = 0

    def asleep(self) -> None:
        """The device has asked for a notification, and sleeps."""
        if self._longest_ns:
            self._asleep_since = _clock()

    def look(self, queue: Queue) -> bool:
        """Tell whether the driver makes more available soon. The device has not asked for a notification yet."""
        available, index = queue.available, queue.next_available
        end = _clock() + self.window_ns
        while _clock() < end:
            if available[INDEX] != index:
                self._in_vain = 0
                self._pause_ns = SHORTEST_PAUSE_NS
                return True
        self._in_vain += 1
        if self._in_vain == TRIES:
            self.window_ns = 0
            self._not_before = end + self._pause_ns
            self._pause_ns = min(2 * self._pause_ns, LONGEST_PAUSE_NS)
        return False
