"""Hostile frames for the decoder, and the process that runs it under limits of memory and time.

``python -m tests.fuzz.ipc_fuzz COUNT SEED FILE``: 512 MiB of address space, a second of CPU time per frame; the frame
at hand is in FILE.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgpack

from ipc.channel import Sequencer
from ipc.errors import ChannelError, MessageError
from ipc.messages.descriptors import DESCRIPTORS
from ipc.messages.records import WORKER
from ipc.messages.supervisor import SUPERVISOR
from ipc.schema import (
    MAX_FRAME_SIZE,
    MAX_LIST_LENGTH,
    Bytes,
    Envelope,
    Field,
    Flag,
    Int,
    ListOf,
    RecordOf,
    Text,
    decode,
    encode,
    unpack,
)

SCHEMAS = (WORKER, SUPERVISOR, DESCRIPTORS)
ADDRESS_SPACE = 512 << 20
#: What parsing may keep at its peak; one frame is at most 256 KiB.
MEMORY_GROWTH = 32 << 20
CPU_SECONDS_PER_FRAME = 1.0
U64 = (1 << 64) - 1


# ---------------------------------------------------------------- frames


def random_value(field: Field, chooser: random.Random) -> Any:
    """Return a legal value of a field."""
    if isinstance(field, Int):
        return chooser.choice((field.low, field.high, chooser.randint(field.low, field.high)))
    if isinstance(field, Flag):
        return chooser.random() < 0.5
    if isinstance(field, Text):
        return "".join(chooser.choice("aé→🧱") for _ in range(chooser.randrange(min(field.size, 30))))
    if isinstance(field, Bytes):
        return chooser.randbytes(chooser.choice((0, 10, 1000)))
    if isinstance(field, ListOf):
        return tuple(random_value(field.item, chooser) for _ in range(chooser.randrange(4)))
    assert isinstance(field, RecordOf)
    return field.record._make(random_value(part, chooser) for _, part in field.fields)


def valid(chooser: random.Random) -> bytes:
    """Return a frame of a random message."""
    schema = chooser.choice(SCHEMAS)
    field = chooser.choice(list(schema._by_kind.values()))
    return encode(schema, Envelope(7, chooser.randint(1, U64), 0, 0, random_value(field, chooser)))


def mutated(chooser: random.Random) -> bytes:
    """Return a valid frame, changed in a few places."""
    frame = bytearray(valid(chooser))
    for _ in range(chooser.randint(1, 4)):
        place = chooser.randrange(len(frame) + 1)
        kind = chooser.randrange(6)
        if kind == 0 and place < len(frame):
            frame[place] ^= 1 << chooser.randrange(8)
        elif kind == 1 and place < len(frame):
            frame[place] = chooser.randrange(256)
        elif kind == 2:
            frame[place:place] = token(chooser)
        elif kind == 3:
            del frame[place : place + chooser.randint(1, 4)]
        elif kind == 4:
            frame[place:] = valid(chooser)[place:]
        else:
            frame += chooser.randbytes(chooser.randint(1, 9))
    return bytes(frame)


LENGTHS = (0, 1, 2, 4, 255, MAX_LIST_LENGTH, MAX_LIST_LENGTH + 1, 0xFFFF, 1 << 18, 1 << 20, 1 << 31, (1 << 32) - 1)


def header(chooser: random.Random, first: int, width: int) -> bytes:
    """Return the head of something that declares a length."""
    length = chooser.choice(LENGTHS) & (1 << 8 * width) - 1
    return bytes([first]) + length.to_bytes(width, "big")


def token(chooser: random.Random) -> bytes:
    """Return one piece of msgpack: a value, or a head that promises more."""
    kind = chooser.randrange(12)
    if kind == 0:
        return bytes([chooser.randrange(256)])
    if kind == 1:  # array16, array32
        return header(chooser, *chooser.choice(((0xDC, 2), (0xDD, 4))))
    if kind == 2:  # map16, map32
        return header(chooser, *chooser.choice(((0xDE, 2), (0xDF, 4))))
    if kind == 3:  # str8 … str32, bin8 … bin32
        return header(chooser, *chooser.choice(((0xD9, 1), (0xDA, 2), (0xDB, 4), (0xC4, 1), (0xC5, 2), (0xC6, 4))))
    if kind == 4:  # ext8 … ext32 with a type
        return header(chooser, *chooser.choice(((0xC7, 1), (0xC8, 2), (0xC9, 4)))) + bytes([chooser.randrange(256)])
    if kind == 5:  # fixext1 … fixext16, timestamps among them
        head = chooser.choice((0xD4, 0xD5, 0xD6, 0xD7, 0xD8))
        return bytes([head, chooser.choice((0xFF, 0, 5))]) + chooser.randbytes(1 << head - 0xD4)
    if kind == 6:  # floats, NaN, infinity
        return bytes.fromhex(
            chooser.choice(("ca7fc00000", "cb7ff0000000000000", "cbfff8000000000000", "cb3ff0000000000000"))
        )
    if kind == 7:  # integers of every width
        head, width = chooser.choice(
            ((0xCC, 1), (0xCD, 2), (0xCE, 4), (0xCF, 8), (0xD0, 1), (0xD1, 2), (0xD2, 4), (0xD3, 8))
        )
        return bytes([head]) + chooser.randbytes(width)
    if kind == 8:  # text that is no UTF-8: overlong, surrogate, cut
        return chooser.choice((b"\xa2\xc0\xaf", b"\xa3\xed\xa0\x80", b"\xa1\xff", b"\xa4\xf4\x90\x80\x80"))
    if kind == 9:  # maps with equal, unhashable and odd keys
        return chooser.choice(
            (b"\x82\x01\x01\x01\x02", b"\x81\x90\x01", b"\x81\xc0\x01", b"\x80", b"\x81\xcb\x7f\xf8" + bytes(6))
        )
    if kind == 10:
        return chooser.choice((b"\xc0", b"\xc1", b"\xc2", b"\xc3"))
    return bytes(msgpack.packb([chooser.getrandbits(32)] * chooser.randrange(20)))


def soup(chooser: random.Random) -> bytes:
    """Return tokens in a row."""
    return b"".join(token(chooser) for _ in range(chooser.randint(1, 40)))


def nested(chooser: random.Random) -> bytes:
    """Return deep or wide nesting: stack, reservations, many tiny objects."""
    size = chooser.choice((10, 500, 1023, 1024, 1025, 5_000, MAX_FRAME_SIZE // 8))
    opening = chooser.choice(
        (
            b"\x91",
            b"\x92",
            b"\x9f",
            b"\xdc\x04\x00",
            b"\xdc\xff\xff",
            b"\xdd\x00\x01\xff\x00",
            b"\xdd" + b"\xff" * 4,
            b"\x81\x01",
        )
    )
    filling = chooser.choice(
        (b"", b"\x90", b"\x80", b"\xc0", b"\xa0", b"\xc4\x00", b"\xcb" + bytes(8), b"\xcf" + b"\xff" * 8)
    )
    return (opening * size)[: MAX_FRAME_SIZE // 2] + filling * chooser.choice((0, 1, 1000, 15_000))


def in_envelope(payload: bytes, chooser: random.Random) -> bytes:
    """Put hostile bytes where a message's values belong, in an envelope that is right."""
    prefix = bytes(msgpack.packb([1, 7, chooser.randint(1, U64), 0, 0, chooser.randint(1, 20)]))
    return b"\x97" + prefix[1:] + payload


