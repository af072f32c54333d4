"""The controller's side of one worker: handshake, commands and replies, descriptors, what it reports by itself."""

from __future__ import annotations

import mmap
import select
import time

import zmq

from base.event_manager import EventManager, EventOps, Events
from base.lean_std import socket
from base.lean_typing import Any, Callable, NamedTuple, Sequence, TypeVar
from ipc.channel import Channel, PairChannel
from ipc.errors import IpcError, MessageError
from ipc.launch_plan import Assignment, LaunchPlan, endpoint
from ipc.messages.descriptors import DESCRIPTORS
from ipc.messages.ghosts import GhostEvent, GhostRecovered
from ipc.messages.records import WORKER, Failed, Route
from ipc.messages.supervisor import CellEnded
from ipc.messages.worker import (
    Configure,
    Configured,
    Finish,
    Hello,
    Pause,
    Paused,
    Ping,
    Pong,
    Resume,
    Resumed,
    RoutesSet,
    SetRoutes,
    VcpuExited,
    Welcome,
)
from vmm.cells.descriptors import WorkerDescriptors, receive_run_pages, send_descriptors
from vmm.cells.lifecycle import DEADLINES, SECOND_NS, WorkerEvent, WorkerState
from vmm.cells.process import DYING_MS, WorkerProcess
from vmm.cells.replies import Replies
from vmm.cells.supervisor import SupervisorClient, internal_error
from vmm.errors import MicrovmEndedError, StateError, SupervisorError, VmmError, WorkerError

__all__ = ["SECOND_NS", "Worker", "WorkerDescriptors"]

#: How long a command may take for which nobody says otherwise.
COMMAND_TIMEOUT_NS = 30 * SECOND_NS
KVM_API_VERSION = 12

Reply = TypeVar("Reply")

#: What such a worker says changes nothing any more.
_LEAVING = (WorkerState.FINISHING, WorkerState.REPLACED)


class Kvm(NamedTuple):
    """The host's KVM as a worker found it; the controller itself has no descriptor of it.

    ``vcpu_mmap_size`` is in bytes; the limits are those of one VM, and each worker has a VM of its own.
    """

    api_version: int
    vcpu_mmap_size: int
    max_vcpus: int
    max_memslots: int


