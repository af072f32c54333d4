"""Messages of vhost-user, as a front end sends and receives them. Sans-IO.

The protocol is QEMU's, its page "Vhost-user Protocol" among those on interoperability; names are that page's. The back
end is not trusted: whatever it says is bounded, and anything else is a VhostUserError.
"""

from __future__ import annotations

from _struct import Struct

from base.lean_typing import NamedTuple, Sequence
from ipc.messages.records import MemoryRegion
from virtio.errors import VhostUserError

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
SET_VRING_ENABLE = 18
GET_CONFIG = 24
GET_INFLIGHT_FD = 31
SET_INFLIGHT_FD = 32

#: A bit of the features of virtio that is about the connection, and never offered to a driver.
F_PROTOCOL_FEATURES = 1 << 30
PROTOCOL_F_REPLY_ACK = 1 << 3
PROTOCOL_F_CONFIG = 1 << 9
PROTOCOL_F_INFLIGHT_SHMFD = 1 << 12

_VERSION = 1
_VERSION_MASK = 3
_REPLY = 1 << 2
_NEED_REPLY = 1 << 3

_HEADER = Struct("<III")
HEADER_SIZE = 12
#: No reply to what is asked here is longer.
MAX_PAYLOAD = 512
#: VIRTIO's block configuration, as much of it as a driver may know.
MAX_CONFIG = 256
#: Regions of a memory table without further negotiation (VHOST_MEMORY_BASELINE_NREGIONS).
MAX_REGIONS = 8
#: An in-flight region has 16 bytes per descriptor of each queue, and some per queue.
MAX_INFLIGHT_SIZE = 1 << 24
#: Bits of what SET_VRING_KICK and SET_VRING_CALL carry: the queue.
_QUEUE_MASK = 0xFF

_U64 = Struct("<Q")
_STATE = Struct("<II")
_ADDRESSES = Struct("<IIQQQQ")
_CONFIG = Struct("<III")
_INFLIGHT = Struct("<QQHH4x")
_TABLE = Struct("<II")
_REGION = Struct("<QQQQ")
assert _HEADER.size == HEADER_SIZE
assert _ADDRESSES.size == 40
assert _INFLIGHT.size == 24
assert _CONFIG.size == 12
assert _REGION.size == 32


class Message(NamedTuple):
    """``fds`` go with it. It is answered by a payload of its own (``replies``) or by a number (``acknowledged``)."""

    request: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    replies: bool = False
    acknowledged: bool = False


class Inflight(NamedTuple):
    """Where the table of requests in flight is, in a file that the back end makes and the front end keeps."""

    size: int
    offset: int
    queues: int
    queue_size: int


def pack(message: Message) -> bytes:
    """Return the bytes of a message."""
    flags = _VERSION | (_NEED_REPLY if message.acknowledged else 0)
    return _HEADER.pack(message.request, flags, len(message.payload)) + message.payload


def parse_header(data: bytes, request: int) -> int:
    """Return the length of the payload of a reply to a request. Raises VhostUserError."""
    if len(data) != HEADER_SIZE:
        raise VhostUserError("a header that is cut off")
    found, flags, size = _HEADER.unpack(data)
    if flags & _VERSION_MASK != _VERSION or not flags & _REPLY:
        raise VhostUserError(f"flags {flags:#x} where a reply of version 1 was expected")
    if found != request:
        raise VhostUserError(f"a reply to request {found} instead of {request}")
    if size > MAX_PAYLOAD:
        raise VhostUserError(f"a reply of {size} bytes")
    return int(size)


def parse_u64(payload: bytes) -> int:
    """Return the number that a reply is. Raises VhostUserError."""
    if len(payload) != _U64.size:
        raise VhostUserError(f"{len(payload)} bytes instead of a number of 64 bits")
    return int(_U64.unpack(payload)[0])


