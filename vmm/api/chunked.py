"""A body in chunks (RFC 9112, section 7.1), without I/O: from the start of a buffer, however it was filled.

Chunk extensions and trailers are bounded and left out. What is malformed is refused, line ends without their CR too:
where the next request begins could not be known.
"""

from __future__ import annotations

from base.lean_typing import Final
from vmm.errors import VmmError

#: A line with the size of a chunk, or of the trailers, with its CR LF must fit into this many bytes.
LINE_LIMIT: Final = 1024
#: Bytes of extensions and trailers, together.
OVERHEAD_LIMIT: Final = 64 << 10
#: A line with a size that is not longer has no overhead.
_PLAIN_SIZE_LINE: Final = 16
#: No more digits than a number of 32 bits has, as for Content-Length.
_MAX_DIGITS: Final = 8
_HEX_DIGITS: Final = frozenset(b"0123456789abcdefABCDEF")

_SIZE, _DATA, _DATA_END, _TRAILERS = range(4)


class ChunkError(VmmError):
    """The chunks are malformed."""

    code = "vmm.http"


class ChunksTooLargeError(VmmError):
    """The chunks hold more than the limit."""

    code = "vmm.http"


class ChunkedBody:
    """One body. ``size`` is what its chunks have announced so far, in bytes; ``data`` is what has come of it."""

    __slots__ = ("data", "size", "_limit", "_keep", "_state", "_remaining", "_overhead")

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.size = 0
        self._limit = limit
        self._keep = True
        self._state = _SIZE
        #: Bytes of the chunk that are still to come.
        self._remaining = 0
        self._overhead = 0

    def discard(self, limit: int) -> None:
        """Keep nothing of what comes from now on, up to another limit."""
        self._keep = False
        self.data.clear()
        self._limit = limit

    def take(self, buffer: bytearray) -> bool:
        """Take what belongs to the body from the start of the buffer; True when its end was reached.

        Raises ChunkError, or ChunksTooLargeError as soon as a chunk is announced that exceeds the limit.
        """
        while True:
            if self.size > self._limit:
                raise ChunksTooLargeError(f"a body in chunks of more than {self._limit} bytes")
            if self._state == _DATA:
                if not self._take_data(buffer):
                    return False
            elif self._state == _DATA_END:
                if len(buffer) < 2:
                    return False
                if not buffer.startswith(b"\r\n"):
                    raise ChunkError("a chunk is longer than its size")
                del buffer[:2]
                self._state = _SIZE
            else:
                line = _take_line(buffer)
                if line is None:
                    return False
                if self._state == _SIZE:
                    self._begin_chunk(line)
                elif not line:
                    return True
                else:
                    self._pass_trailer(line)

    def _take_data(self, buffer: bytearray) -> bool:
        count = min(self._remaining, len(buffer))
        if self._keep:
            self.data += buffer[:count]
        del buffer[:count]
        self._remaining -= count
        if self._remaining:
            return False
        self._state = _DATA_END
        return True

    def _begin_chunk(self, line: bytes) -> None:
        digits = line.partition(b";")[0].rstrip(b" \t")
        if not digits or not _HEX_DIGITS.issuperset(digits) or len(digits.lstrip(b"0")) > _MAX_DIGITS:
            raise ChunkError("the size of a chunk is no number of 32 bits")
        self._add_overhead(len(line) - _PLAIN_SIZE_LINE)
        self._remaining = int(digits, 16)
        self.size += self._remaining
        self._state = _DATA if self._remaining else _TRAILERS

    def _pass_trailer(self, line: bytes) -> None:
        if b":" not in line:
            raise ChunkError("a trailer without a colon")
        self._add_overhead(len(line) + 2)

    def _add_overhead(self, count: int) -> None:
        self._overhead += max(0, count)
        if self._overhead > OVERHEAD_LIMIT:
            raise ChunkError("too much besides the chunks")


def _take_line(buffer: bytearray) -> bytes | None:
    """Take a line from the buffer and return it without its CR LF; None if it is not complete. Raises ChunkError."""
    end = buffer.find(b"\r\n", 0, LINE_LIMIT)
    if end < 0:
        if len(buffer) >= LINE_LIMIT:
            raise ChunkError("a line is too long")
        return None
    line = bytes(buffer[:end])
    if b"\n" in line or b"\r" in line:
        raise ChunkError("a line ends without CR LF")
    del buffer[: end + 2]
    return line
