"""What a drive is served from: a regular file or a block device, and the errors that a client is to see."""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from base.errno_text import errno_text
from base.lean_typing import TYPE_CHECKING
from virtio.abi import SECTOR_SHIFT, SECTOR_SIZE, VIRTIO_BLK_ID_SIZE
from virtio.errors import BackingFileError

if TYPE_CHECKING:
    from base.lean_typing import Any

#: _IOR(0x12, 114, size_t): the size of a block device in bytes (linux/fs.h).
_BLKGETSIZE64 = 0x8008_1272
#: Larger ones have sectors whose offsets no system call takes.
MAX_SIZE = (1 << 63) - 1


class BackingFile:
    """An open file. The descriptor is ours from here on, also if it is refused (BackingFileError).

    ``size`` is in bytes, as it was when last looked at; the drive has ``sectors``, and what is behind the last whole
    one is not reachable.
    """

    def __init__(self, fd: int, *, read_only: bool) -> None:
        self._status = _status(fd)
        self.fd = fd
        self.read_only = read_only
        self.size = 0
        try:
            kind = self._status.st_mode
            self.is_block_device = stat.S_ISBLK(kind)
            if not self.is_block_device and not stat.S_ISREG(kind):
                raise BackingFileError(f"neither a regular file nor a block device, but {_KINDS[stat.S_IFMT(kind)]}")
            if not read_only and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
                raise BackingFileError("opened for reading only")
            self.refresh()
        except BackingFileError:
            self.close()
            raise

    def refresh(self) -> None:
        """Look at the size again. Raises BackingFileError."""
        try:
            if self.is_block_device:
                answer = fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8))
                (self.size,) = struct.unpack("<Q", answer)
            else:
                self.size = os.fstat(self.fd).st_size
        except OSError as error:
            raise _failed("its size cannot be read", error) from None
        if self.size > MAX_SIZE:
            raise BackingFileError(f"{self.size} bytes are too many for a drive")

    @property
    def sectors(self) -> int:
        """How many whole sectors it has."""
        return self.size >> SECTOR_SHIFT

    @property
    def cut(self) -> int:
        """How many bytes at its end are not reachable, for they are no whole sector."""
        return self.size % SECTOR_SIZE

    def identity(self) -> bytes:
        """Return the answer to GET_ID: 20 bytes, zeros at the end, of the numbers of device and inode as text."""
        status = self._status
        text = f"{status.st_dev}{status.st_rdev}{status.st_ino}".encode()
        return text[:VIRTIO_BLK_ID_SIZE].ljust(VIRTIO_BLK_ID_SIZE, b"\0")

    def close(self) -> None:
        """Close it. Harmless twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_backing_file(path: str, *, read_only: bool) -> BackingFile:
    """Open a file by its name. Raises BackingFileError: ``errno`` says why it cannot be opened, 0: what it is."""
    flags = os.O_RDONLY if read_only else os.O_RDWR
    try:
        # Not waiting: a FIFO without a writer would hold everybody up, before it is refused for what it is.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _failed("it cannot be opened", error) from None
    file = BackingFile(fd, read_only=read_only)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return file


def _status(fd: int) -> Any:
    try:
        return os.fstat(fd)
    except OSError as error:
        raise _failed("not an open file", error) from None


def _failed(what: str, error: OSError) -> BackingFileError:
    return BackingFileError(f"{what}: {errno_text(error)}", error.errno or 0)


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
    0: "an anonymous object",
}
