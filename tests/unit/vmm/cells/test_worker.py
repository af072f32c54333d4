"""The controller's side of a worker, against worker processes that behave, die, or stop."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import pytest

from ipc.exit_ring import RING_SIZE
from ipc.launch_plan import ROLE_VCPU, endpoint
from ipc.messages.descriptors import Interrupt
from ipc.messages.records import Route
from ipc.messages.supervisor import CellEnded, Spawn, Spawned
from ipc.messages.worker import Configured, Paused, Resume, Resumed, SavedState, SaveState
from tests.harness.cells import (
    MEMORY_SIZE,
    Reports,
    StandInWorker,
    configure_message,
    die_after,
    honest,
    open_descriptors,
    run_page,
    settle,
    short_timeouts,
)
from vmm.cells.lifecycle import WorkerEvent, WorkerState
from vmm.errors import MicrovmEndedError, SupervisorError, VmmError, WorkerError


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


# ---------------------------------------------------------------- when all goes well


def test_a_life(make, tmp_path):
    controller = make()
    worker = controller.worker()
    worker.spawn()
    assert os.listdir(tmp_path) == ["vcpu-0"]
    worker.wait_greeted()
    assert os.listdir(tmp_path) == [], "nobody else can connect after HELLO"
    assert worker.pid > 0
    worker.configure(configure_message(), controller.descriptors(), controller.changes())
    assert worker.tsc_khz == 1000
    worker.resume()
    worker.resume()
    worker.pause()
    worker.pause()
    assert worker.state is WorkerState.PAUSED
    assert worker.request(SaveState(0), SavedState).state == b"state"
    pongs: list[int] = []
    worker.ping(lambda state: pongs.append(1))
    controller.serve(lambda: bool(pongs))
    routes: list[int] = []
    worker.set_routes((Route(4, 0xFEE0_0000, 0x30, False),), lambda: routes.append(1))
    controller.serve(lambda: bool(routes))
    worker.finish()
    assert worker.wait_ended()
    assert worker.ended is not None
    assert (worker.ended.status, worker.ended.signal) == (0, 0)
    assert gone(worker.pid)


def test_the_worker_gets_the_descriptors_that_were_meant(make, tmp_path):
    def behave(worker: StandInWorker) -> None:
        worker.greet()
        sequence = worker.expect(type(configure_message()))
        worker.take_descriptors(5)
        sizes = {name: [os.fstat(each).st_size for each in fds] for name, fds in worker.received.items()}
        assert sizes["GuestMemory"] == [MEMORY_SIZE]
        assert sizes["DevicePages"] == [4096]
        assert sizes["ExitRing"][0] == RING_SIZE
        for number, descriptor in enumerate(worker.received[Interrupt.__name__]):
            os.eventfd_write(descriptor, number + 1)
        os.eventfd_write(worker.received["ExitRing"][1], 7)
        worker.hand_over_vcpu(0, run_page())
        worker.send(Configured(1), sequence)
        worker.serve()

    controller = make(behave)
    worker = controller.greeted()
    descriptors, changes = controller.descriptors(), controller.changes()
    worker.configure(configure_message(), descriptors, changes)
    assert [os.eventfd_read(eventfd) for _, eventfd in changes[-1].descriptors] == [1, 2]
    assert os.eventfd_read(descriptors.rings[0][2]) == 7


def test_the_run_page_outlives_the_worker(make):
    controller = make()
    worker = controller.running()
    os.kill(worker.pid, signal.SIGKILL)
    controller.serve(lambda: not worker.alive)
    page = worker.run_page(0)
    assert page is not None
    assert page[:4096] == run_page()
    with pytest.raises(TypeError):
        page[0] = 1  # read-only
    assert worker.run_page(1) is None


def test_a_worker_can_be_replaced(make):
    controller = make(honest, lambda worker: worker.exit(3), honest)
    worker = controller.running()
    first = worker.pid
    worker.kill()
    assert worker.wait_ended()
    with pytest.raises(WorkerError, match="exited with status 3"):
        controller.greeted()
    controller.running()
    assert worker.state is WorkerState.RUNNING
    assert worker.pid != first
    assert worker.failure == ""


def test_callbacks_of_the_owner_before_do_not_stay(make):
    controller = make(honest, lambda worker: worker.forge(b"x" * 10) or worker.exit(1))
    worker = controller.greeted()
    log = Reports(worker)
    worker.kill()
    assert worker.wait_ended()
    assert len(log.ended) == 1
    with pytest.raises(WorkerError):
        controller.greeted()
    assert (len(log.ended), log.failed) == (1, [])


# ---------------------------------------------------------------- death


@pytest.mark.parametrize(
    "step", ["start", "hello", "welcome", "descriptors", "Configure", "Resume", "Pause", "SaveState", "Finish"]
)
def test_a_worker_that_dies_at_any_step_is_reported_with_its_signal(make, step):
    controller = make(die_after(step))
    worker = controller.worker()

    def whole_life() -> None:
        worker.spawn()
        worker.wait_greeted()
        worker.configure(configure_message(), controller.descriptors(), controller.changes())
        worker.resume()
        worker.pause()
        worker.request(SaveState(0), SavedState)
        worker.finish()

    if step == "Finish":
        whole_life()
    else:
        with pytest.raises(WorkerError, match="SIGKILL"):
            whole_life()
    assert worker.wait_ended()
    assert worker.ended is not None
    assert worker.ended.signal == signal.SIGKILL
    assert worker.failure == "", "dying is no breach of the protocol"
    assert gone(worker.pid)


def test_a_worker_that_dies_before_its_spawn_was_collected_is_not_waited_for(make):
    """Its notice comes together with the answer to the spawn; it was dropped once, and HELLO waited for."""

    def supervisor(standin):
        def spawn(message, sequence):
            pid, pidfd, ours = standin.fork(message.worker)
            del standin.children[pidfd]
            os.waitpid(pid, 0)
            standin.channel.send(Spawned(message.worker, pid), sequence, (pidfd, ours.fileno()))
            standin.channel.send(CellEnded(message.worker, pid, 5, 0, ""))
            ours.close()

        standin.handlers[Spawn] = spawn

    controller = make(lambda worker: os._exit(5), supervisor=supervisor)
    with pytest.raises(WorkerError, match="exited with status 5"):
        controller.greeted()


def test_a_refused_spawn(make, tmp_path):
    def supervisor(standin):
        standin.handlers[Spawn] = standin.refuse

    controller = make(supervisor=supervisor)
    worker = controller.worker()
    for _ in range(2):
        worker.spawn()
        with pytest.raises(SupervisorError, match="would rather not"):
            worker.wait_greeted()
        assert worker.state is WorkerState.ENDED
        assert os.listdir(tmp_path) == []


def test_an_endpoint_that_cannot_be_bound(make, tmp_path):
    controller = make()
    os.mkdir(endpoint(str(tmp_path), ROLE_VCPU, 0))
    with pytest.raises(WorkerError, match="cannot bind"):
        controller.worker().spawn()
    os.rmdir(endpoint(str(tmp_path), ROLE_VCPU, 0))
    controller.greeted()


def test_the_wall_that_ended_a_worker_is_named(make):
    controller = make(lambda worker: os.kill(os.getpid(), signal.SIGSYS))
    with pytest.raises(WorkerError, match="ended by its seccomp wall"):
        controller.greeted()


def test_a_command_to_a_process_that_has_just_died_is_no_breach(make):
    """The exit code of the microVM is that of the signal; a broken channel must not come first."""
    controller = make()
    worker = controller.running()
    log = Reports(worker)
    os.kill(controller.supervisor_pid, signal.SIGSTOP)
    os.kill(worker.pid, signal.SIGSYS)

    def resume_again_and_again() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            worker.submit(Resume())

    with pytest.raises(WorkerError, match="has ended"):
        resume_again_and_again()
    assert log.failed == []
    os.kill(controller.supervisor_pid, signal.SIGCONT)
    controller.serve(lambda: bool(log.ended))
    assert (log.ended[0].signal, worker.failure) == (signal.SIGSYS, "")


def test_a_supervisor_that_is_gone_is_not_waited_for(make, monkeypatch):
    short_timeouts(monkeypatch, 1_000_000)
    controller = make()
    worker = controller.running()
    os.kill(controller.supervisor_pid, signal.SIGKILL)
    controller.serve(lambda: controller.supervisor.closed)
    worker.finish()
    assert not worker.wait_ended()
    os.kill(worker.pid, signal.SIGKILL)


def test_a_notice_of_another_process_is_not_ours(make):
    controller = make()
    worker = controller.running()
    worker.cell_ended(CellEnded(0, worker.pid + 1, 0, signal.SIGKILL, ""))
    worker.pause()
    assert worker.ended is None


def test_what_a_worker_said_before_it_died_counts(make, monkeypatch):
    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.send(Resumed(), sequence)
        worker.vcpu_exited("internal-error")
        worker.exit(0)

    controller = make(lambda worker: worker.serve_with(Resume=resume))
    worker = controller.configured()
    log = Reports(worker)
    monkeypatch.setattr(worker, "process", lambda events, ops: None)  # the notice is handled first
    with suppress(VmmError):
        worker.resume()
    controller.serve(lambda: bool(log.ended))
    assert [event.reason for event in log.exited] == ["internal-error"]


# ---------------------------------------------------------------- vCPUs that end


def test_a_vcpu_that_leaves_its_run_loop(make):
    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.send(Resumed(), sequence)
        worker.vcpu_exited("system-event", 0)

    controller = make(lambda worker: worker.serve_with(Resume=resume))
    worker = controller.configured()
    log = Reports(worker)
    worker.resume()
    controller.serve(lambda: bool(log.exited))
    assert (log.exited[0].reason, log.failed) == ("system-event", [])
    assert worker.state is WorkerState.FAILED
    with pytest.raises(MicrovmEndedError, match="system-event"):
        worker.pause()
    with pytest.raises(MicrovmEndedError):
        worker.ping(lambda: None)
    worker.set_routes((), lambda: None)
    worker.finish()
    assert worker.wait_ended()
    assert worker.ended is not None
    assert (worker.ended.status, worker.ended.signal) == (0, 0), "it ends in order"


def test_a_vcpu_that_exits_instead_of_parking(make):
    def pause(worker: StandInWorker, sequence: int) -> None:
        worker.vcpu_exited()
        worker.send(Paused(0), sequence)

    controller = make(lambda worker: worker.serve_with(Pause=pause))
    worker = controller.running()
    log = Reports(worker)
    with suppress(MicrovmEndedError):  # unless the answer came in the same turn
        worker.pause()
    assert [event.reason for event in log.exited] == ["shutdown"]
    assert worker.state is WorkerState.FAILED
    assert worker.failure == ""
    worker.finish()
    assert worker.wait_ended()
    assert worker.failure == "", "the answer that came too late was asked for all the same"


def test_a_result_that_comes_with_the_end_raises_the_cause(make, monkeypatch):
    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.send(Resumed(), sequence)
        worker.exit(9)

    controller = make(lambda worker: worker.serve_with(Resume=resume))
    worker = controller.configured()
    worker.note(WorkerEvent.START)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_receive", lambda: None)
        sequence = worker.submit(Resume())
        deadline = time.monotonic() + 60
        while not gone(worker.pid) and time.monotonic() < deadline:
            time.sleep(0.01)  # without the loop: answer and end wait both
    monkeypatch.setattr(worker, "process", lambda events, ops: None)  # the notice is handled first
    worker.collect(sequence, Resumed)
    with pytest.raises(WorkerError, match="exited with status 9"):
        worker._arrive(WorkerEvent.RESUMED)


# ---------------------------------------------------------------- slow and stopped workers


def test_a_worker_that_never_says_hello(make, monkeypatch):
    short_timeouts(monkeypatch)
    controller = make(lambda worker: worker.sleep())
    with pytest.raises(WorkerError, match="did not report"):
        controller.greeted()
    assert controller.worker().wait_ended()


def test_a_spawn_that_is_never_answered(make, monkeypatch, tmp_path):
    short_timeouts(monkeypatch)
    monkeypatch.setattr("vmm.cells.supervisor.REQUEST_TIMEOUT_NS", 50_000_000)

    def supervisor(standin):
        standin.handlers[Spawn] = lambda message, sequence: None

    controller = make(supervisor=supervisor)
    with pytest.raises(SupervisorError, match="does not answer"):
        controller.greeted()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["Configure", "Resume", "Pause"])
def test_a_command_that_is_never_answered(make, monkeypatch, command):
    controller = make(lambda worker: worker.serve_with(**{command: lambda worker, sequence: None}))
    worker = controller.greeted()

    def whole_life() -> None:
        worker.configure(configure_message(), controller.descriptors(), controller.changes())
        worker.resume()
        worker.pause()

    short_timeouts(monkeypatch, 100)
    with pytest.raises(WorkerError, match="did not answer"):
        whole_life()
    assert worker.alive, "slow is not dead"


def test_an_answer_that_comes_too_late_is_no_breach(make, monkeypatch):
    def pause(worker: StandInWorker, sequence: int) -> None:
        time.sleep(0.3)
        worker.send(Paused(0), sequence)

    controller = make(lambda worker: worker.serve_with(Pause=pause))
    worker = controller.running()
    short_timeouts(monkeypatch, 50)
    with pytest.raises(WorkerError, match="did not answer"):
        worker.pause()
    monkeypatch.undo()
    assert worker.request(SaveState(0), SavedState).vcpu == 0
    assert worker.failure == ""


def test_a_worker_that_is_stopped_is_killed_at_the_end(make, monkeypatch):
    controller = make()
    worker = controller.running()
    short_timeouts(monkeypatch, 100)
    os.kill(worker.pid, signal.SIGSTOP)
    worker.finish()
    assert worker.wait_ended()
    assert worker.ended is not None and worker.ended.signal == signal.SIGKILL


def test_a_worker_that_stops_reading_costs_a_bounded_queue(make):
    controller = make()
    worker = controller.running()
    log = Reports(worker)
    os.kill(worker.pid, signal.SIGSTOP)
    sent: list[int] = []

    def send_for_ever() -> None:
        while len(sent) < 1_000_000:
            sent.append(worker.submit(configure_message()))

    with pytest.raises(WorkerError, match=r"broke the protocol.*does not read"):
        send_for_ever()
    assert len(sent) < 20_000
    controller.serve(lambda: bool(log.ended))


def test_a_worker_that_does_not_take_its_descriptors(make):
    """It must not block the controller: every message queues in the kernel until it reads."""
    controller = make(lambda worker: worker.greet() or worker.sleep())
    worker = controller.greeted()
    descriptors = controller.descriptors()
    descriptors.rings = [descriptors.rings[0]] * 5000
    with pytest.raises(WorkerError, match="broke the protocol"):
        worker.configure(configure_message(), descriptors, controller.changes())
    assert worker.wait_ended()


# ---------------------------------------------------------------- end


def test_a_worker_that_was_only_asked_for_is_ended_at_once(make):
    """The controller asks for a worker when it starts; a client may never start the microVM."""
    controller = make()
    worker = controller.worker()
    worker.spawn()
    worker.finish()
    assert worker.wait_ended()
    assert worker.ended is not None
    assert gone(worker.pid)


@pytest.mark.parametrize("answered", [True, False])
def test_a_worker_that_was_asked_for_and_is_not_wanted_any_more_leaks_nothing(make, answered):
    controller = make()
    worker = controller.worker()
    worker.bind()
    bound = open_descriptors()
    worker.close()
    settle(bound - 1)  # ZeroMQ's threads have theirs for good
    before = open_descriptors()
    worker.spawn()
    if answered:
        controller.serve(worker._spawn_answered)
    worker.close()
    os.close(controller.supervisor.create_memory(4096))  # its answer comes after that to the spawn
    settle(before)


def test_killing_before_the_pidfd_is_here(make):
    controller = make(lambda worker: worker.sleep())
    worker = controller.worker()
    worker.spawn()
    worker.kill()
    with pytest.raises(WorkerError, match="SIGKILL"):
        worker.wait_greeted()


def test_without_the_right_to_signal_the_supervisor_is_asked(make, monkeypatch):
    def refuse(pidfd: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    controller = make()
    worker = controller.running()
    monkeypatch.setattr("vmm.cells.process.signal.pidfd_send_signal", refuse)
    worker.kill()
    assert worker.wait_ended()


def test_commands_after_the_end_say_how_it_ended(make):
    controller = make()
    worker = controller.running()
    os.kill(worker.pid, signal.SIGSEGV)
    controller.serve(lambda: not worker.alive)
    with pytest.raises(WorkerError, match="SIGSEGV"):
        worker.pause()
    with pytest.raises(WorkerError, match="SIGSEGV"):
        worker.configure(configure_message(), controller.descriptors(), controller.changes())
    worker.finish()
    worker.kill()
    assert worker.wait_ended()
    worker.close()
    worker.close()
