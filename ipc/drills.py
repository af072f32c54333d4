"""Drills: a cell attacks its own walls, so that a test sees them hold. Armed by the jailer (``--drill``), else inert.

Each attack reports on standard error what came of it, unless a wall ended the cell before it could.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct

from base.lean_std import socket
from base.lean_typing import Callable
from ipc import network_drills
from ipc.launch_plan import ROLE_VCPU, ROLE_VMM

#: The supervisor sets it before it forks workers: whom their "ptrace" drill attacks. The controller attacks its parent.
controller_pid = 0

_EXECUTED = b"drill execve: succeeded\n"
_PTRACE_ATTACH, _PTRACE_DETACH = 16, 17
_FIONCLEX = 0x5450
_F_SETFL = 4
_SYS_TGKILL = 234
#: The signal by which a worker interrupts its vCPUs: glibc's SIGRTMIN. It ends whoever has no handler for it.
_KICK = 34
_SYS_EXECVEAT = 322
_AT_EMPTY_PATH = 0x1000


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
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_char_p * 2)(b"drill", None)
    numbers = [ctypes.c_long(each) for each in (_SYS_EXECVEAT, program, _AT_EMPTY_PATH)]
    libc.syscall(numbers[0], numbers[1], b"", arguments, None, numbers[2])
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def _open() -> str:
    try:
        descriptor = os.open("/etc/passwd", os.O_RDONLY)
        what = "/etc/passwd"
    except FileNotFoundError:
        descriptor = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        what = f"/ with {sorted(os.listdir(descriptor))}"
    os.close(descriptor)
    return what


def _fork() -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return f"child {pid}"


def _socket() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        return f"descriptor {connection.fileno()}"


def _executable_mapping() -> str:
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        return "a page"


def _ioctl() -> str:
    import fcntl

    fcntl.ioctl(2, _FIONCLEX)
    return "FIONCLEX"


def _ptrace() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    target = controller_pid or os.getppid()
    if libc.ptrace(_PTRACE_ATTACH, target, None, None) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    os.waitpid(target, 0x40000000)  # __WALL: it is not our child
    libc.ptrace(_PTRACE_DETACH, target, None, None)
    return f"process {target}"


def _blocking() -> str:
    os.set_blocking(2, True)  # FIONBIO
    return "FIONBIO"


def _file_status() -> str:
    import fcntl

    fcntl.fcntl(2, _F_SETFL, 0)
    return "F_SETFL"


def _unlink_pid_file() -> str:
    name = next(each for each in os.listdir("/") if each.endswith(".pid"))
    os.unlink(f"/{name}")
    return name


def _replace_pid_file() -> str:
    name = next(each for each in os.listdir("/") if each.endswith(".pid"))
    with open("/forged", "w", encoding="ascii") as file:
        file.write("1")
    os.rename("/forged", f"/{name}")
    return name


def _open_device(path: str) -> str:
    os.close(os.open(path, os.O_RDWR))
    return path


def _target(name: str) -> int:
    if name == "self":
        return os.getpid()
    if name == "supervisor":
        return os.getppid()
    return controller_pid if name == "controller" else int(name)


def _signal(name: str, number: int) -> str:
    target = _target(name)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(*map(ctypes.c_long, (_SYS_TGKILL, target, target, number))) == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return f"signal {number} to process {target}"


def _kick(target: str) -> str:
    return _signal(target, _KICK)


def _kill(target: str) -> str:
    return _signal(target, signal.SIGKILL)


DRILLS: dict[str, Callable[[], str]] = {
    "execve": _execve,
    "open": _open,
    "fork": _fork,
    "socket": _socket,
    "executable-mapping": _executable_mapping,
    "ioctl": _ioctl,
    "ptrace": _ptrace,
    "blocking": _blocking,
    "file-status": _file_status,
    "unlink-pid-file": _unlink_pid_file,
    "replace-pid-file": _replace_pid_file,
    "open-kvm": lambda: _open_device("/dev/kvm"),
    "open-tun": lambda: _open_device("/dev/net/tun"),
    "open-userfaultfd": lambda: _open_device("/dev/userfaultfd"),
}

#: Those that are aimed at a process: ``NAME=self``, ``=supervisor``, ``=controller`` or ``=PID``.
AIMED: dict[str, Callable[[str], str]] = {"kick": _kick, "kill": _kill}
_TARGETS = ("self", "supervisor", "controller")
#: Those that are aimed at something by its name: ``NAME=TAP``, ``=ABSTRACT-NAME``, ``=PATH``.
NAMED = network_drills.NAMED


def check(specifications: tuple[str, ...]) -> None:
    """Raise ValueError unless every specification is ``NAME`` or ``ROLE:NAME`` (ROLE: vcpu, the default, or vmm)."""
    for specification in specifications:
        role, name = _parse(specification)
        aimed, _, target = name.partition("=")
        known = name in DRILLS or (aimed in AIMED and (target in _TARGETS or target.isdecimal()))
        known = known or (aimed in NAMED and target != "")
        if not known or role not in (ROLE_VCPU, ROLE_VMM):
            names = ", ".join((*DRILLS, *(f"{each}=TARGET" for each in (*AIMED, *NAMED))))
            raise ValueError(f"--drill {specification}: a drill is one of {names}, or vmm: and one of them")


def _parse(specification: str) -> tuple[str, str]:
    role, separator, name = specification.partition(":")
    return (role, name) if separator else (ROLE_VCPU, role)


def _attack(name: str) -> str:
    aimed, separator, target = name.partition("=")
    return (AIMED | NAMED)[aimed](target) if separator else DRILLS[name]()


def run(specifications: tuple[str, ...], role: str = ROLE_VCPU) -> None:
    """Carry out the drills that are armed for this role, right after the seal."""
    for specification in specifications:
        wanted, name = _parse(specification)
        if wanted != role:
            continue
        try:
            outcome = f"succeeded ({_attack(name)})"
        except OSError as error:
            outcome = f"refused: {error.strerror} ({error.errno})"
        os.write(2, f"drill {name}: {outcome}\n".encode())
