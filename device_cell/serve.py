"""The loop of a device cell, and what the controller can tell it: messages on one side, VirtioDevice on the other."""

from __future__ import annotations

import os
import select
import time

from base import faults
from base.errors import CellblockError
from base.event_manager import READ_HANG_UP, EventManager, EventOps, Events
from base.exit_codes import GENERIC_ERROR, OK
from base.lean_typing import Any, Callable
from device_cell import kinds
from device_cell.attached import AttachedDevice, DeviceDescriptors
from ipc.channel import Channel, PairChannel
from ipc.descriptors import OwnedDescriptors
from ipc.errors import ChannelError
from ipc.guest_memory import GuestMemory
from ipc.launch_plan import Seal
from ipc.messages.device import (
    MAX_FILES,
    MAX_QUEUES,
    Activate,
    Activated,
    Attach,
    Attached,
    Collect,
    Collected,
    ConfigTaken,
    ConfigWritten,
    DeviceEvents,
    DeviceFiles,
    Finish,
    Finished,
    GuestMemoryFile,
    Latencies,
    MapGuestMemory,
    MemoryMapped,
    Noted,
    Ping,
    Pong,
    ReadState,
    Reset,
    ResetDone,
    StateRead,
    Stop,
    Stopped,
    Tighten,
    Tightened,
    Updated,
    UpdateFiles,
    UpdateLimiter,
    WriteConfig,
)
from ipc.messages.records import Failed
from virtio.rate_limiter import Bucket

#: Commands carried out in a turn: whoever sends them must not keep the devices from their queues.
COMMANDS = 16
_MAX_TEXT = 1000

Reply = Callable[[Any], None]


