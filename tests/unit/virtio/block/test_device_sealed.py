"""The block device behind the filters of a device cell: made under the first, served under the second, in every way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from devtool.project import ROOT
from tests.harness.drives import WAYS

SERVE = """
import ctypes, os, struct, sys
from base.native_loops import load
from jailer.seccomp import install
from tests.harness.drives import WAYS, Drive, backing_file, pattern
from tests.harness.event_loop import run_until
from tests.harness.virtqueues import guest_memory
from virtio import abi
from virtio.block.configuration import BlockSettings
from virtio.block.device import Block

way, write_through = sys.argv[1], sys.argv[2] == "write-through"
load() if way == "extension" else None
filters = install.load(("device-setup", "device"), "kill").filters
file, other = backing_file(), backing_file(b"n" * 4096)
twice = [os.dup(other.fd)]
with guest_memory() as memory:
    assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    install.install(filters["device-setup"])
    device = Block("drive", WAYS[way](file), BlockSettings(writeback=True, discard=True))
    features = device.features() & ~(abi.VIRTIO_BLK_F_FLUSH if write_through else 0)
    made = Drive(device, memory, features, 64)
    made.activate()
    install.install(filters["device"])
    for sector in range(8):
        assert made.read(sector, 4) == pattern()[sector << 9 : sector + 4 << 9]
    for sector in range(8):
        assert made.write(sector, bytes([sector]) * 1024) == 0
    assert bool(device._takes) == (way == "extension" and not write_through)
    assert made.ask(abi.VIRTIO_BLK_T_FLUSH, 0) == 0
    for type, flags in ((11, 0), (13, 0), (13, 1)):  # DISCARD, WRITE_ZEROES without and with unmap
        assert made.zero(type, struct.pack("<QII", 8 * flags, 8, flags)) == 0
    os.pwrite(file.fd, b"e" * 512, 0)
    assert made.read(0) == b"e" * 512
    deferral = device.update_files(twice)
    if deferral is not None:
        run_until(made.events, lambda: deferral.done)
    assert made.read(7) == b"n" * 512
    assert made.ask(abi.VIRTIO_BLK_T_IN, 8, []) == abi.VIRTIO_BLK_S_OK
    made.restart()
    assert made.read(7) == b"n" * 512
    assert device.collect().values["update_count"] == 1
    os.write(1, b"served")
    os._exit(0)
"""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["with flushes", "write-through"])
def test_it_needs_no_more_than_its_filters_allow(way, how):
    command = [sys.executable, "-c", SERVE, way, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "served"), done.stderr
