"""fio in Debian on a drive of its own: what a request costs when many are under way; device cells killed meanwhile."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.harness.debian_disk import DEVICE_CELL, debian, drive, empty_disk, folder_of_disks
from tests.harness.run_options import SOAK

pytestmark = [pytest.mark.timeout(0 if SOAK else 900), pytest.mark.soak("block")]
NAME = "disk-load"
FIO = "fio --name=load --filename=/dev/vdb --size=32M --direct=1 --ioengine=libaio --bs=4k --minimal --time_based"
#: Of each: for a hundred requests.
MOST = 0.05


@pytest.fixture(scope="module")
def guest(guest_image, debian_disk):
    machine = {"vcpu_count": 1, "mem_size_mib": 512}
    with folder_of_disks(NAME) as disks:
        data = drive(empty_disk(disks / "data", 32 << 20))
        root = debian_disk.copy_to(disks / "root.ext4")
        with debian(NAME, guest_image, root, machine, [data]) as booted:
            yield booted
            booted.end()


def figures(guest) -> tuple[int, int, int]:
    """Return how many exits to a worker, kicks of the data drive and requests on it there were until now."""
    (device,) = [each for each in guest.microvm.must("GET", "/devices") if each["id"] == "data"]
    exits = sum(vcpu["exits"] for vcpu in guest.microvm.must("GET", "/vcpus"))
    counters = device["counters"]
    return exits, counters["queue_event_count"], counters["read_count"] + counters["write_count"]


def reached(guest, requests: int) -> tuple[int, int, int]:
    """Wait until there were so many requests; return the figures then."""
    deadline = time.monotonic() + 600.0
    while (now := figures(guest))[2] < requests:
        assert time.monotonic() < deadline, now
        guest.microvm.pump(0.5)
    return now


def test_random_reads_cost_neither_exits_nor_kicks(guest, scale):
    """Nothing is said on the console while it is counted: each letter would be an exit.

    Requests are handed over in batches: the lab's guest takes longer from an interrupt to its next request than a
    device looks at a ring before it sleeps.
    """
    batches = "--iodepth=64 --iodepth_batch_submit=32 --iodepth_batch_complete_min=32"
    number = guest.agent.start(f"{FIO} --rw=randread {batches} --runtime=600")
    begun = reached(guest, figures(guest)[2] + 500)
    last = reached(guest, begun[2] + scale(2000, 50_000))
    guest.agent.kill(number, signal.SIGINT)  # fio ends in order
    result = guest.agent.wait(number)
    assert result.stderr == "", result
    exits, kicks, requests = (now - then for now, then in zip(last, begun, strict=True))
    print(f"{requests} random reads of 4 KiB: {exits / requests:.4f} exits, {kicks / requests:.4f} kicks per request")
    assert exits / requests < MOST
    assert kicks / requests < MOST


def test_fio_verifies_what_it_wrote_while_device_cells_are_killed(guest, scale, seed):
    generator = random.Random(seed)
    options = "--rw=randwrite --iodepth=8 --fsync=4 --verify=crc32c --verify_fatal=1"
    number = guest.agent.start(f"{FIO} {options} --runtime={scale(20, 600)}")
    for _ in range(scale(5, 200)):
        guest.microvm.pump(0.5 + generator.random())
        guest.kill(DEVICE_CELL)
    result = guest.agent.wait(number, 900.0)
    assert result.status == 0, result
