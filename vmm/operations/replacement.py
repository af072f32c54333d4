"""One worker goes on for another: what each step of the replacement (vmm.operations.tables.REPLACE) says to whom."""

from __future__ import annotations

from base.lean_typing import Any, Callable, NamedTuple, Sequence
from ipc.messages.descriptors import IpiPath
from ipc.messages.ghosts import OpenIpiTarget
from ipc.messages.records import Route
from ipc.messages.replacement import (
    MAX_PATHS_AT_ONCE,
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
from ipc.messages.worker import Configure, SavedState, SaveState
from vmm.cells.ghosts import OpenPath
from vmm.cells.lifecycle import WorkerEvent
from vmm.cells.worker import Worker, WorkerDescriptors

#: Called with why a step was refused, or nothing.
Answered = Callable[[str], None]


class Interrupts(NamedTuple):
    """What is bound in the VM of the worker that leaves, at the moment when it has handed over."""

    routes: Sequence[Route]
    paths: Sequence[OpenPath]


class Replacement:
    """One replacement. ``interrupts`` is asked when the guest stands still and nothing is under way."""

    def __init__(
        self,
        predecessor: Worker,
        successor: Worker,
        message: Configure,
        descriptors: WorkerDescriptors,
        interrupts: Callable[[], Interrupts],
    ) -> None:
        self.predecessor = predecessor
        self.successor = successor
        #: Called when the successor fails or ends, until it belongs to the microVM.
        self.on_successor_lost: Callable[[Worker, object], None] = lambda worker, how: None
        #: What has to become true before a step without an answer is over; it may raise a VmmError.
        self.waits: Callable[[], bool] | None = None
        self._message = message._replace(resumes_other=True)
        self._descriptors = descriptors
        self._interrupts = interrupts
        self._ghosts: tuple[GhostState, ...] = ()
        self._held: tuple[int, ...] = ()
        self._states: list[SavedState] = []
        self.steps: dict[str, Callable[[int, Answered], None]] = {
            "fork": self._fork,
            "configure": self._configure,
            "hand over": self._hand_over,
            "save": self._save,
            "load": self._load,
            "take over": self._take_over,
            "roll back": self._roll_back,
            "await end": self._await_end,
        }

    def _fork(self, timeout_ns: int, answered: Answered) -> None:
        self.successor.spawn(self.predecessor.assignment)
        self.successor.on_failed = self.successor.on_ended = self.on_successor_lost
        self.waits = self.successor.is_greeted

    def _configure(self, timeout_ns: int, answered: Answered) -> None:
        self.successor.configure_soon(self._message, self._descriptors, answered, timeout_ns)

    def _hand_over(self, timeout_ns: int, answered: Answered) -> None:
        def handed_over(reply: Any, refusal: str) -> None:
            if reply is not None:
                self._ghosts, self._held = reply
            answered(refusal)

        self.predecessor.ask(HandOver(), HandedOver, handed_over, timeout_ns=timeout_ns)

    def _save(self, timeout_ns: int, answered: Answered) -> None:
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

    def _load(self, timeout_ns: int, answered: Answered) -> None:
        left = len(self._states)

        def loaded(reply: Any, refusal: str) -> None:
            nonlocal left
            left -= 1
            if refusal or not left:
                answered(refusal)

        for vcpu, version, state in self._states:
            self.successor.ask(LoadState(vcpu, version, state), StateLoaded, loaded, timeout_ns=timeout_ns)

    def _take_over(self, timeout_ns: int, answered: Answered) -> None:
        routes, paths = self._interrupts()
        left = list(paths)

        def next_part(routes: tuple[Route, ...] = ()) -> None:
            """A part at a time: the worker has to take the descriptors before more of them fit into the socket."""
            part = left[:MAX_PATHS_AT_ONCE]
            del left[:MAX_PATHS_AT_ONCE]
            last = not left
            for path in part:
                self.successor.send_descriptor(IpiPath(path.vcpu, path.vector), path.eventfd)
            targets = tuple(OpenIpiTarget(path.vcpu, path.vector, path.gsi) for path in part)
            command = TakeOver(routes, targets, self._ghosts if last else (), self._held if last else (), last)
            event = WorkerEvent.LOADED if last else None
            self.successor.ask(command, TakenOver, taken_over, timeout_ns=timeout_ns, event=event)

        def taken_over(reply: Any, refusal: str) -> None:
            if refusal or not left:
                answered(refusal)
            else:
                next_part()

        # Decided before the first part is sent: its answer may come while the next is being made.
        next_part(tuple(routes))

    def _roll_back(self, timeout_ns: int, answered: Answered) -> None:
        self.predecessor.ask(
            RollBack(),
            RolledBack,
            lambda reply, refusal: answered(refusal),
            timeout_ns=timeout_ns,
            event=WorkerEvent.PAUSED,
        )

    def _await_end(self, timeout_ns: int, answered: Answered) -> None:
        self.waits = lambda: not self.successor.alive
