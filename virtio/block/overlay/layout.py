"""The layout of an overlay file: docs/formats/overlay.md. Sans-IO; whatever is read is checked before it is used."""

from __future__ import annotations

from _struct import Struct
from binascii import crc32

from base.lean_typing import NamedTuple
from virtio.abi import SECTOR_SIZE
from virtio.errors import OverlayError

MAGIC = b"cellovly"
VERSION = 1

#: Everything before the maps.
HEADER_AREA = 4096
PAGE = 4096
#: What a file system and a disk write as one, or not at all.
ATOMIC = 512

MIN_CLUSTER_BITS = 12
MAX_CLUSTER_BITS = 21
#: Bits in a map: 32 MiB of it.
MAX_CLUSTERS = 1 << 28
#: No file sees so many states; the next one can always be told.
MAX_GENERATION = (1 << 63) - 1
#: The largest drive, in bytes: what every file system takes with maps and header in front of it.
MAX_SIZE = 1 << 49

#: Where what is in the header area begins. The states are written in turn; the session is of no use after a reboot.
HEADER_OFFSET = 0
STATE_OFFSETS = (512, 1024)
SESSION_OFFSET = 2048

#: magic, version, cluster_bits, size, id
_HEADER = Struct("<8sIIQ16s")
#: generation, phase, reserved, base_size, base_mtime_ns; the checksums of the base's samples follow.
_STATE = Struct("<QIIQq")
#: boot_id
_SESSION = Struct("<16s")
_CRC = Struct("<I")

SAMPLE_SIZE = 4096
#: The first 64 KiB, where file systems note that they were mounted, and blocks in equal distances.
FRONT_SAMPLES = 16
SPREAD_SAMPLES = 32
SAMPLES = FRONT_SAMPLES + SPREAD_SAMPLES
_SAMPLES = Struct(f"<{SAMPLES}I")

assert _HEADER.size == 40
assert _STATE.size == 32
assert _STATE.size + _SAMPLES.size + _CRC.size <= ATOMIC
assert _HEADER.size + _CRC.size <= ATOMIC

BOOT_ID_SIZE = 16

#: What an overlay is in the middle of; only one with nothing pending serves a machine.
PHASE_NONE = 0
#: Its clusters are being copied into the base.
PHASE_COMMIT = 1
#: They are all there, and are being forgotten here.
PHASE_CLEAR = 2
PHASES = (PHASE_NONE, PHASE_COMMIT, PHASE_CLEAR)


