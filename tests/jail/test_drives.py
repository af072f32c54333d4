"""Drives of a jailed machine: opened by the controller in the jail root, served by a device cell, driven by a guest."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.jail import GID, UID, JailedMicrovm, id_of, is_alive, microvm, wait_for
from tests.harness.mailbox_guest import BlockDriver, MailboxGuest
from tests.harness.run_options import SOAK
from virtio import abi
from vmm.layout import COMMAND_LINE_ADDRESS, COMMAND_LINE_SIZE, MAX_VIRTIO_MMIO_DEVICES

OK, IOERR, UNSUPP = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR, abi.VIRTIO_BLK_S_UNSUPP
SECTORS = 2048


def pattern(sectors: int = SECTORS, seed: int = 0) -> bytes:
    """Return content in which every sector is another one."""
    return b"".join((number + seed).to_bytes(4, "little") * 128 for number in range(sectors))


class Drives:
    """A jailed machine with drives, and their drivers."""

    def __init__(self, jail: JailedMicrovm) -> None:
        self.jail = jail
        self.configs: list[dict[str, Any]] = []
        self.launched = False
        self.guest: MailboxGuest

    def file(self, name: str, content: bytes | None = None) -> Path:
        """Make a file in the jail root."""
        path = self.jail.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pattern() if content is None else content)
        os.chown(path, UID, GID)
        return path

    def add(self, drive_id: str, **config: Any) -> Path:
        """Configure a drive with a file of its own."""
        path = self.file(f"{drive_id}.img")
        body = {"drive_id": drive_id, "is_root_device": False, "path_on_host": f"/{path.name}", **config}
        self.configs.append(body)
        return path

    def launch(self) -> None:
        """Start the program, without a machine."""
        self.jail.add_guest("mailbox")
        self.jail.start().wait_up()
        self.launched = True

    def start(self, **machine: Any) -> None:
        """Start the machine with the mailbox guest."""
        if not self.launched:
            self.launch()
        for body in self.configs:
            self.must("PUT", f"/drives/{body['drive_id']}", body)
        self.jail.boot("mailbox", **machine)
        self.guest = MailboxGuest(self.jail.wait_cells("vmm", "device 0")["vmm"])

    def must(self, method: str, target: str, body: Any = None) -> Any:
        reply = self.jail.api(method, target, body)
        assert reply.status < 300, (target, reply.body, self.jail.describe())
        return reply.body

    def refused(self, method: str, target: str, body: Any) -> str:
        reply = self.jail.api(method, target, body)
        assert reply.status == 400, (target, reply, self.jail.describe())
        return str(reply.body["fault_message"])


@pytest.fixture
def drives(base: Path) -> Iterator[Drives]:
    with microvm(base, arguments=()) as jail:
        made = Drives(jail)
        yield made
        if hasattr(made, "guest"):
            made.guest.close()


@pytest.mark.parametrize("io_engine", ["Sync", "Async"])
def test_a_guest_reads_writes_and_flushes(drives, io_engine):
    path = drives.add("data", io_engine=io_engine, cache_type="Writeback")
    drives.start()
    driver = BlockDriver(drives.guest).begin()
    assert driver.sectors == SECTORS
    assert driver.read_sectors(0, 8) == pattern()[: 8 << 9]
    assert driver.read_sectors(SECTORS - 1) == pattern()[-512:]
    data = os.urandom(16 << 9)
    assert driver.write_sectors(100, data) == OK
    assert driver.flush() == OK
    assert path.read_bytes() == pattern()[: 100 << 9] + data + pattern()[116 << 9 :]
    status = path.stat()
    assert driver.identity() == f"{status.st_dev}{status.st_rdev}{status.st_ino}".encode()[:20].ljust(20, b"\0")
    assert driver.ask(abi.VIRTIO_BLK_T_IN, SECTORS, 512) == IOERR


def test_a_read_only_drive_is_opened_for_reading_alone(drives):
    path = drives.add("data", is_read_only=True)
    path.chmod(0o444)
    os.chown(path, 0, 0)
    drives.start()
    driver = BlockDriver(drives.guest)
    assert driver.offered() & abi.VIRTIO_BLK_F_RO
    driver.begin()
    assert driver.read_sectors(1) == pattern()[512:1024]
    assert driver.write_sectors(1, bytes(512)) in (IOERR, UNSUPP)
    assert path.read_bytes() == pattern()


@pytest.mark.parametrize(
    ("config", "parameter"),
    [
        ({}, "root=/dev/vda rw"),
        ({"is_read_only": True}, "root=/dev/vda ro"),
        ({"partuuid": "0eaa91a0-01"}, "root=PARTUUID=0eaa91a0-01 rw"),
    ],
)
def test_the_root_device_is_the_first_and_the_kernel_is_told(drives, config, parameter):
    drives.add("data")
    drives.file("root.img", pattern(64, seed=7))
    root = {"drive_id": "root", "is_root_device": True, "path_on_host": "/root.img", **config}
    drives.configs.append(root)
    drives.start()
    line = drives.guest.memory.read(COMMAND_LINE_ADDRESS, COMMAND_LINE_SIZE).partition(b"\0")[0].decode()
    assert line == (f"0 pci=off {parameter} virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6")
    first, second = BlockDriver(drives.guest).begin(), BlockDriver(drives.guest, 1).begin()
    assert (first.sectors, second.sectors) == (64, SECTORS)
    assert first.read_sectors(3) == pattern(64, seed=7)[3 << 9 : 4 << 9]
    assert second.read_sectors(3) == pattern()[3 << 9 : 4 << 9]


@pytest.mark.parametrize("io_engine", ["Sync", "Async"])
def test_another_file_another_size_while_it_runs(drives, io_engine):
    drives.add("data", io_engine=io_engine)
    drives.start()
    driver = BlockDriver(drives.guest).begin()
    driver.read_sectors(0)
    other = drives.file("other.img", pattern(4096, seed=99) + b"cut")
    before = drives.guest.interrupts(0)
    drives.must("PATCH", "/drives/data", {"drive_id": "data", "path_on_host": "/other.img"})
    wait_for(lambda: drives.guest.interrupts(0).config_changes > before.config_changes, "the configuration interrupt")
    assert driver.sectors == 4096
    assert driver.read_sectors(4095) == pattern(4096, seed=99)[-512:]
    assert driver.write_sectors(9, b"n" * 512) == OK
    assert other.read_bytes()[9 << 9 : 10 << 9] == b"n" * 512
    assert (drives.jail.root / "data.img").read_bytes() == pattern()
    (shown,) = drives.must("GET", "/vm/config")["drives"]
    assert shown["path_on_host"] == "/other.img"
    assert "Disk size 2097155 is not a multiple of sector size 512" in drives.jail.output()


def test_a_change_that_is_refused_changes_nothing(drives):
    drives.add("data")
    drives.start()
    driver = BlockDriver(drives.guest).begin()
    (drives.jail.root / "folder").mkdir(mode=0o777)
    os.mkfifo(drives.jail.root / "fifo")
    (drives.jail.root / "fifo").chmod(0o666)
    locked = drives.file("locked.img")
    prefix = "Drive config error: Unable to patch the block device: Block: "
    backing = f"{prefix}Virtio backend error: Error manipulating the backing file: "
    suffix = " Please verify the request arguments."
    with locked.open("r+b") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        for path, text in (
            ("/nix", "No such file or directory (os error 2) /nix"),
            ("/folder", "Is a directory (os error 21) /folder"),
            ("/fifo", "not a regular file /fifo"),
            ("/locked.img", "Resource temporarily unavailable (os error 11) /locked.img"),
        ):
            body = {"drive_id": "data", "path_on_host": path}
            assert drives.refused("PATCH", "/drives/data", body) == f"{backing}{text}{suffix}"
    refusal = f"{prefix}Running method expected different backend.{suffix}"
    assert drives.refused("PATCH", "/drives/data", {"drive_id": "data"}) == refusal
    missing = drives.refused("PATCH", "/drives/b", {"drive_id": "b", "path_on_host": "/data.img"})
    assert missing == (
        "Drive config error: Unable to patch the block device: Failed perform action on device: Device not found"
        f"{suffix}"
    )
    (shown,) = drives.must("GET", "/vm/config")["drives"]
    assert shown["path_on_host"] == "/data.img"
    assert driver.read_sectors(5) == pattern()[5 << 9 : 6 << 9]
    assert drives.guest.interrupts(0).config_changes == 0


@pytest.mark.parametrize("io_engine", ["Sync", "Async"])
def test_a_file_that_became_shorter_is_an_io_error(drives, io_engine):
    path = drives.add("data", io_engine=io_engine)
    drives.start()
    driver = BlockDriver(drives.guest).begin()
    os.truncate(path, 100 << 9)
    assert driver.read_sectors(99) == pattern()[99 << 9 : 100 << 9]
    assert driver.ask(abi.VIRTIO_BLK_T_IN, 100, 512) == IOERR
    assert driver.ask(abi.VIRTIO_BLK_T_IN, 98, 4 << 9) == IOERR
    assert driver.read_sectors(0) == pattern()[:512]


def test_the_start_names_what_is_wrong_with_a_file(drives):
    """The file is looked at when it is configured, and again at the start, which can be repeated."""
    path = drives.add("data")
    drives.launch()
    drives.must("PUT", "/drives/data", drives.configs[0])
    drives.must("PUT", "/boot-source", {"kernel_image_path": "/kernel"})
    drives.must("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
    path.rename(path.with_suffix(".away"))
    start = {"action_type": "InstanceStart"}
    create = "Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: "
    refusal = drives.refused("PUT", "/actions", start)
    assert refusal == f"Start microvm error: {create}No such file or directory (os error 2) /data.img"
    path.with_suffix(".away").rename(path)
    drives.must("PUT", "/actions", start)


def test_more_drives_than_windows_are_refused_at_the_start(drives):
    for number in range(MAX_VIRTIO_MMIO_DEVICES + 1):
        drives.add(f"d{number}")
    with pytest.raises(AssertionError, match=r"Start microvm error: .*Could not allocate GSI"):
        drives.start()


def test_additions_are_off_unless_they_are_asked_for(drives):
    plain = drives.add("plain")
    path = drives.add("more", discard=True, num_queues=2)
    drives.start(vcpu_count=1)
    plain_driver, driver = BlockDriver(drives.guest), BlockDriver(drives.guest, 1)
    extras = abi.VIRTIO_BLK_F_DISCARD | abi.VIRTIO_BLK_F_WRITE_ZEROES | abi.VIRTIO_BLK_F_MQ
    assert plain_driver.offered() & (extras | abi.VIRTIO_BLK_F_FLUSH) == 0
    assert driver.offered() & extras == extras
    plain_driver.begin()
    driver.begin(queues=2)
    assert driver.zero(abi.VIRTIO_BLK_T_DISCARD, [(8, 1024, 0)]) == OK
    assert driver.read_sectors(8, 8) == bytes(8 << 9)
    assert path.stat().st_blocks < SECTORS
    assert driver.zero(abi.VIRTIO_BLK_T_WRITE_ZEROES, [(2000, 8, 0)]) == OK
    assert path.read_bytes()[2000 << 9 : 2008 << 9] == bytes(8 << 9)
    assert driver.write_sectors(5, b"q" * 512, queue=1) == OK
    assert driver.read_sectors(5, queue=1) == b"q" * 512
    assert plain_driver.zero(abi.VIRTIO_BLK_T_DISCARD, [(8, 1024, 0)]) == UNSUPP
    assert plain.read_bytes() == pattern()
    shown = {each["drive_id"]: each for each in drives.must("GET", "/vm/config")["drives"]}
    assert "discard" not in shown["plain"]
    assert (shown["more"]["discard"], shown["more"]["num_queues"]) == (True, 2)


def test_metrics_of_each_drive_and_of_all(drives):
    drives.file("metrics", b"")
    drives.add("a", cache_type="Writeback")
    drives.add("b", io_engine="Async")
    drives.launch()
    drives.must("PUT", "/metrics", {"metrics_path": "/metrics"})
    drives.start()
    first, second = BlockDriver(drives.guest).begin(), BlockDriver(drives.guest, 1).begin()
    first.read_sectors(0, 4)
    first.write_sectors(8, bytes(512))
    first.flush()
    second.read_sectors(0)
    second.ask(abi.VIRTIO_BLK_T_IN, SECTORS, 512)
    drives.must("PATCH", "/drives/b", {"drive_id": "b", "path_on_host": "/a.img"})

    def line() -> dict[str, Any]:
        drives.must("PUT", "/actions", {"action_type": "FlushMetrics"})
        return dict(json.loads((drives.jail.root / "metrics").read_text().splitlines()[-1]))

    shown = line()
    a, b, both = shown["block_a"], shown["block_b"], shown["block"]
    assert (a["read_count"], a["read_bytes"], a["write_count"], a["write_bytes"]) == (1, 4 << 9, 1, 512)
    assert (a["flush_count"], a["queue_event_count"] > 0, a["update_count"]) == (1, True, 0)
    assert (b["read_count"], b["read_bytes"], b["invalid_reqs_count"], b["update_count"]) == (1, 512, 1, 1)
    assert a["read_agg"]["sum_us"] >= 0
    for key, value in both.items():
        if isinstance(value, int):
            assert value == a[key] + b[key], key
    assert {line()["block_a"]["read_count"], line()["block"]["write_count"]} == {0}


def test_an_overlay_takes_what_is_written_and_is_there_again(drives, base):
    path = drives.add("data", overlay={"path": "/data.overlay"})
    drives.start()
    driver = BlockDriver(drives.guest).begin()
    assert driver.sectors == SECTORS
    assert driver.write_sectors(5, b"w" * 512) == OK
    assert driver.flush() == OK
    assert driver.read_sectors(5) == b"w" * 512
    assert driver.read_sectors(6) == pattern()[6 << 9 : 7 << 9]
    other = {"drive_id": "data", "path_on_host": "/data.img"}
    assert "keeps its files" in drives.refused("PATCH", "/drives/data", other)
    (shown,) = drives.must("GET", "/vm/config")["drives"]
    assert shown["overlay"] == {"path": "/data.overlay"}
    assert path.read_bytes() == pattern()
    os.kill(drives.jail.pid, 15)
    drives.jail.process.wait(30)
    with microvm(base, microvm_id=id_of(base, "again"), arguments=()) as jailed:
        again = Drives(jailed)
        again.file("data.img", pattern())
        shutil.copy(drives.jail.root / "data.overlay", jailed.root / "data.overlay")
        os.chown(jailed.root / "data.overlay", UID, GID)
        again.configs = drives.configs
        again.start()
        driver = BlockDriver(again.guest).begin()
        assert driver.read_sectors(5) == b"w" * 512
        assert driver.read_sectors(7) == pattern()[7 << 9 : 8 << 9]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"is_read_only": True}, "Invalid block config"),
        ({"overlay": {"path": "/no/such"}}, "No such file"),
        ({"overlay": {"path": "/data.img"}}, "data.img"),
    ],
)
def test_an_overlay_that_cannot_be_is_refused_when_it_is_configured(drives, body, text):
    drives.file("data.img", pattern())
    drives.launch()
    config = {"drive_id": "data", "is_root_device": False, "path_on_host": "/data.img", "overlay": {"path": "/o"}}
    assert text in drives.refused("PUT", "/drives/data", {**config, **body})


def _record(sequence: int) -> bytes:
    body = sequence.to_bytes(8, "little") + bytes([sequence & 0xFF]) * 500
    return body + zlib.crc32(body).to_bytes(4, "little")


class SequenceWriter:
    """Writes numbered records, some at a time, each to the next sector; knows which were acknowledged."""

    DEPTH = 8

    def __init__(self, driver: BlockDriver, acknowledged: dict[int, int], sequence: int) -> None:
        self.driver = driver
        self.acknowledged = acknowledged
        self.sequence = sequence
        #: Sector → sequence number that is there or on its way.
        self.latest = dict(acknowledged)
        self.in_flight: dict[int, tuple[int, int, int]] = {}
        self.free = list(range(self.DEPTH))

    def write(self) -> None:
        """Offer as many records as there is room for."""
        queue = self.driver.queues[0]
        while self.free:
            slot, sector = self.free.pop(), self.sequence % SECTORS
            self.driver.guest.memory.write(self.driver.buffer(slot), _record(self.sequence))
            head = self.driver.write_request(abi.VIRTIO_BLK_T_OUT, sector, 512, slot)
            queue.offer(head)
            self.in_flight[head] = (slot, sector, self.sequence)
            self.latest[sector] = self.sequence
            self.sequence += 1
        self.driver.publish()

    def take(self) -> int:
        """Note what was acknowledged; return how many records that were."""
        found = self.driver.queues[0].take_used()
        for used in found:
            slot, sector, sequence = self.in_flight.pop(used.head)
            assert self.driver.status(slot) == OK
            self.driver.queues[0].free(used.head)
            self.free.append(slot)
            self.acknowledged[sector] = sequence
        return len(found)


def _wait_dead(pid: int) -> None:
    wait_for(lambda: not is_alive(pid), f"the end of cell {pid}")


def _sequence_of(sector: bytes) -> int:
    assert zlib.crc32(sector[:508]) == int.from_bytes(sector[508:], "little"), "a record is torn"
    return int.from_bytes(sector[:8], "little")


@pytest.mark.parametrize("io_engine", ["Sync", "Async"])
def test_every_acknowledged_write_is_there_when_the_controller_was_killed(base, io_engine, scale):
    """By number and CRC; read by the guest of the next machine, and so on."""
    acknowledged: dict[int, int] = {}
    content = b"".join(_record(number) for number in range(SECTORS))
    sequence = SECTORS
    for number in range(scale(3, 200)):
        with microvm(base, microvm_id=id_of(base, str(number)), arguments=()) as jail:
            drives = Drives(jail)
            path = drives.add("data", io_engine=io_engine)
            path.write_bytes(content)
            drives.start()
            driver = BlockDriver(drives.guest).begin()
            for sector, least in list(acknowledged.items())[:: max(1, len(acknowledged) // 16)]:
                assert _sequence_of(driver.read_sectors(sector)) >= least
            writer = SequenceWriter(driver, acknowledged, sequence)
            cells, taken, enough = jail.cells(), 0, 200 + 37 * number
            while taken < enough:
                writer.write()
                taken += writer.take()
            writer.write()
            os.kill(cells["vmm"], signal.SIGKILL)
            for cell in cells.values():
                _wait_dead(cell)
            writer.take()
            content, sequence = path.read_bytes(), writer.sequence
            for sector, least in acknowledged.items():
                found = _sequence_of(content[sector << 9 : sector + 1 << 9])
                assert least <= found <= writer.latest[sector], f"sector {sector}"
            drives.guest.close()


@pytest.mark.parametrize("limiter", ["ops", "bandwidth"])
def test_a_rate_limit_holds(drives, limiter, scale):
    """Never more than it allows; in a soak also not less, within a tenth, over a minute."""
    size, burst, rate = 20, 30, 200
    unit = 1 if limiter == "ops" else 512
    bucket = {"size": size * unit, "one_time_burst": burst * unit, "refill_time": 1000 * size // rate}
    drives.add("data", rate_limiter={limiter: bucket})
    drives.start()
    driver = BlockDriver(drives.guest).begin()
    count = scale(2, 60) * rate
    for slot in range(4):
        driver.queues[0].offer(driver.write_request(abi.VIRTIO_BLK_T_IN, slot, 512, slot))
    begun = time.monotonic()
    assert driver.repeat(count).chains >= count
    elapsed = time.monotonic() - begun
    expected = (count - size - burst) / rate
    assert elapsed >= 0.9 * expected
    assert not SOAK or elapsed <= 1.1 * expected
    none = {limiter: {"size": 0, "refill_time": 0}}
    drives.must("PATCH", "/drives/data", {"drive_id": "data", "rate_limiter": none})
    (shown,) = drives.must("GET", "/vm/config")["drives"]
    assert shown["rate_limiter"] is None