def hostile(chooser: random.Random) -> bytes:
    """Return one frame of any of these kinds."""
    kind = chooser.randrange(10)
    if kind < 4:
        return mutated(chooser)
    if kind == 4:
        return chooser.randbytes(chooser.choice((0, 1, 10, 1000, MAX_FRAME_SIZE, MAX_FRAME_SIZE + 1)))
    payload = soup(chooser) if kind < 8 else nested(chooser)
    if chooser.random() < 0.7:
        payload = in_envelope(payload, chooser)
    return payload + bytes(chooser.choice((0, 0, 0, 1, MAX_FRAME_SIZE)))


# ---------------------------------------------------------------- what must hold


def check(frame: bytes, receivers: tuple[Sequencer, ...]) -> int:
    """Give a frame to every parser; return how many accepted it. Any exception but the documented ones passes."""
    accepted = 0
    try:
        unpack(frame)
    except MessageError:
        pass
    for schema in SCHEMAS:
        try:
            envelope = decode(schema, frame)
        except MessageError:
            continue
        accepted += 1
        assert decode(schema, encode(schema, envelope)) == envelope  # what was accepted is legal to send
    for receiver in receivers:
        try:
            receiver.accept(frame)
        except ChannelError:
            pass
    return accepted


def run(count: int, seed: int, record: Callable[[bytes], None]) -> str:
    """Check ``count`` frames; return a summary."""
    receivers = tuple(Sequencer(schema, 7) for schema in SCHEMAS)
    accepted = 0
    for number in range(count):
        chooser = random.Random(seed << 32 | number)
        frame = hostile(chooser)
        record(frame)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_PER_FRAME)
        accepted += check(frame, receivers) > 0
    signal.setitimer(signal.ITIMER_PROF, 0)
    refused = sum(receiver.counters.refused for receiver in receivers)
    received = sum(receiver.counters.received for receiver in receivers)
    assert refused + received == 3 * count
    return f"{count} frames, {accepted} accepted"


def main(count: int, seed: int, path: str) -> None:
    """Run under the limits; the frame at hand is kept in a file, so that even a crash can be repeated."""
    check(valid(random.Random(0)), ())
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = os.open(path, os.O_RDWR | os.O_CREAT)

    def record(frame: bytes) -> None:
        os.pwrite(file, frame, 0)
        os.ftruncate(file, len(frame))

    summary = run(count, seed, record)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert growth < MEMORY_GROWTH, f"memory grew by {growth >> 20} MiB"
    print(f"{summary}, memory grew by {growth >> 10} KiB")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
