"""Stand-ins for tests of the controller: workers that behave as a test wants, and the controller's own side.

Everything is real but KVM: processes, pidfds, the socket pairs, ZeroMQ, shared memory. The controller under test runs
in the test's own process (:class:`Controller`); its supervisor is that of tests.harness.supervisor."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import zmq

from base.event_manager import EventManager
from ipc import descriptors
from ipc.channel import Channel, PairChannel
from ipc.exit_ring import RING_SIZE, ExitRingProducer
from ipc.launch_plan import PLACEMENT_SPLIT, ROLE_VCPU, SECCOMP_OFF, LaunchPlan, endpoint
from ipc.messages.descriptors import DESCRIPTORS, ExitRing, GuestMemory, Interrupt, VcpuDescriptor
from ipc.messages.ghosts import GhostsParked, ParkGhosts
from ipc.messages.records import WORKER, BootRegisters
from ipc.messages.replacement import (
    HandedOver,
    HandOver,
    LoadState,
    RollBack,
    RolledBack,
    StateLoaded,
    TakenOver,
    TakeOver,
)
from ipc.messages.supervisor import (
    CellEnded,
)
from ipc.messages.vm import (
    AddDoorbell,
    AddInterrupts,
    MapMemory,
    RemoveDoorbell,
    RoutesSet,
    SetRoutes,
    SetWindows,
    UnmapMemory,
    VmChanged,
)
from ipc.messages.worker import (
    Configure,
    Configured,
    DumpCpuConfig,
    DumpedCpuConfig,
    Finish,
    Finished,
    Hello,
    Pause,
    Paused,
    Ping,
    Pong,
    Resume,
    Resumed,
    SavedState,
    SaveState,
    VcpuExited,
    Welcome,
)
from ipc.shared_memory import create_shared, map_shared
from tests.harness.supervisor import StandInSupervisor, WorkerBody, run_process
from vmm.cells import commands
from vmm.cells import worker as workers_module
from vmm.cells.descriptors import VmChange, WorkerDescriptors
from vmm.cells.lifecycle import DEADLINES
from vmm.cells.supervisor import SupervisorClient
from vmm.cells.worker import Worker

MEMORY_SIZE = 1 << 20
#: What is changed in a VM, and answered with VmChanged.
VM_CHANGES = (AddInterrupts, SetWindows, MapMemory, UnmapMemory, AddDoorbell, RemoveDoorbell)
RUN_PAGE_SIZE = 4096
EPOCH = 0x1234_5678_9ABC
#: A bound against a hanging suite; nothing is measured with it.
PATIENCE_S = 60


def plan_of(directory: str) -> LaunchPlan:
    """A launch plan for one worker whose endpoint lies in ``directory``."""
    return LaunchPlan(
        microvm_id="standin",
        epoch=EPOCH,
        jailed=False,
        uid=0,
        gid=0,
        arguments=(),
        start_time_us=0,
        start_time_cpu_us=0,
        parent_cpu_time_us=0,
        max_workers=4,
        max_memory_bytes=MEMORY_SIZE,
        placement=PLACEMENT_SPLIT,
        placement_reason="",
        seccomp=SECCOMP_OFF,
        switched_off=(),
        faults=(),
        drills=(),
        controller_ipc_directory=directory,
        worker_ipc_directory=directory,
        kernel_cache_fd=-1,
        console_fd=-1,
    )


class StandInWorker:
    """What a behaviour can do in the forked worker process. Behaviours are functions that take one of these."""

    def __init__(self, plan: LaunchPlan, index: int, pair: socket.socket) -> None:
        self.plan = plan
        self.index = index
        self.context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self.channel = Channel(self.context, WORKER, plan.epoch)
        self.channel.connect(endpoint(plan.worker_ipc_directory, ROLE_VCPU, index))
        self.descriptors = PairChannel(pair, DESCRIPTORS, plan.epoch)
        self.received: dict[str, list[int]] = {}
        self.changes: list[Any] = []
        #: Descriptors that belong to the changes.
        self.announced = 0
        self.handlers: dict[type, Callable[[Any, int], object]] = {
            Configure: self.configure,
            Resume: lambda message, sequence: self.send(Resumed(), sequence),
            Pause: lambda message, sequence: self.send(Paused(0), sequence),
            SetRoutes: lambda message, sequence: self.send(RoutesSet(), sequence),
            **dict.fromkeys(VM_CHANGES, self.change_vm),
            Ping: lambda message, sequence: self.send(Pong("standin"), sequence),
            SaveState: lambda message, sequence: self.send(SavedState(message.vcpu, 1, b"state"), sequence),
            DumpCpuConfig: lambda message, sequence: self.send(DumpedCpuConfig(message.vcpu, (), ()), sequence),
            Finish: self.finish,
            ParkGhosts: lambda message, sequence: self.send(GhostsParked(0), sequence),
            HandOver: lambda message, sequence: self.send(HandedOver((), ()), sequence),
            RollBack: lambda message, sequence: self.send(RolledBack(), sequence),
            LoadState: lambda message, sequence: self.send(StateLoaded(), sequence),
            TakeOver: lambda message, sequence: self.send(TakenOver(), sequence),
        }
        self._ring: ExitRingProducer | None = None

    def send(self, message: Any, reply_to: int = 0) -> int:
        return self.channel.send(message, reply_to)

    def hello(self, **changes: Any) -> None:
        values = {"worker": self.index, "pid": os.getpid(), "kvm_api_version": 12, "vcpu_mmap_size": RUN_PAGE_SIZE}
        self.send(Hello(**{**values, "max_vcpus": 8, "max_memslots": 64, **changes}))

    def next(self) -> tuple[Any, int]:
        """Wait for the next message; returns it with its sequence number."""
        poll = select.poll()
        poll.register(self.channel.fileno(), select.POLLIN)
        while True:
            envelope = self.channel.receive(time.monotonic_ns())
            if envelope is not None:
                return envelope.message, envelope.sequence
            poll.poll(PATIENCE_S * 1000)

    def expect(self, kind: type) -> int:
        """Wait for a message of this kind (others are served); returns its sequence number."""
        while True:
            message, sequence = self.next()
            if isinstance(message, kind):
                return sequence
            self.handlers[type(message)](message, sequence)

    def greet(self) -> None:
        self.hello()
        self.expect(Welcome)

    def serve(self) -> None:
        """Carry out commands until Finish."""
        while True:
            message, sequence = self.next()
            self.handlers[type(message)](message, sequence)

    def serve_with(self, **handlers: Callable[[StandInWorker, int], object]) -> None:
        """Greet and serve, with other answers to the commands named (``Resume=lambda worker, sequence: …``)."""
        kinds = {kind.__name__: kind for kind in self.handlers}
        for name, handler in handlers.items():
            self.handlers[kinds[name]] = self._handler(handler)
        self.greet()
        self.serve()

    def _handler(self, handler: Callable[[StandInWorker, int], object]) -> Callable[[Any, int], object]:
        return lambda message, sequence: handler(self, sequence)

    def take_descriptors(self, count: int) -> None:
        """Receive so many messages on the descriptor channel."""
        for _ in range(count):
            envelope, owned = self.descriptors.receive(8)
            assert envelope is not None
            taken = [owned.take() for _ in range(len(owned))]
            self.received.setdefault(type(envelope.message).__name__, []).extend(taken)

    def hand_over_vcpu(self, vcpu: int = 0, content: bytes = b"", *, sealed: bool = True) -> None:
        """Send a run page (a sealed memfd in the place of a vCPU descriptor)."""
        if sealed:
            descriptor = create_shared("run-page", RUN_PAGE_SIZE)
        else:
            descriptor = os.memfd_create("run-page", os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, RUN_PAGE_SIZE)
        os.pwrite(descriptor, content, 0)
        self.descriptors.send(VcpuDescriptor(vcpu), fds=(descriptor,))
        os.close(descriptor)

    def change_vm(self, message: Any, sequence: int) -> None:
        """Agree; the descriptors that belong to it are taken at Configure."""
        self.changes.append(message)
        if isinstance(message, AddInterrupts):
            self.announced += len(message.gsis)
        elif isinstance(message, MapMemory):
            self.announced += message.own or message.slot == 0
        self.send(VmChanged(), sequence)

    def configure(self, message: Configure, sequence: int) -> None:
        self.take_descriptors(1 + len(message.vcpus) + self.announced)
        for vcpu in message.vcpus:
            self.hand_over_vcpu(vcpu, run_page())
        self.send(Configured(tsc_khz=1000), sequence)

    def finish(self, message: Any, sequence: int) -> None:
        self.send(Finished(), sequence)
        self.exit(0)

    def vcpu_exited(self, reason: str = "shutdown", code: int = 1, vcpu: int = 0) -> None:
        self.send(VcpuExited(vcpu, reason, code, (), "said the stand-in"))

    @property
    def ring(self) -> ExitRingProducer:
        """Our side of the exit ring."""
        if self._ring is None:
            ring, doorbell, completion = self.received[ExitRing.__name__]
            self._ring = ExitRingProducer(map_shared(ring, RING_SIZE), doorbell, completion)
        return self._ring

    def exit(self, status: int) -> None:
        self.channel.close(1000)
        self.context.term()
        os._exit(status)

    def sleep(self) -> None:
        """Do nothing more."""
        while True:
            time.sleep(PATIENCE_S)

    def forge(self, frame: bytes) -> None:
        """Send bytes that need not be a message."""
        self.channel._socket.send(frame)


Behaviour = Callable[[StandInWorker], None]


def honest(worker: StandInWorker) -> None:
    """What a worker does when nothing goes wrong."""
    worker.greet()
    worker.serve()


def run_page(reason: int = 8, valid: int = 3, rip: int = 0xFFF0) -> bytes:
    """A kvm_run page: exit reason, kvm_valid_regs, and registers that count up from 0x100 (rip as given)."""
    page = bytearray(RUN_PAGE_SIZE)
    struct.pack_into("<I", page, 8, reason)
    struct.pack_into("<Q", page, 288, valid)
    registers = [0x100 + number for number in range(18)]
    registers[16] = rip
    struct.pack_into("<18Q", page, 304, *registers)
    struct.pack_into("<4Q", page, 304 + 144 + 224, 0x8005_0033, 0xDEAD_0000, 0x1000, 0x20)
    return bytes(page)


def _body(behaviour: Behaviour) -> WorkerBody:
    return lambda plan, index, pair: behaviour(StandInWorker(plan, index, pair))


class Controller:
    """The controller's side: event loop, supervisor client, ZeroMQ context, and workers under test."""

    def __init__(
        self,
        directory: str,
        *behaviours: Behaviour,
        supervisor: Callable[[StandInSupervisor], None] | None = None,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self.plan = plan_of(directory)
        ours, theirs = descriptors.channel_pair()
        self.supervisor_pid = os.fork()
        if self.supervisor_pid == 0:
            ours.close()
            bodies = [_body(behaviour) for behaviour in behaviours or (honest,)]
            run_process(StandInSupervisor(theirs, self.plan, bodies, supervisor).run)
        theirs.close()
        self.events = EventManager()
        self.supervisor = SupervisorClient(ours, self.plan.epoch, self.events)
        self._subscription = self.events.add_subscriber(self.supervisor)
        self._own_context = context is None
        self.context = context or zmq.Context(io_threads=1)
        self.workers: dict[int, Worker] = {}
        self.supervisor.on_cell_ended = self._cell_ended
        self._descriptors: list[int] = []
        self._closed = False

    def _cell_ended(self, notice: CellEnded) -> None:
        worker = self.workers.get(notice.worker)
        if worker is not None:
            worker.cell_ended(notice)

    def worker(self, index: int = 0) -> Worker:
        if index not in self.workers:
            self.workers[index] = Worker(index, self.plan, self.context, self.events, self.supervisor)
        return self.workers[index]

    def greeted(self) -> Worker:
        worker = self.worker()
        worker.spawn()
        worker.wait_greeted()
        return worker

    def configured(self) -> Worker:
        worker = self.greeted()
        worker.configure(configure_message(), self.descriptors(), self.changes())
        return worker

    def running(self) -> Worker:
        worker = self.configured()
        worker.resume()
        return worker

    def descriptors(self) -> WorkerDescriptors:
        """What one vCPU needs."""
        page = create_shared("device-page", mmap.PAGESIZE)
        ring = create_shared("exit-ring", RING_SIZE)
        eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self._descriptors += [page, ring, *eventfds]
        return WorkerDescriptors(page, ((0, ring, eventfds[0], eventfds[1]),))

    def changes(self) -> list[VmChange]:
        """A VM with memory and two interrupts: three descriptors."""
        memory = create_shared("guest-memory", MEMORY_SIZE)
        eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self._descriptors += [memory, *eventfds]
        interrupts = zip((1, 4), eventfds, strict=True)
        return [
            VmChange(MapMemory(0, 0, MEMORY_SIZE, 0, False, False, False), ((GuestMemory(MEMORY_SIZE), memory),)),
            VmChange(SetWindows((), (), True)),
            VmChange(AddInterrupts((1, 4)), tuple((Interrupt(gsi), eventfd) for gsi, eventfd in interrupts)),
        ]

    def serve(self, done: Callable[[], bool]) -> None:
        """Run the event loop until ``done()``."""
        assert self.events.run_until(done, time.monotonic_ns() + PATIENCE_S * 10**9), "did not happen"

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        workers = list(self.workers.values())
        for worker in workers:
            worker.finish()
        for worker in workers:
            worker.wait_ended()
            worker.close()
        self.events.remove_subscriber(self._subscription)
        self.supervisor.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        if self._own_context:
            self.context.destroy(linger=0)
        self.events.close()
        os.kill(self.supervisor_pid, signal.SIGCONT)
        os.waitpid(self.supervisor_pid, 0)


def configure_message(**changes: Any) -> Configure:
    """A Configure for one vCPU."""
    values: dict[str, Any] = {
        "vcpu_count": 1,
        "smt": False,
        "vcpus": (0,),
        "boot": BootRegisters(0, 0, 0, 0, 0, 2, 0x11, 0, 0, 0, 0, (0, 0, 0, 0), 0, 0),
        "resumes_other": False,
    }
    return Configure(**{**values, **changes})


def short_timeouts(monkeypatch: Any, milliseconds: int = 300) -> None:
    """Make waits that are meant to run out run out soon."""
    monkeypatch.setattr(workers_module, "COMMAND_TIMEOUT_NS", milliseconds * 1_000_000)
    monkeypatch.setattr(commands, "COMMAND_TIMEOUT_NS", milliseconds * 1_000_000)
    for state, deadline in DEADLINES.items():
        monkeypatch.setitem(DEADLINES, state, deadline._replace(nanoseconds=milliseconds * 1_000_000))


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def is_close_on_exec(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)


def settle(count: int) -> None:
    """Wait until so few descriptors are open: ZeroMQ's reaper closes sockets a little later."""
    deadline = time.monotonic() + 60
    while open_descriptors() > count:
        assert time.monotonic() < deadline, f"{open_descriptors()} descriptors instead of {count}"
        time.sleep(0.01)


class Reports:
    """What a worker reported by its callbacks."""

    def __init__(self, worker: Worker) -> None:
        self.exited: list[VcpuExited] = []
        self.failed: list[str] = []
        self.ended: list[CellEnded] = []
        worker.on_vcpu_exited = lambda worker, event: self.exited.append(event)
        worker.on_failed = lambda worker, text: self.failed.append(text)
        worker.on_ended = lambda worker, notice: self.ended.append(notice)


def die_after(step: str) -> Behaviour:
    """A worker that is killed at one step of its life (by itself, as SIGKILL would do it)."""

    def die(worker: StandInWorker, sequence: int = 0) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def behave(worker: StandInWorker) -> None:
        if step == "start":
            die(worker)
        worker.hello()
        if step == "hello":
            die(worker)
        worker.expect(Welcome)
        if step == "welcome":
            die(worker)
        if step == "descriptors":
            worker.take_descriptors(2)
            die(worker)
        kinds = {kind.__name__: kind for kind in worker.handlers}
        if step in kinds:
            worker.handlers[kinds[step]] = lambda message, sequence: die(worker)
        worker.serve()

    return behave
