"""load_kernel: every way into a kernel, the initrd, the cache, and what failures leave behind."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest

from ipc.guest_memory import GuestMemory
from tests.guests.build import build
from tests.harness import kernel_images as images
from tests.harness.memory_fixtures import FileFactory, MemoryFactory
from vmm import layout
from vmm.boot import loader
from vmm.boot.cmdline import Cmdline
from vmm.boot.errors import CmdlineError, InitrdError, KernelError
from vmm.boot.image_file import Hasher, digest_of_file
from vmm.boot.image_memory import ImageMemory
from vmm.layout import LayoutError

MIB = 1 << 20
KERNEL = images.small_kernel()


def load(memory: GuestMemory, kernel_fd: int, **options: object) -> loader.BootedImage:
    return loader.load_kernel(memory, kernel_fd, Cmdline("console=ttyS0"), **options)  # type: ignore[arg-type]


def check_kernel_is_loaded(memory: GuestMemory) -> None:
    assert memory.read(0x100_0000, 512) == bytes(range(256)) * 2
    assert memory.read(0x120_0000, 5) == b"\xabdata"
    assert memory.read(0x120_0000 + 5005, 11) == b"end of data"
    assert memory.read(0x20000, 14) == b"console=ttyS0\0"
    assert memory.read(0xE0000, 8) == b"RSD PTR "


def is_empty(memory: GuestMemory) -> bool:
    return all(memory.read(region.guest_address, region.size) == bytes(region.size) for region in memory.regions)


def test_an_elf_kernel_is_entered_by_pvh(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    memory = guest_memory(32 * MIB)
    image = load(memory, open_file(KERNEL))
    check_kernel_is_loaded(memory)
    assert (image.protocol, image.kind, image.payload, image.note) == ("PVH", "vmlinux", None, "")
    assert (image.registers.rip, image.registers.rbx) == (0x100_0100, 0x6000)
    assert memory.read(0x6000, 4) == bytes.fromhex("78c56e33")
    assert image.command_line == "console=ttyS0"
    assert image.rsdp_address == 0xE0000
    assert [step for step, _ in image.timings] == ["load", "tables"]


@pytest.mark.parametrize("entry", [0x40_0000, 0xFFFF_FFFF_8100_0000])
def test_an_elf_entry_outside_the_kernel_matters_only_where_it_is_used(
    entry: int, guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    memory = guest_memory(4 * MIB)
    loads = [images.Load(0x10_0000, b"kernel")]
    kernel = open_file(images.elf(loads, entry, images.pvh_note(0x10_0002)))
    assert load(memory, kernel).registers.rip == 0x10_0002
    ImageMemory(memory).clear()
    for fd, option in ((kernel, "linux64"), (open_file(images.elf(loads, entry)), "auto")):
        with pytest.raises(KernelError) as caught:
            load(memory, fd, entry=option)
        assert caught.value.code == "kernel.elf.entry"
        assert is_empty(memory)


@pytest.mark.parametrize(
    ("address", "entry", "lost"),
    [
        (0x8000, "auto", ""),
        (0xA000, "auto", ""),
        (0xA000, "linux64", "0xa000 to 0xa400"),
        (0x300, "auto", "0x500 to 0x528"),
        (0x1_FD00, "auto", "0x20000 to 0x20100"),
        (0x9_F900, "linux64", "0x9fc00 to 0x9fd00"),
    ],
)
def test_boot_structures_win_over_the_kernel(
    address: int, entry: str, lost: str, guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    low = b"\x5a" * 0x400
    loads = [images.Load(0x10_0000, b"kernel"), images.Load(address, low)]
    memory = guest_memory(4 * MIB)
    image = load(memory, open_file(images.elf(loads, 0x10_0000, images.pvh_note(0x10_0000))), entry=entry)
    assert image.note == (f"What the kernel has for {lost} lies where boot structures are written." if lost else "")
    assert (memory.read(address, 0x400) == low) == (not lost)
    assert memory.read(0x20000, 14) == b"console=ttyS0\0"


@pytest.mark.parametrize(("pvh", "entry"), [(True, "linux64"), (False, "auto"), (False, "linux64")])
def test_an_elf_kernel_is_entered_in_64_bit(
    pvh: bool, entry: str, guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    memory = guest_memory(32 * MIB)
    image = load(memory, open_file(images.small_kernel(pvh=pvh)), entry=entry)
    check_kernel_is_loaded(memory)
    assert image.protocol == "Linux 64-bit"
    assert (image.registers.rip, image.registers.rsi) == (0x100_0000, 0x7000)
    assert memory.read(0x7202, 4) == b"HdrS"
    assert struct.unpack("<Q", memory.read(0x7070, 8)) == (0xE0000,)


def test_a_kernel_without_pvh_note_cannot_be_forced(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    memory = guest_memory(32 * MIB)
    with pytest.raises(KernelError) as caught:
        load(memory, open_file(images.small_kernel(pvh=False)), entry="pvh")
    assert caught.value.code == "kernel.elf.notes"
    assert is_empty(memory)


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd", "lz4"])
def test_a_bzimage_is_unpacked_and_entered(kind: str, guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    memory = guest_memory(32 * MIB)
    bzimage = images.bzimage(images.compress(kind, KERNEL))
    image = load(memory, open_file(bzimage))
    check_kernel_is_loaded(memory)
    assert (image.protocol, image.kind, image.note) == ("Linux 64-bit", "bzImage", "")
    assert image.payload is not None
    assert image.payload.compression == kind
    assert image.payload.unpacked_size == len(KERNEL)
    assert image.payload.cache == "off"
    assert image.registers.rip == 0x100_0000
    kept = bytearray(bzimage[0x1F1:0x26C])
    kept[0x210 - 0x1F1] = 0xFF
    struct.pack_into("<I", kept, 0x228 - 0x1F1, 0x20000)
    assert memory.read(0x71F1, 0x26C - 0x1F1) == kept


def test_an_unpacked_bzimage_can_be_entered_by_pvh(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    memory = guest_memory(32 * MIB)
    image = load(memory, open_file(images.bzimage(images.compress("lz4", KERNEL))), entry="pvh")
    assert (image.protocol, image.registers.rip) == ("PVH", 0x100_0100)
    check_kernel_is_loaded(memory)


@pytest.mark.parametrize("payload", [images.compress("gzip", KERNEL), b"BZh9 is not unpacked here", b""])
def test_a_bzimage_is_entered_as_it_is(payload: bytes, guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    memory = guest_memory(32 * MIB)
    bzimage = images.bzimage(payload)
    is_packed = payload[:2] == b"\x1f\x8b"
    image = load(memory, open_file(bzimage), unpack=not is_packed)
    assert (image.protocol, image.kind, image.payload) == ("Linux 64-bit", "bzImage", None)
    assert bool(image.note) != is_packed
    assert image.registers.rip == 0x100200
    assert memory.read(0x100000, len(bzimage) - 2048) == bzimage[2048:]
    assert image.kernel_end == 0x180_0000
    with pytest.raises(KernelError):
        load(guest_memory(32 * MIB), open_file(bzimage), unpack=False, entry="pvh")


# ---------------------------------------------------------------- initrd


@pytest.mark.parametrize("entry", ["pvh", "linux64"])
def test_the_initrd_lies_at_the_top(entry: str, guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    memory = guest_memory(32 * MIB)
    initrd = b"070701" + bytes(range(256)) * 40
    image = load(memory, open_file(KERNEL), initrd_fd=open_file(initrd), entry=entry)
    address = 32 * MIB - 3 * 4096
    assert image.initrd == (address, len(initrd))
    assert memory.read(address, len(initrd)) == initrd
    if entry == "pvh":
        assert struct.unpack("<QQ", memory.read(0x6040, 16)) == image.initrd
    else:
        assert struct.unpack("<II", memory.read(0x7218, 8)) == image.initrd
    assert [step for step, _ in image.timings] == ["load", "initrd", "tables"]


def test_the_initrd_may_fill_everything_above_the_kernel(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    kernel_end = 0x120_0000 + 5016 + 0x30000
    room = 32 * MIB - -(-kernel_end // 4096) * 4096
    assert load(guest_memory(32 * MIB), open_file(KERNEL), initrd_fd=open_file(b"x" * room)).initrd == (
        32 * MIB - room,
        room,
    )
    memory = guest_memory(32 * MIB)
    with pytest.raises(InitrdError) as caught:
        load(memory, open_file(KERNEL), initrd_fd=open_file(b"x" * (room + 1)))
    assert caught.value.code == "initrd.memory"
    assert str(caught.value).startswith("Error with initrd initialization: Failed to compute the initrd address.")
    assert is_empty(memory)


def test_the_room_that_a_bzimage_unpacks_into_is_not_for_the_initrd(
    guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    bzimage = images.bzimage(b"BZh")
    load(guest_memory(32 * MIB), open_file(bzimage), initrd_fd=open_file(b"x" * (8 * MIB)))
    with pytest.raises(InitrdError):
        load(guest_memory(32 * MIB), open_file(bzimage), initrd_fd=open_file(b"x" * (8 * MIB + 1)))


def test_the_initrd_stays_below_the_address_that_an_old_kernel_names(
    guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    bzimage = images.bzimage(images.compress("gzip", KERNEL), extended_flags=1, initrd_address_max=0x17F_FFFF)
    image = load(guest_memory(32 * MIB), open_file(bzimage), initrd_fd=open_file(b"x" * 4096))
    assert image.initrd == (0x17F_F000, 4096)


def test_initrds_that_are_none(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    kernel = open_file(KERNEL)
    directory = os.open("/", os.O_RDONLY)
    read, write = os.pipe()
    for fd in (open_file(b""), directory, read):
        memory = guest_memory(32 * MIB)
        with pytest.raises(InitrdError) as caught:
            load(memory, kernel, initrd_fd=fd)
        assert caught.value.code == "initrd.file"
        assert is_empty(memory)
    for fd in (directory, read, write):
        os.close(fd)


# ---------------------------------------------------------------- failures


def test_kernels_that_are_no_files(guest_memory: MemoryFactory) -> None:
    directory = os.open("/", os.O_RDONLY)
    read, write = os.pipe()
    write_only = os.open("/dev/null", os.O_WRONLY)
    for fd in (directory, read, write_only):
        with pytest.raises(KernelError) as caught:
            load(guest_memory(32 * MIB), fd)
        assert caught.value.code == "kernel.read"
    for fd in (directory, read, write, write_only):
        os.close(fd)


def test_a_file_that_cannot_be_read(guest_memory: MemoryFactory, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "kernel", os.O_WRONLY | os.O_CREAT)
    os.write(fd, KERNEL)
    with pytest.raises(KernelError) as caught:
        load(guest_memory(32 * MIB), fd)
    assert caught.value.code == "kernel.read"
    assert "Unable to read kernel image (Bad file descriptor (os error 9))" in str(caught.value)
    os.close(fd)


@pytest.mark.parametrize(
    ("kernel", "code"),
    [
        (b"", "kernel.bzimage.invalid"),
        (b"garbage" * 1000, "kernel.bzimage.invalid"),
        (b"\x7fELF", "kernel.elf.truncated"),
        (KERNEL[:50_000], "kernel.elf.truncated"),
        (images.bzimage(images.compress("xz", b"no kernel at all" * 10)), "kernel.elf.magic"),
        (images.bzimage(images.compress("gzip", KERNEL)[:-4] + b"\xff\xff\xff\x7f"), "payload.size"),
        (images.bzimage(images.compress("zstd", KERNEL)[:-4] + struct.pack("<I", len(KERNEL) + 1)), "payload.size"),
        (images.bzimage(images.compress("lz4", KERNEL)[:-4] + struct.pack("<I", len(KERNEL) - 1)), "payload.size"),
        (images.bzimage(images.compress("gzip", KERNEL)[:3]), "payload.size"),
        (images.bzimage(b"\x1f\x8b"), "payload.size"),
    ],
)
def test_a_bad_kernel_leaves_guest_memory_empty(
    kernel: bytes, code: str, guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    memory = guest_memory(32 * MIB)
    with pytest.raises(KernelError) as caught:
        load(memory, open_file(kernel))
    assert caught.value.code == code
    assert str(caught.value).startswith("System configuration error: Cannot load kernel due to invalid memory")
    assert is_empty(memory)
    load(memory, open_file(KERNEL))
    check_kernel_is_loaded(memory)


def test_damage_deep_in_the_payload_leaves_guest_memory_empty(
    guest_memory: MemoryFactory, open_file: FileFactory
) -> None:
    kernel = images.small_kernel(2_000_000)
    packed = bytearray(images.compress("gzip", kernel))
    packed[-8] ^= 1  # the checksum: everything was unpacked and written by then
    memory = guest_memory(32 * MIB)
    with pytest.raises(KernelError) as caught:
        load(memory, open_file(images.bzimage(bytes(packed))))
    assert caught.value.code == "payload.damaged"
    assert is_empty(memory)


def test_small_guests_are_told_so(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    for kernel in (KERNEL, images.bzimage(b"BZh"), images.bzimage(images.compress("gzip", KERNEL))):
        with pytest.raises(KernelError) as caught:
            load(guest_memory(16 * MIB), open_file(kernel))
        assert caught.value.code == "kernel.memory"
    with pytest.raises(LayoutError) as refused:
        load(guest_memory(4096), open_file(KERNEL))
    assert refused.value.code == "layout.low_memory"


def test_a_64bit_entry_must_be_mapped(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    address = 0x4000_0000
    kernel = images.elf([images.Load(address, b"x" * 4096)], address, images.pvh_note(address))
    memory = guest_memory(address + MIB)
    assert load(memory, open_file(kernel)).registers.rip == address
    with pytest.raises(KernelError) as caught:
        load(memory, open_file(kernel), entry="linux64")
    assert caught.value.code == "kernel.elf.segment"


def test_a_command_line_of_init_arguments_only(guest_memory: MemoryFactory, open_file: FileFactory) -> None:
    with pytest.raises(CmdlineError):
        loader.load_kernel(guest_memory(32 * MIB), open_file(KERNEL), Cmdline(" -- x"))


# ---------------------------------------------------------------- cache


def test_the_cache_is_filled_and_used(
    guest_memory: MemoryFactory, open_file: FileFactory, cache: tuple[Path, int]
) -> None:
    path, fd = cache
    bzimage = images.bzimage(images.compress("xz", KERNEL))
    states = []
    for _ in range(2):
        memory = guest_memory(32 * MIB)
        image = load(memory, open_file(bzimage), cache_fd=fd, entry="pvh")
        check_kernel_is_loaded(memory)
        assert image.registers.rip == 0x100_0100
        assert image.payload is not None
        states.append(image.payload.cache)
    assert states == ["stored", "hit"]
    assert [step for step, _ in image.timings] == ["digest", "load", "tables"]
    (entry,) = path.iterdir()
    assert entry.name == hashlib.sha256(bzimage).hexdigest()
    assert entry.read_bytes()[4096:] == KERNEL


def test_a_damaged_entry_is_found_out_and_replaced(
    guest_memory: MemoryFactory, open_file: FileFactory, cache: tuple[Path, int]
) -> None:
    path, fd = cache
    bzimage = images.bzimage(images.compress("xz", KERNEL))
    load(guest_memory(32 * MIB), open_file(bzimage), cache_fd=fd)
    (entry,) = path.iterdir()
    sound = entry.read_bytes()
    for offset in (4096 + 5, 4096 + 70_000, len(sound) - 1, 20):
        damaged = bytearray(sound)
        damaged[offset] ^= 0x40
        entry.write_bytes(damaged)
        memory = guest_memory(32 * MIB)
        image = load(memory, open_file(bzimage), cache_fd=fd)
        check_kernel_is_loaded(memory)
        assert memory.read(0x100_0000 + 99_840, 10_000) == bytes(10_000)
        assert image.payload is not None
        assert image.payload.cache == "stored"
        assert entry.read_bytes() == sound


def test_lz4_is_not_cached(guest_memory: MemoryFactory, open_file: FileFactory, cache: tuple[Path, int]) -> None:
    path, fd = cache
    image = load(guest_memory(32 * MIB), open_file(images.bzimage(images.compress("lz4", KERNEL))), cache_fd=fd)
    assert image.payload is not None
    assert image.payload.cache == "off (lz4 is not worth it)"
    assert list(path.iterdir()) == []


def test_an_unsafe_cache_is_not_used(
    guest_memory: MemoryFactory, open_file: FileFactory, cache: tuple[Path, int]
) -> None:
    path, fd = cache
    path.chmod(0o777)
    image = load(guest_memory(32 * MIB), open_file(images.bzimage(images.compress("xz", KERNEL))), cache_fd=fd)
    assert image.payload is not None
    assert image.payload.cache.startswith("off (the kernel cache is not used: ")
    assert list(path.iterdir()) == []


def test_a_bad_kernel_leaves_nothing_in_the_cache(
    guest_memory: MemoryFactory, open_file: FileFactory, cache: tuple[Path, int]
) -> None:
    path, fd = cache
    bad = images.bzimage(images.compress("xz", KERNEL[:-100] + b"x" * 99))
    damaged = bytearray(images.bzimage(images.compress("xz", KERNEL)))
    damaged[-200] ^= 1
    for kernel in (images.bzimage(images.compress("xz", b"no kernel" * 100)), bytes(damaged)):
        with pytest.raises(KernelError):
            load(guest_memory(32 * MIB), open_file(kernel), cache_fd=fd)
        assert list(path.iterdir()) == []
    load(guest_memory(32 * MIB), open_file(bad), cache_fd=fd)


def test_a_kernel_that_changes_while_it_is_unpacked_is_not_stored(
    guest_memory: MemoryFactory, tmp_path: Path, cache: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd = cache
    first = images.bzimage(images.compress("xz", KERNEL))
    second = first[:-1] + b"!"
    file = tmp_path / "kernel"
    file.write_bytes(first)
    kernel_fd = os.open(file, os.O_RDONLY)

    def digest_then_change(fd: int, size: int, hasher: Hasher) -> bytes:
        result = digest_of_file(fd, size, hasher)
        with file.open("r+b") as changed:
            changed.write(second)
        return result

    monkeypatch.setattr("vmm.boot.unpack.digest_of_file", digest_then_change)
    image = load(guest_memory(32 * MIB), kernel_fd, cache_fd=fd)
    os.close(kernel_fd)
    assert image.payload is not None
    assert image.payload.cache == "not stored (the kernel file was changed meanwhile)"
    assert list(path.iterdir()) == []


def test_nothing_of_a_damaged_entry_stays_in_guest_memory(
    guest_memory: MemoryFactory, open_file: FileFactory, cache: tuple[Path, int]
) -> None:
    path, fd = cache
    kernel = images.elf([images.Load(0x10_0000, b"start" + bytes(300_000) + b"end")], 0x10_0000)
    bzimage = images.bzimage(images.compress("gzip", kernel))
    load(guest_memory(32 * MIB), open_file(bzimage), cache_fd=fd)
    (entry,) = path.iterdir()
    damaged = bytearray(entry.read_bytes())
    damaged[4096 + 150_000] = 0xFF
    entry.write_bytes(damaged)
    memory = guest_memory(32 * MIB)
    load(memory, open_file(bzimage), cache_fd=fd)
    # Zeros of the kernel are not written: they must still be there.
    assert memory.read(0x10_0000, 300_008) == b"start" + bytes(300_000) + b"end"


def test_a_guest_smaller_than_a_huge_page_takes_no_memory_ahead(open_file: FileFactory) -> None:
    """What a Linux takes first is 20 MiB here; a tiny guest would never touch it."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 128 * MIB)
    memory = GuestMemory(fd, 128 * MIB, layout.ram_regions(128 * MIB))
    load(memory, open_file(build("spin").read_bytes()), huge_pages=True)
    assert os.fstat(fd).st_blocks * 512 < MIB
    memory.close()
    os.close(fd)
