"""Interrupts a ghost's KVM_RUN each time it has used 10 ms of processor time, so that it is looked at.

A halted ghost uses none: then nothing happens, and nothing is paid for it. The timer counts the thread's own time
(timer_create(2), CLOCK_THREAD_CPUTIME_ID), whichever vCPUs share its worker or its host CPU. It is periodic and made
before the worker is sealed: afterwards no system call concerns it.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import struct

from vcpu_worker.errors import WorkerError
from vcpu_worker.vcpu_thread import KICK_SIGNAL

#: Processor time after which a ghost is looked at; the kernel checks it at its own ticks.
PERIOD_NS = 10_000_000

_CLOCK_THREAD_CPUTIME_ID = 3
_SIGEV_THREAD_ID = 4
#: struct sigevent: value, signal, how to notify, thread id, padding to 64 bytes.
_SIGEVENT = struct.Struct("<Q3i44x")
#: struct itimerspec: interval, first expiry.
_ITIMERSPEC = struct.Struct("<4q")
assert _SIGEVENT.size == 64 and _ITIMERSPEC.size == 32

_libc = ctypes.CDLL(None, use_errno=True)


class WatchError(WorkerError):
    """The host gives no timer: too many signals are pending or reserved for this user (RLIMIT_SIGPENDING)."""

    code = "worker.watch"


def start() -> None:
    """Watch the calling thread. Raises WatchError."""
    event = ctypes.create_string_buffer(
        _SIGEVENT.pack(0, KICK_SIGNAL, _SIGEV_THREAD_ID, _thread.get_native_id()), _SIGEVENT.size
    )
    timer = ctypes.c_void_p()
    if _libc.timer_create(_CLOCK_THREAD_CPUTIME_ID, event, ctypes.byref(timer)) != 0:
        raise _error("timer_create")
    period = _ITIMERSPEC.pack(0, PERIOD_NS, 0, PERIOD_NS)
    if _libc.timer_settime(timer, 0, period, None) != 0:
        raise _error("timer_settime")


def _error(call: str) -> WatchError:
    return WatchError(f"{call}: {os.strerror(ctypes.get_errno())}: a ghost of this worker cannot be watched")
