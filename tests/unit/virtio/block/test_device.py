"""The block device with every engine: data, flushes, errors, sizes, limits, stops, and changes of its file."""

from __future__ import annotations

import os
import struct

import pytest

from base.event_manager import EventManager
from tests.harness.drives import BUFFER, HEADER, SECTORS, STATUS, WAYS, Drive, backing_file, drive, pattern
from tests.harness.event_loop import run_until
from tests.harness.virtqueues import DATA, HIGH
from tests.metrics_table import EXPECTED
from virtio import abi
from virtio.block.configuration import SEG_MAX, BlockSettings
from virtio.block.device import BUDGET, Block
from virtio.block.file_engine import FileEngine
from virtio.block.thread_engine import ThreadEngine
from virtio.driver import Buffer
from virtio.rate_limiter import Bucket, RateLimiter

OK, IOERR, UNSUPP = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR, abi.VIRTIO_BLK_S_UNSUPP
EVERY = pytest.mark.parametrize("engine", WAYS)
BASE = abi.VIRTIO_F_VERSION_1 | abi.VIRTIO_F_EVENT_IDX | abi.VIRTIO_F_INDIRECT_DESC | abi.VIRTIO_BLK_F_SEG_MAX


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (BlockSettings(), 0),
        (BlockSettings(read_only=True, discard=True), abi.VIRTIO_BLK_F_RO),
        (BlockSettings(writeback=True), abi.VIRTIO_BLK_F_FLUSH),
        (BlockSettings(discard=True), abi.VIRTIO_BLK_F_DISCARD | abi.VIRTIO_BLK_F_WRITE_ZEROES),
        (BlockSettings(queues=4), abi.VIRTIO_BLK_F_MQ),
    ],
)
def test_what_it_offers(settings, more):
    device = Block("drive", FileEngine(backing_file(read_only=settings.read_only)), settings)
    assert device.features() == BASE | more
    config = abi.VIRTIO_BLK_CONFIG.unpack(device.config())
    assert config[:3] == (SECTORS, 0, SEG_MAX)
    assert config[13] == (settings.queues if settings.queues > 1 else 0)
    assert any(config[14:]) == bool(more & abi.VIRTIO_BLK_F_DISCARD)
    assert set(device.counters.values) | set(device.counters.aggregates) == EXPECTED["block"]
    device.close()


@EVERY
@pytest.mark.parametrize("indirect", [False, True])
def test_reads_and_writes(engine, indirect):
    with drive(engine) as made:
        for sector, count in ((0, 1), (3, 8), (0, SECTORS), (SECTORS - 1, 1)):
            assert made.read(sector, count, indirect=indirect) == pattern()[sector << 9 : sector + count << 9]
        data = os.urandom(3 << 9)
        assert made.write(5, data, indirect=indirect) == OK
        assert made.used.written == 1
        assert made.content == pattern()[: 5 << 9] + data + pattern()[8 << 9 :]
        values = made.device.collect().values
        assert (values["read_count"], values["read_bytes"]) == (4, (1 + 8 + SECTORS + 1) << 9)
        assert (values["write_count"], values["write_bytes"]) == (1, 3 << 9)
        assert values["queue_event_count"] == 6  # and once when it was activated
        assert made.device.counters.aggregates["read_agg"].count == 4


@EVERY
def test_a_request_in_many_pieces(engine):
    with drive(engine) as made:
        pieces = [Buffer(HIGH + 0x2000 * number, 128, True) for number in range(32)]
        assert made.ask(abi.VIRTIO_BLK_T_IN, 2, pieces) == OK
        assert made.used.written == 4097
        assert b"".join(made.memory.read(piece.address, 128) for piece in pieces) == pattern()[1024 : 1024 + 4096]


