"""Event streams: connections of the API server that have asked for events and get nothing else from then on.

Nothing here waits for a client: what it does not take at once is kept up to ``BUFFER_LIMIT``; beyond it the client gets
one last line that says so and loses its stream. A subscriber of the event loop.
"""

from __future__ import annotations

import errno
import time

from base.event_manager import HANG_UP, IN, OUT
from base.lean_typing import TYPE_CHECKING, Final
from vmm.observe.event_log import event_line

if TYPE_CHECKING:
    import socket

    from base.event_manager import EventOps, Events, Timer
    from base.lean_typing import Callable
    from vmm.observe.event_log import EventLog

MAX_STREAMS: Final = 8
#: Bytes kept for a client that is slow.
BUFFER_LIMIT: Final = 256 << 10
#: A client that is to be disconnected may take its last bytes for so long.
LINGER_NS: Final = 5_000_000_000
#: The length is not known, so the end of the connection ends the response; every HTTP client understands that.
HEAD: Final = (
    b"HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: close\r\nContent-Type: application/x-ndjson\r\n\r\n"
)


class _Stream:
    __slots__ = ("deaf", "ending", "fd", "output", "socket", "timer", "watched")

    def __init__(self, client: socket.socket) -> None:
        self.socket = client
        self.fd = client.fileno()
        self.output = bytearray()
        self.watched = 0
        #: The client sends nothing more; its end is noticed by the hang-up.
        self.deaf = False
        #: No further event is added; the connection is closed when the output was taken.
        self.ending = False
        self.timer: Timer | None = None


class EventStreams:
    """Sends every event of ``log`` to every stream."""

    _ops: EventOps

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._streams: dict[int, _Stream] = {}
        self._listener: Callable[[bytes], None] = self._event

    def __repr__(self) -> str:
        return f"EventStreams({len(self._streams)})"

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def full(self) -> bool:
        """Whether no further stream can be opened."""
        return len(self._streams) >= MAX_STREAMS

    # -- EventSubscriber ----------------------------------------------------------------------------------------------

    def init(self, ops: EventOps) -> None:
        """Begin to listen to the log."""
        self._ops = ops
        self._log.listen(self._listener)

    def process(self, events: Events, ops: EventOps) -> None:
        """A client takes more, sends something (which is ignored), or is gone."""
        stream = self._streams.get(events.fd)
        if stream is None:
            return
        if events.event_set & OUT:
            self._send(stream)
        elif events.event_set & IN:
            self._ignore_input(stream)
        else:
            self._close(stream)

    # -- streams ------------------------------------------------------------------------------------------------------

    def adopt(self, client: socket.socket) -> None:
        """Take a connection over, non-blocking and not watched by anybody: send the head and what has happened."""
        stream = _Stream(client)
        self._streams[stream.fd] = stream
        stream.output += HEAD
        for line in self._log.history():
            stream.output += line
        self._watch(stream)
        self._send(stream)

    def _event(self, line: bytes) -> None:
        for stream in tuple(self._streams.values()):
            if stream.ending:
                continue
            if len(stream.output) + len(line) > BUFFER_LIMIT:
                self._overflow(stream)
            else:
                stream.output += line
                if not stream.watched & OUT:
                    self._send(stream)

    def _overflow(self, stream: _Stream) -> None:
        """Say in a last line, which has the number of the event that is missing, why there are no more."""
        stream.ending = True
        text = f"The client is slow: more than {BUFFER_LIMIT} bytes wait for it. Connect again to go on."
        stream.output += event_line(self._log.number, "stream-lost", reason=text)
        stream.timer = self._ops.add_timer(time.monotonic_ns() + LINGER_NS, lambda: self._close(stream))

    def _send(self, stream: _Stream) -> None:
        while stream.output:
            try:
                sent = stream.socket.send(stream.output)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    break
                self._close(stream)
                return
            del stream.output[:sent]
        if stream.ending and not stream.output:
            self._close(stream)
        else:
            self._watch(stream)

    def _ignore_input(self, stream: _Stream) -> None:
        try:
            if stream.socket.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            self._close(stream)
            return
        stream.deaf = True  # it may still read: only its sending side is closed
        self._watch(stream)

    def _watch(self, stream: _Stream) -> None:
        wanted = HANG_UP | (0 if stream.deaf else IN) | (OUT if stream.output else 0)
        if not stream.watched:
            self._ops.add(stream.fd, wanted)
        elif wanted != stream.watched:
            self._ops.modify(stream.fd, wanted)
        stream.watched = wanted

    def _close(self, stream: _Stream) -> None:
        if self._streams.pop(stream.fd, None) is None:
            return
        if stream.timer is not None:
            stream.timer.cancel()
        if stream.watched:
            self._ops.remove(stream.fd)
        stream.socket.close()

    def close(self) -> None:
        """End all streams: what a client takes at once it gets. Call before the event loop ends."""
        self._log.leave(self._listener)
        for stream in tuple(self._streams.values()):
            self._send(stream)
            self._close(stream)
