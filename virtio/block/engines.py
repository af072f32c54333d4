"""Which engine serves a drive: the API's ``io_engine``."""

from __future__ import annotations

from virtio.block.backing_file import BackingFile
from virtio.block.engine import Engine
from virtio.block.file_engine import FileEngine
from virtio.block.thread_engine import ThreadEngine
from virtio.block.uring_engine import UringEngine

SYNC = "Sync"
ASYNC = "Async"


def make_engine(io_engine: str, file: BackingFile) -> Engine:
    """Return an engine for a file, which it takes. Before the seal. Raises ThreadError.

    Async is io_uring, and threads where the host does not let us have it.
    """
    if io_engine == SYNC:
        return FileEngine(file)
    assert io_engine == ASYNC
    return make_async_engine(file)


def make_async_engine(file: BackingFile, event: int = -1) -> Engine:
    """Return an engine that holds nobody up; ``event``: of another engine, to be shared. Raises ThreadError."""
    try:
        return UringEngine(file, event)
    except OSError:
        return ThreadEngine(file, event)
