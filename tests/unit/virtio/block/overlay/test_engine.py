"""A drive over two files says what a drive of one file would: over every engine, and with requests in any order."""

from __future__ import annotations

import errno
import os
import random
import select
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.drives import Drive
from tests.harness.overlays import BOOT, SECTOR, SimulatedDisk, SimulatedDrive
from tests.harness.virtqueues import DATA, MIB, guest_memory
from virtio import abi
from virtio.block.backing_file import BackingFile
from virtio.block.configuration import BlockSettings
from virtio.block.device import Block
from virtio.block.engine import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, IoRequest
from virtio.block.engines import ASYNC, SYNC
from virtio.block.overlay.backing import open_overlay_backing
from virtio.block.overlay.engine import COPIES
from virtio.block.overlay.engines import make_overlay_engine
from virtio.block.overlay.file import read_overlay
from virtio.block.thread_engine import ThreadEngine

SIZE = 37 * 4096 + 3 * SECTOR
CONTENT = random.Random(2).randbytes(SIZE)
KINDS = (SYNC, ASYNC, "threads")


@pytest.fixture
def memory():
    with guest_memory(8 << 20) as made:
        yield made


def make(kind, tmp_path, monkeypatch, bits=12, content=CONTENT):
    """Return an engine over two files of this folder."""
    (tmp_path / "base").write_bytes(content)
    os.chmod(tmp_path / "base", 0o400)
    if kind == "threads":
        monkeypatch.setattr("virtio.block.engines.UringEngine", ThreadEngine)
    base = BackingFile(os.open(tmp_path / "base", os.O_RDONLY), read_only=True)
    fd = os.open(tmp_path / "overlay", os.O_RDWR | os.O_CREAT)
    backing = open_overlay_backing(base, fd, BOOT, cluster_bits=bits)
    return make_overlay_engine(SYNC if kind == SYNC else ASYNC, base, backing)


def finish(engine, count=1):
    """Return the results of ``count`` requests by token."""
    engine.kick()
    results = dict(engine.completions())
    while len(results) < count:
        assert select.select([engine.event], [], [], 20)[0]
        os.eventfd_read(engine.event)
        results.update(engine.completions())
    assert engine.in_flight == 0
    return results


