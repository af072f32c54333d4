"""A file as the maps and the header of an overlay are read and written: a few calls, so that a test can be the disk."""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from base.errno_text import errno_text
from virtio.block.engine import punch
from virtio.errors import OverlayError

#: _IOR(0x12, 114, size_t): the size of a block device in bytes (linux/fs.h).
_BLKGETSIZE64 = 0x8008_1272


class Storage:
    """An open file; the descriptor stays the caller's. Everything raises OSError."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @property
    def size(self) -> int:
        """Its length, in bytes; a block device's, too."""
        status = os.fstat(self.fd)
        if not stat.S_ISBLK(status.st_mode):
            return status.st_size
        (size,) = struct.unpack("<Q", fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8)))
        return int(size)

    @property
    def mtime_ns(self) -> int:
        """When it was written to last, in ns since 1970 (64 bits)."""
        return max(-1 << 63, min(os.fstat(self.fd).st_mtime_ns, (1 << 63) - 1))

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes; fewer at the end of the file."""
        parts = []
        while length and (part := os.pread(self.fd, length, offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it."""
        left = memoryview(data)
        while left:
            count = os.pwrite(self.fd, left, offset)
            left = left[count:]
            offset += count

    def sync(self) -> None:
        """What was written is on stable storage afterwards."""
        os.fdatasync(self.fd)

    def truncate(self, size: int) -> None:
        """Give it a length; what is new reads as zeros."""
        os.ftruncate(self.fd, size)

    def allocate(self, offset: int, length: int) -> None:
        """Have room for a range, so that a write to it does not fail for lack of it."""
        os.posix_fallocate(self.fd, offset, length)

    def punch(self, offset: int, length: int) -> None:
        """A range reads as zeros afterwards, and takes no space where the file system can do that."""
        punch(self.fd, offset, length)


def lock(fd: int, what: str, *, shared: bool) -> None:
    """Lock an open file until it is closed everywhere, in every process that was handed it. Raises OverlayError."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        user = "it is being changed" if shared else "it is in use"
        raise OverlayError(f"{what}: {user} by another process") from None
    except OSError as error:
        raise OverlayError(f"{what} cannot be locked: {errno_text(error)}") from None
