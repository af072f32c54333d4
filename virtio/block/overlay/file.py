"""An overlay file: made, opened and checked against its base, and what changes about it as a whole.

What must hold after a crash, and why it does: docs/formats/overlay.md.
"""

from __future__ import annotations

from base.errno_text import errno_text
from base.lean_typing import Protocol, Sequence
from virtio.abi import SECTOR_SIZE
from virtio.block.overlay.cluster_map import ClusterMap
from virtio.block.overlay.layout import (
    ATOMIC,
    BOOT_ID_SIZE,
    HEADER_AREA,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    PHASE_NONE,
    SAMPLE_SIZE,
    SESSION_OFFSET,
    BaseIdentity,
    Geometry,
    State,
    check_geometry,
    checksum,
    pack_header,
    pack_session,
    pack_state,
    parse_header,
    parse_session,
    parse_states,
    sample_offsets,
    state_slot,
)
from virtio.errors import OverlayError

#: Bits in a map of which nobody said how large the clusters are to be: 1 MiB of it (docs/adr/overlay-clusters.md).
DEFAULT_CLUSTERS = 1 << 23
UNFINISHED = "a commit of it was begun and has not ended: `cellblock overlay commit` goes on with it"


class Disk(Protocol):
    """What of virtio.block.overlay.storage.Storage is needed here."""

    @property
    def size(self) -> int:
        """Its length, in bytes."""

    @property
    def mtime_ns(self) -> int:
        """When it was written to last."""

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes; fewer at the end."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it."""

    def sync(self) -> None:
        """What was written is on stable storage afterwards."""

    def truncate(self, size: int) -> None:
        """Give it a length."""

    def allocate(self, offset: int, length: int) -> None:
        """Have room for a range."""

    def punch(self, offset: int, length: int) -> None:
        """A range reads as zeros afterwards."""


class OverlayFile:
    """An overlay that can be used. ``boot_id`` names this run of the host's kernel; empty if nobody knows it."""

    def __init__(self, disk: Disk, geometry: Geometry, state: State, map: ClusterMap) -> None:
        self.disk = disk
        self.geometry = geometry
        self.state = state
        self.map = map

    @property
    def base_size(self) -> int:
        """How many bytes of the base can be read through the overlay."""
        return min(self.state.base.size, self.geometry.size)

    def add(self, first: int, count: int) -> None:
        """Clusters whose data is written are in the overlay from now on, whatever becomes of this process.

        Raises OSError, and then they are not.
        """
        write = self.map.with_set(first, count)
        self.disk.write(self.geometry.volatile_offset + write[0], write[1])
        self.map.set(write)

    def write_durable(self, writes: Sequence[tuple[int, bytes]]) -> Sequence[tuple[int, bytes]]:
        """Tell the durable map what is pending, once the data is on stable storage; return what is settled by a sync.

        Raises OSError.
        """
        merged = self.map.merge(writes)
        for at, data in merged:
            self.disk.write(self.geometry.durable_offset + at, data)
        return merged

    def flush(self) -> None:
        """Have everything that was written survive a power loss. Raises OSError."""
        pending = self.map.pending()
        self.disk.sync()
        if pending:
            written = self.write_durable(pending)
            self.disk.sync()
            self.map.settle(written)

    def change(self, phase: int, base: BaseIdentity | None = None) -> None:
        """Write a state over the one before the current one, and wait until it is there. Raises OSError."""
        state = State(self.state.generation + 1, phase, base or self.state.base)
        self.disk.write(state_slot(state.generation), pack_state(state))
        self.disk.sync()
        self.state = state

    def forget(self) -> None:
        """No cluster is in the overlay any more; their data is left for who calls this. Raises OSError."""
        geometry = self.geometry
        self.disk.write(geometry.durable_offset, bytes(2 * geometry.map_size))
        self.disk.sync()
        self.map = ClusterMap(geometry, bytes(geometry.map_size))


def create_overlay(disk: Disk, base: Disk, id: bytes, size: int | None = None, cluster_bits: int | None = None) -> None:
    """Make an overlay of a file that is empty, or in which one was begun and never finished.

    ``size`` of the drive in bytes: the base's without it; a longer base is cut off, zeros follow a shorter one.
    ``id`` are 16 random bytes. Raises OverlayError.
    """
    with OsErrors("it cannot be made"):
        if size is None:
            size = base.size // SECTOR_SIZE * SECTOR_SIZE
        if cluster_bits is None:
            cluster_bits = default_cluster_bits(size)
        check_geometry(cluster_bits, size)
        _create(disk, base, Geometry(cluster_bits, size, id))


