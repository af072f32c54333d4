"""How the supervisor lets a cell pass: it is verified from outside, twice, before it may do its work (jailer.cell)."""

from __future__ import annotations

import os

from base import faults
from base.lean_std import socket
from base.lean_typing import Callable
from ipc import descriptors
from ipc.errors import IpcError
from ipc.launch_plan import ROLE_SUPERVISOR, SECCOMP_OFF, cell_name
from jailer import cell, verify, wall_report, walls
from jailer.cell_record import Cell, Setup
from jailer.seccomp import notification

WALL_SECCOMP = "seccomp"


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

    def receive(self, record: Cell) -> None:
        """A cell says how far it is."""
        assert record.seal is not None
        try:
            frame, owned = descriptors.receive(record.seal, 1, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except IpcError as error:
            self._fail(record, f"{record.name} (pid {record.pid}): {error}")
            return
        with owned:
            if frame == cell.FILTERED:
                record.filtered = True
                if len(owned):
                    record.listener = owned.take()
                self._verify(record)
            elif frame == cell.CLOSED:
                self._finish(record)
            elif frame.startswith(cell.FAILED):
                text = frame[len(cell.FAILED) :].decode("utf-8", "replace")
                record.text = text
                self._fail(record, f"{record.name} (pid {record.pid}) cannot start: {text}")
            elif frame and frame != cell.ENTERED:
                record.last_words = frame.decode("utf-8", "replace").strip()
            elif not frame:
                record.seal.close()  # at the end of the channel the exit status tells the rest
                record.seal = None

    def drain(self, record: Cell) -> None:
        """A cell ended before it was sealed: its last words, if any, say why."""
        while record.seal is not None:
            before = record.seal
            self.receive(record)
            if record.seal is before:
                return

    def _verify(self, record: Cell) -> None:
        assert record.seal is not None
        faults.visit("supervisor.spawn.seal")
        differences = self._differences(record.role, record.index, record.pid, record.pidfd)
        if differences is None:
            return  # it died meanwhile: its exit status tells why
        if differences:
            self._refuse(record, differences)
            return
        faults.visit("supervisor.spawn.verified")
        self._answer(record, cell.VERIFIED)

    def _differences(self, role: str, index: int, pid: int, pidfd: int) -> str | None:
        """Compare a process with its walls; return what differs and is not tolerated, None if it has ended."""
        differences = wall_report.compare(self._setup, role, index, pid, pidfd)
        if differences is None:
            return None
        if not differences or walls.VERIFY in self._plan.switched_off:
            return ""
        return f"{cell_name(role, index)} (pid {pid}): walls differ: {'; '.join(differences)}"

    def _refuse(self, record: Cell, text: str) -> None:
        record.wall = "verify"
        self._fail(record, text)

    def _finish(self, record: Cell) -> None:
        wanted = walls.DUMPABLE not in self._plan.switched_off
        if wanted and verify.is_dumpable(record.pid, self._plan.uid, self._setup.proc):
            self._refuse(record, f"{record.name} (pid {record.pid}): walls differ: dumpable: asked False, found True")
            return
        if record is not self._controller and not self.reported and self.report_self():
            return  # no guest starts under a supervisor that is not what it should be
        self._answer(record, cell.GO)
        if record.seal is not None:
            record.seal.close()
            record.seal = None

    def _answer(self, record: Cell, frame: bytes) -> None:
        assert record.seal is not None
        try:
            descriptors.send(record.seal, frame)
        except IpcError:
            record.seal.close()  # the cell ended meanwhile
            record.seal = None

    def report_self(self) -> bool:
        """Verify our own walls, when nobody waits for us or before the first worker goes on; True if one differs."""
        self.reported = True
        if self._plan.seccomp == SECCOMP_OFF:
            self._log.warning("seccomp is off in every cell")
        differences = self._differences(ROLE_SUPERVISOR, 0, os.getpid(), -1)
        if differences == "":
            return False
        if differences:
            self._fail(self._controller, differences)
        return True

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