@EVERY
@pytest.mark.parametrize("indirect", [False, True])
def test_what_is_refused_and_what_is_unknown(engine, indirect):
    with drive(engine) as made:
        for type, sector, size, status in (
            (abi.VIRTIO_BLK_T_IN, SECTORS, 512, IOERR),
            (abi.VIRTIO_BLK_T_IN, 1, SECTORS << 9, IOERR),
            (abi.VIRTIO_BLK_T_IN, (1 << 64) - 1, 512, IOERR),
            (abi.VIRTIO_BLK_T_IN, 0, 100, IOERR),
            (99, 0, 512, UNSUPP),
            (abi.VIRTIO_BLK_T_DISCARD, 0, 512, UNSUPP),
        ):
            assert made.ask(type, sector, [Buffer(BUFFER, size, True)], indirect=indirect) == status
        assert made.write(SECTORS, bytes(512), indirect=indirect) == IOERR
        assert made.content == pattern()
        assert made.device.collect().values["invalid_reqs_count"] == 7
        assert not made.notify.resets
        assert made.read(0) == pattern()[:512]


@EVERY
def test_a_read_only_drive_takes_no_writes(engine):
    with drive(engine, read_only=True, writeback=True) as made:
        assert made.write(0, b"x" * 512) == IOERR
        assert made.content == pattern()
        assert made.read(0) == pattern()[:512]
        assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == OK


@EVERY
def test_a_flush_is_on_stable_storage_before_it_is_acknowledged(engine, monkeypatch):
    flushed: list[int] = []
    monkeypatch.setattr("os.fdatasync", flushed.append)
    with drive(engine, writeback=True) as made:
        assert made.write(0, b"x" * 512) == OK
        assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == OK
        assert made.device.collect().values["flush_count"] == 1
        if engine != "io_uring":  # there it is the kernel's
            assert flushed == [made.device.engine.file.fd]


@pytest.mark.parametrize("writeback", [False, True])
def test_a_driver_that_cannot_flush_gets_its_writes_to_stable_storage(monkeypatch, writeback):
    flags: list[int] = []

    def pwritev(fd, buffers, offset, flag=0):
        flags.append(flag)
        return sum(map(len, buffers))

    monkeypatch.setattr("os.pwritev", pwritev)
    with drive(writeback=writeback, features=BASE) as made:
        assert made.write(0, b"x" * 512) == OK
        assert flags == [os.RWF_DSYNC if writeback else 0]


@EVERY
def test_the_identity(engine):
    with drive(engine) as made:
        made.memory.write(BUFFER, b"\xff" * 32)
        assert made.ask(abi.VIRTIO_BLK_T_GET_ID, 0, [Buffer(BUFFER, 20, True)]) == OK
        assert made.used.written == 21
        status = os.fstat(made.device.engine.file.fd)
        expected = f"{status.st_dev}{status.st_rdev}{status.st_ino}".encode()[:20].ljust(20, b"\0")
        assert made.memory.read(BUFFER, 21) == expected + b"\xff"
        assert made.ask(abi.VIRTIO_BLK_T_GET_ID, 0, [Buffer(BUFFER, 19, True)]) == IOERR


@EVERY
def test_discard_and_write_zeroes_if_they_were_asked_for(engine):
    with drive(engine, discard=True) as made:
        assert made.zero(abi.VIRTIO_BLK_T_DISCARD, struct.pack("<QII", 8, 8, 0)) == OK
        assert made.zero(abi.VIRTIO_BLK_T_WRITE_ZEROES, struct.pack("<QII", 20, 2, 0)) == OK
        assert made.zero(abi.VIRTIO_BLK_T_WRITE_ZEROES, struct.pack("<QII", 30, 2, 1)) == OK
        assert made.zero(abi.VIRTIO_BLK_T_DISCARD, struct.pack("<QII", 60, 8, 0)) == IOERR
        expected = bytearray(pattern())
        for first, count in ((8, 8), (20, 2), (30, 2)):
            expected[first << 9 : first + count << 9] = bytes(count << 9)
        assert made.content == expected
    with drive(engine, discard=True, features=BASE) as made:  # not negotiated
        assert made.zero(abi.VIRTIO_BLK_T_DISCARD, struct.pack("<QII", 8, 8, 0)) == UNSUPP


@EVERY
def test_a_file_that_shrinks_gives_errors_where_it_is_no_more(engine):
    with drive(engine) as made:
        os.ftruncate(made.device.engine.file.fd, 1024)
        assert made.ask(abi.VIRTIO_BLK_T_IN, 1, [Buffer(BUFFER, 1024, True)]) == IOERR
        assert made.ask(abi.VIRTIO_BLK_T_IN, 10, [Buffer(BUFFER, 512, True)]) == IOERR
        assert made.read(1) == pattern()[512:1024]
        assert made.device.collect().values["execute_fails"] == 2
        assert not made.notify.resets


