"""How the supervisor lets a cell pass: it is verified from outside, at both stages of its walls (jailer.cell)."""

from __future__ import annotations

import errno
import math
import os

from base import exit_codes, faults, threads
from base.errno_text import errno_text, strerror
from base.lean_std import signal, socket
from base.lean_typing import Callable
from ipc import descriptors
from ipc.errors import IpcError
from ipc.launch_plan import ROLE_SUPERVISOR, SECCOMP_OFF, SECCOMP_REPORT
from jailer import cell, verify, wall_report, walls
from jailer.cell_record import Cell, Progress, Setup
from jailer.errors import CleanupError
from jailer.filters import RUNNING, SETUP
from jailer.seccomp import notification

WALL_SECCOMP = "seccomp"
WALL_MEMORY = "memory"
#: What it means for the microVM that one of them has ended its controller.
EXIT_CODES = {WALL_SECCOMP: exit_codes.BAD_SYSCALL, WALL_MEMORY: exit_codes.GENERIC_ERROR}
#: What ZeroMQ says before it calls abort(3).
_OUT_OF_MEMORY = "FATAL ERROR: OUT OF MEMORY"


class Sealing:
    """The supervisor's ends of the seal channels. ``fail`` ends a cell, and the launch if it is the controller."""

    def __init__(self, setup: Setup, controller: Cell, fail: Callable[[Cell, str], None]) -> None:
        self._setup = setup
        self._plan = setup.plan
        self._log = setup.log
        self._controller = controller
        self._fail = fail
        #: Our own walls were verified and told of.
        self.reported = False
        #: Descriptors that a cell may send: the listener of its filter.
        self._listeners = int(setup.plan.seccomp == SECCOMP_REPORT)
        self._steps: dict[tuple[Progress, bytes], Callable[[Cell], None]] = {
            (Progress.FORKED, cell.LANDLOCKED): self._landlocked,
            (Progress.FORKED, cell.FILTERED): self._verify,
            (Progress.VERIFIED, cell.HIDDEN): self._hidden,
            (Progress.HIDDEN, cell.FILTERED): self._finish,
        }
        if self._listeners:
            self._steps[Progress.HIDDEN, cell.TIGHTENING] = self._tightening

    def receive(self, record: Cell) -> bool:
        """A cell says how far it is; False if it says nothing.

        Once it is hidden it has read what others sent: then nothing else is believed.
        """
        assert record.seal is not None
        try:
            frame, owned = descriptors.receive(record.seal, self._listeners, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except IpcError as error:
            self._fail(record, f"{record.name} (pid {record.pid}): {error}")
            return True
        with owned:
            if not frame:
                record.seal.close()  # at the end of the channel the exit status tells the rest
                record.seal = None
            elif frame.startswith(cell.FAILED):
                text = frame[len(cell.FAILED) :].decode("utf-8", "replace")
                record.text = text
                self._fail(record, f"{record.name} (pid {record.pid}) cannot start: {text}")
            elif (record.progress, frame) in self._steps:
                if len(owned):
                    record.listener = owned.take()
                self._steps[record.progress, frame](record)
            elif record.progress is Progress.HIDDEN:
                self._refuse(record, f"{record.name} (pid {record.pid}) said what it may not say while it is sealed")
            elif frame != cell.ENTERED:
                record.last_words = frame.decode("utf-8", "replace").strip()
        return True

    def drain(self, record: Cell) -> None:
        """A cell ended before it was sealed: its last words, if any, say why."""
        while record.seal is not None and self.receive(record):
            pass

    def _landlocked(self, record: Cell) -> None:
        record.landlocked = True

    def _verify(self, record: Cell) -> None:
        """Its first filter is on, and nothing of another cell was read: its walls are read back."""
        faults.visit("supervisor.spawn.seal")
        if not self._is_as_asked(record, SETUP):
            return
        try:
            record.proc = verify.OpenFiles(record.pid, self._setup.proc)
        except (FileNotFoundError, ProcessLookupError):
            return  # it died meanwhile: its exit status tells why
        except OSError as error:
            self._refuse(record, f"{record.name} (pid {record.pid}): its walls cannot be read: {errno_text(error)}")
            return
        faults.visit("supervisor.spawn.verified")
        record.progress = Progress.VERIFIED
        self._answer(record, cell.VERIFIED)

    def _hidden(self, record: Cell) -> None:
        """It says that it is not dumpable any more, and does not wait for an answer."""
        wanted = walls.DUMPABLE not in self._plan.switched_off
        if wanted and verify.is_dumpable(record.pid, record.uid or self._plan.uid, self._setup.proc):
            self._refuse(record, f"{record.name} (pid {record.pid}): walls differ: dumpable: asked False, found True")
            return
        record.progress = Progress.HIDDEN
        if record is not self._controller:
            record.deadline = math.inf  # from here on it is for the controller to say how long a worker may take

    def _tightening(self, record: Cell) -> None:
        """Report mode: a process has one listener at a time, and its second filter is to have one."""
        if record.listener >= 0:
            os.close(record.listener)
            record.listener = -1
        self._answer(record, cell.GO)

    def _finish(self, record: Cell) -> None:
        """Its second filter is on."""
        if not self._is_as_asked(record, RUNNING):
            return
        if record is not self._controller and not self.reported and self.report_self():
            return  # no guest starts under a supervisor that is not what it should be
        record.progress = Progress.SEALED
        self._answer(record, cell.GO)
        if record is self._controller:
            self._launched()
        if record.seal is not None:
            record.seal.close()
            record.seal = None
        if record.proc is not None:
            record.proc.close()
            record.proc = None

    def _launched(self) -> None:
        """The walls of the controller are closed: from here on what was made for the microVM is its own."""
        if self._controller.killed:
            return
        try:
            self._setup.janitor.launched()
        except CleanupError as error:
            self._fail(self._controller, str(error))

    def _is_as_asked(self, record: Cell, stage: str) -> bool:
        """Compare a cell with its walls; one that differs is ended. False also if it has ended by itself."""
        differences = wall_report.compare(self._setup, record, stage)
        if differences is None:
            return False  # its exit status tells why
        if text := self._unlike(record.name, record.pid, differences):
            self._refuse(record, text)
            return False
        return True

    def _unlike(self, name: str, pid: int, differences: list[str]) -> str:
        """Say what differs and is not tolerated, or nothing."""
        if not differences or walls.VERIFY in self._plan.switched_off:
            return ""
        return f"{name} (pid {pid}): walls differ: {'; '.join(differences)}"

    def _refuse(self, record: Cell, text: str) -> None:
        record.wall = "verify"
        self._fail(record, text)

    def _answer(self, record: Cell, frame: bytes) -> None:
        assert record.seal is not None
        try:
            descriptors.send(record.seal, frame)
        except IpcError as error:
            if not isinstance(error.__context__, ConnectionError):
                self._fail(record, f"{record.name} (pid {record.pid}): {error}")
            # Else it ended meanwhile; what it has said before is still to be read.

    def report_self(self) -> bool:
        """Verify our own walls, when nobody waits for us or before the first worker goes on; True if one differs."""
        self.reported = True
        if self._plan.seccomp == SECCOMP_OFF:
            self._log.warning("seccomp is off in every cell")
        text = self._unlike(ROLE_SUPERVISOR, os.getpid(), wall_report.compare_own(self._setup))
        if text:
            self._fail(self._controller, text)
        return bool(text)

    def notified(self, record: Cell) -> None:
        """Report mode: a cell waits inside a forbidden system call; say which, and end it."""
        call = notification.receive(record.listener)
        if call is None:
            return
        record.wall = WALL_SECCOMP
        self._log.error(f"{record.name} (pid {record.pid}): wall seccomp: {notification.describe(call)}")
        record.kill()
        os.close(record.listener)
        record.listener = -1


def met_memory_limit(record: Cell, number: int, code: int) -> bool:
    """Note whether a cell that ended by this signal, or with this exit code, got no more memory (jailer.bounds).

    Process 1 of a pid namespace aborts itself by SIGSEGV, and where the filter forbids abort(3) it ends by SIGSYS.
    """
    aborted = number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGSYS) and not record.wall
    met = code == exit_codes.CELL_OUT_OF_MEMORY or (aborted and record.last_words.startswith(_OUT_OF_MEMORY))
    if met:
        record.wall = WALL_MEMORY
    return met


def given_up(last_words: str) -> str:
    """Say what it means that a cell ended by SIGABRT before its walls were tight.

    ZeroMQ calls abort(3) when it gets no thread although there was room a moment ago, after words like "Resource
    temporarily unavailable (src/thread.cpp:241)".
    """
    words = last_words.partition(" (")[0]
    if words == strerror(errno.EAGAIN):
        return f"no thread can be made: {errno_text(errno.EAGAIN)}: {threads.ADVICE}"
    return f"a library has given up: {words or 'it has not said why'}"
