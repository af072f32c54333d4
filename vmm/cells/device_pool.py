"""All device cells of a machine: which device is in which, their start, and what follows when one ends.

A cell that ends is replaced by a fresh one, once its process is dead, which goes on with the queues as they stand in
guest memory. One that ends again and again is given up: its devices need a reset, and a driver that begins anew gets
another try. docs/adr/device-cells-are-replaced.md.
"""

from __future__ import annotations

import time

from base.event_manager import EventManager, EventOps, Events, Timer
from base.lean_typing import TYPE_CHECKING, Any, Callable, Sequence
from ipc.guest_memory import GuestMemory
from ipc.messages.device import ConfigChanged, NeedsReset
from ipc.messages.supervisor import CellEnded
from virtio.device import VirtioDevice
from vmm.cells.device import CellDevice, Update
from vmm.cells.device_cell import DeviceCell
from vmm.cells.lifecycle import DEADLINES, SECOND_NS, WorkerState
from vmm.errors import DeviceCellError, DeviceError, VmmError
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG

if TYPE_CHECKING:
    from vmm.devices.transport.mmio import MmioTransport
    from vmm.json.text import JsonValue

#: More ends than this within the time are a crash loop.
MAX_ENDS = 5
WINDOW_NS = 10 * SECOND_NS
#: How long what is in flight may take when the guest is paused: a disk that does not answer must not keep a client.
STOP_NS = 10 * SECOND_NS
#: How long reading of metrics waits for the cells.
COLLECT_NS = SECOND_NS // 5


class _Place:
    """One device cell, its devices, and how often it has ended."""

    def __init__(self, cell: DeviceCell, devices: Sequence[CellDevice]) -> None:
        self.cell = cell
        self.devices = tuple(devices)
        #: When it has ended, of the last ``WINDOW_NS``.
        self.ends: list[int] = []
        #: Since when nobody serves its devices.
        self.lost_at = 0
        self.replaced = 0
        self.timer: Timer | None = None
        #: Why it could not start, or has ended before the guest ran.
        self.refusal = ""


