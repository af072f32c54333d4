"""The guest's serial console on the host: output that never blocks the guest, input that waits for room.

Output goes to standard output, a file or a pseudo-terminal. What cannot be written at once is kept up to a bound;
beyond it bytes are lost and counted, as is what a token bucket refuses.
"""

from __future__ import annotations

import os
import select
import termios
import time

from base.event_manager import EventManagerError, EventOps, Events, Timer
from base.token_bucket import TokenBucket
from vmm.devices.legacy.serial import Serial

#: Output kept for a reader that is slow.
MAX_PENDING_OUTPUT = 256 << 10
READ_SIZE = 4096
#: How long the end waits for a slow reader to take what is left.
CLOSE_GRACE_NS = 200_000_000
#: How often a hung-up terminal is tried again: its other side may be opened once more.
RETRY_NS = 250_000_000
#: How long input waits after the guest has reset its receiver (it is probing the UART).
SETTLE_NS = 100_000_000

#: Device number of the master side of every pseudo-terminal (/dev/ptmx).
_PSEUDO_TERMINAL_MASTER = os.makedev(5, 2)


#: How much of what was written is kept, for the report of a failure.
_KEPT_OUTPUT = 4096


class ConsoleOutput:
    """Collects transmitted bytes; :meth:`flush` writes them. The descriptor is switched to non-blocking mode.

    If the descriptor is shared with other processes (standard output), that mode is restored on close.
    """

    def __init__(self, descriptor: int, *, owned: bool, bucket: TokenBucket | None = None) -> None:
        self._descriptor = descriptor
        self._owned = owned
        self._bucket = bucket
        self._pending = bytearray()
        self._written = b""
        self._was_blocking = os.get_blocking(descriptor)
        self._ops: EventOps | None = None
        self._registered = False
        self._retry: Timer | None = None
        self.flush_count = 0
        self.lost_bytes = 0
        self.rate_limiter_dropped_bytes = 0
        os.set_blocking(descriptor, False)

    def tail(self, length: int) -> bytes:
        """Return the last bytes (at most ``length``, and at most 4096) that the guest has sent."""
        return (self._written + self._pending)[-length:]

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
        if self._pending:
            self._write()
        self._watch(bool(self._pending) and self._retry is None)

    def _write(self) -> None:
        while self._pending:
            try:
                written = os.write(self._descriptor, self._pending)
            except BlockingIOError:
                break
            except OSError:
                # The reader is gone or the file is full: the guest must not notice.
                self._lose_pending()
                break
            self._written = (self._written + self._pending[:written])[-_KEPT_OUTPUT:]
            del self._pending[:written]
            self.flush_count += 1

    def _lose_pending(self) -> None:
        self.lost_bytes += len(self._pending)
        self._pending.clear()

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
        """Subscriber: the reader has room again, or hung up."""
        before = len(self._pending)
        self.flush()
        if self._pending and len(self._pending) == before and events.event_set & (select.EPOLLHUP | select.EPOLLERR):
            # A pseudo-terminal that nobody holds open takes nothing, and epoll would report its hang-up for ever.
            self._retry = ops.add_timer(time.monotonic_ns() + RETRY_NS, self._try_again)
            self._watch(False)

    def _try_again(self) -> None:
        self._retry = None
        self.flush()

    def close(self) -> None:
        """Give the reader a moment to take what is left, restore the descriptor's mode."""
        self._watch(False)
        self._ops = None
        self._write()
        self._wait_for_reader()
        self._lose_pending()
        if self._owned:
            os.close(self._descriptor)
        elif self._was_blocking:
            os.set_blocking(self._descriptor, True)

    def _wait_for_reader(self) -> None:
        deadline = time.monotonic_ns() + CLOSE_GRACE_NS
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while self._pending and (left := deadline - time.monotonic_ns()) > 0:
            if any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(left / 1_000_000)):
                break
            self._write()


