"""The registers that every transport has, sans-IO: what the driver writes, what it reads, and what follows from it.

Virtio 1.2: 2.1 (device status), 2.2 (features), 3.1 (initialisation), 4.1.4.3 and 4.2.2 (registers of PCI and MMIO).
Rules beyond the specification are those that clients of Firecracker know: the status advances bit by bit, whatever
else is written changes nothing; a register can be written only in the step of the initialisation that it belongs to.
A transport is a map of addresses to these registers.
"""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.schema import U8, U16, U32, U64, Flag, Int, ListOf, RecordOf
from virtio.abi import (
    STATUS_ACKNOWLEDGE,
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    VIRTIO_F_VERSION_1,
)
from virtio.queue import QueueConfig

#: Queues that a device may have.
MAX_QUEUES = 64

# What the driver reads and writes. Where 32 bits are not enough there are two registers, the low half first.
DEVICE_FEATURES_SELECT = 0
DEVICE_FEATURES = 1  # read only
DRIVER_FEATURES_SELECT = 2
DRIVER_FEATURES = 3  # write only
QUEUE_SELECT = 4
QUEUE_SIZE_MAX = 5  # read only
QUEUE_SIZE = 6
QUEUE_READY = 7
QUEUE_DESCRIPTOR_TABLE_LOW = 8
QUEUE_DESCRIPTOR_TABLE_HIGH = 9
QUEUE_AVAILABLE_RING_LOW = 10
QUEUE_AVAILABLE_RING_HIGH = 11
QUEUE_USED_RING_LOW = 12
QUEUE_USED_RING_HIGH = 13
STATUS = 14
INTERRUPT_STATUS = 15  # read only
INTERRUPT_ACKNOWLEDGE = 16  # write only
CONFIG_GENERATION = 17  # read only
REGISTER_COUNT = 18

# Interrupt status: 4.2.2.
INTERRUPT_USED_BUFFER = 1
INTERRUPT_CONFIGURATION_CHANGE = 2

# What follows from a write.
NOTHING = 0
#: DRIVER_OK was set: make the queues, activate the device.
ACTIVATE = 1
#: 0 was written to the status: stop the device, and then :meth:`Registers.reset`.
RESET = 2

#: The status → the bit that may be set next, and no other.
NEXT_STATUS = {
    0: STATUS_ACKNOWLEDGE,
    STATUS_ACKNOWLEDGE: STATUS_DRIVER,
    STATUS_ACKNOWLEDGE | STATUS_DRIVER: STATUS_FEATURES_OK,
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK: STATUS_DRIVER_OK,
}

#: Register → the attribute of QueueConfig, and the bits that it shifts to.
_ADDRESSES = {
    QUEUE_DESCRIPTOR_TABLE_LOW: ("descriptor_table", 0),
    QUEUE_DESCRIPTOR_TABLE_HIGH: ("descriptor_table", 32),
    QUEUE_AVAILABLE_RING_LOW: ("available_ring", 0),
    QUEUE_AVAILABLE_RING_HIGH: ("available_ring", 32),
    QUEUE_USED_RING_LOW: ("used_ring", 0),
    QUEUE_USED_RING_HIGH: ("used_ring", 32),
}
_OF_QUEUES = frozenset((QUEUE_SIZE, QUEUE_READY, *_ADDRESSES))


class QueueRegisters(NamedTuple):
    """What the driver has said of a queue; ``next_available`` and ``next_used`` are those of a queue in use."""

    size: int
    ready: bool
    descriptor_table: int
    available_ring: int
    used_ring: int
    next_available: int
    next_used: int


class RegistersState(NamedTuple):
    """All that a driver has written and not read out."""

    status: int
    device_features_select: int
    driver_features_select: int
    driver_features: int
    queue_select: int
    interrupt_status: int
    config_generation: int
    queues: tuple[QueueRegisters, ...]


