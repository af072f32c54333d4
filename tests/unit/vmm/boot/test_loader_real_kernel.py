"""Debian's own kernel: unpacked, loaded in every way, and compared with what other tools take out of it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ipc.guest_memory import GuestMemory
from tests.harness import kernel_images as images
from tests.harness.memory_fixtures import FileFactory, MemoryFactory
from vmm.boot import loader
from vmm.boot.cmdline import Cmdline

if TYPE_CHECKING:
    from lab.guest_image import GuestImage

ROOT = Path(__file__).resolve().parents[4]
MIB = 1 << 20
COMMAND_LINE = "console=ttyS0 reboot=k panic=1"

pytestmark = pytest.mark.xdist_group("real-kernel")


@pytest.fixture
def files(guest_image: GuestImage) -> Iterator[tuple[int, int, int]]:
    """Return descriptors of vmlinuz, vmlinux and initramfs."""
    opened = [os.open(path, os.O_RDONLY) for path in (guest_image.vmlinuz, guest_image.vmlinux, guest_image.initramfs)]
    yield opened[0], opened[1], opened[2]
    for fd in opened:
        os.close(fd)


def load_segments(vmlinux: bytes) -> list[tuple[int, int, int, int]]:
    """Return (file offset, file size, physical address, memory size) as readelf would list them."""
    table, count = struct.unpack_from("<Q", vmlinux, 32)[0], struct.unpack_from("<H", vmlinux, 56)[0]
    headers = struct.iter_unpack("<IIQQQQQQ", vmlinux[table : table + 56 * count])
    return [(offset, in_file, address, size) for kind, _, offset, _, address, in_file, size, _ in headers if kind == 1]


def check_segments(memory: GuestMemory, vmlinux: bytes) -> None:
    segments = load_segments(vmlinux)
    assert len(segments) >= 4
    for offset, in_file, address, size in segments:
        assert memory.read(address, in_file) == vmlinux[offset : offset + in_file]
        assert memory.read(address + in_file, size - in_file) == bytes(size - in_file)


def check_zero_page(memory: GuestMemory, image: loader.BootedImage) -> None:
    page = memory.read(image.registers.rsi, 4096)
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<II", page, 0x218) == image.initrd
    pointer = struct.unpack_from("<I", page, 0x228)[0]
    assert memory.read(pointer, len(COMMAND_LINE) + 1) == COMMAND_LINE.encode() + b"\0"
    assert struct.unpack_from("<QQI", page, 0x2D0 + 40) == (0x100000, 255 * MIB, 1)


def test_the_kernel_is_unpacked_loaded_and_ready(
    files: tuple[int, int, int], guest_image: GuestImage, guest_memory: MemoryFactory
) -> None:
    vmlinuz_fd, _, initramfs_fd = files
    memory = guest_memory(256 * MIB)
    image = loader.load_kernel(memory, vmlinuz_fd, Cmdline(COMMAND_LINE), initramfs_fd)
    vmlinux = guest_image.vmlinux.read_bytes()
    assert image.kind == "bzImage"
    assert image.note == ""
    assert image.payload is not None
    assert image.payload.unpacked_size >= load_segments(vmlinux)[-1][0]
    assert image.protocol == "Linux 64-bit"
    assert image.registers.rip == struct.unpack_from("<Q", vmlinux, 24)[0]
    check_segments(memory, vmlinux)
    check_zero_page(memory, image)
    vmlinuz = guest_image.vmlinuz.read_bytes()
    assert memory.read(0x7000 + 0x236, 2) == vmlinuz[0x236:0x238]
    initramfs = guest_image.initramfs.read_bytes()
    assert image.initrd is not None
    assert image.initrd[0] % 4096 == 0
    assert memory.read(*image.initrd) == initramfs
    assert image.kernel_end <= image.initrd[0]


@pytest.mark.parametrize(("entry", "protocol"), [("auto", "PVH"), ("linux64", "Linux 64-bit")])
def test_the_elf_kernel_is_loaded(
    entry: str, protocol: str, files: tuple[int, int, int], guest_image: GuestImage, guest_memory: MemoryFactory
) -> None:
    memory = guest_memory(256 * MIB)
    image = loader.load_kernel(memory, files[1], Cmdline(COMMAND_LINE), files[2], entry=entry)
    check_segments(memory, guest_image.vmlinux.read_bytes())
    assert image.protocol == protocol
    if protocol == "PVH":
        assert image.registers.rip == pvh_entry_by_hand(guest_image.vmlinux.read_bytes())
    else:
        check_zero_page(memory, image)


def pvh_entry_by_hand(vmlinux: bytes) -> int:
    """Find the note by its bytes: name size 4, descriptor size 8, type 18, Xen."""
    position = vmlinux.index(struct.pack("<III4s", 4, 8, 18, b"Xen\0"))
    return int(struct.unpack_from("<Q", vmlinux, position + 16)[0])


def test_the_kernel_is_loaded_as_it_is(
    files: tuple[int, int, int], guest_image: GuestImage, guest_memory: MemoryFactory
) -> None:
    memory = guest_memory(256 * MIB)
    image = loader.load_kernel(memory, files[0], Cmdline(COMMAND_LINE), files[2], unpack=False)
    vmlinuz = guest_image.vmlinuz.read_bytes()
    start = (vmlinuz[0x1F1] + 1) * 512
    assert memory.read(0x100000, len(vmlinuz) - start) == vmlinuz[start:]
    assert image.registers.rip == 0x100200
    assert image.kernel_end == 0x100_0000 + struct.unpack_from("<I", vmlinuz, 0x260)[0]
    check_zero_page(memory, image)


@pytest.mark.parametrize("kind", ["gzip", "zstd", pytest.param("xz", marks=pytest.mark.slow)])
def test_the_kernel_in_other_packings(
    kind: str, guest_image: GuestImage, guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    vmlinux = guest_image.vmlinux.read_bytes()
    vmlinuz = images.repacked(guest_image.vmlinuz.read_bytes(), images.compress(kind, vmlinux))
    memory = guest_memory(128 * MIB)
    image = loader.load_kernel(memory, open_file(vmlinuz), Cmdline(COMMAND_LINE))
    assert image.payload is not None
    assert (image.payload.compression, image.payload.unpacked_size) == (kind, len(vmlinux))
    check_segments(memory, vmlinux)


def test_zeros_of_the_kernel_take_no_memory_of_the_host(
    files: tuple[int, int, int], guest_image: GuestImage, guest_memory: MemoryFactory
) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 128 * MIB)
    from vmm import layout

    memory = GuestMemory(fd, 128 * MIB, layout.ram_regions(128 * MIB))
    loader.load_kernel(memory, files[0], Cmdline(COMMAND_LINE))
    used = os.fstat(fd).st_blocks * 512
    in_file = sum(size for _, size, _, _ in load_segments(guest_image.vmlinux.read_bytes()))
    assert used < in_file - 8 * MIB
    memory.close()
    os.close(fd)


def test_the_kernel_is_the_same_in_huge_pages(files: tuple[int, int, int], guest_image: GuestImage) -> None:
    """Entered as an ELF file and unpacked from a bzImage; with an initrd."""
    from vmm import layout

    vmlinux = guest_image.vmlinux.read_bytes()
    for kernel in files[:2]:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, 128 * MIB)
        memory = GuestMemory(fd, 128 * MIB, layout.ram_regions(128 * MIB))
        image = loader.load_kernel(memory, kernel, Cmdline(COMMAND_LINE), files[2], huge_pages=True)
        check_segments(memory, vmlinux)
        assert image.initrd is not None
        assert memory.read(*image.initrd) == guest_image.initramfs.read_bytes()
        if "huge pages" in dict(image.timings):  # Linux 6.1
            # Kernel and initrd, rounded to huge pages, and what the guest takes first: 20 of 128 MiB.
            taken = os.fstat(fd).st_blocks * 512
            rounded = image.kernel_end - image.kernel_start + image.initrd[1] + 20 * MIB
            assert rounded < taken < rounded + 12 * MIB
        memory.close()
        os.close(fd)


MEMORY_PROGRAM = """
import os, sys
from vmm import layout
from vmm.boot import loader
from vmm.boot.cmdline import Cmdline
from ipc.guest_memory import GuestMemory

def anonymous():
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Pss_Anon"))

loader.warm()
memfd = os.memfd_create("guest")
os.ftruncate(memfd, 128 << 20)
memory = GuestMemory(memfd, 128 << 20, layout.ram_regions(128 << 20))
kernel = os.open(sys.argv[1], os.O_RDONLY)
before = anonymous()
image = loader.load_kernel(memory, kernel, Cmdline())
assert image.payload is not None
print(anonymous() - before)
"""


@pytest.mark.parametrize("kind", [pytest.param("gzip", marks=pytest.mark.slow), "zstd", "lz4"])
def test_unpacking_gives_its_memory_back(kind: str, guest_image: GuestImage, tmp_path: Path) -> None:
    payload = images.compress(kind, guest_image.vmlinux.read_bytes())
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(images.repacked(guest_image.vmlinuz.read_bytes(), payload))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(kernel)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # lz4 works in blocks of 8 MiB and zstd in a window of the kernel's size; nothing of that may stay (KiB).
    assert int(done.stdout) < 2048
