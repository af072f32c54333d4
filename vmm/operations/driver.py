"""Carries operations over all workers out: sends what vmm.operations.run says, and waits for its outcome."""

from __future__ import annotations

import time

from base.event_manager import EventManager
from base.lean_std import deque
from base.lean_typing import Any, Callable
from ipc.messages.ghosts import GhostsParked, ParkGhosts, QuiescenceRead, ReadQuiescence
from ipc.messages.worker import Pause, Paused, Resume, Resumed
from vmm.cells.lifecycle import WorkerEvent
from vmm.cells.worker import Worker
from vmm.errors import MicrovmEndedError, VmmError, WorkerError
from vmm.operations.quiescence import not_quiescent, quiescence_of
from vmm.operations.replacement import Replacement
from vmm.operations.run import (
    NOBODY,
    Action,
    Await,
    Command,
    Commit,
    Dismiss,
    MachineLifecycle,
    Member,
    Outcome,
    Settle,
)
from vmm.operations.tables import DRAIN_STEP, RESUME_STEP, VERIFY_STEP, Procedure


class Machine:
    """What the driver asks of the microVM; a base class of ``vmm.machine.vmm.Vmm``."""

    vcpus_handles: list[Worker]

    def drained(self) -> bool:
        """Have all exits of the parked vCPUs been executed?"""
        raise NotImplementedError

    def not_drained(self) -> None:
        """They were not in time: whoever has one open broke the protocol."""
        raise NotImplementedError

    def has_ended(self) -> bool:
        """Is the microVM on its way out, for whatever reason?"""
        raise NotImplementedError

    def cannot_go_on(self, text: str) -> None:
        """An operation could be neither completed nor rolled back."""
        raise NotImplementedError

    def succeeded(self, replacement: Replacement) -> None:
        """The commit: the successor runs the predecessor's vCPUs from now on."""
        raise NotImplementedError

    def retire(self, worker: Worker) -> None:
        """End a worker that is not part of the machine any more, without waiting."""
        raise NotImplementedError

    def clock_failed(self, count: int) -> None:
        """So many vCPUs could not be told that they were stopped."""
        raise NotImplementedError