class DeviceCells:
    """The cells of one machine. ``make`` returns a cell with a number. A subscriber of the loop (timers)."""

    def __init__(self, events: EventManager, make: Callable[[int], DeviceCell], memory: GuestMemory) -> None:
        self._events = events
        self._make = make
        self._memory = memory
        self._ops: EventOps
        self._places: list[_Place] = []
        self._devices: list[CellDevice] = []
        self._started = self._closed = False
        self._subscription = events.add_subscriber(self)

    def init(self, ops: EventOps) -> None:
        """Subscriber: there will be timers."""
        self._ops = ops

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: only time is watched here."""

    # ------------------------------------------------------------ start

    def start(self, devices: Sequence[CellDevice], *, each: bool) -> None:
        """Ask for the cells of devices that are attached to their transports: one for all, or one for ``each``.

        Does not wait. Raises DeviceCellError or SupervisorError.
        """
        self._devices = list(devices)
        for number, device in enumerate(devices):
            device.number = number
            device.soon = self._ops.soon
        groups = [[device] for device in devices] if each else [list(devices)]
        for index, group in enumerate(groups):
            place = _Place(self._make(index), group)
            self._places.append(place)
            self._connect(place)
            self._spawn(place)

    def _connect(self, place: _Place) -> None:
        cell = place.cell
        cell.on_greeted = lambda _: cell.set_up(self._memory, [device.attaching() for device in place.devices])
        cell.on_ready = lambda _: self._ready(place)
        cell.on_event = lambda _, event: self._event(place, event)
        cell.on_refused = lambda _, text: self._refused(place, text)
        cell.on_failed = lambda _, text: LOG.error(text)
        cell.on_ended = lambda _, notice: self._ended(place, notice)
        for device in place.devices:
            device.cell = cell
            device.revive = lambda: self._revive(place)

    def _spawn(self, place: _Place) -> None:
        place.cell.spawn()
        place.timer = self._ops.add_timer(
            time.monotonic_ns() + DEADLINES[WorkerState.SPAWNED].nanoseconds, lambda: self._late(place)
        )

    def _late(self, place: _Place) -> None:
        if place.cell.state is WorkerState.SPAWNED:
            place.cell.expire()
        elif place.cell.usable and not place.cell.ready:
            place.cell.breach("it did not make its devices in time")

    def wait_ready(self) -> None:
        """Wait until every cell has made its devices. Raises DeviceCellError, which says what it could not do."""

        def settled() -> bool:
            return all(place.cell.ready or place.refusal for place in self._places)

        self._events.run_until(settled, time.monotonic_ns() + DEADLINES[WorkerState.SPAWNED].nanoseconds)
        for place in self._places:
            if not place.cell.ready:
                raise DeviceCellError(place.refusal or str(place.cell.error()))
        self._started = True

    # ------------------------------------------------------------ its ends

    def cell_ended(self, notice: CellEnded) -> None:
        """The supervisor has reaped a device cell."""
        for place in self._places:
            if place.cell.index == notice.worker:
                place.cell.cell_ended(notice)

    def _ready(self, place: _Place) -> None:
        self._disarm(place)
        for device in place.devices:
            device.cell_ready()
        if place.lost_at:
            microseconds = (time.monotonic_ns() - place.lost_at) // 1000
            place.lost_at = 0
            place.replaced += 1
            cell = place.cell
            LOG.info(f"{cell.name} goes on for one that has ended, {microseconds} µs after it.")
            EVENTS.emit("device-cell-replaced", cell=cell.index, pid=cell.pid, pause_us=microseconds)

    def _ended(self, place: _Place, notice: CellEnded) -> None:
        cell = place.cell
        if self._closed:
            return
        self._disarm(place)
        how = cell.failure or f"{cell.name} {cell.ended_how()}."
        cell.close()
        if not self._started:
            place.refusal = how
            return
        now = time.monotonic_ns()
        place.lost_at = place.lost_at or now
        place.ends = [each for each in place.ends if now - each < WINDOW_NS] + [now]
        LOG.error(how)
        EVENTS.emit(
            "device-cell-ended",
            cell=cell.index,
            pid=notice.pid,
            devices=[device.id for device in place.devices],
            **_cause(cell, notice),
            text=how,
        )
        for device in place.devices:
            device.cell_lost()
        if len(place.ends) > MAX_ENDS:
            self._give_up(place, f"its cell has ended {len(place.ends)} times within {WINDOW_NS // SECOND_NS} s")
        else:
            self._replace(place)

    def _refused(self, place: _Place, text: str) -> None:
        """The supervisor does not fork it."""
        self._disarm(place)
        if not self._started:
            place.refusal = text
        elif not self._closed:
            self._give_up(place, f"its cell cannot be replaced: {text}")

    def _disarm(self, place: _Place) -> None:
        if place.timer is not None:
            place.timer.cancel()
            place.timer = None

    def _replace(self, place: _Place) -> None:
        try:
            self._spawn(place)
        except VmmError as error:
            self._give_up(place, f"its cell cannot be replaced: {error}")

    def _give_up(self, place: _Place, reason: str) -> None:
        LOG.error(f"{place.cell.title} is given up: {reason}")
        EVENTS.emit(
            "device-cell-given-up",
            cell=place.cell.index,
            devices=[device.id for device in place.devices],
            text=reason,
        )
        for device in place.devices:
            device.give_up(reason)

    def _revive(self, place: _Place) -> bool:
        """A driver begins anew with a device whose cell was given up: try again, but not in a loop."""
        if place.cell.alive:
            return True  # another device's driver has
        now = time.monotonic_ns()
        place.ends = [each for each in place.ends if now - each < WINDOW_NS]
        if self._closed or len(place.ends) >= MAX_ENDS:
            return False
        try:
            self._spawn(place)
        except VmmError as error:
            LOG.error(str(error))
            return False
        return True

    def _event(self, place: _Place, event: ConfigChanged | NeedsReset) -> None:
        for device in place.devices:
            if device.number == event.device:
                device.handle(event)
                return
        place.cell.breach("an event of a device that is not there")

    # ------------------------------------------------------------ pause

    def stop(self) -> None:
        """Stop all devices; the guest stands still. Raises DeviceError if one has something in flight for too long.

        Then those that have stopped go on, and that one as soon as it has stopped.
        """
        begun = [(device.transport, device.transport.pause()) for device in self._devices]
        waiting = [(transport, done) for transport, done in begun if done is not None and not done.done]
        if self._events.run_until(lambda: all(done.done for _, done in waiting), time.monotonic_ns() + STOP_NS):
            return
        late = [(transport, done) for transport, done in waiting if not done.done]
        for transport, done in late:
            done.then(_resuming(transport))
        self.resume()
        names = ", ".join(transport.device.id for transport, _ in late)
        seconds = STOP_NS // SECOND_NS
        raise DeviceError(f"The guest cannot be paused: requests of {names} were not done within {seconds} s.")

    def resume(self) -> None:
        """Let all devices go on with their queues. Does not wait: kicks that come meanwhile are not lost."""
        for device in self._devices:
            device.transport.resume()

    @property
    def devices(self) -> Sequence[CellDevice]:
        """Return all devices, in the order of their numbers."""
        return self._devices

    def wait_for(self, update: Update) -> None:
        """Wait until a change of a device is in force or refused: a cell that does not answer in time is ended."""
        self._events.run_until(lambda: update.done.done, None)

    # ------------------------------------------------------------ information

    def collect(self) -> None:
        """Bring the counters of all devices up to date, as far as their cells answer soon."""
        left = len(self._devices)

        def told() -> None:
            nonlocal left
            left -= 1

        if not left or self._closed:
            return
        asked = [device for device in self._devices if device.cell.ready]
        left = len(asked)
        for device in asked:
            device.ask_counters(told)
        self._events.run_until(
            lambda: left <= 0 or any(not device.cell.ready for device in asked), time.monotonic_ns() + COLLECT_NS
        )

    def report(self, device: VirtioDevice) -> dict[str, JsonValue]:
        """Return what GET /devices shows of a device's cell."""
        place = next(place for place in self._places if device in place.devices)
        cell = place.cell
        given_up = any(each.given_up for each in place.devices)
        return {
            "cell": cell.index,
            "pid": cell.pid,
            "state": "given up" if given_up else "serving" if cell.ready else "being replaced",
            "replaced": place.replaced,
        }

    # ------------------------------------------------------------ end

    def end(self) -> None:
        """End the cells in order: nothing of guest memory is touched afterwards. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for device in self._devices:
            device.given_up = "the machine ends"
        for place in self._places:
            place.cell.finish()
        for place in self._places:
            place.cell.wait_ended()
            place.cell.close()
        self._events.remove_subscriber(self._subscription)


def _resuming(transport: MmioTransport) -> Callable[[], None]:
    def resume() -> None:
        transport.resume()

    return resume


def _cause(cell: DeviceCell, notice: CellEnded) -> dict[str, Any]:
    """Return ``cause`` and ``detail`` as events have them (vmm.machine.post_mortem)."""
    if cell.failure:
        return {"cause": "protocol", "detail": ""}
    if notice.wall:
        return {"cause": "wall", "detail": notice.wall}
    if notice.signal:
        return {"cause": "signal", "detail": str(notice.signal)}
    return {"cause": "exited", "detail": str(notice.status)}
