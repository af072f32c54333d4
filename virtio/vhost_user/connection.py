"""The connection to a back end: one conversation at a time, and nobody waits in it.

A conversation is a generator: it yields messages and is sent the reply to each. The back end is not trusted: it has so
long for a reply, says no more than that, and hands over no more descriptors than were asked for.
"""

from __future__ import annotations

import os
from _struct import Struct
from time import monotonic_ns

from base.errno_text import errno_text
from base.event_manager import IN, EventOps
from base.lean_std import deque, socket
from base.lean_typing import TYPE_CHECKING, Callable, NamedTuple
from virtio.errors import VhostUserError
from virtio.vhost_user.protocol import GET_INFLIGHT_FD, HEADER_SIZE, Message, pack, parse_header, parse_u64

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import TypeAlias

    from base.event_manager import Timer

    Conversation: TypeAlias = "Generator[Message, Reply, None]"

#: How long a back end has for a reply: it may have to finish what is in flight first.
REPLY_TIMEOUT_NS = 10_000_000_000
_FD = Struct("<i")
#: Room for more descriptors than any reply has.
_ROOM = socket.CMSG_SPACE(4 * _FD.size)


class Reply(NamedTuple):
    """What came back: ``fds`` belong to whoever takes it."""

    payload: bytes = b""
    fds: tuple[int, ...] = ()


class Connection:
    """Owns the socket. ``failed(error)`` is called once, whatever goes wrong, and nothing more happens afterwards."""

    def __init__(self, fd: int, ops: EventOps, failed: Callable[[VhostUserError], None]) -> None:
        # Not made non-blocking, which a cell must not do when it serves: there is something when it is read.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        self._ops = ops
        self._failed = failed
        self._waiting: deque[tuple[Conversation, Callable[[], None]]] = deque()
        self._current: tuple[Conversation, Callable[[], None]] | None = None
        #: What a reply is awaited to; None: nothing may come.
        self._asked: Message | None = None
        self._received = b""
        self._fds: list[int] = []
        self._timer: Timer | None = None
        self.is_open = True
        ops.watch(self._socket.fileno(), IN, self._readable)

    def converse(self, conversation: Conversation, done: Callable[[], None]) -> None:
        """Begin a conversation when those before have ended; ``done`` is called after its end, not if it fails."""
        self._waiting.append((conversation, done))
        self._next()

    def _next(self) -> None:
        while self.is_open and self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            self._go_on(None)

    def _go_on(self, reply: Reply | None) -> None:
        """Hand the conversation a reply, and send what it says until it waits for the next one."""
        while self.is_open and self._current is not None:
            conversation, done = self._current
            try:
                message = conversation.send(reply) if reply is not None else next(conversation)
                self._send(message)
            except StopIteration:
                self._current = None
                done()
                self._next()
                return
            except VhostUserError as error:
                self._fail(error)
                return
            if message.replies or message.acknowledged:
                self._asked = message
                self._timer = self._ops.add_timer(monotonic_ns() + REPLY_TIMEOUT_NS, self._late)
                return
            reply = Reply()

    def _send(self, message: Message) -> None:
        data = pack(message)
        try:
            fds = b"".join(map(_FD.pack, message.fds))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
            sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError as error:
            raise VhostUserError(f"the back end is gone: {errno_text(error)}") from None
        if sent != len(data):
            raise VhostUserError("the back end does not read what it is sent")

    def _readable(self, _: int) -> None:
        asked = self._asked
        try:
            wanted = HEADER_SIZE - len(self._received)
            if asked is not None and wanted <= 0:
                wanted += parse_header(self._received[:HEADER_SIZE], asked.request)
            data, ancillary, flags, _ = self._socket.recvmsg(max(wanted, 1), _ROOM, socket.MSG_CMSG_CLOEXEC)
            for _, _, rights in ancillary:
                self._fds += [fd for (fd,) in _FD.iter_unpack(rights[: len(rights) // _FD.size * _FD.size])]
            if not data:
                raise VhostUserError("the back end has closed the connection")
            if asked is None:
                raise VhostUserError("the back end says what it was not asked for")
            if flags & socket.MSG_CTRUNC or len(self._fds) > (asked.request == GET_INFLIGHT_FD):
                raise VhostUserError("the back end hands over too many descriptors")
            self._received += data
            self._take(asked)
        except BlockingIOError:
            return
        except VhostUserError as error:
            self._fail(error)
        except OSError as error:
            self._fail(VhostUserError(f"the back end is gone: {errno_text(error)}"))

    def _take(self, asked: Message) -> None:
        """Look whether the reply is whole. Raises VhostUserError."""
        if len(self._received) < HEADER_SIZE:
            return
        size = parse_header(self._received[:HEADER_SIZE], asked.request)
        if len(self._received) < HEADER_SIZE + size:
            return
        payload = self._received[HEADER_SIZE:]
        if asked.acknowledged and parse_u64(payload):
            raise VhostUserError(f"the back end refuses request {asked.request}")
        fds, self._fds = tuple(self._fds), []
        self._received = b""
        self._asked = None
        self._stop_timer()
        self._go_on(Reply(payload, fds))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        self._fail(VhostUserError("the back end does not answer"))

    def _fail(self, error: VhostUserError) -> None:
        if self.is_open:
            self.close()
            self._failed(error)

    def close(self) -> None:
        """End it, whatever is under way. Harmless twice."""
        if not self.is_open:
            return
        self.is_open = False
        self._stop_timer()
        self._ops.remove(self._socket.fileno())
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        current, self._current = self._current, None
        self._waiting.clear()
        if current is not None:
            try:
                current[0].close()
            except ValueError:
                pass  # it is what ends the connection
