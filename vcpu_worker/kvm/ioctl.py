"""How this package calls ioctl(2), and nowhere else.

``fcntl.ioctl`` drops the interpreter lock only for integers and for buffers of at most 1024 bytes. A larger call that
waits (a vCPU ioctl waits while another thread runs that vCPU) would therefore stop every thread of the process,
for good if the vCPU never exits: those calls go through ctypes, which always drops the lock.
"""

from __future__ import annotations

import ctypes
import fcntl

from vcpu_worker.errors import KvmError
from vcpu_worker.kvm.abi import request_name

#: IOCTL_BUFSZ of CPython's fcntlmodule.c.
FCNTL_BUFFER_LIMIT = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int


def ioctl_integer(descriptor: int, request: int, value: int = 0) -> int:
    """ioctl with a small non-negative integer (31 bits) as its argument. Raises KvmError."""
    try:
        return fcntl.ioctl(descriptor, request, value)
    except OSError as error:
        raise KvmError(request_name(request), error.errno or 0) from None


def ioctl_pointer(descriptor: int, request: int, pointer: int) -> int:
    """ioctl whose argument is a full machine word (an address or an unsigned long). Raises KvmError."""
    result: int = _ioctl(descriptor, request, pointer)
    if result < 0:
        raise KvmError(request_name(request), ctypes.get_errno())
    return result


def ioctl_buffer(descriptor: int, request: int, buffer: bytearray) -> int:
    """ioctl that reads or writes ``buffer`` in place. Raises KvmError."""
    if len(buffer) > FCNTL_BUFFER_LIMIT:
        # An array would be a new type for each length, which is slow to make in a cell that was just forked.
        first = ctypes.c_char.from_buffer(buffer)
        return ioctl_pointer(descriptor, request, ctypes.addressof(first))
    try:
        result: int = fcntl.ioctl(descriptor, request, buffer, True)
    except OSError as error:
        raise KvmError(request_name(request), error.errno or 0) from None
    return result