def default_cluster_bits(size: int) -> int:
    """Return the smallest clusters with which the map of a drive stays small."""
    return max(MIN_CLUSTER_BITS, min(((size - 1) // DEFAULT_CLUSTERS).bit_length(), MAX_CLUSTER_BITS))


def is_blank(disk: Disk) -> bool:
    """Whether an overlay can be made of a file: it is empty, or the making of one was cut short. Raises OSError."""
    return not any(disk.read(0, HEADER_AREA)[:ATOMIC])


def _create(disk: Disk, base: Disk, geometry: Geometry) -> None:
    if not is_blank(disk):
        raise OverlayError("the file is there, and is not empty")
    disk.truncate(0)
    disk.truncate(geometry.file_size)
    disk.allocate(0, HEADER_AREA + 2 * geometry.map_size)
    disk.write(state_slot(0), pack_state(State(0, PHASE_NONE, identify(base))))
    disk.sync()
    # Last: a file without a header is none, and nobody was told that there is one.
    disk.write(0, pack_header(geometry))
    disk.sync()


def identify(base: Disk) -> BaseIdentity:
    """Return by what a base is known again: it reads 192 KiB. Raises OSError."""
    size = base.size
    samples = tuple([checksum(base.read(offset, SAMPLE_SIZE)) for offset in sample_offsets(size)])
    return BaseIdentity(size, base.mtime_ns, samples)


def check_base(known: BaseIdentity, base: Disk) -> None:
    """Raise OverlayError if a base is not what it was; OSError."""
    size = base.size
    if size != known.size:
        raise OverlayError(f"its base has changed, or is another one: {size} bytes instead of {known.size}")
    for offset, expected in zip(sample_offsets(size), known.samples, strict=True):
        if checksum(base.read(offset, SAMPLE_SIZE)) != expected:
            raise OverlayError(
                f"its base has changed, or is another one: what is at byte {offset} differs from what was there"
            )


def read_overlay(disk: Disk, boot_id: bytes) -> OverlayFile:
    """Return the overlay in a file, without a look at its base; nothing is changed. Raises OverlayError."""
    with OsErrors("it cannot be read"):
        return _read(disk, boot_id)


def _read(disk: Disk, boot_id: bytes) -> OverlayFile:
    area = disk.read(0, HEADER_AREA)
    geometry = parse_header(area[:ATOMIC])
    state = parse_states(area)
    size = disk.size
    if size < geometry.file_size:
        raise OverlayError(f"it is cut off: {size} bytes instead of {geometry.file_size}")
    durable = disk.read(geometry.durable_offset, geometry.map_size)
    volatile = b""
    session = parse_session(area[SESSION_OFFSET : SESSION_OFFSET + ATOMIC])
    if boot_id and session == boot_id:
        volatile = disk.read(geometry.volatile_offset, geometry.map_size)
    return OverlayFile(disk, geometry, state, ClusterMap(geometry, durable, volatile))


def begin_session(overlay: OverlayFile, boot_id: bytes) -> None:
    """Have the volatile map say what is in the overlay, and that it is of this run of the kernel. Raises OverlayError.

    Nothing here waits for the disk: it matters only to who starts under this kernel.
    """
    disk, geometry = overlay.disk, overlay.geometry
    with OsErrors("it cannot be written"):
        session = parse_session(disk.read(SESSION_OFFSET, ATOMIC))
        if boot_id and session == boot_id:
            return
        mapped = bytes(overlay.map.mapped)
        if disk.read(geometry.volatile_offset, geometry.map_size) != mapped:
            disk.write(geometry.volatile_offset, mapped)
        disk.write(SESSION_OFFSET, pack_session(boot_id.ljust(BOOT_ID_SIZE, b"\0")))


def check_unfinished(overlay: OverlayFile) -> None:
    """Raise OverlayError if a commit of it was begun and has not ended: it serves no machine."""
    if overlay.state.phase != PHASE_NONE:
        raise OverlayError(UNFINISHED)


def open_overlay(disk: Disk, base: Disk, boot_id: bytes) -> OverlayFile:
    """Return the overlay in a file for a machine to use: nothing pending, and over the base that it was made for.

    Raises OverlayError.
    """
    overlay = read_overlay(disk, boot_id)
    check_unfinished(overlay)
    with OsErrors("its base cannot be read"):
        check_base(overlay.state.base, base)
    begin_session(overlay, boot_id)
    return overlay


class OsErrors:
    """Turns an OSError of what is done within it into an OverlayError: ``what`` went wrong, and why."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        """Nothing is to be done before."""

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, OSError):
            raise OverlayError(f"{self.what}: {errno_text(error)}") from None