def request(engine, memory, kind, offset, data=b""):
    """Do one request; return the result, and what was read."""
    length = data if isinstance(data, int) else len(data)
    if isinstance(data, bytes):
        memory.view[DATA : DATA + length] = data
    cut = length // 3
    parts = [each for each in ((DATA, cut), (DATA + cut, length - cut)) if each[1]] if kind in (READ, WRITE) else []
    assert engine.submit(IoRequest(kind, offset, length, parts, "t"))
    result = finish(engine)["t"]
    return (result, bytes(memory.view[DATA : DATA + length])) if kind == READ else result


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_one_file_would_say(kind, bits, memory, tmp_path, monkeypatch):
    before = os.listdir("/proc/self/fd")
    engine = make(kind, tmp_path, monkeypatch, bits)
    engine.start(memory)
    chance = random.Random(bits)
    model = bytearray(CONTENT)
    for _ in range(150):
        first = chance.randrange(SIZE // SECTOR)
        count = min(chance.choice((1, 3, 8, 16, 50)), SIZE // SECTOR - first)
        at, length = first * SECTOR, count * SECTOR
        what = chance.choice((READ, READ, WRITE, WRITE, DISCARD, WRITE_ZEROES, FLUSH))
        if what == READ:
            assert request(engine, memory, READ, at, length) == (length, bytes(model[at : at + length]))
        elif what == FLUSH:
            assert request(engine, memory, FLUSH, 0) == 0
        elif what == WRITE:
            data = chance.randbytes(length)
            assert request(engine, memory, WRITE, at, data) == length
            model[at : at + length] = data
        else:
            assert request(engine, memory, what, at, length) == length
            model[at : at + length] = bytes(length)
    assert request(engine, memory, READ, 0, SIZE) == (SIZE, bytes(model))
    engine.close()
    assert os.listdir("/proc/self/fd") == before
    assert (tmp_path / "base").read_bytes() == CONTENT
    # And so does who opens it next.
    engine = make(kind, tmp_path, monkeypatch, bits)
    engine.start(memory)
    assert request(engine, memory, READ, 0, SIZE) == (SIZE, bytes(model))
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_many_parts_of_one_cluster_at_once(kind, memory, tmp_path, monkeypatch):
    """Each write copies the cluster up, or finds it copied: none may undo another."""
    engine = make(kind, tmp_path, monkeypatch, 16)
    engine.start(memory)
    for sector in range(100):
        at = DATA + sector * SECTOR
        memory.view[at : at + SECTOR] = bytes([sector + 1]) * SECTOR
        assert engine.submit(IoRequest(WRITE, 2 * sector * SECTOR, SECTOR, [(at, SECTOR)], sector))
    assert finish(engine, 100) == dict.fromkeys(range(100), SECTOR)
    _, content = request(engine, memory, READ, 0, 200 * SECTOR)
    for sector in range(100):
        at = 2 * sector * SECTOR
        assert content[at : at + SECTOR] == bytes([sector + 1]) * SECTOR
        assert content[at + SECTOR : at + 2 * SECTOR] == CONTENT[at + SECTOR : at + 2 * SECTOR]
    engine.close()


def test_a_block_device_is_served_from_it(memory, tmp_path, monkeypatch):
    engine = make(ASYNC, tmp_path, monkeypatch)
    device = Block("drive", engine, BlockSettings(writeback=True, discard=True))
    drive = Drive(device, memory, device.features(), 64)
    drive.activate()
    assert drive.read(0, 8) == CONTENT[:4096]
    assert drive.write(3, b"w" * SECTOR) == abi.VIRTIO_BLK_S_OK
    assert drive.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == abi.VIRTIO_BLK_S_OK
    assert drive.read(2, 3) == CONTENT[1024:1536] + b"w" * SECTOR + CONTENT[2048:2560]
    assert drive.zero(abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_SEGMENT.pack(0, 16, 0)) == abi.VIRTIO_BLK_S_OK
    assert drive.read(0, 17) == bytes(8192) + CONTENT[8192:8704]
    drive.close()


class FullDisk(SimulatedDisk):
    def write(self, offset, data):
        raise OSError(errno.ENOSPC, "full")


@contextmanager
def monkey_patched(target, name, value):
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def simulated(memory, **geometry):
    return SimulatedDrive(memory, SimulatedDisk(CONTENT), SimulatedDisk(), **({"cluster_bits": 12} | geometry))


def test_a_drive_may_be_longer_or_shorter_than_its_base(memory):
    longer = simulated(memory, size=SIZE + 8192 - SIZE % 4096)
    assert longer.content() == CONTENT + bytes(8192 - SIZE % 4096)
    assert longer.request(WRITE, SIZE + SECTOR, b"l" * SECTOR) == SECTOR
    assert longer.content()[SIZE - SECTOR : SIZE + 3 * SECTOR] == CONTENT[-SECTOR:] + bytes(
        SECTOR
    ) + b"l" * SECTOR + bytes(SECTOR)
    shorter = simulated(memory, size=9 * SECTOR)
    assert shorter.content() == CONTENT[: 9 * SECTOR]
    assert shorter.request(WRITE, 8 * SECTOR, b"s" * SECTOR) == SECTOR
    assert shorter.content() == CONTENT[: 8 * SECTOR] + b"s" * SECTOR


def test_what_is_written_wholly_is_not_read_before(memory):
    drive = simulated(memory)
    drive.lower.fail = lambda _: -errno.EIO
    assert drive.request(WRITE, 4096, b"w" * 8192) == 8192
    assert drive.request(WRITE, SIZE - 3 * SECTOR, b"w" * 3 * SECTOR) == 3 * SECTOR
    assert drive.request(DISCARD, 0, 4096) == 4096
    # A part of a cluster is, and the error is the request's.
    assert drive.request(WRITE, 5 * 4096 + SECTOR, b"w" * SECTOR) == -errno.EIO
    assert drive.request(READ, 5 * 4096, SECTOR) == -errno.EIO
    drive.lower.fail = lambda _: 0
    assert drive.request(READ, 5 * 4096, 4096) == 4096
    assert drive.overlay.map.bits(0, 7) == 0b000_0111


def test_a_base_that_shrinks_while_it_is_used_is_an_error(memory):
    drive = simulated(memory)
    drive.lower.disk.size = 4096
    assert drive.request(READ, 4096, 8192) in (0, -errno.EIO)
    assert drive.request(WRITE, 8192 + SECTOR, b"w" * SECTOR) == -errno.EIO
    assert drive.overlay.map.count == 0


def test_a_full_disk_is_an_error_and_nothing_is_mapped(memory):
    drive = simulated(memory)
    drive.upper.fail = lambda request: -errno.ENOSPC if request.kind == WRITE else 0
    assert drive.request(WRITE, SECTOR, b"w" * SECTOR) == -errno.ENOSPC
    assert drive.request(WRITE, 0, b"w" * 4096) == -errno.ENOSPC
    assert drive.overlay.map.count == 0
    drive.upper.fail = lambda _: 0
    assert drive.content() == CONTENT
    assert drive.request(WRITE, SECTOR, b"w" * SECTOR) == SECTOR


def test_a_cluster_that_the_map_cannot_be_told_of_is_not_mapped(memory):
    """A later write to it would be acknowledged, and lost with the process."""
    drive = simulated(memory)
    with monkey_patched(drive.overlay, "disk", FullDisk()):
        assert drive.request(WRITE, 8192, b"w" * 4096) == -errno.ENOSPC
        assert drive.overlay.map.count == 0
        assert drive.content() == CONTENT
    assert drive.request(WRITE, 8192, b"w" * 4096) == 4096
    assert read_overlay(drive.upper.disk, BOOT).map.count == 1


def test_a_flush_that_failed_is_never_made_good(memory):
    """The kernel tells of a failed write-back once, and then says that all is well."""
    drive = simulated(memory)
    assert drive.request(WRITE, 0, b"w" * 4096) == 4096
    drive.upper.fail = lambda request: -errno.EIO if request.kind == FLUSH else 0
    assert drive.request(FLUSH) == -errno.EIO
    drive.upper.fail = lambda _: 0
    assert drive.request(FLUSH) == -errno.EIO
    assert drive.overlay.map.pending_count == 1
    drive.engine.close()
    assert drive.overlay.map.pending_count == 1


def test_who_cannot_flush_gets_stable_writes(memory):
    drive = simulated(memory)
    drive.engine.write_through = True
    assert drive.request(WRITE, SECTOR, b"w" * SECTOR) == SECTOR
    assert drive.request(WRITE, SECTOR, b"x" * SECTOR) == SECTOR
    assert not drive.upper.disk.cached
    assert drive.overlay.map.pending_count == 0


def test_flushes_that_come_together_are_one(memory):
    drive = simulated(memory)
    for token in range(20):
        drive.submit(IoRequest(FLUSH, 0, 0, [], token))
    syncs = drive.upper.disk.syncs
    drive.settle()
    assert len(drive.results) == 20
    assert drive.upper.disk.syncs == syncs + 2


def test_its_files_are_not_replaced(memory):
    drive = simulated(memory)
    with pytest.raises(OSError, match="keeps its files"):
        drive.engine.replace_file(drive.engine.file)


def test_copies_are_bounded(memory):
    drive = simulated(memory)
    drive.lower.room = drive.upper.room = 1000
    for token in range(36):
        drive.submit(IoRequest(WRITE, token * 4096 + SECTOR, SECTOR, [(drive.buffer(SECTOR), SECTOR)], token))
    assert len(drive.lower.taken) == COPIES
    drive.settle()
    assert len(drive.results) == 36


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.sampled_from((READ, WRITE, WRITE, DISCARD, WRITE_ZEROES, FLUSH)),
            st.integers(0, SIZE // SECTOR - 1),
            st.integers(1, 40),
        ),
        max_size=30,
    ),
    st.randoms(use_true_random=False),
)
def test_requests_that_do_not_overlap_end_in_any_order(operations, chance):
    """Each sector is in one request at a time: then the order in which engines end does not matter."""
    with guest_memory(16 * MIB) as memory:
        drive = simulated(memory)
        model = bytearray(CONTENT)
        busy: dict[int, range] = {}
        reads = {}
        for token, (kind, first, count) in enumerate(operations):
            sectors = range(first, min(first + count, SIZE // SECTOR))
            while any(each.start < sectors.stop and sectors.start < each.stop for each in busy.values()):
                assert drive.step(chance.randrange(8))
                busy = {known: each for known, each in busy.items() if known not in drive.results}
            at, length = sectors.start * SECTOR, len(sectors) * SECTOR
            parts = []
            if kind in (READ, WRITE):
                parts = [(drive.buffer(length), length)]
            if kind == READ:
                reads[token] = (parts[0][0], bytes(model[at : at + length]))
            elif kind == WRITE:
                data = bytes([token + 1]) * length
                memory.view[parts[0][0] : parts[0][0] + length] = data
                model[at : at + length] = data
            elif kind != FLUSH:
                model[at : at + length] = bytes(length)
            busy[token] = sectors if kind != FLUSH else range(0)
            drive.submit(IoRequest(kind, at if kind != FLUSH else 0, length if kind != FLUSH else 0, parts, token))
        while drive.step(chance.randrange(8)):
            pass
        assert len(drive.results) == len(operations)
        assert min(drive.results.values(), default=0) >= 0
        for at, data in reads.values():
            assert memory.view[at : at + len(data)] == data
        assert drive.content() == model
