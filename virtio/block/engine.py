"""The seam between a block device and what does its I/O; and doing it in place, which every engine can."""

from __future__ import annotations

import ctypes
import errno
import os

from base.lean_typing import Any, NamedTuple, Sequence
from ipc.guest_memory import GuestMemory
from virtio.block.backing_file import BackingFile

READ = 0
WRITE = 1
FLUSH = 2
#: The content of the range is not needed: it takes no space afterwards where the file can do that, or nothing is done.
DISCARD = 3
#: Afterwards the range reads as zeros, and keeps its space; or need not keep it.
WRITE_ZEROES = 4
WRITE_ZEROES_UNMAP = 5

#: Parts that one system call takes (IOV_MAX).
_MAX_PARTS = 1024
_ZEROS = bytes(1 << 20)
# linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_FALLOC_FL_ZERO_RANGE = 16
# What fallocate(2) says where it cannot do a mode: the file system or block device at all, or not at this alignment.
_CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOSYS)

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class Buffer(NamedTuple):
    """Memory that is not the guest's: ``address`` is where ``view`` begins in this process."""

    view: memoryview
    address: int


class IoRequest(NamedTuple):
    """``length`` bytes at ``offset`` of the file; ``parts`` are (offset into ``GuestMemory.view``, length), no copies.

    ``token`` comes back with the completion. With a ``buffer`` the parts lie in that.
    """

    kind: int
    offset: int
    length: int
    parts: Sequence[tuple[int, int]]
    token: Any
    buffer: Buffer | None = None


class Engine:
    """One per backing file, which it owns. One path for all: submit, kick, completions.

    An engine that is done at once has the completion ready before ``submit`` returns. ``event`` is an eventfd that says
    that ``completions`` has something, to be watched edge-triggered and never read; -1 if nothing comes later.
    ``write_through``: a write is on stable storage before it is completed.
    """

    event = -1

    def __init__(self, file: BackingFile) -> None:
        self.file = file
        self.write_through = False
        self.in_flight = 0

    def start(self, memory: GuestMemory) -> None:
        """Work with this guest memory from now on. While nothing is in flight."""
        raise NotImplementedError

    def submit(self, request: IoRequest) -> bool:
        """Take a request; False: there is no room now, and a completion to come will make some."""
        raise NotImplementedError

    def kick(self) -> None:
        """Begin what was submitted since the last kick."""

    def completions(self) -> Sequence[tuple[Any, int]]:
        """Return (token, bytes done or -errno) of what was completed since; each once."""
        raise NotImplementedError

    def replace_file(self, file: BackingFile) -> None:
        """Work with another file, which it takes; the one before is closed. While nothing is in flight.

        It may be called behind the cell's seal. Raises OSError, and then works with the one before still.
        """
        before, self.file = self.file, file
        if before is not file:
            before.close()

    def close(self) -> None:
        """Give everything back, the file too. While nothing is in flight."""
        self.file.close()


def make_event(shared: int = -1) -> int:
    """Return an eventfd for an engine: a new one, or its own descriptor of one that it shares with another engine."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if shared < 0 else os.dup(shared)


def execute(fd: int, view: memoryview, request: IoRequest, *, write_through: bool) -> int:
    """Do a request now, and wait for it; return the bytes done (fewer at the end of the file), or -errno."""
    kind = request.kind
    try:
        if kind in (READ, WRITE):
            return _transfer(fd, view, request, os.RWF_DSYNC if write_through and kind == WRITE else 0)
        if kind == FLUSH:
            os.fdatasync(fd)
            return 0
        if request.length:
            _zero(fd, request)
            if write_through:
                os.fdatasync(fd)
        return request.length
    except OSError as error:
        return -(error.errno or errno.EIO)


def _transfer(fd: int, view: memoryview, request: IoRequest, flags: int) -> int:
    parts = request.parts
    if request.buffer is not None:
        view = request.buffer.view
    if len(parts) == 1:
        ((start, length),) = parts
        buffers = [view[start : start + length]]
    else:
        buffers = [view[start : start + length] for start, length in parts]
    done = 0
    while done < request.length:
        if request.kind == READ:
            count = os.preadv(fd, buffers[:_MAX_PARTS], request.offset + done)
        else:
            count = os.pwritev(fd, buffers[:_MAX_PARTS], request.offset + done, flags)
        if count <= 0:
            break
        done += count
        if done < request.length:
            buffers = _behind(buffers, count)
    return done


def _behind(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of some buffers behind their first ``count`` bytes."""
    index = 0
    while count >= len(buffers[index]):
        count -= len(buffers[index])
        index += 1
    return [buffers[index][count:], *buffers[index + 1 :]]


def punch(fd: int, offset: int, length: int) -> None:
    """A range reads as zeros afterwards, and takes no space where the file system can do that. Raises OSError."""
    _zero(fd, IoRequest(WRITE_ZEROES_UNMAP, offset, length, (), None))


def _zero(fd: int, request: IoRequest) -> None:
    """Raises OSError."""
    kind = request.kind
    mode = _FALLOC_FL_KEEP_SIZE | (_FALLOC_FL_ZERO_RANGE if kind == WRITE_ZEROES else _FALLOC_FL_PUNCH_HOLE)
    while _fallocate(fd, mode, request.offset, request.length) != 0:
        error = ctypes.get_errno()
        if error in _CANNOT:
            break
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))
    else:
        return
    if kind == DISCARD:
        return
    end = request.offset + request.length
    at = request.offset
    while at < end:
        at += os.pwrite(fd, _ZEROS[: end - at], at)
