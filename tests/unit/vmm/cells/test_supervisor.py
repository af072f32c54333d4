"""The controller's side of the supervisor protocol, against a supervisor process that does well, ill, or nothing."""

from __future__ import annotations

import os
import signal

import pytest

from ipc.launch_plan import Assignment
from ipc.messages.supervisor import CellEnded, CreateMemory, MemoryCreated, Shutdown, SignalCell, Spawn, Spawned
from tests.harness.cells import MEMORY_SIZE, Controller, is_close_on_exec, open_descriptors
from vmm.cells import supervisor as supervisor_module
from vmm.errors import SupervisorError


@pytest.fixture
def make(tmp_path):
    controllers = []

    def make(*behaviours, script=None) -> Controller:
        controllers.append(Controller(str(tmp_path), *behaviours, supervisor=script))
        return controllers[-1]

    yield make
    for controller in controllers:
        controller.close()


def collected_spawn(controller: Controller):
    request = controller.supervisor.submit_spawn(Assignment(0, (0,), ()))
    return controller.supervisor.collect_spawn(request)


def test_memory_comes_as_a_descriptor_of_the_size_asked_for(make):
    controller = make()
    descriptor = controller.supervisor.create_memory(MEMORY_SIZE)
    assert os.fstat(descriptor).st_size == MEMORY_SIZE
    assert is_close_on_exec(descriptor)
    os.close(descriptor)


def test_aSpawn_brings_the_pidfd_and_the_descriptor_channel(make):
    controller = make(lambda worker: worker.sleep())
    spawned, owned = collected_spawn(controller)
    with owned:
        signal.pidfd_send_signal(owned.take(), 0)
        assert os.path.exists(f"/proc/{spawned.pid}")
    controller.supervisor.signal(0, spawned.pid, signal.SIGKILL)
    ended: list[CellEnded] = []
    controller.supervisor.on_cell_ended = ended.append
    controller.serve(lambda: bool(ended))
    assert ended == [CellEnded(0, spawned.pid, 0, signal.SIGKILL, "")]


def test_replies_may_be_awaited_in_any_order(make):
    controller = make()
    client = controller.supervisor
    requests = [client.submit(CreateMemory(4096 * count)) for count in (1, 2, 3)]
    for request, count in reversed(list(zip(requests, (1, 2, 3), strict=True))):
        reply, owned = client.collect(request, MemoryCreated)
        with owned:
            assert reply.size == os.fstat(owned.take()).st_size == 4096 * count


def test_a_refusal_is_an_error_with_the_supervisors_words(make):
    controller = make(script=lambda supervisor: supervisor.handlers.update({Spawn: supervisor.refuse}))
    with pytest.raises(SupervisorError, match="would rather not"):
        collected_spawn(controller)


def test_another_reply_than_expected_is_an_error_and_leaks_nothing(make):
    def script(supervisor):
        supervisor.handlers[Spawn] = lambda message, sequence: supervisor.create_memory(
            CreateMemory(MEMORY_SIZE), sequence
        )

    controller = make(script=script)
    before = open_descriptors()
    with pytest.raises(SupervisorError):
        collected_spawn(controller)
    assert open_descriptors() == before


@pytest.mark.parametrize("count", [0, 1])
def test_missing_descriptors_are_an_error_and_leak_nothing(make, count):
    def script(supervisor):
        def spawn(message, sequence):
            reader, writer = os.pipe()
            supervisor.channel.send(Spawned(message.worker, 1), sequence, (reader, writer)[:count])
            os.close(reader)
            os.close(writer)

        supervisor.handlers[Spawn] = spawn

    controller = make(script=script)
    before = open_descriptors()
    with pytest.raises(SupervisorError, match="did not hand over"):
        collected_spawn(controller)
    assert open_descriptors() == before


def test_a_memory_without_a_descriptor_is_an_error(make):
    def script(supervisor):
        supervisor.handlers[CreateMemory] = lambda message, sequence: supervisor.channel.send(
            MemoryCreated(message.size), sequence
        )

    with pytest.raises(SupervisorError, match="guest memory"):
        make(script=script).supervisor.create_memory(4096)


