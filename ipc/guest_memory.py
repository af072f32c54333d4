"""Guest memory as a cell sees it: one memfd, mapped once and for life, addressed by guest physical address.

Fast paths translate an address once (:meth:`GuestMemory.translate`), which checks it, and work in ``view`` with what
they got; nobody keeps a mapping of their own. What backs a part of the mapping may change under it; its addresses do
not.
"""

from __future__ import annotations

import mmap
import os

from base.errno_text import errno_text
from base.lean_typing import Sequence
from ipc.errors import GuestMemoryError
from ipc.guest_mapping import GuestMapping
from ipc.messages.records import MemoryRegion

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT


class GuestMemory:
    """All RAM of one guest.

    The descriptor stays the caller's; this keeps one of its own. Every access must lie within one region. Fresh
    memory reads as zeros; the loaders rely on that and never clear anything.

    ``view`` is the whole mapping, in the order of the file; its ``address`` is for the kernel (iovecs). ``size`` is
    that of the mapping, in bytes.
    """

    __slots__ = ("_dirty", "_fd", "_map", "_regions", "address", "size", "spans", "tracks_dirty", "view")

    def __init__(self, fd: int, size: int, regions: Sequence[MemoryRegion]) -> None:
        """Map ``size`` bytes of the memfd ``fd``. Raises GuestMemoryError."""
        _check_regions(size, regions)
        try:
            if os.fstat(fd).st_size < size:
                raise GuestMemoryError(f"the guest memory file is smaller than the {size} bytes of RAM")
            mapping = GuestMapping(fd, size)
            self._fd = os.dup(fd)
        except OSError as error:
            raise GuestMemoryError(
                f"Invalid Memory Configuration: Cannot create mmap region: {errno_text(error)}", error.errno or 0
            ) from error
        self._map = mapping
        self.view = mapping.view
        self.address = mapping.address
        self.size = size
        #: A bit per page of the mapping, from the lowest bit of each byte on; None while nothing is tracked.
        self._dirty: bytearray | None = None
        #: Whether :meth:`mark_dirty` remembers anything.
        self.tracks_dirty = False
        self._regions: tuple[MemoryRegion, ...]
        #: (first guest address, the one behind the last, what leads from an address to its offset) of each region: for
        #: loops that cannot afford a call for each address.
        self.spans: tuple[tuple[int, int, int], ...]
        self._take_regions(regions)

    def _take_regions(self, regions: Sequence[MemoryRegion]) -> None:
        self._regions = tuple(regions)
        self.spans = tuple([(start, start + size, offset - start) for start, size, offset in regions])

    def set_regions(self, regions: Sequence[MemoryRegion]) -> None:
        """RAM comes or goes, within the mapping. Raises GuestMemoryError, and then nothing has changed."""
        _check_regions(self.size, regions)
        self._take_regions(regions)

    @property
    def descriptor(self) -> int:
        """The memfd; it stays ours."""
        return self._fd

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The RAM regions, in ascending order."""
        return self._regions

    def translate(self, address: int, length: int) -> int:
        """Return the offset into ``view`` of ``length`` bytes of RAM; it holds until the regions change.

        Raises GuestMemoryError unless all of them are in one region.
        """
        for start, end, shift in self.spans:
            if start <= address <= address + length <= end:
                return address + shift
        raise GuestMemoryError(f"{length} bytes at guest address {address:#x} are not RAM of this guest")

    def window(self, address: int, length: int) -> memoryview:
        """Return a writable view of ``length`` bytes, valid until it is released. Raises GuestMemoryError.

        The guest changes these bytes at any time: copy what must not change between two looks. Who writes says so
        (:meth:`mark_dirty`).
        """
        offset = self.translate(address, length)
        return self.view[offset : offset + length]

    def read(self, address: int, length: int) -> bytes:
        """Copy ``length`` bytes out of guest memory. Raises GuestMemoryError."""
        offset = self.translate(address, length)
        return bytes(self.view[offset : offset + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` (bytes, or a contiguous view of bytes) into guest memory. Raises GuestMemoryError."""
        length = len(data)
        offset = self.translate(address, length)
        self.view[offset : offset + length] = data
        if self._dirty is not None:
            self.mark_dirty(offset, length)

    def discard(self, address: int, length: int) -> None:
        """Give pages back to the host (a hole in the memfd); they read as zeros afterwards. Raises GuestMemoryError."""
        offset = self.translate(address, length)
        if offset % PAGE_SIZE or length % PAGE_SIZE:
            raise GuestMemoryError(f"{length} bytes at guest address {address:#x} are not whole pages")
        if length:
            try:
                self._map.advise(mmap.MADV_REMOVE, offset, length)
            except OSError as error:
                raise GuestMemoryError(f"Cannot discard guest memory: {errno_text(error)}", error.errno or 0) from error
            self.mark_dirty(offset, length)

    def collapse(self, offset: int, length: int) -> bool:
        """Back whole blocks of 2 MiB of the mapping by huge pages; False if the kernel does not (ipc.guest_mapping)."""
        return self._map.collapse(offset, length)

    # -- what was written ---------------------------------------------------------------------------------------------

    def track_dirty(self, on: bool) -> None:
        """Begin to remember which pages this cell writes to, none at first; or stop, and forget."""
        self._dirty = bytearray(-(-self.size // (8 * PAGE_SIZE))) if on else None
        self.tracks_dirty = on

    def mark_dirty(self, offset: int, length: int) -> None:
        """Remember that ``length`` bytes at ``offset`` of ``view`` were written; nothing unless that is tracked.

        Raises GuestMemoryError for what is not in the mapping.
        """
        dirty = self._dirty
        if dirty is None:
            return
        if not 0 <= offset <= offset + length <= self.size:
            raise GuestMemoryError(f"{length} bytes at offset {offset:#x} are not in this guest's memory")
        page = offset >> PAGE_SHIFT
        end = (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT if length else page
        first_whole, last_whole = (page + 7) >> 3, end >> 3
        if first_whole < last_whole:
            dirty[first_whole:last_whole] = b"\xff" * (last_whole - first_whole)
            _set_bits(dirty, page, first_whole << 3)
            _set_bits(dirty, last_whole << 3, end)
        else:
            _set_bits(dirty, page, end)

    def take_dirty(self) -> bytes:
        """Return a bit per page, as KVM's dirty log has them, and begin anew. Empty while nothing is tracked."""
        if self._dirty is None:
            return b""
        taken = bytes(self._dirty)
        self.track_dirty(True)
        return taken

    def close(self) -> None:
        """Unmap. Views that are still held keep the mapping alive until they go. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.view.release()


def _set_bits(bitmap: bytearray, first: int, end: int) -> None:
    for number in range(first, end):
        bitmap[number >> 3] |= 1 << (number & 7)


def _check_regions(size: int, regions: Sequence[MemoryRegion]) -> None:
    """Regions ascend without overlap, are whole pages and lie within ``size`` bytes of the file."""
    end = 0
    total = 0
    for region in regions:
        misplaced = region.guest_address < end or region.offset < total or region.size <= 0
        unaligned = (region.guest_address | region.offset | region.size) % PAGE_SIZE
        if misplaced or unaligned or region.offset + region.size > size:
            raise GuestMemoryError(f"the RAM region {tuple(region)} does not fit into {size} bytes of guest memory")
        end = region.guest_address + region.size
        total = region.offset + region.size
    if not regions:
        raise GuestMemoryError("guest memory without a RAM region")
