"""A device that qemu-storage-daemon serves: the real one."""

from __future__ import annotations

import os
import random
import struct

import pytest

from tests.harness.vhost_user import Backend, vhost_user_guest
from virtio import abi
from virtio.errors import VhostUserError

SIZE = 8 << 20
SECTOR = 512


@pytest.fixture
def backend(tmp_path):
    made = Backend(tmp_path, SIZE)
    yield made
    made.kill()


def test_it_reads_writes_and_flushes(backend):
    backend.start()
    with vhost_user_guest(backend.connect()) as guest:
        guest.introduce()
        device = guest.device
        assert device.features() & abi.VIRTIO_BLK_F_FLUSH
        assert not device.features() & (abi.VIRTIO_BLK_F_RO | 1 << 30)
        assert struct.unpack_from("<Q", device.config())[0] == SIZE // SECTOR
        guest.activate()
        assert guest.request(abi.VIRTIO_BLK_T_OUT, 3, b"w" * 1024) == abi.VIRTIO_BLK_S_OK
        assert guest.request(abi.VIRTIO_BLK_T_FLUSH, 0) == abi.VIRTIO_BLK_S_OK
        assert guest.request(abi.VIRTIO_BLK_T_IN, 2, 2048) == abi.VIRTIO_BLK_S_OK
        assert guest.data(0, 2048) == bytes(512) + b"w" * 1024 + bytes(512)
        assert guest.request(abi.VIRTIO_BLK_T_OUT, SIZE // SECTOR, b"w" * 512) != abi.VIRTIO_BLK_S_OK
        counters = device.collect().values
        assert counters["init_time_us"] > 0
        assert counters["activate_time_us"] > 0
        assert backend.disk.read_bytes()[1536:2560] == b"w" * 1024
        with pytest.raises(VhostUserError, match="is with its vhost-user back end"):
            device.save()
        assert not guest.losses


def test_what_the_back_end_says_of_writing_holds(tmp_path):
    backend = Backend(tmp_path, SIZE, read_only=True)
    backend.start()
    with vhost_user_guest(backend.connect(), writeback=False) as guest:
        guest.introduce()
        assert guest.device.features() & abi.VIRTIO_BLK_F_RO
        assert not guest.device.features() & abi.VIRTIO_BLK_F_FLUSH
    backend.kill()


@pytest.mark.soak("vhost-user", only=True)
def test_it_stops_and_goes_on(backend, monkeypatch):
    """This back end now and then keeps what it had in flight when it was stopped: then another one has to go on.

    Not in everyday runs: on a busy machine a chain came back twice after such a loss, and it is not known yet whose
    fault that is. No drive of the product is served so.
    """
    monkeypatch.setattr("virtio.vhost_user.block.DRAIN_NS", 10_000_000_000)
    backend.iops = 200
    backend.start()
    with vhost_user_guest(backend.connect()) as guest:
        guest.introduce()
        guest.activate()
        for round in range(4):
            for slot in range(30):
                guest.offer(slot, abi.VIRTIO_BLK_T_OUT, slot, bytes([round + 1]) * 512)
            guest.stop()
            if guest.losses:
                guest.reconnect(backend)
            else:  # Nothing is in flight; what was not begun waits.
                assert guest.queue.next_used == guest.queue.next_available == guest.queue.used[1]
            guest.go_on()
            left = 30
            while left:
                left -= len(guest.take(backend))
            assert all(guest.status(slot) == 0 for slot in range(30))
        assert backend.disk.read_bytes()[: 30 * 512] == b"\4" * 30 * 512


def test_a_new_size_is_told(backend):
    backend.start()
    with vhost_user_guest(backend.connect()) as guest:
        guest.introduce()
        guest.activate()
        updated = guest.device.update_files([])
        assert updated is not None
        guest.wait(lambda: updated.done)
        assert guest.notify.config_count == 1
        assert guest.device.collect().values["config_change_time_us"] > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_back_end_that_is_killed_loses_nothing(backend, seed):
    """Writes of serial numbers, many in flight: killed again and again, each ends once, and is there."""
    backend.iops = 2000
    backend.start()
    chance = random.Random(seed)
    sectors = SIZE // SECTOR
    with vhost_user_guest(backend.connect(), size=64) as guest:
        guest.introduce()
        guest.activate()
        free, model = list(range(40)), {}
        busy: dict[int, tuple[int, int, int]] = {}
        serial = kills = in_flight_at_kill = 0
        while kills < 4 or busy:
            while free and kills < 4:
                slot = free.pop()
                serial += 1
                sector = chance.randrange(sectors)
                if any(sector == other for _, other, _ in busy.values()):
                    free.append(slot)
                    continue
                head = guest.offer(slot, abi.VIRTIO_BLK_T_OUT, sector, struct.pack("<I", serial) * 128)
                busy[head] = (slot, sector, serial)
            if kills < 4 and chance.random() < 0.05:
                kills += 1
                in_flight_at_kill += len(busy)
                backend.kill()
                guest.wait(lambda: guest.losses)
                guest.reconnect(backend)
            for used in guest.take(backend):
                slot, sector, value = busy.pop(used.head)
                assert guest.status(slot) == abi.VIRTIO_BLK_S_OK
                model[sector] = value
                free.append(slot)
        assert in_flight_at_kill > 40
        assert not guest.notify.resets
        assert guest.request(abi.VIRTIO_BLK_T_FLUSH, 0) == abi.VIRTIO_BLK_S_OK
    content = backend.disk.read_bytes()
    for sector, value in model.items():
        assert content[sector * SECTOR :][:SECTOR] == struct.pack("<I", value) * 128
    assert serial > 100


def test_without_a_table_of_requests_in_flight_the_driver_is_told(backend):
    backend.iops = 50
    backend.start()
    with vhost_user_guest(backend.connect()) as guest:
        guest.device._wants_inflight = False
        guest.introduce()
        guest.activate()
        for slot in range(30):
            guest.offer(slot, abi.VIRTIO_BLK_T_OUT, slot, bytes(512))
        guest.take()
        backend.kill()
        guest.wait(lambda: guest.losses)
        guest.losses.clear()
        backend.start()
        guest.device.update_files([backend.connect()])
        guest.wait(lambda: guest.losses)
        assert guest.notify.resets == ["the back end before has left requests in flight, and no table of them"]


def test_it_may_be_gone_at_any_time(backend):
    backend.start()
    before = os.listdir("/proc/self/fd")
    with vhost_user_guest(backend.connect()) as guest:
        backend.kill()
        guest.introduce()
        assert guest.losses
        guest.activate(abi.VIRTIO_F_VERSION_1)
        guest.stop()
        with pytest.raises(VhostUserError, match="the back end is gone"):
            guest.device.update_files([])
        guest.losses.clear()
        backend.start()
        guest.device.update_files([backend.connect()])
        guest.introduce()
        guest.activate()
        assert guest.request(abi.VIRTIO_BLK_T_OUT, 3, b"w" * 1024) == abi.VIRTIO_BLK_S_OK
        backend.kill()
        guest.stop()
        assert guest.device.activation is None
    assert os.listdir("/proc/self/fd") == before


def test_a_back_end_that_keeps_what_it_has_is_left(backend, monkeypatch):
    """It was stopped and gives nothing back: the machine stops all the same, and another back end goes on."""
    monkeypatch.setattr("virtio.vhost_user.block.DRAIN_NS", 50_000_000)
    backend.iops = 1
    backend.start()
    with vhost_user_guest(backend.connect()) as guest:
        guest.introduce()
        guest.activate()
        heads = [guest.offer(slot, abi.VIRTIO_BLK_T_OUT, slot, b"k" * 512) for slot in range(20)]
        guest.take()
        guest.stop()
        if guest.losses:
            assert guest.device.activation is None
            backend.iops = 0
            guest.reconnect(backend)
        guest.go_on()
        while guest.driver._offered:
            guest.take(backend)
        assert all(guest.status(slot) == abi.VIRTIO_BLK_S_OK for slot in range(len(heads)))
    assert backend.disk.read_bytes()[: 20 * 512] == b"k" * 20 * 512
