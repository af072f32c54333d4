"""Threads: made where a refusal can be told, instead of inside a library that ends the process for it.

Threads and processes are counted together: by the cgroup controller pids (``pids.max``) and, per user, by
RLIMIT_NPROC. docs/jailer.md says how many a microVM needs.
"""

from __future__ import annotations

import _thread
import errno
import os
import time

from base.errno_text import errno_text
from base.errors import ThreadError
from base.lean_typing import Callable

ADVICE = "raise the limit on processes and threads (pids.max of the cgroup, RLIMIT_NPROC)"
#: What a ZeroMQ context makes with its first socket: one for I/O, one that reaps sockets.
ZEROMQ_THREADS = 2
#: How long the kernel may take to forget a thread that has ended.
_END_NS = 1_000_000_000
_PAUSE_S = 0.0001


def explain(error: OSError) -> str:
    """Return what a fork that failed is to be reported with: the error, and what to do if it was a limit."""
    return f"{errno_text(error)}: {ADVICE}" if error.errno == errno.EAGAIN else errno_text(error)


def start(function: Callable[..., object], *arguments: object) -> int:
    """Run a function in a new thread; return the thread's identity (pthread_t). Raises ThreadError."""
    try:
        return _thread.start_new_thread(function, arguments)
    except RuntimeError:  # says neither why nor with which number; pthread_create(3) knows only this one
        raise ThreadError(f"no thread can be made: {errno_text(errno.EAGAIN)}: {ADVICE}") from None


def check_room(count: int) -> None:
    """Make sure that ``count`` threads can be made now, by making and ending them. Raises ThreadError.

    Called before a library makes its own, in a process that has no /proc: a thread is gone when the kernel does not
    know its number any more.
    """
    made: list[int] = []
    gate = _thread.allocate_lock()
    begun = [_thread.allocate_lock() for _ in range(count)]

    def wait(lock: _thread.LockType) -> None:
        made.append(_thread.get_native_id())
        lock.release()
        with gate:
            pass

    with gate:
        for lock in begun:
            lock.acquire()
            start(wait, lock)
        for lock in begun:
            lock.acquire()
    deadline = time.monotonic_ns() + _END_NS
    for number in made:
        while _exists(number) and time.monotonic_ns() < deadline:
            time.sleep(_PAUSE_S)


def _exists(number: int) -> bool:
    try:
        os.sched_getaffinity(number)
    except ProcessLookupError:
        return False
    return True


class MadeByLibrary:
    """Around the making of ``count`` threads by a library that ends the process when it does not get one.

    Room for them is tried first. Others may take it in between; so what the library says then goes to
    ``last_words``, a descriptor of whoever has to report the end.
    """

    #: Set in a cell whose standard error nobody reads who has to report its end: its seal channel. Else -1.
    last_words = -1

    __slots__ = ("_count", "_saved")

    def __init__(self, count: int) -> None:
        self._count = count
        self._saved = -1

    def __enter__(self) -> None:
        """Raises ThreadError."""
        check_room(self._count)
        if self.last_words >= 0:
            self._saved = os.dup(2)
            os.dup2(self.last_words, 2)

    def __exit__(self, *_: object) -> None:
        if self._saved >= 0:
            os.dup2(self._saved, 2)
            os.close(self._saved)
