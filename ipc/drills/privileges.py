"""Attempts to become somebody else, to get privileges, or to take down walls of one's own."""

from __future__ import annotations

import errno
import os
import resource
import struct

from base.lean_typing import Callable
from ipc.drills.calls import Attempt, buffer, call

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 8, 22, 24
_PR_SET_SECUREBITS, _PR_SET_MM, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 28, 35, 36, 38
_PR_CAP_AMBIENT, _PR_SET_SPECULATION_CTRL, _PR_SET_SYSCALL_USER_DISPATCH, _PR_SCHED_CORE = 47, 53, 59, 62
_PR_SET_PTRACER, _PR_SET_TIMERSLACK, _PR_SET_TSC = 0x59616D61, 29, 26
_CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)
_ALL = 0xFFFFFFFF
_ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)


def _who() -> str:
    """Say who this process is, if it is somebody else than whom the plan names: user 0."""
    if 0 in os.getresuid():
        return f"users {os.getresuid()}, groups {os.getresgid()}"
    raise OSError(errno.EPERM, f"{os.strerror(errno.EPERM)}: users {os.getresuid()}")


def _environment(name: str) -> str:
    """Look for a variable of the caller, also where the kernel has put it."""
    value = os.environ.get(name)
    if value is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    return f"{name}={value}"


def _core_limit() -> str:
    """Let core files be written."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
    except ValueError:  # what Python makes of EPERM
        raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from None
    return "1 MiB"


def _prctl(option: int, *arguments: int | bytes | None, reached: tuple[int, ...] = ()) -> Attempt:
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return call("prctl", option, *padded, reached=reached)


ATTEMPTS: dict[str, Attempt] = {
    "be-root": _who,
    "setuid": call("setuid", 0),
    "setgid": call("setgid", 0),
    "setreuid": call("setreuid", 0, 0),
    "setregid": call("setregid", 0, 0),
    "setresuid": call("setresuid", 0, 0, 0),
    "setresgid": call("setresgid", 0, 0, 0),
    "setgroups": call("setgroups", 1, struct.pack("=I", 0)),
    "setfsuid": call("setfsuid", 0),
    "setfsgid": call("setfsgid", 0),
    "capset": call("capset", _CAPABILITY_HEADER, struct.pack("=6I", _ALL, _ALL, _ALL, _ALL, _ALL, _ALL)),
    "core-limit": _core_limit,
    "setrlimit": call("setrlimit", resource.RLIMIT_NOFILE, struct.pack("=QQ", 1 << 20, 1 << 20)),
    "prctl-dumpable": _prctl(_PR_SET_DUMPABLE, 1),
    "prctl-death-signal": _prctl(_PR_SET_PDEATHSIG, 0),
    "prctl-keep-capabilities": _prctl(_PR_SET_KEEPCAPS, 1),
    "prctl-seccomp-strict": _prctl(_PR_SET_SECCOMP, 2, None, reached=(errno.EFAULT,)),
    "prctl-bounding-set": _prctl(_PR_CAPBSET_DROP, 0),
    "prctl-secure-bits": _prctl(_PR_SET_SECUREBITS, 0),
    "prctl-memory-map": _prctl(_PR_SET_MM, 1, 0),
    "prctl-subreaper": _prctl(_PR_SET_CHILD_SUBREAPER, 1),
    "prctl-new-privileges": _prctl(_PR_SET_NO_NEW_PRIVS, 0),
    "prctl-ambient": _prctl(_PR_CAP_AMBIENT, 2, 21),
    "prctl-tracer": _prctl(_PR_SET_PTRACER, -1),
    "prctl-speculation": _prctl(_PR_SET_SPECULATION_CTRL, 0, 2),
    "prctl-user-dispatch": _prctl(_PR_SET_SYSCALL_USER_DISPATCH, 0),
    "prctl-core-scheduling": _prctl(_PR_SCHED_CORE, 0, 0, 0, reached=(errno.EINVAL, errno.ENODEV)),
    "prctl-timer-slack": _prctl(_PR_SET_TIMERSLACK, 1),
    "prctl-time-stamp-counter": _prctl(_PR_SET_TSC, 1),
    "seccomp-filter": call("seccomp", 1, 0, None, reached=(errno.EFAULT,)),
    "landlock": call("landlock_create_ruleset", None, 0, 1),
    "landlock-restrict": call("landlock_restrict_self", -1, 0, reached=(errno.EBADF, errno.EBADFD)),
    "lsm-attribute": call("lsm_set_self_attr", 100, buffer(b"", 32), 32, 0, reached=(errno.EINVAL, errno.EOPNOTSUPP)),
}
AIMED: dict[str, Callable[[str], str]] = {"environment": _environment}