class Control:
    """Carries commands out. A subscriber of the loop that also drives the devices."""

    def __init__(self, channel: Channel, descriptors: PairChannel, seal: Seal, boot_id: bytes) -> None:
        self.events = EventManager()
        #: The exit code, once the cell is to end.
        self.code: int | None = None
        self._channel = channel
        self._descriptors = descriptors
        self._seal = seal
        self._boot_id = boot_id
        self._ops: EventOps
        self._receiving = False
        self._tightened = self._verified = False
        self._memory: GuestMemory | None = None
        self._devices: dict[int, AttachedDevice] = {}
        self._commands: dict[type[Any], Callable[[Any, Reply], None]] = {
            MapGuestMemory: self._map_memory,
            Attach: self._attach,
            Tighten: self._tighten,
            Activate: self._activate,
            Stop: self._stop,
            Reset: self._reset,
            WriteConfig: self._write_config,
            UpdateLimiter: self._update_limiter,
            UpdateFiles: self._update_files,
            ReadState: self._read_state,
            Collect: self._collect,
            ConfigTaken: self._config_taken,
            Ping: self._ping,
            Finish: self._finish,
        }

    # ------------------------------------------------------------ the loop

    def init(self, ops: EventOps) -> None:
        """Subscriber: hear the controller."""
        self._ops = ops
        ops.add(self._channel.fileno(), select.EPOLLIN)
        self._receive()

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: something has come on the control channel."""
        self._receive()

    def _receive(self) -> None:
        """Carry out what has come. ZeroMQ's descriptor is edge-triggered: read until there is nothing."""
        self._receiving = True
        for _ in range(COMMANDS):
            envelope = None if self.code is not None else self._channel.receive(time.monotonic_ns())
            if envelope is None:
                self._receiving = False
                return
            self._carry_out(envelope.message, envelope.sequence)
        self._ops.soon(self._receive)

    def _carry_out(self, message: Any, sequence: int) -> None:
        def reply(answer: Any) -> None:
            self._send(answer, sequence)

        command = self._commands.get(type(message))
        if command is None:
            reply(Failed("device.command", f"{type(message).__name__} is not a command"))
            return
        try:
            command(message, reply)
        except ChannelError:
            raise
        except (CellblockError, OSError) as error:
            code = error.code if isinstance(error, CellblockError) else "device.system"
            reply(Failed(code, str(error)[:_MAX_TEXT]))

    def _send(self, message: Any, reply_to: int = 0) -> None:
        """Raises ChannelError when the controller does not read."""
        self._channel.send(message, reply_to)
        if not self._receiving:  # sending may have consumed the edge of the descriptor
            self._receiving = True
            self._ops.soon(self._receive)

    # ------------------------------------------------------------ what is made before the seal

    def _take(self, expected: Any, count: int) -> OwnedDescriptors:
        """Return the descriptors of a message that was sent ahead of its command. Raises ChannelError."""
        try:
            envelope, owned = self._descriptors.receive(count)
        except BlockingIOError:
            raise ChannelError("the descriptors of a command did not come ahead of it") from None
        if envelope is None or envelope.message != expected or len(owned) != count:
            owned.close()
            raise ChannelError("other descriptors came than those of the command")
        return owned

    def _map_memory(self, message: MapGuestMemory, reply: Reply) -> None:
        with self._take(GuestMemoryFile(message.size), 1) as owned:
            if self._memory is not None:
                raise ChannelError("the guest memory comes twice")
            descriptor = owned.take()
            try:
                self._memory = GuestMemory(descriptor, message.size, message.regions)
            finally:
                os.close(descriptor)
        reply(MemoryMapped())

    def _attach(self, message: Attach, reply: Reply) -> None:
        faults.visit("device.attach")
        descriptors = self._device_descriptors(message.device)
        files = self._files(message.device, message.files)
        if message.device in self._devices or self._tightened:
            raise ChannelError("a device comes twice, or too late")
        device = kinds.make(message, files, self._boot_id)
        attached = AttachedDevice(message.device, device, descriptors, self.events, self._send)
        self._devices[message.device] = attached
        reply(Attached(device.features(), device.queue_sizes, device.config()))

    def _device_descriptors(self, device: int) -> DeviceDescriptors:
        try:
            envelope, owned = self._descriptors.receive(MAX_QUEUES + 2)
        except BlockingIOError:
            raise ChannelError("the descriptors of a device did not come ahead of it") from None
        announced = envelope.message if envelope is not None else None
        with owned:
            if not isinstance(announced, DeviceEvents) or announced.device != device:
                raise ChannelError("other descriptors came than those of the device")
            interrupt = owned.take()
            in_flight = owned.take() if announced.in_flight else -1
            return DeviceDescriptors(interrupt, [owned.take() for _ in range(announced.queues)], in_flight)

    def _files(self, device: int, count: int) -> list[int]:
        if not count:
            return []
        assert count <= MAX_FILES
        owned = self._take(DeviceFiles(device, count), count)
        return [owned.take() for _ in range(count)]

    def _tighten(self, message: Tighten, reply: Reply) -> None:
        if not self._tightened:
            self._tightened = True
            self._seal.tighten()
        reply(Tightened())

    # ------------------------------------------------------------ the life of a device

    def _device(self, number: int) -> AttachedDevice:
        device = self._devices.get(number)
        if device is None:
            raise ChannelError(f"there is no device {number} in this cell")
        return device

    def _activate(self, message: Activate, reply: Reply) -> None:
        faults.visit("device.activate")
        if not self._verified:
            if not self._tightened:
                raise ChannelError("a device is to be activated before the walls are closed")
            self._seal.await_tightened()
            self._verified = True
        device = self._device(message.device)
        if self._memory is None or len(message.queues) != len(device.device.queue_sizes) or device.active:
            raise ChannelError("a device is to be activated that has no memory, other queues, or is active")
        reply(Activated(device.activate(message, self._memory)))

    def _stop(self, message: Stop, reply: Reply) -> None:
        faults.visit("device.stop")
        device = self._device(message.device)

        def stopped() -> None:
            reply(Stopped(device.stopped(), kinds.state_of(device.device)))

        begun = device.stop()
        if begun is None or begun.done:
            stopped()
        else:
            begun.then(stopped)

    def _reset(self, message: Reset, reply: Reply) -> None:
        device = self._device(message.device)
        device.reset()
        reply(ResetDone(device.device.config()))

    def _write_config(self, message: WriteConfig, reply: Reply) -> None:
        device = self._device(message.device).device
        device.write_config(message.offset, message.data)
        reply(ConfigWritten(device.config()))

    def _update_limiter(self, message: UpdateLimiter, reply: Reply) -> None:
        device = self._device(message.device).device
        buckets = [None if each is None else Bucket(*each) for each in (message.bandwidth, message.ops)]
        device.update_limiter(*buckets)
        reply(Updated(device.config()))

    def _update_files(self, message: UpdateFiles, reply: Reply) -> None:
        files = self._files(message.device, message.files)
        device = self._device(message.device).device
        begun = device.update_files(files)

        def updated() -> None:
            reply(Updated(device.config()))

        if begun is None or begun.done:
            updated()
        else:
            begun.then(updated)

    def _read_state(self, message: ReadState, reply: Reply) -> None:
        reply(StateRead(kinds.state_of(self._device(message.device).device)))

    def _collect(self, message: Collect, reply: Reply) -> None:
        counters = self._device(message.device).device.collect()
        aggregates = [
            Latencies(each.minimum, each.maximum, each.total, each.count) for each in counters.aggregates.values()
        ]
        reply(Collected(tuple(counters.values.values()), tuple(aggregates)))

    def _config_taken(self, message: ConfigTaken, reply: Reply) -> None:
        reply(Noted())
        self._device(message.device).config_taken()

    def _ping(self, message: Ping, reply: Reply) -> None:
        reply(Pong(sum(each.active for each in self._devices.values())))

    def _finish(self, message: Finish, reply: Reply) -> None:
        faults.visit("device.finish")
        reply(Finished())
        self.code = OK


def serve(control: Control, descriptor_socket: int) -> int:
    """Serve until the end; return the exit code of the process. Raises IpcError when the channel fails."""
    watch = _ControllerGone(control, descriptor_socket)
    control.events.add_subscriber(watch)
    control.events.add_subscriber(control)
    run = control.events.run
    while control.code is None:
        run()
    return control.code


class _ControllerGone:
    """Ends the cell when the other end of its descriptor channel is closed."""

    def __init__(self, control: Control, descriptor: int) -> None:
        self._control = control
        self._descriptor = descriptor

    def init(self, ops: EventOps) -> None:
        """Subscriber: only the end is watched for; what is to be read belongs to a command."""
        ops.add(self._descriptor, READ_HANG_UP)

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: it is closed."""
        self._control.code = GENERIC_ERROR