class OperationDriver:
    """One per microVM. Operations raise VmmError; what is true afterwards is ``life.state``."""

    def __init__(self, machine: Machine, events: EventManager) -> None:
        self.life = MachineLifecycle(())
        #: CLOCK_MONOTONIC in ns: when the guest began to stand still, and when it ran again.
        self.parked_at = self.resumed_at = 0
        self._machine = machine
        self._events = events
        self._replacement: Replacement | None = None
        self._waits: Callable[[], bool] | None = None
        self._deadline = 0
        self._error: VmmError | None = None
        self._settled: Settle | None = None
        self._actions: deque[Action] = deque()
        self._acting = False

    def begin(self) -> None:
        """All workers are there: their vCPUs are parked."""
        self.life = MachineLifecycle([worker.index for worker in self._machine.vcpus_handles])

    def perform(self, procedure: Procedure, replacement: Replacement | None = None) -> None:
        """Carry an operation out. Raises StateError (nothing has changed), WorkerError or MicrovmEndedError."""
        actions = self.life.begin(procedure, replacement.predecessor.index if replacement is not None else -1)
        self._reset(replacement)
        self._act(actions)
        while self.life.current is not None and not self._machine.has_ended():
            self._wait()
        self._replacement = None
        settled = self._settled
        if settled is not None and settled.outcome is Outcome.DONE:
            return
        if settled is None or settled.outcome is Outcome.ENDED or self._machine.has_ended():
            self.life.end()
            if self._error is not None:
                raise self._error
            raise MicrovmEndedError("The microVM has ended.") if settled is None else WorkerError(settled.text)
        raise WorkerError(settled.text)

    def _reset(self, replacement: Replacement | None) -> None:
        self._replacement = replacement
        self._error = None
        self._settled = None
        self._waits = None

    def lost(self, worker: Worker, text: str) -> None:
        """A worker has ended or failed."""
        successor = self._replacement is not None and worker is self._replacement.successor
        if successor or worker in self._machine.vcpus_handles:
            if not successor and self._error is None:
                self._error = worker.error()
            self._act(self.life.lost(Member(worker.index, successor), text))

    def pong(self, worker: Worker, says: str) -> None:
        """A worker says how it is."""
        if worker in self._machine.vcpus_handles and self.life.must_resume(says):
            self._resume(worker, lambda refusal: None)

    # ------------------------------------------------------------ waiting

    def _wait(self) -> None:
        run = self.life.current
        assert run is not None
        turn = run.turn
        refusal = ""
        ready = False

        def moved() -> bool:
            nonlocal refusal, ready
            if self.life.current is not run or run.turn != turn or self._machine.has_ended():
                return True
            if self._waits is None:
                return False
            try:
                ready = self._waits()
            except VmmError as error:
                refusal = str(error)
            return ready or bool(refusal)

        if not self._events.run_until(moved, self._deadline):
            if run.step is not None and run.step.name == DRAIN_STEP.name:
                self._machine.not_drained()  # that is a failure of its own, and says more
            self._act(self.life.expired(turn))
        elif (ready or refusal) and self.life.current is run and run.turn == turn:
            self._waits = None
            member = NOBODY
            if run.step is not None and run.step.name == "fork":
                member = Member(run.predecessor, successor=True)
            self._act(self.life.answered(member, turn, refusal))

    # ------------------------------------------------------------ acting

    def _act(self, actions: list[Action]) -> None:
        """Do what the table says. An answer that comes at once has its turn after what was said before it."""
        self._actions.extend(actions)
        if self._acting:
            return
        self._acting = True
        try:
            while self._actions:
                self._do(self._actions.popleft())
        finally:
            self._acting = False

    def _do(self, action: Action) -> None:
        run = self.life.current
        if isinstance(action, Command):
            if run is not None and run.turn == action.turn:
                self._tell(action)
        elif isinstance(action, Await):
            if run is not None and run.turn == action.turn:
                self._deadline = time.monotonic_ns() + action.nanoseconds
        elif isinstance(action, Commit):
            assert self._replacement is not None
            self._machine.succeeded(self._replacement)
        elif isinstance(action, Dismiss):
            assert self._replacement is not None
            self._machine.retire(
                self._replacement.successor if action.member.successor else self._replacement.predecessor
            )
        else:
            self._settled = action
            if action.outcome is Outcome.ENDED:
                self._machine.cannot_go_on(action.text)

    def _tell(self, action: Command) -> None:
        member, step, turn = action
        self._waits = None

        def answered(refusal: str) -> None:
            self._act(self.life.answered(member, turn, refusal))

        replacement = self._replacement
        if replacement is not None and step.name in replacement.steps:
            try:
                replacement.steps[step.name](step.deadline_ns, answered)
            except VmmError as error:
                answered(str(error))
            self._waits = replacement.waits
            replacement.waits = None
            return
        if step.name == DRAIN_STEP.name:
            self._waits = self._machine.drained
            return
        worker = self._worker(member.worker)
        if step.name == RESUME_STEP.name:
            self._resume(worker, answered)
        elif step.name == "park":
            self._park(worker, step.deadline_ns, answered)
        elif step.name == VERIFY_STEP.name:
            self._verify(worker, step.deadline_ns, answered)
        else:
            worker.ask(
                ParkGhosts(), GhostsParked, lambda reply, refusal: answered(refusal), timeout_ns=step.deadline_ns
            )

    def _worker(self, index: int) -> Worker:
        return next(worker for worker in self._machine.vcpus_handles if worker.index == index)

    def _resume(self, worker: Worker, answered: Callable[[str], None]) -> None:
        def resumed(reply: Any, refusal: str) -> None:
            self.resumed_at = time.monotonic_ns()
            answered(refusal)

        worker.note(WorkerEvent.START)
        worker.ask(Resume(), Resumed, resumed, timeout_ns=0, event=WorkerEvent.RESUMED)

    @staticmethod
    def _verify(worker: Worker, timeout_ns: int, answered: Callable[[str], None]) -> None:
        if not worker.assignment.ghosts:
            answered("")  # it has nothing that could hold anything
            return

        def read(reply: Any, refusal: str) -> None:
            answered(refusal or not_quiescent(quiescence_of(worker, reply, 0)))

        worker.ask(ReadQuiescence(), QuiescenceRead, read, timeout_ns=timeout_ns)

    def _park(self, worker: Worker, timeout_ns: int, answered: Callable[[str], None]) -> None:
        def parked(reply: Any, refusal: str) -> None:
            if reply is not None:
                self._machine.clock_failed(reply.kvmclock_ctrl_failures)
            answered(refusal)

        if worker is self._machine.vcpus_handles[0]:
            self.parked_at = time.monotonic_ns()
        worker.ask(Pause(), Paused, parked, timeout_ns=timeout_ns, event=WorkerEvent.PAUSED)
