"""Controller ↔ device cell: what its devices are, what their drivers said, and what only the controller may change.

Kicks and interrupts are eventfds that both ends of them have: no message of these is needed for a request of a guest.
``DEVICE`` travels over ZeroMQ, ``DEVICE_DESCRIPTORS`` over the inherited socket pair, ahead of the command that needs
what it brings. What differs from kind to kind (settings, state) is packed by a record that stands beside the device.
"""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.launch_plan import MAX_DEVICES, MAX_MEMORY_BYTES
from ipc.messages.records import CODE_FIELD, TEXT_FIELD, Failed, MemoryRegion
from ipc.schema import U16, U32, U64, Bytes, Flag, Int, ListOf, Maybe, RecordOf, Schema, Text

DEVICE = Schema()
DEVICE_DESCRIPTORS = Schema()

#: Queues that a device may have; more eventfds than this do not fit into one message.
MAX_QUEUES = 32
MAX_QUEUE_SIZE = 1 << 15
#: RAM has as many regions as the layout has holes, and some.
MAX_REGIONS = 16
#: Bytes of settings, and of state, that a device may have (a section of its kind).
MAX_RECORD = 4096
#: Bytes of a configuration space; of a write to it.
MAX_CONFIG = 1024
MAX_CONFIG_WRITE = 8
#: Files that stand behind one device: a drive with an overlay has three.
MAX_FILES = 4
MAX_COUNTERS = 64
#: Characters of a device's id.
MAX_ID = 255
#: What a driver is told of a device that cannot go on is for the log.
MAX_REASON = 256


class DeviceQueue(NamedTuple):
    """A queue in use (virtio.queue.QueueState): guest addresses, and where both sides stand."""

    size: int
    descriptor_table: int
    available_ring: int
    used_ring: int
    next_available: int
    next_used: int


class QueuePosition(NamedTuple):
    """Where a queue stands that was stopped."""

    next_available: int
    next_used: int


class Tokens(NamedTuple):
    """A token bucket (virtio.rate_limiter.Bucket): ``refill_time`` in ms."""

    size: int
    refill_time: int
    one_time_burst: int


class Latencies(NamedTuple):
    """An aggregate (base.counters.Aggregate), in µs."""

    minimum: int
    maximum: int
    total: int
    samples: int


class Hello(NamedTuple):
    """Cell → controller, its first message. ``cell`` is its number among the device cells."""

    cell: int
    pid: int


class Welcome(NamedTuple):
    """Controller → cell: the answer to Hello; the endpoint's path is gone now."""


class MapGuestMemory(NamedTuple):
    """Map the guest memory whose memfd was sent (GuestMemoryFile). Once."""

    size: int
    regions: tuple[MemoryRegion, ...]


class MemoryMapped(NamedTuple):
    """The guest memory is mapped."""


class Attach(NamedTuple):
    """Make a device, whose eventfds were sent (DeviceEvents) and its files, too (DeviceFiles).

    ``device_type`` is VIRTIO_ID_*; ``state`` is what another cell has saved of this device, or is empty.
    """

    device: int
    device_type: int
    id: str
    settings: bytes
    state: bytes
    files: int


class Attached(NamedTuple):
    """The device is made, and offers this."""

    features: int
    queue_sizes: tuple[int, ...]
    config: bytes


class Tighten(NamedTuple):
    """All devices are attached: close the walls of the running stage."""


class Tightened(NamedTuple):
    """They are closed."""


class Activate(NamedTuple):
    """Begin, or go on. A queue is None where the driver has not made it ready.

    ``recover``: another cell has ended while it served these queues: where they stand is in guest memory, and what it
    had begun is in the table of heads in flight (virtio.in_flight).
    """

    device: int
    features: int
    queues: tuple[DeviceQueue | None, ...]
    recover: bool


class Activated(NamedTuple):
    """The device serves its queues. ``again``: so many chains that another cell had begun are served once more."""

    again: int


class Stop(NamedTuple):
    """Begin nothing any more, and answer when nothing is in flight. Harmless twice."""

    device: int


class Stopped(NamedTuple):
    """Nothing is in flight; ``queues`` as in Activate, nothing if the device was stopped before."""

    queues: tuple[QueuePosition | None, ...]
    state: bytes


class Reset(NamedTuple):
    """Forget what the driver has said. While stopped."""

    device: int


class ResetDone(NamedTuple):
    """It is forgotten; the configuration space as it is now."""

    config: bytes


class WriteConfig(NamedTuple):
    """The driver has written to the configuration space."""

    device: int
    offset: int
    data: bytes


class ConfigWritten(NamedTuple):
    """The whole configuration space as it is now."""

    config: bytes


class UpdateLimiter(NamedTuple):
    """Replace the buckets that are given."""

    device: int
    bandwidth: Tokens | None
    ops: Tokens | None


class UpdateFiles(NamedTuple):
    """Serve from these files, which were sent (DeviceFiles), instead; none: the size of the old one has changed."""

    device: int
    files: int


class Updated(NamedTuple):
    """The change is in force; the configuration space as it is now."""

    config: bytes


class ReadState(NamedTuple):
    """Say what the device has to save. While stopped."""

    device: int


class StateRead(NamedTuple):
    """A record of the section of the device's kind, packed."""

    state: bytes


class Collect(NamedTuple):
    """Say what the device has counted so far."""

    device: int


class Collected(NamedTuple):
    """In the order in which the device's kind declares its counters."""

    values: tuple[int, ...]
    aggregates: tuple[Latencies, ...]


