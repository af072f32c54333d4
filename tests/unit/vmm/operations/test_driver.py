"""The driver carries any operation out: it asks for each step, waits for what that says, and knows none by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from base.event_manager import EventManager
from vmm.errors import StateError, WorkerError
from vmm.operations.driver import Answered, OperationDriver, Wait
from vmm.operations.run import NOBODY, Member
from vmm.operations.tables import MachineState, Procedure, Step, StepName, Undo, Verdict, Who

SHORT_NS = 20_000_000
LONG_NS = 60_000_000_000
#: Names are only names: here they mean something else than in the product.
FIRST, SECOND, BACK = StepName.SAVE, StepName.LOAD, StepName.PARK


class Machine:
    """Two workers that nobody asks anything, and an end that can be wished for."""

    def __init__(self) -> None:
        self.vcpus_handles: list[Any] = [type("Worker", (), {"index": index})() for index in range(2)]
        self.ended = False
        self.texts: list[str] = []

    def has_ended(self) -> bool:
        return self.ended

    def cannot_go_on(self, text: str) -> None:
        self.texts.append(text)


class Operation:
    """Steps as a test wants them: a function that gets ``answered`` and returns a Wait or nothing."""

    predecessor_index = -1

    def __init__(self, steps: dict[StepName, Callable[[Answered], Wait | None]], **changes: Any) -> None:
        first = Step(FIRST, Who.ALL, changes.pop("first_ns", LONG_NS))
        second = Step(SECOND, Who.NOBODY, changes.pop("second_ns", LONG_NS), late="The second was late ({time}).")
        back = Step(BACK, Who.ALL, LONG_NS, Verdict.END, Verdict.END)
        self.procedure = Procedure("test", MachineState.RUNNING, (first, second), (Undo(FIRST, back),))
        self.done: list[tuple[StepName, Member]] = []
        self._steps = steps

    def step(self, name: StepName, member: Member, timeout_ns: int, answered: Answered) -> Wait | None:
        self.done.append((name, member))
        if name in self._steps:
            return self._steps[name](answered)
        answered("")
        return None

    def commit(self) -> None:
        raise AssertionError("nothing commits")

    def dismiss(self, member: Member) -> None:
        raise AssertionError("nobody is dismissed")

    def is_successor(self, worker: object) -> bool:
        return False


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def driver(machine):
    events = EventManager()
    driver = OperationDriver(machine, events)
    driver.begin()
    yield driver
    events.close()


def refused(text: str) -> Callable[[Answered], Wait | None]:
    def step(answered: Answered) -> None:
        raise WorkerError(text)

    return step


BOTH = [Member(0), Member(1)]


def test_every_step_is_asked_of_everyone_in_order(driver):
    operation = Operation({SECOND: lambda answered: Wait(lambda: True)})
    driver.perform(operation)
    assert operation.done == [*((FIRST, member) for member in BOTH), (SECOND, NOBODY)]
    assert driver.life.state is MachineState.RUNNING
    assert driver.life.current is None


def test_a_wait_that_was_in_vain_refuses_the_step(driver):
    operation = Operation({SECOND: lambda answered: Wait(lambda: True, lambda: "it is gone")})
    with pytest.raises(WorkerError, match="it is gone"):
        driver.perform(operation)
    assert operation.done[-2:] == [(BACK, member) for member in BOTH]
    assert driver.life.state is MachineState.PAUSED


def test_an_error_of_a_step_is_its_refusal(driver):
    operation = Operation({FIRST: refused("it cannot be asked")})
    with pytest.raises(WorkerError, match="it cannot be asked"):
        driver.perform(operation)
    assert [name for name, _ in operation.done] == [FIRST, BACK, BACK]


def test_a_wait_that_is_late_says_so_itself(driver):
    told: list[str] = []
    wait = Wait(lambda: False, on_late=lambda: told.append("late"))
    operation = Operation({SECOND: lambda answered: wait}, second_ns=SHORT_NS)
    with pytest.raises(WorkerError, match=r"The second was late \(0.02 s\)"):
        driver.perform(operation)
    assert told == ["late"]


def test_a_wait_of_an_earlier_step_does_not_count(driver):
    """Its worker was given up: what becomes of it does not answer for the step that undoes."""
    asked: list[StepName] = []

    def never(answered: Answered) -> Wait:
        return Wait(lambda: asked.append(FIRST) or False)  # type: ignore[func-returns-value]

    def back(answered: Answered) -> Wait:
        asked.clear()
        return Wait(lambda: True)

    operation = Operation({FIRST: never, BACK: back}, first_ns=SHORT_NS)
    with pytest.raises(WorkerError, match="did not answer within"):
        driver.perform(operation)
    assert asked == []


def test_an_operation_within_an_operation_is_refused(driver):
    refusals: list[str] = []

    def again(answered: Answered) -> Wait:
        with pytest.raises(StateError) as error:
            driver.perform(Operation({}))
        refusals.append(str(error.value))
        return Wait(lambda: True)

    driver.perform(Operation({SECOND: again}))
    assert refusals == ["Another operation (test) is going on."]


def test_what_cannot_be_undone_ends_the_machine(driver, machine):
    with pytest.raises(WorkerError, match="not again"):
        driver.perform(Operation({SECOND: refused("no"), BACK: refused("not again")}))
    assert machine.texts == ["not again"]
    assert driver.life.state is MachineState.ENDED
