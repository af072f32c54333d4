"""How a drive is configured, and what its driver is offered for it: known before there is an engine, or a cell."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.schema import U64, Flag, Int, RecordOf, Section, Text
from virtio.abi import (
    SECTOR_SHIFT,
    VIRTIO_BLK_CONFIG,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
)
from virtio.polling import DEFAULT_LOOK_NS
from virtio.rate_limiter import RATE_LIMITER_STATE, Bucket, RateLimiterState

QUEUE_SIZE = 256
#: Buffers of data in a request: with header and status they are within what a chain may have.
SEG_MAX = QUEUE_SIZE - 2
MAX_QUEUES = 16
#: What one DISCARD may name; the rest of a large one comes in further requests.
MAX_DISCARD_SECTORS = (1 << 30) >> SECTOR_SHIFT
#: What one WRITE_ZEROES may name: where the file system cannot do it, so much is written while the loop waits.
MAX_WRITE_ZEROES_SECTORS = (4 << 20) >> SECTOR_SHIFT
#: Segments in one of these requests.
MAX_SEGMENTS = 1
#: Characters of a device's id.
MAX_ID = 255
#: docs/formats/metrics.md
BLOCK_COUNTERS = (
    "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count flush_count "
    "queue_event_count rate_limiter_event_count update_count update_fails read_bytes write_bytes read_count "
    "write_count rate_limiter_throttled_events io_engine_throttled_events remaining_reqs_count ~read_agg ~write_agg"
)
#: Nobody looks at a ring for longer (ns).
_MAX_LOOK_NS = 1_000_000_000


class BlockSettings(NamedTuple):
    """What does not change. ``writeback``: the cache type Writeback, else Unsafe; ``look_ns``: virtio.polling."""

    read_only: bool = False
    writeback: bool = False
    discard: bool = False
    queues: int = 1
    look_ns: int = DEFAULT_LOOK_NS


class BlockConfiguration(NamedTuple):
    """What a drive is made of beside its file. ``io_engine``: Sync or Async; a bucket of size 0 limits nothing."""

    id: str
    io_engine: str
    settings: BlockSettings
    bandwidth: Bucket
    ops: Bucket


class BlockState(NamedTuple):
    """What a block device has beside its queues: the size that the driver was told, and the limiter."""

    sectors: int
    limiter: RateLimiterState


BUCKET = RecordOf(Bucket, size=Int(U64), refill_time=Int(U64), one_time_burst=Int(U64))
BLOCK_SETTINGS = RecordOf(
    BlockSettings,
    read_only=Flag(),
    writeback=Flag(),
    discard=Flag(),
    queues=Int(MAX_QUEUES, 1),
    look_ns=Int(_MAX_LOOK_NS),
)
BLOCK_CONFIGURATION = RecordOf(
    BlockConfiguration, id=Text(MAX_ID), io_engine=Text(8), settings=BLOCK_SETTINGS, bandwidth=BUCKET, ops=BUCKET
)
BLOCK_SECTION = Section(
    "virtio-block", 1, RecordOf(BlockState, sectors=Int(U64 >> SECTOR_SHIFT), limiter=RATE_LIMITER_STATE)
)


def block_queue_sizes(settings: BlockSettings) -> tuple[int, ...]:
    """Return the largest size of each queue."""
    assert 0 < settings.queues <= MAX_QUEUES
    return (QUEUE_SIZE,) * settings.queues


def block_features(settings: BlockSettings) -> int:
    """Return what the driver is offered."""
    offered = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC | VIRTIO_BLK_F_SEG_MAX
    if settings.read_only:
        offered |= VIRTIO_BLK_F_RO
    if settings.writeback:
        offered |= VIRTIO_BLK_F_FLUSH
    if settings.discard and not settings.read_only:
        offered |= VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES
    if settings.queues > 1:
        offered |= VIRTIO_BLK_F_MQ
    return offered


def block_config(settings: BlockSettings, sectors: int) -> bytes:
    """Return struct virtio_blk_config of a drive of so many sectors; what belongs to no offered feature is 0."""
    queues = settings.queues
    zeroes = [0] * 6
    if settings.discard and not settings.read_only:
        zeroes = [MAX_DISCARD_SECTORS, MAX_SEGMENTS, 1, MAX_WRITE_ZEROES_SECTORS, MAX_SEGMENTS, 1]
    return VIRTIO_BLK_CONFIG.pack(sectors, 0, SEG_MAX, *[0] * 10, queues if queues > 1 else 0, *zeroes)
