"""bzImage headers: what is taken from them, and what is refused."""

from __future__ import annotations

import pytest

from tests.harness import kernel_images as images
from tests.harness.memory_fixtures import MemoryFactory
from vmm.boot import bzimage
from vmm.boot.errors import KernelError

MIB = 1 << 20


def parse(data: bytes) -> bzimage.BzImage:
    return bzimage.parse(data[: bzimage.HEADER_READ_SIZE], len(data))


def test_the_header_of_a_kernel() -> None:
    data = images.bzimage(b"payload")
    image = parse(data)
    assert image.version == 0x20F
    assert image.protected_mode_offset == 2048
    assert image.protected_mode_size == len(data) - 2048
    assert data[image.payload_offset : image.payload_offset + image.payload_size] == b"payload"
    assert image.setup_header == data[0x1F1:0x26C]
    assert image.target == 0x100_0000
    assert image.init_size == 0x80_0000
    assert bzimage.end_of_work_area(image) == 0x180_0000
    assert image.initrd_address_max == 0xFFFF_FFFF


def test_sectors_of_zero_mean_four() -> None:
    assert parse(images.bzimage(b"p", setup_sectors=0)).protected_mode_offset == 5 * 512


def test_initrds_stay_low_for_kernels_that_want_it() -> None:
    assert parse(images.bzimage(b"p", extended_flags=1)).initrd_address_max == 0x7FFF_FFFF


@pytest.mark.parametrize(
    ("relocatable", "preferred", "alignment", "target"),
    [
        (1, 0x100_0000, 0x20_0000, 0x100_0000),
        (1, 0x10_0000, 0x20_0000, 0x20_0000),
        (1, 0x10_0000, 0x1000, 0x10_0000),
        (0, 0x10_0000, 0, 0x10_0000),
        (0, 0x40_0000, 0x100_0000, 0x40_0000),
    ],
)
def test_where_the_kernel_unpacks_itself_to(relocatable: int, preferred: int, alignment: int, target: int) -> None:
    data = images.bzimage(b"p", relocatable=relocatable, preferred_address=preferred, alignment=alignment)
    assert parse(data).target == target


@pytest.mark.parametrize("changes", [{"version": 0x20B}, {"extended_flags": 0x7E}])
def test_kernels_without_64bit_entry_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(KernelError) as caught:
        parse(images.bzimage(b"p", **changes))
    assert caught.value.code == "kernel.bzimage.entry"
    assert str(caught.value) == "System configuration error: bzImage does not provide a 64-bit entry point"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "kernel.bzimage.invalid"),
        (b"#!/bin/sh\n" * 100, "kernel.bzimage.invalid"),
        (bytes(4096), "kernel.bzimage.invalid"),
        (images.bzimage(b"p")[:0x263], "kernel.bzimage.invalid"),
        (images.bzimage(b"p")[:2048], "kernel.bzimage.truncated"),
        (images.bzimage(b"p")[: 2048 + 0x200], "kernel.bzimage.truncated"),
        (images.bzimage(b"p", load_flags=0), "kernel.bzimage.invalid"),
        (images.bzimage(b"p")[:0x1F1] + b"\xff" + images.bzimage(b"p")[0x1F2:], "kernel.bzimage.truncated"),
        (images.bzimage(b"p", header_end=0x262), "kernel.bzimage.invalid"),
        (images.bzimage(b"p", header_end=0x291), "kernel.bzimage.invalid"),
        (images.bzimage(b"p", alignment=0x300000), "kernel.bzimage.invalid"),
        (images.bzimage(b"p", alignment=0), "kernel.bzimage.invalid"),
        (images.bzimage(b"p", alignment=1), "kernel.bzimage.invalid"),
        (images.bzimage(b"p", preferred_address=0x9000), "kernel.bzimage.invalid"),
        (images.bzimage(b"p", preferred_address=0x100_0001), "kernel.bzimage.invalid"),
        (images.bzimage(b"p", payload_size=0xFFFF_FFFF), "kernel.bzimage.truncated"),
    ],
)
def test_what_is_no_kernel_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(KernelError) as caught:
        parse(data)
    assert caught.value.code == code
    assert "failed to load bzImage kernel image: Kernel Loader: " in str(caught.value)


def test_endless_files_are_refused() -> None:
    data = images.bzimage(b"p")
    with pytest.raises(KernelError):
        bzimage.parse(data[:1024], bzimage.MAX_FILE_SIZE + 1)
    assert bzimage.parse(data[:1024], bzimage.MAX_FILE_SIZE).protected_mode_size


def test_the_room_for_unpacking_must_be_there(guest_memory: MemoryFactory) -> None:
    image = parse(images.bzimage(b"p"))
    bzimage.check_placement(image, guest_memory(24 * MIB))
    with pytest.raises(KernelError) as caught:
        bzimage.check_placement(image, guest_memory(24 * MIB - 4096))
    assert caught.value.code == "kernel.memory"
    with pytest.raises(KernelError):
        bzimage.check_placement(parse(images.bzimage(b"p", init_size=0xFFFF_FFFF)), guest_memory(64 * MIB))
    with pytest.raises(KernelError):
        bzimage.check_placement(parse(images.bzimage(b"p", preferred_address=1 << 60)), guest_memory(64 * MIB))
