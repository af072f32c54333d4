"""PVH start information."""

from __future__ import annotations

import struct

from tests.harness.memory_fixtures import MemoryFactory
from vmm.boot import pvh

MAP = ((0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (0x100000, 0x700_0000, 1), (4 << 30, 1 << 30, 1))


def test_pvh_start_information(guest_memory: MemoryFactory) -> None:
    memory = guest_memory(1 << 20)
    pvh.write(memory, MAP, (0x700_0000, 12345), 0xE0000)
    info = memory.read(0x6000, 56)
    assert struct.unpack("<IIIIQQQQII", info) == (
        0x336EC578, 1, 0, 1, 0x6040, 0x20000, 0xE0000, 0x7000, 4, 0
    )  # fmt: skip
    assert struct.unpack("<QQQQ", memory.read(0x6040, 32)) == (0x700_0000, 12345, 0, 0)
    assert [struct.unpack("<QQII", memory.read(0x7000 + 24 * index, 24)) for index in range(4)] == [
        (*entry, 0) for entry in MAP
    ]
    pvh.write(memory, MAP, None, 0xE0000)
    assert struct.unpack("<IIIIQ", memory.read(0x6000, 24)) == (0x336EC578, 1, 0, 0, 0)
