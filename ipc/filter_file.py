"""Files of custom system call filters, as Firecracker's ``--seccomp-filter`` takes them: docs/formats/filter-file.md.

A map from the name of a thread to its BPF program, in the layout of the Rust crate bitcode 0.6, or in that of bincode
with integers of fixed size, which earlier versions of Firecracker wrote. Read by the jailer, written by seccompiler.
"""

from __future__ import annotations

import struct

from base.lean_typing import Mapping
from ipc.errors import FilterFileError

#: No larger file is read (Firecracker's limit).
MAX_FILE_SIZE = 100_000
#: BPF_MAXINSNS of linux/bpf_common.h.
MAX_INSTRUCTIONS = 4096
INSTRUCTION_SIZE = 8
MAX_NAME_LENGTH = 64
_U64 = struct.Struct("<Q")
#: A length from here on stands for itself in a list of its own.
_LONG = 255
#: How many small numbers go into a byte: (values of one, how many), by half of the packing's code, rounded up.
_BYTE_PACKINGS = ((256, 1), (16, 2), (6, 3), (4, 4), (3, 5), (2, 8))
#: Bytes of an integer, by half of the packing's code, rounded up.
_INTEGER_WIDTHS = (8, 4, 2, 1)
#: The first packing whose values go up to this one.
_LARGEST = {256: 255, 16: 15, 6: 5, 4: 3, 3: 2, 2: 1}
#: Lists that are not longer are not packed.
_UNPACKED_BYTES = 2
_UNPACKED_INTEGERS = 1


class _Input:
    """What is left of a file."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise FilterFileError("it ends in the middle")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self) -> int:
        value: int = _U64.unpack(self.take(8))[0]
        return value

    def end(self) -> None:
        if self._at != len(self._data):
            raise FilterFileError(f"{len(self._data) - self._at} bytes follow the last filter")


# ---------------------------------------------------------------- reading


def decode(data: bytes) -> dict[str, bytes]:
    """Return the programs by name, in the file's order. Raises FilterFileError."""
    if len(data) > MAX_FILE_SIZE:
        raise FilterFileError(f"it is larger than {MAX_FILE_SIZE} bytes")
    try:
        return _decode_bincode(_Input(data))
    except FilterFileError:
        return _decode_bitcode(_Input(data))


def _decode_bincode(source: _Input) -> dict[str, bytes]:
    filters: dict[str, bytes] = {}
    for _ in range(_bounded(source.number(), MAX_FILE_SIZE // 16)):
        name = _name(source.take(_bounded(source.number(), MAX_NAME_LENGTH)), filters)
        filters[name] = source.take(_bounded(source.number(), MAX_INSTRUCTIONS) * INSTRUCTION_SIZE)
    source.end()
    return filters


def _decode_bitcode(source: _Input) -> dict[str, bytes]:
    (count,) = _lengths(source, 1)
    name_lengths = _lengths(source, _bounded(count, MAX_FILE_SIZE))
    names = [source.take(_bounded(length, MAX_NAME_LENGTH)) for length in name_lengths]
    sizes = [_bounded(length, MAX_INSTRUCTIONS) for length in _lengths(source, count)]
    instructions = _integers(source, sum(sizes))
    source.end()
    filters: dict[str, bytes] = {}
    start = 0
    for raw, size in zip(names, sizes, strict=True):
        end = start + size * INSTRUCTION_SIZE
        filters[_name(raw, filters)] = instructions[start:end]
        start = end
    return filters


def _bounded(value: int, largest: int) -> int:
    if value > largest:
        raise FilterFileError(f"{value} is more than {largest}")
    return value


def _name(raw: bytes, known: Mapping[str, bytes]) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise FilterFileError("a name is not UTF-8") from None
    if name in known:
        raise FilterFileError(f"{name!r} is there twice")
    return name


def _lengths(source: _Input, count: int) -> list[int]:
    short = _small(source, count)
    return [source.number() if length == _LONG else length for length in short]


def _small(source: _Input, count: int) -> bytes:
    """Numbers of a byte each, several to a byte where they are small enough."""
    if count <= _UNPACKED_BYTES:
        return source.take(count)
    code = source.take(1)[0]
    if (code + 1) // 2 >= len(_BYTE_PACKINGS):
        raise FilterFileError(f"packing {code} does not exist")
    least = source.take(1)[0] if code % 2 else 0
    values, together = _BYTE_PACKINGS[(code + 1) // 2]
    if together == 1:
        return source.take(count)
    numbers = bytearray()
    for packed in source.take(-(-count // together)):
        rest = packed
        for _ in range(together):
            numbers.append((rest % values + least) % 256)
            rest //= values
    return bytes(numbers[:count])


def _integers(source: _Input, count: int) -> bytes:
    """Return ``count`` u64, little-endian."""
    _bounded(count, MAX_FILE_SIZE)
    if count <= _UNPACKED_INTEGERS:
        return source.take(count * 8)
    code = source.take(1)[0]
    if (code + 1) // 2 >= len(_INTEGER_WIDTHS):
        raise FilterFileError(f"packing {code} does not exist")
    least = source.number() if code % 2 else 0
    width = _INTEGER_WIDTHS[(code + 1) // 2]
    packed = _small(source, count) if width == 1 else source.take(count * width)
    values = [int.from_bytes(packed[at : at + width], "little") for at in range(0, count * width, width)]
    return b"".join([_U64.pack((value + least) % (1 << 64)) for value in values])


# ---------------------------------------------------------------- writing


def encode(filters: Mapping[str, bytes]) -> bytes:
    """Return the content of a file, in bitcode's layout; programs are whole instructions. Raises FilterFileError."""
    names = sorted(filters)
    programs = [filters[name] for name in names]
    out = [_pack_lengths([len(names)])]
    out.append(_pack_lengths([len(name.encode()) for name in names]))
    out.extend([name.encode() for name in names])
    out.append(_pack_lengths([len(program) // INSTRUCTION_SIZE for program in programs]))
    if sum(map(len, programs)) > _UNPACKED_INTEGERS * INSTRUCTION_SIZE:
        out.append(b"\0")  # integers as they are: an operation code makes nearly every instruction a large number
    out.extend(programs)
    content = b"".join(out)
    if len(content) > MAX_FILE_SIZE:
        raise FilterFileError(f"it would be larger than {MAX_FILE_SIZE} bytes")
    return content


def _pack_lengths(lengths: list[int]) -> bytes:
    long = [length for length in lengths if length >= _LONG]
    return _pack_small([min(length, _LONG) for length in lengths]) + b"".join(map(_U64.pack, long))


def _pack_small(numbers: list[int]) -> bytes:
    if len(numbers) <= _UNPACKED_BYTES:
        return bytes(numbers)
    code = max(at for at, (values, _) in enumerate(_BYTE_PACKINGS) if max(numbers) <= _LARGEST[values])
    values, together = _BYTE_PACKINGS[code]
    if together == 1:
        return bytes([code * 2, *numbers])
    groups = [numbers[at : at + together] for at in range(0, len(numbers), together)]
    return bytes([code * 2, *(sum(number * values**place for place, number in enumerate(each)) for each in groups)])
