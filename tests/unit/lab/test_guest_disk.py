"""The guest's disk: made, copied, and booted under QEMU's own microvm until it is off; then checked from outside."""

from __future__ import annotations

import os
import subprocess

import pytest

from devtool.project import DevError
from lab import guest_disk
from lab.client import Microvm
from lab.guest_agent import Agent
from lab.guest_disk import GuestDisk, digest_of
from tests.harness.qemu import qemu

LOGIN_SECONDS = 240.0


@pytest.fixture(scope="module")
def disk():
    return guest_disk.ensure()


def sparse(path, *parts: tuple[int, bytes], size: int) -> GuestDisk:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
    extents = tuple((offset, len(data)) for offset, data in parts)
    return GuestDisk(path, extents, digest_of(path), {})


def test_a_copy_is_equal_and_as_sparse(tmp_path):
    made = sparse(tmp_path / "disk", (0, b"a" * 3_000_000), (40 << 20, b"b" * 4096), size=64 << 20)
    copy = made.copy_to(tmp_path / "copy")
    assert digest_of(copy) == made.sha256
    assert copy.stat().st_blocks <= made.path.stat().st_blocks + 16 < 8 << 20 >> 9


def test_a_disk_that_was_cut_short_is_an_error(tmp_path):
    made = sparse(tmp_path / "disk", (0, b"a" * 8192), size=8192)
    os.truncate(made.path, 4096)
    with pytest.raises(DevError, match="cut short"):
        made.copy_to(tmp_path / "copy")


@pytest.mark.slow
def test_the_extents_hold_all_that_is_not_zero(disk):
    with disk.path.open("rb") as file:
        at = 0
        for offset, length in (*disk.extents, (disk.path.stat().st_size, 0)):
            while at < offset:
                part = file.read(min(1 << 20, offset - at))
                assert not part.strip(b"\0")
                at += len(part)
            at = file.seek(offset + length)
    assert at == guest_disk.SIZE_MIB << 20


@pytest.mark.slow
def test_a_package_that_does_not_exist_is_one_clear_error(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CELLBLOCK_CACHE", str(tmp_path))
    assert guest_disk.main(["--package", "no-such-package-anywhere"]) == 1
    said = capfd.readouterr().err
    assert "no-such-package-anywhere" in said
    assert "error: making a root file system of Debian" in said.splitlines()[-1]
    assert "Is a Debian mirror reachable?" in said.splitlines()[-1]
    assert not list((tmp_path / "disks").iterdir())


@pytest.mark.slow
def test_debian_boots_from_it_to_a_login_prompt_works_and_goes_off_clean(guest_image, disk, tmp_path):
    copy = disk.copy_to(tmp_path / "root.ext4")
    devices = ["-drive", f"file={copy},format=raw,if=none,id=d", "-device", "virtio-blk-device,drive=d"]
    with Microvm(qemu(guest_image, "root=/dev/vda rw", devices=devices), tmp_path / "none") as guest:
        guest.expect(" login: ", LOGIN_SECONDS, to_line_end=False)
        agent = Agent.log_in(guest)
        assert 'PRETTY_NAME="Debian' in agent.must("cat /etc/os-release")
        for program in ("fio", "iperf3", "socat", "sshd", "e2fsck"):
            agent.must(f"command -v {program}")
        assert agent.must("systemctl is-system-running --wait") == "running\n"
        agent.must("apt-get -q -y install /srv/packages/hello_*.deb && sync")
        assert agent.must("hello") == "Hello, world!\n"
        agent.start("systemctl reboot")  # QEMU's microvm cannot power off
        guest.wait(120.0)
    check = subprocess.run(["e2fsck", "-f", "-n", copy], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
    shown = subprocess.run(["debugfs", "-R", "stat /usr/bin/hello", copy], capture_output=True, text=True, check=True)
    assert "Type: regular" in shown.stdout
    assert digest_of(disk.path) == disk.sha256
