"""An interpreter of classic BPF as seccomp uses it: the independent judge of compiled filters."""

from __future__ import annotations

import struct

ARCH_X86_64 = 0xC000003E
ARCH_I386 = 0x40000003

RET_KILL_PROCESS = 0x80000000
RET_USER_NOTIF = 0x7FC00000
RET_ALLOW = 0x7FFF0000
RET_LOG = 0x7FFC0000
RET_ERRNO = 0x00050000

_JUMPS = {
    0x15: lambda a, k: a == k,
    0x25: lambda a, k: a > k,
    0x35: lambda a, k: a >= k,
    0x45: lambda a, k: bool(a & k),
}


def evaluate(program: bytes, number: int, arguments: tuple[int, ...] = (), arch: int = ARCH_X86_64) -> int:
    """Return the value that a filter returns for a system call (struct seccomp_data of linux/seccomp.h)."""
    padded = (*arguments, *([0] * 6))[:6]
    data = struct.pack("<iIQ6Q", number, arch, 0, *padded)
    instructions = [struct.unpack_from("<HBBI", program, offset) for offset in range(0, len(program), 8)]
    position = accumulator = 0
    for _ in range(len(instructions)):
        code, jump_true, jump_false, k = instructions[position]
        position += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= k
        elif code == 0x05:  # BPF_JMP | BPF_JA
            position += k
        elif code in _JUMPS:
            position += jump_true if _JUMPS[code](accumulator, k) else jump_false
        elif code == 0x06:  # BPF_RET | BPF_K
            return int(k)
        else:
            raise AssertionError(f"instruction {code:#x} is not expected in these filters")
    raise AssertionError("the filter does not return")
