"""Which clusters of a drive are in its overlay: two bitmaps in memory, and what of them is to be written. Sans-IO.

Bit ``n`` of a map, from the lowest bit of each byte on, says that cluster ``n`` is in the overlay. ``mapped`` is what
holds now; ``durable`` is what the file's durable map says, and lags behind it. A bit is never cleared.
"""

from __future__ import annotations

from base.lean_typing import Sequence
from virtio.block.overlay.layout import ATOMIC, Geometry
from virtio.errors import OverlayError

#: (offset in a map, bytes to write there)
MapWrite = tuple[int, bytes]


class ClusterMap:
    """The maps of one overlay."""

    __slots__ = ("_dirty", "clusters", "durable", "mapped")

    def __init__(self, geometry: Geometry, durable: bytes, volatile: bytes = b"") -> None:
        """Take the maps as they were read; without a ``volatile`` one the durable one is all. Raises OverlayError."""
        self.clusters = geometry.clusters
        for each in (durable, volatile or durable):
            if len(each) != geometry.map_size:
                raise OverlayError("its maps are cut off")
            if int.from_bytes(each[self.clusters >> 3 :], "little") >> (self.clusters & 7):
                raise OverlayError("its maps are damaged: they name clusters that are not there")
        self.durable = bytearray(durable)
        self.mapped = bytearray(_union(durable, volatile)) if volatile else bytearray(durable)
        #: Sectors of the map in which ``mapped`` may say more than ``durable``.
        self._dirty: set[int] = set()
        if self.mapped != self.durable:
            self._dirty.update(
                [at for at in range(0, len(self.mapped), ATOMIC) if _sector(self.mapped, at) != _sector(durable, at)]
            )

    def bits(self, first: int, count: int) -> int:
        """Return the bits of ``count`` clusters from ``first`` on, that of ``first`` the lowest."""
        start = first >> 3
        word = int.from_bytes(self.mapped[start : first + count + 7 >> 3], "little")
        return word >> (first & 7) & (1 << count) - 1

    def with_set(self, first: int, count: int) -> MapWrite:
        """Return what the map says when these clusters are in the overlay, too: for the volatile map, then for us."""
        start, end = first >> 3, first + count + 7 >> 3
        word = int.from_bytes(self.mapped[start:end], "little") | ((1 << count) - 1) << (first & 7)
        return start, word.to_bytes(end - start, "little")

    def set(self, write: MapWrite) -> None:
        """What :meth:`with_set` has returned holds from now on."""
        start, data = write
        end = start + len(data)
        self.mapped[start:end] = data
        self._dirty.update(range(start // ATOMIC * ATOMIC, end, ATOMIC))

    def pending(self) -> Sequence[MapWrite]:
        """Return what the durable map is to be told once everything that was written until now is durable."""
        return [(at, _sector(self.mapped, at)) for at in sorted(self._dirty)]

    def merge(self, writes: Sequence[MapWrite]) -> Sequence[MapWrite]:
        """These may be told to the durable map now; return them with what it has said before: it loses no bit."""
        merged = [(at, _union(data, _sector(self.durable, at))) for at, data in writes]
        for at, data in merged:
            self.durable[at : at + len(data)] = data
        return merged

    def settle(self, writes: Sequence[MapWrite]) -> None:
        """They are on stable storage."""
        for at, data in writes:
            if _sector(self.mapped, at) == data:
                self._dirty.discard(at)

    @property
    def count(self) -> int:
        """How many clusters are in the overlay."""
        return int.from_bytes(self.mapped, "little").bit_count()

    @property
    def pending_count(self) -> int:
        """How many of them the durable map does not have yet."""
        return self.count - int.from_bytes(self.durable, "little").bit_count()

    def runs(self, *, mapped: bool, first: int = 0) -> Sequence[tuple[int, int]]:
        """Return (first, count) of each run of clusters that are in the overlay, or that are not, from ``first`` on."""
        found: list[tuple[int, int]] = []
        at = first
        while at < self.clusters:
            count = min(_STEP, self.clusters - at)
            for start, length, is_mapped in runs_of(self.bits(at, count), count):
                if is_mapped == mapped:
                    if found and sum(found[-1]) == at + start:
                        found[-1] = (found[-1][0], found[-1][1] + length)
                    else:
                        found.append((at + start, length))
            at += count
        return found


#: Clusters looked at as one number.
_STEP = 1 << 12


def runs_of(bits: int, count: int) -> list[tuple[int, int, bool]]:
    """Return (first, length, whether its bits are set) of each run among the lowest ``count`` bits."""
    found = []
    at = 0
    while at < count:
        rest = bits >> at
        is_set = bool(rest & 1)
        other = ~rest if is_set else rest
        # The lowest bit that differs; without one the run goes to the end.
        length = (other & -other).bit_length() - 1 if other else count
        length = min(length, count - at)
        found.append((at, length, is_set))
        at += length
    return found


def _sector(data: bytes | bytearray, at: int) -> bytes:
    return bytes(data[at : at + ATOMIC])


def _union(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") | int.from_bytes(other, "little")).to_bytes(len(one), "little")