class ConfigChanged(NamedTuple):
    """Cell → controller: the configuration space has changed. The next one comes after ConfigTaken, and is the last."""

    device: int
    config: bytes


class ConfigTaken(NamedTuple):
    """Controller → cell: the change has reached the driver."""

    device: int


class NeedsReset(NamedTuple):
    """Cell → controller: the device cannot go on. At most once for each Activate."""

    device: int
    reason: str


class Noted(NamedTuple):
    """The answer to what needs none."""


class Ping(NamedTuple):
    """Give a sign of life."""


class Pong(NamedTuple):
    """The sign: how many devices are active."""

    active: int


class Finish(NamedTuple):
    """End, in order."""


class Finished(NamedTuple):
    """Nothing of a queue is touched any more."""


class GuestMemoryFile(NamedTuple):
    """With one descriptor: the guest memory memfd of ``size`` bytes."""

    size: int


class DeviceEvents(NamedTuple):
    """With the interrupt eventfd, the memfd of the table of heads in flight if ``in_flight``, a kick for each queue."""

    device: int
    queues: int
    in_flight: bool


class DeviceFiles(NamedTuple):
    """With this many descriptors: the files that stand behind a device, in the order that its kind knows."""

    device: int
    files: int


CELL_FIELD = Int(MAX_DEVICES - 1)
_DEVICE = Int(MAX_DEVICES - 1)
_CONFIG = Bytes(MAX_CONFIG)
_STATE = Bytes(MAX_RECORD)
_QUEUE = RecordOf(
    DeviceQueue,
    size=Int(MAX_QUEUE_SIZE, 1),
    descriptor_table=Int(U64),
    available_ring=Int(U64),
    used_ring=Int(U64),
    next_available=Int(U16),
    next_used=Int(U16),
)
_POSITION = RecordOf(QueuePosition, next_available=Int(U16), next_used=Int(U16))
_TOKENS = RecordOf(Tokens, size=Int(U64), refill_time=Int(U64), one_time_burst=Int(U64))
_REGION = RecordOf(MemoryRegion, guest_address=Int(U64), size=Int(MAX_MEMORY_BYTES, 1), offset=Int(MAX_MEMORY_BYTES))
_LATENCIES = RecordOf(Latencies, minimum=Int(U64), maximum=Int(U64), total=Int(U64), samples=Int(U64))

DEVICE.register(1, Failed, code=CODE_FIELD, text=TEXT_FIELD)
DEVICE.register(2, Hello, cell=CELL_FIELD, pid=Int(U32, 1))
DEVICE.register(3, Welcome)
DEVICE.register(4, MapGuestMemory, size=Int(MAX_MEMORY_BYTES, 1), regions=ListOf(_REGION, MAX_REGIONS))
DEVICE.register(5, MemoryMapped)
DEVICE.register(
    6,
    Attach,
    device=_DEVICE,
    device_type=Int(U16),
    id=Text(MAX_ID),
    settings=_STATE,
    state=_STATE,
    files=Int(MAX_FILES),
)
DEVICE.register(7, Attached, features=Int(U64), queue_sizes=ListOf(Int(MAX_QUEUE_SIZE, 1), MAX_QUEUES), config=_CONFIG)
DEVICE.register(8, Tighten)
DEVICE.register(9, Tightened)
DEVICE.register(
    10, Activate, device=_DEVICE, features=Int(U64), queues=ListOf(Maybe(_QUEUE), MAX_QUEUES), recover=Flag()
)
DEVICE.register(11, Activated, again=Int(U32))
DEVICE.register(12, Stop, device=_DEVICE)
DEVICE.register(13, Stopped, queues=ListOf(Maybe(_POSITION), MAX_QUEUES), state=_STATE)
DEVICE.register(14, Reset, device=_DEVICE)
DEVICE.register(15, ResetDone, config=_CONFIG)
DEVICE.register(16, WriteConfig, device=_DEVICE, offset=Int(MAX_CONFIG), data=Bytes(MAX_CONFIG_WRITE))
DEVICE.register(17, ConfigWritten, config=_CONFIG)
DEVICE.register(18, UpdateLimiter, device=_DEVICE, bandwidth=Maybe(_TOKENS), ops=Maybe(_TOKENS))
DEVICE.register(19, UpdateFiles, device=_DEVICE, files=Int(MAX_FILES))
DEVICE.register(20, Updated, config=_CONFIG)
DEVICE.register(21, ReadState, device=_DEVICE)
DEVICE.register(22, StateRead, state=_STATE)
DEVICE.register(23, Collect, device=_DEVICE)
DEVICE.register(24, Collected, values=ListOf(Int(U64), MAX_COUNTERS), aggregates=ListOf(_LATENCIES, MAX_COUNTERS))
DEVICE.register(25, ConfigChanged, device=_DEVICE, config=_CONFIG)
DEVICE.register(26, ConfigTaken, device=_DEVICE)
DEVICE.register(27, NeedsReset, device=_DEVICE, reason=Text(MAX_REASON))
DEVICE.register(28, Noted)
DEVICE.register(29, Ping)
DEVICE.register(30, Pong, active=Int(MAX_DEVICES))
DEVICE.register(31, Finish)
DEVICE.register(32, Finished)
DEVICE_DESCRIPTORS.register(1, GuestMemoryFile, size=Int(MAX_MEMORY_BYTES, 1))
DEVICE_DESCRIPTORS.register(2, DeviceEvents, device=_DEVICE, queues=Int(MAX_QUEUES), in_flight=Flag())
DEVICE_DESCRIPTORS.register(3, DeviceFiles, device=_DEVICE, files=Int(MAX_FILES))
