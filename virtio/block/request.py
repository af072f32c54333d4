"""A request of a block driver: parsed from a chain and checked. Sans-IO (virtio 1.2, 5.2.6)."""

from __future__ import annotations

from base.lean_typing import NamedTuple, Sequence
from virtio.abi import (
    SECTOR_SHIFT,
    SECTOR_SIZE,
    VIRTIO_BLK_ID_SIZE,
    VIRTIO_BLK_REQ,
    VIRTIO_BLK_REQ_SIZE,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_SEGMENT,
    VIRTIO_BLK_SEGMENT_F_UNMAP,
    VIRTIO_BLK_SEGMENT_SIZE,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)
from virtio.block.configuration import MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS
from virtio.block.engine import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, WRITE_ZEROES_UNMAP, IoRequest
from virtio.errors import RequestError
from virtio.queue import Chain

Parts = list[tuple[int, int]]


class Limits(NamedTuple):
    """What requests are checked against: the size of the drive, and what was negotiated."""

    sectors: int
    read_only: bool
    discard: bool = False
    write_zeroes: bool = False


class BlockRequest:
    """A request: ``data`` are (offset into guest memory, length), to be written by the device for IN and GET_ID.

    ``status`` is the offset of the status byte; ``written`` what the used ring is told: everything up to that byte.
    """

    __slots__ = ("begun_ns", "chain", "data", "queue", "sector", "size", "status", "type", "written")

    def __init__(self, chain: Chain, queue: int, type: int, sector: int) -> None:
        self.chain = chain
        self.queue = queue
        self.type = type
        self.sector = sector
        self.status = self.written = self.size = self.begun_ns = 0
        self.data: Parts = []

    @property
    def transferred(self) -> int:
        """Return how many bytes of data it moves, for a rate limiter."""
        return self.size if self.type in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT) else 0


def parse(chain: Chain, view: memoryview, queue: int) -> BlockRequest:
    """Return the request of a chain, framed in any way.

    Raises RequestError if there is no whole header, or no room for a status: that cannot even be answered.
    """
    readable, writable = chain.readable, chain.writable
    if readable and readable[0][1] >= VIRTIO_BLK_REQ_SIZE:
        offset, length = readable[0]
        header: bytes | memoryview = view[offset : offset + VIRTIO_BLK_REQ_SIZE]
        rest = readable[1:]
        if length > VIRTIO_BLK_REQ_SIZE:
            rest.insert(0, (offset + VIRTIO_BLK_REQ_SIZE, length - VIRTIO_BLK_REQ_SIZE))
    else:
        header = take(readable, view, VIRTIO_BLK_REQ_SIZE)
        rest = without_front(readable, VIRTIO_BLK_REQ_SIZE)
    if len(header) < VIRTIO_BLK_REQ_SIZE:
        raise RequestError(f"a block request with {len(header)} bytes of a header")
    if not writable:
        raise RequestError("a block request without room for its status")
    type, _, sector = VIRTIO_BLK_REQ.unpack(header)
    offset, length = writable[-1]
    if length > 1:
        room = [*writable[:-1], (offset, length - 1)]
    else:
        room = writable[:-1]
    room_size = sum([each for _, each in room])
    request = BlockRequest(chain, queue, type, sector)
    request.status = offset + length - 1
    request.written = room_size + 1
    if type in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_GET_ID):
        request.data, request.size = room, room_size
    else:
        request.data, request.size = rest, sum([each for _, each in rest])
    return request


def plan(request: BlockRequest, view: memoryview, limits: Limits) -> IoRequest | int:
    """Return what an engine is to do, or the status of a request that is not to be done at all."""
    type = request.type
    if type in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT):
        size, sector = request.size, request.sector
        if size % SECTOR_SIZE or sector + (size >> SECTOR_SHIFT) > limits.sectors:
            return VIRTIO_BLK_S_IOERR
        if type == VIRTIO_BLK_T_OUT and limits.read_only:
            return VIRTIO_BLK_S_IOERR
        kind = READ if type == VIRTIO_BLK_T_IN else WRITE
        return IoRequest(kind, sector << SECTOR_SHIFT, size, request.data, request)
    if type == VIRTIO_BLK_T_FLUSH:
        return IoRequest(FLUSH, 0, 0, [], request)
    if (type == VIRTIO_BLK_T_DISCARD and limits.discard) or (type == VIRTIO_BLK_T_WRITE_ZEROES and limits.write_zeroes):
        return _plan_segment(request, view, limits)
    return VIRTIO_BLK_S_UNSUPP


def _plan_segment(request: BlockRequest, view: memoryview, limits: Limits) -> IoRequest | int:
    """The request names what it is about in a segment of its data."""
    if request.size != VIRTIO_BLK_SEGMENT_SIZE or limits.read_only:
        return VIRTIO_BLK_S_IOERR
    sector, count, flags = VIRTIO_BLK_SEGMENT.unpack(take(request.data, view, VIRTIO_BLK_SEGMENT_SIZE))
    is_discard = request.type == VIRTIO_BLK_T_DISCARD
    if flags & ~VIRTIO_BLK_SEGMENT_F_UNMAP or (is_discard and flags):
        return VIRTIO_BLK_S_UNSUPP
    if count > (MAX_DISCARD_SECTORS if is_discard else MAX_WRITE_ZEROES_SECTORS) or sector + count > limits.sectors:
        return VIRTIO_BLK_S_IOERR
    kind = DISCARD if is_discard else WRITE_ZEROES_UNMAP if flags & VIRTIO_BLK_SEGMENT_F_UNMAP else WRITE_ZEROES
    return IoRequest(kind, sector << SECTOR_SHIFT, count << SECTOR_SHIFT, [], request)


def answer_identity(request: BlockRequest, view: memoryview, identity: bytes) -> bool:
    """Write the answer to GET_ID; False if there is no room for it."""
    if request.size < VIRTIO_BLK_ID_SIZE:
        return False
    done = 0
    for offset, length in request.data:
        part = identity[done : done + length]
        view[offset : offset + len(part)] = part
        done += len(part)
    return True


def take(parts: Sequence[tuple[int, int]], view: memoryview, count: int) -> bytes:
    """Copy the first ``count`` bytes of some parts of guest memory; fewer if there are fewer."""
    taken = b""
    for offset, length in parts:
        taken += bytes(view[offset : offset + min(length, count - len(taken))])
        if len(taken) == count:
            break
    return taken


def without_front(parts: Sequence[tuple[int, int]], count: int) -> Parts:
    """Return what is left of some parts behind their first ``count`` bytes."""
    left: Parts = []
    for offset, length in parts:
        skipped = min(length, count)
        count -= skipped
        if length > skipped:
            left.append((offset + skipped, length - skipped))
    return left
