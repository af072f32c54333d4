"""One worker goes on for another: what each step of the replacement (vmm.operations.tables.REPLACE) says to whom."""

from __future__ import annotations

import time

from base.event_manager import EventManager, EventOps
from base.lean_typing import Any, Callable, NamedTuple, Protocol
from ipc.messages.descriptors import IpiPath
from ipc.messages.ghosts import OpenIpiTarget
from ipc.messages.replacement import (
    MAX_PATHS_AT_ONCE,
    MAX_ROUTES_AT_ONCE,
    GhostState,
    HandedOver,
    HandOver,
    LoadState,
    RollBack,
    RolledBack,
    StateLoaded,
    TakenOver,
    TakeOver,
)
from ipc.messages.supervisor import CellEnded
from ipc.messages.worker import Configure, SavedState, SaveState
from vmm.cells.lifecycle import DEADLINES, SECOND_NS, WorkerEvent, WorkerState
from vmm.cells.vms import WorkerVms
from vmm.cells.worker import Worker, WorkerDescriptors
from vmm.errors import StateError
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG
from vmm.operations import tables
from vmm.operations.driver import Answered, OperationDriver, Wait
from vmm.operations.pause import Guest, Pausing
from vmm.operations.run import Member
from vmm.operations.tables import StepName

#: How long a replacement waits for the end of the worker that was replaced before.
AWAIT_END_TIMEOUT_NS = 10 * SECOND_NS


class Successor(NamedTuple):
    """A worker that is to go on for another one, not spawned yet, and what it is given."""

    worker: Worker
    configuration: Configure
    descriptors: WorkerDescriptors
    vms: WorkerVms


class Machine(Guest, Protocol):
    """What replacing workers asks of the microVM."""

    def perform(self, operation: Pausing) -> None:
        """Carry an operation out."""

    def require_alive(self) -> None:
        """Raise StateError after the end."""

    def has_ended(self) -> bool:
        """Is the microVM on its way out?"""

    def exchange_worker(self, predecessor: Worker, successor: Worker) -> None:
        """The successor is part of the microVM from now on, the predecessor is not."""


