"""The supervisor's record of a cell, and what a launch hands to the supervisor."""

from __future__ import annotations

import os
import time

from base.lean_std import signal, socket
from base.lean_typing import Enum, NamedTuple
from ipc.launch_plan import Assignment, LaunchPlan, cell_name
from jailer import bounds, fault_signals, verify
from jailer.cell_output import CellOutput
from jailer.janitor import Janitor
from jailer.landlock import Rulesets
from jailer.log import Log
from jailer.memory import MemoryMaker
from jailer.seccomp.install import Filter
from jailer.steps.worker_cgroups import WorkerCgroups
from jailer.template import Roles

#: Signals that end the microVM when somebody sends them to the visible process. They are blocked and read from a
#: signalfd: so they reach a process 1, and a real fault (SIGSEGV, …) still ends the process, since the kernel
#: does not hold back a blocked signal that the process caused itself.
ENDING_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGBUS,
    signal.SIGSEGV,
    signal.SIGXFSZ,
    signal.SIGXCPU,
    signal.SIGILL,
    signal.SIGSYS,
)
BLOCKED_SIGNALS = frozenset(map(int, (*ENDING_SIGNALS, signal.SIGCHLD, signal.SIGPIPE)))
#: How long a cell may take from its fork until it is hidden, a controller until it is sealed.
SEAL_TIMEOUT_S = 60.0


class Progress(Enum):
    """How far the walls of a cell are."""

    FORKED = "forked"
    #: The walls of the setup stage were read back; the cell was told.
    VERIFIED = "verified"
    #: It is not dumpable any more, and may read what other cells send.
    HIDDEN = "hidden"
    #: The walls of the running stage were read back; the cell was told.
    SEALED = "sealed"


class Setup(NamedTuple):
    """Everything that the launch prepared for the supervisor."""

    plan: LaunchPlan
    roles: Roles
    asked: verify.Asked
    proc: int
    kvm_fd: int
    kvm_error: str
    filters: dict[str, Filter]
    memory: MemoryMaker
    log: Log
    worker_cgroups: WorkerCgroups
    landlock: Rulesets
    janitor: Janitor

    def limits(self, assignment: Assignment) -> bounds.Limits:
        """Return the limits of a worker or device cell that is forked for this."""
        return bounds.wanted(self.plan, assignment.role, assignment, self.asked.inherited)


def open_pidfd(pid: int) -> int:
    """Return a pidfd of a child of ours. Raises OSError; then the child is gone."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


class Cell:
    """One child: the controller, a worker or a device cell."""

    __slots__ = (
        "assignment", "deadline", "fault_signals", "index", "killed", "landlocked", "last_words", "listener", "output",
        "pid", "pidfd", "proc", "progress", "role", "seal", "text", "uid", "wall",
    )  # fmt: skip

    def __init__(self, role: str, index: int, pid: int, pidfd: int, seal: socket.socket) -> None:
        self.role = role
        self.index = index
        self.pid = pid
        self.pidfd = pidfd
        self.seal: socket.socket | None = seal
        self.listener = -1
        #: What it writes to standard error; None without the wall of that.
        self.output: CellOutput | None = None
        #: Where process 1 asks for signals to itself, if faults are armed.
        self.fault_signals = -1
        #: What a worker or device cell was forked for.
        self.assignment: Assignment | None = None
        #: Its user and group, if they are not the controller's.
        self.uid = 0
        self.deadline = time.monotonic() + SEAL_TIMEOUT_S
        self.wall = ""
        #: Why it could not start, in its own words.
        self.text = ""
        #: What a library of it said before it ended the process.
        self.last_words = ""
        #: How far its walls are.
        self.progress = Progress.FORKED
        #: Its files in /proc that stay readable when it is hidden, once its walls were verified.
        self.proc: verify.OpenFiles | None = None
        #: It says that its layer of Landlock is in force.
        self.landlocked = False
        #: It was killed on purpose, by us or because the controller asked for it.
        self.killed = False

    @property
    def name(self) -> str:
        """``vmm``, ``vcpu 0``."""
        return cell_name(self.role, self.index)

    def kill(self) -> None:
        """Send SIGKILL; nothing happens if the cell is gone."""
        self.killed = True
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def meet_fault(self) -> None:
        """An armed fault in process 1: signal it. What comes of it is told like any other end."""
        if not fault_signals.answer(self.fault_signals, self.pidfd):
            os.close(self.fault_signals)
            self.fault_signals = -1

    def close(self) -> None:
        """Close what belongs to the cell."""
        if self.seal is not None:
            self.seal.close()
            self.seal = None
        if self.proc is not None:
            self.proc.close()
            self.proc = None
        if self.output is not None:
            self.output.close()
        for name in ("fault_signals", "listener", "pidfd"):
            descriptor = getattr(self, name)
            if descriptor >= 0:
                os.close(descriptor)
                setattr(self, name, -1)
