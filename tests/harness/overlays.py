"""Overlays of tests: a disk that loses power, engines that end requests in any order, and what a drive may say then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tests.harness.virtqueues import DATA
from virtio.block.engine import FLUSH, READ, WRITE, Engine, IoRequest
from virtio.block.overlay.backing import OverlayBacking
from virtio.block.overlay.engine import OverlayEngine
from virtio.block.overlay.file import OverlayFile, create_overlay, is_blank, open_overlay

SECTOR = 512
BOOT, LATER_BOOT = b"b" * 16, b"l" * 16
ID = bytes(range(16))


class PowerLossError(Exception):
    """The power went out before a write."""


class SimulatedDisk:
    """A file on a disk with a volatile cache. ``writes_left`` writes and syncs go on, then the power is gone."""

    def __init__(self, content: bytes = b"") -> None:
        self.stable: dict[int, bytes] = {}
        #: Sector → its contents since the last sync, in order: a power loss leaves any of them, or the stable one.
        self.cached: dict[int, list[bytes]] = {}
        self.stable_size = self.size = 0
        self.mtime_ns = 0
        self.writes_left = -1
        self.writes = self.syncs = 0
        if content:
            self.truncate(len(content))
            self.write(0, content)
            self.sync()

    def _sector(self, number: int) -> bytes:
        versions = self.cached.get(number)
        return versions[-1] if versions else self.stable.get(number, bytes(SECTOR))

    def _burn(self) -> None:
        if not self.writes_left:
            raise PowerLossError
        self.writes_left -= 1
        self.writes += 1

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        data = b"".join(self._sector(number) for number in range(first, last))
        return data[offset - first * SECTOR :][:length]

    def write(self, offset: int, data: bytes) -> None:
        self._burn()
        assert offset + len(data) <= self.size
        at = 0
        while at < len(data):
            number, start = divmod(offset + at, SECTOR)
            part = data[at : at + SECTOR - start]
            old = self._sector(number)
            self.cached.setdefault(number, []).append(old[:start] + part + old[start + len(part) :])
            at += len(part)

    def sync(self) -> None:
        self._burn()
        self.syncs += 1
        self.stable.update({number: versions[-1] for number, versions in self.cached.items()})
        self.cached.clear()
        self.stable_size = self.size

    def truncate(self, size: int) -> None:
        if size < self.size:
            for number in {*self.stable, *self.cached}:
                if number * SECTOR >= size and self._sector(number) != bytes(SECTOR):
                    self.cached.setdefault(number, []).append(bytes(SECTOR))
        self.size = size

    def allocate(self, offset: int, length: int) -> None:
        assert offset + length <= self.size

    def punch(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def lose_power(self, choose: Callable[[int], int]) -> None:
        """Keep of every sector what ``choose(number of versions)`` says: 0 is the stable one."""
        for number, versions in self.cached.items():
            kept = choose(len(versions) + 1)
            if kept:
                self.stable[number] = versions[kept - 1]
        self.cached.clear()
        self.size = self.stable_size
        self.writes_left = -1


class SimulatedEngine(Engine):
    """Does one of the requests that it has taken, whichever the test says, and has room for a few only."""

    def __init__(self, disk: SimulatedDisk, room: int = 3) -> None:
        self.disk = disk
        self.room = room
        self.write_through = False
        self.in_flight = 0
        self.taken: list[IoRequest] = []
        self.ended: list[tuple[Any, int]] = []
        self.fail: Callable[[IoRequest], int] = lambda _: 0

    def start(self, memory: Any) -> None:
        self.view = memory.view

    def submit(self, request: IoRequest) -> bool:
        if len(self.taken) >= self.room:
            return False
        self.taken.append(request)
        return True

    def completions(self) -> Sequence[tuple[Any, int]]:
        """What was done last is told first: that a flush is done may be known late."""
        ended, self.ended = self.ended, []
        return ended[::-1]

    def step(self, which: int) -> None:
        """Do the request of this number."""
        request = self.taken.pop(which)
        self.ended.append((request.token, self.fail(request) or self._do(request)))

    def _do(self, request: IoRequest) -> int:
        if request.kind == FLUSH:
            self.disk.sync()
            return 0
        view = request.buffer.view if request.buffer else self.view
        at = request.offset
        if request.kind not in (READ, WRITE):
            self.disk.punch(at, request.length)
            return request.length
        if request.kind == WRITE:
            self.disk.write(at, b"".join(bytes(view[offset : offset + length]) for offset, length in request.parts))
            if self.write_through:
                self.disk.sync()
            return request.length
        for offset, length in request.parts:
            data = self.disk.read(at, length)
            view[offset : offset + len(data)] = data
            at += len(data)
            if len(data) < length:
                break
        return at - request.offset

    def close(self) -> None:
        pass


class SimulatedBacking(OverlayBacking):
    """The overlay's side of a drive without a descriptor."""

    def __init__(self, overlay: OverlayFile) -> None:
        self.overlay = overlay
        self.fd = -1
        self.refresh()


