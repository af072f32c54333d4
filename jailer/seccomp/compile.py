"""Compile policies to raw BPF with libseccomp, ahead of time: ``python -m jailer.seccomp.compile``.

Importing pyseccomp takes 26 ms (it looks for the library with ldconfig), so a launch never does it unless the
compiled filter is missing or was made from another policy text. A compiled filter's default action is the
placeholder RET_LOG; :func:`jailer.seccomp.install.load` puts the action of the chosen mode in its place. Where a rule
says OWN_PROCESS, the placeholder of that name is compared with; :func:`jailer.seccomp.install.install` puts the pid
there.

File format (little endian): magic ``CBSECC01``; 32 bytes SHA-256 of the policy text and the format; u16 length of
the libseccomp version, the version; u32 number of instructions; the instructions (struct sock_filter, 8 bytes each).
"""

from __future__ import annotations

import importlib
import os
import struct
import sys

from base.lean_typing import Any
from jailer.errors import PolicyError
from jailer.seccomp.policy import ALLOWED, DIRECTORY, OWN_PROCESS, Policy, Rule, full_text, parse

ROLES = (
    "supervisor", "vmm-setup", "vmm", "vcpu-setup", "vcpu", "vcpu-report",
    "device-setup", "device", "device-report", "janitor",
    "supervisor-faults", "vmm-setup-faults", "vmm-faults", "vcpu-setup-faults", "vcpu-faults",
    "device-setup-faults", "device-faults",
)  # fmt: skip
BUILD_DIRECTORY = os.path.join(DIRECTORY, "build")
MAGIC = b"CBSECC01"
#: The kernel takes at most 4096 instructions per filter (BPF_MAXINSNS).
MAX_INSTRUCTIONS = 4096
_FORMAT = "x86_64 3"
# Classic BPF (linux/bpf_common.h): BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K.
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_RET_ALLOW = 0x7FFF0000
_AUDIT_ARCH_X86_64 = 0xC000003E


def sha256(data: bytes) -> bytes:
    """SHA-256 without importing hashlib (3.5 ms, for OpenSSL)."""
    function: Any
    try:
        function = importlib.import_module("_sha256").sha256  # CPython up to 3.11
    except ImportError:
        try:
            function = importlib.import_module("_sha2").sha256  # CPython from 3.12
        except ImportError:
            function = importlib.import_module("hashlib").sha256
    digest: bytes = function(data).digest()
    return digest


def cache_key(text: str) -> bytes:
    """Return what a compiled filter is known by."""
    return sha256(f"{_FORMAT}\n{text}".encode())


def compiled_path(role: str, key: bytes, directory: str = BUILD_DIRECTORY) -> str:
    """Return the file that holds the compiled filter of a policy text."""
    return os.path.join(directory, f"{role}-{key.hex()[:16]}.bpf")


