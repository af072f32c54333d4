"""Live replacement on stand-in workers: what is said to whom, how it is rolled back, and how it ends otherwise."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from ipc.messages.records import Failed
from ipc.messages.replacement import LoadState, RolledBack, StateLoaded
from ipc.messages.worker import Resumed, SavedState
from tests.harness.cells import StandInWorker, honest, open_descriptors, settle
from tests.harness.machine import Machine
from vmm.cells.lifecycle import WorkerState
from vmm.cells.worker import Worker
from vmm.errors import StateError, WorkerError
from vmm.machine.post_mortem import Cause
from vmm.observe.event_log import EVENTS
from vmm.operations import tables
from vmm.operations.tables import REPLACE


class Replaceable(Machine):
    """A machine whose worker can be replaced; ``behaviours`` are those of the workers in the order of their forks."""

    def __init__(self, directory: Any, *behaviours: Callable[[StandInWorker], None]) -> None:
        super().__init__(directory, *behaviours)
        self.successors: list[Worker] = []
        self.assembly.make_successor = self._make_successor
        first = self.controller.supervisor.on_cell_ended

        def cell_ended(notice: Any) -> None:
            first(notice)
            for worker in self.successors:
                worker.cell_ended(notice)

        self.controller.supervisor.on_cell_ended = cell_ended
        self.vmm.resume_vm()

    def _make_successor(self, index: int) -> Worker:
        controller = self.controller
        successor = Worker(index, controller.plan, controller.context, controller.events, controller.supervisor)
        self.successors.append(successor)
        return successor

    def close(self) -> None:
        super().close()
        for worker in self.successors:
            worker.close()


@pytest.fixture
def make(tmp_path, log):
    machines = []
    directory = tmp_path / "ipc"
    directory.mkdir()

    def make(*behaviours: Callable[[StandInWorker], None]) -> Replaceable:
        machines.append(Replaceable(directory, *behaviours))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


def soon(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Give these steps little time."""
    steps = [step._replace(deadline_ns=200_000_000) if step.name.value in names else step for step in REPLACE.steps]
    monkeypatch.setattr(tables, "REPLACE", REPLACE._replace(steps=tuple(steps)))


def refuse(text: str) -> Callable[[StandInWorker, int], object]:
    return lambda worker, sequence: worker.send(Failed("worker.test", text), sequence)


def answering(**handlers: Callable[[StandInWorker, int], object]) -> Callable[[StandInWorker], None]:
    return lambda worker: worker.serve_with(**handlers)


def events_since(number: int) -> list[str]:
    return [line.decode() for line in EVENTS.history() if int(line.split(b":")[1].split(b",")[0]) > number]


def test_another_process_goes_on(make, log):
    machine = make(honest, honest)
    old, number = machine.worker.pid, EVENTS.number
    machine.vmm.replace_vcpu(0)
    (worker,) = machine.vmm.vcpus_handles
    assert worker is machine.successors[0]
    assert worker.pid != old
    assert worker.state is WorkerState.RUNNING
    machine.controller.serve(lambda: machine.worker.state is WorkerState.ENDED)
    assert machine.worker.ended is not None
    assert (machine.worker.ended.status, machine.worker.ended.signal) == (0, 0), "it ended in order"
    told = events_since(number)
    assert sum('"worker-replaced"' in line for line in told) == 1
    assert "the guest stood still for" in log()
    assert machine.vmm.vcpu_report()[0]["replacements"] == 1
    machine.vmm.pause_vm()
    machine.vmm.resume_vm()
    os.kill(worker.pid, signal.SIGSEGV)
    assert machine.ended() == 150


@pytest.mark.parametrize("command", ["Configure", "LoadState", "TakeOver"])
def test_a_successor_that_refuses_changes_nothing(make, command):
    machine = make(honest, answering(**{command: refuse("not here")}), honest)
    old = machine.worker.pid
    with pytest.raises(WorkerError, match="not here"):
        machine.vmm.replace_vcpu(0)
    assert machine.vmm.vcpus_handles == [machine.worker]
    assert (machine.worker.pid, machine.worker.state) == (old, WorkerState.RUNNING)
    assert machine.vmm.instance_info.state == "Running"
    assert machine.vmm.failure is None
    machine.controller.serve(lambda: not machine.successors[0].alive)
    machine.vmm.replace_vcpu(0)
    assert machine.vmm.vcpus_handles == [machine.successors[1]]


def test_a_successor_that_does_not_answer_is_given_up(make, monkeypatch):
    soon(monkeypatch, "load")
    machine = make(honest, answering(LoadState=lambda worker, sequence: None))
    with pytest.raises(WorkerError, match=r"vcpu 0 \(new\) did not answer within 0.2 s \(load\)"):
        machine.vmm.replace_vcpu(0)
    assert machine.worker.state is WorkerState.RUNNING
    machine.vmm.pause_vm()