@EVERY
def test_a_full_file_system_gives_errors(engine, tmp_path):
    """/dev/full is no drive; a limit on the size of files is a file system that takes no more."""
    with drive(WAYS[engine](backing_file(read_only=False))) as made:
        made.device.sectors = 1 << 54  # as if the file had once been so large
        assert made.device.activation is not None
        made.device.begin(made.device.activation)
        assert made.write((1 << 54) - 1, bytes(512)) == IOERR
        assert made.device.collect().values["execute_fails"] == 1


def test_what_is_no_whole_sector_is_cut_off():
    with drive(FileEngine(backing_file(pattern() + b"tail"))) as made:
        assert made.device.sectors == SECTORS
        assert made.ask(abi.VIRTIO_BLK_T_IN, SECTORS, [Buffer(BUFFER, 512, True)]) == IOERR
        assert made.device.engine.file.cut == 4


@EVERY
def test_many_requests_at_once(engine):
    with drive(engine) as made:
        for number in range(16):
            header, status = HEADER + 0x20 * number, STATUS + 0x1000 + number
            made.memory.write(header, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, number))
            made.memory.write(status, b"\xee")
            buffers = [Buffer(header, 16), Buffer(HIGH + 512 * number, 512, True), Buffer(status, 1, True)]
            made.driver.add(buffers, indirect=number % 2 == 0)
        assert len(made.settle()) == 16
        assert made.memory.read(HIGH, 16 * 512) == pattern()[: 16 * 512]
        assert made.memory.read(STATUS + 0x1000, 16) == bytes(16)
        assert 1 <= made.notify.used_count <= 16


@EVERY
def test_several_queues(engine):
    with drive(engine, queues=3) as made:
        made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, 7))
        for number, driver in enumerate(made.drivers):
            driver.add([Buffer(HEADER, 16), Buffer(BUFFER + 512 * number, 512, True), Buffer(STATUS, 1, True)])
            assert driver.publish()
            made.device.notified(number)
        run_until(made.events, lambda: all(len(driver._offered) == len(driver.take_used()) for driver in made.drivers))
        assert made.memory.read(BUFFER, 3 * 512) == pattern()[7 << 9 : 8 << 9] * 3


@EVERY
def test_a_limiter_holds_requests_back(engine):
    limiter = RateLimiter(Bucket(1024, 20), None)
    with drive(engine, limiter=limiter) as made:
        for sector in range(4):
            assert made.read(sector) == pattern()[sector << 9 : sector + 1 << 9]
        values = made.device.collect().values
        assert values["rate_limiter_throttled_events"] >= 1
        assert values["rate_limiter_event_count"] >= 1
        assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == OK  # moves no bytes
        made.device.update_limiter(Bucket(0, 0), None)
        before = values["rate_limiter_throttled_events"]
        for sector in range(SECTORS):
            made.read(sector)
        assert made.device.collect().values["rate_limiter_throttled_events"] == before


def test_an_update_of_the_limiter_lets_what_waits_go():
    with drive(limiter=RateLimiter(None, Bucket(1, 1_000_000))) as made:
        assert made.read(0) == pattern()[:512]
        made.driver.add([Buffer(HEADER, 16), Buffer(BUFFER, 512, True), Buffer(STATUS, 1, True)])
        made.kick()
        assert not made.driver.take_used()
        made.device.update_limiter(None, Bucket(100, 1000))
        assert len(made.settle()) == 1


@pytest.mark.parametrize("limiter", [None, RateLimiter(Bucket(1 << 40, 1), None)])
def test_work_of_a_turn_is_bounded(monkeypatch, limiter):
    with drive(limiter=limiter) as made:
        made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_FLUSH, 0, 0))
        head = made.driver.write_chain([Buffer(HEADER, 16), Buffer(STATUS, 1, True)])

        def renew(_queue: int) -> None:  # a driver that makes a chain available for each that comes back
            made.driver.take_used()
            made.driver.offer(head)
            made.driver.arm()
            made.driver.publish()

        made.stop()
        monkeypatch.setattr(made.notify, "used", renew)
        renew(0)
        made.activate()
        for turn in (1, 2, 3):
            if turn > 1:
                made.events.run(0)
            assert made.queues[0].next_used == turn * BUDGET


