"""Load compiled filters and install them with seccomp(2); no libseccomp at run time."""

from __future__ import annotations

import os
import struct

from base.errno_text import errno_text
from base.lean_typing import NamedTuple
from ipc.launch_plan import ROLE_SUPERVISOR, SECCOMP_KILL, SECCOMP_REPORT, seccomp_errno
from jailer import syscalls
from jailer.errors import PolicyError
from jailer.seccomp.compile import (
    ROLES,
    cache_key,
    compile_policy,
    compiled_path,
    places,
    sha256,
    unpack,
)
from jailer.seccomp.policy import OWN_PROCESS, full_text, parse

_RET = 0x06  # BPF_RET | BPF_K
RET_KILL_PROCESS = 0x80000000
RET_ERRNO = 0x00050000
RET_USER_NOTIF = 0x7FC00000
RET_LOG = 0x7FFC0000  # the placeholder of compiled filters
_INSTRUCTION = struct.Struct("<HBBI")
assert _INSTRUCTION.size == 8  # struct sock_filter
_CONSTANT = struct.Struct("<I")
#: What supervisor.policy has for the first user of the cells, until it is known.
CELL_USERS = 0x43454C00


class Filter(NamedTuple):
    """A filter ready to be installed, and the digest by which the walls' report knows it.

    ``own_process`` and ``cell_users`` are the byte offsets in the program at which :func:`install` puts the process id
    and the first user of the cells; the digest is that of the program before, the same for every cell of a role.
    """

    role: str
    mode: str
    program: bytes
    digest: str
    own_process: tuple[int, ...]
    cell_users: tuple[int, ...] = ()


class Loaded(NamedTuple):
    """The filters of every role for one launch; ``warning`` is empty unless one had to be compiled now."""

    filters: dict[str, Filter]
    warning: str


#: Filters that were loaded already: a template that was made ahead has them ready.
_ready: dict[tuple[str, str, str], Filter] = {}


def load(roles: tuple[str, ...], mode: str, variant: str = "") -> Loaded:
    """Load the filters of some roles for a mode (``kill``, ``errno=N`` or ``report``). Raises PolicyError.

    ``variant`` (``-faults``), or else the mode (``-report``), is appended to the name of a policy if there is one of
    that name.

    The supervisor's filter is inherited by the workers. In report mode it must not end or refuse what their own
    filters are to report (KILL and ERRNO take precedence over USER_NOTIF), and nobody could answer a notification
    of the supervisor itself; so its default action is LOG there.
    """
    filters = {}
    warning = ""
    for role in roles:
        ready = _ready.get((role, mode, variant))
        if ready is not None:
            filters[role] = ready
            continue
        names = (role + (variant or f"-{mode}"), role)
        policy = next(name for name in names if name in ROLES)
        text = full_text(policy)
        key = cache_key(text)
        try:
            with open(compiled_path(policy, key), "rb") as file:
                program = unpack(file.read(), key)[1]
        except (OSError, PolicyError):
            program = compile_policy(parse(policy))[0]
            warning = "seccomp filters are not compiled ahead; run ./dev setup for a faster start"
        program = with_default(program, _default_action(role, mode))
        made = Filter(role, mode, program, sha256(program).hex(), places(program, OWN_PROCESS))
        if role == ROLE_SUPERVISOR:
            made = made._replace(cell_users=places(program, CELL_USERS))
        _ready[role, mode, variant] = filters[role] = made
    return Loaded(filters, warning)


def _default_action(role: str, mode: str) -> int:
    if mode == SECCOMP_KILL:
        return RET_KILL_PROCESS
    if mode == SECCOMP_REPORT:
        return RET_LOG if role == ROLE_SUPERVISOR else RET_USER_NOTIF
    number = seccomp_errno(mode)
    if number is None:
        raise PolicyError(f"unknown seccomp mode {mode!r}")
    return RET_ERRNO | number


def with_default(program: bytes, action: int) -> bytes:
    """Return the program with its placeholder action replaced."""
    placeholder = _INSTRUCTION.pack(_RET, 0, 0, RET_LOG)
    replacement = _INSTRUCTION.pack(_RET, 0, 0, action)
    instructions = [program[offset : offset + 8] for offset in range(0, len(program), 8)]
    if placeholder not in instructions:
        raise PolicyError("compiled seccomp filter has no default action")
    return b"".join([replacement if each == placeholder else each for each in instructions])


def for_process(chosen: Filter, pid: int, first_cell_uid: int = 0) -> bytes:
    """Return the program in which OWN_PROCESS is this process, and CELL_USERS the first user of the cells, if any."""
    if not chosen.own_process and not chosen.cell_users:
        return chosen.program
    program = bytearray(chosen.program)
    for offset in chosen.own_process:
        _CONSTANT.pack_into(program, offset, pid)
    for offset in chosen.cell_users if first_cell_uid else ():
        _CONSTANT.pack_into(program, offset, first_cell_uid)
    return bytes(program)


def install(chosen: Filter, first_cell_uid: int = 0) -> int:
    """Install a filter on every thread of this process; PR_SET_NO_NEW_PRIVS must be set.

    The process id is the one that its own pid namespace knows: system calls name it so, and a filter sees them as made.
    Returns the listener's descriptor in report mode (unless the role is the supervisor), else -1. Raises PolicyError.
    """
    flags = syscalls.SECCOMP_FILTER_FLAG_TSYNC
    listening = chosen.mode == SECCOMP_REPORT and chosen.role != ROLE_SUPERVISOR
    if listening:
        flags |= syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER | syscalls.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
    try:
        result = syscalls.seccomp_set_filter(for_process(chosen, os.getpid(), first_cell_uid), flags)
    except OSError as error:
        text = f"cannot install the seccomp filter of {chosen.role}: {errno_text(error)}"
        raise PolicyError(text, error.errno or 0) from None
    return result if listening else -1
