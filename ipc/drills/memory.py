"""Attacks by way of memory: code that could be executed, memory of others, more of it than a cell needs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from base.lean_typing import Callable
from ipc.drills import targets
from ipc.drills.calls import NUMBERS, Attempt, buffer, call, system_call

_READ, _WRITE, _EXECUTE = 1, 2, 4
_PRIVATE_ANONYMOUS = 0x22
_PAGE = mmap.PAGESIZE
_IPC_PRIVATE, _IPC_CREAT, _SHM_EXEC = 0, 0o1000, 0o100000
_ARCH_MAP_VDSO_64, _ARCH_SHSTK_ENABLE = 0x2003, 0x5001
_READ_IMPLIES_EXEC = 0x0400000
_MADV_HWPOISON = 100
_NO_RANDOM = 0x0040000


def _executable_mapping() -> str:
    with mmap.mmap(-1, _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        return "a page"


def _anonymous() -> int:
    return system_call(NUMBERS["mmap"], 0, _PAGE, _READ | _WRITE, _PRIVATE_ANONYMOUS, -1, 0)


def _mapped_executable(name: str) -> Attempt:
    """Map a page to write to, then make it executable by another call."""

    def attempt() -> str:
        address = _anonymous()
        extra = (-1,) if name == "pkey_mprotect" else ()
        system_call(NUMBERS[name], address, _PAGE, _READ | _EXECUTE, *extra)
        return "a page"

    return attempt


def _executable_memfd() -> str:
    descriptor = os.memfd_create("drill")
    try:
        os.ftruncate(descriptor, _PAGE)
        system_call(NUMBERS["mmap"], 0, _PAGE, _READ | _EXECUTE, 1, descriptor, 0)
    finally:
        os.close(descriptor)
    return "a page"


def _shmat() -> str:
    """Attach a System V segment, executable; 0 is taken for its number where none can be made."""
    try:
        segment = system_call(NUMBERS["shmget"], _IPC_PRIVATE, _PAGE, _IPC_CREAT | 0o700)
    except OSError:
        segment = 0
    system_call(NUMBERS["shmat"], segment, 0, _SHM_EXEC)
    return f"segment {segment}"


def _read_segment(key: str) -> str:
    """Attach the System V segment of this key, which somebody else has made."""
    segment = system_call(NUMBERS["shmget"], int(key), _PAGE, 0)
    address = system_call(NUMBERS["shmat"], segment, 0, 0o10000)
    return f"segment {segment}: {ctypes.string_at(address, 5)!r}"


def _bomb(mebibytes: str) -> str:
    """Take so much memory, and use it."""
    taken = []
    for _ in range(int(mebibytes)):
        try:
            taken.append(bytearray(b"x" * (1 << 20)))
        except MemoryError:
            raise OSError(errno.ENOMEM, f"{os.strerror(errno.ENOMEM)} after {len(taken)} MiB") from None
    return f"{len(taken)} MiB"


ATTEMPTS: dict[str, Attempt] = {
    "executable-mapping": _executable_mapping,
    "executable-mprotect": _mapped_executable("mprotect"),
    "executable-pkey-mprotect": _mapped_executable("pkey_mprotect"),
    "executable-memfd": _executable_memfd,
    "executable-shmat": _shmat,
    "pkey-alloc": call("pkey_alloc", 0, 0),
    "personality-exec": call("personality", _READ_IMPLIES_EXEC),
    "personality-no-random": call("personality", _NO_RANDOM),
    "modify-ldt": call("modify_ldt", 1, bytes(16), 16),
    "arch-prctl-vdso": call("arch_prctl", _ARCH_MAP_VDSO_64, 0x10000, reached=(errno.EEXIST, errno.EINVAL)),
    "arch-prctl-shadow-stack": call("arch_prctl", _ARCH_SHSTK_ENABLE, 0, reached=(errno.EINVAL,)),
    "set-thread-area": call("set_thread_area", buffer(b"\xff\xff\xff\xff", 16)),
    "map-shadow-stack": call("map_shadow_stack", 0, _PAGE, 0, reached=(errno.EINVAL, errno.EOPNOTSUPP)),
    "remap-file-pages": call("remap_file_pages", 0, _PAGE, 0, 0, 0, reached=(errno.EINVAL,)),
    "map-page-zero": call("mmap", 0, _PAGE, _READ | _WRITE, _PRIVATE_ANONYMOUS | 0x10, -1, 0),
    "mlock": call("mlock", _anonymous, _PAGE),
    "mlockall": call("mlockall", 4),
    "madvise-poison": call("madvise", _anonymous, _PAGE, _MADV_HWPOISON),
    "move-pages": call("move_pages", targets.neighbour, 0, None, None, None, 0),
    "migrate-pages": call("migrate_pages", targets.neighbour, 1, buffer(b"\1", 8), buffer(b"\1", 8)),
    "mbind": call("mbind", _anonymous, _PAGE, 1, None, 0, 0),
    "set-mempolicy": call("set_mempolicy", 0, None, 0),
    "memfd-secret": call("memfd_secret", 0),
    "userfaultfd": call("userfaultfd", 0),
    "userfaultfd-user-mode": call("userfaultfd", 1),
    "vmsplice": call("vmsplice", -1, None, 0, 0, reached=(errno.EBADF,)),
    "splice": call("splice", -1, None, -1, None, 1, 0, reached=(errno.EBADF,)),
    "tee": call("tee", -1, -1, 1, 0, reached=(errno.EBADF, errno.EINVAL)),
    "shared-segment": call("shmget", _IPC_PRIVATE, _PAGE, _IPC_CREAT | 0o600),
    "message-queue": call("msgget", _IPC_PRIVATE, _IPC_CREAT | 0o600),
    "semaphore": call("semget", _IPC_PRIVATE, 1, _IPC_CREAT | 0o600),
    "posix-queue": call("mq_open", b"drill", os.O_RDWR | os.O_CREAT, 0o600, None),
}
AIMED: dict[str, Callable[[str], str]] = {"memory-bomb": _bomb, "read-segment": _read_segment}
