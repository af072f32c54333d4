"""Carries operations over all workers out: sends what vmm.operations.run says, and waits for its outcome."""

from __future__ import annotations

import time

from base.event_manager import EventManager
from base.lean_std import deque
from base.lean_typing import Callable, NamedTuple, Protocol, Sequence, TypeAlias
from vmm.cells.worker import Worker
from vmm.errors import MicrovmEndedError, VmmError, WorkerError
from vmm.operations.run import Action, Await, Command, Commit, Dismiss, MachineLifecycle, Member, Outcome, Settle
from vmm.operations.tables import Procedure, StepName

#: Called with why a step was refused, or nothing.
Answered: TypeAlias = Callable[[str], None]


def _no_refusal() -> str:
    return ""


def _nothing() -> None:
    pass


class Wait(NamedTuple):
    """What has to become true before a step that nobody answers is over."""

    #: Asked at every turn of the event loop.
    is_over: Callable[[], bool]
    #: Asked once it is over: why the step has failed, or nothing.
    refusal: Callable[[], str] = _no_refusal
    #: Called if the step's deadline passes first.
    on_late: Callable[[], None] = _nothing


class Operation(Protocol):
    """One run: a procedure and what each of its steps does. Who carries it out knows none of them."""

    procedure: Procedure
    #: The index of the worker that is replaced, or -1.
    predecessor_index: int

    def step(self, name: StepName, member: Member, timeout_ns: int, answered: Answered) -> Wait | None:
        """Have ``member`` carry a step out, then call ``answered``; or return what is to be waited for.

        Raises VmmError, which is a refusal.
        """

    def commit(self) -> None:
        """There is no way back any more: the successor runs the predecessor's vCPUs from now on."""

    def dismiss(self, member: Member) -> None:
        """End a worker that takes no part any more, without waiting for its end."""

    def is_successor(self, worker: Worker) -> bool:
        """Is this the worker that is to replace another one?"""


class Machine(Protocol):
    """What the driver asks of the microVM."""

    vcpus_handles: list[Worker]

    def has_ended(self) -> bool:
        """Is the microVM on its way out, for whatever reason?"""

    def cannot_go_on(self, text: str) -> None:
        """An operation could be neither completed nor rolled back."""


class OperationDriver:
    """One per microVM. Operations raise VmmError; what is true afterwards is ``life.state``."""

    def __init__(self, machine: Machine, events: EventManager) -> None:
        self.life = MachineLifecycle(())
        self._machine = machine
        self._events = events
        self._operation: Operation | None = None
        #: With the turn and the member that they belong to.
        self._waits: list[tuple[int, Member, Wait]] = []
        self._deadline = 0
        self._error: VmmError | None = None
        self._settled: Settle | None = None
        self._actions: deque[Action] = deque()
        self._acting = False

    def begin(self) -> None:
        """All workers are there: their vCPUs are parked."""
        self.life = MachineLifecycle([worker.index for worker in self._machine.vcpus_handles])

    def perform(self, operation: Operation) -> None:
        """Carry an operation out. Raises StateError (nothing has changed), WorkerError or MicrovmEndedError."""
        actions = self.life.begin(operation.procedure, operation.predecessor_index)
        self._reset(operation)
        self._act(actions)
        while self.life.current is not None and not self._machine.has_ended():
            self._wait()
        self._operation = None
        settled = self._settled
        if settled is not None and settled.outcome is Outcome.DONE:
            return
        if settled is None or settled.outcome is Outcome.ENDED or self._machine.has_ended():
            self.life.end()
            if self._error is not None:
                raise self._error
            raise MicrovmEndedError("The microVM has ended.") if settled is None else WorkerError(settled.text)
        raise WorkerError(settled.text)

    def _reset(self, operation: Operation) -> None:
        self._operation = operation
        self._error = None
        self._settled = None
        self._waits = []

    def lost(self, worker: Worker, text: str) -> None:
        """A worker has ended or failed."""
        successor = self._operation is not None and self._operation.is_successor(worker)
        if successor or worker in self._machine.vcpus_handles:
            if not successor and self._error is None:
                self._error = worker.error()
            self._act(self.life.lost(Member(worker.index, successor), text))

    # ------------------------------------------------------------ waiting

    def _wait(self) -> None:
        run = self.life.current
        assert run is not None
        turn = run.turn
        over: tuple[int, Member, Wait] | None = None

        def moved() -> bool:
            nonlocal over
            if self.life.current is not run or run.turn != turn or self._machine.has_ended():
                return True
            over = next((each for each in self._waits if each[0] == turn and each[2].is_over()), None)
            return over is not None

        if not self._events.run_until(moved, self._deadline):
            for _, _, wait in self._waits:
                wait.on_late()
            self._act(self.life.expired(turn))
        elif over is not None and self.life.current is run and run.turn == turn:
            self._waits.remove(over)
            _, member, wait = over
            self._act(self.life.answered(member, turn, wait.refusal()))

    # ------------------------------------------------------------ acting

    def _act(self, actions: Sequence[Action]) -> None:
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
        if isinstance(action, Settle):
            self._settled = action
            if action.outcome is Outcome.ENDED:
                self._machine.cannot_go_on(action.text)
            return
        operation = self._operation
        assert operation is not None
        if isinstance(action, Commit):
            operation.commit()
        elif isinstance(action, Dismiss):
            operation.dismiss(action.member)
        elif self.life.current is not None and self.life.current.turn == action.turn:
            if isinstance(action, Await):
                self._deadline = time.monotonic_ns() + action.nanoseconds
            else:
                self._command(operation, action)

    def _command(self, operation: Operation, action: Command) -> None:
        member, step, turn = action
        self._waits = [each for each in self._waits if each[0] == turn]

        def answered(refusal: str) -> None:
            self._act(self.life.answered(member, turn, refusal))

        try:
            wait = operation.step(step.name, member, step.deadline_ns, answered)
        except VmmError as error:
            answered(str(error))
            return
        if wait is not None:
            self._waits.append((turn, member, wait))
