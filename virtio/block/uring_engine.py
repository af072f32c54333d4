"""The engine "Async": io_uring. A batch is one system call, and a slow disk holds nobody up."""

from __future__ import annotations

import errno
import os

from base.lean_typing import Any, Sequence
from ipc.guest_memory import GuestMemory
from virtio.block.backing_file import BackingFile
from virtio.block.engine import FLUSH, READ, WRITE, Engine, IoRequest, execute, make_event
from virtio.block.uring import IORING_FSYNC_DATASYNC, IORING_OP_FSYNC, IORING_OP_READ, IORING_OP_WRITE, Ring

ENTRIES = 128
#: What the kernel says of an entry that it could not carry out: for want of a thread (ECANCELED), or interrupted.
_NOT_DONE = (-errno.ECANCELED, -errno.EAGAIN, -errno.EINTR)


class _Pending:
    """A request of which the ring has some parts."""

    __slots__ = ("done", "left", "request", "result")

    def __init__(self, request: IoRequest, parts: int) -> None:
        self.request = request
        self.left = parts
        self.done = 0
        self.result = 0


class UringEngine(Engine):
    """Each part of a request is an entry of the ring. Made before the cell's seal. Raises OSError as Ring does.

    The event speaks only of what was still in flight when the device had looked: what the page cache answers is done
    when ``kick`` returns, without an event.
    """

    def __init__(self, file: BackingFile, event: int = -1) -> None:
        super().__init__(file)
        self._ring: Ring | None = None
        self.event = make_event(event)
        try:
            self._ring = Ring(ENTRIES, file.fd, self.event)
        except OSError:
            os.close(self.event)
            raise
        self._view = memoryview(b"")
        self._address = 0
        #: By user_data, which is how many parts were submitted before it, modulo the ring.
        self._pending: dict[int, _Pending] = {}
        self._next = 0
        self._parts = 0
        self._filled = False
        self._done: list[tuple[Any, int]] = []

    def start(self, memory: GuestMemory) -> None:
        """Work with this guest memory."""
        self._view = memory.view
        self._address = memory.address

    def submit(self, request: IoRequest) -> bool:
        """Take a request; what the ring may not do, or cannot hold, is done in place."""
        ring, kind, parts = self._ring, request.kind, request.parts
        assert ring is not None
        count = 1 if kind == FLUSH else len(parts)
        if kind not in (READ, WRITE, FLUSH) or not 0 < count <= ENTRIES:
            result = execute(self.file.fd, self._view, request, write_through=self.write_through)
            self._done.append((request.token, result))
            return True
        if self._parts + count > ENTRIES:
            return False
        pending = _Pending(request, count)
        if kind == FLUSH:
            ring.fill(IORING_OP_FSYNC, 0, 0, 0, flags=IORING_FSYNC_DATASYNC, user_data=self._number(pending))
        else:
            op, flags = (IORING_OP_READ, 0) if kind == READ else (IORING_OP_WRITE, self._write_flags())
            offset = request.offset
            address = self._address if request.buffer is None else request.buffer.address
            for start, length in parts:
                number = self._number(pending)
                ring.fill(op, offset, address + start, length, flags=flags, user_data=number)
                offset += length
        self._parts += count
        self.in_flight += 1
        self._filled = True
        return True

    def _write_flags(self) -> int:
        return os.RWF_DSYNC if self.write_through else 0

    def _number(self, pending: _Pending) -> int:
        number = self._next
        self._next = number + 1
        self._pending[number] = pending
        return number

    def kick(self) -> None:
        """Hand the kernel what was submitted since."""
        if self._filled:
            assert self._ring is not None
            self._filled = False
            self._ring.submit()

    def completions(self) -> Sequence[tuple[Any, int]]:
        """Return what was completed since; the event will speak if anything is left in flight."""
        assert self._ring is not None
        self._reap(self._ring)
        if self.in_flight:
            self._ring.quiet(False)
            self._reap(self._ring)  # what was completed in between made no event
        if not self.in_flight:
            self._ring.quiet(True)
        done = self._done
        self._done = []
        return done

    def _reap(self, ring: Ring) -> None:
        for number, result in ring.reap():
            pending = self._pending.pop(number)
            self._parts -= 1
            pending.left -= 1
            if result < 0:
                pending.result = result if pending.result in (0, *_NOT_DONE) else pending.result
            else:
                pending.done += result
            if not pending.left:
                self.in_flight -= 1
                self._done.append((pending.request.token, self._outcome(pending)))

    def _outcome(self, pending: _Pending) -> int:
        request, result = pending.request, pending.result
        if result < 0 and result not in _NOT_DONE:
            return result
        if result < 0 or (request.kind != FLUSH and pending.done < request.length):
            # Cut short by a signal, or by the end of the file: once more, in place, which tells them apart.
            return execute(self.file.fd, self._view, request, write_through=self.write_through)
        return pending.done

    def replace_file(self, file: BackingFile) -> None:
        """Work with another file; the ring keeps its restrictions. Raises OSError."""
        assert self._ring is not None
        self._ring.replace_file(file.fd)
        super().replace_file(file)

    def close(self) -> None:
        """Give the ring back. While nothing is in flight."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
            os.close(self.event)
            self.event = -1
        super().close()