def compile_policy(policy: Policy) -> tuple[bytes, str]:
    """Return (raw BPF, version of libseccomp). Slow: imports pyseccomp. Raises PolicyError."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:
        raise PolicyError(f"cannot compile seccomp policies: {error}; install libseccomp2 and pyseccomp") from None
    try:
        seccomp_filter = pyseccomp.SyscallFilter(pyseccomp.LOG)
        seccomp_filter.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
        seccomp_filter.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    except OSError as error:
        raise PolicyError(f"libseccomp is too old: {error}") from None
    for rule in policy.rules:
        action = pyseccomp.ALLOW if rule.answer == ALLOWED else pyseccomp.ERRNO(rule.answer)
        arguments = [
            pyseccomp.Arg(condition.argument, pyseccomp.MASKED_EQ, condition.mask, condition.value)
            for condition in rule.conditions
        ]
        try:
            seccomp_filter.add_rule_exactly(action, rule.syscall, *arguments)
        except OSError as error:
            raise PolicyError(f"{policy.role}.policy: rule for {rule.syscall!r}: {error}") from None
    prologue = b"".join(
        _shortcut(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, rule.syscall), rule) for rule in policy.first
    )
    program = prologue + _export(seccomp_filter)
    if _names_own_process(policy) != bool(places(program, OWN_PROCESS)):
        raise PolicyError(f"{policy.role}.policy: libseccomp compares with the own process in an unknown way")
    return program, _library_version()


def _names_own_process(policy: Policy) -> bool:
    """Does a rule name the own process, and no wider one (whose conditions are fewer) makes it superfluous?"""
    for rule in policy.rules:
        if any(condition.value == OWN_PROCESS for condition in rule.conditions) and not any(
            other.syscall == rule.syscall and set(other.conditions) < set(rule.conditions) for other in policy.rules
        ):
            return True
    return False


def places(program: bytes, placeholder: int) -> tuple[int, ...]:
    """Return the byte offsets at which something else is to be put (u32: the constant of a comparison)."""
    return tuple(
        index * 8 + 4
        for index, (code, _, _, constant) in enumerate(struct.iter_unpack("<HBBI", program))
        if code == _JUMP_EQUAL and constant == placeholder
    )


def _shortcut(number: int, rule: Rule) -> bytes:
    """Return instructions that allow one call and else fall through to what follows.

    libseccomp compares the arguments of a call one after the other: KVM_RUN, the hottest call of all, would pass 40
    instructions in each of a worker's two filters.
    """
    (condition,) = rule.conditions
    instructions = (
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_JUMP_EQUAL, 0, 5, _AUDIT_ARCH_X86_64),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_JUMP_EQUAL, 0, 3, number),
        (_LOAD, 0, 0, 16 + 8 * condition.argument),  # the low half of the argument
        (_JUMP_EQUAL, 0, 1, condition.value),
        (_RETURN, 0, 0, _RET_ALLOW),
    )
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)


def _export(seccomp_filter: object) -> bytes:
    descriptor = os.memfd_create("bpf", os.MFD_CLOEXEC)
    with open(descriptor, "w+b") as file:
        seccomp_filter.export_bpf(file)  # type: ignore[attr-defined]
        size = os.fstat(descriptor).st_size
        program = os.pread(descriptor, size, 0)
    if not program or len(program) % 8 or len(program) // 8 > MAX_INSTRUCTIONS:
        raise PolicyError(f"libseccomp made a filter of {len(program)} bytes, which the kernel would not take")
    return program


def _library_version() -> str:
    import ctypes
    import ctypes.util

    class Version(ctypes.Structure):
        _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))

    library = ctypes.CDLL(ctypes.util.find_library("seccomp"))
    library.seccomp_version.restype = ctypes.POINTER(Version)
    version = library.seccomp_version().contents
    return f"{version.major}.{version.minor}.{version.micro}"


def pack(key: bytes, version: str, program: bytes) -> bytes:
    """Return the file content for a compiled filter."""
    encoded = version.encode("ascii")
    return MAGIC + key + struct.pack("<H", len(encoded)) + encoded + struct.pack("<I", len(program) // 8) + program


def unpack(content: bytes, key: bytes) -> tuple[str, bytes]:
    """Return (libseccomp version, raw BPF) of a compiled filter. Raises PolicyError if it is not the one asked for."""
    try:
        if content[:8] != MAGIC or content[8:40] != key:
            raise ValueError
        (length,) = struct.unpack_from("<H", content, 40)
        version = content[42 : 42 + length].decode("ascii")
        (count,) = struct.unpack_from("<I", content, 42 + length)
        program = content[46 + length :]
        if not 0 < count <= MAX_INSTRUCTIONS or len(program) != count * 8:
            raise ValueError
    except (ValueError, struct.error):
        raise PolicyError("compiled seccomp filter is damaged or of another policy") from None
    return version, program


def compile_all(directory: str = BUILD_DIRECTORY) -> list[str]:
    """Compile what is missing or was made with another libseccomp; remove what is old. Returns lines to print."""
    os.makedirs(directory, exist_ok=True)
    current = _library_version()
    lines = []
    wanted = set()
    for role in ROLES:
        key = cache_key(full_text(role))
        path = compiled_path(role, key, directory)
        wanted.add(os.path.basename(path))
        try:
            with open(path, "rb") as file:
                version, program = unpack(file.read(), key)
            if version == current:
                lines.append(f"{role}: up to date ({len(program) // 8} instructions)")
                continue
        except (OSError, PolicyError):
            pass
        program, version = compile_policy(parse(role))
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(pack(key, version, program))
        os.replace(temporary, path)
        lines.append(f"{role}: compiled ({len(program) // 8} instructions, libseccomp {version})")
    for name in os.listdir(directory):
        if name not in wanted:
            os.unlink(os.path.join(directory, name))
    return lines


def main() -> int:
    """Compile every policy into the build directory."""
    try:
        for line in compile_all():
            print(line)
    except (PolicyError, OSError) as error:
        print(f"seccomp: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
