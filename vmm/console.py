"""The guest's serial console on the host: output that never blocks the guest, input that waits for room.

Output goes to standard output, a file or a pseudo-terminal. What cannot be written at once is kept up to a bound;
beyond it bytes are lost and counted, as is what a token bucket refuses.
"""

from __future__ import annotations

import os
import select
import termios
import time
import tty
from collections.abc import Callable

from vmm.devices.serial import Serial
from vmm.event_manager import EventManagerError, EventOps, Events

#: Output kept for a reader that is slow.
MAX_PENDING_OUTPUT = 256 << 10
READ_SIZE = 4096


class TokenBucket:
    """``size`` tokens, refilled over ``refill_time`` ms; a size or time of 0 means no limit. Never blocks."""

    def __init__(self, size: int, refill_time: int, one_time_burst: int, now_ns: Callable[[], int]) -> None:
        self._size = size
        self._refill_time_ns = refill_time * 1_000_000
        self._burst = one_time_burst
        self._budget = size
        self._now_ns = now_ns
        self._last = now_ns()

    def take(self, tokens: int) -> bool:
        """Take ``tokens`` if they are there."""
        if not self._size or not self._refill_time_ns:
            return True
        if self._burst >= tokens:
            self._burst -= tokens
            return True
        now = self._now_ns()
        gained = (now - self._last) * self._size // self._refill_time_ns
        if gained:
            self._budget = min(self._size, self._budget + gained)
            self._last = now
        if self._budget < tokens:
            return False
        self._budget -= tokens
        return True


class ConsoleOutput:
    """Collects transmitted bytes; :meth:`flush` writes them. The descriptor is switched to non-blocking mode.

    If the descriptor is shared with other processes (standard output), that mode is restored on close.
    """

    def __init__(self, descriptor: int, *, owned: bool, bucket: TokenBucket | None = None) -> None:
        self._descriptor = descriptor
        self._owned = owned
        self._bucket = bucket
        self._pending = bytearray()
        self._was_blocking = os.get_blocking(descriptor)
        self._ops: EventOps | None = None
        self._registered = False
        self.flush_count = 0
        self.lost_bytes = 0
        self.rate_limiter_dropped_bytes = 0
        os.set_blocking(descriptor, False)

    def transmit(self, byte: int) -> None:
        """Take one byte of the guest."""
        if self._bucket is not None and not self._bucket.take(1):
            self.rate_limiter_dropped_bytes += 1
        elif len(self._pending) >= MAX_PENDING_OUTPUT:
            self.lost_bytes += 1
        else:
            self._pending.append(byte)

    def flush(self) -> None:
        """Write what is there; what the reader does not take stays for later."""
        while self._pending:
            try:
                written = os.write(self._descriptor, self._pending)
            except BlockingIOError:
                break
            except OSError:
                # The reader is gone or the file is full: the guest must not notice.
                self.lost_bytes += len(self._pending)
                self._pending.clear()
                break
            del self._pending[:written]
            self.flush_count += 1
        self._watch(bool(self._pending))

    def _watch(self, wanted: bool) -> None:
        if self._ops is None or wanted == self._registered:
            return
        try:
            if wanted:
                self._ops.add(self._descriptor, select.EPOLLOUT)
            else:
                self._ops.remove(self._descriptor)
        except EventManagerError:
            return  # a regular file: always writable, cannot be polled
        self._registered = wanted

    def init(self, ops: EventOps) -> None:
        """Subscriber: remember the event loop; the descriptor is watched only while output waits."""
        self._ops = ops

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: the reader has room again."""
        self.flush()

    def close(self) -> None:
        """Write what can still be written at once, restore the descriptor's mode."""
        self.flush()
        self._watch(False)
        self._ops = None
        if self._owned:
            os.close(self._descriptor)
        elif self._was_blocking:
            os.set_blocking(self._descriptor, True)


class ConsoleInput:
    """Reads a descriptor into the UART while the UART has room; end of file ends the input quietly."""

    def __init__(self, descriptor: int, serial: Serial) -> None:
        self._descriptor = descriptor
        self._serial = serial
        self._pending = b""
        self._ops: EventOps | None = None
        self._watching = False
        self._was_blocking = os.get_blocking(descriptor)
        self._terminal: list[object] | None = None
        serial.on_room = self._room

    def set_raw(self) -> None:
        """Put a terminal into raw mode (kept for :meth:`close`); does nothing for other descriptors."""
        if not os.isatty(self._descriptor):
            return
        try:
            self._terminal = termios.tcgetattr(self._descriptor)
            tty.setraw(self._descriptor, termios.TCSANOW)
        except termios.error:
            self._terminal = None  # a background process may not touch its terminal

    def init(self, ops: EventOps) -> None:
        """Subscriber: start to watch. A regular file or /dev/null cannot be polled and is no input."""
        self._ops = ops
        try:
            os.set_blocking(self._descriptor, False)
            ops.add(self._descriptor, select.EPOLLIN)
            self._watching = True
        except (OSError, EventManagerError):
            self._watching = False

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: input came, or its other end was closed."""
        try:
            data = os.read(self._descriptor, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            ops.remove(self._descriptor)
            self._watching = False
            self._ops = None
            return
        self._pending += data
        self._feed()

    def _room(self) -> None:
        self._feed()

    def _feed(self) -> None:
        room = self._serial.room()
        if self._pending and room:
            part, self._pending = self._pending[:room], self._pending[room:]
            self._serial.receive(part)
        if self._ops is None:
            return
        if self._pending and self._watching:
            self._ops.remove(self._descriptor)
            self._watching = False
        elif not self._pending and not self._watching:
            self._ops.add(self._descriptor, select.EPOLLIN)
            self._watching = True

    def close(self) -> None:
        """Restore the terminal and the descriptor's mode."""
        if self._terminal is not None:
            termios.tcsetattr(self._descriptor, termios.TCSANOW, self._terminal)  # type: ignore[arg-type]
            self._terminal = None
        if self._was_blocking:
            try:
                os.set_blocking(self._descriptor, True)
            except OSError:
                pass


def monotonic_bucket(size: int, refill_time: int, one_time_burst: int | None) -> TokenBucket:
    """Return a token bucket on CLOCK_MONOTONIC."""
    return TokenBucket(size, refill_time, one_time_burst or 0, time.monotonic_ns)
