"""System calls that fail, or during which a signal comes, in the real processes of a program: by seccomp(2) and its
user notifications (linux/seccomp.h), from outside.

The program runs under a filter that its own filters are added to: each call of CALLS, of every process of it, waits
for us. We let it go on, or return an errno instead, so that the kernel has done nothing. Calls are counted by process,
from the first call named ``armed_by`` on; processes are numbered in the order of their first counted call.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from devtool.project import PYTHON, ROOT
from jailer.seccomp.names import SYSCALL_NAMES

#: Not close(2), which Linux carries out even if it fails, nothing that only waits, and nothing of memory.
CALLS = tuple(
    """
    read write open openat openat2 stat lstat fstat newfstatat statx readlink readlinkat access ioctl fcntl flock
    ftruncate getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename link symlink mknod mknodat chmod
    fchmod fchmodat chown lchown fchown fchownat statfs fstatfs umask sendfile copy_file_range
    pipe pipe2 dup dup2 dup3 socket socketpair connect bind listen sendto recvfrom sendmsg recvmsg setsockopt getsockopt
    clone clone3 fork vfork execve setsid setpgid wait4 pidfd_open pidfd_send_signal kill
    setgroups setresuid setresgid capset prctl setrlimit prlimit64 seccomp
    mount umount2 pivot_root unshare setns open_tree move_mount fsopen fsconfig fsmount mount_setattr
    memfd_create signalfd4 eventfd2 epoll_create1 close_range getrandom
    landlock_create_ruleset landlock_add_rule landlock_restrict_self
    """.split()
)
_NAMES = {number: name for number, name in SYSCALL_NAMES.items() if name in CALLS}
assert len(_NAMES) == len(CALLS)

_SYS_SECCOMP, _SYS_PIDFD_OPEN, _SYS_PIDFD_GETFD = 317, 434, 438
_SET_MODE_FILTER, _NEW_LISTENER = 1, 1 << 3
_NOTIF_RECV, _NOTIF_SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
assert _NOTIFICATION.size == 80  # struct seccomp_notif
_RESPONSE = struct.Struct("=QqiI")
assert _RESPONSE.size == 24  # struct seccomp_notif_resp
_RET_ALLOW, _RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
_libc = ctypes.CDLL(None, use_errno=True)


def filter_program() -> bytes:
    """Return BPF that has every call of CALLS notified: load the number, compare, return."""
    numbers = sorted(_NAMES)
    program = struct.pack("=HBBI", 0x20, 0, 0, 0)
    for at, number in enumerate(numbers):
        program += struct.pack("=HBBI", 0x15, len(numbers) - at, 0, number)
    return program + struct.pack("=HBBI", 0x06, 0, 0, _RET_ALLOW) + struct.pack("=HBBI", 0x06, 0, 0, _RET_USER_NOTIF)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Strike:
    """What happens to the ``number``-th call (from 1) of the ``process``-th process: an errno, or a signal."""

    def __init__(self, process: int, number: int, *, errno: int = 0, kill: int = 0) -> None:
        self.process = process
        self.number = number
        self.errno = errno
        self.kill = kill


class SystemCallFaults:
    """Answers the notifications of one program, in a thread, from ``with`` on. ``command`` runs it under the filter."""

    def __init__(self, path: Path, strike: Strike | None = None, *, armed_by: str = "close_range") -> None:
        self._path = path
        self._strike = strike
        self._armed_by = armed_by
        self._order: dict[int, int] = {}
        #: By process: the names of its calls.
        self.calls: dict[int, list[str]] = {}
        #: The call that was struck.
        self.struck = ""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve)
        self._stop, self._stopping = os.pipe()

    def command(self, *program: str | Path) -> tuple[str, ...]:
        """Return the command line that runs a program."""
        return (str(PYTHON), "-IS", str(Path(__file__).with_name("under_faults.py")), str(ROOT), str(self._path),
                *map(str, program))  # fmt: skip

    def __enter__(self) -> SystemCallFaults:
        self._socket.bind(str(self._path))
        self._socket.listen(1)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._stopping)
        self._thread.join()
        os.close(self._stop)
        self._socket.close()
        self._path.unlink()

    def wait_ended(self, seconds: float) -> bool:
        """Wait for the end of every process of the program, orphans as well; False if there are some then."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _wait(self, descriptor: int) -> bool:
        """Wait for a descriptor; False if there is nothing more to come."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        events = dict(poll.poll())
        return bool(events.get(descriptor, 0) & select.POLLIN)

    def _serve(self) -> None:
        if not self._wait(self._socket.fileno()):
            return
        with self._socket.accept()[0] as peer:
            number = int(peer.recv(16))
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            (pid,) = struct.unpack_from("i", credentials)
            pidfd = os.pidfd_open(pid)
            peer.recv(1)  # the end: from the next notified call on it waits for us
        while (listener := _listener_of(pid, pidfd, number)) < 0:
            pass
        try:
            while self._wait(listener):
                self._answer(listener)
        finally:
            os.close(listener)
            os.close(pidfd)

    def _answer(self, listener: int) -> None:
        buffer = ctypes.create_string_buffer(_NOTIFICATION.size)
        if _libc.ioctl(listener, ctypes.c_ulong(_NOTIF_RECV), buffer) == -1:
            return  # the process was killed meanwhile
        identity, pid, _, number, *_ = _NOTIFICATION.unpack(buffer.raw)
        error = self._decide(pid, _NAMES[number])
        response = _RESPONSE.pack(identity, 0, -error, 0 if error else _CONTINUE)
        _libc.ioctl(listener, ctypes.c_ulong(_NOTIF_SEND), ctypes.create_string_buffer(response, len(response)))

    def _decide(self, pid: int, name: str) -> int:
        """Count a call; return the errno that it fails with, or 0. A signal is sent here."""
        if not self._order and name != self._armed_by:
            return 0
        process = self._order.setdefault(pid, len(self._order))
        calls = self.calls.setdefault(process, [])
        calls.append(name)
        strike = self._strike
        if strike is None or (strike.process, strike.number) != (process, len(calls)):
            return 0
        self.struck = name
        if strike.kill:
            with suppress(ProcessLookupError):
                os.kill(pid, strike.kill)
        return strike.errno


def _listener_of(pid: int, pidfd: int, number: int) -> int:
    """Return our own descriptor of the listener that a process is about to have under this number, or -1."""
    with suppress(OSError):
        if "seccomp" in os.readlink(f"/proc/{pid}/fd/{number}"):
            return _call(_SYS_PIDFD_GETFD, ctypes.c_int(pidfd), ctypes.c_int(number), ctypes.c_uint(0))
    return -1


def enter(path: str, run: Callable[[], None]) -> None:
    """In the program's process: have every call of CALLS notified from here on, then ``run``."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    data = filter_program()
    buffer = ctypes.create_string_buffer(data, len(data))
    program = Program(len(data) // 8, ctypes.addressof(buffer))
    arguments = (ctypes.c_long(_SET_MODE_FILTER), ctypes.c_long(_NEW_LISTENER), ctypes.byref(program))
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.connect(path)
    place = os.dup(channel.fileno())  # the lowest free number
    os.close(place)
    channel.send(str(place).encode())
    listener = _call(_SYS_SECCOMP, *arguments)
    assert listener == place
    channel.close()
    run()


KILL, TERMINATE = signal.SIGKILL, signal.SIGTERM