class Replacement(Pausing):
    """One replacement. ``retire`` ends a worker that takes no part any more, ``lost`` is told of a successor's end."""

    def __init__(
        self,
        machine: Machine,
        predecessor: Worker,
        successor: Successor,
        retire: Callable[[Worker], None],
        lost: Callable[[Worker, object], None],
    ) -> None:
        super().__init__(machine, tables.REPLACE)
        self.predecessor = predecessor
        self.predecessor_index = predecessor.index
        self.successor = successor.worker
        self._machine = machine
        self._given = successor
        self._retire = retire
        self._lost = lost
        self._ghosts: tuple[GhostState, ...] = ()
        self._held: tuple[int, ...] = ()
        self._states: list[SavedState] = []
        self._steps.update(
            {
                StepName.FORK: self._fork,
                StepName.CONFIGURE: self._configure,
                StepName.HAND_OVER: self._hand_over,
                StepName.SAVE: self._save,
                StepName.LOAD: self._load,
                StepName.TAKE_OVER: self._take_over,
                StepName.ROLL_BACK: self._roll_back,
                StepName.AWAIT_END: self._await_end,
            }
        )

    def commit(self) -> None:
        """The successor runs the predecessor's vCPUs from now on."""
        self._machine.exchange_worker(self.predecessor, self.successor)

    def dismiss(self, member: Member) -> None:
        """End a worker that takes no part any more."""
        self._retire(self.successor if member.successor else self.predecessor)

    def is_successor(self, worker: Worker) -> bool:
        """Is this the worker that is to go on?"""
        return worker is self.successor

    def _fork(self, member: Member, timeout_ns: int, answered: Answered) -> Wait:
        self.successor.spawn(self.predecessor.assignment)
        self.successor.on_failed = self.successor.on_ended = self._lost
        return Wait(self.successor.handshake_is_over, self.successor.handshake_refusal)

    def _configure(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        message = self._given.configuration._replace(resumes_other=True)
        changes = self._given.vms.for_successor()
        self.successor.configure_soon(message, self._given.descriptors, changes, answered, timeout_ns)

    def _hand_over(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        def handed_over(reply: Any, refusal: str) -> None:
            if reply is not None:
                self._ghosts, self._held = reply
            answered(refusal)

        self.predecessor.ask(HandOver(), HandedOver, handed_over, timeout_ns=timeout_ns)

    def _save(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        self._states = []
        vcpus = self.predecessor.assignment.vcpus

        def saved(reply: Any, refusal: str) -> None:
            if refusal:
                answered(refusal)
                return
            self._states.append(reply)
            if len(self._states) == len(vcpus):
                self.predecessor.note(WorkerEvent.SAVED)
                answered("")

        for vcpu in vcpus:
            self.predecessor.ask(SaveState(vcpu), SavedState, saved, timeout_ns=timeout_ns)

    def _load(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        left = len(self._states)

        def loaded(reply: Any, refusal: str) -> None:
            nonlocal left
            left -= 1
            if refusal or not left:
                answered(refusal)

        for vcpu, version, state in self._states:
            self.successor.ask(LoadState(vcpu, version, state), StateLoaded, loaded, timeout_ns=timeout_ns)

    def _take_over(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        # The guest stands still, and nothing is under way.
        bound = self._given.vms.bound_to(self.predecessor_index, self.predecessor.assignment.vcpus)
        routes, paths = list(bound.routes), list(bound.paths)

        def next_part() -> None:
            """A part at a time: the worker has to take the descriptors before more of them fit into the socket."""
            first_routes, first_paths = routes[:MAX_ROUTES_AT_ONCE], paths[:MAX_PATHS_AT_ONCE]
            del routes[:MAX_ROUTES_AT_ONCE], paths[:MAX_PATHS_AT_ONCE]
            last = not routes and not paths
            for path in first_paths:
                self.successor.send_descriptor(IpiPath(path.vcpu, path.vector), path.eventfd)
            targets = tuple(OpenIpiTarget(path.vcpu, path.vector, path.gsi) for path in first_paths)
            ghosts, held = (self._ghosts, self._held) if last else ((), ())
            command = TakeOver(tuple(first_routes), targets, ghosts, held, last)

            # Decided before the part is sent: its answer may come while the next is being made.
            def taken_over(reply: Any, refusal: str) -> None:
                if refusal or last:
                    answered(refusal)
                else:
                    next_part()

            event = WorkerEvent.LOADED if last else None
            self.successor.ask(command, TakenOver, taken_over, timeout_ns=timeout_ns, event=event)

        self.successor.change_all(self._given.vms.since(), answered, next_part, timeout_ns)

    def _roll_back(self, member: Member, timeout_ns: int, answered: Answered) -> None:
        self.predecessor.ask(
            RollBack(),
            RolledBack,
            lambda reply, refusal: answered(refusal),
            timeout_ns=timeout_ns,
            event=WorkerEvent.PAUSED,
        )

    def _await_end(self, member: Member, timeout_ns: int, answered: Answered) -> Wait:
        return Wait(lambda: not self.successor.alive)


class Replacements:
    """Replaces workers, one after the other. ``make_successor`` is called with the worker that is to be replaced."""

    def __init__(
        self,
        machine: Machine,
        driver: OperationDriver,
        events: EventManager,
        make_successor: Callable[[Worker], Successor],
    ) -> None:
        self.make_successor = make_successor
        #: Workers that take no part any more and have not ended.
        self.retired: list[Worker] = []
        self._machine = machine
        self._driver = driver
        self._events = events
        #: For the deadlines of those that are dismissed; set as soon as there is somebody to dismiss.
        self.ops: EventOps | None = None
        self._counts: dict[int, int] = {}

    def count(self, index: int) -> int:
        """How often the worker with this index was replaced."""
        return self._counts.get(index, 0)

    def replace(self, predecessor: Worker) -> None:
        """Let a freshly forked worker go on for another one.

        Raises StateError (nothing has changed) or WorkerError (the old worker goes on, or, with a new one, all run as
        soon as those that stand still can).
        """
        # The supervisor allows one worker beyond the plan: the one that was replaced last must be gone.
        deadline = time.monotonic_ns() + AWAIT_END_TIMEOUT_NS
        self._events.run_until(lambda: not self.retired or self._machine.has_ended(), deadline)
        self._machine.require_alive()
        if self.retired:
            raise StateError("The worker that was replaced last has not ended yet.")
        pid = predecessor.pid
        replacement = Replacement(
            self._machine, predecessor, self.make_successor(predecessor), self.retire, self._successor_lost
        )
        successor = replacement.successor
        try:
            self._machine.perform(replacement)
        finally:
            belongs = successor in self._machine.vcpus_handles
            if belongs:
                self._counts[successor.index] = self.count(successor.index) + 1
            elif successor.alive and successor not in self.retired:
                self.retire(successor)  # the microVM has ended meanwhile
        microseconds = (replacement.resumed_at - replacement.parked_at) // 1000
        EVENTS.emit("worker-replaced", worker=successor.index, pid=successor.pid, old_pid=pid, pause_us=microseconds)
        LOG.info(
            f"Worker vcpu {successor.index}: pid {successor.pid} goes on for pid {pid}; the guest stood still for "
            f"{microseconds} us."
        )

    def _successor_lost(self, worker: Worker, how: object) -> None:
        text = worker.failure or f"{worker.name} {worker.ended_how()}."
        LOG.warn(f"A worker that was to replace another one failed: {text}")
        self._driver.lost(worker, text)

    def retire(self, worker: Worker) -> None:
        """End a worker that takes no part any more, without waiting."""
        worker.on_failed = lambda worker, text: None
        worker.on_ended = self._has_ended
        self.retired.append(worker)
        if not worker.alive:
            self._has_ended(worker)
            return
        if worker.state is WorkerState.REPLACED:
            worker.finish()
        else:
            worker.kill()
        if worker.state in DEADLINES and self.ops is not None:
            deadline = time.monotonic_ns() + DEADLINES[worker.state].nanoseconds
            self.ops.add_timer(deadline, lambda: worker.expire() if worker.alive else None)

    def _has_ended(self, worker: Worker, notice: CellEnded | None = None) -> None:
        if worker in self.retired:
            self.retired.remove(worker)
            worker.close()
