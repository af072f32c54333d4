"""Custom filters (``--seccomp-filter``): they are added to ours, for a cell that runs; they can only take away.

Firecracker's threads are cells here: what its ``api`` and ``vmm`` filters forbid, the controller may not do; ``vmm``
holds for device cells, too, and ``vcpu`` for workers. Ours stay in force: a filter that was made for another program
cannot know what a cell of this one must not do. All become one program, so that a cell installs, and the walls' report
counts, as many filters as ever.
"""

from __future__ import annotations

import os
import stat
import struct

from base.errno_text import errno_text
from base.lean_typing import Sequence
from ipc.errors import FilterFileError
from ipc.filter_file import INSTRUCTION_SIZE, MAX_FILE_SIZE, MAX_INSTRUCTIONS, decode
from ipc.launch_plan import ROLE_DEVICE, ROLE_VCPU, ROLE_VMM
from jailer import syscalls
from jailer.errors import PolicyError
from jailer.seccomp.compile import sha256
from jailer.seccomp.install import RET_LOG, Filter

#: Firecracker's names for its threads.
NAMES = ("vmm", "api", "vcpu")
#: Which of them hold for which cell.
OF_ROLE = {ROLE_VMM: ("api", "vmm"), ROLE_VCPU: ("vcpu",), ROLE_DEVICE: ("vmm",)}

_INSTRUCTION = struct.Struct("<HBBI")
# Classic BPF (linux/bpf_common.h): BPF_JMP|BPF_JA, BPF_RET|BPF_K, BPF_RET|BPF_A.
_JUMP, _RETURN, _RETURN_COMPUTED = 0x05, 0x06, 0x16
#: SECCOMP_RET_ACTION_FULL and SECCOMP_RET_ALLOW of linux/seccomp.h.
_ACTION = 0xFFFF0000
_RET_ALLOW = 0x7FFF0000
_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS


def read(path: str, directory: int | None = None) -> dict[str, bytes]:
    """Return the custom programs by name. ``directory``, if there is one, is the root for ``path``: no link leads out.

    Raises PolicyError.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        if directory is None:
            descriptor = os.open(path, flags)
        else:
            descriptor = syscalls.openat2(directory, path, flags, _RESOLVE)
        with open(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PolicyError(f"Seccomp error: Filter file open error: {path} is not a file")
            content = file.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        raise PolicyError(f"Seccomp error: Filter file open error: {path}: {errno_text(error)}") from None
    return parse(content or b"")


def parse(content: bytes) -> dict[str, bytes]:
    """Return the custom programs by name. Raises PolicyError with Firecracker's words."""
    try:
        programs = decode(content)
    except FilterFileError as error:
        raise PolicyError(f"Seccomp error: Filter deserialization failed: {error}") from None
    for name in programs:
        if name not in NAMES:
            raise PolicyError(f"Seccomp error: Filter deserialization failed: Invalid thread category: {name}")
    for name in NAMES:
        if name not in programs:
            raise PolicyError(f"Seccomp error: Filter deserialization failed: Missing thread category: {name}")
    return programs


def add(chosen: Filter, custom: Sequence[tuple[str, bytes]]) -> Filter:
    """Return a filter that goes on with the custom programs (name, program) for what it would allow.

    So a call is answered by ours if that refuses it, else by the first custom program that does; what one of them is to
    log is logged when all allow it. Raises PolicyError.
    """
    rest = b""
    for name, program in reversed(custom):
        rest = _join(name, program, rest) if rest else _checked(name, program)
    program = _join(chosen.role, chosen.program, rest)
    if len(program) > MAX_INSTRUCTIONS * INSTRUCTION_SIZE:
        count = len(program) // INSTRUCTION_SIZE
        raise PolicyError(
            f"Seccomp error: the custom filter for {chosen.role} is too long: {count} instructions with ours, "
            f"{MAX_INSTRUCTIONS} are possible"
        )
    return chosen._replace(program=program, digest=sha256(program).hex())


def _checked(name: str, program: bytes) -> bytes:
    """Return the program, which has to return constants only. Raises PolicyError."""
    for at in range(0, len(program), INSTRUCTION_SIZE):
        if _INSTRUCTION.unpack_from(program, at)[0] == _RETURN_COMPUTED:
            raise PolicyError(f"Seccomp error: the custom filter {name} computes its answer, which is not supported")
    return program


def _join(name: str, first: bytes, rest: bytes) -> bytes:
    """Let a program go on with the rest where it would allow a call.

    What it would log is judged by a copy of the rest that logs what it allows: the stricter of two answers counts.
    Offsets in the first do not change. Raises PolicyError.
    """
    instructions = list(_INSTRUCTION.iter_unpack(_checked(name, first)))
    logs = any(code == _RETURN and constant & _ACTION == RET_LOG for code, _, _, constant in instructions)
    joined = []
    for index, (code, when_true, when_false, constant) in enumerate(instructions):
        to_rest = len(instructions) - index - 1
        if code == _RETURN and constant & _ACTION == _RET_ALLOW:
            joined.append(_INSTRUCTION.pack(_JUMP, 0, 0, to_rest))
        elif code == _RETURN and constant & _ACTION == RET_LOG:
            joined.append(_INSTRUCTION.pack(_JUMP, 0, 0, to_rest + len(rest) // INSTRUCTION_SIZE))
        else:
            joined.append(_INSTRUCTION.pack(code, when_true, when_false, constant))
    return b"".join(joined) + rest + (_logging(rest) if logs else b"")


def _logging(program: bytes) -> bytes:
    allow, log = _INSTRUCTION.pack(_RETURN, 0, 0, _RET_ALLOW), _INSTRUCTION.pack(_RETURN, 0, 0, RET_LOG)
    instructions = [program[at : at + INSTRUCTION_SIZE] for at in range(0, len(program), INSTRUCTION_SIZE)]
    return b"".join([log if each == allow else each for each in instructions])
