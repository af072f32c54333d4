"""Rings of a hostile driver: sound ones, in which a few words are wrong, or change while the device reads."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

from tests.harness.virtqueues import DATA, HIGH, MIB, TABLES, Pair
from virtio.driver import Buffer

#: Words that are worth a try wherever a 16-bit word is.
WORDS = (0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 48, 255, 256, 0x7FFF, 0x8000, 0xFFFF)
#: Addresses where buffers end, begin, wrap around, or are not.
ADDRESSES = (0, 1, DATA, MIB - 16, MIB - 1, MIB, 3 << 30, HIGH - 8, HIGH, HIGH + MIB - 1, 1 << 63, (1 << 64) - 1)
LENGTHS = (0, 1, 15, 16, 17, 512, 4096, MIB, 1 << 31, (1 << 32) - 1)


def random_buffers(chooser: random.Random) -> list[Buffer]:
    """Return a chain that keeps the rules; now and then one that does not."""
    count = chooser.choice((1, 2, 3, 3, 3, 4, 9))
    readable = chooser.randrange(count + 1)
    buffers = []
    for number in range(count):
        address = chooser.choice((DATA, HIGH)) + chooser.randrange(0x4_0000)
        length = chooser.choice((1, 8, 16, 512, 4096, 20_000))
        if chooser.random() < 0.01:
            address = chooser.choice(ADDRESSES)
        if chooser.random() < 0.02:
            length = chooser.choice(LENGTHS)
        buffers.append(Buffer(address, length, (number >= readable) != (chooser.random() < 0.005)))
    return buffers


def scribble(pair: Pair, chooser: random.Random, count: int = 1) -> None:
    """Change a few 16-bit words of descriptors, indirect tables and the available ring."""
    size = pair.config.size
    for _ in range(count):
        kind = chooser.randrange(8)
        if kind < 3:
            place = pair.config.descriptor_table + 2 * chooser.randrange(8 * size)
        elif kind < 7:
            place = TABLES + 16 * size * chooser.randrange(size) + 2 * chooser.randrange(8 * min(size, 6))
        else:
            place = pair.config.available_ring + 2 * chooser.randrange(3 + size)
        word = chooser.choice((*WORDS, chooser.randrange(1 << 16)))
        pair.memory.write(place, struct.pack("<H", word))


def check_chain(pair: Pair, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> None:
    """A chain that came out is one that a device may use without another look."""
    assert 0 < len(readable) + len(writable) <= pair.config.size
    for offset, length in (*readable, *writable):
        assert length > 0
        assert 0 <= offset <= offset + length <= pair.memory.size
        assert offset // MIB == (offset + length - 1) // MIB, "a buffer in two regions"


class ChangingView:
    """A view of words whose memory a driver changes after each one that is read."""

    def __init__(self, view: memoryview, change) -> None:
        self.view = view
        self.change = change
        self.reads = 0

    def __getitem__(self, index: int) -> int:
        value: int = self.view[index]
        self.reads += 1
        self.change()
        return value
