"""Steps that prepare the calling process itself: descriptors, environment, limits."""

from __future__ import annotations

import ctypes
import errno
import os
import posix
import resource

from base.errno_text import errno_text
from base.lean_typing import Iterable
from jailer import syscalls, walls
from jailer.errors import StepError
from jailer.operations import Operation
from jailer.settings import Limits


def close_inherited_descriptors() -> None:
    """Close everything but standard input, output and error. Raises OSError."""
    syscalls.close_range(3, syscalls.CLOSE_RANGE_MAX, syscalls.CLOSE_RANGE_UNSHARE)


def keep_only(wanted: Iterable[int]) -> None:
    """Close every descriptor from 3 up but the wanted ones. Raises OSError."""
    first = 3
    for descriptor in sorted({each for each in wanted if each > 2}):
        syscalls.close_range(first, descriptor - 1)
        first = descriptor + 1
    syscalls.close_range(first, syscalls.CLOSE_RANGE_MAX)


def inherited_descriptors() -> tuple[int, ...]:
    """Return what the caller left open beyond the standard descriptors; called before anything is opened."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the listing itself
        if int(name) > 2:
            found.append(int(name))
    return tuple(found)


def clear_environment() -> None:
    """Remove every variable that the caller set, and wipe where the kernel put them: cells inherit this memory."""
    os.environ.clear()
    posix.environ.clear()
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end, fields 50 and 51 of proc(5)
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)


def ensure_standard_descriptors() -> None:
    """Open /dev/null on each of 0, 1 and 2 that is closed, so that no later descriptor ends up there."""
    while True:
        descriptor = os.open("/dev/null", os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)


class SetLimits(Operation):
    """``--resource-limit``: soft and hard limit of this process and of every cell, which inherit them."""

    __slots__ = ("_limits",)
    step = walls.LIMITS

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def describe(self) -> str:
        size = "" if self._limits.file_size is None else f", fsize={self._limits.file_size}"
        return f"set limits no-file={self._limits.no_file}{size}"

    def do(self) -> None:
        wanted = [(resource.RLIMIT_NOFILE, self._limits.no_file)]
        if self._limits.file_size is not None:
            wanted.insert(0, (resource.RLIMIT_FSIZE, self._limits.file_size))
        for which, value in wanted:
            bounded = value if value < 1 << 63 else resource.RLIM_INFINITY
            try:
                resource.setrlimit(which, (bounded, bounded))
            except (OSError, ValueError) as error:  # Python turns EPERM into a ValueError
                number = error.errno if isinstance(error, OSError) and error.errno else errno.EPERM
                raise StepError(f"Failed to set limit for resource: {errno_text(number)}") from None
