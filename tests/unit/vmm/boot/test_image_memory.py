"""Loading into fresh guest memory: files, sparse writing, huge pages; by any way what was written is what is there."""

from __future__ import annotations

import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import GuestMemoryError
from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
from tests.harness.memory_fixtures import FileFactory, MemoryFactory, allocated, two_regions
from vmm import layout
from vmm.boot.image_memory import ImageMemory

MIB = 1 << 20


@pytest.mark.parametrize(("address", "length"), [(MIB, 1), (MIB - 1, 2), (-1, 1), (3 << 30, 1), ((4 << 30) + MIB, 1)])
def test_nothing_is_loaded_outside_ram(address: int, length: int, open_file: FileFactory) -> None:
    memory, fd = two_regions()
    image = ImageMemory(memory, huge_pages=True)
    source = open_file(b"x" * 100)
    for access in (
        lambda: image.read_from_file(source, 0, address, length),
        lambda: image.write_sparse(address, bytes(length)),
        lambda: image.prepare_huge(address, length),
    ):
        with pytest.raises(GuestMemoryError):
            access()
    assert allocated(fd) == 0
    memory.close()
    os.close(fd)


def test_what_is_loaded_is_marked_as_written(open_file: FileFactory) -> None:
    memory, fd = two_regions()
    memory.track_dirty(True)
    image = ImageMemory(memory)
    image.write_sparse(0x3000, b"x" * 0x1001)
    image.write_sparse(0x40000, bytes(0x40000))  # zeros are not written
    image.read_from_file(open_file(b"y" * 100), 0, 4 << 30, 100)
    assert int.from_bytes(memory.take_dirty(), "little") == 1 << 3 | 1 << 4 | 1 << 256
    memory.close()
    os.close(fd)


def test_reading_from_a_file_stops_at_its_end(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    memory = guest_memory(MIB)
    image = ImageMemory(memory)
    source = open_file(bytes(range(256)) * 16)
    assert image.read_from_file(source, 100, 0x2000, 1000) == 1000
    assert memory.read(0x2000, 1000) == (bytes(range(256)) * 16)[100:1100]
    assert image.read_from_file(source, 4000, 0x4000, 1000) == 96


@given(st.lists(st.tuples(st.integers(0, 700_000), st.integers(1, 70_000)), max_size=6), st.integers(0, 5000))
def test_sparse_writing_is_writing(runs: list[tuple[int, int]], start: int) -> None:
    data = bytearray(800_000)
    for offset, length in runs:
        data[offset : offset + length] = b"\xa5" * min(length, len(data) - offset)
    memory, fd = two_regions()
    image = ImageMemory(memory)
    image.write_sparse(start, data)
    assert memory.read(start, len(data)) == data
    assert memory.read(start + len(data), 100) == bytes(100)
    memory.close()
    os.close(fd)


def test_sparse_writing_leaves_zeros_out() -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 8 * MIB)
    memory = GuestMemory(fd, 8 * MIB, (MemoryRegion(0, 8 * MIB, 0),))
    image = ImageMemory(memory)
    image.write_sparse(0, b"x" + bytes(4 * MIB) + b"y")
    assert allocated(fd) <= 3 * 64 * 1024
    assert memory.read(4 * MIB + 1, 1) == b"y"
    memory.close()
    os.close(fd)


@pytest.mark.parametrize("limit", [0, 4096, 300_000])
def test_a_file_size_limit_does_not_matter(limit: int) -> None:
    memory, fd = two_regions()
    image = ImageMemory(memory)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        image.write_sparse(0x123, b"abc" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert memory.read(0x123, 600_000) == b"abc" * 200_000
    memory.close()
    os.close(fd)


# ---------------------------------------------------------------- huge pages


def huge_memory() -> tuple[GuestMemory, int]:
    """16 MiB of RAM, in two regions whose second is not aligned as its guest addresses are."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 * MIB)
    regions = (MemoryRegion(0, 9 * MIB, 0), MemoryRegion(4 << 30, 7 * MIB, 9 * MIB))
    return GuestMemory(fd, 16 * MIB, regions), fd


def test_nothing_is_prepared_unless_the_host_gives_huge_pages() -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 * MIB)
    memory = GuestMemory(fd, 16 * MIB, layout.ram_regions(16 * MIB))
    image = ImageMemory(memory)
    assert not image.prepare_huge(2 * MIB, 4 * MIB)
    assert allocated(fd) == 0
    memory.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("address", "length"),
    [(2 * MIB, 2 * MIB - 1), (6 * MIB, 3 * MIB), (4 << 30, 4 * MIB)],
    ids=["less than a huge page", "beyond the region's whole blocks", "guest addresses aligned otherwise"],
)
def test_where_a_huge_page_would_not_do_none_is_taken(address: int, length: int) -> None:
    memory, fd = huge_memory()
    image = ImageMemory(memory, huge_pages=True)
    assert not image.prepare_huge(address, length)
    assert allocated(fd) == 0
    memory.close()
    os.close(fd)


def test_preparing_takes_the_blocks_that_are_touched_and_no_more() -> None:
    memory, fd = huge_memory()
    image = ImageMemory(memory, huge_pages=True)
    memory.write(3 * MIB, b"before")
    if image.prepare_huge(3 * MIB, 2 * MIB):  # Linux 6.1
        assert allocated(fd) == 4 * MIB
    assert memory.read(3 * MIB, 6) == b"before"
    image.clear()
    assert allocated(fd) == 0
    memory.close()
    os.close(fd)


@given(st.lists(st.tuples(st.integers(0, 5 * MIB), st.integers(1, 2 * MIB)), max_size=5), st.integers(0, 3 * MIB))
def test_what_is_loaded_does_not_depend_on_huge_pages(runs: list[tuple[int, int]], start: int) -> None:
    data = bytearray(5 * MIB)
    for offset, length in runs:
        data[offset : offset + length] = b"\xa5" * min(length, len(data) - offset)
    source = os.memfd_create("kernel")
    os.write(source, data)
    memory, fd = huge_memory()
    image = ImageMemory(memory, huge_pages=True)
    image.prepare_huge(start, len(data))
    image.write_sparse(start, data)
    assert memory.read(start, len(data)) == data
    assert image.read_from_file(source, 0, start, len(data) + 1) == len(data)
    assert memory.read(start, len(data)) == data
    assert memory.read(start + len(data), 100) == bytes(100)
    memory.close()
    os.close(fd)
    os.close(source)
