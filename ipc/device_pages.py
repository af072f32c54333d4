"""The device page: state that the controller publishes so that workers can answer exits by themselves.

A slot stands for one port or one MMIO window. Its 64 bits are published with one store: the low half is the value
that a read returns, the high half holds flags. A slot without flags means: every access is synchronous, through
the exit ring.

Register pages: one for each virtio-mmio device, which the guest itself reads. docs/formats/device-page.md.
"""

from __future__ import annotations

import mmap
import os

from ipc.errors import LayoutError
from ipc.shared_memory import PAGE_SIZE, create_published

MAGIC = 0x3130_4547_4150_4243  # "CBPAGE01" in little-endian byte order
LAYOUT_VERSION = 1
DEVICE_PAGE_SIZE = PAGE_SIZE

WORD_MAGIC = 0
WORD_VERSION = 1
WORD_SLOTS = 8
SLOT_COUNT = PAGE_SIZE // 8 - WORD_SLOTS
assert SLOT_COUNT == 504
REGISTER_PAGE_SIZE = PAGE_SIZE

#: A read returns the published value (truncated to the size of the access) without leaving the worker.
FLAG_READ_LOCAL = 1
#: A write is posted to the exit ring: the vCPU goes on before it was executed.
FLAG_WRITE_POSTED = 2
#: A posted write that may wait a while: the controller need not be woken for it at once.
FLAG_WRITE_LAZY = 4

#: With FLAG_WRITE_POSTED: it may be posted also where other vCPUs have rings of their own, in the order of time stamps.
FLAG_WRITE_SHARED = 8

READ_LOCAL = FLAG_READ_LOCAL << 32
WRITE_POSTED = FLAG_WRITE_POSTED << 32
WRITE_LAZY = FLAG_WRITE_LAZY << 32
WRITE_SHARED = FLAG_WRITE_SHARED << 32


class DevicePage:
    """The controller's side: allocates slots and publishes them."""

    __slots__ = ("_free", "_next", "_slots", "_words")

    def __init__(self, buffer: mmap.mmap) -> None:
        self._words = memoryview(buffer).cast("Q")
        self._words[WORD_VERSION] = LAYOUT_VERSION
        self._words[WORD_MAGIC] = MAGIC
        self._slots = self._words[WORD_SLOTS:]
        self._next = 0
        #: Runs of slots, (first, count), that were given back; ascending, and none touches another.
        self._free: list[tuple[int, int]] = []

    def allocate(self, count: int) -> int:
        """Reserve ``count`` consecutive slots (all synchronous); return the first. Raises LayoutError when full."""
        if count > 0:
            for position, (first, length) in enumerate(self._free):
                if length >= count:
                    self._free[position : position + 1] = [(first + count, length - count)] if length > count else []
                    return first
            if self._next + count <= SLOT_COUNT:
                first = self._next
                self._next += count
                return first
        raise LayoutError(f"the device page has no room for {count} more slots")

    def free(self, first: int, count: int) -> None:
        """Take slots back that were allocated, and that no worker looks at any more."""
        assert 0 <= first < first + count <= self._next
        for slot in range(first, first + count):
            self._slots[slot] = 0
        runs: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (first, count)]):
            if runs and runs[-1][0] + runs[-1][1] >= start:
                assert runs[-1][0] + runs[-1][1] == start, "a slot was given back twice"
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((start, length))
        self._free = runs

    def publish(self, slot: int, value: int, flags: int) -> None:
        """Set value (32 bits) and flags of an allocated slot at once."""
        assert 0 <= slot < self._next, f"slot {slot} was not allocated"
        self._slots[slot] = flags << 32 | value & 0xFFFF_FFFF

    def close(self) -> None:
        """Release the views of the mapping."""
        self._slots.release()
        self._words.release()


def slots_of(buffer: mmap.mmap) -> memoryview:
    """Return the slots as a view of 64-bit words (the worker's side). Raises LayoutError."""
    if len(buffer) != DEVICE_PAGE_SIZE:
        raise LayoutError(f"a device page has {DEVICE_PAGE_SIZE} bytes, not {len(buffer)}")
    with memoryview(buffer).cast("Q") as words:
        if words[WORD_MAGIC] != MAGIC or words[WORD_VERSION] != LAYOUT_VERSION:
            raise LayoutError("not a device page of this version")
        return words[WORD_SLOTS:]


class RegisterPages:
    """The controller's side of ``count`` register pages: one memfd, whose only writable mapping this has.

    Raises LayoutError when the kernel refuses.
    """

    def __init__(self, count: int) -> None:
        self.descriptor, self._buffer = create_published("register-pages", count * REGISTER_PAGE_SIZE)
        self._view = memoryview(self._buffer)
        self._pages = [self._view[start : start + REGISTER_PAGE_SIZE] for start in range(0, len(self._view), PAGE_SIZE)]

    def page(self, number: int) -> memoryview:
        """Return the bytes of one page. Who has other views of it releases them before :meth:`close`."""
        return self._pages[number]

    def close(self) -> None:
        """Unmap, and close the memfd."""
        for page in self._pages:
            page.release()
        self._view.release()
        self._buffer.close()
        os.close(self.descriptor)
