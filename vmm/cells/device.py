"""A virtio device that a device cell serves: to the transport it is a VirtioDevice like any other.

What the transport wants (activated, or stopped) stands here, and the cell is told; if the cell ends, the one after it
is told again, and whoever waits for it waits for that one. docs/adr/device-cells-are-replaced.md.
"""

from __future__ import annotations

import os

from base.counters import Aggregate, Counters
from base.deferral import Deferral
from base.lean_typing import TYPE_CHECKING, Any, Callable, NamedTuple
from ipc.errors import MessageError
from ipc.messages.device import (
    Activate,
    Activated,
    Attach,
    Attached,
    Collect,
    Collected,
    ConfigChanged,
    ConfigTaken,
    ConfigWritten,
    DeviceFiles,
    DeviceQueue,
    NeedsReset,
    Noted,
    ReadState,
    Reset,
    ResetDone,
    StateRead,
    Stop,
    Stopped,
    Tokens,
    Updated,
    UpdateFiles,
    UpdateLimiter,
    WriteConfig,
)
from ipc.schema import Section, unpack
from ipc.shared_memory import create_shared
from virtio.device import Activation, VirtioDevice
from virtio.in_flight import region_size
from virtio.rate_limiter import Bucket
from vmm.cells.commands import COMMAND_TIMEOUT_NS
from vmm.cells.device_cell import DeviceCell, SetUp, attaching
from vmm.errors import DeviceCellError
from vmm.observe.logger import LOG

if TYPE_CHECKING:
    from vmm.devices.transport.mmio import MmioTransport


class DeviceModel(NamedTuple):
    """All that the controller knows of a device.

    ``settings`` and ``state`` (what was saved of it, or empty) are packed by the records of its kind; ``section`` and
    ``counters`` are those of its kind. ``out_of_order``: it may answer chains in another order than it has taken them
    in. ``files`` are descriptors, which the device takes.
    """

    kind: int
    id: str
    queue_sizes: tuple[int, ...]
    features: int
    config: bytes
    settings: bytes
    section: Section
    counters: str
    out_of_order: bool = False
    files: tuple[int, ...] = ()
    state: bytes = b""


class Update:
    """A change of a running device: ``refusal`` says, when it is ``done``, why it is not in force, or nothing."""

    __slots__ = ("done", "refusal")

    def __init__(self) -> None:
        self.done = Deferral()
        self.refusal = ""

    def finish(self, refusal: str) -> None:
        """It is in force, or was refused."""
        self.refusal = refusal
        self.done.complete()


