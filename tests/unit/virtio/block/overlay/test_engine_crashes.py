"""Whatever ends a machine, wherever: what was acknowledged is there, and no block is a mixture.

The disk is simulated: a power loss leaves of each sector, on its own, any content that it had since the last sync.
"""

from __future__ import annotations

import os
import random
import signal
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.overlays import (
    BOOT,
    SECTOR,
    History,
    PowerLossError,
    SimulatedDisk,
    SimulatedDrive,
)
from tests.harness.virtqueues import guest_memory
from virtio.block.backing_file import BackingFile
from virtio.block.engine import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, IoRequest
from virtio.block.engines import ASYNC, SYNC
from virtio.block.overlay.backing import open_overlay_backing
from virtio.block.overlay.engines import make_overlay_engine

#: Six clusters of 4 KiB and a part of one; the base ends within the fifth.
SIZE = 6 * 4096 + 3 * SECTOR
BASE_SIZE = 4 * 4096 + 5 * SECTOR
SECTORS = SIZE // SECTOR
CLUSTER_BITS = 12
KINDS = (WRITE, WRITE, WRITE, READ, FLUSH, DISCARD, WRITE_ZEROES)


def base_content() -> bytes:
    return b"".join(b"%-16d" % number * 32 for number in range(BASE_SIZE // SECTOR))


class Machine:
    """A drive whose driver remembers what it asked for, and what it was told."""

    def __init__(self, memory, seed: int, writes_left: int = -1) -> None:
        self.memory = memory
        self.base = SimulatedDisk(base_content())
        self.disk = SimulatedDisk()
        self.random = random.Random(seed)
        self.history = History(base_content() + bytes(SIZE - BASE_SIZE))
        self.serial = 0
        self.boot = BOOT
        self.disk.writes_left = writes_left

    def open(self) -> None:
        self.drive = SimulatedDrive(self.memory, self.base, self.disk, self.boot, size=SIZE, cluster_bits=CLUSTER_BITS)
        self.asked: dict[int, tuple] = {}

    def ask(self, kind: int, sector: int, count: int) -> None:
        """Begin a request."""
        self.serial += 1
        token, history = self.serial, self.history
        sector %= SECTORS
        count = min(count, SECTORS - sector)
        if kind == FLUSH:
            self.asked[token] = (kind, history.tick())
            self.drive.submit(IoRequest(FLUSH, 0, 0, [], token))
            self.hear()
            return
        length = count * SECTOR
        parts = []
        if kind in (READ, WRITE):
            at = self.drive.buffer(length)
            cut = self.random.randrange(length + 1)
            parts = [part for part in ((at, cut), (at + cut, length - cut)) if part[1]]
        if kind == READ:
            self.asked[token] = (kind, history.tick(), sector, count, parts)
        else:
            value = b"%-16d" % -token * 32 if kind == WRITE else bytes(SECTOR)
            if kind == WRITE:
                self.memory.view[at : at + length] = value * count
            self.asked[token] = (kind, history.change(sector, [value] * count))
        self.drive.submit(IoRequest(kind, sector * SECTOR, length, parts, token))
        self.hear()

    def hear(self) -> None:
        """Take note of what is done."""
        history = self.history
        for token, result in self.drive.results.items():
            kind, when, *rest = self.asked.pop(token)
            assert result >= 0
            if kind == FLUSH:
                history.flushed = max(history.flushed, when)
            elif kind == READ:
                sector, count, parts = rest
                data = b"".join(bytes(self.memory.view[at : at + length]) for at, length in parts)
                for number in range(count):
                    value = data[number * SECTOR :][:SECTOR]
                    assert value in history.allowed(sector + number, when)
            else:
                when[0] = history.tick()
        self.drive.results.clear()

    def kill(self) -> None:
        """End the process: what it has written stays."""
        self._again(self.history.now + 1, stable=False)

    def lose_power(self, choose=None) -> None:
        self.disk.lose_power(choose or self.random.randrange)
        self.boot = self.random.randbytes(16)  # never one that has been
        self._again(self.history.flushed, stable=True)

    def _again(self, before: int, *, stable: bool) -> None:
        self.disk.writes_left = -1
        self.open()
        self.history.check(self.drive.content(), before, stable=stable)
        assert self.base.read(0, BASE_SIZE) == base_content()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KINDS), st.integers(0, SECTORS - 1), st.sampled_from((1, 2, 7, 8, 9, 20))),
        st.tuples(st.just("step"), st.integers(0, 8)),
        st.tuples(st.sampled_from(("step", "do")), st.integers(0, 8)),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(OPERATIONS, st.sampled_from(("kill", "power"))), min_size=1, max_size=3), st.integers(0, 99))
def test_nothing_acknowledged_is_lost_in_any_order_of_requests(rounds, seed):
    with guest_memory(4 << 20) as memory:
        machine = Machine(memory, seed)
        machine.open()
        for operations, end in rounds:
            for operation in operations:
                if operation[0] == "step":
                    machine.drive.step(operation[1])
                    machine.hear()
                elif operation[0] == "do":
                    machine.drive.do(operation[1])
                else:
                    machine.ask(*operation)
            if end == "kill":
                machine.kill()
            else:
                machine.lose_power()


