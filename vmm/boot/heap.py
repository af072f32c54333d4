"""Giving memory of the process's heap back after work that needed much of it."""

from __future__ import annotations

from base.lean_typing import Callable

_malloc_trim: Callable[[int], int] | None = None


def warm() -> None:
    """Look up malloc_trim: ctypes cannot be imported inside the jail."""
    global _malloc_trim
    if _malloc_trim is None:
        import ctypes

        # musl and others have none; then there is nothing to do.
        _malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def release() -> None:
    """Return what the allocator keeps back to the host.

    glibc grows its heap for blocks of several MiB once one was freed, and keeps it: unpacking an lz4 kernel left
    28 MiB in the controller, 3 ms of this give it back.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
