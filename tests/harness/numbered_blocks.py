"""The other side of tests/guests/numbered.c: what a disk must hold of what it has acknowledged."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

BLOCK = 4096
HEADER = struct.Struct("<IIQ")  #: CRC-32 of the rest, thread, number


def kept(output: str) -> list[int]:
    """Return what the last whole line of the program tells: per thread the last number that was acknowledged."""
    for line in reversed(output.splitlines(keepends=True)):
        word, *numbers = line.split() or [""]
        if word == "failed":
            raise AssertionError(line)
        if word in {"kept", "ended"} and line.endswith("\n"):
            return [int(number) for number in numbers]
    return []


def lost(path: Path, acknowledged: Sequence[int], slots: int, start: int, *, last: bool = False) -> list[str]:
    """Return what is wrong: places whose block is older than one that was acknowledged, broken, or another one's.

    ``start``: the number after which the run began. ``last``: the run ended in order, nothing was written after
    ``acknowledged``; a newer block is wrong then, too.
    """
    content = path.read_bytes()
    wrong: list[str] = []
    for thread, newest in enumerate(acknowledged):
        for slot in range(slots):
            place = (thread * slots + slot) * BLOCK
            wanted = newest - (newest - slot) % slots  # the last one up to ``newest`` that has this place
            highest = wanted if last else None
            complaint = _check(content[place : place + BLOCK], (thread, slot, slots), max(wanted, start), highest)
            if complaint:
                wrong.append(f"thread {thread}, slot {slot}: {complaint}; acknowledged: {newest}")
    return wrong


def _check(block: bytes, place: tuple[int, int, int], lowest: int, highest: int | None) -> str | None:
    thread, slot, slots = place
    if lowest % slots != slot:  # this run had not come here: anything whole of the thread's will do
        lowest, highest = 0, None
    if not any(block):
        return f"nothing, where {lowest} should be" if lowest else None
    crc, its_thread, number = HEADER.unpack_from(block)
    if crc != zlib.crc32(block[4:]):
        return f"a broken block, {number} of thread {its_thread}"
    if (its_thread, number % slots) != (thread, slot):
        return f"block {number} of thread {its_thread}"
    if number < lowest or (highest is not None and number > highest):
        return f"block {number}, where {lowest} should be"
    return None
