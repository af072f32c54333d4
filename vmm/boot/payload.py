"""Unpacking the compressed payload of a bzImage on the host, so that the guest need not.

The payload is a compressed vmlinux followed by its size (32 bits, little-endian; for gzip that is the stream's own
trailer). Both are untrusted: output stops at the announced size, that size is bounded by the caller, windows and
dictionaries have limits, and pieces of output have a fixed upper size whatever the input says.
"""

from __future__ import annotations

import sys

from base.lean_import import import_core
from base.lean_typing import Any, Callable, Iterator
from vmm.boot.errors import PayloadError, UnsupportedPayloadError

GZIP = "gzip"
XZ = "xz"
ZSTD = "zstd"
LZ4 = "lz4"

#: No kernel that is entered directly comes near; a debug build of vmlinux is stripped before it is packed.
MAX_UNPACKED_SIZE = 512 << 20
#: Kernels are packed with dictionaries of 32 MiB and 128 MiB; liblzma needs a little more than the dictionary.
XZ_MEMORY_LIMIT = 160 << 20
#: zstd -22 --ultra uses windows of 128 MiB.
ZSTD_WINDOW_LIMIT = 128 << 20

_INPUT_PIECE = 256 * 1024
_OUTPUT_PIECE = 1 << 20
_SIZE_BYTES = 4

_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
#: The legacy frame's blocks hold this much, the last one less. lz4's bound for a block that does not shrink follows.
_LZ4_BLOCK_SIZE = 8 << 20
_LZ4_PACKED_LIMIT = _LZ4_BLOCK_SIZE + _LZ4_BLOCK_SIZE // 255 + 16

_MAGICS = (
    (b"\x1f\x8b", GZIP),
    (b"\xfd7zXZ\0", XZ),
    (b"\x28\xb5\x2f\xfd", ZSTD),
    (_LZ4_LEGACY_MAGIC, LZ4),
)
#: The compiled modules themselves: the packages around them load typing, re, platform and thirty others at each start.
_MODULES = {GZIP: "zlib", XZ: "_lzma", ZSTD: "zstandard.backend_c", LZ4: "lz4.block._block"}
MAGIC_SIZE = 6

Read = Callable[[int], bytes]
Sink = Callable[[bytes], None]


def detect(start: bytes) -> str | None:
    """Name the compression of a payload from its first ``MAGIC_SIZE`` bytes; None for one that is unknown here."""
    for magic, kind in _MAGICS:
        if start.startswith(magic):
            return kind
    return None


def warm() -> None:
    """Import the decompressors: in a cell's empty root nothing can be imported any more.

    They are not used here: their working memory would become part of every cell.
    """
    for kind in _MODULES:
        _module(kind)


def unpack(kind: str, read: Read, size: int, unpacked_size: int, sink: Sink) -> None:
    """Unpack a payload of ``size`` bytes, size field included, which ``read(n)`` yields in order.

    ``unpacked_size`` is what the size field says (``announced_size``); exactly as much reaches ``sink``, in pieces of
    at most 8 MiB. Raises PayloadError; UnsupportedPayloadError when the decompressor is not there. What ``sink``
    raises passes through.
    """
    if kind == GZIP:
        pieces = _gunzip(_Limited(read, size))
    else:
        source = _Limited(read, size - _SIZE_BYTES)
        if kind == XZ:
            pieces = _unxz(source)
        elif kind == ZSTD:
            pieces = _unzstd(source)
        else:
            pieces = _unlz4(source)
    total = 0
    while True:
        # Only the decompressor's errors are ours; those of the sink are the caller's.
        try:
            piece = next(pieces, None)
        except MemoryError:
            raise PayloadError("payload.memory", f"unpacking the {kind} payload needs too much memory") from None
        if piece is None:
            break
        total += len(piece)
        if total > unpacked_size:
            raise PayloadError(
                "payload.size", f"the {kind} payload unpacks to more than the {unpacked_size} bytes it says"
            )
        sink(piece)
    if total != unpacked_size:
        raise PayloadError("payload.size", f"the {kind} payload unpacks to {total} bytes and says {unpacked_size}")


def announced_size(trailer: bytes, limit: int) -> int:
    """Read the unpacked size from the last 4 bytes of a payload. Raises PayloadError when it exceeds ``limit``."""
    size = int.from_bytes(trailer, "little")
    if len(trailer) != _SIZE_BYTES or not 0 < size <= min(limit, MAX_UNPACKED_SIZE):
        raise PayloadError("payload.size", f"the payload says that it unpacks to {size} bytes, more than fits")
    return size


