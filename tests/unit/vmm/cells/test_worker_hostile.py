"""The controller's side of a worker, against worker processes that a guest has taken over: they lie and flood."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from contextlib import suppress

import pytest
import zmq

from ipc.messages.descriptors import VcpuDescriptor
from ipc.messages.ghosts import GHOST_NMI, GhostEvent, GhostEventDone, Noted
from ipc.messages.records import Failed, Route
from ipc.messages.vm import RoutesSet
from ipc.messages.worker import Configured, DumpedCpuConfig, Finished, Paused, Pong, Resumed, VcpuExited, Welcome
from tests.harness.cells import (
    Controller,
    Reports,
    StandInWorker,
    configure_message,
    die_after,
    honest,
    open_descriptors,
    run_page,
    settle,
)
from vmm.cells.lifecycle import WorkerState
from vmm.cells.worker import Worker
from vmm.errors import VmmError, WorkerError

# ---------------------------------------------------------------- hostile workers


def hello_of_another(worker: StandInWorker) -> None:
    worker.hello(worker=1)
    worker.sleep()


def no_hello(worker: StandInWorker) -> None:
    worker.send(Pong("running"))
    worker.sleep()


def exits_before_hello(worker: StandInWorker) -> None:
    worker.vcpu_exited()
    worker.sleep()


def garbage_instead_of_hello(worker: StandInWorker) -> None:
    while True:
        worker.forge(b"\xc1" * 100)


def huge_garbage(worker: StandInWorker) -> None:
    while True:
        worker.forge(bytes(200_000))


@pytest.mark.parametrize(
    "behaviour", [hello_of_another, no_hello, exits_before_hello, garbage_instead_of_hello, huge_garbage]
)
def test_a_breach_instead_of_hello(make, behaviour):
    controller = make(behaviour)
    worker = controller.worker()
    worker.spawn()
    with pytest.raises(WorkerError, match="broke the protocol"):
        worker.wait_greeted()
    assert worker.wait_ended()
    assert worker.ended is not None and worker.ended.signal == signal.SIGKILL


def test_a_kvm_of_another_version(make):
    controller = make(lambda worker: worker.hello(kvm_api_version=13) or worker.sleep())
    with pytest.raises(WorkerError, match="KVM API version is 13"):
        controller.greeted()


def breach(*messages, reply_to: int | None = None):
    """A worker that sends these when it is resumed."""

    def resume(worker: StandInWorker, sequence: int) -> None:
        for message in messages:
            worker.send(message, sequence if reply_to is None else reply_to)
        worker.sleep()

    return lambda worker: worker.serve_with(Resume=resume)


@pytest.mark.parametrize(
    "behaviour",
    [
        breach(Paused(0)),
        breach(Configured(1)),
        breach(Resumed(), Resumed(), Resumed()),
        breach(Resumed(), reply_to=0),
        breach(Resumed(), reply_to=1 << 60),
        breach(Finished(), reply_to=0),
        breach(VcpuExited(1, "shutdown", 1, (), ""), reply_to=0),
        breach(VcpuExited(0, "shutdown", 1, (), ""), VcpuExited(0, "shutdown", 1, (), ""), reply_to=0),
        lambda worker: worker.serve_with(Resume=lambda worker, sequence: worker.hello()),
        lambda worker: worker.serve_with(Resume=lambda worker, sequence: worker.send(Welcome())),
    ],
    ids=[
        "wrong reply",
        "reply of the past",
        "reply three times",
        "reply to nothing",
        "reply to the future",
        "finished unasked",
        "another's vCPU",
        "the same vCPU twice",
        "hello twice",
        "a message of ours",
    ],
)
def test_a_breach_ends_the_worker_and_is_named(make, behaviour):
    controller = make(behaviour)
    worker = controller.configured()
    log = Reports(worker)
    with suppress(VmmError):  # some come after the answer
        worker.resume()
    controller.serve(lambda: bool(log.failed and log.ended))
    assert "broke the protocol" in log.failed[0]
    assert len(log.failed) == 1
    assert log.ended[0].signal == signal.SIGKILL
    with pytest.raises(WorkerError, match="broke the protocol"):
        worker.pause()


def flood_of(message, reply_to: int = 0):
    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.send(Resumed(), sequence)
        while True:
            try:
                worker.send(message, reply_to)
            except Exception:
                time.sleep(0.001)  # nobody reads any more

    return lambda worker: worker.serve_with(Resume=resume)


@pytest.mark.parametrize("message", [Pong("x"), VcpuExited(0, "shutdown", 0, (), ""), DumpedCpuConfig(0, (), ())])
@pytest.mark.parametrize("reply_to", [0, 2])
def test_a_flood_is_a_breach_and_does_not_keep_the_loop(make, message, reply_to):
    controller = make(flood_of(message, reply_to))
    worker = controller.configured()
    log = Reports(worker)
    with suppress(VmmError):
        worker.resume()
    controller.serve(lambda: bool(log.ended))
    assert log.failed
    assert controller.events.run(0) == 0, "nothing may be left that keeps the loop awake"


def test_a_flood_of_a_worker_that_cannot_be_killed_does_not_keep_the_loop(make, monkeypatch):
    controller = make(flood_of(Pong("x")))
    worker = controller.configured()
    log = Reports(worker)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "kill", lambda: None)
        with suppress(VmmError):
            worker.resume()
        controller.serve(lambda: bool(log.failed))
        assert controller.events.run(50) == 0
    assert worker.alive
    worker.kill()


def test_frames_that_are_refused_now_and_then_are_tolerated(make):
    def pause(worker: StandInWorker, sequence: int) -> None:
        for _ in range(20):
            worker.forge(b"noise")
        worker.send(Paused(0), sequence)

    controller = make(lambda worker: worker.serve_with(Pause=pause))
    worker = controller.running()
    for _ in range(10):
        worker.pause()
    assert worker.failure == ""


def test_a_command_that_fails_says_why(make):
    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.send(Failed("worker.state", "not today"), sequence)

    controller = make(lambda worker: worker.serve_with(Resume=resume))
    worker = controller.configured()
    with pytest.raises(WorkerError, match="not today"):
        worker.resume()
    assert worker.state is WorkerState.STARTED
    worker.pause()


def test_a_route_that_cannot_be_set_ends_the_worker(make):
    def set_routes(worker: StandInWorker, sequence: int) -> None:
        worker.send(Failed("worker.kvm", "no room"), sequence)

    controller = make(lambda worker: worker.serve_with(SetRoutes=set_routes))
    worker = controller.running()
    log = Reports(worker)
    done: list[int] = []
    worker.set_routes((Route(4, 0, 0, False),), lambda: done.append(1))
    controller.serve(lambda: bool(log.ended))
    assert "no room" in log.failed[0]
    assert done == []


def test_a_wrong_answer_to_a_ping_is_a_breach(make):
    def ping(worker: StandInWorker, sequence: int) -> None:
        worker.send(RoutesSet(), sequence)

    controller = make(lambda worker: worker.serve_with(Ping=ping))
    worker = controller.running()
    log = Reports(worker)
    worker.ping(lambda: None)
    controller.serve(lambda: bool(log.failed))


# ---------------------------------------------------------------- run pages


def configure_with(action):
    def configure(worker: StandInWorker, sequence: int) -> None:
        worker.take_descriptors(5)
        action(worker)
        worker.send(Configured(1), sequence)
        worker.serve()

    return lambda worker: worker.serve_with(Configure=configure)


def two_descriptors(worker: StandInWorker) -> None:
    reader, writer = os.pipe()
    worker.descriptors.send(VcpuDescriptor(0), fds=(reader, writer))


def a_pipe(worker: StandInWorker) -> None:
    worker.descriptors.send(VcpuDescriptor(0), fds=(os.pipe()[0],))


def no_descriptor(worker: StandInWorker) -> None:
    worker.descriptors.send(VcpuDescriptor(0))


@pytest.mark.parametrize(
    "action",
    [
        lambda worker: None,
        lambda worker: worker.hand_over_vcpu(1, run_page()),
        lambda worker: worker.hand_over_vcpu(0, run_page(), sealed=False),
        lambda worker: worker.descriptors.socket.send(b"garbage"),
        lambda worker: worker.descriptors.socket.shutdown(socket.SHUT_WR),
        two_descriptors,
        a_pipe,
        no_descriptor,
    ],
    ids=["nothing", "another vCPU", "a file that can shrink", "garbage", "end", "two", "a pipe", "none"],
)
def test_a_run_page_that_is_none_is_refused(make, action):
    controller = make(configure_with(action))
    worker = controller.greeted()
    descriptors = controller.descriptors()
    before = open_descriptors()
    with pytest.raises(WorkerError, match="broke the protocol"):
        worker.configure(configure_message(), descriptors, controller.changes())
    assert worker.wait_ended()
    worker.close()
    assert open_descriptors() <= before


def test_what_comes_on_the_descriptor_channel_later_is_never_read(make):
    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.descriptors.socket.setblocking(False)
        for _ in range(50):
            try:
                worker.hand_over_vcpu(0, run_page())
            except Exception:
                break
        worker.send(Resumed(), sequence)

    controller = make(lambda worker: worker.serve_with(Resume=resume))
    worker = controller.configured()
    before = open_descriptors()
    worker.resume()
    worker.pause()
    assert open_descriptors() == before
    assert controller.events.run(0) == 0


def test_events_that_are_answered_at_once_do_not_pile_up_on_the_stack(make):
    """Answering one must not read the next one inside of it: a guest decides how many there are in a row."""
    count = 24  # what a channel holds, with the answers

    def resume(worker: StandInWorker, sequence: int) -> None:
        for vector in range(count):
            worker.send(GhostEvent(GHOST_NMI, 1, vector))
        worker.send(Resumed(), sequence)

    def behave(worker: StandInWorker) -> None:
        worker.handlers[GhostEventDone] = lambda message, sequence: worker.send(Noted(), sequence)
        worker.serve_with(Resume=resume)

    controller = make(behave)
    worker = controller.configured()
    came: list[int] = []
    answered: list[object] = []
    depths: set[int] = set()

    def handle(worker: Worker, event: GhostEvent) -> None:
        came.append(event.vector)
        depths.add(sum(1 for _ in traceback.walk_stack(None)))
        worker.submit(GhostEventDone(*event), answered.append)

    worker.on_ghost_event = handle
    worker.resume()
    controller.serve(lambda: len(answered) == count)
    assert came == list(range(count))
    assert max(depths) - min(depths) < 10, depths


@pytest.mark.slow
@pytest.mark.soak("devices")
def test_no_descriptor_leaks(tmp_path, scale):
    context: zmq.Context = zmq.Context()
    behaviours = [honest, die_after("Configure"), hello_of_another, configure_with(two_descriptors), die_after("start")]

    def one_round(number: int) -> None:
        controller = Controller(str(tmp_path), behaviours[number % len(behaviours)], context=context)
        worker = controller.worker()
        try:
            controller.running()
            worker.pause()
        except WorkerError:
            pass
        if number % 3:
            worker.close()  # without an orderly end
        controller.close()

    for number in range(len(behaviours)):
        one_round(number)
    before = open_descriptors()
    for number in range(scale(50, 1000)):
        one_round(number)
        assert os.listdir(tmp_path) == []
    settle(before)
    context.term()