class Change(NamedTuple):
    """What a sector was given, and when: counts of submits and ends; ``ended`` is -1 while it is under way."""

    value: bytes
    begun: int
    ended: list[int]


class History:
    """What was asked of a drive, and so what each of its sectors may say."""

    def __init__(self, content: bytes) -> None:
        self.now = 1
        self.changes = [[Change(content[at : at + SECTOR], 0, [0])] for at in range(0, len(content), SECTOR)]
        #: When the last flush that was acknowledged had begun.
        self.flushed = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def change(self, sector: int, values: list[bytes]) -> list[int]:
        """Begin a change; the list that comes back gets the time of its end."""
        ended = [-1]
        begun = self.tick()
        for number, value in enumerate(values):
            self.changes[sector + number].append(Change(value, begun, ended))
        return ended

    def allowed(self, sector: int, before: int) -> set[bytes]:
        """Return what a sector may say when all that ended before a time is there."""
        changes = self.changes[sector]
        settled = [each.begun for each in changes if 0 <= each.ended[0] < before]
        return {
            each.value
            for each in changes
            if not (each.ended[0] >= 0 and any(begun > each.ended[0] for begun in settled))
        }

    def check(self, content: bytes, before: int, *, stable: bool) -> None:
        """All sectors say what they may. If that is ``stable`` it is all that they say from now on.

        Else what was under way has either happened, or never will.
        """
        now = self.tick()
        for number, changes in enumerate(self.changes):
            value = content[number * SECTOR :][:SECTOR]
            assert value in self.allowed(number, before), f"sector {number} says what nobody wrote, or what is gone"
            if stable:
                self.changes[number] = [Change(value, 0, [0])]
            else:
                self.changes[number] = [
                    each if each.ended[0] >= 0 else each._replace(ended=[now])
                    for each in changes
                    if each.ended[0] >= 0 or each.value == value
                ]
        self.flushed = 0 if stable else self.flushed


def open_simulated(base: SimulatedDisk, disk: SimulatedDisk, boot: bytes, **geometry: Any) -> OverlayFile:
    """Open an overlay as a drive does: it is made if the file is blank."""
    if is_blank(disk):
        create_overlay(disk, base, ID, **geometry)
    return open_overlay(disk, base, boot)


class SimulatedDrive:
    """A drive over two disks; requests end in the order that the test says."""

    def __init__(
        self, memory: Any, base: SimulatedDisk, disk: SimulatedDisk, boot: bytes = BOOT, **geometry: Any
    ) -> None:
        self.memory = memory
        self.overlay = open_simulated(base, disk, boot, **geometry)
        self.lower, self.upper = SimulatedEngine(base), SimulatedEngine(disk)
        self.engine = OverlayEngine(self.lower, self.upper, SimulatedBacking(self.overlay))
        self.engine.start(memory)
        self.results: dict[Any, int] = {}
        self._at = DATA

    def buffer(self, length: int) -> int:
        """Return the offset of a buffer that nobody else uses."""
        at = self._at
        self._at += length
        assert self._at <= self.memory.size
        return at

    def submit(self, request: IoRequest) -> None:
        while not self.engine.submit(request):
            self.step(0)
        self.engine.kick()
        self.look()

    def look(self) -> None:
        for token, result in self.engine.completions():
            assert token not in self.results
            self.results[token] = result

    def step(self, choice: int) -> bool:
        """Have one of the requests that the engines have taken done, and known; False if there is none."""
        done = self.do(choice)
        self.look()
        return done

    def do(self, choice: int) -> bool:
        """Have one of these requests done; that it is will be known later."""
        lower = len(self.lower.taken)
        count = lower + len(self.upper.taken)
        if not count:
            return False
        choice %= count
        if choice < lower:
            self.lower.step(choice)
        else:
            self.upper.step(choice - lower)
        return True

    def settle(self) -> None:
        """Have everything done."""
        self.look()
        while self.step(0):
            pass
        assert self.engine.in_flight == 0

    def request(self, kind: int, offset: int = 0, data: bytes | int = 0) -> int:
        """Do one request, alone; ``data`` to write, or how many bytes; return the result."""
        length = len(data) if isinstance(data, bytes) else data
        at = self.buffer(0) if kind != WRITE else self.buffer(length)
        if isinstance(data, bytes):
            self.memory.view[at : at + length] = data
        token = object()
        self.submit(IoRequest(kind, offset, length, [(at, length)] if kind in (READ, WRITE) else [], token))
        self.settle()
        return self.results.pop(token)

    def content(self) -> bytes:
        """Read the whole drive."""
        size = self.overlay.geometry.size
        at = self._at
        assert self.request(READ, 0, size) == size
        return bytes(self.memory.view[at : at + size])
