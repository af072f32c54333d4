"""Guest memory: bounds, files, sparse writing, discarding."""

from __future__ import annotations

import mmap
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import GuestMemoryError, IpcError
from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
from tests.harness.memory_fixtures import FileFactory, MemoryFactory
from vmm import layout

MIB = 1 << 20


def two_regions() -> tuple[GuestMemory, int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 * MIB)
    return GuestMemory(fd, 2 * MIB, (MemoryRegion(0, MIB, 0), MemoryRegion(4 << 30, MIB, MIB))), fd


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_regions_lie_where_they_say_in_the_file() -> None:
    memory, fd = two_regions()
    memory.write(0x1234, b"low")
    memory.write((4 << 30) + 0x10, b"high")
    assert memory.read(0x1234, 3) == b"low"
    assert os.pread(fd, 3, 0x1234) == b"low"
    assert os.pread(fd, 4, MIB + 0x10) == b"high"
    assert memory.contains(MIB - 1, 1)
    assert not memory.contains(MIB - 1, 2)
    memory.close()
    memory.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("address", "length"),
    [(MIB, 1), (MIB - 1, 2), (-1, 1), (0, -1), (3 << 30, 1), ((4 << 30) - 1, 2), ((4 << 30) + MIB, 1), (1 << 70, 1)],
)
def test_addresses_outside_ram_are_refused(address: int, length: int, open_file: FileFactory) -> None:
    memory, fd = two_regions()
    source = open_file(b"x" * 100)
    for access in (
        lambda: memory.read(address, length),
        lambda: memory.view(address, length),
        lambda: memory.read_from_file(source, 0, address, length),
        lambda: memory.discard(address, length),
    ):
        with pytest.raises(GuestMemoryError) as caught:
            access()
        assert isinstance(caught.value, IpcError)
    if length > 0:
        with pytest.raises(GuestMemoryError):
            memory.write(address, bytes(length))
        with pytest.raises(GuestMemoryError):
            memory.write_sparse(address, bytes(length))
    assert allocated(fd) == 0
    memory.close()
    os.close(fd)


@given(st.integers(-(1 << 40), 1 << 40), st.integers(-10, 1 << 40))
def test_any_address_is_ram_or_an_error(address: int, length: int) -> None:
    memory, fd = two_regions()
    try:
        view = memory.view(address, length)
    except GuestMemoryError:
        assert not memory.contains(address, length)
    else:
        assert memory.contains(address, length)
        assert len(view) == length
        view.release()
    finally:
        memory.close()
        os.close(fd)


def test_reading_from_a_file_stops_at_its_end(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    memory = guest_memory(MIB)
    source = open_file(bytes(range(256)) * 16)
    assert memory.read_from_file(source, 100, 0x2000, 1000) == 1000
    assert memory.read(0x2000, 1000) == (bytes(range(256)) * 16)[100:1100]
    assert memory.read_from_file(source, 4000, 0x4000, 1000) == 96


def test_views_write_through_and_survive_closing() -> None:
    memory, fd = two_regions()
    view = memory.view(0x3000, 4)
    view[:] = b"abcd"
    assert memory.read(0x3000, 4) == b"abcd"
    memory.close()
    view[0:1] = b"z"
    assert os.pread(fd, 4, 0x3000) == b"zbcd"
    view.release()
    os.close(fd)


@given(st.lists(st.tuples(st.integers(0, 700_000), st.integers(1, 70_000)), max_size=6), st.integers(0, 5000))
def test_sparse_writing_is_writing(runs: list[tuple[int, int]], start: int) -> None:
    data = bytearray(800_000)
    for offset, length in runs:
        data[offset : offset + length] = b"\xa5" * min(length, len(data) - offset)
    memory, fd = two_regions()
    memory.write_sparse(start, data)
    assert memory.read(start, len(data)) == data
    assert memory.read(start + len(data), 100) == bytes(100)
    memory.close()
    os.close(fd)


def test_sparse_writing_leaves_zeros_out(guest_memory: MemoryFactory) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 8 * MIB)
    memory = GuestMemory(fd, 8 * MIB, (MemoryRegion(0, 8 * MIB, 0),))
    memory.write_sparse(0, b"x" + bytes(4 * MIB) + b"y")
    assert allocated(fd) <= 3 * 64 * 1024
    assert memory.read(4 * MIB + 1, 1) == b"y"
    memory.close()
    os.close(fd)


