"""The controller's side of one worker: commands and replies, descriptors, what it reports by itself."""

from __future__ import annotations

import time

import zmq

from base.deferral import Deferral
from base.event_manager import EventManager
from base.lean_std import deque
from base.lean_typing import Any, Callable, Sequence, TypeVar
from ipc.errors import IpcError, MessageError
from ipc.launch_plan import Assignment, LaunchPlan
from ipc.messages.ghosts import GhostEvent, GhostRecovered
from ipc.messages.records import Failed, Route
from ipc.messages.supervisor import CellEnded
from ipc.messages.vm import RoutesSet, SetRoutes, VmChanged
from ipc.messages.worker import (
    Configure,
    Configured,
    Finish,
    Pause,
    Paused,
    Ping,
    Pong,
    Resume,
    Resumed,
    VcpuExited,
)
from vmm.cells.descriptors import VmChange, WorkerDescriptors, receive_run_pages, send_descriptors
from vmm.cells.handshake import WorkerHandshake
from vmm.cells.lifecycle import DEADLINES, SECOND_NS, WorkerEvent, WorkerState
from vmm.cells.process import DYING_MS
from vmm.cells.supervisor import SupervisorClient, internal_error
from vmm.errors import MicrovmEndedError, SupervisorError, VmmError, WorkerError

__all__ = ["SECOND_NS", "Worker", "WorkerDescriptors"]

#: How long a command may take for which nobody says otherwise.
COMMAND_TIMEOUT_NS = 30 * SECOND_NS
#: Changes of its VM that a worker is told before it has answered: its descriptor channel has to hold all of theirs.
CHANGES_UNDER_WAY = 4

Reply = TypeVar("Reply")

#: What such a worker says changes nothing any more.
_LEAVING = (WorkerState.FINISHING, WorkerState.REPLACED)


class Worker(WorkerHandshake):
    """One worker process. Every wait runs the event loop, so that exits go on being served meanwhile."""

    def __init__(
        self,
        index: int,
        plan: LaunchPlan,
        context: zmq.Context[Any],
        events: EventManager,
        supervisor: SupervisorClient,
    ) -> None:
        super().__init__(index, plan, context, events, supervisor)
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

    def _forget_owner(self) -> None:
        self.on_vcpu_exited = lambda worker, event: None
        self.on_failed = lambda worker, text: None
        self.on_ended = lambda worker, notice: None
        self.on_ghost_event = lambda worker, event: worker.breach("a ghost event before it was configured")
        self.on_ghost_recovered = lambda worker, event: None

    def spawn(self, assignment: Assignment | None = None) -> None:
        """As :meth:`WorkerHandshake.spawn`; what belonged to the process before is forgotten."""
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
        return super().error()

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

    def _wait_if_exited(self) -> None:
        if self.alive and self._has_exited(DYING_MS):
            deadline = time.monotonic_ns() + DEADLINES[WorkerState.FINISHING].nanoseconds
            self._events.run_until(lambda: not self.alive, deadline)

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

    def _release(self) -> None:
        super()._release()
        self._close_channel()
        if self._descriptors is not None:
            self._descriptors.close()
            self._descriptors = None
        for page in self._run_pages.values():
            page.release()
        self._run_pages.clear()
        self._replies.clear()

    def close(self) -> None:
        """Release everything; the process must have ended or be about to."""
        self._release()
