"""The Linux system calls that Python 3.11 does not offer, by ctypes; x86-64 only.

Every function raises OSError with the kernel's errno. Numbers and structures: the kernel's uapi headers
(asm/unistd_64.h, linux/mount.h, linux/seccomp.h, linux/capability.h, linux/openat2.h) and the man pages of the calls.
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_SLAVE = 1 << 19
MNT_DETACH = 2

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4
MOUNT_ATTR_NOEXEC = 8
FSOPEN_CLOEXEC = 1
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 1

CLOSE_RANGE_UNSHARE = 2
CLOSE_RANGE_MAX = 0xFFFFFFFF

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_TSYNC = 1 << 0
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
SECCOMP_FILTER_FLAG_TSYNC_ESRCH = 1 << 4

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_PR_CAPBSET_DROP = 24
_SYS_CAPSET = 126
_SYS_PIVOT_ROOT = 155
_SYS_SIGNALFD4 = 289
_SYS_SETNS = 308
_SYS_SECCOMP = 317
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_CLOSE_RANGE = 436
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1

_CLONE_VM = 0x100
_SIGCHLD = 17
_CLONE_WAIT_S = 10
_CLONE_STACK = 16 << 10

_O_CLOEXEC = os.O_CLOEXEC
_SIGNALFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_mount = _libc.mount
_mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_umount2 = _libc.umount2
_umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_unshare = _libc.unshare
_unshare.argtypes = (ctypes.c_int,)
_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def _check(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call; of ``bytes`` the address is passed: the kernel only reads there.

    A buffer of ctypes would be a type of its own for each length: making one in a cell that was just forked copies 110
    pages, 0.35 ms.
    """
    converted: list[object] = []
    for argument in arguments:
        if isinstance(argument, int):
            converted.append(ctypes.c_long(argument))
        elif isinstance(argument, bytes):
            converted.append(ctypes.c_char_p(argument))
        else:
            converted.append(ctypes.c_void_p(None))
    return _check(_syscall(ctypes.c_long(number), *converted))


def _path(path: str | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def mount(source: str | None, target: str, filesystem: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    _check(_mount(_path(source), _path(target), _path(filesystem), flags, _path(options)))


def umount(target: str, flags: int) -> None:
    """umount2(2)."""
    _check(_umount2(_path(target), flags))


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _call(_SYS_PIVOT_ROOT, _path(new_root), _path(put_old))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_unshare(flags))


def clone_waiting(flags: int) -> tuple[int, object]:
    """clone(2) of a process that shares our memory and does nothing but wait, for some seconds if nobody kills it.

    Returns its pid, and its stack, which has to be kept until it was killed. Nothing is copied, as fork(2) would.
    """
    stack = ctypes.create_string_buffer(_CLONE_STACK)
    top = (ctypes.addressof(stack) + _CLONE_STACK) & ~15
    clone = _libc.clone
    clone.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    return _check(
        clone(ctypes.cast(_libc.sleep, ctypes.c_void_p), top, flags | _CLONE_VM | _SIGCHLD, _CLONE_WAIT_S)
    ), stack


def setns(descriptor: int, kind: int) -> None:
    """setns(2)."""
    _call(_SYS_SETNS, descriptor, kind)


def close_range(first: int, last: int, flags: int = 0) -> None:
    """close_range(2)."""
    if first <= last:
        _call(_SYS_CLOSE_RANGE, first, last, flags)


def capabilities_set(mask: int) -> None:
    """capset(2): make effective and permitted sets equal to ``mask`` and the inheritable set empty."""
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    low, high = mask & 0xFFFFFFFF, mask >> 32
    _call(_SYS_CAPSET, header, struct.pack("=6I", low, low, 0, high, high, 0))


def drop_from_bounding_set(capability: int) -> None:
    """PR_CAPBSET_DROP."""
    _check(_prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))


