"""Opening the files that clients name. The controller's root is the jail root, so paths are looked up inside it.

Every descriptor is close-on-exec, and no open blocks: a FIFO without a peer, or a device, must not stop the loop.
"""

from __future__ import annotations

import errno
import os
import stat

from base.errno_text import errno_text
from vmm.errors import VmmError

#: Permissions of created files before the umask takes effect.
CREATE_MODE = 0o666

_NUL_TEXT = "file name contained an unexpected NUL byte"


class FileOpenError(VmmError):
    """A file cannot be opened; the text is ``TEXT (os error N)`` in the words of ``base.errno_text``."""

    code = "vmm.file"


def open_input(path: str, *, writable: bool = False) -> int:
    """Open a regular file or block device, for reading or both, and return the descriptor. Raises FileOpenError."""
    flags = os.O_RDWR if writable else os.O_RDONLY
    return _checked(_open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), stat.S_IFREG, stat.S_IFBLK)


def open_kept(path: str) -> int:
    """Open a regular file for reading and writing, create it if missing, and return the descriptor.

    Raises FileOpenError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    return _checked(_open(path, flags), stat.S_IFREG)


def open_output(path: str) -> int:
    """Open a file or FIFO for appending without ever blocking, create it if missing, and return the descriptor.

    A FIFO that nobody reads is held open for reading too: what does not fit into it is lost, but readers may come
    and go. Raises FileOpenError.
    """
    flags = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | os.O_APPEND
    try:
        return _open(path, flags | os.O_WRONLY | os.O_CREAT)
    except FileOpenError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno != errno.ENXIO:
            raise
    return _open(path, flags | os.O_RDWR)


def open_replaced(path: str) -> int:
    """Open a file for writing, create it if missing, else empty it, and return the descriptor. Raises FileOpenError."""
    return _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK)


def read_text(path: str, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes. Raises FileOpenError."""
    fd = open_input(path)
    try:
        parts: list[bytes] = []
        room = limit + 1
        while room and (part := os.read(fd, min(room, 1 << 16))):
            parts.append(part)
            room -= len(part)
    except OSError as error:
        raise FileOpenError(errno_text(error)) from error
    finally:
        os.close(fd)
    if not room:
        raise FileOpenError(f"the file is larger than {limit} bytes")
    return b"".join(parts)


def _checked(fd: int, *kinds: int) -> int:
    """Return a descriptor of a file of these kinds; another one is closed. Raises FileOpenError."""
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind in kinds:
        return fd
    os.close(fd)
    raise FileOpenError(errno_text(errno.EISDIR) if kind == stat.S_IFDIR else "not a regular file")


def _open(path: str, flags: int) -> int:
    try:
        # Paths in JSON are UTF-8 whatever the locale says; those of the command line may hold any byte.
        return os.open(path.encode(errors="surrogateescape"), flags, CREATE_MODE)
    except OSError as error:
        raise FileOpenError(errno_text(error)) from error
    except ValueError as error:
        raise FileOpenError(_NUL_TEXT) from error
