"""Parking ghosts while one of them is being made the stub: in both orders, and what comes after it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ipc.messages.ghosts import GhostsParked, ParkGhosts, PlaceStub, QuiescenceRead, ReadQuiescence, StubPlaced
from vcpu_worker.errors import StateError
from vcpu_worker.ghost_control import GhostControl, GhostRunner

QUIESCENT = (1, False, 0, 0)


class Thread:
    """Jobs wait until the test lets the thread get on."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Any, Any]] = []

    def submit(self, job, done) -> None:
        self.jobs.append((job, done))

    def kick(self) -> None:
        pass

    def step(self) -> None:
        job, done = self.jobs.pop(0)
        done(job())


class Ghost:
    """Runs until it is stopped."""

    index = 1
    is_stub = False

    def allow_to_run(self) -> None:
        pass

    def ask_to_stop(self) -> None:
        pass

    def run(self) -> str:
        return ""

    def quiescence(self) -> tuple[int, bool, int, int]:
        return QUIESCENT

    def place_stub(self) -> None:
        self.is_stub = True


@pytest.fixture
def parts():
    thread = Thread()
    machine: Any = SimpleNamespace(vcpus=[], ghost_vcpus=[])
    nobody: Any = None
    control = GhostControl(machine, [], nobody, nobody, send=nobody, ghost_failed=nobody)
    ghost: Any = Ghost()
    runner: Any = GhostRunner(ghost, thread)  # type: ignore[arg-type]
    control._runners[1] = runner
    answers: list[Any] = []
    return SimpleNamespace(
        control=control, thread=thread, runner=runner, answers=answers, ask=_ask(control, answers), ghost=ghost
    )


def _ask(control: GhostControl, answers: list[Any]) -> Any:
    return lambda command: control.commands[type(command)](command, answers.append)


def test_a_ghost_that_is_being_placed_is_not_parked(parts):
    parts.control.run()
    parts.ask(PlaceStub(1))
    parts.ask(ParkGhosts())
    parts.thread.step()  # it stops
    assert not parts.answers, "parked, and about to run again"
    parts.thread.step()  # it is the stub
    assert parts.answers == [StubPlaced(), GhostsParked(0)]
    parts.ask(ReadQuiescence())
    parts.thread.step()
    assert isinstance(parts.answers[-1], QuiescenceRead)
    assert not parts.thread.jobs


def test_a_placed_ghost_runs_on_when_nobody_parks_it(parts):
    parts.control.run()
    parts.ask(PlaceStub(1))
    parts.thread.step()
    parts.thread.step()
    assert parts.answers == [StubPlaced()]
    assert parts.runner.running
    with pytest.raises(StateError, match="park them first"):
        parts.ask(ReadQuiescence())


def test_a_parked_ghost_that_was_placed_runs_when_it_may_again(parts):
    parts.control.run()
    parts.ask(PlaceStub(1))
    parts.ask(ParkGhosts())
    parts.thread.step()
    parts.thread.step()
    parts.control.run()
    assert parts.runner.running
    assert len(parts.thread.jobs) == 1  # once


def test_a_resume_while_it_is_being_placed_lets_it_run_once(parts):
    parts.control.run()
    parts.ask(PlaceStub(1))
    parts.thread.step()
    parts.control.run()
    parts.thread.step()
    assert parts.answers == [StubPlaced()]
    assert len(parts.thread.jobs) == 1
