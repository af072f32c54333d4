"""The API server: HTTP on a UNIX socket, driven by the event loop, never blocking it.

One request is executed at a time over all connections. While one is, connections are accepted but not read. A
connection whose response has not been taken by the client is not read either, so that what is kept per connection is
bounded: at most one response out, and in what one read brings beyond a request, or one body within the limit.

Clients that have hung up do not count as connections, though it may be noticed only later, in their turn: what they
have sent is executed as that of others.
"""

from __future__ import annotations

import errno
import select
import time

from base.errno_text import errno_text
from base.event_manager import IN, OUT, EventOps, Events
from base.lean_std import deque, socket
from base.lean_typing import TYPE_CHECKING, Final, TypeVar
from vmm.api.http import (
    SERVER_FULL,
    Continue,
    ProtocolError,
    Request,
    RequestParser,
    TakeOver,
    render_protocol_error,
    render_response,
)
from vmm.errors import VmmError
from vmm.observe.logger import API_THREAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from base.event_manager import Timer
    from vmm.observe.logger import Logger

MAX_CONNECTIONS: Final = 10
#: Connections of clients that have hung up, beside them, until what they have sent is read.
MAX_GONE: Final = 128
#: Connections that the kernel may hold until they are accepted.
BACKLOG: Final = 128
#: Connections accepted in one turn of the loop.
ACCEPTS_PER_TURN: Final = 16
READ_SIZE: Final = 4096
#: A client must complete a request, or take a response, within this time, or it loses its connection.
CLIENT_TIMEOUT_NS: Final = 30_000_000_000
#: Accepting goes on after this time when there were no descriptors left.
ACCEPT_RETRY_NS: Final = 100_000_000

Result = TypeVar("Result")


class ApiSocketError(VmmError):
    """The API socket cannot be made."""

    code = "vmm.api_socket"


class _Connection:
    __slots__ = ("socket", "fd", "parser", "output", "event_set", "end_of_input", "timer")

    def __init__(self, client: socket.socket, payload_limit: int) -> None:
        self.socket = client
        self.fd = client.fileno()
        self.parser = RequestParser(payload_limit)
        #: Response bytes that the client has not taken yet.
        self.output = b""
        #: What the event loop watches it for; 0 while it is not watched.
        self.event_set = 0
        #: The client will send nothing more; what it has sent is still answered.
        self.end_of_input = False
        self.timer: Timer | None = None