def test_the_predecessor_rolls_back_when_the_successor_is_gone(make):
    """One eventfd serves one VM: the successor's must have ended before."""
    told: list[int] = []
    reader, writer = os.pipe()

    def roll_back(worker: StandInWorker, sequence: int) -> None:
        os.write(writer, b"rolled back")
        worker.send(RolledBack(), sequence)

    machine = make(answering(RollBack=roll_back), answering(TakeOver=lambda worker, sequence: worker.exit(3)))
    successor_ended: list[bool] = []
    original = machine.controller.supervisor.on_cell_ended

    def cell_ended(notice: Any) -> None:
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 100)
        successor_ended.append(True)
        original(notice)

    machine.controller.supervisor.on_cell_ended = cell_ended
    with pytest.raises(WorkerError, match="exited with status 3"):
        machine.vmm.replace_vcpu(0)
    assert successor_ended == [True]
    assert os.read(reader, 100) == b"rolled back"
    assert machine.worker.state is WorkerState.RUNNING
    machine.controller.supervisor.on_cell_ended = original
    os.close(reader)
    os.close(writer)
    assert not told


def test_what_cannot_be_rolled_back_ends_the_microvm(make, log):
    machine = make(answering(RollBack=refuse("lost it")), answering(LoadState=refuse("no")))
    with pytest.raises(WorkerError, match="lost it"):
        machine.vmm.replace_vcpu(0)
    assert machine.vmm.shutdown_exit_code() == 1
    assert machine.vmm.failure is not None
    assert machine.vmm.failure.cause is Cause.OPERATION
    assert "lost it" in log()


def test_after_the_commit_a_stall_is_no_end(make, monkeypatch):
    soon(monkeypatch, "resume")

    def resume(worker: StandInWorker, sequence: int) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        worker.send(Resumed(), sequence)

    machine = make(honest, answering(Resume=resume))
    with pytest.raises(WorkerError, match=r"vcpu 0 \(new\) did not answer within 0.2 s \(resume\)"):
        machine.vmm.replace_vcpu(0)
    (successor,) = machine.vmm.vcpus_handles
    assert successor is machine.successors[0]
    assert successor.state.value == "paused"
    assert machine.vmm.instance_info.state == "Running", "it was decided"
    os.kill(successor.pid, signal.SIGCONT)
    machine.controller.serve(lambda: successor.state is WorkerState.RUNNING)


def test_a_death_after_the_commit_ends_the_microvm(make):
    machine = make(honest, answering(Resume=lambda worker, sequence: os.kill(os.getpid(), signal.SIGBUS)))
    with pytest.raises(WorkerError, match="SIGBUS"):
        machine.vmm.replace_vcpu(0)
    assert machine.vmm.shutdown_exit_code() == 149


def test_what_a_predecessor_does_at_its_end_does_not_count(make):
    """It was replaced: a crash, or a worker that does not end at all, is no failure of the microVM."""
    machine = make(
        answering(Finish=lambda worker, sequence: os.kill(os.getpid(), signal.SIGSEGV)),
        answering(Finish=lambda worker, sequence: worker.sleep()),
        honest,
    )
    machine.vmm.replace_vcpu(0)
    machine.vmm.replace_vcpu(0)
    machine.controller.serve(lambda: not machine.successors[0].alive)
    assert machine.successors[0].ended is not None
    assert machine.successors[0].ended.signal == signal.SIGKILL
    assert machine.vmm.shutdown_exit_code() is None


def test_a_replacement_is_refused_where_it_makes_no_sense(make):
    machine = make(honest, honest)
    with pytest.raises(StateError, match="There is no vCPU 1"):
        machine.vmm.replace_vcpu(1)
    machine.vmm.pause_vm()
    with pytest.raises(StateError, match="it is Paused"):
        machine.vmm.replace_vcpu(0)
    assert machine.vmm.instance_info.state == "Paused"
    machine.vmm.resume_vm()
    machine.vmm.stop(0)
    with pytest.raises(StateError, match="has ended"):
        machine.vmm.replace_vcpu(0)


def test_only_one_operation_goes_on_at_a_time(make):
    """A client cannot do that, since requests are served one after the other; the table refuses it all the same."""
    refused: list[str] = []

    def try_another(*_: Any) -> None:
        with pytest.raises(StateError) as error:
            machine.vmm.pause_vm()
        refused.append(str(error.value))

    machine = make(honest, honest)
    original = machine.vmm.exchange_worker

    def exchange_worker(predecessor: Worker, successor: Worker) -> None:
        try_another()
        original(predecessor, successor)

    machine.vmm.exchange_worker = exchange_worker
    machine.vmm.replace_vcpu(0)
    assert refused == ["Another operation (replace) is going on."]


def test_replacements_leak_no_descriptors(make):
    machine = make(honest)
    for _ in range(2):
        machine.vmm.replace_vcpus()
    machine.controller.serve(lambda: not machine.vmm.replacements.retired)
    before = open_descriptors()
    for _ in range(5):
        machine.vmm.replace_vcpus()
    machine.controller.serve(lambda: not machine.vmm.replacements.retired)
    settle(before)


def test_the_state_goes_from_one_to_the_other(make):
    seen: list[bytes] = []
    reader, writer = os.pipe()

    def load(worker: StandInWorker, message: LoadState, sequence: int) -> None:
        os.write(writer, message.state)
        worker.send(StateLoaded(), sequence)

    def successor(worker: StandInWorker) -> None:
        worker.handlers[LoadState] = lambda message, sequence: load(worker, message, sequence)
        honest(worker)

    machine = make(
        answering(SaveState=lambda worker, sequence: worker.send(SavedState(0, 7, b"all"), sequence)), successor
    )
    machine.vmm.replace_vcpu(0)
    seen.append(os.read(reader, 100))
    assert seen == [b"all"]
    os.close(reader)
    os.close(writer)
