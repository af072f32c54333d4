"""The supervisor: forks workers, verifies every cell, tells the controller who ended, ends everything together.

Single-threaded, driven by poll(2), forks only from here. What the controller may ask for is in the plan.
"""

from __future__ import annotations

import math
import os
import select
import struct
import sys
import time

from base import exit_codes, faults, threads, timeline
from base.errno_text import errno_text
from base.lean_std import signal, signal_name, socket
from base.lean_typing import Any, Callable
from ipc import descriptors
from ipc.channel import PairChannel
from ipc.errors import IpcError
from ipc.launch_plan import ENDPOINT_BOUND, ROLE_SUPERVISOR, ROLE_VCPU, Assignment
from ipc.messages.records import Failed
from ipc.messages.supervisor import (
    SUPERVISOR,
    CellEnded,
    CreateMemory,
    MemoryCreated,
    Shutdown,
    SignalCell,
    Signalled,
    SignalNoticed,
    Spawn,
    Spawned,
)
from jailer import cell, syscalls, verify
from jailer.cell_output import LogPipe
from jailer.cell_record import SEAL_TIMEOUT_S, Cell, Progress, Setup
from jailer.errors import StepError
from jailer.filters import of_cell
from jailer.outputs import Outputs
from jailer.plan import refuse_assignment
from jailer.sealing import EXIT_CODES, WALL_SECCOMP, Sealing, given_up, met_memory_limit
from jailer.steps import process

#: A controller that floods its channel must not keep the supervisor from its signals.
MAX_MESSAGES_PER_TURN = 16
_CELL_SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT)
#: How long the controller may take to end in order after it was asked to, and after it closed its channel itself.
SHUTDOWN_GRACE_S = 0.6
CLOSING_GRACE_S = 5.0
#: How long killed cells may take to disappear.
REAP_TIMEOUT_S = 5.0