class CellDevice(VirtioDevice):
    """One device. ``host`` is asked for a cell when there is none any more; vmm.cells.device_pool sets it."""

    def __init__(self, model: DeviceModel) -> None:
        super().__init__(model.id, model.queue_sizes, Counters(model.counters))
        self.kind = model.kind
        self.SECTION = model.section
        self.model = model
        #: Its number among the devices of the machine.
        self.number = 0
        self.cell: DeviceCell
        #: Called to have a cell again: False if there will be none.
        self.revive: Callable[[], bool] = lambda: False
        #: Calls something in the loop's next turn.
        self.soon: Callable[[Callable[[], None]], None]
        self.transport: MmioTransport
        #: Why there is no cell any more, once that is so.
        self.given_up = ""
        #: How many cells have served it, and how many chains were served once more.
        self.cells = 0
        self.again = 0
        self._config = model.config
        self._files = model.files
        self._state = model.state
        self._limiter: tuple[Bucket | None, Bucket | None] = (None, None)
        self._in_flight = -1
        if model.out_of_order:
            self._in_flight = create_shared("in-flight", region_size(model.queue_sizes))
        #: The present activation was told to a cell: who is told of it next has to look how far that one came.
        self._begun = False
        #: The present cell serves it.
        self._serving = False
        #: What it may say by itself: once in an activation, and once until it is told that the last one was taken.
        self._may_need_reset = False
        self._may_change_config = True
        self._activating: Deferral | None = None
        self._stopping: Deferral | None = None
        self._also_stopping: list[Deferral] = []
        #: What cells that have ended had counted, and the last that the present one has told.
        self._ended = Counters(model.counters)
        self._told: Collected | None = None

    # ------------------------------------------------------------ for the transport

    def features(self) -> int:
        """Return what is offered."""
        return self.model.features

    def config(self) -> bytes:
        """Return the configuration space as the cell has told it last."""
        return self._config

    def write_config(self, offset: int, data: bytes) -> None:
        """Tell the cell; what becomes of it is shown when it answers."""
        self._ask(WriteConfig(self.number, offset, data), ConfigWritten, self._take_config)

    def activate(self, activation: Activation) -> Deferral | None:
        """Begin, or go on; done when the cell serves the queues, this one or the next."""
        assert self.activation is None
        self.activation = activation
        self._begun = False
        if self.given_up and not self.revive():
            activation.notify.needs_reset(self.given_up)
            return None
        self._activating = Deferral()
        waits = self._activating
        if self.cell.ready:
            self._activate()
        return waits

    def _activate(self) -> None:
        activation = self.activation
        assert activation is not None
        states = [None if queue is None else DeviceQueue(*queue.state()) for queue in activation.queues]
        recover, self._begun = self._begun, True
        self._may_need_reset = True
        self._ask(Activate(self.number, activation.features, tuple(states), recover), Activated, self._activated)

    def _activated(self, reply: Activated) -> None:
        self.again += reply.again
        self._serving = True
        waits, self._activating = self._activating, None
        if waits is not None:
            waits.complete()
        if self._stopping is not None:
            self._stop()

    def stop(self) -> Deferral | None:
        """Done when nothing is in flight, and the activation's queues say where they stand."""
        if self.activation is None:
            return None
        if self.given_up:
            self.activation = None
            return None
        waits = Deferral()
        if self._stopping is not None:  # it is asked for again before it is done
            self._also_stopping.append(waits)
            return waits
        self._stopping = waits
        if self._serving:
            self._stop()
        return waits

    def _stop(self) -> None:
        self._ask(Stop(self.number), Stopped, self._stopped)

    def _stopped(self, reply: Stopped) -> None:
        activation = self.activation
        assert activation is not None
        for queue, position in zip(activation.queues, reply.queues, strict=False):
            if queue is not None and position is not None:
                queue.next_available, queue.next_used = position
        self._end_activation()

    def _end_activation(self) -> None:
        self.activation = None
        self._begun = self._serving = False
        self._complete_waits()

    def _complete_waits(self) -> None:
        waiting = [self._activating, self._stopping, *self._also_stopping]
        self._activating = self._stopping = None
        self._also_stopping = []
        for waits in waiting:
            if waits is not None:
                waits.complete()

    def reset(self) -> None:
        """Forget what the driver has said. While stopped."""
        self._ask(Reset(self.number), ResetDone, self._take_config)

    def save(self) -> Any:
        """Return what the device has to save; waits for the cell's answer. Raises DeviceCellError."""
        reply = self.cell.request(ReadState(self.number), StateRead)
        try:
            return self.SECTION.fields.check(unpack(reply.state), self.SECTION.name)
        except MessageError as error:
            self.cell.breach(f"the state of the device {self.id} cannot be read: {error}")
            raise DeviceCellError(f"The state of the device {self.id} cannot be read.") from None

    def close(self) -> None:
        """Close its files. Its cell has ended."""
        for each in self._files:
            os.close(each)
        self._files = ()
        if self._in_flight >= 0:
            os.close(self._in_flight)
            self._in_flight = -1

    def notified(self, queue: int) -> None:
        """Kicks go to the cell."""

    # ------------------------------------------------------------ changes at run time

    def update_limiter(self, bandwidth: Bucket | None, ops: Bucket | None) -> Update:  # type: ignore[override]
        """Replace the limiter's buckets that are given."""
        update = Update()
        tokens = [None if each is None else Tokens(*each) for each in (bandwidth, ops)]

        def updated(reply: Updated) -> None:
            self._limiter = (bandwidth or self._limiter[0], ops or self._limiter[1])
            self._take_config(reply)
            update.finish("")

        self._ask(UpdateLimiter(self.number, *tokens), Updated, updated, update.finish)
        return update

    @property
    def has_overlay(self) -> bool:
        """Is it a drive that consists of a base and an overlay?"""
        return len(self._files) > 1

    def update_files(self, files: tuple[int, ...]) -> Update:  # type: ignore[override]
        """Serve from these files, which are taken; none: the size of the old ones has changed."""
        update = Update()

        def close(unused: tuple[int, ...]) -> None:
            for each in unused:
                os.close(each)

        def updated(reply: Updated) -> None:
            if files:
                close(self._files)
                self._files = files
            self._state = b""
            self._take_config(reply)
            update.finish("")

        def refused(refusal: str) -> None:
            close(files)
            update.finish(refusal)

        if files and self.cell.ready:
            self.cell.send_descriptors(DeviceFiles(self.number, len(files)), files)
        self._ask(UpdateFiles(self.number, len(files)), Updated, updated, refused)
        return update

    def _ask(
        self,
        message: Any,
        expected: type[Any],
        then: Callable[[Any], None],
        refused: Callable[[str], None] | None = None,
    ) -> None:
        """Tell the cell, if there is one; a refusal of what it has to be able to do ends it."""
        if not self.cell.ready:
            if refused is not None:
                refused(f"The cell of the device {self.id} is being replaced.")
            return
        cell = self.cell

        def answered(reply: Any, refusal: str) -> None:
            if reply is not None:
                then(reply)
            elif refused is not None:
                refused(refusal)
            else:
                cell.breach(f"the device {self.id}: {refusal}")

        cell.ask(message, expected, answered, timeout_ns=COMMAND_TIMEOUT_NS)

    # ------------------------------------------------------------ its cell

    def attaching(self) -> SetUp:
        """Return what a fresh cell is told of it."""
        model, transport = self.model, self.transport
        message = Attach(self.number, model.kind, model.id, model.settings, self._state, len(self._files))
        table = () if self._in_flight < 0 else (self._in_flight,)
        events = (transport.line.eventfd, *table, *transport.kicks)
        return attaching(message, events, self._files, in_flight=bool(table), answered=self._attached)

    def _attached(self, reply: Attached) -> None:
        model = self.model
        if (reply.features, reply.queue_sizes) != (model.features, model.queue_sizes):
            self.cell.breach(f"the device {self.id} is another one there")
            return
        self.cells += 1
        if reply.config != self._config:
            self._config = reply.config
            self.transport.config_changed()

    def cell_ready(self) -> None:
        """There is a cell: tell it what is wanted."""
        self.given_up = ""
        if self._limiter != (None, None):
            self.update_limiter(*self._limiter)
        if self.activation is not None:
            self._activate()

    def cell_lost(self) -> None:
        """The cell has ended. Another one comes, or :meth:`give_up` is called."""
        self._serving = False
        self._may_need_reset, self._may_change_config = False, True
        if self._told is not None:
            self._ended = self._sum(self._told)
            self._told = None

    def give_up(self, reason: str) -> None:
        """No cell comes any more: the driver is told, and nobody waits any longer."""
        self.given_up = reason
        activation = self.activation
        if activation is not None:
            activation.notify.needs_reset(reason)
            stopping = self._stopping is not None
            if stopping:
                self.activation = None
            self._complete_waits()

    # ------------------------------------------------------------ what the cell says

    def handle(self, event: ConfigChanged | NeedsReset) -> None:
        """An event of the cell about this device."""
        if isinstance(event, NeedsReset):
            if not self._may_need_reset:
                self.cell.breach(f"the device {self.id} needs a reset twice")
                return
            self._may_need_reset = False
            self.transport.needs_reset(event.reason)
            return
        if not self._may_change_config:
            self.cell.breach(f"the device {self.id} changes its configuration before the last change was taken")
            return
        self._may_change_config = False
        self._config = event.config
        self.transport.config_changed()
        self.soon(self._config_taken)  # not at once: how often in a row is not for the cell to say

    def _config_taken(self) -> None:
        if not self._may_change_config:
            self._may_change_config = True
            self._ask(ConfigTaken(self.number), Noted, lambda reply: None)

    def _take_config(self, reply: Any) -> None:
        if reply.config != self._config:
            self._config = reply.config
            self.transport.config_changed()

    def ask_counters(self, then: Callable[[], None]) -> None:
        """Bring the counters up to date; ``then`` is not called by a cell that ends meanwhile."""

        def collected(reply: Collected) -> None:
            before = self._told
            if len(reply.values) != len(self.counters.values) or len(reply.aggregates) != len(self.counters.aggregates):
                self.cell.breach(f"the device {self.id} has other counters there")
                return
            if before is not None and any(new < old for new, old in zip(reply.values, before.values, strict=True)):
                self.cell.breach(f"the device {self.id} counts backwards")
                return
            self._told = reply
            total = self._sum(reply)
            self.counters.values = total.values
            self.counters.aggregates = total.aggregates
            then()

        self._ask(Collect(self.number), Collected, collected)

    def _sum(self, told: Collected) -> Counters:
        """Return what all cells have counted."""
        total = Counters(self.model.counters)
        total.merge(self._ended)
        for key, value in zip(total.values, told.values, strict=True):
            total.values[key] += value
        for aggregate, seen in zip(total.aggregates.values(), told.aggregates, strict=True):
            other = Aggregate()
            other.minimum, other.maximum, other.total, other.count = seen
            aggregate.merge(other)
        return total


def log_update(device: CellDevice, update: Update) -> None:
    """Log a change that was not put into force, for whom nobody waits."""
    if update.refusal:
        LOG.warn(f"The device {device.id} could not be changed: {update.refusal}")
