"""Guest memory for the tests of vmm.boot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipc.guest_memory import GuestMemory
from vmm import layout

MemoryFactory = Callable[[int], GuestMemory]
FileFactory = Callable[[bytes], int]


@pytest.fixture
def guest_memory() -> Iterator[MemoryFactory]:
    """Return a function: size in bytes → fresh guest memory over a memfd of its own."""
    made: list[tuple[GuestMemory, int]] = []

    def make(size: int) -> GuestMemory:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, size)
        memory = GuestMemory(fd, size, layout.ram_regions(size))
        made.append((memory, fd))
        return memory

    yield make
    for memory, fd in made:
        memory.close()
        os.close(fd)


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[FileFactory]:
    """Return a function: content → descriptor of a regular file with it, open for reading."""
    descriptors: list[int] = []

    def make(content: bytes) -> int:
        path = tmp_path / f"file-{len(descriptors)}"
        path.write_bytes(content)
        descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return descriptors[-1]

    yield make
    for fd in descriptors:
        os.close(fd)
