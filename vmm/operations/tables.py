"""Operations that several workers take part in, as tables of steps. Sans-IO: vmm.operations.run goes through them.

Every step has a deadline, and says what it means when it passes and when a worker refuses. Up to the commit
that is, as a rule, to roll back what was done; afterwards the machine goes on with what was decided, or ends.
"""

from __future__ import annotations

from base.lean_typing import Enum, NamedTuple
from vmm.cells.lifecycle import SECOND_NS


class MachineState(Enum):
    """What is declared: clients are told so, and every worker is made to agree."""

    PAUSED = "Paused"
    RUNNING = "Running"
    ENDED = "Ended"


class StepName(Enum):
    """What can be a step; its value stands in texts. The operation knows what it means, nobody else does."""

    FORK = "fork"
    CONFIGURE = "configure"
    PARK = "park"
    DRAIN = "drain"
    PARK_GHOSTS = "park ghosts"
    VERIFY = "verify"
    HAND_OVER = "hand over"
    SAVE = "save"
    LOAD = "load"
    TAKE_OVER = "take over"
    RESUME = "resume"
    AWAIT_END = "await end"
    ROLL_BACK = "roll back"


class Who(Enum):
    """Who has to carry out a step."""

    ALL = "all"  # the workers that run the vCPUs now: after the commit the successor instead of the predecessor
    PREDECESSOR = "predecessor"  # the worker that is to be replaced
    SUCCESSOR = "successor"  # the worker that takes its place
    NOBODY = "nobody"  # the controller itself


class Verdict(Enum):
    """What a failed step means."""

    UNDO = "undo"  # everything is as it was before the operation
    END = "end"  # nobody can tell any more what runs: the machine ends
    GO_ON = "go on"  # the decision stands; who has not answered carries it out as soon as it runs again


class Step(NamedTuple):
    """One thing that every one of ``who`` is told at once and has to confirm before the next step.

    ``late`` says in a step of the controller's own what was not done in time; ``{time}`` and ``{worker}`` (the index of
    the one that is replaced) are filled in.
    """

    name: StepName
    who: Who
    deadline_ns: int
    on_deadline: Verdict = Verdict.UNDO
    on_refusal: Verdict = Verdict.UNDO
    late: str = ""


class Undo(NamedTuple):
    """What is done, if the step ``since`` was begun, to roll an operation back."""

    since: StepName
    step: Step


class Procedure(NamedTuple):
    """``leads_to`` is the machine's state after it, in which nothing is left to do unless it is for ``only_in``.

    ``commit`` is the step with which the operation is committed: it is, as soon as the step begins.
    """

    name: str
    leads_to: MachineState
    steps: tuple[Step, ...]
    undo: tuple[Undo, ...] = ()
    commit: StepName | None = None
    only_in: MachineState | None = None


#: A worker that was stopped resumes as soon as it runs again: the command has no deadline, and is repeated if a
#: worker that should run says that it does not.
_RESUME = Step(StepName.RESUME, Who.ALL, 30 * SECOND_NS, Verdict.GO_ON, Verdict.END)
_PARK = Step(StepName.PARK, Who.ALL, 30 * SECOND_NS)
#: The exits of all vCPUs were executed; they are by then but for the last answer's tail.
_DRAIN = Step(
    StepName.DRAIN,
    Who.NOBODY,
    5 * SECOND_NS,
    Verdict.END,
    Verdict.END,
    "The exits of the paused vCPUs were not executed in time ({time}).",
)
_PARK_GHOSTS = Step(StepName.PARK_GHOSTS, Who.ALL, 30 * SECOND_NS)
#: That nothing is on its way between the workers is not believed but read (vmm.operations.quiescence).
_VERIFY = Step(StepName.VERIFY, Who.ALL, 10 * SECOND_NS)
_RUN_AGAIN = Undo(StepName.PARK, _RESUME)

RESUME = Procedure("resume", MachineState.RUNNING, (_RESUME,))
PAUSE = Procedure("pause", MachineState.PAUSED, (_PARK, _DRAIN, _PARK_GHOSTS, _VERIFY), (_RUN_AGAIN,))

#: The guest stands still meanwhile: nobody gets as long as for a pause that a client asked for.
_SHORT_NS = 10 * SECOND_NS
_ROLL_BACK = Step(StepName.ROLL_BACK, Who.PREDECESSOR, _SHORT_NS, Verdict.END, Verdict.END)
_AWAIT_END = Step(
    StepName.AWAIT_END,
    Who.NOBODY,
    _SHORT_NS,
    Verdict.END,
    Verdict.END,
    "The worker that was to replace vcpu {worker} did not end within {time}.",
)
REPLACE = Procedure(
    "replace",
    MachineState.RUNNING,
    (
        Step(StepName.FORK, Who.SUCCESSOR, 30 * SECOND_NS),
        Step(StepName.CONFIGURE, Who.SUCCESSOR, 30 * SECOND_NS),
        # From here on the guest stands still.
        _PARK._replace(deadline_ns=_SHORT_NS),
        _DRAIN,
        _PARK_GHOSTS._replace(deadline_ns=_SHORT_NS),
        _VERIFY,
        # Its irqfds go first: an interrupt that comes after its LAPICs were read would be lost.
        Step(StepName.HAND_OVER, Who.PREDECESSOR, _SHORT_NS),
        Step(StepName.SAVE, Who.PREDECESSOR, _SHORT_NS),
        Step(StepName.LOAD, Who.SUCCESSOR, _SHORT_NS),
        Step(StepName.TAKE_OVER, Who.SUCCESSOR, _SHORT_NS),
        _RESUME,
    ),
    (
        # One eventfd serves one VM: the successor's must be gone before the predecessor gets its irqfds back.
        Undo(StepName.TAKE_OVER, _AWAIT_END),
        Undo(StepName.HAND_OVER, _ROLL_BACK),
        _RUN_AGAIN,
    ),
    StepName.RESUME,
    MachineState.RUNNING,
)
PROCEDURES = (RESUME, PAUSE, REPLACE)


def check(procedure: Procedure) -> str:
    """Say what is wrong with a table, or nothing. (A test asks this of all of them.)"""
    names = [step.name for step in procedure.steps]
    if len(set(names)) < len(names):
        return "a step occurs twice"
    if any(undo.since not in names for undo in procedure.undo):
        return "something is rolled back that is never done"
    if procedure.commit and procedure.commit not in names:
        return "the commit is no step"
    if any(bool(step.late) is not (step.who is Who.NOBODY) for step in procedure.steps):
        return "a step of the controller does not say what is late, or another one does"
    committed = False
    for step in procedure.steps:
        committed |= step.name == procedure.commit
        if committed and Verdict.UNDO in (step.on_deadline, step.on_refusal):
            return f"{step.name.value} is to be rolled back after the commit"
        if committed and step.who is Who.PREDECESSOR:
            return f"{step.name.value} asks something of a worker that was replaced"
    for undo in procedure.undo:
        if Verdict.UNDO in (undo.step.on_deadline, undo.step.on_refusal) or undo.step.who is Who.SUCCESSOR:
            return f"{undo.step.name.value} cannot be part of rolling back"
    return ""
