"""The thread of one vCPU. It executes jobs, one after the other; "run the vCPU" is one of them.

The thread is the only one that issues ioctls on its vCPU. Whoever wants something of the vCPU hands over a job; the
result comes back through a queue that the control thread empties when its eventfd is signalled. A thread that
executes no job is parked.

Made by ``_thread``: a process that has ``threading`` loaded pays 0.7 ms and 400 KiB of memory for it at every fork.
"""

from __future__ import annotations

import _thread
import ctypes
import os
from _queue import SimpleQueue

from base import threads
from base.lean_std import deque, signal
from base.lean_typing import Any, Callable

KICK_SIGNAL = signal.SIGRTMIN
_PR_SET_NAME = 15

_libc = ctypes.CDLL(None)

Job = Callable[[], Any]
#: Called in the control thread with the job's result, or with the exception that ended it.
Done = Callable[[Any], None]


class Completions:
    """Results on their way to the control thread, which polls ``eventfd``."""

    __slots__ = ("_results", "eventfd")

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._results: deque[tuple[Done, Any]] = deque()

    def put(self, done: Done, result: Any) -> None:
        """Queue a result (any thread)."""
        self._results.append((done, result))
        os.eventfd_write(self.eventfd, 1)

    def deliver(self) -> bool:
        """Call back for every queued result (control thread); False if there was none."""
        try:
            os.read(self.eventfd, 8)
        except BlockingIOError:
            pass
        delivered = False
        while self._results:
            done, result = self._results.popleft()
            done(result)
            delivered = True
        return delivered

    def close(self) -> None:
        """Close the eventfd."""
        os.close(self.eventfd)


class VcpuThread:
    """Executes jobs for one vCPU. ``name`` is what /proc shows (at most 15 bytes)."""

    def __init__(self, name: str, completions: Completions) -> None:
        self._completions = completions
        self._jobs: SimpleQueue[tuple[Job, Done] | None] = SimpleQueue()
        self._name = name.encode()
        self._parked = _thread.allocate_lock()
        #: pthread_t; 0 before the thread exists and after its end.
        self._identity = 0

    def start(self) -> None:
        """Start the thread and wait until it is parked. Not possible after seal(). Raises ThreadError."""
        with self._parked:
            self._identity = threads.start(self._main)
            self._parked.acquire()  # the thread releases it

    def submit(self, job: Job, done: Done) -> None:
        """Let the thread execute ``job`` after those that were submitted before; ``done`` gets the result."""
        self._jobs.put((job, done))

    def kick(self) -> None:
        """Interrupt a KVM_RUN of this thread."""
        if self._identity:
            signal.pthread_kill(self._identity, KICK_SIGNAL)

    def end(self) -> None:
        """Let the thread end after the jobs that were submitted before."""
        self._jobs.put(None)

    def _main(self) -> None:
        _libc.prctl(_PR_SET_NAME, self._name, 0, 0, 0)
        self._parked.release()
        while True:
            work = self._jobs.get()
            if work is None:
                self._identity = 0
                return
            job, done = work
            try:
                result = job()
            except Exception as error:  # handed on: the control thread decides what it means
                result = error
            self._completions.put(done, result)


def install_kick_handler() -> None:
    """Make the kick signal interrupt system calls and do nothing else. Main thread only."""
    signal.signal(KICK_SIGNAL, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (KICK_SIGNAL,))
