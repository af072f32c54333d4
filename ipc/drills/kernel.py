"""Attacks on the kernel's own interfaces: modules, programs for it, keys, clocks, KVM beyond what a worker needs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
import time

from base.lean_typing import Callable
from ipc.drills.calls import NUMBERS, X32_BIT, Attempt, buffer, call, system_call

_KVM_CHECK_EXTENSION = 0xAE03
_MAX_DESCRIPTORS = 128
_BAD = (errno.EBADF,)
_FAULT = (errno.EFAULT, errno.EINVAL)


def _gadget() -> int:
    """Return the address of ``mov eax, 20; int 0x80; ret``: getpid(2) as a 32-bit program calls it.

    An attacker finds these bytes in some library. Made when the template loads this module, before any wall.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\0\0\0\xcd\x80\xc3")
    _KEPT.append(page)
    return ctypes.addressof(ctypes.c_char.from_buffer(page))


_KEPT: list[mmap.mmap] = []
_INT_80 = ctypes.CFUNCTYPE(ctypes.c_int)(_gadget())


def _int_80() -> str:
    return f"returned {_INT_80()}"


def _x32() -> str:
    return f"returned {system_call(NUMBERS['umask'] | X32_BIT, 0o022)}"


def _unknown() -> str:
    return f"returned {system_call(4000)}"


def _vm() -> int:
    """Return this cell's KVM VM, -1 if it has none: only a VM answers KVM_CHECK_EXTENSION."""
    for descriptor in range(3, _MAX_DESCRIPTORS):
        try:
            system_call(NUMBERS["ioctl"], descriptor, _KVM_CHECK_EXTENSION, 0)
            return descriptor
        except OSError:
            continue
    return -1


def _kvm(request: int, argument: int | bytes | None = None) -> Attempt:
    return call("ioctl", _vm, request, argument, reached=(errno.EBADF, errno.EFAULT, errno.EEXIST, errno.EINVAL))


def _now() -> bytes:
    """Return the time that it is (struct timespec): to set it does no harm."""
    return struct.pack("=qq", *divmod(time.time_ns(), 10**9))


_IO_URING_PARAMETERS = buffer(b"", 120)
_TIMEX = buffer(struct.pack("=I", 0x4000), 208)  # struct timex: modes ADJ_TICK, to a value that is out of range
_PERF_EVENT = buffer(struct.pack("=II", 1, 128), 128)  # struct perf_event_attr: software event 0

ATTEMPTS: dict[str, Attempt] = {
    "init-module": call("init_module", None, 0, b"", reached=_FAULT),
    "finit-module": call("finit_module", -1, b"", 0, reached=_BAD),
    "delete-module": call("delete_module", b"drill", 0o4000, reached=(errno.ENOENT,)),
    "kexec-load": call("kexec_load", 0, 0, None, 0),
    "kexec-file-load": call("kexec_file_load", -1, -1, 0, None, 0, reached=_BAD),
    "bpf-map": call("bpf", 0, buffer(struct.pack("=5I", 2, 4, 8, 1, 0), 128), 128),
    "bpf-program": call("bpf", 5, buffer(b"", 128), 128, reached=_FAULT),
    "perf-event": call("perf_event_open", _PERF_EVENT, 0, -1, -1, 0),
    "perf-event-everything": call("perf_event_open", _PERF_EVENT, -1, 0, -1, 0),
    "keyctl": call("keyctl", 0, -3 & 0xFFFFFFFF, 0, 0, 0),
    "add-key": call("add_key", b"user", b"drill", b"x", 1, -2 & 0xFFFFFFFF),
    "request-key": call("request_key", b"user", b"drill", None, 0, reached=(errno.ENOKEY,)),
    "io-uring-setup": call("io_uring_setup", 4, _IO_URING_PARAMETERS),
    "io-uring-enter": call("io_uring_enter", -1, 0, 0, 0, None, 0, reached=_BAD),
    "io-uring-register": call("io_uring_register", -1, 0, None, 0, reached=(errno.EBADF, errno.EINVAL)),
    "io-setup": call("io_setup", 1, buffer(b"", 8)),
    "reboot": call("reboot", 0, 0, 0, None, reached=(errno.EINVAL,)),
    "settimeofday": call("settimeofday", None, bytes(8)),
    "clock-settime": call("clock_settime", 0, _now),
    "adjtimex": call("adjtimex", _TIMEX, reached=(errno.EINVAL,)),
    "clock-adjtime": call("clock_adjtime", 0, _TIMEX, reached=(errno.EINVAL,)),
    "sethostname": call("sethostname", b"drill", 5),
    "setdomainname": call("setdomainname", b"drill", 5),
    "syslog-read": call("syslog", 3, buffer(b"", 64), 64),
    "syslog-clear": call("syslog", 6, None, 0),
    "iopl": call("iopl", 3),
    "ioperm": call("ioperm", 0x80, 1, 1),
    "sysfs": call("sysfs", 3, 0, 0),
    "uselib": call("uselib", b"/drill"),
    "vhangup": call("vhangup"),
    "uname": call("uname", buffer(b"", 400)),
    "unknown-call": _unknown,
    "int-0x80": _int_80,
    "x32-call": _x32,
    "kvm-create-vm": _kvm(0xAE01, 0),
    "kvm-create-vcpu": _kvm(0xAE41, 200),
    "kvm-create-irqchip": _kvm(0xAE60),
    "kvm-create-pit": _kvm(0x4040AE77),
    "kvm-create-device": _kvm(0xC00CAEE0),
    "kvm-enable-capability": _kvm(0x4068AEA3),
    "kvm-get-dirty-log": _kvm(0x4010AE42),
    "kvm-set-nr-mmu-pages": _kvm(0xAE44, 1),
    "kvm-memory-region-2": _kvm(0x40A0AE49),
    "kvm-create-guest-memfd": _kvm(0xC040AED4),
    "kvm-encrypt": _kvm(0xC008AEBA),
    "kvm-msr-filter": _kvm(0x4188AEC6),
    "kvm-xen": _kvm(0x4038AE7A),
}
AIMED: dict[str, Callable[[str], str]] = {}