class Narrow(ThreadEngine):
    """An engine with room for one."""

    def submit(self, request):
        return self.in_flight < 1 and super().submit(request)


def test_an_engine_that_is_full_holds_requests_back():
    with drive(Narrow(backing_file()), queues=2) as made:
        made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, 7))
        for number, driver in enumerate(made.drivers):
            for _ in range(4):
                driver.add([Buffer(HEADER, 16), Buffer(BUFFER, 512, True), Buffer(STATUS, 1, True)])
            assert driver.publish()
            made.device.notified(number)
        came: list[int] = []

        def all_came() -> bool:
            came.extend(used.written for driver in made.drivers for used in driver.take_used())
            return len(came) == 8

        run_until(made.events, all_came)
        assert came == [513] * 8
        assert made.device.collect().values["io_engine_throttled_events"] >= 1
        assert made.memory.read(BUFFER, 512) == pattern()[7 << 9 : 8 << 9]


@EVERY
def test_a_stop_waits_for_what_is_in_flight(engine):
    with drive(engine) as made:
        for _ in range(50):
            for number in range(8):
                made.driver.add([Buffer(HEADER, 16), Buffer(HIGH + 512 * number, 512, True), Buffer(STATUS, 1, True)])
            made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, 0))
            made.kick()
            made.restart()
            assert made.device.engine.in_flight >= 0
            for used in made.settle():
                assert used.written == 513
                made.driver.free(used.head)


@EVERY
def test_a_device_that_failed_stops_all_the_same(engine):
    with drive(engine) as made:
        for number in range(8):
            made.driver.add([Buffer(HEADER, 16), Buffer(HIGH + 512 * number, 512, True), Buffer(STATUS, 1, True)])
        made.kick()
        made.driver.available[1] = 0x8000
        made.device.notified(0)
        made.stop()
        assert len(made.notify.resets) == 1
        made.device.reset()


@EVERY
def test_a_device_that_fails_in_the_middle_of_a_batch_stops_all_the_same(engine):
    """What was begun before the chain that is wrong was never handed to the engine, and a stop waited for ever."""
    with drive(engine) as made:
        made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, 1))
        for number in range(3):
            made.driver.add([Buffer(HEADER, 16), Buffer(HIGH + 512 * number, 512, True), Buffer(STATUS, 1, True)])
        made.driver.add([Buffer(1 << 60, 16), Buffer(STATUS, 1, True)])
        made.kick()
        assert len(made.notify.resets) == 1
        made.stop()
        assert made.device.engine.in_flight == 0
        made.device.reset()


def test_it_goes_on_from_its_state():
    engine = FileEngine(backing_file())
    device = Block("drive", engine, BlockSettings(), RateLimiter(Bucket(1000, 100)))
    state = device.save()
    os.ftruncate(engine.file.fd, 1 << 20)
    engine.file.refresh()
    again = Block("drive", engine, BlockSettings(), state=state)
    assert again.sectors == SECTORS  # what the driver knows; a change is told as one
    assert again.limiter.limits
    again.close()


@EVERY
def test_no_descriptor_and_no_thread_is_left(engine):
    before = os.listdir("/proc/self/fd"), len(os.listdir("/proc/self/task"))
    with drive(engine) as made:
        made.read(0)
        assert isinstance(made, Drive)
        assert isinstance(made.events, EventManager)
    assert os.listdir("/proc/self/fd") == before[0]
    run_until(EventManager(), lambda: len(os.listdir("/proc/self/task")) <= before[1])


def test_regions_that_come_are_used(monkeypatch):
    with drive() as made:
        low, high = made.memory.regions
        made.memory.set_regions((low,))
        made.memory.write(HEADER, abi.VIRTIO_BLK_REQ.pack(abi.VIRTIO_BLK_T_IN, 0, 0))
        made.memory.set_regions((low, high))
        assert made.read(1) == pattern()[512:1024]
        assert low.size > DATA
