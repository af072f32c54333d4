"""Shared memory between processes: sealed memfds, aligned words, the fence.

Shared words are 64 bits wide, aligned, and touched only through ``memoryview.cast('Q')``: CPython reads and
writes such an element with one load or store. x86 keeps loads and stores in order but for one case: a store may
be overtaken by a later load of another word. Where that matters, call :func:`fence` in between.
"""

from __future__ import annotations

import _thread
import fcntl
import mmap
import os

from ipc.errors import LayoutError

PAGE_SIZE = 4096
_SIZE_LIMIT = 1 << 48

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: Linux 5.1; the fcntl module of Python 3.11 does not have it.
_F_SEAL_FUTURE_WRITE = 0x0010

#: ``with fence_lock: pass`` is what :func:`fence` does, for who cannot afford the call.
fence_lock = _thread.allocate_lock()


def fence() -> None:
    """Order every store before it against every load after it (a full barrier).

    Taking and releasing an uncontended lock executes locked instructions, which are full barriers on x86-64.
    Python has no other way to say it; tests/unit/ipc/test_shared_memory_fence.py is the litmus test. It must be a
    ``with`` statement: CPython switches threads and runs signal handlers after calls, not between entering and leaving
    an empty block. With acquire() and release() a handler that uses the fence too met the lock taken, for ever.
    """
    with fence_lock:
        pass


def create_shared(name: str, size: int) -> int:
    """Return the descriptor of a new memfd of ``size`` bytes that nobody can resize any more.

    A process that maps it can therefore not be killed (SIGBUS) by another one that truncates it.
    Raises LayoutError when the kernel refuses.
    """
    descriptor = _create(name, size)
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(descriptor)
        raise LayoutError(f"cannot seal shared memory {name!r}: {error.strerror}") from None
    return descriptor


def _create(name: str, size: int) -> int:
    if not 0 < size < _SIZE_LIMIT or size % PAGE_SIZE:
        raise LayoutError(f"size of shared memory {name!r} is not a positive multiple of {PAGE_SIZE}: {size}")
    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise LayoutError(f"cannot create shared memory {name!r}: {error.strerror}") from None
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        raise LayoutError(f"cannot size shared memory {name!r} to {size} bytes: {error.strerror}") from None
    return descriptor


def create_published(name: str, size: int) -> tuple[int, mmap.mmap]:
    """Return a new memfd as :func:`create_shared` makes it, and the only writable mapping that it will ever have.

    Whoever gets the descriptor can read it, and cannot write it, map it for writing, or take the seal away.
    Raises LayoutError.
    """
    descriptor = _create(name, size)
    try:
        mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS | _F_SEAL_FUTURE_WRITE)
    except OSError as error:
        os.close(descriptor)
        raise LayoutError(f"cannot map and seal shared memory {name!r}: {error.strerror}") from None
    return descriptor, mapping


def map_shared(descriptor: int, size: int, *, writable: bool = True) -> mmap.mmap:
    """Map exactly ``size`` bytes of a memfd; the descriptor stays with the caller.

    Raises LayoutError if the object has another size or could still be resized by its other holders.
    """
    try:
        # The seals first: a size that was read before they were on could have been changed since.
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        actual = os.fstat(descriptor).st_size
    except OSError as error:
        raise LayoutError(f"not a shared memory descriptor: {error.strerror}") from None
    if seals & _SEALS != _SEALS:
        raise LayoutError("shared memory is not sealed against resizing")
    if actual != size:
        raise LayoutError(f"shared memory has {actual} bytes, expected {size}")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection)
    except OSError as error:
        raise LayoutError(f"cannot map shared memory: {error.strerror}") from None
