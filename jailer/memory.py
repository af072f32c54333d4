"""Guest memory: sealed memfds made by the supervisor.

RLIMIT_FSIZE bounds how far a file may grow, a memfd included, but not how far it may shrink. Under a limit on file
sizes, the supervisor (which shows the limit, as Firecracker's process does) therefore shrinks one of a few huge,
empty memfds that were made before the limit was set.
"""

from __future__ import annotations

import errno
import fcntl
import os

from ipc.launch_plan import MAX_MEMORY_BYTES
from jailer.operations import Operation

#: How often guest memory can be made under a limit on file sizes (a failed InstanceStart may be tried again).
RESERVED = 8
#: How often without; a bound, not a limit that anybody meets.
MAX_MADE = 256
THP_ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def host_gives_huge_pages(setting: str = THP_ENABLED) -> bool:
    """Tell whether this host gives transparent huge pages to memory that did not ask for them.

    Documentation/admin-guide/mm/transhuge.rst. Read before the jail.
    """
    try:
        with open(setting, encoding="ascii") as file:
            return "[always]" in file.read(100)
    except (OSError, UnicodeDecodeError):
        return False


class MemoryMaker:
    """Makes memfds of a given size that nobody can resize."""

    def __init__(self, reserve: bool) -> None:
        """With ``reserve`` make the empty memfds now. Raises OSError."""
        self._reserved = [self._empty(MAX_MEMORY_BYTES) for _ in range(RESERVED)] if reserve else None
        self._made = 0

    @staticmethod
    def _empty(size: int) -> int:
        descriptor = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def make(self, size: int) -> int:
        """Return the descriptor of a sealed memfd of ``size`` bytes. Raises OSError."""
        if self._reserved is None:
            if self._made >= MAX_MADE:
                raise OSError(errno.EDQUOT, f"guest memory was made {MAX_MADE} times already")
            descriptor = self._empty(size)
        elif self._reserved:
            descriptor = self._reserved.pop()
            os.ftruncate(descriptor, size)
        else:
            raise OSError(errno.EDQUOT, f"with a limit on file sizes guest memory is made {RESERVED} times at most")
        self._made += 1
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


class ReserveMemory(Operation):
    """Before a limit on file sizes is set: the memfds that guest memory will be made from."""

    __slots__ = ("_needed", "maker")

    def __init__(self, needed: bool) -> None:
        self._needed = needed
        self.maker = MemoryMaker(False)

    def describe(self) -> str:
        return "reserve guest memory before the limit on file sizes"

    def do(self) -> None:
        self.maker = MemoryMaker(self._needed)
