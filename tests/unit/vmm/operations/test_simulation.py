"""Many schedules over the tables of the life cycle: no deadlock, no split decision. Broken tables go red."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.harness.simulation import Disagreement, run
from vcpu_worker import lifecycle as worker_side
from vcpu_worker.lifecycle import Event, State
from vmm.errors import StateError
from vmm.operations import run as conduct_module
from vmm.operations.run import Action, Conduct, Drop, MachineLife, Outcome, Settle, Tell
from vmm.operations.tables import PAUSE, PROCEDURES, REPLACE, RESUME, Step, Undo, Verdict, Who, check


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


def test_without_taking_back_it_goes_red(monkeypatch):
    """The others resume, the worker that has handed over never does."""
    _broken(monkeypatch, undo=tuple(undo for undo in REPLACE.undo if undo.since != "hand over"))
    assert _goes_red()


def test_a_comer_that_is_not_waited_for_goes_red(monkeypatch):
    _broken(monkeypatch, undo=tuple(undo for undo in REPLACE.undo if undo.step.name != "bury"))
    assert _goes_red(loss=0.03, deaths=0, stops=0, slow=0.0, slow_parks=0.0)


def test_a_leaver_that_may_resume_goes_red(monkeypatch):
    """A worker that runs on after it has handed over, and a rollback that drops nobody: two run the same vCPUs."""
    monkeypatch.setitem(worker_side.TRANSITIONS, (State.HANDED_OVER, Event.RESUME), State.RUNNING)
    monkeypatch.setattr(Conduct, "_members", _everyone)
    assert _goes_red()


def _everyone(conduct, who):
    """ALL is the leaver and the comer."""
    if who is Who.ALL:
        members = {conduct_module.Member(seat) for seat in conduct._seats}
        return members | ({conduct_module.Member(conduct._leaver, True)} if conduct.committed else set())
    if who is Who.NOBODY:
        return {conduct_module.NOBODY}
    return {conduct_module.Member(conduct._leaver, who is Who.COMER)}


def test_taking_back_a_pause_of_a_paused_machine_goes_red(monkeypatch):
    def begin(self, procedure, leaver=-1):
        if procedure is PAUSE:
            procedure = procedure._replace(only_in=self.state)
        return original(self, procedure, max(leaver, 0))

    original = MachineLife.begin
    monkeypatch.setattr(MachineLife, "begin", begin)
    assert _goes_red()


def test_resumes_that_are_not_repeated_go_red(monkeypatch):
    monkeypatch.setattr(MachineLife, "must_resume", lambda self, says: False)
    assert _goes_red()


def test_a_death_that_is_overheard_goes_red(monkeypatch):
    monkeypatch.setattr(MachineLife, "lost", lambda self, member, cause: [])
    assert _goes_red()


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda procedure: procedure.name)
def test_the_tables_are_sound(procedure):
    assert check(procedure) == ""


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": (REPLACE.steps[0], REPLACE.steps[0])}, "occurs twice"),
        ({"undo": (Undo("dance", REPLACE.steps[-1]),)}, "never done"),
        ({"commit": "dance"}, "is no step"),
        ({"commit": "load"}, "after the point of no return"),
        ({"steps": (*REPLACE.steps, Step("ask", Who.LEAVER, 1, Verdict.END, Verdict.END))}, "that was replaced"),
        ({"undo": (Undo("park", REPLACE.steps[2]),)}, "cannot be part of taking back"),
    ],
)
def test_unsound_tables_are_told(changes, text):
    assert text in check(REPLACE._replace(**changes))


def _walk(conduct: Conduct) -> list[str]:
    """Carry out everything; return what was told, in order."""
    told: list[str] = []
    actions: list[Action] = conduct.start()
    while conduct.outcome is None:
        tells = [action for action in actions if isinstance(action, Tell)]
        told.append(f"{tells[0].step.name} {len(tells)}")
        actions = []
        for member, _, turn in tells:
            actions += conduct.answered(member, turn)
    return told


def test_a_replacement_goes_through_its_steps():
    conduct = Conduct(REPLACE, (0, 1, 2), 1)
    assert _walk(conduct) == [
        "fork 1", "configure 1", "park 3", "drain 1", "park ghosts 3", "verify 3",
        "hand over 1", "save 1", "load 1", "take over 1",
        "resume 3",
    ]  # fmt: skip
    assert conduct.outcome is Outcome.DONE


@pytest.mark.parametrize("position", range(len(REPLACE.steps)))
@pytest.mark.parametrize("how", ["refused", "late", "comer lost", "leaver lost", "other lost"])
def test_every_failure_of_a_replacement_has_one_outcome(position, how):
    conduct = Conduct(REPLACE, (0, 1, 2), 1)
    actions = conduct.start()
    for _ in range(position):
        actions = [more for action in actions if isinstance(action, Tell)
                   for more in conduct.answered(action.member, action.turn)]  # fmt: skip
    tells = [action for action in actions if isinstance(action, Tell)]
    committed = conduct.committed
    assert committed is (position == len(REPLACE.steps) - 1)
    if how == "refused":
        actions = conduct.answered(tells[0].member, tells[0].turn, "no")
    elif how == "late":
        actions = conduct.expired(tells[0].turn)
    else:
        member = {"comer lost": (1, True), "leaver lost": (1, False), "other lost": (2, False)}[how]
        actions = conduct.lost(conduct_module.Member(*member), "gone")
    while conduct.outcome is None and actions:
        if how != "leaver lost" and not committed:
            assert not conduct.committed
        actions = [more for action in actions if isinstance(action, Tell)
                   for more in conduct.answered(action.member, action.turn)]  # fmt: skip
    drained = tells[0].step.name == "drain"
    expected = {
        "refused": Outcome.ENDED if committed or drained else Outcome.UNDONE,
        "late": Outcome.LATE if committed else Outcome.ENDED if drained else Outcome.UNDONE,
        "comer lost": Outcome.ENDED if committed else Outcome.UNDONE,
        "leaver lost": None if committed else Outcome.ENDED,
        "other lost": Outcome.ENDED,
    }[how]
    assert conduct.outcome is expected


def test_an_answer_of_an_earlier_operation_does_not_count():
    machine = MachineLife([0])
    first = [action for action in machine.begin(RESUME) if isinstance(action, Tell)]
    machine.answered(first[0].member, first[0].turn)
    second = [action for action in machine.begin(PAUSE) if isinstance(action, Tell)]
    assert machine.answered(first[0].member, first[0].turn, "no") == []
    assert machine.expired(first[0].turn) == []
    assert machine.conduct is not None and machine.conduct.turn == second[0].turn


def test_the_comer_is_dropped_when_a_replacement_is_taken_back():
    conduct = Conduct(REPLACE, (0,), 0)
    (tell,) = [action for action in conduct.start() if isinstance(action, Tell)]
    actions = conduct.answered(tell.member, tell.turn, "no room")
    assert actions == [Drop(conduct_module.Member(0, comer=True)), Settle(Outcome.UNDONE, "no room")]
