"""The exit ring's consumer against a hostile producer: RingError or bounded entries, nothing else."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc import exit_ring
from ipc.errors import RingError
from ipc.exit_ring import ENTRY_COUNT, ENTRY_SIZE, RING_SIZE, STRING_DATA_SIZE, ExitRingConsumer
from tests.harness.processes import Child
from tests.harness.rings import PORTS, STRINGS, U64, WRITES, Access, Ring, accesses, check_bounds, consume_from, seen

HEADER_WORDS = (
    exit_ring.WORD_POSTED,
    exit_ring.WORD_WAITING,
    exit_ring.WORD_CONSUMED,
    exit_ring.WORD_DONE,
    exit_ring.WORD_ASLEEP,
    exit_ring.WORD_ANSWER,
)


# ---------------------------------------------------------------- hostile producer


words64 = st.one_of(
    st.integers(0, 600), st.integers(U64 - 600, U64), st.integers(0, U64), st.sampled_from([1 << 63, 1 << 32])
)
raw_entries = st.tuples(
    words64,
    words64,
    words64,
    words64,
    st.integers(0, 255),
    st.one_of(st.sampled_from([1, 2, 4, 8]), st.integers(0, 255)),
    st.integers(0, 2),
    st.one_of(st.integers(0, 5000), st.integers(0, (1 << 32) - 1)),
)
scribbles = st.lists(
    st.one_of(
        st.tuples(st.just("word"), st.sampled_from(HEADER_WORDS), words64),
        st.tuples(st.just("entry"), st.integers(0, ENTRY_COUNT - 1), raw_entries),
        st.tuples(st.just("bytes"), st.integers(0, RING_SIZE - 1), st.binary(min_size=1, max_size=64)),
    ),
    max_size=8,
)


def scribble(ring: Ring, what: tuple) -> None:
    kind, place, value = what
    if kind == "word":
        ring.set_word(place, value)
    elif kind == "entry":
        ring.buffer[4096 + place * 64 : 4096 + place * 64 + 64] = struct.pack("<QQQQBBBxI24x", *value)
    else:
        end = min(RING_SIZE, place + len(value))
        ring.buffer[place:end] = value[: end - place]


@pytest.mark.soak("ipc")
def test_scribbling_gives_ring_error_or_bounded_entries(scale):
    examples = scale(150, 20_000)
    outcomes = {"error": 0, "entries": 0}

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(st.tuples(accesses(), scribbles), min_size=1, max_size=5))
    def run(rounds) -> None:
        ring = Ring()
        try:
            producer, consumer = ring.producer(), ring.consumer()
            for access, damage in rounds:
                if not access.synchronous:  # a call would wait for the answer
                    producer.post(access.kind, access.address, access.size, access.data)
                for what in damage:
                    scribble(ring, what)
                outcomes["entries"] += consume_from(ring, consumer, 2 * ENTRY_COUNT)
                consumer.awake()
                consumer.sleep()
                assert consumer.idle in (True, False)
        except RingError:
            outcomes["error"] += 1
        finally:
            ring.close()

    run()
    assert min(outcomes.values()) > examples // 10, f"the test sees one side only: {outcomes}"


FIELDS = ("sequence", "time", "address", "data", "kind", "size", "flags", "count")


def is_legal(fields: Sequence[int]) -> bool:
    """Judge an entry by docs/formats/exit-ring.md."""
    sequence, _, address, data, kind, size, flags, count = fields
    if sequence != 1 or kind not in range(1, 8) or flags > 1:
        return False
    port, string, write = kind in PORTS, kind in STRINGS, kind in WRITES
    if size not in ((1, 2, 4) if port else (1, 2, 4, 8)) or (port and address > 0xFFFF):
        return False
    if data >= 1 << 8 * size or not (flags or write):
        return False
    return 1 <= count * size <= STRING_DATA_SIZE if string else count == 1


@pytest.mark.soak("ipc")
def test_each_field_of_an_entry_is_checked(scale):
    """A legal entry in which one field was replaced: delivered as it is, or refused, as the rules say."""
    verdicts = {True: 0, False: 0}

    @settings(max_examples=scale(300, 20_000), deadline=None)
    @given(accesses(), st.sampled_from(FIELDS), raw_entries)
    def run(access, field, raw) -> None:
        entry = [1, 77, access.address, access.data, access.kind, access.size, int(access.synchronous), access.elements]
        place = FIELDS.index(field)
        entry[place] = raw[place]
        ring = Ring()
        consumer = ring.consumer()
        scribble(ring, ("entry", 1, entry))
        ring.set_word(exit_ring.WORD_POSTED, 1)
        verdict = is_legal(entry)
        verdicts[verdict] += 1
        if verdict:
            taken = consumer.take()
            assert taken is not None
            assert [getattr(taken, name) for name in FIELDS] == entry
            check_bounds(seen(taken))
        else:
            with pytest.raises(RingError):
                consumer.take()
        ring.close()

    run()
    assert min(verdicts.values()) > 10, verdicts


LEGAL = {"sequence": 1, "time": 77, "address": 0x3F8, "data": 0x41, "kind": 2, "size": 1, "flags": 0, "count": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 2},
        {"sequence": 257},
        {"kind": 0},
        {"kind": 7},
        {"kind": 8, "flags": 1},
        {"kind": 7, "flags": 1, "address": 0x10000},
        {"kind": 7, "flags": 1, "count": 2},
        {"size": 0},
        {"size": 3},
        {"size": 8},
        {"size": 255},
        {"kind": 4, "size": 16},
        {"address": 0x10000},
        {"data": 0x100},
        {"size": 2, "data": 0x10000},
        {"size": 4, "data": 1 << 32},
        {"flags": 2},
        {"count": 0},
        {"count": 2},
        {"kind": 1},
        {"kind": 3},
        {"kind": 6, "count": 1},
        {"kind": 6, "flags": 1, "count": 4097},
        {"kind": 5, "flags": 1, "size": 4, "count": 1025, "data": 0},
        {"kind": 5, "flags": 1, "size": 4, "count": 1 << 30, "data": 0},
        {"kind": 5, "flags": 1, "count": 0, "data": 0},
    ],
    ids=str,
)
def test_one_wrong_field(ring, change):
    consumer = ring.consumer()
    entry = {**LEGAL, **change}
    ring.set_word(exit_ring.WORD_POSTED, 1)
    scribble(ring, ("entry", 1, tuple(LEGAL.values())))
    assert consumer.take() is not None
    consumer = ring.consumer()
    scribble(ring, ("entry", 1, tuple(entry.values())))
    with pytest.raises(RingError):
        consumer.take()


@pytest.mark.parametrize("posted", [ENTRY_COUNT + 1, U64, 1 << 63, 1 << 32])
def test_posted_number_out_of_range(ring, posted):
    consumer = ring.consumer()
    ring.set_word(exit_ring.WORD_POSTED, posted)
    with pytest.raises(RingError, match="out of range"):
        consumer.take()


def test_posted_number_must_not_go_back(ring):
    producer, consumer = ring.producer(), ring.consumer()
    producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, 1)
    assert consume_from(ring, consumer, 2) == 1
    ring.set_word(exit_ring.WORD_POSTED, 0)
    with pytest.raises(RingError, match="out of range"):
        consumer.take()


def test_repeated_entry_is_refused(ring):
    producer, consumer = ring.producer(), ring.consumer()
    producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, 1)
    consume_from(ring, consumer, 1)
    ring.set_word(exit_ring.WORD_POSTED, 1 + ENTRY_COUNT)  # as if 256 more had come: the slot holds number 1 still
    with pytest.raises(RingError, match="sequence"):
        consume_from(ring, consumer, ENTRY_COUNT)


def test_an_entry_changed_after_it_was_taken_stays_as_it_was(ring):
    producer, consumer = ring.producer(), ring.consumer()
    producer.post(exit_ring.KIND_PIO_WRITE, 0x3F8, 1, 0x41)
    entry = consumer.take()
    ring.buffer[4096 : 4096 + ENTRY_COUNT * ENTRY_SIZE] = b"\xff" * (ENTRY_COUNT * ENTRY_SIZE)
    assert entry is not None
    assert seen(entry) == Access(exit_ring.KIND_PIO_WRITE, 0x3F8, 1, 0x41, False, 1)


@pytest.mark.parametrize("flags", [os.EFD_NONBLOCK, 0])
def test_a_full_completion_counter_does_not_stop_the_consumer(flags):
    """A hostile worker fills the eventfd; with a blocking write the controller would hang for ever."""

    def consume() -> int:
        ring = Ring()
        completion = os.eventfd(0, os.EFD_CLOEXEC | flags)
        producer = ring.producer()
        consumer = ExitRingConsumer(ring.buffer, completion)
        os.eventfd_write(completion, U64 - 1)
        for number in range(5):
            producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, number)
            ring.set_word(exit_ring.WORD_WAITING, number + 1)
            consume_from(ring, consumer, 2)
        return consumer.done

    with Child(consume) as child:
        assert child.join() == 5