REGISTERS_STATE = RecordOf(
    RegistersState,
    status=Int(U8),
    device_features_select=Int(U32),
    driver_features_select=Int(U32),
    driver_features=Int(U64),
    queue_select=Int(U32),
    interrupt_status=Int(INTERRUPT_USED_BUFFER | INTERRUPT_CONFIGURATION_CHANGE),
    config_generation=Int(U32),
    queues=ListOf(
        RecordOf(
            QueueRegisters,
            size=Int(U32),
            ready=Flag(),
            descriptor_table=Int(U64),
            available_ring=Int(U64),
            used_ring=Int(U64),
            next_available=Int(U16),
            next_used=Int(U16),
        ),
        MAX_QUEUES,
    ),
)


class Registers:
    """Those of one device, which offers ``features``, and whose queues have at most these sizes.

    The bit of the interrupt status for used buffers is set as long as the device is active, and cannot be
    acknowledged: whoever reads it looks at the queues, and nobody has to hear of acknowledgements of it
    (docs/adr/acknowledged-by-ioeventfd.md).
    """

    def __init__(self, features: int, queue_sizes: tuple[int, ...], state: RegistersState | None = None) -> None:
        assert len(queue_sizes) <= MAX_QUEUES
        self.features = features
        self._queue_sizes = queue_sizes
        self.config_generation = 0
        #: (next_available, next_used) of each queue: where it goes on when it is made anew.
        self.positions: list[tuple[int, int]]
        self.reset()
        if state is not None:
            self._restore(state)

    def reset(self) -> None:
        """Forget what the driver has said. The generation goes on: what was read before is out of date."""
        self.status = 0
        self.device_features_select = self.driver_features_select = 0
        self.driver_features = 0
        self.queue_select = 0
        self.interrupt_status = 0
        self.queues = [QueueConfig(size) for size in self._queue_sizes]
        self.ready = [False] * len(self.queues)
        self.positions = [(0, 0)] * len(self.queues)

    # ------------------------------------------------------------ the driver

    @property
    def active(self) -> bool:
        """Has the driver said DRIVER_OK?"""
        return bool(self.status & STATUS_DRIVER_OK)

    def read(self, register: int) -> int:
        """Return what the driver reads; 0 from what can only be written."""
        if register == DEVICE_FEATURES:
            return _half(self.features, self.device_features_select)
        if register == STATUS:
            return self.status
        if register == INTERRUPT_STATUS:
            return self.interrupt_status
        if register == CONFIG_GENERATION:
            return self.config_generation
        selected = self.queue_select
        if selected < len(self.queues):
            if register == QUEUE_SIZE_MAX:
                return self.queues[selected].max_size
            if register == QUEUE_READY:
                return int(self.ready[selected])
        return 0

    def write(self, register: int, value: int) -> int:
        """Take 32 bits from the driver; returns what follows."""
        if register == STATUS:
            return self._write_status(value)
        if register in _OF_QUEUES:
            self._write_queue(register, value)
        elif register == QUEUE_SELECT:
            self.queue_select = value
        elif register == DEVICE_FEATURES_SELECT:
            self.device_features_select = value
        elif register == DRIVER_FEATURES_SELECT:
            self.driver_features_select = value
        elif register == DRIVER_FEATURES:
            self._write_driver_features(value)
        elif register == INTERRUPT_ACKNOWLEDGE and self.active:
            self.interrupt_status &= ~(value & INTERRUPT_CONFIGURATION_CHANGE)
        return NOTHING

    def takes_config(self) -> bool:
        """May the driver write to the configuration space?"""
        return self._in(STATUS_DRIVER, STATUS_FAILED | STATUS_DEVICE_NEEDS_RESET)

    def _in(self, required: int, excluded: int) -> bool:
        return self.status & (required | excluded) == required

    def _write_status(self, value: int) -> int:
        if value == 0:
            return RESET
        new = value & ~self.status
        if value & STATUS_FAILED:
            self.status |= STATUS_FAILED
        elif new and new == NEXT_STATUS.get(self.status):
            if new == STATUS_FEATURES_OK and not self._features_are_fine():
                return NOTHING  # the driver finds the bit unset, and gives up: 3.1.1, 6
            self.status |= new
            if new == STATUS_DRIVER_OK:
                self.interrupt_status |= INTERRUPT_USED_BUFFER
                return ACTIVATE
        return NOTHING

    def _features_are_fine(self) -> bool:
        return not self.driver_features & ~self.features and bool(self.driver_features & VIRTIO_F_VERSION_1)

    def _write_driver_features(self, value: int) -> None:
        excluded = STATUS_FEATURES_OK | STATUS_FAILED | STATUS_DEVICE_NEEDS_RESET
        if self._in(STATUS_DRIVER, excluded) and self.driver_features_select < 2:
            self.driver_features = _with_half(self.driver_features, self.driver_features_select, value)

    def _write_queue(self, register: int, value: int) -> None:
        selected = self.queue_select
        if not self._in(STATUS_FEATURES_OK, STATUS_DRIVER_OK | STATUS_FAILED) or selected >= len(self.queues):
            return
        if register == QUEUE_READY:
            self.ready[selected] = value == 1
        elif register == QUEUE_SIZE:
            self.queues[selected].size = value
        else:
            name, shift = _ADDRESSES[register]
            address = getattr(self.queues[selected], name)
            setattr(self.queues[selected], name, _with_half(address, shift >> 5, value))

    # ------------------------------------------------------------ the device

    def config_changed(self) -> bool:
        """The configuration space has another content; returns whether the driver is to be interrupted now.

        Before DRIVER_OK nobody is: then the bit waits for it.
        """
        self.interrupt_status |= INTERRUPT_CONFIGURATION_CHANGE
        return self.active

    def next_generation(self) -> None:
        """The configuration space is about to change, or has just."""
        self.config_generation = self.config_generation + 1 & U32

    def needs_reset(self) -> bool:
        """The device cannot go on; returns whether that is new. The driver is interrupted as :meth:`config_changed`."""
        if self.status & STATUS_DEVICE_NEEDS_RESET:
            return False
        self.status |= STATUS_DEVICE_NEEDS_RESET
        if self.active:
            self.interrupt_status |= INTERRUPT_CONFIGURATION_CHANGE
        return True

    def failed(self) -> None:
        """A reset was asked for and is not possible: that it did not become 0 tells the driver."""
        self.status |= STATUS_FAILED

    # ------------------------------------------------------------ state

    def save(self) -> RegistersState:
        """Return what the constructor makes these of."""
        return RegistersState(
            self.status,
            self.device_features_select,
            self.driver_features_select,
            self.driver_features,
            self.queue_select,
            self.interrupt_status,
            self.config_generation,
            tuple(
                [
                    QueueRegisters(
                        queue.size, ready, queue.descriptor_table, queue.available_ring, queue.used_ring, *positions
                    )
                    for queue, ready, positions in zip(self.queues, self.ready, self.positions, strict=True)
                ]
            ),
        )

    def _restore(self, state: RegistersState) -> None:
        self.status = state.status
        self.device_features_select = state.device_features_select
        self.driver_features_select = state.driver_features_select
        self.driver_features = state.driver_features
        self.queue_select = state.queue_select
        self.interrupt_status = state.interrupt_status
        self.config_generation = state.config_generation
        # As many as were saved: whether they are this device's is asked when they are made (transport.lifecycle).
        sizes = (*self._queue_sizes, *[0] * len(state.queues))[: len(state.queues)]
        self.queues = [QueueConfig(size) for size in sizes]
        for queue, saved in zip(self.queues, state.queues, strict=True):
            queue.size, queue.descriptor_table, queue.available_ring, queue.used_ring = saved.size, *saved[2:5]
        self.ready = [saved.ready for saved in state.queues]
        self.positions = [(saved.next_available, saved.next_used) for saved in state.queues]


def _half(value: int, number: int) -> int:
    """Return 32 of 64 bits, or 0 where there are none."""
    return value >> 32 * number & U32 if number < 2 else 0


def _with_half(value: int, number: int, half: int) -> int:
    """Return 64 bits with 32 of them replaced."""
    return value & ~(U32 << 32 * number) | half << 32 * number
