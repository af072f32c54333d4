"""Numbers and layouts of virtio 1.2 (OASIS, "Virtual I/O Device (VIRTIO) Version 1.2"), by the names it has for them.

Feature bits are masks of the 64-bit feature word, not bit numbers. All layouts are little-endian.
"""

from __future__ import annotations

from struct import Struct

# -- 5: device ids

VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
VIRTIO_ID_ENTROPY = 4
VIRTIO_ID_BALLOON = 5
VIRTIO_ID_VSOCK = 19
VIRTIO_ID_MEM = 24
VIRTIO_ID_PMEM = 27

# -- 2.1: device status

STATUS_ACKNOWLEDGE = 1
STATUS_DRIVER = 2
STATUS_DRIVER_OK = 4
STATUS_FEATURES_OK = 8
STATUS_DEVICE_NEEDS_RESET = 64
STATUS_FAILED = 128

# -- 6: reserved feature bits

VIRTIO_F_INDIRECT_DESC = 1 << 28
VIRTIO_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32
VIRTIO_F_IN_ORDER = 1 << 35

# -- 2.7: split virtqueues

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4
VIRTQ_AVAIL_F_NO_INTERRUPT = 1
VIRTQ_USED_F_NO_NOTIFY = 1
MAX_QUEUE_SIZE = 1 << 15

#: struct virtq_desc: addr, len, flags, next.
VIRTQ_DESC = Struct("<QIHH")
VIRTQ_DESC_SIZE = 16
assert VIRTQ_DESC.size == VIRTQ_DESC_SIZE

DESCRIPTOR_TABLE_ALIGNMENT = 16
AVAILABLE_RING_ALIGNMENT = 2
USED_RING_ALIGNMENT = 4


def descriptor_table_size(queue_size: int) -> int:
    """Return the bytes of a descriptor table."""
    return VIRTQ_DESC_SIZE * queue_size


def available_ring_size(queue_size: int) -> int:
    """Return the bytes of struct virtq_avail: flags, idx, ring[queue_size] of le16, used_event."""
    return 6 + 2 * queue_size


def used_ring_size(queue_size: int) -> int:
    """Return the bytes of struct virtq_used: flags, idx, ring[queue_size] of (id, len) as le32, avail_event."""
    return 6 + 8 * queue_size


# A descriptor as two 64-bit words, as a little-endian machine reads it: the address, and the rest of it below.

WORD_LENGTH = (1 << 32) - 1
WORD_NEXT = VIRTQ_DESC_F_NEXT << 32
WORD_WRITE = VIRTQ_DESC_F_WRITE << 32
WORD_INDIRECT = VIRTQ_DESC_F_INDIRECT << 32
WORD_NEXT_SHIFT = 48
assert VIRTQ_DESC.pack(0, 7, VIRTQ_DESC_F_WRITE, 9) == Struct("<QQ").pack(0, 7 | WORD_WRITE | 9 << WORD_NEXT_SHIFT)

# -- 5.2: block device

SECTOR_SHIFT = 9
SECTOR_SIZE = 1 << SECTOR_SHIFT

VIRTIO_BLK_F_SEG_MAX = 1 << 2
VIRTIO_BLK_F_RO = 1 << 5
VIRTIO_BLK_F_FLUSH = 1 << 9
VIRTIO_BLK_F_MQ = 1 << 12
VIRTIO_BLK_F_DISCARD = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14

VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

#: What begins struct virtio_blk_req: type, reserved, sector.
VIRTIO_BLK_REQ = Struct("<IIQ")
VIRTIO_BLK_REQ_SIZE = 16
assert VIRTIO_BLK_REQ.size == VIRTIO_BLK_REQ_SIZE
VIRTIO_BLK_ID_SIZE = 20

#: struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags (bit 0: unmap).
VIRTIO_BLK_SEGMENT = Struct("<QII")
VIRTIO_BLK_SEGMENT_SIZE = 16
assert VIRTIO_BLK_SEGMENT.size == VIRTIO_BLK_SEGMENT_SIZE
VIRTIO_BLK_SEGMENT_F_UNMAP = 1

#: struct virtio_blk_config: capacity, size_max, seg_max, geometry (cylinders, heads, sectors), blk_size, topology
#: (physical_block_exp, alignment_offset, min_io_size, opt_io_size), writeback, unused0, num_queues,
#: max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg,
#: write_zeroes_may_unmap, unused1[3].
VIRTIO_BLK_CONFIG = Struct("<QIIHBBIBBHIBBHIIIIIB3x")
VIRTIO_BLK_CONFIG_SIZE = 60
assert VIRTIO_BLK_CONFIG.size == VIRTIO_BLK_CONFIG_SIZE