class Worker(WorkerProcess):
    """One worker process. Every wait runs the event loop, so that exits go on being served meanwhile."""

    def __init__(
        self,
        index: int,
        plan: LaunchPlan,
        context: zmq.Context[Any],
        events: EventManager,
        supervisor: SupervisorClient,
    ) -> None:
        super().__init__(index, events, supervisor)
        self.tsc_khz = 0
        #: What the worker said of the host's KVM.
        self.kvm = Kvm(0, 0, 0, 0)
        #: How far the kvmclock of its VM is ahead of that of worker 0, in ns; None if that was not measured.
        self.clock_ahead_ns: int | None = None
        self.vcpu_exit: VcpuExited | None = None
        self.on_vcpu_exited: Callable[[Worker, VcpuExited], None]
        self.on_failed: Callable[[Worker, str], None]
        self.on_ended: Callable[[Worker, CellEnded], None]
        self.on_ghost_event: Callable[[Worker, GhostEvent], None]
        self.on_ghost_recovered: Callable[[Worker, GhostRecovered], None]
        self._forget_owner()
        self._plan = plan
        self._context = context
        self._channel: Channel | None = None
        self._descriptors: PairChannel | None = None
        self._subscription = 0
        #: What came is being read, further up on the stack.
        self._receiving = False
        self._replies = Replies()
        self._vcpus: set[int] = set()
        self._run_pages: dict[int, mmap.mmap] = {}
        self._vcpu_mmap_size = 0

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
        self.vcpu_exit = None
        self._forget_owner()
        self._submit_spawn()

    def _take_descriptor_channel(self, pair: socket.socket) -> None:
        pair.setblocking(False)  # a worker that does not read must not stop us
        self._descriptors = PairChannel(pair, DESCRIPTORS, self._plan.epoch)

    def handshake_is_over(self) -> bool:
        """Look whether the worker has said HELLO by now, or never will (:meth:`handshake_refusal`)."""
        if self._spawn_request and self._spawn_answered():
            try:
                self._collect_spawn()
            except SupervisorError:
                return True
        if self.state is WorkerState.GREETED:
            return not self._spawn_request
        return self.state is not WorkerState.SPAWNED

    def handshake_refusal(self) -> str:
        """Say why the worker never will say HELLO, or nothing."""
        return "" if self.state is WorkerState.GREETED else str(self.error())

    def wait_greeted(self) -> None:
        """Wait until the worker has said HELLO. Raises WorkerError or SupervisorError."""
        deadline = time.monotonic_ns() + DEADLINES[WorkerState.SPAWNED].nanoseconds
        self._events.run_until(self._spawn_answered, deadline)
        if self._spawn_request:
            self._collect_spawn()

        def settled() -> bool:
            return self.state is not WorkerState.SPAWNED or self._supervisor.closed

        self._events.run_until(settled, deadline)
        if self._supervisor.closed:
            raise SupervisorError("The supervisor is gone.")
        if self.state is WorkerState.SPAWNED:
            self.expire()
        if self.state is not WorkerState.GREETED:
            raise self.error()

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
        outer, self._receiving = self._receiving, True
        try:
            while self._channel is not None:
                envelope = self._channel.receive(time.monotonic_ns())
                if envelope is None:
                    return
                if not envelope.reply_to:
                    self._handle_event(envelope.message)
                elif not self._replies.arrive(envelope.reply_to, envelope.message):
                    self.breach(f"{type(envelope.message).__name__} in answer to nothing")
        except (IpcError, StateError) as error:
            self.breach(str(error))
        finally:
            self._receiving = outer

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

    def expire(self) -> None:
        """The deadline of its state is over: it is killed."""
        limit = DEADLINES[self.state]
        if self.state is WorkerState.SPAWNED:
            seconds = f"{limit.nanoseconds / SECOND_NS:g} s"
            self._fail(f"The worker of vCPU {self.index} {limit.text} within {seconds}.", WorkerEvent.EXPIRED)
        else:
            self._move(WorkerEvent.EXPIRED)
            self.kill()

    def _fail(self, text: str, event: WorkerEvent = WorkerEvent.BREACH) -> None:
        if self.failure or not self.alive:
            return
        self.failure = text
        self._move(event)
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
        self._replies.drop_callbacks()
        self.on_ended(self, notice)

    def error(self) -> VmmError:
        """Return what to raise where the worker cannot do what is asked."""
        if self.vcpu_exit is not None and not self.failure:
            return MicrovmEndedError(f"vCPU {self.vcpu_exit.vcpu} left its run loop: {self.vcpu_exit.reason}.")
        return WorkerError(self._cause())

    def _cause(self) -> str:
        """Say why the worker cannot do what is asked, as precisely as we know."""
        if self.failure:
            return self.failure
        return f"{self.name} {self.ended_how()}."

    # ------------------------------------------------------------ commands

    def submit(self, message: Any, callback: Callable[[Any], None] | None = None, timeout_ns: int | None = None) -> int:
        """Send a command; the reply goes to ``callback`` or waits for :meth:`collect`. Never runs the event loop.

        A worker that gets it later than after ``timeout_ns`` (0: however late) does not carry it out. Raises
        WorkerError, or MicrovmEndedError.
        """
        if self.state is WorkerState.FAILED:
            raise self.error()
        timeout_ns = COMMAND_TIMEOUT_NS if timeout_ns is None else timeout_ns
        return self._submit(message, callback, time.monotonic_ns() + timeout_ns if timeout_ns else 0)

    def ask(
        self,
        message: Any,
        expected: type[Any],
        answered: Callable[[Any, str], None],
        *,
        timeout_ns: int,
        event: WorkerEvent | None = None,
    ) -> None:
        """Send a command; ``answered`` gets the reply of the expected kind, or None and why it was refused.

        A worker that has ended, or does so meanwhile, does not answer: its end is reported by itself.
        """

        def replied(reply: Any) -> None:
            if isinstance(reply, expected):
                if event is not None:
                    self.note(event)
                answered(reply, "")
            elif isinstance(reply, Failed):
                answered(None, reply.text)
            else:
                self.breach(f"{type(reply).__name__} in answer to another command")

        try:
            self.submit(message, replied, timeout_ns)
        except VmmError:
            pass

    def note(self, event: WorkerEvent) -> None:
        """Note what has become of a command, unless nothing of the worker counts any more."""
        if self.usable and self.state not in _LEAVING:
            self._move(event)

    def _submit(self, message: Any, callback: Callable[[Any], None] | None, deadline: int) -> int:
        if not self.alive or self._channel is None:
            raise self.error()
        try:
            sequence = self._channel.send(message, deadline=deadline)
        except MessageError as error:  # it is us who break it, and clients know no names of our messages
            self._fail(internal_error("a command to a worker", error))
            raise self.error() from None
        except IpcError as error:
            if not self._has_exited(DYING_MS):
                self.breach(str(error))
                raise self.error() from None
            # The supervisor is about to say how it ended; that counts, not that it can no longer be asked.
            raise WorkerError(f"{self.name} has ended.") from None
        self._replies.expect(sequence, callback)
        if not self._receiving:  # else what comes is read there: a guest decides how often in a row
            self._receive()  # sending may have consumed the edge of the descriptor
        return sequence

    def collect(self, sequence: int, expected: type[Reply]) -> Reply:
        """Wait for a reply. Raises WorkerError when the worker fails, dies, refuses or is too slow."""

        def settled() -> bool:
            return self._replies.has(sequence) or not self.alive or self.state is WorkerState.FAILED

        if not settled():
            self._events.run_until(settled, time.monotonic_ns() + COMMAND_TIMEOUT_NS)
        reply = self._replies.take(sequence)
        if isinstance(reply, expected):
            return reply
        if reply is None:
            if self.alive and self.state is not WorkerState.FAILED:
                raise WorkerError(f"{self.name} did not answer within {COMMAND_TIMEOUT_NS // SECOND_NS} s.")
        elif isinstance(reply, Failed):
            raise WorkerError(reply.text)
        else:
            self.breach(f"{type(reply).__name__} in answer to another command")
        raise self.error()

    def request(self, message: Any, expected: type[Reply]) -> Reply:
        """Send a command and wait for its reply. Raises as :meth:`collect` does."""
        try:
            sequence = self.submit(message)
        except WorkerError:
            self._wait_if_exited()
            raise self.error() from None
        return self.collect(sequence, expected)

    def _arrive(self, event: WorkerEvent) -> None:
        """Note that a command was carried out. The worker may have ended right after it."""
        if self.alive and self.state is not WorkerState.FAILED:
            self._move(event)
        elif self.vcpu_exit is None or self.failure:
            raise self.error()  # a vCPU that has ended meanwhile was reported, and is no failure of this command

    def configure(self, message: Configure, descriptors: WorkerDescriptors) -> None:
        """Hand over descriptors and configuration; afterwards the vCPUs are parked. Raises WorkerError."""
        self._hand_over_descriptors(message, descriptors)
        self._configured(message, self.request(message, Configured))
        if not self.usable and (self.vcpu_exit is None or self.failure):
            raise self.error()

    def configure_soon(
        self, message: Configure, descriptors: WorkerDescriptors, answered: Callable[[str], None], timeout_ns: int
    ) -> None:
        """As :meth:`configure`, without waiting; ``answered`` gets why it failed, or nothing. Raises WorkerError."""
        self._hand_over_descriptors(message, descriptors)

        def replied(reply: Any, refusal: str) -> None:
            if reply is not None:
                self._configured(message, reply)
            answered(refusal)

        self.ask(message, Configured, replied, timeout_ns=timeout_ns)

    def _hand_over_descriptors(self, message: Configure, descriptors: WorkerDescriptors) -> None:
        channel = self._descriptors
        if channel is None or self.state is not WorkerState.GREETED:
            raise self.error()
        self._vcpus = set(message.vcpus)
        try:
            send_descriptors(channel, descriptors)
        except IpcError as error:
            self._wait_if_exited()
            self.breach(str(error))
            raise self.error() from None

    def _configured(self, message: Configure, reply: Configured) -> None:
        assert self._descriptors is not None
        self.tsc_khz = reply.tsc_khz
        try:
            self._run_pages = receive_run_pages(self._descriptors, message.vcpus, self._vcpu_mmap_size)
        except WorkerError as error:
            self._wait_if_exited()
            self.breach(str(error))
            raise self.error() from None
        self.note(WorkerEvent.CONFIGURED)

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
            deadline = time.monotonic_ns() + DEADLINES[WorkerState.FINISHING].nanoseconds
            self._events.run_until(lambda: not self.alive, deadline)

    def run_page(self, vcpu: int) -> mmap.mmap | None:
        """Return the read-only kvm_run area of a vCPU; it stays readable after the worker's death."""
        return self._run_pages.get(vcpu)

    def resume(self) -> None:
        """Let the vCPUs run. Raises WorkerError."""
        self.note(WorkerEvent.START)
        self.request(Resume(), Resumed)
        self._arrive(WorkerEvent.RESUMED)

    def pause(self) -> None:
        """Park the vCPUs. Raises WorkerError."""
        self.request(Pause(), Paused)
        self._arrive(WorkerEvent.PAUSED)

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

    def ping(self, callback: Callable[[str], None]) -> None:
        """Ask for a sign of life; ``callback`` gets what the worker says of its own state.

        Raises WorkerError or MicrovmEndedError if it cannot even be asked.
        """

        def answered(reply: Any) -> None:
            if isinstance(reply, Pong):
                callback(reply.state)
            else:
                self.breach(f"{type(reply).__name__} in answer to Ping")

        if self.state is WorkerState.FAILED:
            raise self.error()
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

    def replaced(self) -> None:
        """Another worker runs its vCPUs from now on."""
        self.note(WorkerEvent.REPLACED)
        self._forget_owner()

    def _close_channel(self) -> None:
        if self._subscription:
            self._events.remove_subscriber(self._subscription)
            self._subscription = 0
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _release(self) -> None:
        super()._release()
        self._close_channel()
        if self._descriptors is not None:
            self._descriptors.close()
            self._descriptors = None
        for page in self._run_pages.values():
            page.close()
        self._run_pages.clear()
        self._replies.clear()

    def close(self) -> None:
        """Release everything; the process must have ended or be about to."""
        self._release()
