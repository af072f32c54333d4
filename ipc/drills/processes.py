"""Attacks on other processes, and attempts to become more of them. Signals are harmless ones where they need not be."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct

from base.lean_typing import Callable
from ipc.drills import targets
from ipc.drills.calls import NUMBERS, Attempt, buffer, call, libc, refuse, system_call

_EXECUTED = b"drill execve: succeeded\n"
_PTRACE_ATTACH, _PTRACE_DETACH, _PTRACE_SEIZE = 16, 17, 0x4206
_WALL = 0x40000000
#: The signal by which a worker interrupts its vCPUs: glibc's SIGRTMIN. It ends whoever has no handler for it.
_KICK = 34
#: Ignored by default: who may send it could send any other.
_HARMLESS = int(signal.SIGWINCH)
_SIGINFO = buffer(struct.pack("=iii", _HARMLESS, 0, -1), 128)  # siginfo_t: si_signo, si_errno, si_code SI_QUEUE
_AT_EMPTY_PATH = 0x1000
_SIGCHLD = int(signal.SIGCHLD)
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWPID = 0x00020000, 0x10000000, 0x40000000, 0x20000000
_CLONE_FILES = 0x400
_RLIMIT_CORE = 4
#: Where the supervisor and every cell have the same bytes: they are forks of one process.
_SHARED_ADDRESS = buffer(b"memory of the template")
#: More than any cell needs, less than what troubles a host.
_MANY = 200


def _tiny_program() -> bytes:
    """Return an ELF program for x86-64 that writes a line to standard error and exits with status 0."""
    base = 0x400000
    header_size, program_header_size = 64, 56
    entry = base + header_size + program_header_size
    # fmt: off
    code = bytes((
        0xB8, 1, 0, 0, 0,                        # mov eax, 1 (write)
        0xBF, 2, 0, 0, 0,                        # mov edi, 2
        0x48, 0x8D, 0x35, 0x10, 0, 0, 0,         # lea rsi, [rip + 16]: behind the code
        0xBA, len(_EXECUTED), 0, 0, 0,           # mov edx, length
        0x0F, 0x05,                              # syscall
        0xB8, 60, 0, 0, 0,                       # mov eax, 60 (exit)
        0x31, 0xFF,                              # xor edi, edi
        0x0F, 0x05,                              # syscall
    ))
    # fmt: on
    size = header_size + program_header_size + len(code) + len(_EXECUTED)
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, entry, header_size, 0, 0, header_size, program_header_size, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    return header + segment + code + _EXECUTED


def _execve() -> str:
    program = os.memfd_create("drill")
    os.write(program, _tiny_program())
    arguments = (ctypes.c_char_p * 2)(b"drill", None)
    numbers = [ctypes.c_long(each) for each in (NUMBERS["execveat"], program, _AT_EMPTY_PATH)]
    libc.syscall(numbers[0], numbers[1], b"", arguments, None, numbers[2])
    raise refuse(ctypes.get_errno())


def _execute(path: str) -> str:
    os.execv(path, [path])


# ---------------------------------------------------------------- more of them


def _fork() -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return f"child {pid}"


def _raw_fork(name: str, *arguments: int | bytes | None) -> Attempt:
    def attempt() -> str:
        pid = system_call(NUMBERS[name], *arguments)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return f"child {pid}"

    return attempt


def _fork_bomb() -> str:
    """Make children until it is refused; what came of it is told when they are gone."""
    children: list[int] = []
    try:
        while len(children) < _MANY:
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(0)
            children.append(pid)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} after {len(children)} processes") from None
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return f"{len(children)} processes"


def _thread() -> str:
    thread = ctypes.c_ulong()
    number = libc.pthread_create(ctypes.byref(thread), None, libc.sched_yield, None)
    if number:
        raise refuse(number)
    libc.pthread_join(thread, None)
    return "a thread"


def _thread_bomb() -> str:
    """Make threads that wait until it is refused. They go with the process."""
    made = 0
    while made < _MANY:
        number = libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None)
        if number:
            raise OSError(number, f"{os.strerror(number)} after {made} threads")
        made += 1
    return f"{made} threads"


# ---------------------------------------------------------------- tracing, pidfds


def _ptrace() -> str:
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    target = targets.neighbour()
    if libc.ptrace(_PTRACE_ATTACH, target, None, None) == -1:
        raise refuse(ctypes.get_errno())
    os.waitpid(target, _WALL)  # it is not our child
    libc.ptrace(_PTRACE_DETACH, target, None, None)
    return f"process {target}"


def _seize() -> str:
    target = targets.neighbour()
    system_call(NUMBERS["ptrace"], _PTRACE_SEIZE, target, 0, 0)
    return f"process {target}"


def _memory_of_another(name: str) -> Attempt:
    def attempt() -> str:
        size = len(_SHARED_ADDRESS)
        local = buffer(bytes(_SHARED_ADDRESS))
        vectors = [buffer(struct.pack("=QQ", ctypes.addressof(each), size)) for each in (local, _SHARED_ADDRESS)]
        return f"{system_call(NUMBERS[name], targets.neighbour(), vectors[0], 1, vectors[1], 1, 0)} bytes"

    return attempt


def _pidfd(pid: Callable[[], int]) -> int:
    """Return a pidfd, or -1 where that is refused already: the next call is to show its own wall."""
    try:
        return system_call(NUMBERS["pidfd_open"], pid(), 0)
    except OSError:
        return -1


def _of_neighbour() -> int:
    return _pidfd(targets.neighbour)


def _of_self() -> int:
    return _pidfd(os.getpid)


# ---------------------------------------------------------------- signals that are aimed


def _signal(name: str, number: int) -> str:
    target = targets.named(name)
    system_call(NUMBERS["tgkill"], target, target, number)
    return f"signal {number} to process {target}"


def _kick(target: str) -> str:
    return _signal(target, _KICK)


def _kill(target: str) -> str:
    return _signal(target, signal.SIGKILL)


_CLONE_ARGUMENTS = struct.pack("=8Q", 0, 0, 0, 0, _SIGCHLD, 0, 0, 0)  # struct clone_args
_SCHED_ATTRIBUTES = struct.pack("=IIQiIQQQ", 48, 0, 0, 0, 0, 0, 0, 0)  # struct sched_attr: SCHED_OTHER, nice 0
_ALL_CPUS = b"\xff" * 8
_NEIGHBOUR = targets.neighbour
_UNKNOWN = (errno.EBADF,)

ATTEMPTS: dict[str, Attempt] = {
    "execve": _execve,
    "execve-path": call("execve", b"/firecracker", None, None, reached=(errno.ENOEXEC,)),
    "fork": _fork,
    "fork-raw": _raw_fork("fork"),
    "vfork": _raw_fork("vfork"),
    "clone": _raw_fork("clone", _SIGCHLD, 0, 0, 0, 0),
    "clone-new-user": _raw_fork("clone", _SIGCHLD | _CLONE_NEWUSER, 0, 0, 0, 0),
    "clone3": _raw_fork("clone3", _CLONE_ARGUMENTS, len(_CLONE_ARGUMENTS)),
    "thread": _thread,
    "thread-bomb": _thread_bomb,
    "fork-bomb": _fork_bomb,
    "unshare-user": call("unshare", _CLONE_NEWUSER),
    "unshare-mount": call("unshare", _CLONE_NEWNS),
    "unshare-network": call("unshare", _CLONE_NEWNET),
    "unshare-pid": call("unshare", _CLONE_NEWPID),
    "unshare-files": call("unshare", _CLONE_FILES),
    "setns": call("setns", _of_self, _CLONE_NEWNET, reached=_UNKNOWN),
    "setns-neighbour": call("setns", _of_neighbour, _CLONE_NEWNS, reached=_UNKNOWN),
    "ptrace": _ptrace,
    "ptrace-seize": _seize,
    "process-vm-readv": _memory_of_another("process_vm_readv"),
    "process-vm-writev": _memory_of_another("process_vm_writev"),
    "pidfd-open": call("pidfd_open", _NEIGHBOUR, 0),
    "pidfd-getfd": call("pidfd_getfd", _of_neighbour, 2, 0, reached=_UNKNOWN),
    "pidfd-send-signal": call("pidfd_send_signal", _of_neighbour, _HARMLESS, None, 0, reached=_UNKNOWN),
    "process-madvise": call("process_madvise", _of_neighbour, None, 0, 20, 0, reached=_UNKNOWN),
    "process-mrelease": call("process_mrelease", _of_neighbour, 0, reached=(errno.EBADF, errno.EINVAL)),
    "kill": call("kill", _NEIGHBOUR, _HARMLESS),
    "kill-group": call("kill", 0, _HARMLESS),
    "kill-everybody": call("kill", -1, _HARMLESS),
    "kill-init": call("kill", 1, _HARMLESS),
    "tkill": call("tkill", _NEIGHBOUR, _HARMLESS),
    "tgkill": call("tgkill", _NEIGHBOUR, _NEIGHBOUR, _HARMLESS),
    "tgkill-own-other-signal": call("tgkill", os.getpid, os.getpid, _HARMLESS),
    "rt-sigqueueinfo": call("rt_sigqueueinfo", _NEIGHBOUR, _HARMLESS, _SIGINFO),
    "rt-tgsigqueueinfo": call("rt_tgsigqueueinfo", _NEIGHBOUR, _NEIGHBOUR, _HARMLESS, _SIGINFO),
    "setpriority": call("setpriority", 0, _NEIGHBOUR, 0),
    "nice": call("setpriority", 0, 0, -20 & 0xFFFFFFFF),
    "ioprio-set": call("ioprio_set", 1, _NEIGHBOUR, 0x4004),
    "sched-setattr": call("sched_setattr", _NEIGHBOUR, _SCHED_ATTRIBUTES, 0),
    "sched-getattr": call("sched_getattr", _NEIGHBOUR, buffer(b"", 64), 64, 0),
    "sched-setaffinity": call("sched_setaffinity", _NEIGHBOUR, len(_ALL_CPUS), _ALL_CPUS),
    "prlimit": call("prlimit64", _NEIGHBOUR, _RLIMIT_CORE, bytes(16), None),
    "prlimit-read": call("prlimit64", _NEIGHBOUR, _RLIMIT_CORE, None, buffer(b"", 16)),
    "kcmp": call("kcmp", os.getpid, _NEIGHBOUR, 1, 0, 0),
    "get-robust-list": call("get_robust_list", _NEIGHBOUR, buffer(b"", 8), buffer(b"", 8)),
    "setsid": call("setsid"),
    "setpgid": call("setpgid", 0, 0),
}
#: Those that are aimed: ``NAME=TARGET`` (a process) and ``NAME=PATH``.
AIMED: dict[str, Callable[[str], str]] = {"kick": _kick, "kill": _kill, "execute": _execute}
