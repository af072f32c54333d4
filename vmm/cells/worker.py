"""The controller's side of one worker: commands and replies, descriptors, what it reports by itself."""

from __future__ import annotations

import time

import zmq

from base.deferral import Deferral
from base.event_manager import EventManager
from base.lean_std import deque
from base.lean_typing import Any, Callable, NamedTuple, Sequence
from ipc.errors import IpcError
from ipc.launch_plan import Assignment, LaunchPlan
from ipc.messages.descriptors import DESCRIPTORS
from ipc.messages.ghosts import GhostEvent, GhostRecovered
from ipc.messages.records import WORKER, Route
from ipc.messages.supervisor import CellEnded
from ipc.messages.vm import RoutesSet, SetRoutes, VmChanged
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
    VcpuExited,
    Welcome,
)
from vmm.cells.commands import COMMAND_TIMEOUT_NS, CellCommands
from vmm.cells.descriptors import VmChange, WorkerDescriptors, receive_run_pages, send_descriptors
from vmm.cells.lifecycle import SECOND_NS, WorkerEvent, WorkerState
from vmm.cells.process import DYING_MS
from vmm.cells.supervisor import SupervisorClient
from vmm.errors import MicrovmEndedError, VmmError, WorkerError
from vmm.observe.event_log import EVENTS

__all__ = ["SECOND_NS", "Worker", "WorkerDescriptors"]

KVM_API_VERSION = 12
#: Changes of its VM that a worker is told before it has answered: its descriptor channel has to hold all of theirs.
CHANGES_UNDER_WAY = 4


class Kvm(NamedTuple):
    """The host's KVM as a worker found it; the controller itself has no descriptor of it.

    ``vcpu_mmap_size`` is in bytes; the limits are those of one VM, and each worker has a VM of its own.
    """

    api_version: int
    vcpu_mmap_size: int
    max_vcpus: int
    max_memslots: int


