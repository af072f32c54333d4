"""Reading kernel images from files: into guest memory, or hashing them."""

from __future__ import annotations

import os
import stat

from base.lean_typing import Iterator, NamedTuple, Protocol
from vmm.boot import elf
from vmm.boot.errors import elf_error, read_error
from vmm.boot.image_memory import ImageMemory

_PIECE = 1 << 20


class Hasher(Protocol):
    """What we use of a hashlib object."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Add ``data``."""

    def digest(self) -> bytes:
        """Return the digest of all that was added."""


def new_hasher() -> Hasher | None:
    """Return a new SHA-256, or None in a cell into which hashlib was not imported before the jail."""
    try:
        import hashlib
    except ImportError:
        return None
    return hashlib.sha256()


class KernelFile(NamedTuple):
    """An open kernel file of ``size`` bytes that begins with ``start``."""

    fd: int
    size: int
    start: bytes

    @classmethod
    def look(cls, fd: int, length: int) -> KernelFile:
        """Read the first ``length`` bytes. Raises KernelError for what is not a regular file."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise read_error("it is not a regular file")
        return cls(fd, status.st_size, read_at(fd, 0, length))


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Read up to ``size`` bytes at ``offset``, fewer only at the end of the file."""
    parts = []
    while size:
        part = os.pread(fd, size, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


class FileReader:
    """Reads a file from its start to its end, once; with a hasher every byte is hashed as it is read."""

    __slots__ = ("_fd", "_hasher", "position")

    def __init__(self, fd: int, hasher: Hasher | None) -> None:
        self._fd = fd
        self._hasher = hasher
        self.position = 0

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, nothing at the end of the file."""
        data = os.pread(self._fd, size, self.position)
        self.position += len(data)
        if self._hasher is not None:
            self._hasher.update(data)
        return data

    def skip_to(self, position: int) -> None:
        """Go on at ``position``; what is skipped is hashed too."""
        if self._hasher is None:
            self.position = position
        while self.position < position:
            if not self.read(min(_PIECE, position - self.position)):
                break


def pieces(fd: int, start: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes from ``start`` to ``end`` of a file, each piece valid until the next; fewer at the file's end."""
    with memoryview(bytearray(min(_PIECE, max(end - start, 0)))) as buffer:
        while start < end:
            count = os.preadv(fd, [buffer[: min(_PIECE, end - start)]], start)
            if not count:
                break
            start += count
            with buffer[:count] as piece:
                yield piece


def digest_of_file(fd: int, size: int, hasher: Hasher) -> bytes:
    """Return the digest of the first ``size`` bytes of a file."""
    for piece in pieces(fd, 0, size):
        hasher.update(piece)
    return hasher.digest()


def load_elf(memory: ImageMemory, fd: int, size: int) -> tuple[elf.ElfImage, int | None]:
    """Load the ELF image that an open file of ``size`` bytes holds; return it with its PVH entry.

    Only what the program headers name is read. Raises KernelError; guest memory may hold a part of the kernel then.
    """
    header = elf.parse_header(read_at(fd, 0, elf.HEADER_SIZE), size)
    table = read_at(fd, header.table_offset, header.table_size)
    image = elf.parse_program_headers(header, table, size)
    elf.check_placement(image, memory.guest)
    entry = elf.pvh_entry(image, [read_at(fd, note.file_offset, note.size) for note in image.notes])
    for piece in image.pieces:
        if memory.prepare_huge(piece.address, piece.file_size):
            # No page has to be made for what is read, and none is saved by leaving zeros out.
            copied = memory.read_from_file(fd, piece.file_offset, piece.address, piece.file_size)
        else:
            copied = _copy_sparse(memory, fd, piece)
        if copied != piece.file_size:
            raise elf_error("kernel.elf.truncated", "Unable to read kernel image", "the file became shorter")
    return image, entry


def _copy_sparse(memory: ImageMemory, fd: int, segment: elf.Segment) -> int:
    """Copy a segment, leaving out blocks of zeros; return how many bytes the file had."""
    copied = 0
    for piece in pieces(fd, segment.file_offset, segment.file_offset + segment.file_size):
        memory.write_sparse(segment.address + copied, piece)
        copied += len(piece)
    return copied
