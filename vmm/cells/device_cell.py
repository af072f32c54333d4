"""The controller's side of one device cell: how its devices get into it, and what it says by itself."""

from __future__ import annotations

import zmq

from base.event_manager import EventManager
from base.lean_std import deque
from base.lean_typing import Any, Callable, NamedTuple, Sequence
from ipc.errors import IpcError
from ipc.guest_memory import GuestMemory
from ipc.launch_plan import ROLE_DEVICE, Assignment, LaunchPlan
from ipc.messages.device import (
    DEVICE,
    DEVICE_DESCRIPTORS,
    MAX_REGIONS,
    Attach,
    Attached,
    ConfigChanged,
    DeviceEvents,
    DeviceFiles,
    Finish,
    GuestMemoryFile,
    Hello,
    MapGuestMemory,
    MemoryMapped,
    NeedsReset,
    Tighten,
    Tightened,
    Welcome,
)
from ipc.messages.supervisor import CellEnded
from vmm.cells.commands import COMMAND_TIMEOUT_NS, CellCommands
from vmm.cells.lifecycle import WorkerEvent, WorkerState
from vmm.cells.process import DYING_MS
from vmm.cells.supervisor import SupervisorClient
from vmm.errors import DeviceCellError, SupervisorError
from vmm.observe.event_log import EVENTS

#: Commands of the set-up that are told before they were answered: the socket has to hold the descriptors of all.
_UNDER_WAY = 4


class SetUp(NamedTuple):
    """A command of the set-up: what is sent ahead of it with which descriptors, the answer, and who gets that."""

    message: Any
    descriptors: tuple[tuple[Any, tuple[int, ...]], ...]
    expected: type[Any]
    answered: Callable[[Any], None]


class DeviceCell(CellCommands):
    """One device cell process; the same object for all that follow each other in its place."""

    ROLE = ROLE_DEVICE
    SCHEMA = DEVICE
    DESCRIPTORS = DEVICE_DESCRIPTORS
    WELCOME = Welcome()
    ERROR = DeviceCellError
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
        self.assignment = Assignment(index, (), (), (), ROLE_DEVICE)
        #: Called when it has said HELLO, when its set-up is done, with what it says by itself, with why it was not
        #: forked, with why it is ended, and when it has ended.
        self.on_greeted: Callable[[DeviceCell], None] = _ignore
        self.on_ready: Callable[[DeviceCell], None] = _ignore
        self.on_event: Callable[[DeviceCell, ConfigChanged | NeedsReset], None] = _ignore_both
        self.on_refused: Callable[[DeviceCell, str], None] = _ignore_both
        self.on_failed: Callable[[Any, str], None] = _ignore_both
        self.on_ended: Callable[[DeviceCell, CellEnded], None] = _ignore_both

    @property
    def title(self) -> str:
        """The cell in a sentence."""
        return f"Device cell {self.index}"

    @property
    def ready(self) -> bool:
        """Have its devices been made, and its walls been closed behind them?"""
        return self.state is WorkerState.CONFIGURED

    def _state_changed(self) -> None:
        EVENTS.emit("device-cell-state", cell=self.index, pid=self.pid, state=self.state.value)

    def _is_hello(self, message: Any) -> bool:
        return isinstance(message, Hello)

    def _refuse_hello(self, hello: Any) -> str:
        return ""

    def _submit_spawn(self) -> None:
        super()._submit_spawn()
        self._supervisor.when_ready(self._spawn_request, self._spawn_came)

    def _spawn_came(self) -> None:
        """The supervisor has answered: with its process, which may have said HELLO already, or why there is none."""
        try:
            self._collect_spawn()
        except SupervisorError as error:
            self.on_refused(self, str(error))
            return
        self._go_on()

    def _greet(self, hello: Any) -> None:
        super()._greet(hello)
        self._go_on()

    def _go_on(self) -> None:
        if self.state is WorkerState.GREETED and not self._spawn_request:
            self.on_greeted(self)

    def _handle_event(self, message: Any) -> None:
        if isinstance(message, ConfigChanged | NeedsReset):
            self.on_event(self, message)
        else:
            super()._handle_event(message)

    def _has_ended(self, notice: CellEnded) -> None:
        self.on_ended(self, notice)

    # ------------------------------------------------------------ set-up

    def set_up(self, memory: GuestMemory, devices: Sequence[SetUp]) -> None:
        """Let it map guest memory, make these devices and close its walls; then ``on_ready``. Does not wait.

        What it cannot do is a failure of the cell.
        """
        assert len(memory.regions) <= MAX_REGIONS
        mapped = MapGuestMemory(memory.size, memory.regions)
        left = deque(
            [
                SetUp(mapped, ((GuestMemoryFile(memory.size), (memory.descriptor,)),), MemoryMapped, _ignore),
                *devices,
                SetUp(Tighten(), (), Tightened, self._tightened),
            ]
        )

        def send_next() -> None:
            if left:
                self._send_set_up(left.popleft(), send_next)

        for _ in range(_UNDER_WAY):
            send_next()

    def _send_set_up(self, command: SetUp, then: Callable[[], None]) -> None:
        def answered(reply: Any, refusal: str) -> None:
            if reply is None:
                self._fail(refusal)
                return
            command.answered(reply)
            then()

        for message, descriptors in command.descriptors:
            self.send_descriptors(message, descriptors)
        self.ask(command.message, command.expected, answered, timeout_ns=COMMAND_TIMEOUT_NS)

    def _tightened(self, _: Tightened) -> None:
        self._move(WorkerEvent.CONFIGURED)
        self.on_ready(self)

    def send_descriptors(self, message: Any, descriptors: tuple[int, ...]) -> None:
        """Send descriptors ahead of the command that needs them. Not to a cell that has ended."""
        if self._descriptors is None or not self.usable:
            return
        try:
            self._descriptors.send(message, fds=descriptors)
        except IpcError as error:
            if not self._has_exited(DYING_MS):  # else the supervisor is about to say how it ended, and that counts
                self.breach(str(error))


def attaching(
    message: Attach,
    events: Sequence[int],
    files: tuple[int, ...],
    *,
    in_flight: bool,
    answered: Callable[[Attached], None],
) -> SetUp:
    """Return the set-up of a device. ``events``: its interrupt, its table of heads in flight, a kick for each queue."""
    queues = len(events) - 1 - in_flight
    sent: list[tuple[Any, tuple[int, ...]]] = [(DeviceEvents(message.device, queues, in_flight), tuple(events))]
    if files:
        sent.append((DeviceFiles(message.device, len(files)), files))
    return SetUp(message, tuple(sent), Attached, answered)


def _ignore(*_: Any) -> None:
    """Nobody wants to know."""


def _ignore_both(_first: Any, _second: Any) -> None:
    """Nobody wants to know."""
