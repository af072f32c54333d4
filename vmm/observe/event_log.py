"""State changes as they happen, numbered without gaps; GET /events streams them (docs/formats/events.md).

An event is rendered once, when it happens. The last ones are kept for listeners that come later.
"""

from __future__ import annotations

import time

from base.lean_std import deque
from base.lean_typing import TYPE_CHECKING
from vmm.json.text import json_text

if TYPE_CHECKING:
    from base.lean_typing import Callable
    from vmm.json.text import JsonValue

#: Events that a new listener is told of although it was not there.
HISTORY = 256


class EventLog:
    """Numbers events and passes their lines on; ``EVENTS`` is the one that the controller uses."""

    def __init__(self) -> None:
        #: Number of the last event; the first one has 1.
        self.number = 0
        self._history: deque[bytes] = deque(maxlen=HISTORY)
        self._listeners: list[Callable[[bytes], None]] = []

    def emit(self, event: str, **details: JsonValue) -> None:
        """Report that something has happened. Listeners must neither block nor raise."""
        self.number += 1
        line = event_line(self.number, event, **details)
        self._history.append(line)
        for listener in tuple(self._listeners):
            listener(line)

    def history(self) -> list[bytes]:
        """Return the lines of the last events."""
        return list(self._history)

    def listen(self, listener: Callable[[bytes], None]) -> None:
        """Call ``listener`` with the line of every event from now on."""
        self._listeners.append(listener)

    def leave(self, listener: Callable[[bytes], None]) -> None:
        """Forget a listener."""
        if listener in self._listeners:
            self._listeners.remove(listener)


def event_line(number: int, event: str, **details: JsonValue) -> bytes:
    """Return one event as a line of JSON."""
    record: dict[str, JsonValue] = {"number": number, "utc_timestamp_ms": time.time_ns() // 1_000_000, "event": event}
    return f"{json_text({**record, **details})}\n".encode(errors="backslashreplace")


#: The controller's events.
EVENTS = EventLog()
