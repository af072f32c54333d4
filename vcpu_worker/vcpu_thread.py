"""The thread of one vCPU. It executes jobs, one after the other; "run the vCPU" is one of them.

The thread is the only one that issues ioctls on its vCPU. Whoever wants something of the vCPU hands over a job; the
result comes back through a queue that the control thread empties when its eventfd is signalled. A thread that
executes no job is parked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from _queue import SimpleQueue
from collections import deque

from ipc.typed import Any, Callable

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
        self._named = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(name.encode(),), daemon=True)

    def start(self) -> None:
        """Start the thread and wait until it is parked. Not possible after seal()."""
        self._thread.start()
        self._named.wait()

    def submit(self, job: Job, done: Done) -> None:
        """Let the thread execute ``job`` after those that were submitted before; ``done`` gets the result."""
        self._jobs.put((job, done))

    def kick(self) -> None:
        """Interrupt a KVM_RUN of this thread."""
        identity = self._thread.ident
        if identity is not None and self._thread.is_alive():
            signal.pthread_kill(identity, KICK_SIGNAL)

    def cpu_time_ns(self) -> int:
        """Return how much processor time the thread has used, the guest's included."""
        identity = self._thread.ident
        if identity is None or not self._thread.is_alive():
            return 0
        return time.clock_gettime_ns(time.pthread_getcpuclockid(identity))

    def end(self) -> None:
        """Let the thread end after the jobs that were submitted before."""
        self._jobs.put(None)

    def _main(self, name: bytes) -> None:
        _libc.prctl(_PR_SET_NAME, name, 0, 0, 0)
        self._named.set()
        while True:
            work = self._jobs.get()
            if work is None:
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
