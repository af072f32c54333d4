"""Mappings that keep no descriptor: of guest memory, beginning where huge pages do, and asking for those; of a vCPU.

Python's mmap module duplicates the descriptor and keeps it for as long as the mapping lives.

KVM maps 2 MiB of a guest at once where the host's page table does, and takes an exit for every 4 KiB where it does not.
A huge page needs a mapping whose addresses and file offsets agree modulo 2 MiB; Linux places a memfd's mapping so only
where the administrator has switched huge pages for shared memory on (docs/adr/huge-pages-under-the-kernel.md).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat

HUGE_PAGE_SIZE = 2 << 20
#: Linux 6.1; the mmap module of Python 3.11 does not have it.
_MADV_COLLAPSE = 25

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class GuestMapping:
    """``size`` bytes of the memfd ``descriptor``, mapped for reading (and writing, if ``writable``), at a multiple of
    2 MiB.

    It stays out of core dumps. ``view`` shows it as bytes. It is unmapped when neither this object nor a view of it is
    referred to any more. The descriptor stays the caller's. Raises OSError.
    """

    __slots__ = ("address", "size", "view")

    def __init__(self, descriptor: int, size: int, *, writable: bool = True) -> None:
        if size <= 0 or os.fstat(descriptor).st_size < size:
            # Beyond the end of the file an access would end the process.
            raise OSError(22, "the file is smaller than its mapping")
        self.address = _map(descriptor, size, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        self.size = size
        self.view = _view(self.address, size)
        try:
            self.advise(mmap.MADV_DONTDUMP, 0, size)
        except OSError:
            self.view.release()
            raise

    def advise(self, advice: int, offset: int, length: int) -> None:
        """madvise(2) for a part of the mapping. Raises OSError."""
        assert 0 <= offset <= offset + length <= self.size
        if _madvise(self.address + offset, length, advice) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def collapse(self, offset: int, length: int) -> bool:
        """Back whole blocks of 2 MiB by huge pages now, keeping what is in them; False if the kernel does not.

        Linux 6.1 can, whatever the administrator chose for huge pages of shared memory but ``deny``.
        """
        assert offset % HUGE_PAGE_SIZE == length % HUGE_PAGE_SIZE == 0
        for block in range(offset, offset + length, HUGE_PAGE_SIZE):
            # A block without any page is not collapsed, and Linux 6.1 says that it failed where none was mapped.
            self.view[block] = self.view[block]
        try:
            self.advise(_MADV_COLLAPSE, offset, length)
        except OSError:
            return False
        return True


class _Unmapping:
    """Mixed into the array that stands for the mapped memory: unmaps it when its last view goes."""

    def __del__(self) -> None:
        assert isinstance(self, ctypes.Array)
        _munmap(ctypes.addressof(self), ctypes.sizeof(self))


def map_read_only(descriptor: int, size: int) -> memoryview:
    """Return ``size`` bytes of what a descriptor stands for, mapped for reading until the view and its slices are gone.

    The descriptor stays the caller's. Raises OSError, also for a file that is smaller: an access would end the process.
    """
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size < size:
        raise OSError(errno.EINVAL, "the file is smaller than its mapping")
    address = _check(_mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0))
    return _view(address, size).toreadonly()


def _view(address: int, size: int) -> memoryview:
    array = type("MappedBytes", (_Unmapping, ctypes.c_ubyte * size), {})
    return memoryview(array.from_address(address)).cast("B")  # type: ignore[attr-defined]


def _map(descriptor: int, size: int, protection: int) -> int:
    """Map the file at a multiple of 2 MiB: reserve more than enough addresses, use some, give the rest back."""
    reserved = size + HUGE_PAGE_SIZE
    start = _check(_mmap(None, reserved, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0))
    address = -(-start // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
    try:
        _check(_mmap(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0))
    except OSError:
        _munmap(start, reserved)
        raise
    end = -(-(address + size) // mmap.PAGESIZE) * mmap.PAGESIZE
    if address > start:
        _munmap(start, address - start)
    if start + reserved > end:
        _munmap(end, start + reserved - end)
    return address


def _check(result: int | None) -> int:
    if result is None or result == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
