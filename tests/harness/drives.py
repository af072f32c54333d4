"""Drives of tests: backing files, devices over them, and requests of a driver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from base import native_loops
from tests.harness.virtio_devices import Bench
from tests.harness.virtqueues import DATA, HIGH, guest_memory
from virtio import abi
from virtio.block.backing_file import BackingFile
from virtio.block.configuration import BlockSettings
from virtio.block.device import Block
from virtio.block.engine import Engine
from virtio.block.file_engine import FileEngine
from virtio.block.thread_engine import ThreadEngine
from virtio.block.uring_engine import UringEngine
from virtio.driver import Buffer

SECTORS = 64
SIZE = SECTORS << 9
ENGINES: dict[str, type[Engine]] = {"Sync": FileEngine, "io_uring": UringEngine, "threads": ThreadEngine}
#: Every way in which a drive is served.
WAYS: dict[str, type[Engine]] = {**ENGINES, "extension": FileEngine}
HEADER = DATA
STATUS = DATA + 0x100
BUFFER = HIGH
NO_STATUS = 0xEE


def pattern(sectors: int = SECTORS) -> bytes:
    """Return content in which every sector is another one."""
    return b"".join(bytes((number & 0xFF, number >> 8)) * 256 for number in range(sectors))


def backing_file(content: bytes | None = None, *, read_only: bool = False) -> BackingFile:
    """Return a file in memory."""
    fd = os.memfd_create("drive", os.MFD_CLOEXEC)
    os.pwrite(fd, pattern() if content is None else content, 0)
    return BackingFile(fd, read_only=read_only)


class Drive(Bench):
    """A block device with a driver that knows its requests."""

    device: Block

    def ask(self, type: int, sector: int, buffers: list[Buffer] | None = None, *, indirect: bool = True) -> int:
        """Do one request; return its status. ``buffers`` lie between header and status."""
        self.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(type, 0, sector))
        self.memory.write(STATUS, bytes([NO_STATUS]))
        self.used = self.request([Buffer(HEADER, 16), *(buffers or []), Buffer(STATUS, 1, True)], indirect=indirect)
        return self.memory.read(STATUS, 1)[0]

    def read(self, sector: int, count: int = 1, *, indirect: bool = True) -> bytes:
        """Read sectors; the request must succeed."""
        size = count << 9
        status = self.ask(abi.VIRTIO_BLK_T_IN, sector, [Buffer(BUFFER, size, True)], indirect=indirect)
        assert (status, self.used.written) == (abi.VIRTIO_BLK_S_OK, size + 1)
        return self.memory.read(BUFFER, size)

    def write(self, sector: int, data: bytes, *, indirect: bool = True) -> int:
        """Write sectors; return the status."""
        self.memory.write(BUFFER, data)
        return self.ask(abi.VIRTIO_BLK_T_OUT, sector, [Buffer(BUFFER, len(data))], indirect=indirect)

    def zero(self, type: int, segments: bytes) -> int:
        """DISCARD or WRITE_ZEROES; return the status."""
        self.memory.write(BUFFER, segments)
        return self.ask(type, 0, [Buffer(BUFFER, len(segments))])

    @property
    def content(self) -> bytes:
        """What the file says now."""
        return os.pread(self.device.engine.file.fd, 1 << 20, 0)


@contextmanager
def extension(on: bool) -> Iterator[None]:
    """The C extension as a template has loaded it, or has not."""
    before = native_loops.loops()
    loaded = native_loops.load() if on else None
    assert bool(loaded) == on, "./dev setup has built no extension"
    native_loops._loaded = loaded
    try:
        yield
    finally:
        native_loops._loaded = before


@contextmanager
def drive(
    engine: Engine | str = "Sync",
    *,
    features: int | None = None,
    limiter: Any = None,
    native: bool = False,
    **settings: Any,
) -> Iterator[Drive]:
    """A drive that is active; with every feature that it offers, if nothing else is said."""
    native = native or engine == "extension"
    if isinstance(engine, str):
        engine = WAYS[engine](backing_file(read_only=settings.get("read_only", False)))
    device = Block("drive", engine, BlockSettings(**settings), limiter)
    with extension(native), guest_memory() as memory:
        made = Drive(device, memory, device.features() if features is None else features, 64)
        made.activate()
        try:
            yield made
        finally:
            made.close()
