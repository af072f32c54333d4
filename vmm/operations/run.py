"""Goes through a procedure (vmm.operations.tables) with the workers of a machine. Sans-IO.

Told what happens, it returns what is to be done. The shell (vmm.operations.driver) sends messages and arms timers; the
simulation (tests/unit/vmm/operations/test_run_simulation.py) does the same without a process.
"""

from __future__ import annotations

from base.lean_typing import Enum, NamedTuple, Sequence
from vmm.cells.lifecycle import SECOND_NS
from vmm.errors import StateError
from vmm.operations.tables import MachineState, Procedure, Step, StepName, Verdict, Who


class Member(NamedTuple):
    """A worker that takes part. While it is being replaced there are two of its index."""

    worker: int
    successor: bool = False


#: Carries out the steps of the controller itself.
NOBODY = Member(-1)


class Outcome(Enum):
    """How an operation ends. There is no other way."""

    DONE = "done"
    LATE = "late"  # decided; who has not confirmed yet does it as soon as it runs again
    UNDONE = "undone"  # nothing has changed
    ENDED = "ended"  # the machine cannot go on


class Command(NamedTuple):
    """Have ``member`` carry out a step, and say the turn with its answer."""

    member: Member
    step: Step
    turn: int


class Await(NamedTuple):
    """Call ``expired(turn)`` after this time."""

    turn: int
    nanoseconds: int


class Commit(NamedTuple):
    """No way back: the successor runs the vCPUs from now on, the predecessor never again."""

    worker: int


class Dismiss(NamedTuple):
    """End a worker that takes no part any more: a successor that is not needed, or a predecessor that was replaced."""

    member: Member


class Settle(NamedTuple):
    """The operation is over."""

    outcome: Outcome
    text: str


Action = Command | Await | Commit | Dismiss | Settle


class OperationRun:
    """One run of one procedure. Every method returns what is to be done now, in this order."""

    def __init__(self, procedure: Procedure, workers: Sequence[int], predecessor: int = -1, turn: int = 0) -> None:
        self.procedure = procedure
        self.outcome: Outcome | None = None
        self.text = ""
        self.committed = False
        #: Rises with every step, also from one operation to the next: what belongs to an earlier one does not count.
        self.turn = turn
        self.step: Step | None = None
        self._workers = tuple(workers)
        self._predecessor = predecessor
        self._undoing = False
        self._late = ""
        self._begun: set[StepName] = set()
        self._left: list[Step] = list(procedure.steps)
        self._waiting: set[Member] = set()

    @property
    def predecessor(self) -> int:
        """The index of the worker that is replaced, or -1."""
        return self._predecessor

    def start(self) -> list[Action]:
        """Begin."""
        return self._next()

    def answered(self, member: Member, turn: int, refusal: str = "") -> list[Action]:
        """``member`` has carried out the step of this turn, or refuses to."""
        if self.outcome is not None or turn != self.turn or member not in self._waiting:
            return []
        if refusal:
            assert self.step is not None
            return self._fail(self.step.on_refusal, refusal)
        self._waiting.discard(member)
        return [] if self._waiting else self._next()

    def expired(self, turn: int) -> list[Action]:
        """The time for the step of this turn is over."""
        if self.outcome is not None or turn != self.turn or self.step is None:
            return []
        return self._fail(self.step.on_deadline, self._who_is_late())

    def lost(self, member: Member, cause: str) -> list[Action]:
        """``member`` has ended or failed."""
        if self.outcome is not None:
            return []
        if member == Member(self._predecessor) and self.committed:
            return []
        if member.successor and not self.committed:
            return [] if self._undoing else self._undo(cause)
        return self._settle(Outcome.ENDED, cause)

    def _who_is_late(self) -> str:
        assert self.step is not None
        seconds = f"{self.step.deadline_ns / SECOND_NS:g} s"
        if self.step.late:
            return self.step.late.format(time=seconds, worker=self._predecessor)
        names = ", ".join(
            f"vcpu {member.worker}{' (new)' if member.successor else ''}" for member in sorted(self._waiting)
        )
        return f"Worker {names} did not answer within {seconds} ({self.step.name.value})."

    def _members(self, who: Who) -> set[Member]:
        if who is Who.ALL:
            return {Member(worker, self.committed and worker == self._predecessor) for worker in self._workers}
        if who is Who.NOBODY:
            return {NOBODY}
        return {Member(self._predecessor, who is Who.SUCCESSOR)}

    def _next(self) -> list[Action]:
        if not self._left:
            if self._undoing:
                return self._settle(Outcome.UNDONE, self.text)
            return self._settle(Outcome.LATE if self._late else Outcome.DONE, self._late)
        step = self.step = self._left.pop(0)
        self.turn += 1
        actions: list[Action] = []
        if not self._undoing:
            self._begun.add(step.name)
            if step.name == self.procedure.commit:
                self.committed = True
                actions.append(Commit(self._predecessor))
        self._waiting = self._members(step.who)
        actions += [Command(member, step, self.turn) for member in sorted(self._waiting)]
        if self.committed and step.name == self.procedure.commit:
            actions.append(Dismiss(Member(self._predecessor)))
        actions.append(Await(self.turn, step.deadline_ns))
        return actions

    def _fail(self, verdict: Verdict, text: str) -> list[Action]:
        if verdict is Verdict.GO_ON:
            self._late = self._late or text
            return self._next()
        if verdict is Verdict.UNDO and not self._undoing and not self.committed:
            return self._undo(text)
        return self._settle(Outcome.ENDED, text)

    def _undo(self, text: str) -> list[Action]:
        self._undoing = True
        self.text = text
        self._left = [undo.step for undo in self.procedure.undo if undo.since in self._begun]
        unneeded = Member(self._predecessor, successor=True)
        dismiss: list[Action] = [Dismiss(unneeded)] if self._predecessor >= 0 else []
        return dismiss + self._next()

    def _settle(self, outcome: Outcome, text: str) -> list[Action]:
        self.outcome = outcome
        self.text = text
        self.step = None
        self._waiting = set()
        return [Settle(outcome, text)]


