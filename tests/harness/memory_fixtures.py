"""Guest memory, and files that are loaded into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
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


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Return a directory for unpacked kernels, as path and as descriptor."""
    path = tmp_path / "cache"
    path.mkdir(mode=0o755)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield path, fd
    os.close(fd)


def two_regions() -> tuple[GuestMemory, int]:
    """Return guest memory of 1 MiB at 0 and 1 MiB at 4 GiB, and its descriptor."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 << 20)
    return GuestMemory(fd, 2 << 20, (MemoryRegion(0, 1 << 20, 0), MemoryRegion(4 << 30, 1 << 20, 1 << 20))), fd


def allocated(fd: int) -> int:
    """Return how many bytes of a file take space."""
    return os.fstat(fd).st_blocks * 512
