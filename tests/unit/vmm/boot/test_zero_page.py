"""The zero page."""

from __future__ import annotations

import struct

from vmm.boot import zero_page

MAP = ((0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (0x100000, 0x700_0000, 1), (4 << 30, 1 << 30, 1))


def u32(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", data, offset)[0])


def u64(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<Q", data, offset)[0])


def test_the_zero_page_of_an_elf_kernel() -> None:
    page = zero_page.build(MAP, 77, (0x700_0000, 12345), 0xE0000, None)
    assert len(page) == 4096
    assert u64(page, 0x70) == 0xE0000
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    assert (u32(page, 0x218), u32(page, 0x21C)) == (0x700_0000, 12345)
    assert (u32(page, 0x228), u32(page, 0x238)) == (0x20000, 77)
    assert u32(page, 0x230) == 0x100_0000
    assert page[0x1E8] == 4
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(4)]
    assert tuple(entries) == MAP
    assert page[0x2D0 + 80 :] == bytes(4096 - 0x2D0 - 80)
    assert page[0x1EF] == 0


def test_the_zero_page_keeps_the_header_of_a_bzimage() -> None:
    header = bytes(range(1, 1 + 0x26C - 0x1F1))
    page = zero_page.build(MAP[:3], 77, None, 0xE0000, header)
    kept = bytearray(header)
    kept[0x210 - 0x1F1] = 0xFF
    struct.pack_into("<II", kept, 0x218 - 0x1F1, 0, 0)
    struct.pack_into("<I", kept, 0x228 - 0x1F1, 0x20000)
    assert page[0x1F1:0x26C] == kept
    assert page[0x1E8] == 3