class Supervisor:
    """Runs from the moment when the controller was forked until every cell has ended."""

    def __init__(self, setup: Setup, controller: Cell, channel: socket.socket, signals: int) -> None:
        self._setup = setup
        self._plan = setup.plan
        self._log = setup.log
        self._signals = signals
        channel.setblocking(False)
        self._channel: PairChannel | None = PairChannel(channel, SUPERVISOR, setup.plan.epoch)
        self._controller = controller
        self._cells: dict[int, Cell] = {controller.pid: controller}
        self._pid = os.getpid()
        self._exit_code: int | None = None
        #: The signal that the visible process has to die by, 0 if its exit code says how the microVM ended.
        self.dies_by = 0
        self._end_deadline = 0.0
        self._ended = False
        self._sealing = Sealing(setup, controller, self._fail_cell)
        self._outputs = Outputs(self._cells, setup.log)
        self._log_end = False
        #: All our walls are closed: requests are served, workers forked.
        self._confined = False
        #: The worker that was forked without being asked for, and the controller's end of its descriptor channel.
        self._ahead: tuple[Assignment, Cell, socket.socket] | None = None
        self._handlers: dict[type[Any], Callable[[Any, int], None]] = {
            Spawn: self._spawn,
            SignalCell: self._signal_cell,
            CreateMemory: self._create_memory,
        }

    # ------------------------------------------------------------ loop

    def run(self) -> int:
        """Serve until the controller and every worker have ended; return the exit code of the microVM."""
        faults.visit("supervisor.start")
        self._let_go_of_files()
        if self._plan.drills:
            self._run_drills()
        self._fork_ahead()
        while not self._ended:
            self._turn()
        self._await_workers_end()
        code = exit_codes.GENERIC_ERROR if self._exit_code is None else self._exit_code
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

    def _let_go_of_files(self) -> None:
        """Put our layer of Landlock in force: the first walls of the controller are read, no worker is there yet."""
        while self._controller.progress is Progress.FORKED and not self._ended:
            self._turn()
        try:
            self._setup.landlock.enforce(ROLE_SUPERVISOR)
        except StepError as error:
            self._fail_cell(self._controller, str(error))
        self._confined = True

    def _turn(self) -> None:
        ready = self._poll()
        if self._signals in ready:
            self._read_signals()
        if self._confined and self._channel is not None and self._channel.fileno() in ready:
            self._serve()  # first: a worker's way to its guest is the longest
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
        if self._confined and self._channel is not None:
            poll.register(self._channel.fileno(), select.POLLIN)
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
        if self._end_deadline:
            deadlines.append(self._end_deadline)
        deadlines += self._outputs.deadlines()
        soonest = min(deadlines, default=math.inf)
        return None if soonest == math.inf else max(0, int((soonest - time.monotonic()) * 1000) + 1)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._end_deadline and now >= self._end_deadline:
            self._log.error(f"{self._controller.name} (pid {self._controller.pid}) did not end in order; killed")
            self._end_deadline = 0.0
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
        if self._controller.seal is None and self._exit_code is None:
            self._send(SignalNoticed(number, text))

    def _end_by_signal(self, number: int, code: int) -> None:
        """Somebody ends the microVM by a signal to the visible process."""
        if self._exit_code is not None:
            return
        self._exit_code = exit_codes.of_intercepted(number)
        if number in exit_codes.DIE_BY:
            self.dies_by = number
        text = f"Shutting down VM after intercepting signal {number}, code {code}."
        self._log.error(text)
        if self._controller.seal is None and self._send(Shutdown(self._exit_code, text)):
            self._end_deadline = time.monotonic() + SHUTDOWN_GRACE_S
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
        elif self._ahead is not None and record is self._ahead[1]:
            self._ahead[2].close()
            self._ahead = None  # the controller does not know of it; when it asks, another one is forked
        elif not self._ended_with_controller(record):
            self._send(CellEnded(record.index, record.pid, code, number, record.wall, record.text))
        record.close()

    def _ended_with_controller(self, record: Cell) -> bool:
        """Is the controller ending? As process 1 it takes the others along, and has ended when they were reaped."""
        if record is self._controller:
            return False
        return self._ended or verify.is_ending(self._controller.pid, self._setup.proc)

    def _controller_ended(self, record: Cell, number: int, code: int) -> None:
        self._ended = True
        self._end_deadline = 0.0
        if self._exit_code is None:
            self._exit_code = EXIT_CODES.get(record.wall) or (exit_codes.of_signal(number) if number else code)
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
        if record is self._controller and self._exit_code is None:
            self._exit_code = exit_codes.GENERIC_ERROR

    # ------------------------------------------------------------ requests

    def _serve(self) -> None:
        assert self._channel is not None
        try:
            for _ in range(MAX_MESSAGES_PER_TURN):
                envelope, owned = self._channel.receive()
                owned.close()
                if envelope is None:
                    continue
                handler = self._handlers.get(type(envelope.message))
                if handler is None:
                    self._send(Failed("supervisor.request", "not a request"), envelope.sequence)
                else:
                    handler(envelope.message, envelope.sequence)
        except BlockingIOError:
            return
        except IpcError as error:
            # The channel's end is the controller's: it is closing down, or it broke the protocol.
            self._channel.close()
            self._channel = None
            if "closed" not in str(error):
                self._log.error(f"{self._controller.name} (pid {self._controller.pid}): {error}; killed")
                self._controller.wall = self._controller.wall or "protocol"
                self._controller.kill()
            elif not self._end_deadline:
                self._end_deadline = time.monotonic() + CLOSING_GRACE_S

    def _send(self, message: Any, reply_to: int = 0, fds: tuple[int, ...] = ()) -> bool:
        """Send to the controller; a controller that does not read is ended. Returns whether it was sent."""
        if self._channel is None:
            return False
        try:
            self._channel.send(message, reply_to, fds)
        except IpcError as error:
            if not self._ended:
                self._log.error(f"{self._controller.name} (pid {self._controller.pid}) does not read: {error}; killed")
                self._controller.kill()
            return False
        return True

    def _signal_cell(self, request: SignalCell, sequence: int) -> None:
        record = self._cells.get(request.pid)
        is_worker = record is not None and record.role == ROLE_VCPU and record.index == request.worker
        if request.signal not in _CELL_SIGNALS or record is None or not is_worker:
            self._send(Failed("supervisor.signal", "no such worker, or not a signal that may be sent"), sequence)
            return
        if request.signal == signal.SIGKILL:
            record.killed = True
        try:
            signal.pidfd_send_signal(record.pidfd, request.signal)
        except ProcessLookupError:
            pass  # ended, its notice follows
        self._send(Signalled(), sequence)

    def _create_memory(self, request: CreateMemory, sequence: int) -> None:
        if request.size > self._plan.max_memory_bytes:
            text = f"the plan allows {self._plan.max_memory_bytes} bytes of guest memory, not {request.size}"
            self._send(Failed("supervisor.plan", text), sequence)
            return
        try:
            descriptor = self._setup.memory.make(request.size)
        except OSError as error:
            text = f"Invalid Memory Configuration: Cannot create mmap region: {errno_text(error)}"
            self._send(Failed("supervisor.memory", text), sequence)
            return
        faults.visit("supervisor.memory")
        self._send(MemoryCreated(request.size), sequence, (descriptor,))
        os.close(descriptor)

    def _workers(self, index: int) -> int:
        """Count the workers with this number: there are two of it while one is being replaced."""
        return sum(record.role == ROLE_VCPU and record.index == index for record in self._cells.values())

    # ------------------------------------------------------------ spawning

    def _spawn(self, request: Spawn, sequence: int) -> None:
        refusal = self._refuse_spawn(request)
        if refusal is not None:
            self._send(refusal, sequence)
            return
        faults.visit("supervisor.spawn.requested")
        try:
            record, ours = self._take_ahead(request) or self._fork_worker(Assignment(*request))
        except OSError as error:
            self._send(Failed("supervisor.fork", f"cannot fork a worker: {threads.explain(error)}"), sequence)
            return
        try:
            descriptors.send(ours, ENDPOINT_BOUND)
        except IpcError:
            pass  # it has ended already, which is told as any other end
        self._send(Spawned(request.worker, record.pid), sequence, (record.pidfd, ours.fileno()))
        ours.close()
        faults.visit("supervisor.spawn.answered")

    def _fork_ahead(self) -> None:
        """Fork the first worker before the controller can ask: its VM is made while the controller starts."""
        assignment = self._setup.roles.ahead
        if assignment is None or self._setup.kvm_fd < 0:
            return
        try:
            self._ahead = (assignment, *self._fork_worker(assignment))
        except OSError:
            pass  # the controller's request will meet the same, and be told

    def _is_ahead(self, request: Spawn) -> bool:
        """Is the worker that was forked ahead the one that is asked for?"""
        return self._ahead is not None and self._ahead[0] == Assignment(*request)

    def _take_ahead(self, request: Spawn) -> tuple[Cell, socket.socket] | None:
        if not self._is_ahead(request):
            return None
        assert self._ahead is not None
        (_, record, ours), self._ahead = self._ahead, None
        return record, ours

    def _fork_worker(self, assignment: Assignment) -> tuple[Cell, socket.socket]:
        """Fork a worker; return its record and the controller's end of its descriptor channel. Raises OSError."""
        ours, theirs = descriptors.channel_pair()
        theirs.setblocking(False)  # a worker cannot do it: FIONBIO is not for it
        seal, cell_seal = descriptors.channel_pair()
        output = LogPipe(self._plan)
        faults.visit("supervisor.spawn.prepared")
        try:
            pid = os.fork()
        except OSError:
            for each in (ours, theirs, seal, cell_seal, output):
                each.close()
            raise
        if pid == 0:
            timeline.enter(2 + assignment.worker)
            output.become_standard_error()
            ours.close()
            seal.close()
            self._become_worker(assignment, theirs, cell_seal)
        cell.count_faults()
        faults.visit("supervisor.spawn.forked")
        theirs.close()
        cell_seal.close()
        record = Cell(ROLE_VCPU, assignment.worker, pid, os.pidfd_open(pid), seal)
        record.output = output.take(f"{record.name}: ")
        record.assignment = assignment
        self._cells[pid] = record
        return record, ours

    def _refuse_spawn(self, request: Spawn) -> Failed | None:
        index = request.worker
        if refusal := refuse_assignment(Assignment(*request)):
            return Failed("supervisor.plan", refusal)
        if index >= self._plan.max_workers:
            return Failed("supervisor.plan", f"the plan allows {self._plan.max_workers} workers")
        if self._workers(index) and not self._is_ahead(request) and (refusal := self._refuse_replacement(request)):
            return Failed("supervisor.exists", refusal)
        if self._exit_code is not None:
            return Failed("supervisor.ending", "the microVM is ending")
        if self._setup.kvm_fd < 0:
            return Failed("supervisor.kvm", f"Error creating KVM object: {self._setup.kvm_error}")
        return None

    def _refuse_replacement(self, request: Spawn) -> str:
        """Say why a second worker with this number may not be forked, or nothing.

        It may while one is being replaced, for the same vCPUs, one at a time: so there is never more than one cell
        beyond the plan, however often that happens.
        """
        workers = [record for record in self._cells.values() if record.role == ROLE_VCPU]
        if len({record.index for record in workers}) < len(workers):
            return "a worker is being replaced already"
        if any(record.index == request.worker and record.assignment != Assignment(*request) for record in workers):
            return f"worker {request.worker} exists already, for other vCPUs"
        return ""

    def _become_worker(self, assignment: Assignment, channel: socket.socket, seal: socket.socket) -> None:
        """In the child: let go of everything of the supervisor, then be the worker; does not return."""
        index = assignment.worker
        setup = self._setup
        filters, limits = of_cell(setup.filters, ROLE_VCPU), setup.worker_limits(assignment)
        context = cell.CellContext(self._plan, ROLE_VCPU, index, seal, filters, limits, setup.landlock)

        def prepare() -> tuple[int, ...]:
            setup.worker_cgroups.join(index)
            self._abandon()
            process.keep_only((channel.fileno(), seal.fileno(), setup.kvm_fd, setup.landlock.descriptor(ROLE_VCPU)))
            cell.reset_signals()
            return ()

        def role(sealed: cell.Seal) -> int:
            return setup.roles.vcpu(setup.plan, assignment, channel, setup.kvm_fd, sealed)

        cell.run(context, prepare, role)

    def _abandon(self) -> None:
        """In a child: make sure that no object of the supervisor closes a descriptor of the cell later."""
        if self._channel is not None:
            self._channel.socket.detach()
        for record in self._cells.values():
            if record.seal is not None:
                record.seal.detach()
        self._cells.clear()
        if self._ahead is not None:
            self._ahead[2].detach()
