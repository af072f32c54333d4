"""Guest memory while kernel and initrd are loaded into it: written without making pages that are not needed."""

from __future__ import annotations

import os

from ipc.guest_mapping import HUGE_PAGE_SIZE
from ipc.guest_memory import GuestMemory

#: write_sparse looks for zeros in steps of this size. A kernel is a third zeros; smaller steps find hardly more.
_SPARSE_BLOCK = 64 * 1024
_ZEROS = bytes(_SPARSE_BLOCK)


class ImageMemory:
    """Fresh memory of a guest that does not run yet. With ``huge_pages`` :meth:`prepare_huge` may take some."""

    __slots__ = ("_huge", "_huge_pages", "guest")

    def __init__(self, guest: GuestMemory, *, huge_pages: bool = False) -> None:
        self.guest = guest
        self._huge_pages = huge_pages
        #: Parts of the file, (start, end), that huge pages back.
        self._huge: list[tuple[int, int]] = []

    def prepare_huge(self, address: int, length: int) -> bool:
        """Back the blocks of 2 MiB that ``length`` bytes touch by huge pages; tell whether all of them are.

        For what is about to be filled: the pages take their memory at once. Does nothing for less than a huge page, or
        where the host has none to give. Raises GuestMemoryError.
        """
        offset = self.guest.translate(address, length)
        if not self._huge_pages or length < HUGE_PAGE_SIZE:
            return False
        region = next(each for each in self.guest.regions if each.offset <= offset < each.offset + each.size)
        start = offset // HUGE_PAGE_SIZE * HUGE_PAGE_SIZE
        end = -(-(offset + length) // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
        # KVM maps a huge page of the host as one only where guest addresses are aligned alike.
        congruent = (region.guest_address - region.offset) % HUGE_PAGE_SIZE == 0
        whole = region.offset <= start and end <= region.offset + region.size
        if not congruent or not whole or not self.guest.collapse(start, end - start):
            return False
        self._huge.append((start, end))
        return True

    def write_sparse(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into fresh guest memory, leaving out blocks of zeros: they take no page of the host.

        Raises GuestMemoryError.
        """
        length = len(data)
        offset = self.guest.translate(address, length)
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
        self.guest.mark_dirty(offset, len(data))
        if any(start <= offset and offset + len(data) <= end for start, end in self._huge):
            self.guest.view[offset : offset + len(data)] = data
            return
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self.guest.descriptor, data[done:], offset + done)
        except OSError:
            self.guest.view[offset + done : offset + len(data)] = data[done:]

    def read_from_file(self, fd: int, file_offset: int, address: int, length: int) -> int:
        """Fill guest memory straight from a file and return the number of bytes read, less than ``length`` at its end.

        Raises GuestMemoryError for a bad address, OSError where the file cannot be read.
        """
        offset = self.guest.translate(address, length)
        self.guest.mark_dirty(offset, length)
        view = self.guest.view
        done = 0
        while done < length:
            count = os.preadv(fd, [view[offset + done : offset + length]], file_offset + done)
            if count == 0:
                break
            done += count
        return done

    def clear(self) -> None:
        """Discard all of it: what a failed start leaves must not reach the next one. Raises GuestMemoryError."""
        self._huge.clear()
        for region in self.guest.regions:
            self.guest.discard(region.guest_address, region.size)
