"""Closing the free places between objects that all cells share, so that what a cell allocates lies on pages of its own.

A cell that allocates from a free place writes to a page that it shared, and has all of that page for itself from then
on. What is free is learnt from the interpreter (its report on small objects, ``sys._debugmallocstats``) and from
malloc (mallinfo2 of mallinfo(3)).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys

from base.lean_typing import Iterator

_MAX_REPORT_SIZE = 65536
_BYTES_HEADER = 33
#: More than an interpreter that has imported the product ever leaves free of one size.
_MAX_FREE = 10000
#: What malloc keeps lists of: every 16 bytes up to 1 KiB, larger ones in ever wider steps.
_CHUNKS = (65536, 32768, 16384, 8192, 4096, 2048, *range(1032, 8, -16))

_M_ARENA_MAX = -8
#: sizeof(pthread_attr_t) of x86-64 is 56.
_PTHREAD_ATTR_SIZE = 64

_fillers: list[object] = []


class _MallocInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def bound_threads(stack_size: int) -> None:
    """Let threads that are made from now on have stacks of this size, and allocate where the main thread does.

    glibc gives each thread a stack as large as the caller's limit says (8 MiB), and 64 MiB of addresses for an arena of
    its own, where the main thread has free places. Other C libraries have neither. mallopt(3), pthread_attr_init(3).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "pthread_setattr_default_np"):
        return
    libc.mallopt(_M_ARENA_MAX, 1)
    attributes = ctypes.create_string_buffer(_PTHREAD_ATTR_SIZE)
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(stack_size))
    libc.pthread_setattr_default_np(attributes)


def close_gaps() -> None:
    """Fill free places; what fills them is never freed. Costs a millisecond. Raises OSError."""
    gc.collect()  # empties the free lists of tuples, floats and the like
    for size, count in _free_places(_report()):
        _fillers.extend([_filler(size) for _ in range(min(count, _MAX_FREE))])
    _close_chunks()


def _report() -> str:
    """Return the interpreter's report on small objects, which it prints on descriptor 2 only."""
    report = os.memfd_create("report", os.MFD_CLOEXEC)
    errors = os.dup(2)
    try:
        os.dup2(report, 2)
        sys._debugmallocstats()
    finally:
        try:
            os.dup2(errors, 2)
        except OSError:
            os.dup2(errors, 2)  # where else could it be told?
        os.close(errors)
    try:
        return os.pread(report, _MAX_REPORT_SIZE, 0).decode("ascii", "replace")
    finally:
        os.close(report)


def _free_places(report: str) -> Iterator[tuple[int, int]]:
    """Yield (size in bytes, free places): the lines with class, size, pools, blocks in use and blocks available."""
    for line in report.split("\n"):
        words = line.split()
        if len(words) == 5 and all(map(str.isdigit, words)):
            yield int(words[1]), int(words[4])


def _filler(size: int) -> object:
    """Return a new object of ``size`` bytes that refers to nothing."""
    if size <= 16:
        return object()
    if size <= 32:
        return float("1")
    return bytes(size - _BYTES_HEADER)


def _close_chunks() -> None:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallocInfo
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    top = libc.sbrk(0) - libc.mallinfo2().keepcost
    for size in _CHUNKS:
        while (libc.malloc(size) or top) < top:
            pass