class MachineLifecycle:
    """The declared state of a machine, and the one operation that may be going on."""

    def __init__(self, workers: Sequence[int]) -> None:
        self.state = MachineState.PAUSED
        self.current: OperationRun | None = None
        self.workers = tuple(workers)
        self._turn = 0

    def begin(self, procedure: Procedure, predecessor: int = -1) -> list[Action]:
        """Begin an operation. Raises StateError, and nothing has changed."""
        if self.state is MachineState.ENDED:
            raise StateError("The microVM has ended.")
        if self.current is not None:
            raise StateError(f"Another operation ({self.current.procedure.name}) is going on.")
        if procedure.only_in is None:
            if procedure.leads_to is self.state is MachineState.PAUSED:
                return [Settle(Outcome.DONE, "")]  # else rolling it back would let the machine run
        elif predecessor not in self.workers:
            raise StateError(f"There is no worker {predecessor}.")
        elif self.state is not procedure.only_in:
            raise StateError(f"This needs a microVM that is {procedure.only_in.value}; it is {self.state.value}.")
        self.current = OperationRun(procedure, self.workers, predecessor, self._turn)
        return self._after(self.current.start())

    def answered(self, member: Member, turn: int, refusal: str = "") -> list[Action]:
        """As :meth:`OperationRun.answered`."""
        return self._after(self.current.answered(member, turn, refusal)) if self.current else []

    def expired(self, turn: int) -> list[Action]:
        """As :meth:`OperationRun.expired`."""
        return self._after(self.current.expired(turn)) if self.current else []

    def lost(self, member: Member, cause: str) -> list[Action]:
        """A worker has ended or failed. One that is not needed any more may; any other takes the machine with it."""
        if self.current is not None:
            return self._after(self.current.lost(member, cause))
        if member.successor or self.state is MachineState.ENDED:
            return []
        self.state = MachineState.ENDED
        return [Settle(Outcome.ENDED, cause)]

    def end(self) -> None:
        """The machine ends for another reason."""
        self.state = MachineState.ENDED
        self.current = None

    def must_resume(self, says: str) -> bool:
        """A worker says how it is (Pong): has it missed that it should run?"""
        return says == "paused" and self.current is None and self.state is MachineState.RUNNING

    def _after(self, actions: list[Action]) -> list[Action]:
        run = self.current
        if run is None:
            return actions
        self._turn = run.turn
        if run.outcome is not None:
            self.current = None
            if run.outcome is Outcome.ENDED:
                self.state = MachineState.ENDED
            elif run.outcome is not Outcome.UNDONE:
                self.state = run.procedure.leads_to
        return actions