def test_a_supervisor_that_does_not_answer_in_time(make, monkeypatch):
    monkeypatch.setattr(supervisor_module, "REQUEST_TIMEOUT_NS", 50_000_000)
    kept = []

    def script(supervisor):
        def create(message, sequence):
            kept.append(sequence)
            if len(kept) == 2:  # both answers come late, with descriptors that nobody wants any more
                for each in kept:
                    supervisor.create_memory(message, each)

        supervisor.handlers[CreateMemory] = create

    controller = make(script=script)
    with pytest.raises(SupervisorError, match="does not answer"):
        controller.supervisor.create_memory(4096)
    before = open_descriptors()
    request = controller.supervisor.submit(CreateMemory(4096))
    reply, owned = controller.supervisor.collect(request, MemoryCreated)
    owned.close()
    assert reply.size == 4096
    assert open_descriptors() == before


def test_an_abandoned_reply_is_closed_whether_it_is_here_or_comes_later(make):
    controller = make()
    client = controller.supervisor
    before = open_descriptors()
    here, later = client.submit(CreateMemory(4096)), client.submit(CreateMemory(4096))
    controller.serve(lambda: client.ready(here))
    client.abandon(here)
    client.abandon(later)
    descriptor = client.create_memory(8192)  # answered after both
    os.close(descriptor)
    assert not client.ready(here)
    assert open_descriptors() == before


def test_a_supervisor_that_is_killed(make):
    controller = make()
    closed: list[int] = []
    controller.supervisor.on_closed = lambda: closed.append(1)
    os.kill(controller.supervisor_pid, signal.SIGSTOP)
    os.waitpid(controller.supervisor_pid, os.WUNTRACED)
    request = controller.supervisor.submit(CreateMemory(4096))
    os.kill(controller.supervisor_pid, signal.SIGKILL)
    with pytest.raises(SupervisorError, match="is gone"):
        controller.supervisor.collect(request, MemoryCreated)
    assert closed == [1]
    assert controller.supervisor.closed
    with pytest.raises(SupervisorError, match="cannot be asked"):
        controller.supervisor.create_memory(4096)
    controller.supervisor.signal(0, 1, signal.SIGKILL)


def test_a_supervisor_that_sends_garbage_is_ignored_and_one_that_goes_on_is_given_up(make):
    def script(supervisor):
        def create(message, sequence):
            for _ in range(10):
                supervisor.channel.socket.send(b"garbage")
            supervisor.create_memory(message, sequence)
            for _ in range(100):
                supervisor.channel.socket.send(b"garbage")

        supervisor.handlers[CreateMemory] = create

    controller = make(script=script)
    os.close(controller.supervisor.create_memory(4096))
    controller.serve(lambda: controller.supervisor.closed)


def test_notices_reach_whoever_waits_for_them(make):
    def script(supervisor):
        def create(message, sequence):
            supervisor.channel.send(Shutdown(143, "because of a signal"))
            supervisor.channel.send(CellEnded(3, 77, 1, 0, ""))
            supervisor.create_memory(message, sequence)

        supervisor.handlers[CreateMemory] = create

    controller = make(script=script)
    notices: list = []
    controller.supervisor.on_shutdown = notices.append
    controller.supervisor.on_cell_ended = notices.append
    os.close(controller.supervisor.create_memory(4096))
    assert notices == [Shutdown(143, "because of a signal"), CellEnded(3, 77, 1, 0, "")]


def test_a_handler_may_ask_the_supervisor_again(make):
    """A nested loop inside a notice: the end of the channel may be seen by the inner one."""

    def script(supervisor):
        supervisor.handlers[SignalCell] = lambda message, sequence: supervisor.channel.send(Shutdown(0, "now"))

    controller = make(script=script)
    descriptors: list[int] = []
    closed: list[int] = []

    def shutdown(notice: Shutdown) -> None:
        descriptors.append(controller.supervisor.create_memory(4096))
        os.kill(controller.supervisor_pid, signal.SIGKILL)
        controller.serve(lambda: controller.supervisor.closed)

    controller.supervisor.on_shutdown = shutdown
    controller.supervisor.on_closed = lambda: closed.append(1)
    controller.supervisor.signal(0, 1, signal.SIGKILL)
    controller.serve(lambda: bool(closed))
    assert len(descriptors) == len(closed) == 1
    os.close(descriptors[0])