def open_tree(path: str, flags: int, directory: int = AT_FDCWD) -> int:
    """open_tree(2); returns a close-on-exec descriptor."""
    return _call(_SYS_OPEN_TREE, directory, _path(path), flags | _O_CLOEXEC)


def move_mount(descriptor: int, target: str, directory: int = AT_FDCWD) -> None:
    """move_mount(2): attach a detached mount at ``target``, which is not followed if it is a symbolic link.

    An empty ``target`` is the directory descriptor itself.
    """
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if target else MOVE_MOUNT_T_EMPTY_PATH)
    _call(_SYS_MOVE_MOUNT, descriptor, b"", directory, _path(target), flags)


def mount_setattr(descriptor: int, attributes: int, *, recursive: bool = False) -> None:
    """mount_setattr(2): add attributes to the mount that the descriptor stands for; to those below it as well."""
    attr = struct.pack("=QQQQ", attributes, 0, 0, 0)
    assert len(attr) == 32  # struct mount_attr
    _call(_SYS_MOUNT_SETATTR, descriptor, b"", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), attr, 32)


def mount_detached(filesystem: str, options: tuple[tuple[str, str], ...], attributes: int) -> int:
    """fsopen, fsconfig, fsmount: return a descriptor of a new mount that is attached nowhere, hence has no ``..``."""
    context = _call(_SYS_FSOPEN, _path(filesystem), FSOPEN_CLOEXEC)
    try:
        for key, value in options:
            _call(_SYS_FSCONFIG, context, FSCONFIG_SET_STRING, _path(key), _path(value), 0)
        _call(_SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2) with restrictions on how the path is resolved; always close-on-exec."""
    how = struct.pack("=QQQ", flags | _O_CLOEXEC, 0, resolve)
    return _call(_SYS_OPENAT2, directory, _path(path), how, 24)


#: Bytes of struct signalfd_siginfo; ssi_signo at 0 (u32), ssi_code at 8 (i32), ssi_pid at 12 (u32).
SIGNALFD_SIGINFO_SIZE = 128


def signalfd(signals: frozenset[int]) -> int:
    """signalfd4(2): a non-blocking, close-on-exec descriptor that delivers the given (blocked) signals."""
    mask = 0
    for number in signals:
        mask |= 1 << (number - 1)
    return _call(_SYS_SIGNALFD4, -1, struct.pack("=Q", mask), 8, _SIGNALFD_FLAGS)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


assert ctypes.sizeof(_FilterProgram) == 16  # struct sock_fprog


def seccomp_set_filter(program: bytes, flags: int) -> int:
    """seccomp(SECCOMP_SET_MODE_FILTER) with raw BPF (8 bytes per instruction).

    Returns the listener's descriptor with SECCOMP_FILTER_FLAG_NEW_LISTENER, else 0.
    """
    prog = _FilterProgram(len(program) // 8, program)
    return _check(
        _syscall(
            ctypes.c_long(_SYS_SECCOMP),
            ctypes.c_long(SECCOMP_SET_MODE_FILTER),
            ctypes.c_long(flags),
            ctypes.byref(prog),
        )
    )


def landlock_abi() -> int:
    """landlock_create_ruleset(2) with LANDLOCK_CREATE_RULESET_VERSION: the ABI that the kernel offers."""
    return _call(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)


def landlock_create_ruleset(attributes: bytes) -> int:
    """landlock_create_ruleset(2) with a struct landlock_ruleset_attr; returns a close-on-exec descriptor."""
    return _call(_SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)


def landlock_add_rule(ruleset: int, path_beneath: bytes) -> None:
    """landlock_add_rule(2) with a struct landlock_path_beneath_attr."""
    _call(_SYS_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, path_beneath, 0)


def landlock_restrict_self(ruleset: int) -> None:
    """landlock_restrict_self(2): for the calling thread; needs no_new_privs or CAP_SYS_ADMIN."""
    _call(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
