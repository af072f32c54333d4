"""ELF64 kernels (vmlinux): headers, the PVH entry note, and loading into guest memory.

Sources: System V ABI (ELF-64 object file format), Xen's public/elfnote.h (XEN_ELFNOTE_PHYS32_ENTRY). The image is
untrusted: everything read from it is bounded and checked against the file and guest RAM before a byte is written.

Segments go where they say, also below 1 MiB and over each other: what the file has for a later program header wins,
as when they are copied one after the other. What boots the kernel is written after it and wins over all of them.
"""

from __future__ import annotations

import struct

from base.lean_typing import Iterator, NamedTuple
from ipc.guest_memory import GuestMemory
from vmm import layout
from vmm.boot.errors import elf_error, memory_error
from vmm.boot.image_memory import ImageMemory

MAGIC = b"\x7fELF"
HEADER_SIZE = 64
#: No kernel has more than a handful; the limit bounds the work for a hostile one.
MAX_PROGRAM_HEADERS = 64
MAX_NOTE_SEGMENTS = 8
MAX_NOTES_SIZE = 64 * 1024

_HEADER = struct.Struct("<4sBBBB8xHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_NOTE_HEADER = struct.Struct("<III")
assert _HEADER.size == HEADER_SIZE
assert _PROGRAM_HEADER.size == 56
assert _NOTE_HEADER.size == 12

_CLASS_64 = 2
_DATA_LITTLE_ENDIAN = 1
_MACHINE_X86_64 = 62
_PT_LOAD = 1
_PT_NOTE = 4
_XEN_NAME = b"Xen\0"
_XEN_PHYS32_ENTRY = 18
_NOTE_PADDING = 4
_PVH_ENTRY_SIZE = 4
_U64_END = 1 << 64


class ElfHeader(NamedTuple):
    """What matters of the ELF header; the program header table lies at ``table_offset``, ``table_size`` bytes."""

    entry: int
    table_offset: int
    table_size: int


class Segment(NamedTuple):
    """``file_size`` bytes at ``file_offset`` go to guest address ``address``; zeros follow up to ``memory_size``."""

    file_offset: int
    file_size: int
    address: int
    memory_size: int


class NoteSegment(NamedTuple):
    """Notes in the file."""

    file_offset: int
    size: int


class ElfImage(NamedTuple):
    """A checked image. ``start`` and ``end`` are the guest addresses that it covers, zeros included.

    ``pieces`` are what is to be copied: of ``segments`` what no later one covers, so that the order does not matter.
    ``entry`` is where the 64-bit protocol enters; a kernel that is entered by PVH may have anything there.
    """

    entry: int
    segments: tuple[Segment, ...]
    pieces: tuple[Segment, ...]
    notes: tuple[NoteSegment, ...]
    start: int
    end: int


def parse_header(header: bytes, file_size: int) -> ElfHeader:
    """Parse the first 64 bytes of a file of ``file_size`` bytes. Raises KernelError."""
    if len(header) < HEADER_SIZE:
        raise elf_error("kernel.elf.truncated", "Unable to read elf header", "the file ends within it")
    fields = _HEADER.unpack_from(header)
    magic, elf_class, data, _, _, _, machine, _, entry, table_offset, _, _, _, entry_size, count = fields[:15]
    if magic != MAGIC:
        raise elf_error("kernel.elf.magic", "Invalid Elf magic number")
    if data != _DATA_LITTLE_ENDIAN:
        raise elf_error("kernel.elf.byte_order", "Trying to load big-endian binary on little-endian machine")
    if elf_class != _CLASS_64 or machine != _MACHINE_X86_64:
        raise elf_error("kernel.elf.machine", "Invalid Elf magic number", "not a 64-bit x86 kernel")
    if entry_size != _PROGRAM_HEADER.size:
        raise elf_error("kernel.elf.table", "Invalid program header size")
    if table_offset < HEADER_SIZE:
        raise elf_error("kernel.elf.table", "Invalid program header offset")
    if not 0 < count <= MAX_PROGRAM_HEADERS:
        raise elf_error("kernel.elf.table", "Unable to read program header", f"{count} of them")
    if table_offset + count * entry_size > file_size:
        raise elf_error("kernel.elf.truncated", "Unable to read program header", "the file ends before them")
    if entry < layout.HIGH_MEMORY_ADDRESS:
        raise elf_error("kernel.elf.entry", "Invalid entry address", f"{entry:#x} is below 1 MiB")
    return ElfHeader(entry, table_offset, count * entry_size)


def parse_program_headers(header: ElfHeader, table: bytes, file_size: int) -> ElfImage:
    """Parse the program header table. Raises KernelError."""
    if len(table) < header.table_size:
        raise elf_error("kernel.elf.truncated", "Unable to read program header")
    segments: list[Segment] = []
    notes: list[NoteSegment] = []
    for kind, _, offset, _, address, in_file, in_memory, _ in _PROGRAM_HEADER.iter_unpack(table[: header.table_size]):
        if kind == _PT_LOAD and (in_memory or in_file):
            segment = Segment(offset, in_file, address, max(in_file, in_memory))
            _check_segment(segment, file_size)
            segments.append(segment)
        elif kind == _PT_NOTE and in_file:
            notes.append(_note_segment(offset, in_file, file_size))
    if not segments:
        raise elf_error("kernel.elf.empty", "Unable to read kernel image", "it has no loadable segment")
    if len(notes) > MAX_NOTE_SEGMENTS or sum(note.size for note in notes) > MAX_NOTES_SIZE:
        raise elf_error("kernel.elf.notes", "Unable to read note header", "the notes are too large for a kernel")
    return ElfImage(
        header.entry,
        tuple(segments),
        tuple(_pieces(segments)),
        tuple(notes),
        min(segment.address for segment in segments),
        max(segment.address + segment.memory_size for segment in segments),
    )


def _check_segment(segment: Segment, file_size: int) -> None:
    if segment.file_offset + segment.file_size > file_size:
        raise elf_error("kernel.elf.truncated", "Unable to read kernel image", "a segment ends beyond the file")
    if segment.address + segment.memory_size > _U64_END:
        raise elf_error(
            "kernel.elf.segment", "Invalid Program Header Address", f"{segment.address:#x}: it ends beyond 64 bits"
        )


def _pieces(segments: list[Segment]) -> Iterator[Segment]:
    """Yield what the file has for each segment and for no later one, at most twice as many pieces as segments."""
    covered: list[tuple[int, int]] = []  # disjoint, ascending
    for segment in reversed(segments):
        if not segment.file_size:
            continue
        position, end = segment.address, segment.address + segment.file_size
        for low, high in covered:
            if low < end and position < high:
                if position < low:
                    yield _part(segment, position, low)
                position = high
        if position < end:
            yield _part(segment, position, end)
        covered = _united([*covered, (segment.address, end)])


def _part(segment: Segment, start: int, end: int) -> Segment:
    """Return what a segment has for the addresses from ``start`` to ``end``."""
    return Segment(segment.file_offset + start - segment.address, end - start, start, end - start)


def _united(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same addresses as disjoint ranges, ascending."""
    united: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if united and low <= united[-1][1]:
            united[-1] = (united[-1][0], max(high, united[-1][1]))
        else:
            united.append((low, high))
    return united


def _note_segment(offset: int, size: int, file_size: int) -> NoteSegment:
    if offset + size > file_size:
        raise elf_error("kernel.elf.truncated", "Unable to read note header", "the notes end beyond the file")
    return NoteSegment(offset, size)


def check_entry(image: ElfImage, entry: int) -> None:
    """Raise KernelError unless ``entry`` lies in a loaded segment."""
    for segment in image.segments:
        if segment.address <= entry < segment.address + segment.memory_size:
            return
    raise elf_error("kernel.elf.entry", "Invalid entry address", f"{entry:#x} is in no loadable segment")


def find_pvh_entry(notes: bytes) -> int | None:
    """Find the 32-bit PVH entry in one note segment; None when it has none. Raises KernelError.

    The fields of a note are padded to 4 bytes, as Linux has it (include/linux/elfnote.h), whatever alignment the
    program header names.
    """
    position = 0
    while position + _NOTE_HEADER.size <= len(notes):
        name_size, descriptor_size, kind = _NOTE_HEADER.unpack_from(notes, position)
        name_start = position + _NOTE_HEADER.size
        start = name_start + -(-name_size // _NOTE_PADDING) * _NOTE_PADDING
        end = start + descriptor_size
        if end > len(notes):
            raise elf_error("kernel.elf.notes", "Unable to read note header", "a note ends beyond its segment")
        if kind == _XEN_PHYS32_ENTRY and notes[name_start : name_start + name_size] == _XEN_NAME:
            if descriptor_size < _PVH_ENTRY_SIZE:
                raise elf_error("kernel.elf.notes", "Invalid PVH note header")
            return int.from_bytes(notes[start : start + _PVH_ENTRY_SIZE], "little")
        position = start + -(-descriptor_size // _NOTE_PADDING) * _NOTE_PADDING
    return None


def pvh_entry(image: ElfImage, notes: list[bytes]) -> int | None:
    """Find the PVH entry among the contents of ``image.notes`` (same order). Raises KernelError."""
    for content in notes:
        entry = find_pvh_entry(content)
        if entry is not None:
            check_entry(image, entry)
            return entry
    return None


def check_placement(image: ElfImage, memory: GuestMemory) -> None:
    """Raise KernelError unless every segment, zeros included, fits into the first RAM region."""
    ram = memory.regions[0].size
    if image.end > ram:
        raise memory_error(f"the kernel ends at {image.end:#x}, RAM below the first gap at {ram:#x}")


class ElfStreamLoader:
    """Loads an image that arrives in order and in pieces of any size, without keeping it.

    The headers and the program header table must come within the first ``PREFIX_SIZE`` bytes, as in every kernel.
    Pieces are at most what the unpacker yields; nothing is written before the headers were checked.
    """

    PREFIX_SIZE = 64 * 1024

    def __init__(self, memory: ImageMemory, file_size: int) -> None:
        self._memory = memory
        self._file_size = file_size
        self._prefix_size = min(self.PREFIX_SIZE, file_size)
        self._prefix = bytearray()
        self._position = 0
        self._image: ElfImage | None = None
        self._notes: list[bytearray] = []

    def feed(self, piece: bytes | memoryview) -> None:
        """Take the next ``piece`` of the file. Raises KernelError."""
        if self._image is None:
            if self._prefix or len(piece) < self._prefix_size:
                self._prefix += piece
                if len(self._prefix) < self._prefix_size:
                    return
                piece = bytes(self._prefix)
            self._image = self._parse(bytes(piece[: self._prefix_size]))
            self._prefix = bytearray()
            self._notes = [bytearray(note.size) for note in self._image.notes]
        self._scatter(self._image, piece)
        self._position += len(piece)

    def _parse(self, prefix: bytes) -> ElfImage:
        header = parse_header(prefix[:HEADER_SIZE], self._file_size)
        if header.table_offset + header.table_size > len(prefix):
            raise elf_error("kernel.elf.table", "Invalid program header offset", "too far from the start of the file")
        table = prefix[header.table_offset : header.table_offset + header.table_size]
        image = parse_program_headers(header, table, self._file_size)
        check_placement(image, self._memory.guest)
        for piece in image.pieces:
            self._memory.prepare_huge(piece.address, piece.file_size)
        return image

    def _scatter(self, image: ElfImage, piece: bytes | memoryview) -> None:
        start, end = self._position, self._position + len(piece)
        view = memoryview(piece)
        for part in image.pieces:
            low = max(start, part.file_offset)
            high = min(end, part.file_offset + part.file_size)
            if low < high:
                self._memory.write_sparse(part.address + low - part.file_offset, view[low - start : high - start])
        for note, content in zip(image.notes, self._notes, strict=True):
            low = max(start, note.file_offset)
            high = min(end, note.file_offset + note.size)
            if low < high:
                content[low - note.file_offset : high - note.file_offset] = view[low - start : high - start]

    def finish(self) -> tuple[ElfImage, int | None]:
        """Return the image and its PVH entry once all of the file was fed. Raises KernelError."""
        if self._image is None or self._position != self._file_size:
            raise elf_error("kernel.elf.truncated", "Unable to read kernel image", "it ends too early")
        return self._image, pvh_entry(self._image, [bytes(content) for content in self._notes])


def is_elf(start: bytes) -> bool:
    """Tell whether a file that begins with ``start`` claims to be ELF."""
    return start[:4] == MAGIC