def parse_base(payload: bytes, queue: int) -> int:
    """Return where a queue was stopped: the next entry of its available ring. Raises VhostUserError."""
    if len(payload) != _STATE.size:
        raise VhostUserError(f"{len(payload)} bytes instead of the state of a queue")
    index, base = _STATE.unpack(payload)
    if index != queue or base > 0xFFFF:
        raise VhostUserError(f"queue {index} at {base}, asked was for queue {queue}")
    return int(base)


def parse_config(payload: bytes, size: int) -> bytes:
    """Return the configuration space that a reply holds, ``size`` bytes. Raises VhostUserError."""
    if len(payload) != _CONFIG.size + size:
        # An empty one says that there is none.
        raise VhostUserError(f"{len(payload)} bytes where {size} bytes of configuration were asked for")
    offset, length, _ = _CONFIG.unpack_from(payload)
    if offset or length != size:
        raise VhostUserError(f"{length} bytes of configuration at {offset}, asked was for {size}")
    return payload[_CONFIG.size :]


def parse_inflight(payload: bytes, queues: int, queue_size: int) -> Inflight:
    """Return where the table of requests in flight is. Raises VhostUserError."""
    if len(payload) != _INFLIGHT.size:
        raise VhostUserError(f"{len(payload)} bytes instead of the place of an in-flight region")
    found = Inflight(*_INFLIGHT.unpack(payload))
    if not 0 < found.size <= MAX_INFLIGHT_SIZE or found.offset > MAX_INFLIGHT_SIZE:
        raise VhostUserError(f"an in-flight region of {found.size} bytes at {found.offset}")
    # Some back ends leave the last two as they were not asked for.
    return found._replace(queues=queues, queue_size=queue_size)


def ask(request: int) -> Message:
    """Return a message without a payload that is answered."""
    return Message(request, replies=True)


def u64(request: int, value: int, *, acknowledged: bool = False) -> Message:
    """Return a message that carries a number."""
    return Message(request, _U64.pack(value), acknowledged=acknowledged)


def vring(request: int, queue: int, value: int, *, acknowledged: bool = False) -> Message:
    """Return a message that sets a number of a queue."""
    return Message(request, _STATE.pack(queue, value), acknowledged=acknowledged)


def get_vring_base(queue: int) -> Message:
    """Return what stops a queue and asks where."""
    return Message(GET_VRING_BASE, _STATE.pack(queue, 0), replies=True)


def vring_addresses(queue: int, descriptor_table: int, used_ring: int, available_ring: int) -> Message:
    """Return what says where the parts of a queue are; guest addresses serve as those of the front end's process."""
    return Message(SET_VRING_ADDR, _ADDRESSES.pack(queue, 0, descriptor_table, used_ring, available_ring, 0))


def vring_fd(request: int, queue: int, fd: int) -> Message:
    """Return what hands an eventfd over."""
    assert queue <= _QUEUE_MASK
    return Message(request, _U64.pack(queue), (fd,))


def get_config(size: int) -> Message:
    """Return what asks for the first ``size`` bytes of the configuration space."""
    assert size <= MAX_CONFIG
    return Message(GET_CONFIG, _CONFIG.pack(0, size, 0) + bytes(size), replies=True)


def memory_table(regions: Sequence[MemoryRegion], fd: int) -> Message:
    """Return what hands guest memory over. Addresses of the front end's process are guest addresses: any will do."""
    if not 0 < len(regions) <= MAX_REGIONS:
        raise VhostUserError(f"guest memory in {len(regions)} regions; a back end takes {MAX_REGIONS}")
    table = _TABLE.pack(len(regions), 0) + b"".join(
        [_REGION.pack(start, size, start, offset) for start, size, offset in regions]
    )
    return Message(SET_MEM_TABLE, table, (fd,) * len(regions))


def get_inflight(queues: int, queue_size: int) -> Message:
    """Return what asks for a new in-flight region."""
    return Message(GET_INFLIGHT_FD, _INFLIGHT.pack(0, 0, queues, queue_size), replies=True)


def set_inflight(inflight: Inflight, fd: int) -> Message:
    """Return what hands an in-flight region (back) to a back end."""
    return Message(SET_INFLIGHT_FD, _INFLIGHT.pack(*inflight), (fd,))
