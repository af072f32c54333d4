"""Changes of a worker's VM, told without waiting for each answer."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ipc.messages.records import Failed, Window
from ipc.messages.vm import SetWindows, UnmapMemory, VmChanged
from ipc.messages.worker import Pong
from tests.harness.cells import StandInWorker, configure_message
from vmm.cells.descriptors import VmChange
from vmm.errors import WorkerError


def test_changes_and_configure_are_told_once_each_whenever_the_answers_come(make):
    """Answers that come while the next change is being sent must not make anything be sent twice, or out of order."""
    changes = [VmChange(SetWindows((), (Window(number << 12, 4096, 0),), True)) for number in range(9)]

    def behave(worker: StandInWorker) -> None:
        def count(worker: StandInWorker, sequence: int) -> None:
            changes = [each for each in worker.changes if isinstance(each, SetWindows) and each.mmio]
            worker.send(Pong(" ".join(str(each.mmio[0].address >> 12) for each in changes)), sequence)

        worker.serve_with(Ping=count)

    controller = make(behave)
    for _ in range(5):
        worker = controller.greeted()
        said: list[str] = []
        ask = worker.ask

        def slow(*arguments: Any, ask: Any = ask, worker: Any = worker, **named: Any) -> None:
            ask(*arguments, **named)
            if arguments[1] is VmChanged:  # the worker has all the time it needs to answer while we are still sending
                time.sleep(0.01)
                worker._receive()

        worker.ask = slow
        worker.configure(configure_message(), controller.descriptors(), [*controller.changes(), *changes])
        worker.ping(said.append)
        controller.serve(lambda said=said: bool(said))
        assert said == ["0 1 2 3 4 5 6 7 8"]
        worker.finish()
        worker.wait_ended()


def test_a_change_that_is_refused_is_why_the_start_fails(make):
    def refuse(worker: StandInWorker, sequence: int) -> None:
        worker.send(Failed("worker.test", "no such window"), sequence)

    controller = make(lambda worker: worker.serve_with(SetWindows=refuse))
    worker = controller.greeted()
    with pytest.raises(WorkerError, match=r"^no such window$"):
        worker.configure(configure_message(), controller.descriptors(), controller.changes())


def test_what_was_told_ahead_is_not_told_again(make):
    told: list[int] = []

    def behave(worker: StandInWorker) -> None:
        def count(worker: StandInWorker, sequence: int) -> None:
            worker.send(Pong("".join(type(each).__name__[0] for each in worker.changes)), sequence)

        worker.serve_with(Ping=count)

    controller = make(behave)
    for ahead in range(len(controller.changes()) + 1):
        worker = controller.greeted()
        changes = controller.changes()
        worker.tell(changes[:ahead])
        worker.configure(configure_message(), controller.descriptors(), changes)
        said: list[str] = []
        worker.ping(said.append)
        controller.serve(lambda said=said: bool(said))
        assert said == ["".join(type(each.message).__name__[0] for each in changes)]
        told.append(ahead)
        worker.finish()
        worker.wait_ended()
    assert len(told) > 2


def test_a_change_that_was_told_ahead_and_is_refused_is_why_the_start_fails(make):
    def refuse(worker: StandInWorker, sequence: int) -> None:
        worker.send(Failed("worker.test", "no such window"), sequence)

    controller = make(lambda worker: worker.serve_with(SetWindows=refuse))
    worker = controller.greeted()
    changes = controller.changes()
    worker.tell(changes)
    with pytest.raises(WorkerError, match=r"^no such window$"):
        worker.configure(configure_message(), controller.descriptors(), changes)
    worker.finish()
    worker.wait_ended()
    # The next process has been told nothing yet, and has refused nothing.
    worker.spawn()
    controller.serve(worker.handshake_is_over)
    assert not worker._refusal and not worker._told


def test_a_change_that_a_running_worker_refuses_is_the_end_of_it(make):
    def refuse(worker: StandInWorker, sequence: int) -> None:
        worker.send(Failed("worker.test", "no such window"), sequence)

    controller = make(lambda worker: worker.serve_with(UnmapMemory=refuse))
    worker = controller.configured()
    failed: list[str] = []
    worker.on_failed = lambda worker, text: failed.append(text)
    worker.change(VmChange(UnmapMemory(0)), lambda: failed.append("done"))
    controller.serve(lambda: bool(failed))
    assert failed == ["The worker of vCPU 0 could not change its VM: no such window"]