def bind(path: str) -> socket.socket:
    """Make the listening socket; its mode follows the umask. Raises ApiSocketError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            text = f"Failed to open the API socket at: {path}. Check that it is not already used."
        else:  # without a number: the path does not fit into an address
            reason = "path must be shorter than SUN_LEN" if error.errno is None else errno_text(error)
            text = f"Failed to bind and run the HTTP server: IO error: {reason}"
        raise ApiSocketError(text) from error
    return listener


class ApiServer:
    """Serves requests on a listening socket; an EventSubscriber.

    ``handle`` turns a request into response bytes, or has the connection taken over; ``payload_limit`` bounds request
    bodies, in bytes.
    """

    _ops: EventOps

    def __init__(
        self,
        listener: socket.socket,
        handle: Callable[[Request], bytes | TakeOver],
        logger: Logger,
        payload_limit: int,
    ) -> None:
        self._listener = listener
        self._handle = handle
        self._logger = logger
        self._payload_limit = payload_limit
        self._connections: dict[int, _Connection] = {}
        #: Connections that may have a request in their buffer, in the order in which they are served.
        self._ready: deque[_Connection] = deque()
        self._scheduled = False
        #: Connections left alone while a request is executed.
        self._held: list[_Connection] = []
        self._executing = False
        #: Connections turned away because there were too many.
        self.refused_connections = 0
        #: Requests that were answered, malformed ones included.
        self.requests = 0

    def __repr__(self) -> str:
        return f"ApiServer({len(self._connections)} connections, {self.requests} requests)"

    # -- EventSubscriber ----------------------------------------------------------------------------------------------

    def init(self, ops: EventOps) -> None:
        """Begin to listen."""
        self._ops = ops
        ops.add(self._listener.fileno(), IN)
        self._logger.info("API server started.", thread=API_THREAD)

    def process(self, events: Events, ops: EventOps) -> None:
        """Handle an event of the listening socket or of a connection."""
        connection = self._connections.get(events.fd)
        if connection is None:
            self._accept()
        elif self._executing:  # a nested loop, on behalf of a request: this connection waits for its end
            self._wait(connection)
        elif connection.output:
            self._flush(connection)
        else:
            self._read(connection)

    # -- connections --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._logger.error(f"No API connection can be accepted: {errno_text(error)}", thread=API_THREAD)
                    self._pause_accepting()
                return
            client.setblocking(False)
            if self._is_full():
                self.refused_connections += 1
                _refuse(client)
                continue
            connection = _Connection(client, self._payload_limit)
            self._connections[connection.fd] = connection
            self._wait(connection)

    def _is_full(self) -> bool:
        """Tell whether there are no more connections for clients to come. Call after a client was accepted.

        Who opens a connection for each request has closed the last one before.
        """
        count = len(self._connections)
        if count < MAX_CONNECTIONS:
            return False
        if count >= MAX_CONNECTIONS + MAX_GONE:
            return True
        poll = select.poll()
        for fd in self._connections:
            poll.register(fd, 0)
        # Hang-up: the client has closed its socket, not only the direction in which it sends.
        gone = sum(bool(events & (select.POLLHUP | select.POLLERR)) for _, events in poll.poll(0))
        return count - gone >= MAX_CONNECTIONS

    def _pause_accepting(self) -> None:
        """Leave the listening socket alone for a while: it would keep the loop awake."""
        fd = self._listener.fileno()
        self._ops.remove(fd)
        self._ops.add_timer(time.monotonic_ns() + ACCEPT_RETRY_NS, lambda: self._ops.add(fd, IN))

    def _close(self, connection: _Connection) -> None:
        self._watch(connection, 0)
        self._stop_timer(connection)
        del self._connections[connection.fd]
        connection.socket.close()

    def _watch(self, connection: _Connection, event_set: int) -> None:
        """Watch for input, for room for output, or for nothing: not even for the peer's end, which would not pass."""
        if event_set == connection.event_set:
            return
        if not event_set:
            self._ops.remove(connection.fd)
        elif not connection.event_set:
            self._ops.add(connection.fd, event_set)
        else:
            self._ops.modify(connection.fd, event_set)
        connection.event_set = event_set

    def _wait(self, connection: _Connection) -> None:
        """Wait for the client: to take its response, or to send (the rest of) a request."""
        if self._executing:
            self._watch(connection, 0)
            self._held.append(connection)
        else:
            self._watch(connection, OUT if connection.output else IN)
        if not (connection.output or connection.parser.incomplete):
            self._stop_timer(connection)
        elif connection.timer is None:
            connection.timer = self._client_timer(connection)

    def _client_timer(self, connection: _Connection) -> Timer:
        return self._ops.add_timer(time.monotonic_ns() + CLIENT_TIMEOUT_NS, lambda: self._time_out(connection))

    def _stop_timer(self, connection: _Connection) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
            connection.timer = None

    def _time_out(self, connection: _Connection) -> None:
        if self._executing:  # we were busy, maybe not the client
            connection.timer = self._client_timer(connection)
            return
        connection.timer = None
        self._logger.warn("An API client was too slow and has lost its connection.", thread=API_THREAD)
        self._close(connection)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        if data:
            connection.parser.receive(data)
        else:
            connection.end_of_input = True
        self._serve(connection)

    def _serve(self, connection: _Connection) -> None:
        """Answer at most one request of a connection that has taken all its responses."""
        event = connection.parser.next_event()
        if event is not None:
            self._stop_timer(connection)  # the response, and the request after it, have their own time
            answer = self._answer(event, closing=connection.parser.closed)
            if isinstance(answer, TakeOver):
                self._hand_over(connection, answer)
                return
            connection.output = answer
            self._flush(connection)
        elif connection.end_of_input or connection.parser.closed:
            self._close(connection)
        else:
            self._wait(connection)

    def _hand_over(self, connection: _Connection, answer: TakeOver) -> None:
        """Give a connection away; it counts no longer, and what else the client has sent is dropped."""
        self._watch(connection, 0)
        self._stop_timer(connection)
        del self._connections[connection.fd]
        answer.adopt(connection.socket)

    def _answer(self, event: Request | Continue | ProtocolError, *, closing: bool) -> bytes | TakeOver:
        if isinstance(event, Continue):
            return render_response(100, version=event.version)
        self.requests += 1
        if isinstance(event, ProtocolError):
            self._logger.error(f"A malformed API request was refused: {event.text}", thread=API_THREAD)
            return render_protocol_error(event.text, closing=closing)
        return self.exclusively(lambda: self._handle(event))

    def exclusively(self, operation: Callable[[], Result]) -> Result:
        """Do something during which no request is executed: those that come meanwhile wait for its end."""
        self._executing = True
        try:
            return operation()
        finally:
            self._executing = False
            for connection in self._held:
                if self._connections.get(connection.fd) is connection:
                    self._wait(connection)
            self._held.clear()
            self._schedule()

    def _flush(self, connection: _Connection) -> None:
        """Send what the client takes, then go on with the connection."""
        while connection.output:
            try:
                sent = connection.socket.send(connection.output)
            except BlockingIOError:
                self._wait(connection)
                return
            except OSError:
                self._close(connection)
                return
            connection.output = connection.output[sent:]
        if connection.parser.buffered or connection.end_of_input or connection.parser.closed:
            # There may be another request, or the connection is to be closed: after the others have had their turn.
            self._watch(connection, 0)
            self._stop_timer(connection)
            self._ready.append(connection)
            self._schedule()
        else:
            self._wait(connection)

    def _schedule(self) -> None:
        """Serve the next ready connection in the next turn of the loop, after what else has happened."""
        if not self._scheduled and self._ready and not self._executing:
            self._scheduled = True
            self._ops.soon(self._serve_next)

    def _serve_next(self) -> None:
        self._scheduled = False
        if self._executing:  # scheduled again when the request has been executed
            return
        connection = self._ready.popleft()
        self._serve(connection)
        self._schedule()

    # -- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all connections and the listening socket. Call after the server was removed from the loop."""
        for connection in self._connections.values():
            connection.socket.close()
        self._connections.clear()
        self._ready.clear()
        self._listener.close()


def _refuse(client: socket.socket) -> None:
    """Turn a client away without waiting for it."""
    try:
        client.send(SERVER_FULL)
    except OSError:
        pass
    client.close()
