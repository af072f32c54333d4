"""The engine "Async" where the host forbids io_uring: some threads, which do what would block the device."""

from __future__ import annotations

import os
from _queue import SimpleQueue

from base import threads
from base.errors import ThreadError
from base.lean_typing import Any, Sequence
from ipc.guest_memory import GuestMemory
from virtio.block.backing_file import BackingFile
from virtio.block.engine import Engine, IoRequest, execute, make_event

#: A disk that is not in the page cache gains little from more.
THREADS = 4
#: Requests taken at a time, as the engine with io_uring takes them.
ENTRIES = 128


class ThreadEngine(Engine):
    """Made before the cell's seal: threads cannot be made afterwards. Raises ThreadError."""

    def __init__(self, file: BackingFile, event: int = -1, count: int = THREADS) -> None:
        super().__init__(file)
        self.event = make_event(event)
        self._view = memoryview(b"")
        self._submitted: list[IoRequest] = []
        self._requests: SimpleQueue[IoRequest | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, int]] = SimpleQueue()
        self._begun: SimpleQueue[None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._count = 0
        try:
            for _ in range(count):
                threads.start(self._work)
                self._count += 1
        except ThreadError:
            self.close()
            raise
        for _ in range(count):  # a thread that begins late does what the filter of a sealed cell forbids
            self._begun.get()

    def start(self, memory: GuestMemory) -> None:
        """Work with this guest memory."""
        self._view = memory.view

    def submit(self, request: IoRequest) -> bool:
        """Take a request."""
        if self.in_flight >= ENTRIES:
            return False
        self.in_flight += 1
        self._submitted.append(request)
        return True

    def kick(self) -> None:
        """Give the threads what was submitted."""
        for request in self._submitted:
            self._requests.put(request)
        self._submitted.clear()

    def completions(self) -> Sequence[tuple[Any, int]]:
        """Return what was completed since."""
        done = []
        while not self._results.empty():
            done.append(self._results.get())
        self.in_flight -= len(done)
        return done

    def _work(self) -> None:
        """A thread's life."""
        self._begun.put(None)
        while (request := self._requests.get()) is not None:
            result = execute(self.file.fd, self._view, request, write_through=self.write_through)
            self._results.put((request.token, result))
            os.eventfd_write(self.event, 1)
        self._ended.put(None)

    def close(self) -> None:
        """End the threads; each ends what it does."""
        for _ in range(self._count):
            self._requests.put(None)
        for _ in range(self._count):
            self._ended.get()
        self._count = 0
        if self.event >= 0:
            os.close(self.event)
            self.event = -1
        super().close()