def test_a_flush_does_not_speak_of_what_was_written_after_it():
    """A write that ends between the sync and its completion is not on stable storage."""
    with guest_memory(4 << 20) as memory:
        machine = Machine(memory, 0)
        machine.open()
        machine.ask(WRITE, 8, 8)
        machine.drive.settle()
        machine.hear()
        machine.ask(FLUSH, 0, 0)
        machine.ask(WRITE, 16, 8)
        machine.drive.do(0)
        machine.drive.do(0)
        machine.drive.look()
        machine.hear()
        # What the map is told reaches the disk, and nothing else does.
        data = machine.drive.overlay.geometry.data_offset // SECTOR
        for sector in [each for each in machine.disk.cached if each < data]:
            machine.disk.stable[sector] = machine.disk.cached.pop(sector)[-1]
        machine.lose_power(lambda _: 0)


#: Writes whole clusters and parts, over each other, with and without flushes in between.
PROGRAM = (
    (WRITE, 3, 2), (WRITE, 8, 8), (FLUSH, 0, 0), (WRITE, 4, 9), (DISCARD, 9, 30), (WRITE, 40, 3),
    (FLUSH, 0, 0), (WRITE_ZEROES, 0, 4), (WRITE, 46, 5), (FLUSH, 0, 0), (WRITE, 20, 1),
)  # fmt: skip


def run(machine: Machine) -> bool:
    """Open the drive and do the program; False if the power goes before that is done."""
    try:
        machine.open()
        for operation in PROGRAM:
            machine.ask(*operation)
            while machine.drive.step(0):
                machine.hear()
    except PowerLossError:
        return False
    return True


def choices(seed: int):
    """Return how a power loss chooses: all old, all new, or at random."""
    return [lambda _: 0, lambda count: count - 1][seed] if seed < 2 else random.Random(seed).randrange


@pytest.mark.parametrize("seed", range(14))
def test_the_power_may_go_before_every_single_write(seed):
    with guest_memory(4 << 20) as memory:
        survived = left = 0
        while True:
            machine = Machine(memory, seed, left)
            ended = run(machine)
            machine.lose_power(choices(seed))
            if ended:
                break
            survived += machine.drive.overlay.map.count
            left += 1
    assert left > 25
    assert survived


def test_a_process_may_end_before_every_single_write():
    with guest_memory(4 << 20) as memory:
        left = 0
        while True:
            machine = Machine(memory, left, left)
            if run(machine):
                break
            machine.kill()
            machine.lose_power()
            left += 1
    assert left > 25


@pytest.mark.parametrize("seed", range(8))
def test_killed_in_the_middle_of_it(tmp_path, seed):
    """The real thing: files, io_uring or none, and SIGKILL. What was acknowledged is there, and nothing else."""
    content = random.Random(seed).randbytes(1 << 20)
    (tmp_path / "base").write_bytes(content)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            _write_until_killed(tmp_path, writer, seed)
        finally:
            os._exit(1)
    os.close(writer)
    told = b""
    while len(told) < 8 * (40 + 60 * seed):
        told += os.read(reader, 4096)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 65536):
        told += more
    os.close(reader)
    model = {}
    for at in range(0, len(told) // 8 * 8, 8):
        sector, serial = struct.unpack_from("<II", told, at)
        model[sector] = serial
    engine, memory = _open(tmp_path, seed)
    with memory as mapped:
        engine.start(mapped)
        engine.submit(IoRequest(READ, 0, 1 << 20, [(0, 1 << 20)], 0))
        while not engine.completions():
            engine.kick()
        for sector in range(len(content) // SECTOR):
            found = bytes(mapped.view[sector * SECTOR :][:SECTOR])
            if found == content[sector * SECTOR :][:SECTOR]:
                assert sector not in model
                continue
            (serial,) = struct.unpack_from("<I", found)
            assert found == struct.pack("<I", serial) * 128
            assert serial % (len(content) // SECTOR) == sector * 7 % (len(content) // SECTOR)
            assert serial >= model.get(sector, 0)
        engine.close()


def _open(folder, seed):
    base = BackingFile(os.open(folder / "base", os.O_RDONLY), read_only=True)
    fd = os.open(folder / "overlay", os.O_RDWR | os.O_CREAT)
    backing = open_overlay_backing(base, fd, BOOT, cluster_bits=12 + seed % 5)
    return make_overlay_engine(ASYNC if seed % 2 else SYNC, base, backing), guest_memory(4 << 20)


def _write_until_killed(folder, writer, seed) -> None:
    """Write sectors with their serial numbers, tell of each that is done, flush now and then."""
    engine, memory = _open(folder, seed)
    sectors = 2048
    with memory as mapped:
        engine.start(mapped)
        serial = 0
        while True:
            for _ in range(8):
                serial += 1
                # Coprime to the number of sectors: a sector comes again after all the others.
                sector = serial * pow(7, -1, sectors) % sectors
                at = (1 << 20) + serial % 64 * SECTOR
                mapped.view[at : at + SECTOR] = struct.pack("<I", serial) * 128
                engine.submit(IoRequest(WRITE, sector * SECTOR, SECTOR, [(at, SECTOR)], (sector, serial)))
            if serial % 40 == 0:
                engine.submit(IoRequest(FLUSH, 0, 0, [], None))
            engine.kick()
            while engine.in_flight:
                for token, result in engine.completions():
                    assert result >= 0
                    if token:
                        os.write(writer, struct.pack("<II", *token))
