"""The engine "Sync": every request is done in place, while the device waits."""

from __future__ import annotations

from base.lean_typing import Any, Sequence
from ipc.guest_memory import GuestMemory
from virtio.block.backing_file import BackingFile
from virtio.block.engine import Engine, IoRequest, execute


class FileEngine(Engine):
    """preadv(2) and pwritev(2) straight between the file and guest memory; a FLUSH is fdatasync(2)."""

    def __init__(self, file: BackingFile) -> None:
        super().__init__(file)
        self._view = memoryview(b"")
        self._done: list[tuple[Any, int]] = []

    def start(self, memory: GuestMemory) -> None:
        """Work with this guest memory."""
        self._view = memory.view

    def submit(self, request: IoRequest) -> bool:
        """Do it."""
        result = execute(self.file.fd, self._view, request, write_through=self.write_through)
        self._done.append((request.token, result))
        return True

    def completions(self) -> Sequence[tuple[Any, int]]:
        """Return what was done since."""
        done = self._done
        self._done = []
        return done