class Geometry(NamedTuple):
    """What a header says: the drive has ``size`` bytes, in clusters of ``1 << cluster_bits``; ``id`` are 16 bytes."""

    cluster_bits: int
    size: int
    id: bytes

    @property
    def clusters(self) -> int:
        """How many there are, a part of one at the end included."""
        return -(-self.size >> self.cluster_bits)

    @property
    def map_size(self) -> int:
        """The length of each map, in bytes of whole pages."""
        return -(-self.clusters // (8 * PAGE)) * PAGE

    @property
    def durable_offset(self) -> int:
        """Where the map begins that holds after a power loss."""
        return HEADER_AREA

    @property
    def volatile_offset(self) -> int:
        """Where the map begins that holds until the host is started again."""
        return HEADER_AREA + self.map_size

    @property
    def data_offset(self) -> int:
        """Where byte 0 of the drive is: the first whole cluster, and whole MiB, behind the maps."""
        step = max(1 << 20, 1 << self.cluster_bits)
        return -(-(HEADER_AREA + 2 * self.map_size) // step) * step

    @property
    def file_size(self) -> int:
        """The length of the file, in bytes."""
        return self.data_offset + (self.clusters << self.cluster_bits)


class BaseIdentity(NamedTuple):
    """By what a base is known again: its size, and checksums of samples; the time is told to people only."""

    size: int
    mtime_ns: int
    samples: tuple[int, ...]


class State(NamedTuple):
    """What changes about an overlay as a whole. The one with the higher ``generation`` counts."""

    generation: int
    phase: int
    base: BaseIdentity


def check_geometry(cluster_bits: int, size: int) -> None:
    """Raise OverlayError unless a drive of ``size`` bytes can have such clusters."""
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise OverlayError(
            f"clusters of 2^{cluster_bits} bytes: they have 2^{MIN_CLUSTER_BITS} to 2^{MAX_CLUSTER_BITS}"
        )
    if not 0 < size <= MAX_SIZE or size % SECTOR_SIZE:
        raise OverlayError(f"a drive of {size} bytes: it has whole sectors of 512 bytes, one to 2^40 of them")
    clusters = -(-size >> cluster_bits)
    if clusters > MAX_CLUSTERS:
        raise OverlayError(
            f"a drive of {size} bytes has {clusters} clusters, at most {MAX_CLUSTERS} can be: take larger ones"
        )


def pack_header(geometry: Geometry) -> bytes:
    """Return the header's sector."""
    return _sealed(_HEADER.pack(MAGIC, VERSION, geometry.cluster_bits, geometry.size, geometry.id))


def parse_header(sector: bytes) -> Geometry:
    """Return what a header's sector says. Raises OverlayError."""
    if len(sector) < ATOMIC or sector[: len(MAGIC)] != MAGIC:
        raise OverlayError("not an overlay")
    _, version, cluster_bits, size, id = _HEADER.unpack_from(sector)
    if version != VERSION:
        raise OverlayError(f"an overlay of version {version}; this program knows version {VERSION}")
    if not _is_sealed(sector, _HEADER.size):
        raise OverlayError("its header is damaged: the checksum is another one")
    check_geometry(cluster_bits, size)
    return Geometry(cluster_bits, size, id)


def pack_state(state: State) -> bytes:
    """Return the sector of a state."""
    base = state.base
    fixed = _STATE.pack(state.generation, state.phase, 0, base.size, base.mtime_ns)
    return _sealed(fixed + _SAMPLES.pack(*base.samples))


def state_slot(generation: int) -> int:
    """Return the offset at which the state of a generation is: never over the one before."""
    return STATE_OFFSETS[generation % len(STATE_OFFSETS)]


def parse_states(area: bytes) -> State:
    """Return the state that counts, of the header area. Raises OverlayError if there is none."""
    found = [state for offset in STATE_OFFSETS if (state := _parse_state(area[offset : offset + ATOMIC], offset))]
    if not found:
        raise OverlayError("both of its states are damaged")
    return max(found)


def _parse_state(sector: bytes, offset: int) -> State | None:
    """Return what a sector says, None if it is no state: a power loss may have cut it short."""
    if len(sector) < ATOMIC or not _is_sealed(sector, _STATE.size + _SAMPLES.size):
        return None
    generation, phase, _, size, mtime_ns = _STATE.unpack_from(sector)
    if phase not in PHASES or size > MAX_SIZE or generation > MAX_GENERATION or state_slot(generation) != offset:
        return None
    return State(generation, phase, BaseIdentity(size, mtime_ns, _SAMPLES.unpack_from(sector, _STATE.size)))


def pack_session(boot_id: bytes) -> bytes:
    """Return the sector that says during which run of the host's kernel the volatile map was written."""
    return _sealed(_SESSION.pack(boot_id))


def parse_session(sector: bytes) -> bytes:
    """Return that run's boot id; empty if the sector does not say."""
    if len(sector) < ATOMIC or not _is_sealed(sector, _SESSION.size):
        return b""
    return bytes(sector[:BOOT_ID_SIZE])


def sample_offsets(size: int) -> tuple[int, ...]:
    """Return where the samples of a base of ``size`` bytes begin; at its end they are shorter."""
    last = max(0, size - 1) // SAMPLE_SIZE
    front = [min(number, last) for number in range(FRONT_SAMPLES)]
    spread = [last * number // (SPREAD_SAMPLES - 1) for number in range(SPREAD_SAMPLES)]
    return tuple([block * SAMPLE_SIZE for block in front + spread])


def checksum(data: bytes | memoryview) -> int:
    """Return the CRC-32 of some bytes. It finds accidents; nobody is kept from making one that fits."""
    return crc32(data)


def _sealed(data: bytes) -> bytes:
    return (data + _CRC.pack(crc32(data))).ljust(ATOMIC, b"\0")


def _is_sealed(sector: bytes, length: int) -> bool:
    (expected,) = _CRC.unpack_from(sector, length)
    return bool(expected == crc32(sector[:length]))
