"""Guest memory as the controller sees it: one memfd, mapped once, addressed by guest physical address."""

from __future__ import annotations

import mmap
import os

from base.errno_text import errno_text
from base.lean_typing import Sequence
from ipc.errors import GuestMemoryError
from ipc.guest_mapping import HUGE_PAGE_SIZE, GuestMapping
from ipc.messages.records import MemoryRegion

_PAGE_SIZE = 4096
#: write_sparse looks for zeros in steps of this size. A kernel is a third zeros; smaller steps find hardly more.
_SPARSE_BLOCK = 64 * 1024
_ZEROS = bytes(_SPARSE_BLOCK)


class GuestMemory:
    """All RAM of one guest.

    The descriptor stays the caller's; this keeps one of its own. Every access must lie within one region. Fresh
    memory reads as zeros; the loaders rely on that and never clear anything.
    """

    __slots__ = ("_fd", "_huge", "_huge_pages", "_map", "_regions", "_view", "size")

    def __init__(self, fd: int, size: int, regions: Sequence[MemoryRegion], *, huge_pages: bool = False) -> None:
        """Map ``size`` bytes of the memfd ``fd``. With ``huge_pages`` :meth:`prepare_huge` may take some.

        Raises GuestMemoryError.
        """
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
        self._view = mapping.view
        #: Parts of the file, (start, end), that huge pages back.
        self._huge: list[tuple[int, int]] = []
        self._regions = tuple(regions)
        self._huge_pages = huge_pages
        self.size = size

    @property
    def descriptor(self) -> int:
        """The memfd; it stays ours."""
        return self._fd

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The RAM regions, in ascending order."""
        return self._regions

    def _offset(self, address: int, length: int) -> int:
        if length >= 0:
            for start, size, offset in self._regions:
                if start <= address and address + length <= start + size:
                    return offset + address - start
        raise GuestMemoryError(f"{length} bytes at guest address {address:#x} are not RAM of this guest")

    def contains(self, address: int, length: int) -> bool:
        """Tell whether ``length`` bytes at ``address`` are RAM within one region."""
        return length >= 0 and any(
            start <= address and address + length <= start + size for start, size, _ in self._regions
        )

    def read(self, address: int, length: int) -> bytes:
        """Copy ``length`` bytes out of guest memory. Raises GuestMemoryError."""
        offset = self._offset(address, length)
        return bytes(self._view[offset : offset + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` (bytes, or a contiguous view of bytes) into guest memory. Raises GuestMemoryError."""
        length = len(data)
        offset = self._offset(address, length)
        self._view[offset : offset + length] = data

    def prepare_huge(self, address: int, length: int) -> bool:
        """Back the blocks of 2 MiB that ``length`` bytes touch by huge pages; tell whether all of them are.

        For what is about to be filled: the pages take their memory at once. Does nothing for less than a huge page, or
        where the host has none to give. Raises GuestMemoryError.
        """
        offset = self._offset(address, length)
        if not self._huge_pages or length < HUGE_PAGE_SIZE:
            return False
        region = next(each for each in self._regions if each.offset <= offset < each.offset + each.size)
        start = offset // HUGE_PAGE_SIZE * HUGE_PAGE_SIZE
        end = -(-(offset + length) // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
        # KVM maps a huge page of the host as one only where guest addresses are aligned alike.
        congruent = (region.guest_address - region.offset) % HUGE_PAGE_SIZE == 0
        whole = region.offset <= start and end <= region.offset + region.size
        if not congruent or not whole or not self._map.collapse(start, end - start):
            return False
        self._huge.append((start, end))
        return True

    def write_sparse(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into fresh guest memory, leaving out blocks of zeros: they take no page of the host.

        Raises GuestMemoryError.
        """
        length = len(data)
        offset = self._offset(address, length)
        start = position = 0
        with memoryview(data) as source:
            while position < length:
                end = min(position + _SPARSE_BLOCK, length)
                # A look at one byte spares the comparison for nearly every block that has content.
                if source[position] == 0 and source[position:end].tobytes() == _ZEROS[: end - position]:
                    self._write_pages(offset + start, source[start:position])
                    start = end
                position = end
            self._write_pages(offset + start, source[start:length])

    def _write_pages(self, offset: int, data: memoryview) -> None:
        """Write to pages that do not exist yet: by the file, which neither faults nor zeroes them first.

        That takes half the time of copying into the mapping. Where the file cannot be written (RLIMIT_FSIZE, huge
        pages) the mapping can.
        """
        if any(start <= offset and offset + len(data) <= end for start, end in self._huge):
            self._view[offset : offset + len(data)] = data
            return
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], offset + done)
        except OSError:
            self._view[offset + done : offset + len(data)] = data[done:]

    def view(self, address: int, length: int) -> memoryview:
        """Return a writable view of ``length`` bytes, valid until it is released. Raises GuestMemoryError.

        The guest changes these bytes at any time: copy what must not change between two looks.
        """
        offset = self._offset(address, length)
        return self._view[offset : offset + length]

    def read_from_file(self, fd: int, file_offset: int, address: int, length: int) -> int:
        """Fill guest memory straight from a file and return the number of bytes read, less than ``length`` at its end.

        Raises GuestMemoryError for a bad address, OSError where the file cannot be read.
        """
        offset = self._offset(address, length)
        done = 0
        while done < length:
            count = os.preadv(fd, [self._view[offset + done : offset + length]], file_offset + done)
            if count == 0:
                break
            done += count
        return done

    def discard(self, address: int, length: int) -> None:
        """Give pages back to the host (a hole in the memfd); they read as zeros afterwards. Raises GuestMemoryError."""
        offset = self._offset(address, length)
        if offset % _PAGE_SIZE or length % _PAGE_SIZE:
            raise GuestMemoryError(f"{length} bytes at guest address {address:#x} are not whole pages")
        if length:
            try:
                self._map.advise(mmap.MADV_REMOVE, offset, length)
            except OSError as error:
                raise GuestMemoryError(f"Cannot discard guest memory: {errno_text(error)}", error.errno or 0) from error

    def clear(self) -> None:
        """Discard all of it: what a failed start leaves must not reach the next one. Raises GuestMemoryError."""
        self._huge.clear()
        for region in self._regions:
            self.discard(region.guest_address, region.size)

    def close(self) -> None:
        """Unmap. Views that are still held keep the mapping alive until they go. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._view.release()


def _check_regions(size: int, regions: Sequence[MemoryRegion]) -> None:
    """Regions ascend without overlap, are whole pages and lie within ``size`` bytes of the file."""
    end = 0
    total = 0
    for region in regions:
        misplaced = region.guest_address < end or region.offset < total or region.size <= 0
        unaligned = (region.guest_address | region.offset | region.size) % _PAGE_SIZE
        if misplaced or unaligned or region.offset + region.size > size:
            raise GuestMemoryError(f"the RAM region {tuple(region)} does not fit into {size} bytes of guest memory")
        end = region.guest_address + region.size
        total = region.offset + region.size
    if not regions:
        raise GuestMemoryError("guest memory without a RAM region")
