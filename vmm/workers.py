"""The controller's side of one worker: spawn, handshake, commands and replies, descriptors, death."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import zmq

from ipc.channel import Channel, PairChannel
from ipc.errors import IpcError
from ipc.messages import (
    DESCRIPTORS,
    WORKER,
    CellEnded,
    Configure,
    Configured,
    DevicePages,
    ExitRing,
    Failed,
    Finish,
    GuestMemory,
    Hello,
    Interrupt,
    Pause,
    Paused,
    Ping,
    Pong,
    Resume,
    Resumed,
    Route,
    RoutesSet,
    SetRoutes,
    VcpuDescriptor,
    VcpuExited,
    Welcome,
)
from ipc.plan import LaunchPlan, endpoint
from vmm.errors import MicrovmEndedError, StateError, SupervisorError, WorkerError
from vmm.event_manager import EventManager, EventOps, Events
from vmm.lifecycle import ALIVE, WorkerEvent, WorkerState, next_state
from vmm.supervisor import SupervisorClient

SECOND_NS = 1_000_000_000
#: How long a worker may take to say HELLO, or to answer a command, before the operation fails.
HELLO_TIMEOUT_NS = 30 * SECOND_NS
COMMAND_TIMEOUT_NS = 30 * SECOND_NS
FINISH_TIMEOUT_NS = 1 * SECOND_NS
KVM_API_VERSION = 12

Reply = TypeVar("Reply")


class WorkerDescriptors:
    """What a worker gets before Configure; the descriptors stay with the caller."""

    __slots__ = ("device_page", "guest_memory", "interrupts", "memory_size", "rings")

    def __init__(
        self,
        guest_memory: int,
        memory_size: int,
        device_page: int,
        rings: Sequence[tuple[int, int, int, int]],
        interrupts: Sequence[tuple[int, int]],
    ) -> None:
        self.guest_memory = guest_memory
        self.memory_size = memory_size
        self.device_page = device_page
        #: (vCPU, ring memfd, doorbell, completion)
        self.rings = rings
        #: (GSI, eventfd)
        self.interrupts = interrupts


class Worker:
    """One worker process. Every wait runs the event loop, so that exits go on being served meanwhile."""

    def __init__(
        self,
        index: int,
        plan: LaunchPlan,
        context: zmq.Context[Any],
        events: EventManager,
        supervisor: SupervisorClient,
    ) -> None:
        self.index = index
        self.state = WorkerState.ABSENT
        self.pid = 0
        self.tsc_khz = 0
        self.ended: CellEnded | None = None
        self.vcpu_exit: VcpuExited | None = None
        self.failure = ""
        self.on_vcpu_exited: Callable[[Worker, VcpuExited], None] = lambda worker, event: None
        self.on_failed: Callable[[Worker, str], None] = lambda worker, text: None
        self.on_ended: Callable[[Worker, CellEnded], None] = lambda worker, notice: None
        self._plan = plan
        self._context = context
        self._events = events
        self._supervisor = supervisor
        self._channel: Channel | None = None
        self._descriptors: PairChannel | None = None
        self._pidfd = -1
        self._spawn_request = 0
        self._subscription = 0
        self._replies: dict[int, Any] = {}
        self._callbacks: dict[int, Callable[[Any], None]] = {}
        self._awaited: set[int] = set()
        self._run_pages: dict[int, mmap.mmap] = {}
        self._vcpu_mmap_size = 0

    @property
    def alive(self) -> bool:
        """True while the process exists (as far as we know)."""
        return self.state in ALIVE

    def _move(self, event: WorkerEvent) -> None:
        self.state = next_state(self.state, event)

    # ------------------------------------------------------------ spawn and handshake

    def bind(self) -> None:
        """Make the endpoint that the worker will connect to. Raises IpcError."""
        self._release()
        self.ended = self.vcpu_exit = None
        self.failure = ""
        self._channel = Channel(self._context, WORKER, self._plan.epoch)
        self._channel.bind(endpoint(self._plan.controller_ipc_directory, self.index))
        self._subscription = self._events.add_subscriber(self)

    def spawn(self) -> None:
        """Ask the supervisor for the process; does not wait, a refusal shows in :meth:`wait_greeted`."""
        if self._channel is None or self.pid:
            self.bind()
        self.pid = 0
        self._spawn_request = self._supervisor.submit_spawn(self.index)
        self._move(WorkerEvent.SPAWN)

    def _collect_spawn(self) -> None:
        request, self._spawn_request = self._spawn_request, 0
        spawned, owned = self._supervisor.collect_spawn(request)
        with owned:
            self._pidfd = owned.take()
            self._descriptors = PairChannel(socket.socket(fileno=owned.take()), DESCRIPTORS, self._plan.epoch)
        self.pid = spawned.pid

    def wait_greeted(self) -> None:
        """Wait until the worker has said HELLO. Raises WorkerError or SupervisorError."""
        if self._spawn_request:
            try:
                self._collect_spawn()
            except SupervisorError:
                self._move(WorkerEvent.DIED)
                self._release()
                raise
        deadline = time.monotonic_ns() + HELLO_TIMEOUT_NS
        self._events.run_until(lambda: self.state is not WorkerState.SPAWNED, deadline)
        if self.state is WorkerState.SPAWNED:
            self._fail(f"The worker of vCPU {self.index} did not report within {HELLO_TIMEOUT_NS // SECOND_NS} s.")
        if self.state is not WorkerState.GREETED:
            raise WorkerError(self._cause())

    # ------------------------------------------------------------ event loop

    def init(self, ops: EventOps) -> None:
        """Subscriber: watch the control channel."""
        assert self._channel is not None
        # ZeroMQ's descriptor is edge-triggered by nature: it becomes readable when its state may have changed.
        ops.add(self._channel.fileno(), select.EPOLLIN)

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: read everything that came on the control channel."""
        self._receive()

    def _receive(self) -> None:
        try:
            while self._channel is not None:
                envelope = self._channel.receive(time.monotonic_ns())
                if envelope is None:
                    return
                self._handle(envelope.reply_to, envelope.message)
        except (IpcError, StateError) as error:
            self.breach(str(error))

    def _handle(self, reply_to: int, message: Any) -> None:
        if reply_to in self._callbacks:
            self._callbacks.pop(reply_to)(message)
        elif reply_to in self._awaited:
            self._replies[reply_to] = message
        elif isinstance(message, Hello):
            self._greet(message)
        elif isinstance(message, VcpuExited):
            self._move(WorkerEvent.VCPU_EXITED)
            if self.vcpu_exit is None:
                self.vcpu_exit = message
                self.on_vcpu_exited(self, message)

    def _greet(self, hello: Hello) -> None:
        assert self._channel is not None
        if hello.worker != self.index or self.state is not WorkerState.SPAWNED:
            self.breach("HELLO of another worker, or a second one")
            return
        if hello.kvm_api_version != KVM_API_VERSION:
            self._fail(f"The KVM API version is {hello.kvm_api_version}, not {KVM_API_VERSION}.")
            return
        self._vcpu_mmap_size = hello.vcpu_mmap_size
        self._channel.unlink()
        self._channel.send(Welcome())
        self._move(WorkerEvent.HELLO)

    def breach(self, text: str) -> None:
        """The worker broke the protocol: it is not believed any more, and killed."""
        self._fail(f"The worker of vCPU {self.index} broke the protocol: {text}.")

    def _fail(self, text: str) -> None:
        if self.state in (WorkerState.FAILED, WorkerState.ENDED):
            return
        self.failure = text
        self._move(WorkerEvent.BREACH)
        self.kill()
        self.on_failed(self, text)

    def cell_ended(self, notice: CellEnded) -> None:
        """The supervisor reaped the process."""
        if self._spawn_request and self._supervisor.ready(self._spawn_request):
            self._collect_spawn()  # it died before we looked at the reply to our request
        if notice.pid != self.pid:
            return
        self._receive()
        self.ended = notice
        if self.alive:
            self._move(WorkerEvent.DIED)
        self._callbacks.clear()
        self.on_ended(self, notice)

    def _cause(self) -> str:
        """Say why the worker cannot do what is asked, as precisely as we know."""
        if self.failure:
            return self.failure
        name = f"The worker of vCPU {self.index} (pid {self.pid})"
        if self.ended is None:
            return f"{name} is {self.state.value}."
        if self.ended.wall:
            return f"{name} was ended by its {self.ended.wall} wall."
        if self.ended.signal:
            return f"{name} was ended by signal {signal_name(self.ended.signal)}."
        return f"{name} exited with status {self.ended.status}."

    # ------------------------------------------------------------ commands

    def submit(self, message: Any, callback: Callable[[Any], None] | None = None) -> int:
        """Send a command; the reply goes to ``callback`` or waits for :meth:`collect`. Raises WorkerError."""
        if not self.alive or self._channel is None:
            raise WorkerError(self._cause())
        try:
            sequence = self._channel.send(message, deadline=time.monotonic_ns() + COMMAND_TIMEOUT_NS)
        except IpcError as error:
            self.breach(str(error))
            raise WorkerError(self._cause()) from None
        if callback is None:
            self._awaited.add(sequence)
        else:
            self._callbacks[sequence] = callback
        self._receive()  # sending may have consumed the edge of the descriptor
        return sequence

    def collect(self, sequence: int, expected: type[Reply], timeout_ns: int = COMMAND_TIMEOUT_NS) -> Reply:
        """Wait for a reply. Raises WorkerError when the worker fails, dies, refuses or is too slow."""

        def settled() -> bool:
            return sequence in self._replies or not self.alive or self.state is WorkerState.FAILED

        if not settled():
            self._events.run_until(settled, time.monotonic_ns() + timeout_ns)
        self._awaited.discard(sequence)
        reply = self._replies.pop(sequence, None)
        if isinstance(reply, expected):
            return reply
        if isinstance(reply, Failed):
            raise WorkerError(reply.text)
        if reply is not None:
            self.breach(f"{type(reply).__name__} in answer to another command")
        elif self.vcpu_exit is not None:
            raise MicrovmEndedError(f"vCPU {self.vcpu_exit.vcpu} left its run loop: {self.vcpu_exit.reason}.")
        elif self.alive and self.state is not WorkerState.FAILED:
            raise WorkerError(
                f"The worker of vCPU {self.index} (pid {self.pid}) did not answer within {timeout_ns // SECOND_NS} s."
            )
        raise WorkerError(self._cause())

    def request(self, message: Any, expected: type[Reply], timeout_ns: int = COMMAND_TIMEOUT_NS) -> Reply:
        """Send a command and wait for its reply."""
        return self.collect(self.submit(message), expected, timeout_ns)

    def configure(self, message: Configure, descriptors: WorkerDescriptors) -> None:
        """Hand over descriptors and configuration; afterwards the vCPUs are parked. Raises WorkerError."""
        assert self._descriptors is not None
        self._send_descriptors(self._descriptors, descriptors)
        configured = self.request(message, Configured)
        self.tsc_khz = configured.tsc_khz
        self._receive_run_pages(len(message.vcpus))
        self._move(WorkerEvent.CONFIGURED)

    def _send_descriptors(self, channel: PairChannel, descriptors: WorkerDescriptors) -> None:
        try:
            channel.send(GuestMemory(descriptors.memory_size), fds=(descriptors.guest_memory,))
            channel.send(DevicePages(), fds=(descriptors.device_page,))
            for vcpu, *ring in descriptors.rings:
                channel.send(ExitRing(vcpu), fds=tuple(ring))
            for gsi, eventfd in descriptors.interrupts:
                channel.send(Interrupt(gsi), fds=(eventfd,))
        except IpcError as error:
            raise WorkerError(f"{self._cause()} {error}") from None

    def _receive_run_pages(self, count: int) -> None:
        """Map kvm_run of each vCPU read-only: the black box. Accepted now, once, and never again."""
        assert self._descriptors is not None
        self._descriptors.socket.setblocking(False)
        try:
            for _ in range(count):
                envelope, owned = self._descriptors.receive(1)
                with owned:
                    if envelope is None or not isinstance(envelope.message, VcpuDescriptor):
                        raise WorkerError(f"The worker of vCPU {self.index} did not hand over its vCPU.")
                    descriptor = owned.take()
                    try:
                        page = mmap.mmap(descriptor, self._vcpu_mmap_size, mmap.MAP_SHARED, mmap.PROT_READ)
                    finally:
                        os.close(descriptor)
                    self._run_pages[envelope.message.vcpu] = page
        except (OSError, IpcError) as error:
            raise WorkerError(f"The vCPU of worker {self.index} cannot be mapped: {error}") from None

    def run_page(self, vcpu: int) -> mmap.mmap | None:
        """Return the read-only kvm_run area of a vCPU; it stays readable after the worker's death."""
        return self._run_pages.get(vcpu)

    def resume(self) -> None:
        """Let the vCPUs run. Raises WorkerError."""
        self.collect_resume(self.submit(Resume()))

    def collect_resume(self, sequence: int) -> None:
        """Wait for a submitted Resume."""
        self.collect(sequence, Resumed)
        if self.state is not WorkerState.FAILED:
            self._move(WorkerEvent.RESUMED)

    def pause(self) -> None:
        """Park the vCPUs. Raises WorkerError."""
        self.collect_pause(self.submit(Pause()))

    def collect_pause(self, sequence: int) -> int:
        """Wait for a submitted Pause; return the number of KVM_KVMCLOCK_CTRL failures."""
        paused = self.collect(sequence, Paused)
        if self.state is not WorkerState.FAILED:
            self._move(WorkerEvent.PAUSED)
        return paused.kvmclock_ctrl_failures

    def set_routes(self, routes: Sequence[Route], done: Callable[[], None]) -> None:
        """Send routes; ``done`` is called when they are in force (never, if the worker fails)."""

        def answered(reply: Any) -> None:
            if isinstance(reply, RoutesSet):
                done()
            else:
                self._fail(f"The worker of vCPU {self.index} could not set an interrupt route: {reply}")

        try:
            self.submit(SetRoutes(tuple(routes)), answered)
        except WorkerError:
            pass  # the worker's end is reported by itself

    def ping(self, callback: Callable[[], None]) -> None:
        """Ask for a sign of life. Raises WorkerError if it cannot even be asked."""

        def answered(reply: Any) -> None:
            if isinstance(reply, Pong):
                callback()

        self.submit(Ping(), answered)

    # ------------------------------------------------------------ end

    def finish(self) -> None:
        """Ask the worker to end; :meth:`wait_ended` waits. Does nothing if it is gone or failed."""
        if not self.alive or self.state in (WorkerState.FAILED, WorkerState.SPAWNED):
            self.kill()
            return
        try:
            self.submit(Finish(), lambda reply: None)
            self._move(WorkerEvent.FINISH)
        except WorkerError:
            self.kill()

    def kill(self) -> None:
        """SIGKILL by pidfd or, where the pidfd may not be used, by the supervisor; returns at once."""
        if self._pidfd < 0 or not self.alive:
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except OSError:
            self._supervisor.signal(self.index, signal.SIGKILL)

    def wait_ended(self, timeout_ns: int = FINISH_TIMEOUT_NS) -> bool:
        """Wait until the supervisor has reaped the worker; kill it when the time is over."""
        if self.alive:
            self._events.run_until(lambda: not self.alive, time.monotonic_ns() + timeout_ns)
        if self.alive:
            self.kill()
            self._events.run_until(lambda: not self.alive, time.monotonic_ns() + timeout_ns)
        return not self.alive

    def _release(self) -> None:
        if self._subscription:
            self._events.remove_subscriber(self._subscription)
            self._subscription = 0
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._descriptors is not None:
            self._descriptors.close()
            self._descriptors = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        for page in self._run_pages.values():
            page.close()
        self._run_pages.clear()
        self._replies.clear()
        self._callbacks.clear()
        self._awaited.clear()

    def close(self) -> None:
        """Release everything; the process must have ended or be about to."""
        self._release()


def signal_name(number: int) -> str:
    """Return SIGKILL for 9 and so on."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