@pytest.mark.parametrize("limit", [0, 4096, 300_000])
def test_a_file_size_limit_does_not_matter(limit: int) -> None:
    memory, fd = two_regions()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        memory.write_sparse(0x123, b"abc" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert memory.read(0x123, 600_000) == b"abc" * 200_000
    memory.close()
    os.close(fd)


def test_no_descriptor_is_left() -> None:
    before = os.listdir("/proc/self/fd")
    memory, fd = two_regions()
    memory.close()
    os.close(fd)
    with pytest.raises(GuestMemoryError):
        GuestMemory(0, MIB, layout.ram_regions(MIB))
    assert os.listdir("/proc/self/fd") == before


def test_discarding_gives_pages_back_and_zeros() -> None:
    memory, fd = two_regions()
    memory.write(0, b"x" * MIB)
    memory.write(4 << 30, b"y" * 8192)
    memory.discard(0, MIB)
    assert allocated(fd) == 8192
    assert memory.read(0x5000, 4) == bytes(4)
    with pytest.raises(GuestMemoryError):
        memory.discard(1, 4096)
    memory.clear()
    assert allocated(fd) == 0
    memory.close()
    os.close(fd)


def test_guest_memory_is_left_out_of_core_dumps() -> None:
    memory, fd = two_regions()
    with open("/proc/self/smaps", encoding="ascii") as maps:
        areas = maps.read().split("VmFlags:")
    flags = next(
        areas[i + 1].split("\n")[0] for i, area in enumerate(areas) if "/memfd:guest" in area.split("\n", 1)[1]
    )
    assert "dd" in flags.split()
    memory.close()
    os.close(fd)


@pytest.mark.parametrize(
    "regions",
    [
        (),
        (MemoryRegion(0, 0, 0),),
        (MemoryRegion(0, 2 * MIB + 4096, 0),),
        (MemoryRegion(0, MIB + 1, 0),),
        (MemoryRegion(0, MIB, 0), MemoryRegion(MIB - 4096, MIB, MIB)),
        (MemoryRegion(0, MIB, 0), MemoryRegion(4 << 30, MIB, MIB - 4096)),
        (MemoryRegion(100, MIB, 0),),
    ],
)
def test_impossible_regions_are_refused(regions: tuple[MemoryRegion, ...]) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 * MIB)
    with pytest.raises(GuestMemoryError):
        GuestMemory(fd, 2 * MIB, regions)
    os.close(fd)


def test_what_cannot_be_mapped_is_an_error_of_ours() -> None:
    regions = layout.ram_regions(MIB)
    small = os.memfd_create("guest")
    with pytest.raises(GuestMemoryError):
        GuestMemory(small, MIB, regions)
    os.ftruncate(small, MIB)
    read_only = os.open(f"/proc/self/fd/{small}", os.O_RDONLY)
    with pytest.raises(GuestMemoryError) as caught:
        GuestMemory(read_only, MIB, regions)
    assert str(caught.value) == (
        "Invalid Memory Configuration: Cannot create mmap region: Permission denied (os error 13)"
    )
    assert caught.value.errno == 13
    os.close(read_only)
    os.close(small)
    assert mmap.PAGESIZE == layout.PAGE_SIZE


# ---------------------------------------------------------------- huge pages


def huge_memory() -> tuple[GuestMemory, int]:
    """16 MiB of RAM, in two regions whose second is not aligned as its guest addresses are."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 * MIB)
    regions = (MemoryRegion(0, 9 * MIB, 0), MemoryRegion(4 << 30, 7 * MIB, 9 * MIB))
    return GuestMemory(fd, 16 * MIB, regions, huge_pages=True), fd


def test_nothing_is_prepared_unless_the_host_gives_huge_pages() -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 * MIB)
    memory = GuestMemory(fd, 16 * MIB, layout.ram_regions(16 * MIB))
    assert not memory.prepare_huge(2 * MIB, 4 * MIB)
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
    assert not memory.prepare_huge(address, length)
    assert allocated(fd) == 0
    memory.close()
    os.close(fd)


def test_preparing_takes_the_blocks_that_are_touched_and_no_more() -> None:
    memory, fd = huge_memory()
    memory.write(3 * MIB, b"before")
    if memory.prepare_huge(3 * MIB, 2 * MIB):  # Linux 6.1
        assert allocated(fd) == 4 * MIB
    assert memory.read(3 * MIB, 6) == b"before"
    memory.clear()
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
    memory.prepare_huge(start, len(data))
    memory.write_sparse(start, data)
    assert memory.read(start, len(data)) == data
    assert memory.read_from_file(source, 0, start, len(data) + 1) == len(data)
    assert memory.read(start, len(data)) == data
    assert memory.read(start + len(data), 100) == bytes(100)
    memory.close()
    os.close(fd)
    os.close(source)