class ConsoleInput:
    """Reads a descriptor into the UART while the UART has room; end of file ends the input quietly.

    What the guest throws away when it sets its receiver up is fed again later, so nothing typed ahead is lost.
    """

    def __init__(self, descriptor: int, serial: Serial) -> None:
        self._descriptor = descriptor
        self._serial = serial
        #: Input for which the UART has no room; nothing is read meanwhile. At most READ_SIZE and a FIFO.
        self._pending = b""
        self._ops: EventOps | None = None
        self._watching = False
        self._ended = False
        self._timer: Timer | None = None
        self._made_non_blocking = False
        self._terminal: list[object] | None = None
        serial.on_room = self._feed
        serial.on_cleared = self._cleared

    def set_raw(self) -> None:
        """Pass every key of a terminal on as it is (until :meth:`close`); does nothing for other descriptors.

        The terminal goes on translating output: log lines may go to it as well.
        """
        if not os.isatty(self._descriptor) or _in_background(self._descriptor):
            return
        try:
            before = termios.tcgetattr(self._descriptor)
            raw = termios.tcgetattr(self._descriptor)
            raw[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP | termios.IXON)
            raw[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
            raw[6][termios.VMIN] = 1
            raw[6][termios.VTIME] = 0
            termios.tcsetattr(self._descriptor, termios.TCSANOW, raw)
        except termios.error:
            return
        self._terminal = before

    def init(self, ops: EventOps) -> None:
        """Subscriber: start to watch. A regular file or /dev/null cannot be polled and is no input."""
        self._ops = ops
        if os.isatty(self._descriptor) and _in_background(self._descriptor):
            self._ended = True  # reading would stop this process (SIGTTIN)
        self._watch(True)
        if self._watching and os.get_blocking(self._descriptor):
            os.set_blocking(self._descriptor, False)
            self._made_non_blocking = True

    def _watch(self, wanted: bool) -> None:
        if self._ops is None or wanted == self._watching or (wanted and self._ended):
            return
        if wanted:
            try:
                self._ops.add(self._descriptor, select.EPOLLIN)
            except EventManagerError:
                self._ended = True
                return
        else:
            self._ops.remove(self._descriptor)
        self._watching = wanted

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: input came, or its other end was closed."""
        try:
            data = os.read(self._descriptor, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            # A pseudo-terminal whose other side nobody holds open at present.
            self._watch(False)
            self._feed_later(RETRY_NS)
            return
        if data:
            self._pending += data
            self._feed()
        else:
            self._watch(False)
            self._ended = True

    def _feed(self) -> None:
        room = self._serial.room()
        if self._pending and room:
            part, self._pending = self._pending[:room], self._pending[room:]
            self._serial.receive(part)
        self._watch(not self._pending)

    def _cleared(self, unread: bytes) -> None:
        self._pending = unread + self._pending
        if self._pending:
            self._watch(False)
            self._feed_later(SETTLE_NS)

    def _feed_later(self, pause_ns: int) -> None:
        if self._timer is None and self._ops is not None:
            self._timer = self._ops.add_timer(time.monotonic_ns() + pause_ns, self._feed_now)

    def _feed_now(self) -> None:
        self._timer = None
        self._feed()

    def close(self) -> None:
        """Restore the terminal and the descriptor's mode."""
        self._serial.on_room = self._serial.on_cleared = None
        self._ops = None
        if self._terminal is not None and not _in_background(self._descriptor):
            try:
                termios.tcsetattr(self._descriptor, termios.TCSANOW, self._terminal)  # type: ignore[arg-type]
            except termios.error:
                pass  # it is gone
            self._terminal = None
        if self._made_non_blocking:
            os.set_blocking(self._descriptor, True)
            self._made_non_blocking = False


def _in_background(terminal: int) -> bool:
    """Tell whether job control would stop us for reading or changing this terminal."""
    if os.fstat(terminal).st_rdev == _PSEUDO_TERMINAL_MASTER:
        return False
    try:
        own = os.getpgrp()
        if own:
            return os.tcgetpgrp(terminal) != own
    except OSError:
        return False  # not our controlling terminal
    # Groups outside of our pid namespace are all 0 here. Reading nothing asks job control, too: it fails in the
    # background, since SIGTTIN is ignored in a cell.
    try:
        os.read(terminal, 0)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False
