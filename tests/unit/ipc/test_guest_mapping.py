"""Mappings of guest memory: aligned for huge pages, alive as long as a view, huge where the kernel can."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.guest_mapping import HUGE_PAGE_SIZE, GuestMapping, map_read_only

SIZE = 8 * HUGE_PAGE_SIZE
NAME = "guest-mapping-test"


@pytest.fixture
def memfd() -> Iterator[int]:
    descriptor = os.memfd_create(NAME)
    os.ftruncate(descriptor, SIZE)
    yield descriptor
    os.close(descriptor)


def mapped() -> list[tuple[int, int]]:
    """Return (address, size) of every mapping of the test's file."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if NAME in line]
    bounds = [[int(each, 16) for each in line.split()[0].split("-")] for line in lines]
    return [(start, end - start) for start, end in bounds]


def mapped_huge(address: int) -> int:
    """Return how many KiB of the mapping are mapped by huge pages."""
    smaps = Path("/proc/self/smaps").read_text()
    (entry,) = re.findall(rf"^{address:x}-.*?^VmFlags", smaps, re.MULTILINE | re.DOTALL)
    (size,) = re.findall(r"^ShmemPmdMapped: +(\d+) kB", entry, re.MULTILINE)
    return int(size)


@pytest.mark.parametrize("size", [4096, HUGE_PAGE_SIZE - 4096, SIZE])
def test_a_mapping_is_aligned_and_nothing_else_stays_reserved(memfd: int, size: int) -> None:
    before = Path("/proc/self/maps").read_text().count("\n")
    mapping = GuestMapping(memfd, size)
    assert mapping.address % HUGE_PAGE_SIZE == 0
    assert mapped() == [(mapping.address, size)]
    assert len(mapping.view) == size
    # One mapping more; the reserved addresses may also have split a neighbour that the kernel had merged.
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 2


def test_it_is_the_file(memfd: int) -> None:
    mapping = GuestMapping(memfd, SIZE)
    mapping.view[12345:12350] = b"hello"
    assert os.pread(memfd, 5, 12345) == b"hello"
    os.pwrite(memfd, b"there", SIZE - 5)
    assert bytes(mapping.view[SIZE - 5 :]) == b"there"


def test_it_lives_as_long_as_a_view(memfd: int) -> None:
    mapping = GuestMapping(memfd, SIZE)
    part = mapping.view[4096:8192]
    mapping.view.release()
    del mapping
    part[:5] = b"still"
    assert os.pread(memfd, 5, 4096) == b"still"
    part.release()
    assert mapped() == []


def test_a_file_that_is_too_small_and_one_that_cannot_be_written_are_refused(memfd: int) -> None:
    with pytest.raises(OSError):
        GuestMapping(memfd, SIZE + 4096)
    with pytest.raises(OSError):
        GuestMapping(memfd, 0)
    read_only = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    try:
        with pytest.raises(PermissionError):
            GuestMapping(read_only, SIZE)
    finally:
        os.close(read_only)
    assert mapped() == []


def test_advice_is_carried_out_and_bad_advice_raises(memfd: int) -> None:
    mapping = GuestMapping(memfd, SIZE)
    mapping.view[:5] = b"hello"
    mapping.advise(mmap.MADV_REMOVE, 0, 4096)
    assert bytes(mapping.view[:5]) == bytes(5)
    with pytest.raises(OSError):
        mapping.advise(12345, 0, 4096)


def test_collapsing_keeps_what_is_there(memfd: int) -> None:
    mapping = GuestMapping(memfd, SIZE)
    mapping.view[HUGE_PAGE_SIZE + 7 : HUGE_PAGE_SIZE + 12] = b"hello"
    mapping.view[3 * HUGE_PAGE_SIZE] = 0xA5  # the byte that is touched
    done = mapping.collapse(HUGE_PAGE_SIZE, 3 * HUGE_PAGE_SIZE)
    expected = bytearray(SIZE)
    expected[HUGE_PAGE_SIZE + 7 : HUGE_PAGE_SIZE + 12] = b"hello"
    expected[3 * HUGE_PAGE_SIZE] = 0xA5
    assert mapping.view == expected
    if done:
        assert mapped_huge(mapping.address) >= 3 * HUGE_PAGE_SIZE // 1024


def test_a_read_only_mapping_keeps_no_descriptor(memfd: int) -> None:
    os.pwrite(memfd, b"hello", 4096)
    before = os.listdir("/proc/self/fd")
    view = map_read_only(memfd, 3 * 4096)
    assert os.listdir("/proc/self/fd") == before
    assert (len(view), bytes(view[4096:4101]), view.readonly) == (3 * 4096, b"hello", True)
    assert [size for _, size in mapped()] == [3 * 4096]
    view.release()
    assert mapped() == []


def test_a_file_that_is_smaller_is_not_mapped(memfd: int) -> None:
    with pytest.raises(OSError, match="smaller than its mapping"):
        map_read_only(memfd, SIZE + 1)
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="No such device"):
        map_read_only(read_end, 4096)
    os.close(read_end)
    os.close(write_end)
