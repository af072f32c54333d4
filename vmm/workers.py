"""The controller's side of one worker: spawn, handshake, commands and replies, descriptors, death."""

from __future__ import annotations

import mmap
import os
import select
import time

import zmq

from ipc.channel import Channel, PairChannel
from ipc.errors import IpcError
from ipc.messages import (
    DESCRIPTORS,
    WORKER,
    CellEnded,
    Configure,
    Configured,
    Failed,
    Finish,
    GhostEvent,
    GhostRecovered,
    GhostsParked,
    Hello,
    ParkGhosts,
    Pause,
    Paused,
    Ping,
    Pong,
    Resume,
    Resumed,
    Route,
    RoutesSet,
    SetRoutes,
    VcpuExited,
    Welcome,
)
from ipc.plain import signal, signal_name, socket
from ipc.plan import Assignment, LaunchPlan, endpoint
from ipc.typed import Any, Callable, Sequence, TypeVar
from vmm import handover
from vmm.errors import MicrovmEndedError, StateError, SupervisorError, VmmError, WorkerError
from vmm.event_manager import EventManager, EventOps, Events
from vmm.events import EVENTS
from vmm.handover import WorkerDescriptors
from vmm.lifecycle import ALIVE, WorkerEvent, WorkerState, next_state
from vmm.supervisor import SupervisorClient
from vmm.vm import Kvm

__all__ = ["SECOND_NS", "Worker", "WorkerDescriptors"]

SECOND_NS = 1_000_000_000
#: How long a worker may take to say HELLO, or to answer a command, before the operation fails.
HELLO_TIMEOUT_NS = 30 * SECOND_NS
COMMAND_TIMEOUT_NS = 30 * SECOND_NS
#: How long it may take to end in order, and again to be dead after SIGKILL. The supervisor gives the controller
#: 0.6 s in all to end.
FINISH_TIMEOUT_NS = 400_000_000
#: A process that ends closes its channels some time before its pidfd says so.
DYING_MS = 100
KVM_API_VERSION = 12

