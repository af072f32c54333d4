"""The files that the command is given: opened, looked at and locked."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from base.errno_text import errno_text
from virtio.block.overlay.storage import Storage, lock
from virtio.errors import OverlayError


@contextmanager
def opened(path: Path, what: str, *, writable: bool, locked: bool = True) -> Iterator[Storage]:
    """Open a regular file or block device, and lock it as it is used: a reader shares it. Raises OverlayError."""
    fd = _open(path, what, os.O_RDWR if writable else os.O_RDONLY)
    try:
        kind = os.fstat(fd).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise OverlayError(f"{what} {path}: neither a regular file nor a block device")
        if locked:
            lock(fd, f"{what} {path}", shared=not writable)
        with named(f"{what} {path}"):
            yield Storage(fd)
    finally:
        os.close(fd)


@contextmanager
def created(path: Path) -> Iterator[Storage]:
    """Open a file for a new overlay, which is removed again if it was not there and making it fails."""
    is_new = not path.exists()
    fd = _open(path, "the overlay", os.O_RDWR | os.O_CREAT)
    try:
        lock(fd, f"the overlay {path}", shared=False)
        with named(f"the overlay {path}"):
            yield Storage(fd)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Put a file's name before what is wrong with it."""
    try:
        yield
    except OverlayError as error:
        if str(error).startswith(("the overlay ", "the base ")):
            raise
        raise OverlayError(f"{what}: {error}") from error


def is_in_use(disk: Storage) -> bool:
    """Whether another process has a lock of a file."""
    try:
        lock(disk.fd, "", shared=False)
    except OverlayError:
        return True
    return False


def _open(path: Path, what: str, flags: int) -> int:
    try:
        # Not waiting: a FIFO is refused for what it is.
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o644)
    except OSError as error:
        raise OverlayError(f"{what} {path} cannot be opened: {errno_text(error)}") from error