class _Limited:
    """Reads at most ``size`` bytes in all."""

    __slots__ = ("_read", "left")

    def __init__(self, read: Read, size: int) -> None:
        if size <= 0:
            raise PayloadError("payload.truncated", "the payload is too short")
        self._read = read
        self.left = size

    def read(self, size: int = _INPUT_PIECE) -> bytes:
        """Return up to ``size`` bytes, nothing at the end."""
        size = min(size if size >= 0 else _INPUT_PIECE, self.left)
        if not size:
            return b""
        data = self._read(size)
        if len(data) > size or not data:
            raise PayloadError("payload.truncated", "the kernel file ended within the payload")
        self.left -= len(data)
        return data

    def read_exactly(self, size: int) -> bytes:
        """Return ``size`` bytes. Raises PayloadError when fewer are left."""
        parts = []
        while size:
            part = self.read(size)
            if not part:
                raise PayloadError("payload.truncated", "the payload ends within a block")
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _gunzip(source: _Limited) -> Iterator[bytes]:
    zlib = _module(GZIP)
    decompressor = zlib.decompressobj(wbits=31)
    try:
        while not decompressor.eof:
            data = decompressor.unconsumed_tail or source.read()
            piece = decompressor.decompress(data, _OUTPUT_PIECE)
            if piece:
                yield piece
            elif not data:
                raise PayloadError("payload.truncated", "the gzip payload ends too early")
    except zlib.error as error:
        raise PayloadError("payload.damaged", f"the gzip payload is damaged: {error}") from None
    _check_rest(GZIP, source, decompressor.unused_data)


def _unxz(source: _Limited) -> Iterator[bytes]:
    lzma = _module(XZ)
    try:
        decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=XZ_MEMORY_LIMIT)
        while not decompressor.eof:
            data = source.read() if decompressor.needs_input else b""
            if decompressor.needs_input and not data:
                raise PayloadError("payload.truncated", "the xz payload ends too early")
            piece = decompressor.decompress(data, _OUTPUT_PIECE)
            if piece:
                yield piece
    except lzma.LZMAError as error:
        raise PayloadError("payload.damaged", f"the xz payload is damaged: {error}") from None
    _check_rest(XZ, source, decompressor.unused_data)


def _unzstd(source: _Limited) -> Iterator[bytes]:
    zstandard = _module(ZSTD)
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_LIMIT)
    try:
        with decompressor.stream_reader(source, read_size=_INPUT_PIECE, closefd=False) as reader:
            while piece := reader.read(_OUTPUT_PIECE):
                yield piece
    except zstandard.ZstdError as error:
        raise PayloadError("payload.damaged", f"the zstd payload is damaged: {error}") from None
    _check_rest(ZSTD, source, b"")


def _unlz4(source: _Limited) -> Iterator[bytes]:
    block = _module(LZ4)
    if source.read_exactly(4) != _LZ4_LEGACY_MAGIC:
        raise PayloadError("payload.damaged", "the lz4 payload has no legacy frame")
    while source.left:
        header = source.read_exactly(4)
        if header == _LZ4_LEGACY_MAGIC:
            continue
        size = int.from_bytes(header, "little")
        if not 0 < size <= _LZ4_PACKED_LIMIT:
            raise PayloadError("payload.damaged", f"the lz4 payload has a block of {size} bytes")
        packed = source.read_exactly(size)
        try:
            piece = block.decompress(packed, uncompressed_size=_LZ4_BLOCK_SIZE)
        except (block.LZ4BlockError, ValueError) as error:
            raise PayloadError("payload.damaged", f"the lz4 payload is damaged: {error}") from None
        del packed
        if piece:
            yield piece


def _check_rest(kind: str, source: _Limited, unused: bytes) -> None:
    if source.left or unused:
        raise PayloadError("payload.damaged", f"the {kind} payload ends before its size field")


def _module(kind: str) -> Any:
    name = _MODULES[kind]
    module = sys.modules.get(name)
    if module is None:
        try:
            module = import_core(name)
        except ImportError:
            raise UnsupportedPayloadError(
                "payload.module", f"{kind} cannot be unpacked: the Python module {name} is not loaded"
            ) from None
    return module


__all__ = [
    "GZIP",
    "LZ4",
    "MAX_UNPACKED_SIZE",
    "XZ",
    "ZSTD",
    "announced_size",
    "detect",
    "unpack",
    "warm",
]
