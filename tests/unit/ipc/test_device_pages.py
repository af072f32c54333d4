"""The device page: what one side publishes is what the other reads."""

from __future__ import annotations

import mmap
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import device_pages
from ipc.device_pages import DEVICE_PAGE_SIZE, SLOT_COUNT, DevicePage, slots_of
from ipc.errors import LayoutError
from ipc.shared_memory import create_published, map_shared
from tests.harness.processes import PATIENCE_SECONDS, Child


def test_layout_is_pinned():
    """docs/formats/device-page.md; a change here is a new layout version."""
    page = mmap.mmap(-1, DEVICE_PAGE_SIZE)
    owner = DevicePage(page)
    assert page[:8] == b"CBPAGE01"
    assert page[8:16] == (1).to_bytes(8, "little")
    assert page[16:] == bytes(DEVICE_PAGE_SIZE - 16)
    assert owner.allocate(2) == 0
    owner.publish(1, 0x1234_5678, device_pages.FLAG_READ_LOCAL | device_pages.FLAG_WRITE_POSTED)
    assert page[64:72] == bytes(8)
    assert page[72:80] == bytes.fromhex("78563412 03000000")
    assert (SLOT_COUNT, device_pages.READ_LOCAL, device_pages.WRITE_POSTED) == (504, 1 << 32, 2 << 32)
    owner.close()
    page.close()


@given(value=st.integers(0, (1 << 32) - 1), flags=st.integers(0, 3), slot=st.integers(0, SLOT_COUNT - 1))
def test_a_slot_holds_value_and_flags(value, flags, slot):
    page = mmap.mmap(-1, DEVICE_PAGE_SIZE)
    owner = DevicePage(page)
    owner.allocate(SLOT_COUNT)
    owner.publish(slot, value, flags)
    slots = slots_of(page)
    assert slots[slot] & 0xFFFF_FFFF == value
    assert bool(slots[slot] & device_pages.READ_LOCAL) == bool(flags & device_pages.FLAG_READ_LOCAL)
    assert bool(slots[slot] & device_pages.WRITE_POSTED) == bool(flags & device_pages.FLAG_WRITE_POSTED)
    assert sum(1 for word in slots if word) == (1 if value or flags else 0)
    assert len(slots) == SLOT_COUNT


def test_slots_are_given_out_once():
    owner = DevicePage(mmap.mmap(-1, DEVICE_PAGE_SIZE))
    assert owner.allocate(8) == 0
    assert owner.allocate(1) == 8
    assert owner.allocate(SLOT_COUNT - 9) == 9
    for count in (1, 0, -1, SLOT_COUNT):
        with pytest.raises(LayoutError, match="no room"):
            owner.allocate(count)


@pytest.mark.parametrize("slot", [-1, 3, SLOT_COUNT])
def test_only_allocated_slots_are_published(slot):
    owner = DevicePage(mmap.mmap(-1, DEVICE_PAGE_SIZE))
    owner.allocate(3)
    with pytest.raises(AssertionError):
        owner.publish(slot, 1, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 1000)), max_size=80))
def test_slots_that_were_given_back_are_given_out_again_and_to_one_owner_only(steps):
    buffer = mmap.mmap(-1, DEVICE_PAGE_SIZE)
    page = DevicePage(buffer)
    held: list[tuple[int, int]] = []
    for allocate, count, choice in steps:
        if allocate:
            try:
                first = page.allocate(count)
            except LayoutError:
                continue
            new = set(range(first, first + count))
            assert not any(new & set(range(start, start + length)) for start, length in held)
            assert max(new) < SLOT_COUNT
            page.publish(first, 1, device_pages.FLAG_READ_LOCAL)
            held.append((first, count))
        elif held:
            page.free(*held.pop(choice % len(held)))
    for run in held:
        page.free(*run)
    slots = slots_of(buffer)
    assert not any(slots)
    slots.release()
    # All runs have become one again.
    assert page._free == ([(0, page._next)] if page._next else [])
    assert page.allocate(SLOT_COUNT if page._next in (0, SLOT_COUNT) else page._next) == 0
    page.close()


def test_a_slot_is_given_back_once():
    buffer = mmap.mmap(-1, DEVICE_PAGE_SIZE)
    page = DevicePage(buffer)
    page.allocate(8)
    page.free(2, 3)
    with pytest.raises(AssertionError):
        page.free(4, 1)
    page.close()


def test_another_object_is_refused_and_can_be_closed():
    fresh = mmap.mmap(-1, DEVICE_PAGE_SIZE)
    with pytest.raises(LayoutError, match="not a device page"):
        slots_of(fresh)
    DevicePage(fresh).close()
    slots_of(fresh).release()
    fresh[8] = 2  # another version
    try:
        slots_of(fresh)
    except LayoutError:
        fresh.close()  # no view is left in the traceback
    for size in (1, 8, DEVICE_PAGE_SIZE // 2, 2 * DEVICE_PAGE_SIZE):
        with pytest.raises(LayoutError, match="bytes"):
            slots_of(mmap.mmap(-1, size))


def test_reader_in_another_process_sees_whole_words(scale):
    """Value and flags change together: a reader never sees the value of one publication with the flags of another."""
    descriptor, page = create_published("device-page", DEVICE_PAGE_SIZE)
    owner = DevicePage(page)
    slot = owner.allocate(1)
    words = [(0x0000_0000, 0), (0xFFFF_FFFF, 3), (0x5555_5555, 1), (0xAAAA_AAAA, 2)]
    legal = {value | flags << 32 for value, flags in words}
    owner.publish(slot, *words[0])
    reads = scale(100_000, 5_000_000)

    def read() -> list[int]:
        slots = slots_of(map_shared(descriptor, DEVICE_PAGE_SIZE, writable=False))
        seen: set[int] = set()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not legal <= seen:  # however seldom one of the two gets to run while the other does
            seen.update([slots[slot] for _ in range(reads)])
            assert time.monotonic() < deadline
        return sorted(seen)

    with Child(read) as reader:
        while not os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            for value, flags in words:
                owner.publish(slot, value, flags)
        seen = set(reader.join())
    assert seen == legal
    os.close(descriptor)