Reply = TypeVar("Reply")


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
        #: What it was forked for, or will be.
        self.assignment = Assignment(index, (index,), ())
        self.state = WorkerState.ABSENT
        self.pid = 0
        self.tsc_khz = 0
        #: What the worker said of the host's KVM.
        self.kvm = Kvm(0, 0, 0, 0)
        #: How far the kvmclock of its VM is ahead of that of worker 0, in ns; None if that was not measured.
        self.clock_ahead_ns: int | None = None
        self.ended: CellEnded | None = None
        self.vcpu_exit: VcpuExited | None = None
        self.failure = ""
        self.on_vcpu_exited: Callable[[Worker, VcpuExited], None]
        self.on_failed: Callable[[Worker, str], None]
        self.on_ended: Callable[[Worker, CellEnded], None]
        self.on_ghost_event: Callable[[Worker, GhostEvent], None]
        self.on_ghost_recovered: Callable[[Worker, GhostRecovered], None]
        self._forget_owner()
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
        #: Commands whose answer came too late for whoever asked; it may still come.
        self._abandoned: set[int] = set()
        self._vcpus: set[int] = set()
        self._kill_wanted = False
        self._run_pages: dict[int, mmap.mmap] = {}
        self._vcpu_mmap_size = 0

    @property
    def alive(self) -> bool:
        """True while the process exists (as far as we know)."""
        return self.state in ALIVE

    def _move(self, event: WorkerEvent) -> None:
        before, self.state = self.state, next_state(self.state, event)
        if self.state is not before:
            EVENTS.emit("worker-state", worker=self.index, pid=self.pid, state=self.state.value)

    def _forget_owner(self) -> None:
        self.on_vcpu_exited = lambda worker, event: None
        self.on_failed = lambda worker, text: None
        self.on_ended = lambda worker, notice: None
        self.on_ghost_event = lambda worker, event: worker.breach("a ghost event before it was configured")
        self.on_ghost_recovered = lambda worker, event: None

    # ------------------------------------------------------------ spawn and handshake

    def bind(self) -> None:
        """Make the endpoint that the worker will connect to. Raises WorkerError."""
        self._release()
        path = endpoint(self._plan.controller_ipc_directory, self.index)
        self._channel = Channel(self._context, WORKER, self._plan.epoch)
        try:
            self._channel.bind(path)
        except IpcError as error:
            self._release()
            raise WorkerError(f"The worker of vCPU {self.index} cannot be started: {error}") from None
        self._subscription = self._events.add_subscriber(self)

    def spawn(self, assignment: Assignment | None = None) -> None:
        """Ask the supervisor for the process; does not wait, a refusal shows in :meth:`wait_greeted`.

        Raises WorkerError or SupervisorError when it cannot even be asked.
        """
        if self._channel is None:
            self.bind()
        self.assignment = assignment or self.assignment
        self.ended = self.vcpu_exit = None
        self.failure = ""
        self.pid = 0
        self._kill_wanted = False
        self._forget_owner()
        self._spawn_request = self._supervisor.submit_spawn(self.assignment)
        self._move(WorkerEvent.SPAWN)

    def _spawn_answered(self) -> bool:
        return not self._spawn_request or self._supervisor.ready(self._spawn_request)

    def _collect_spawn(self) -> None:
        """Take the supervisor's answer, which is here. Raises SupervisorError if it refused."""
        request, self._spawn_request = self._spawn_request, 0
        try:
            spawned, owned = self._supervisor.collect_spawn(request)
        except SupervisorError as error:
            self.failure = str(error)
            self._move(WorkerEvent.DIED)
            self._release()
            raise
        with owned:
            self._pidfd = owned.take()
            pair = socket.socket(fileno=owned.take())
        pair.setblocking(False)  # a worker that does not read must not stop us
        self._descriptors = PairChannel(pair, DESCRIPTORS, self._plan.epoch)
        self.pid = spawned.pid
        if self._kill_wanted:
            self._send_kill()

    def wait_greeted(self) -> None:
        """Wait until the worker has said HELLO. Raises WorkerError or SupervisorError."""
        deadline = time.monotonic_ns() + HELLO_TIMEOUT_NS
        self._events.run_until(self._spawn_answered, deadline)
        if self._spawn_request:
            self._collect_spawn()

        def settled() -> bool:
            return self.state is not WorkerState.SPAWNED or self._supervisor.closed

        self._events.run_until(settled, deadline)
        if self._supervisor.closed:
            raise SupervisorError("The supervisor is gone.")
        if self.state is WorkerState.SPAWNED:
            self._fail(f"The worker of vCPU {self.index} did not report within {HELLO_TIMEOUT_NS // SECOND_NS} s.")
        if self.state is not WorkerState.GREETED:
            raise self._error()

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
        # What an honest worker sends is bounded by what it was asked; anything else is a breach, which closes the
        # channel: so this ends, however fast a worker sends.
        try:
            while self._channel is not None:
                envelope = self._channel.receive(time.monotonic_ns())
                if envelope is None:
                    return
                if envelope.reply_to:
                    self._handle_reply(envelope.reply_to, envelope.message)
                else:
                    self._handle_event(envelope.message)
        except (IpcError, StateError) as error:
            self.breach(str(error))

    def _handle_reply(self, reply_to: int, message: Any) -> None:
        callback = self._callbacks.pop(reply_to, None)
        if callback is not None:
            callback(message)
        elif reply_to in self._awaited and reply_to not in self._replies:
            self._replies[reply_to] = message
        elif reply_to in self._abandoned:
            self._abandoned.discard(reply_to)
        else:
            self.breach(f"{type(message).__name__} in answer to nothing")

    def _handle_event(self, message: Any) -> None:
        if isinstance(message, Hello):
            self._greet(message)
        elif isinstance(message, VcpuExited) and message.vcpu in self._vcpus:
            self._vcpus.discard(message.vcpu)
            self._move(WorkerEvent.VCPU_EXITED)
            if self.vcpu_exit is None:
                self.vcpu_exit = message
                self.on_vcpu_exited(self, message)
        elif isinstance(message, GhostEvent):
            self.on_ghost_event(self, message)
        elif isinstance(message, GhostRecovered) and message.vcpu in self.assignment.ghosts:
            self.on_ghost_recovered(self, message)
        else:
            self.breach(f"{type(message).__name__} that nobody asked for")

    def _greet(self, hello: Hello) -> None:
        assert self._channel is not None
        if hello.worker != self.index or self.state is not WorkerState.SPAWNED:
            self.breach("HELLO of another worker, or a second one")
            return
        if hello.kvm_api_version != KVM_API_VERSION:
            self._fail(f"The KVM API version is {hello.kvm_api_version}, not {KVM_API_VERSION}.")
            return
        self._vcpu_mmap_size = hello.vcpu_mmap_size
        self.kvm = Kvm(hello.kvm_api_version, hello.vcpu_mmap_size, hello.max_vcpus, hello.max_memslots)
        self._channel.unlink()
        self._move(WorkerEvent.HELLO)
        try:
            self._channel.send(Welcome())
        except IpcError:
            pass  # it has died since, or will: the supervisor says how

    def breach(self, text: str) -> None:
        """The worker broke the protocol: it is not believed any more, and killed."""
        self._fail(f"The worker of vCPU {self.index} broke the protocol: {text}.")

    def _fail(self, text: str) -> None:
        if self.failure or not self.alive:
            return
        self.failure = text
        self._move(WorkerEvent.BREACH)
        self._close_channel()
        self.kill()
        self.on_failed(self, text)

    def cell_ended(self, notice: CellEnded) -> None:
        """The supervisor reaped the process."""
        if self._spawn_request and self._spawn_answered():
            try:
                self._collect_spawn()  # it died before we looked at the answer to our request
            except SupervisorError:
                return
        if notice.pid != self.pid or not self.alive:
            return
        self._receive()
        self.ended = notice
        self._move(WorkerEvent.DIED)
        self._close_channel()
        self._callbacks.clear()
        self.on_ended(self, notice)

    def _error(self) -> VmmError:
        """Return what to raise where the worker cannot do what is asked."""
        if self.vcpu_exit is not None and not self.failure:
            return MicrovmEndedError(f"vCPU {self.vcpu_exit.vcpu} left its run loop: {self.vcpu_exit.reason}.")
        return WorkerError(self._cause())

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
        """Send a command; the reply goes to ``callback`` or waits for :meth:`collect`. Never runs the event loop.

        A worker that gets it when nobody waits any more does not carry it out. Raises WorkerError, or
        MicrovmEndedError.
        """
        if self.state is WorkerState.FAILED:
            raise self._error()
        return self._submit(message, callback, time.monotonic_ns() + COMMAND_TIMEOUT_NS)

    def _submit(self, message: Any, callback: Callable[[Any], None] | None, deadline: int) -> int:
        if not self.alive or self._channel is None:
            raise self._error()
        try:
            sequence = self._channel.send(message, deadline=deadline)
        except IpcError as error:
            if not self._has_exited(DYING_MS):
                self.breach(str(error))
                raise self._error() from None
            # The supervisor is about to say how it ended; that counts, not that it can no longer be asked.
            raise WorkerError(f"The worker of vCPU {self.index} (pid {self.pid}) has ended.") from None
        if callback is None:
            self._awaited.add(sequence)
        else:
            self._callbacks[sequence] = callback
        self._receive()  # sending may have consumed the edge of the descriptor
        return sequence

    def _has_exited(self, patience_ms: int) -> bool:
        if self._pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(patience_ms))

    def collect(self, sequence: int, expected: type[Reply]) -> Reply:
        """Wait for a reply. Raises WorkerError when the worker fails, dies, refuses or is too slow."""

        def settled() -> bool:
            return sequence in self._replies or not self.alive or self.state is WorkerState.FAILED

        if not settled():
            self._events.run_until(settled, time.monotonic_ns() + COMMAND_TIMEOUT_NS)
        self._awaited.discard(sequence)
        reply = self._replies.pop(sequence, None)
        if isinstance(reply, expected):
            return reply
        if reply is None:
            self._abandoned.add(sequence)
            if self.alive and self.state is not WorkerState.FAILED:
                name = f"The worker of vCPU {self.index} (pid {self.pid})"
                raise WorkerError(f"{name} did not answer within {COMMAND_TIMEOUT_NS // SECOND_NS} s.")
        elif isinstance(reply, Failed):
            raise WorkerError(reply.text)
        else:
            self.breach(f"{type(reply).__name__} in answer to another command")
        raise self._error()

    def request(self, message: Any, expected: type[Reply]) -> Reply:
        """Send a command and wait for its reply. Raises as :meth:`collect` does."""
        try:
            sequence = self.submit(message)
        except WorkerError:
            self._wait_if_exited()
            raise self._error() from None
        return self.collect(sequence, expected)

    def _arrive(self, event: WorkerEvent) -> None:
        """Note that a command was carried out. The worker may have ended right after it."""
        if self.alive and self.state is not WorkerState.FAILED:
            self._move(event)
        elif self.vcpu_exit is None or self.failure:
            raise self._error()  # a vCPU that has ended meanwhile was reported, and is no failure of this command

    def configure(self, message: Configure, descriptors: WorkerDescriptors) -> None:
        """Hand over descriptors and configuration; afterwards the vCPUs are parked. Raises WorkerError."""
        channel = self._descriptors
        if channel is None or self.state is not WorkerState.GREETED:
            raise self._error()
        self._vcpus = set(message.vcpus)
        try:
            handover.send(channel, descriptors)
        except IpcError as error:
            self._wait_if_exited()
            self.breach(str(error))
            raise self._error() from None
        configured = self.request(message, Configured)
        self.tsc_khz = configured.tsc_khz
        try:
            self._run_pages = handover.receive_run_pages(channel, message.vcpus, self._vcpu_mmap_size)
        except WorkerError as error:
            self._wait_if_exited()
            self.breach(str(error))
            raise self._error() from None
        self._arrive(WorkerEvent.CONFIGURED)

    def send_descriptor(self, message: Any, descriptor: int) -> None:
        """Hand a descriptor over after Configure, ahead of the command that needs it. Not to one that has ended."""
        if self._descriptors is None or not self.alive or self.state is WorkerState.FAILED:
            return
        try:
            self._descriptors.send(message, fds=(descriptor,))
        except IpcError as error:
            if not self._has_exited(DYING_MS):  # else the supervisor is about to say how it ended, and that counts
                self.breach(str(error))

    def _wait_if_exited(self) -> None:
        if self.alive and self._has_exited(DYING_MS):
            self._events.run_until(lambda: not self.alive, time.monotonic_ns() + FINISH_TIMEOUT_NS)

    def run_page(self, vcpu: int) -> mmap.mmap | None:
        """Return the read-only kvm_run area of a vCPU; it stays readable after the worker's death."""
        return self._run_pages.get(vcpu)

    def resume(self) -> None:
        """Let the vCPUs run. Raises WorkerError."""
        self.request(Resume(), Resumed)
        self._arrive(WorkerEvent.RESUMED)

    def collect_resume(self, sequence: int) -> None:
        """Wait for a submitted Resume."""
        self.collect(sequence, Resumed)
        self._arrive(WorkerEvent.RESUMED)

    def pause(self) -> None:
        """Park the vCPUs. Raises WorkerError."""
        self.request(Pause(), Paused)
        self._arrive(WorkerEvent.PAUSED)

    def collect_pause(self, sequence: int) -> int:
        """Wait for a submitted Pause; return the number of KVM_KVMCLOCK_CTRL failures."""
        paused = self.collect(sequence, Paused)
        self._arrive(WorkerEvent.PAUSED)
        return paused.kvmclock_ctrl_failures

    def collect_parked_ghosts(self, sequence: int) -> int:
        """Wait for a submitted ParkGhosts; return how many ghosts had held something."""
        return self.collect(sequence, GhostsParked).drained

    def park_ghosts(self) -> int:
        """Ask for the ghosts to be parked; returns the number for :meth:`collect_parked_ghosts`."""
        return self.submit(ParkGhosts())

    def set_routes(self, routes: Sequence[Route], done: Callable[[], None]) -> None:
        """Send routes; ``done`` is called when they are in force (never, if the worker fails)."""

        def answered(reply: Any) -> None:
            if isinstance(reply, RoutesSet):
                done()
            else:
                self._fail(f"The worker of vCPU {self.index} could not set an interrupt route: {reply}")

        try:
            self.submit(SetRoutes(tuple(routes)), answered)
        except VmmError:
            pass  # the worker's end is reported by itself

    def ping(self, callback: Callable[[], None]) -> None:
        """Ask for a sign of life. Raises WorkerError or MicrovmEndedError if it cannot even be asked."""

        def answered(reply: Any) -> None:
            if isinstance(reply, Pong):
                callback()
            else:
                self.breach(f"{type(reply).__name__} in answer to Ping")

        if self.state is WorkerState.FAILED:
            raise self._error()
        self._submit(Ping(), answered, 0)  # no deadline: one that was stopped for long answers, too

    # ------------------------------------------------------------ end

    def finish(self) -> None:
        """Ask the worker to end, or kill it if it cannot be asked; :meth:`wait_ended` waits."""
        if not self.alive or self.state is WorkerState.FINISHING:
            return
        if self.failure or self.state is WorkerState.SPAWNED:
            self.kill()
            return
        try:
            self._submit(Finish(), lambda reply: None, 0)
            self._move(WorkerEvent.FINISH)
        except VmmError:
            self.kill()

    def kill(self) -> None:
        """SIGKILL by pidfd or, where the pidfd may not be used, by the supervisor; returns at once.

        A worker that was asked for and whose pidfd is not here yet is killed when it comes.
        """
        if not self.alive:
            return
        self._kill_wanted = True
        if self._spawn_request and self._spawn_answered():
            try:
                self._collect_spawn()
            except SupervisorError:
                return  # there is nothing to kill
        elif self._pidfd >= 0:
            self._send_kill()

    def _send_kill(self) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except OSError:
            self._supervisor.signal(self.index, signal.SIGKILL)

    def wait_ended(self, timeout_ns: int = FINISH_TIMEOUT_NS) -> bool:
        """Wait until the supervisor has reaped the worker; kill it when the time is over."""

        def ended() -> bool:
            return not self.alive or self._supervisor.closed

        def ended_or_answered() -> bool:
            return ended() or bool(self._spawn_request and self._spawn_answered())

        self._events.run_until(ended_or_answered, time.monotonic_ns() + timeout_ns)
        if not ended():
            self.kill()
            self._events.run_until(ended, time.monotonic_ns() + timeout_ns)
        return not self.alive

    def _close_channel(self) -> None:
        if self._subscription:
            self._events.remove_subscriber(self._subscription)
            self._subscription = 0
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _release(self) -> None:
        self._close_channel()
        if self._spawn_request:
            self._supervisor.abandon(self._spawn_request)
            self._spawn_request = 0
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
        self._abandoned.clear()

    def close(self) -> None:
        """Release everything; the process must have ended or be about to."""
        self._release()
