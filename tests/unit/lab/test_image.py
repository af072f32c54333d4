"""The parts that lab and guest images are made of; the guest image itself boots under QEMU."""

from __future__ import annotations

import io
import subprocess
import urllib.parse
from pathlib import Path

import pytest

from devtool.project import DevError
from lab import guest_image
from lab.cpio import CpioWriter
from lab.debian import ensure_kernel, module_order
from lab.tsc import host_tsc_khz
from lab.vmlinux import unpack
from tests.harness.qemu import qemu

BOOT_SECONDS = 120


def boot(image, parameters, **options):
    """Boot a guest until it reboots; returns its console."""
    command = qemu(image, parameters, **options)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=BOOT_SECONDS, check=True)
    return done.stdout.decode().replace("\r\n", "\n")  # a terminal's line ends


@pytest.mark.slow
def test_commands_on_the_kernel_command_line(guest_image):
    parameters = command_line('echo "a%b  \\c" $((6 * 7)); lsmod; exit 3', end="reboot")
    console = boot(guest_image, parameters, devices=["-device", "virtio-rng-device"])
    assert "CELLBLOCK-INIT uptime=" in console
    assert "CELLBLOCK-RUN begin cellblock.run\n" in console
    assert "a%b  \\c 42\n" in console
    assert "virtio_rng" in console  # the driver of a device that is there
    assert "virtio_blk" not in console  # and no other
    assert "CELLBLOCK-RUN end status=3\n" in console
    assert "CELLBLOCK-DONE uptime=" in console


@pytest.mark.slow
def test_script_on_a_disk_and_in_an_appended_archive(guest_image, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"echo from the disk\n".ljust(4096, b"\0"))
    initramfs = tmp_path / "initramfs"
    more = {"cellblock/script": b"cat /some/file; cat /proc/modules | wc -l", "some/file": b"from the archive\n"}
    initramfs.write_bytes(guest_image.initramfs.read_bytes() + archive(more))
    devices = ["-drive", f"file={disk},format=raw,if=none,id=d", "-device", "virtio-blk-device,drive=d"]
    parameters = command_line(script="/dev/vda", modules="overlay")
    console = boot(guest_image, parameters, initramfs=initramfs, devices=devices, kernel=guest_image.vmlinuz)
    assert "CELLBLOCK-RUN begin /dev/vda\nfrom the disk\nCELLBLOCK-RUN end status=0\n" in console
    assert "CELLBLOCK-RUN begin /cellblock/script\nfrom the archive\n5\nCELLBLOCK-RUN end status=0\n" in console


@pytest.mark.slow
def test_commands_from_the_console(guest_image):
    with subprocess.Popen(qemu(guest_image, ""), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        try:
            seen = ""
            while "CELLBLOCK-READY" not in seen:  # what is typed before is lost, as on a real serial line
                seen = guest.stdout.readline()
                assert seen, "the guest ended early"
            guest.stdin.write("echo $((40 + 2)); false\nexit\n")
            guest.stdin.flush()
            rest = guest.stdout.read()
        finally:
            guest.kill()
    assert "\n42\nCELLBLOCK-RUN end status=1\n" in rest
    assert "CELLBLOCK-DONE" in rest


command_line, archive = guest_image.command_line, guest_image.archive


def test_command_line_holds_no_blanks_and_can_be_decoded():
    run = "echo 'two  words' > /dev/null; # 100%"
    parameters = command_line(run, end="stay")
    assert parameters.split(" ") == ["cellblock.run=" + urllib.parse.quote(run, safe=""), "cellblock.end=stay"]
    assert urllib.parse.unquote(parameters.split()[0].partition("=")[2]) == run
    assert command_line() == ""


def test_tsc_rate_is_the_one_the_kernel_found():
    """The kernel shows the rate of a constant TSC as the clock of each processor, unless it scales the clock."""
    shown = [float(line.partition(":")[2]) for line in Path("/proc/cpuinfo").read_text().splitlines() if "MHz" in line]
    measured = host_tsc_khz() / 1000
    scaled = Path("/sys/devices/system/cpu/cpu0/cpufreq").exists()
    assert 100 < measured < 10_000 if scaled else measured == pytest.approx(shown[0], rel=1e-3)


def test_cpio_is_read_by_the_real_cpio(tmp_path):
    output = io.BytesIO()
    writer = CpioWriter(output)
    writer.file("a/b/odd", b"123", 0o600)
    writer.file("a/b/empty", b"")
    writer.link("a/link", "b/odd")
    writer.close()
    subprocess.run(["cpio", "-i", "--quiet", "--make-directories"], input=output.getvalue(), cwd=tmp_path, check=True)
    assert (tmp_path / "a/link").read_bytes() == b"123"
    assert (tmp_path / "a/b/odd").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a/b/empty").read_bytes() == b""


def test_modules_come_after_what_they_need(guest_image):
    kernel = ensure_kernel("linux-image-cloud-amd64")
    order = [path.stem for path in module_order(kernel, ["virtio_net", "ext4", "virtio-rng", "virtio_net"])]
    assert len(order) == len(set(order))
    assert order.index("virtio_ring") < order.index("virtio") < order.index("virtio_net")
    assert order.index("failover") < order.index("net_failover") < order.index("virtio_net")
    assert "virtio-rng" in order
    with pytest.raises(DevError, match="no module no_such_thing"):
        module_order(kernel, ["no_such_thing"])


def test_what_is_no_kernel_is_refused(tmp_path, guest_image):
    bad = tmp_path / "bad"
    bad.write_bytes(b"MZ" + bytes(1024))
    with pytest.raises(DevError, match="is no bzImage"):
        unpack(bad)
    image = bytearray(guest_image.vmlinuz.read_bytes())
    start = (image[0x1F1] + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    image[start : start + 4] = b"what"
    bad.write_bytes(image)
    with pytest.raises(DevError, match="packed in an unknown way"):
        unpack(bad)


def test_the_unpacked_kernel_is_the_packed_one(guest_image):
    assert unpack(guest_image.vmlinuz) == guest_image.vmlinux.read_bytes()
