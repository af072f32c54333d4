"""Many schedules over the tables of the life cycle: no deadlock, no split decision. Broken tables go red."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.harness.simulation import Disagreement, run
from vcpu_worker import lifecycle as worker_side
from vcpu_worker.lifecycle import Event, State
from vmm.errors import StateError
from vmm.operations import run as run_module
from vmm.operations.run import Action, Command, Dismiss, MachineLifecycle, OperationRun, Outcome, Settle
from vmm.operations.tables import PAUSE, PROCEDURES, REPLACE, RESUME, Step, StepName, Undo, Verdict, Who, check


@pytest.mark.soak("smp")
@pytest.mark.timeout(0)
def test_no_schedule_deadlocks_or_splits_the_machine(scale, seed):
    outcomes: Counter[str] = Counter()
    count = scale(500, 100_000)
    for number in range(count):
        world = run(seed * 1_000_000 + number)
        outcomes.update(outcome.value for outcome in world.outcomes)
        outcomes[f"machines {world.machine.state.value}"] += 1
        outcomes["messages"] += world.messages
    print(f"\n{count} schedules of 8 workers, seed {seed}: {dict(outcomes)}")
    # They are worth something only if everything happens in them.
    assert min(outcomes[outcome.value] for outcome in Outcome) > count // 10
    assert min(outcomes[f"machines {state}"] for state in ("Running", "Paused", "Ended")) > count // 20


def _goes_red(**knobs: float) -> bool:
    for number in range(400):
        try:
            run(number, **knobs)
        except (Disagreement, StateError):
            return True
    return False


def _broken(monkeypatch, **changes):
    procedure = REPLACE._replace(**changes)
    monkeypatch.setattr("tests.harness.simulation.REPLACE", procedure)


def test_without_rolling_back_it_goes_red(monkeypatch):
    """The others resume, the worker that has handed over never does."""
    _broken(monkeypatch, undo=tuple(undo for undo in REPLACE.undo if undo.since is not StepName.HAND_OVER))
    assert _goes_red()


def test_a_successor_that_is_not_waited_for_goes_red(monkeypatch):
    _broken(monkeypatch, undo=tuple(undo for undo in REPLACE.undo if undo.step.name is not StepName.AWAIT_END))
    assert _goes_red(loss=0.03, deaths=0, stops=0, slow=0.0, slow_parks=0.0)


def test_a_predecessor_that_may_resume_goes_red(monkeypatch):
    """A worker that runs on after it has handed over, and a rollback that drops nobody: two run the same vCPUs."""
    monkeypatch.setitem(worker_side.TRANSITIONS, (State.HANDED_OVER, Event.RESUME), State.RUNNING)
    monkeypatch.setattr(OperationRun, "_members", _everyone)
    assert _goes_red()


def _everyone(operation, who):
    """ALL is the predecessor and the successor."""
    if who is Who.ALL:
        members = {run_module.Member(worker) for worker in operation._workers}
        return members | ({run_module.Member(operation._predecessor, True)} if operation.committed else set())
    if who is Who.NOBODY:
        return {run_module.NOBODY}
    return {run_module.Member(operation._predecessor, who is Who.SUCCESSOR)}


def test_rolling_back_a_pause_of_a_paused_machine_goes_red(monkeypatch):
    def begin(self, procedure, predecessor=-1):
        if procedure is PAUSE:
            procedure = procedure._replace(only_in=self.state)
        return original(self, procedure, max(predecessor, 0))

    original = MachineLifecycle.begin
    monkeypatch.setattr(MachineLifecycle, "begin", begin)
    assert _goes_red()


def test_resumes_that_are_not_repeated_go_red(monkeypatch):
    monkeypatch.setattr(MachineLifecycle, "must_resume", lambda self, says: False)
    assert _goes_red()


def test_a_death_that_is_overheard_goes_red(monkeypatch):
    monkeypatch.setattr(MachineLifecycle, "lost", lambda self, member, cause: [])
    assert _goes_red()


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda procedure: procedure.name)
def test_the_tables_are_sound(procedure):
    assert check(procedure) == ""


#: Asks something of the worker that was replaced.
LAST = Step(StepName.ROLL_BACK, Who.PREDECESSOR, 1, Verdict.END, Verdict.END)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": (REPLACE.steps[0], REPLACE.steps[0])}, "occurs twice"),
        ({"undo": (Undo(StepName.ROLL_BACK, REPLACE.steps[-1]),)}, "never done"),
        ({"commit": StepName.ROLL_BACK}, "is no step"),
        ({"commit": StepName.LOAD}, "after the commit"),
        (
            {"steps": (*REPLACE.steps, Step(StepName.ROLL_BACK, Who.PREDECESSOR, 1, Verdict.END, Verdict.END))},
            "that was replaced",
        ),
        ({"undo": (Undo(StepName.PARK, REPLACE.steps[2]),)}, "cannot be part of rolling back"),
    ],
)
def test_unsound_tables_are_told(changes, text):
    assert text in check(REPLACE._replace(**changes))


def _walk(operation: OperationRun) -> list[str]:
    """Carry out everything; return what was told, in order."""
    told: list[str] = []
    actions: list[Action] = operation.start()
    while operation.outcome is None:
        commands = [action for action in actions if isinstance(action, Command)]
        told.append(f"{commands[0].step.name.value} {len(commands)}")
        actions = []
        for member, _, turn in commands:
            actions += operation.answered(member, turn)
    return told


def test_a_replacement_goes_through_its_steps():
    operation = OperationRun(REPLACE, (0, 1, 2), 1)
    assert _walk(operation) == [
        "fork 1", "configure 1", "park 3", "drain 1", "park ghosts 3", "verify 3",
        "hand over 1", "save 1", "load 1", "take over 1",
        "resume 3",
    ]  # fmt: skip
    assert operation.outcome is Outcome.DONE


@pytest.mark.parametrize("position", range(len(REPLACE.steps)))
@pytest.mark.parametrize("how", ["refused", "late", "successor lost", "predecessor lost", "other lost"])
def test_every_failure_of_a_replacement_has_one_outcome(position, how):
    operation = OperationRun(REPLACE, (0, 1, 2), 1)
    actions = operation.start()
    for _ in range(position):
        actions = [more for action in actions if isinstance(action, Command)
                   for more in operation.answered(action.member, action.turn)]  # fmt: skip
    commands = [action for action in actions if isinstance(action, Command)]
    committed = operation.committed
    assert committed is (position == len(REPLACE.steps) - 1)
    if how == "refused":
        actions = operation.answered(commands[0].member, commands[0].turn, "no")
    elif how == "late":
        actions = operation.expired(commands[0].turn)
    else:
        member = {"successor lost": (1, True), "predecessor lost": (1, False), "other lost": (2, False)}[how]
        actions = operation.lost(run_module.Member(*member), "gone")
    while operation.outcome is None and actions:
        if how != "predecessor lost" and not committed:
            assert not operation.committed
        actions = [more for action in actions if isinstance(action, Command)
                   for more in operation.answered(action.member, action.turn)]  # fmt: skip
    drained = commands[0].step.name is StepName.DRAIN
    expected = {
        "refused": Outcome.ENDED if committed or drained else Outcome.UNDONE,
        "late": Outcome.LATE if committed else Outcome.ENDED if drained else Outcome.UNDONE,
        "successor lost": Outcome.ENDED if committed else Outcome.UNDONE,
        "predecessor lost": None if committed else Outcome.ENDED,
        "other lost": Outcome.ENDED,
    }[how]
    assert operation.outcome is expected


def test_an_answer_of_an_earlier_operation_does_not_count():
    machine = MachineLifecycle([0])
    first = [action for action in machine.begin(RESUME) if isinstance(action, Command)]
    machine.answered(first[0].member, first[0].turn)
    second = [action for action in machine.begin(PAUSE) if isinstance(action, Command)]
    assert machine.answered(first[0].member, first[0].turn, "no") == []
    assert machine.expired(first[0].turn) == []
    assert machine.current is not None and machine.current.turn == second[0].turn


def test_the_successor_is_dismissed_when_a_replacement_is_rolled_back():
    operation = OperationRun(REPLACE, (0,), 0)
    (command,) = [action for action in operation.start() if isinstance(action, Command)]
    actions = operation.answered(command.member, command.turn, "no room")
    assert actions == [Dismiss(run_module.Member(0, successor=True)), Settle(Outcome.UNDONE, "no room")]
