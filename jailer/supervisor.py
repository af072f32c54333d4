"""The supervisor: has cells forked and verified, tells the controller who ended, ends everything together.

Single-threaded, driven by poll(2). What the controller asks for is answered in jailer.requests, cells are forked in
jailer.spawner, their walls verified in jailer.sealing.
"""

from __future__ import annotations

import math
import os
import select
import struct
import sys
import time

from base import exit_codes, faults, timeline
from base.lean_std import signal, signal_name, socket
from ipc.launch_plan import ROLE_SUPERVISOR
from ipc.messages.supervisor import CellEnded, Shutdown, SignalNoticed
from jailer import syscalls, verify
from jailer.cell_record import SEAL_TIMEOUT_S, Cell, Progress, Setup
from jailer.ending import Ending
from jailer.errors import StepError
from jailer.outputs import Outputs
from jailer.requests import Requests
from jailer.sealing import EXIT_CODES, WALL_SECCOMP, Sealing, given_up, met_memory_limit
from jailer.spawner import Spawner

#: How long the controller may take to end in order after it was asked to.
SHUTDOWN_GRACE_S = 0.6
#: How long killed cells may take to disappear.
REAP_TIMEOUT_S = 5.0


class Supervisor:
    """Runs from the moment when the controller was forked until every cell has ended."""

    def __init__(self, setup: Setup, controller: Cell, channel: socket.socket, signals: int) -> None:
        self._setup = setup
        self._plan = setup.plan
        self._log = setup.log
        self._signals = signals
        self._controller = controller
        self._cells: dict[int, Cell] = {controller.pid: controller}
        self._pid = os.getpid()
        self._ending = Ending()
        self._sealing = Sealing(setup, controller, self._fail_cell)
        self._outputs = Outputs(self._cells, setup.log)
        self._log_end = False
        #: All our walls are closed: requests are served, workers forked.
        self._confined = False
        self._spawner = Spawner(setup, self._cells, channel)
        self._requests = Requests(setup, controller, channel, self._spawner, self._ending)

    @property
    def dies_by(self) -> int:
        """The signal that the visible process has to die by, 0 if its exit code says how the microVM ended."""
        return self._ending.dies_by

    # ------------------------------------------------------------ loop

    def run(self) -> int:
        """Serve until the controller and every worker have ended; return the exit code of the microVM."""
        faults.visit("supervisor.start")
        self._let_go_of_files()
        if self._plan.drills:
            self._run_drills()
        self._spawner.fork_ahead()
        while not self._ending.ended:
            self._turn()
        self._await_workers_end()
        self._setup.janitor.undo()  # nothing happens if the launch has succeeded
        code = exit_codes.GENERIC_ERROR if self._ending.exit_code is None else self._ending.exit_code
        if marks := timeline.collected():
            self._log.record({"timeline": marks})
        if self._log_end:
            self._log.error(f"Firecracker exiting with error. exit_code={code}")
        if self._log.lost:
            self._log.warning(f"{self._log.lost} lines were lost: nobody read them")
        return code

    def _run_drills(self) -> None:
        """Attack our own walls, and let workers know whom to attack (ipc.drills: loaded only if armed)."""
        targets = sys.modules["ipc.drills.targets"].__dict__
        targets["controller_pid"] = self._controller.pid
        sys.modules["ipc.drills"].__dict__["run"](self._plan.drills, ROLE_SUPERVISOR)
        if self._setup.asked.cells_own_pids:
            targets["controller_pid"] = 1  # as workers know it

    def await_controller(self) -> None:
        """Serve until the first walls of the controller are read: while we still may, before our own are closed."""
        while self._controller.progress is Progress.FORKED and not self._ending.ended:
            self._turn()

    def _let_go_of_files(self) -> None:
        """Put our layer of Landlock in force: the first walls of the controller are read, no worker is there yet."""
        try:
            self._setup.landlock.enforce(ROLE_SUPERVISOR)
        except StepError as error:
            self._fail_cell(self._controller, str(error))
        self._confined = True

    def _turn(self) -> None:
        ready = self._poll()
        if self._signals in ready:
            self._read_signals()
        if self._confined and self._requests.fileno() in ready:
            self._requests.serve()  # first: a worker's way to its guest is the longest
        for record in list(self._cells.values()):
            if record.listener in ready:
                self._sealing.notified(record)
            if record.fault_signals in ready:
                record.meet_fault()
            if record.seal is not None and record.seal.fileno() in ready:
                self._sealing.receive(record)
        self._outputs.pass_on(ready)
        if not ready and self._confined and not self._sealing.reported:
            self._sealing.report_self()
        self._check_deadlines()

    def _poll(self) -> set[int]:
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        if self._confined and self._requests.fileno() >= 0:
            poll.register(self._requests.fileno(), select.POLLIN)
        for record in self._cells.values():
            if record.seal is not None:
                poll.register(record.seal.fileno(), select.POLLIN)
            for descriptor in (record.listener, record.fault_signals):
                if descriptor >= 0:
                    poll.register(descriptor, select.POLLIN)
        for descriptor in self._outputs.due():
            poll.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(self._timeout_ms())}

    def _timeout_ms(self) -> int | None:
        if self._confined and not self._sealing.reported:
            return 0  # there is something to do when nobody wants anything
        deadlines = [record.deadline for record in self._cells.values() if record.seal is not None]
        if self._ending.deadline:
            deadlines.append(self._ending.deadline)
        deadlines += self._outputs.deadlines()
        soonest = min(deadlines, default=math.inf)
        return None if soonest == math.inf else max(0, int((soonest - time.monotonic()) * 1000) + 1)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._ending.deadline and now >= self._ending.deadline:
            self._log.error(f"{self._controller.name} (pid {self._controller.pid}) did not end in order; killed")
            self._ending.deadline = 0.0
            self._controller.kill()
        for record in self._cells.values():
            if record.seal is not None and now >= record.deadline:
                self._fail_cell(record, f"{record.name} (pid {record.pid}) was not sealed within {SEAL_TIMEOUT_S:g} s")

    # ------------------------------------------------------------ signals and ends

    def _read_signals(self) -> None:
        while True:
            try:
                data = os.read(self._signals, syscalls.SIGNALFD_SIGINFO_SIZE)
            except BlockingIOError:
                return
            (number,) = struct.unpack_from("=I", data, 0)
            (code,) = struct.unpack_from("=i", data, 8)
            (sender,) = struct.unpack_from("=I", data, 12)
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGXFSZ and sender == self._pid:
                pass  # a memfd of ours was to be larger than files may be: the call has failed, and says so
            elif number == signal.SIGPIPE and sender == self._pid:
                pass  # a line of our log had no reader: to log that as well would be the same again, without an end
            elif number == signal.SIGPIPE:
                self._note_signal(number, code)
            else:
                self._end_by_signal(number, code)

    def _note_signal(self, number: int, code: int) -> None:
        """SIGPIPE ends nothing: whoever writes hears of the broken pipe from the call that failed."""
        text = f"Received signal {number}, code {code}."
        self._log.error(text)
        if self._controller.seal is None and self._ending.exit_code is None:
            self._requests.send(SignalNoticed(number, text))

    def _end_by_signal(self, number: int, code: int) -> None:
        """Somebody ends the microVM by a signal to the visible process."""
        if self._ending.exit_code is not None:
            return
        self._ending.exit_code = exit_codes.of_intercepted(number)
        if number in exit_codes.DIE_BY:
            self._ending.dies_by = number
        text = f"Shutting down VM after intercepting signal {number}, code {code}."
        self._log.error(text)
        if self._controller.seal is None and self._requests.send(Shutdown(self._ending.exit_code, text)):
            self._ending.deadline = time.monotonic() + SHUTDOWN_GRACE_S
        else:
            self._controller.kill()

    def _reap(self) -> None:
        """Collect every child that ended, our own and (as process 1) whatever else was left to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            record = self._cells.pop(pid, None)
            if record is not None:
                self._cell_ended(record, status)

    def _cell_ended(self, record: Cell, status: int) -> None:
        number = int(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
        if record.seal is not None and not record.wall:
            self._sealing.drain(record)
        self._outputs.ended(record)
        name = f"{record.name} (pid {record.pid})"
        on_purpose = number == signal.SIGKILL and (record.killed or self._ended_with_controller(record))
        if number == signal.SIGSEGV and record.last_words and record.progress is not Progress.SEALED:
            number = int(signal.SIGABRT)  # abort(3) in process 1 of a pid namespace, which no signal of its own ends
        if number == signal.SIGABRT and record.progress is not Progress.SEALED:
            record.text = record.text or given_up(record.last_words)
            self._log.error(f"{name} cannot start: {record.text}")
        elif met_memory_limit(record, number, code):
            self._log.error(f"{name}: wall memory: it has met its limit of memory. {record.last_words}".rstrip())
        elif number == signal.SIGSYS and not record.wall:
            record.wall = WALL_SECCOMP
            self._log.error(f"{name}: wall seccomp: ended by the filter for a forbidden system call")
        elif number and not record.wall and not on_purpose:
            self._log.error(f"{name} was ended by signal {number} ({signal_name(number)})")
        if record is self._controller:
            self._controller_ended(record, number, code)
        elif not self._spawner.forget_ahead(record) and not self._ended_with_controller(record):
            self._requests.send(
                CellEnded(record.index, record.pid, code, number, record.wall, record.text, record.role)
            )
        record.close()

    def _ended_with_controller(self, record: Cell) -> bool:
        """Is the controller ending? As process 1 it takes the others along, and has ended when they were reaped."""
        if record is self._controller:
            return False
        return self._ending.ended or verify.is_ending(self._controller.pid, self._setup.proc)

    def _controller_ended(self, record: Cell, number: int, code: int) -> None:
        self._ending.ended = True
        self._ending.deadline = 0.0
        if self._ending.exit_code is None:
            self._ending.exit_code = EXIT_CODES.get(record.wall) or (exit_codes.of_signal(number) if number else code)
        self._log_end = bool(number)  # an orderly end was logged by the controller itself

    def _await_workers_end(self) -> None:
        for record in self._cells.values():
            record.kill()
        deadline = time.monotonic() + REAP_TIMEOUT_S
        while self._cells and time.monotonic() < deadline:
            poll = select.poll()
            poll.register(self._signals, select.POLLIN)
            poll.poll(100)
            self._read_signals()
            self._reap()
        for record in self._cells.values():
            self._log.error(f"{record.name} (pid {record.pid}) cannot be killed")

    def _fail_cell(self, record: Cell, text: str) -> None:
        """A cell is not what it should be: end it, and the launch with it if it is the controller."""
        self._log.error(text)
        record.kill()  # before it can read the end of its seal channel
        if record.seal is not None:
            record.seal.close()
            record.seal = None
        if record is self._controller and self._ending.exit_code is None:
            self._ending.exit_code = exit_codes.GENERIC_ERROR