class Worker(CellCommands):
    """One worker process. Every wait runs the event loop, so that exits go on being served meanwhile."""

    SCHEMA = WORKER
    DESCRIPTORS = DESCRIPTORS
    WELCOME = Welcome()
    ERROR = WorkerError
    FINISH = Finish()

    def __init__(
        self,
        index: int,
        plan: LaunchPlan,
        context: zmq.Context[Any],
        events: EventManager,
        supervisor: SupervisorClient,
    ) -> None:
        super().__init__(index, plan, context, events, supervisor)
        #: What the worker said of the host's KVM.
        self.kvm = Kvm(0, 0, 0, 0)
        self.tsc_khz = 0
        #: How far the kvmclock of its VM is ahead of that of worker 0, in ns; None if that was not measured.
        self.clock_ahead_ns: int | None = None
        self.vcpu_exit: VcpuExited | None = None
        self.on_vcpu_exited: Callable[[Worker, VcpuExited], None]
        self.on_ended: Callable[[Worker, CellEnded], None]
        self.on_ghost_event: Callable[[Worker, GhostEvent], None]
        self.on_ghost_recovered: Callable[[Worker, GhostRecovered], None]
        self._forget_owner()
        self._vcpus: set[int] = set()
        self._run_pages: dict[int, memoryview] = {}
        #: So many changes of the VM were told ahead of Configure; done when the last was sent.
        self._told = 0
        self._telling: Deferral | None = None
        self._refusal = ""

    @property
    def title(self) -> str:
        """The worker in a sentence."""
        return f"The worker of vCPU {self.index}"

    def _state_changed(self) -> None:
        EVENTS.emit("worker-state", worker=self.index, pid=self.pid, state=self.state.value)

    def _is_hello(self, message: Any) -> bool:
        return isinstance(message, Hello)

    def _refuse_hello(self, hello: Hello) -> str:
        if hello.kvm_api_version != KVM_API_VERSION:
            return f"The KVM API version is {hello.kvm_api_version}, not {KVM_API_VERSION}."
        self.kvm = Kvm(hello.kvm_api_version, hello.vcpu_mmap_size, hello.max_vcpus, hello.max_memslots)
        return ""

    def _forget_owner(self) -> None:
        self.on_vcpu_exited = lambda worker, event: None
        self.on_failed = lambda worker, text: None
        self.on_ended = lambda worker, notice: None
        self.on_ghost_event = lambda worker, event: worker.breach("a ghost event before it was configured")
        self.on_ghost_recovered = lambda worker, event: None

    def spawn(self, assignment: Assignment | None = None) -> None:
        """As :meth:`CellHandshake.spawn`; what belonged to the process before is forgotten."""
        self.vcpu_exit = None
        self._told = 0
        self._telling = None
        self._refusal = ""
        self._forget_owner()
        super().spawn(assignment)

    # ------------------------------------------------------------ what it says by itself, and how it ends

    def _handle_event(self, message: Any) -> None:
        if isinstance(message, VcpuExited) and message.vcpu in self._vcpus:
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
            super()._handle_event(message)

    def _has_ended(self, notice: CellEnded) -> None:
        self.on_ended(self, notice)

    def error(self) -> VmmError:
        """Return what to raise where the worker cannot do what is asked."""
        if self.vcpu_exit is not None and not self.failure:
            return MicrovmEndedError(f"vCPU {self.vcpu_exit.vcpu} left its run loop: {self.vcpu_exit.reason}.")
        return super().error()

    # ------------------------------------------------------------ commands

    def _arrive(self, event: WorkerEvent) -> None:
        """Note that a command was carried out. The worker may have ended right after it."""
        if self.alive and self.state is not WorkerState.FAILED:
            self._move(event)
        elif self.vcpu_exit is None or self.failure:
            raise self.error()  # a vCPU that has ended meanwhile was reported, and is no failure of this command

    def tell(self, changes: Sequence[VmChange]) -> None:
        """Say what the VM has ahead of :meth:`configure`, whose changes begin with these. Does not wait.

        If one of them cannot be made, ``configure`` says so.
        """
        self._told = len(changes)
        telling = self._telling = Deferral()

        def refused(refusal: str) -> None:
            self._refusal = refusal
            if not telling.done:
                telling.complete()

        self.change_all(changes, refused, telling.complete, 0)

    def configure(self, message: Configure, descriptors: WorkerDescriptors, changes: Sequence[VmChange]) -> None:
        """Say what the VM has, and make its vCPUs, which are parked afterwards. Raises WorkerError."""
        outcome: list[str] = []
        self.configure_soon(message, descriptors, changes, outcome.append, COMMAND_TIMEOUT_NS)

        def settled() -> bool:
            return bool(outcome) or not self.alive or self.state is WorkerState.FAILED

        if not settled():
            self._events.run_until(settled, time.monotonic_ns() + COMMAND_TIMEOUT_NS)
        if outcome and outcome[0]:
            raise WorkerError(outcome[0])
        if not outcome and self.usable:
            raise WorkerError(f"{self.name} did not answer within {COMMAND_TIMEOUT_NS // SECOND_NS} s.")
        if not outcome or (not self.usable and (self.vcpu_exit is None or self.failure)):
            raise self.error()

    def configure_soon(
        self,
        message: Configure,
        descriptors: WorkerDescriptors,
        changes: Sequence[VmChange],
        answered: Callable[[str], None],
        timeout_ns: int,
    ) -> None:
        """As :meth:`configure`, without waiting; ``answered`` gets why it failed, or nothing. Raises WorkerError."""
        self._hand_over_descriptors(message, descriptors)

        def made(reply: Any, refusal: str) -> None:
            if reply is not None:
                self._configured(message, reply)
            answered(self._refusal or refusal)

        def make() -> None:
            if self._refusal:
                answered(self._refusal)
            else:
                self.ask(message, Configured, made, timeout_ns=timeout_ns)

        def change_rest() -> None:
            self.change_all(changes[self._told :], answered, make, timeout_ns)

        if self._telling is None or self._telling.done:
            change_rest()
        else:
            self._telling.then(change_rest)

    def change_all(
        self, changes: Sequence[VmChange], refused: Callable[[str], None], then: Callable[[], None], timeout_ns: int
    ) -> None:
        """Change its VM, in this order; ``then`` is called when the last change was sent, not when it was answered.

        There are never more than a few under way. After ``refused`` no more is sent.
        """
        left = deque(changes)
        all_sent = was_refused = False

        def changed(reply: Any, refusal: str) -> None:
            nonlocal was_refused
            if was_refused:
                return
            if refusal:
                was_refused = True
                refused(refusal)
            elif left:
                send_next()

        def send_next() -> None:
            # While a change is being sent an answer may come, and send the next one, or the last.
            nonlocal all_sent
            if left:
                self._ask_change(left.popleft(), changed, timeout_ns)
            if not left and not all_sent and not was_refused:
                all_sent = True
                then()

        for _ in range(min(len(left), CHANGES_UNDER_WAY) or 1):
            send_next()

    def _ask_change(self, change: VmChange, answered: Callable[[Any, str], None], timeout_ns: int) -> None:
        for message, descriptor in change.descriptors:
            self.send_descriptor(message, descriptor)
        self.ask(change.message, VmChanged, answered, timeout_ns=timeout_ns)

    def change(self, change: VmChange, done: Callable[[], None]) -> None:
        """Change the VM of a worker that was configured; ``done``: it is in force (never called, if it fails)."""

        def answered(reply: Any, refusal: str) -> None:
            if refusal:
                self._fail(f"The worker of vCPU {self.index} could not change its VM: {refusal}")
            else:
                done()

        self._ask_change(change, answered, COMMAND_TIMEOUT_NS)

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
            self._run_pages = receive_run_pages(self._descriptors, message.vcpus, self.kvm.vcpu_mmap_size)
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

    def run_page(self, vcpu: int) -> memoryview | None:
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

    def replaced(self) -> None:
        """Another worker runs its vCPUs from now on."""
        self.note(WorkerEvent.REPLACED)
        self._forget_owner()

    def _release(self) -> None:
        super()._release()
        for page in self._run_pages.values():
            page.release()
        self._run_pages.clear()
