"""The exit ring against a model, and its consumer against a hostile producer."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ipc import exit_ring
from ipc.errors import RingError
from ipc.exit_ring import ENTRY_COUNT, ENTRY_SIZE, RING_SIZE, STRING_DATA_SIZE, ExitRingConsumer, ExitRingProducer
from tests.harness.processes import PATIENCE_SECONDS, Child, wait_for
from tests.harness.rings import READS, U64, Access, Ring, accesses, consume_from, perform, seen

# ---------------------------------------------------------------- layout


def test_layout_is_pinned(ring):
    """docs/formats/exit-ring.md; a change here is a new layout version."""
    assert (RING_SIZE, ENTRY_COUNT, ENTRY_SIZE, STRING_DATA_SIZE) == (24576, 256, 64, 4096)
    header = bytearray(4096)
    header[0:8] = b"CBRING01"
    header[8:16] = (3).to_bytes(8, "little")
    header[16:24] = (256).to_bytes(8, "little")
    header[136:144] = (1).to_bytes(8, "little")  # asleep
    assert ring.buffer[:4096] == header
    assert ring.buffer[4096:] == bytes(RING_SIZE - 4096)
    producer = ring.producer()
    before = time.monotonic_ns()
    producer.post(exit_ring.KIND_MMIO_WRITE, 0x1122_3344_5566_7788, 4, 0xAABB_CCDD)
    header[64:72] = (1).to_bytes(8, "little")  # posted
    header[80:88] = (1).to_bytes(8, "little")  # consumed
    assert ring.buffer[:4096] == header
    (stamp,) = struct.unpack_from("<Q", ring.buffer, 4096 + 64 + 8)
    assert before <= stamp <= time.monotonic_ns()
    entry = struct.pack("<QQQQBBBxI24x", 1, stamp, 0x1122_3344_5566_7788, 0xAABB_CCDD, 4, 4, 0, 1)
    assert ring.buffer[4096 + 64 : 4096 + 128] == entry
    consumer = ring.consumer()
    assert consumer.next_time() == stamp
    assert consumer.take() is not None
    assert consumer.next_time() == exit_ring.NEVER  # it was taken
    consumer.complete()
    assert consumer.next_time() == exit_ring.NEVER
    header[128:136] = (1).to_bytes(8, "little")  # done
    assert ring.buffer[:4096] == header
    producer.counters[15] = 9
    assert ring.buffer[256 + 120 : 256 + 128] == (9).to_bytes(8, "little")
    producer.string[0] = 0xEE
    assert ring.buffer[4096 + 16384] == 0xEE
    assert exit_ring.COUNTER_NAMES[exit_ring.COUNTER_EXITS] == "exits"
    assert exit_ring.COUNTER_NAMES[exit_ring.COUNTER_IOAPIC_EOI] == "ioapic_eoi"
    assert len(exit_ring.COUNTER_NAMES) <= exit_ring.COUNTER_COUNT


def test_ghosts_are_counted_behind_the_vcpus_counters(ring):
    producer, consumer = ring.producer(), ring.consumer()
    first, last = producer.ghost_counters(0), producer.ghost_counters(31)
    first[exit_ring.GHOST_STUB], last[exit_ring.GHOST_RECOVERIES] = 1, U64
    assert ring.buffer[512 : 512 + 8] == (1).to_bytes(8, "little")
    assert ring.buffer[512 + 31 * 64 + 4 * 8 : 512 + 31 * 64 + 5 * 8] == U64.to_bytes(8, "little")
    assert consumer.ghost_counters(0) == (1, 0, 0, 0, 0, 0, 0, 0)
    assert consumer.ghost_counters(31) == (0, 0, 0, 0, U64, 0, 0, 0)
    assert consumer.ghost_counters(30) == (0,) * 8
    for words in (first, last):
        words.release()


@pytest.mark.parametrize("end", [ExitRingConsumer, lambda buffer, fd: ExitRingProducer(buffer, fd, fd)])
def test_another_object_is_refused_and_can_be_closed(ring, end):
    fresh = mmap.mmap(-1, RING_SIZE)
    spoilt = [fresh, mmap.mmap(-1, 4096), mmap.mmap(-1, 1), mmap.mmap(-1, 2 * RING_SIZE)]
    for word in (exit_ring.WORD_MAGIC, exit_ring.WORD_VERSION, exit_ring.WORD_ENTRY_COUNT):
        buffer = mmap.mmap(-1, RING_SIZE)
        exit_ring.initialise(buffer)
        buffer[word * 8] ^= 1
        spoilt.append(buffer)
    for buffer in spoilt:
        try:
            end(buffer, ring.completion)
        except RingError:
            buffer.close()  # no view is left in the traceback
        assert buffer.closed


def test_closing_releases_the_mapping(ring):
    producer, consumer = ring.producer(), ring.consumer()
    consumer.close()
    ring.buffer.close()
    producer.close()
    consumer.close()


# ---------------------------------------------------------------- model


class RingMachine(RuleBasedStateMachine):
    """One producer (its operations run in a thread, since they may block) and one consumer, against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring()
        self.producer = self.ring.producer()
        self.consumer = self.ring.consumer()
        self.expected: list[Access] = []  # posted (or waiting for room), not executed yet
        self.executed = 0
        self.taken = False
        self.operation: threading.Thread | None = None
        self.answers: list[int | None] = []
        self.promised: list[int | None] = []
        self.rest = exit_ring.ASLEEP  # a fresh ring asks for the doorbell

    def run_operation(self, todo: list[Access], lazy: bool = False) -> None:
        """Start the operation, and wait until it is over or can get no further without the consumer."""
        self.ring.rung()
        before = self.executed + len(self.expected)
        total = before + len(todo)
        self.expected.extend(todo)
        self.promised.extend([None] * (len(todo) - 1) + [U64 - total if todo[-1].synchronous else None])

        def work() -> None:
            for access in todo:
                self.answers.append(perform(self.producer, access, lazy))

        self.operation = threading.Thread(target=work, daemon=True)
        self.operation.start()
        self.settle()
        posted = self.ring.word(exit_ring.WORD_POSTED)
        assert posted == min(total, self.executed + ENTRY_COUNT)
        urgent = not lazy or posted - self.executed >= ENTRY_COUNT // 2
        if posted > before and (self.rest == exit_ring.ASLEEP or (self.rest == exit_ring.NAPPING and urgent)):
            wait_for(self.ring.rung, spin=True)
        else:
            assert self.ring.rung() == 0

    def settle(self) -> None:
        """Wait until the producer is idle, or waits for the consumer."""
        operation = self.operation
        deadline = time.monotonic() + PATIENCE_SECONDS
        while operation is not None and operation.is_alive():
            assert time.monotonic() < deadline, "the producer neither ends nor waits"
            if self.ring.word(exit_ring.WORD_WAITING) > self.executed and self.blocked():
                return
            time.sleep(0)
        if operation is not None:
            operation.join()
        self.operation = None

    def blocked(self) -> bool:
        """True when everything that has room is posted and the last operation still waits."""
        room = self.executed + ENTRY_COUNT
        return self.ring.word(exit_ring.WORD_POSTED) == min(room, self.executed + len(self.expected))

    @precondition(lambda self: self.operation is None)
    @rule(access=accesses())
    def access(self, access: Access) -> None:
        self.run_operation([access])

    @precondition(lambda self: self.operation is None)
    @rule(count=st.integers(1, 300), last=accesses())
    def burst(self, count: int, last: Access) -> None:
        first = self.executed + len(self.expected)
        self.run_operation([*(Access(2, n & 0xFFFF, 4, n, False, 1) for n in range(first, first + count)), last])

    @precondition(lambda self: self.operation is None)
    @rule(count=st.integers(1, 300))
    def lazy_burst(self, count: int) -> None:
        first = self.executed + len(self.expected)
        self.run_operation([Access(4, n, 1, n & 0xFF, False, 1) for n in range(first, first + count)], lazy=True)

    @rule(count=st.integers(1, 400))
    def consume(self, count: int) -> None:
        for _ in range(count):
            if not self.take():
                break
            self.complete()

    def take(self) -> bool:
        posted = self.ring.word(exit_ring.WORD_POSTED)
        entry = self.consumer.take()
        assert (entry is not None) == (posted > self.executed)
        if entry is None:
            return False
        assert entry.sequence == self.executed + 1
        assert seen(entry) == self.expected[0]
        return True

    def complete(self) -> None:
        access = self.expected.pop(0)
        self.executed += 1
        self.consumer.complete(U64 - self.executed if access.synchronous else 0)
        assert self.consumer.done == self.executed
        self.settle()

    @rule(nap=st.booleans())
    def sleep(self, nap: bool) -> None:
        empty = self.ring.word(exit_ring.WORD_POSTED) == self.executed
        assert self.consumer.idle == empty
        lies = self.consumer.nap() if nap else self.consumer.sleep()
        assert lies == empty
        self.rest = exit_ring.AWAKE if not lies else exit_ring.NAPPING if nap else exit_ring.ASLEEP

    @rule()
    def awake(self) -> None:
        self.consumer.awake()
        self.rest = exit_ring.AWAKE

    @rule()
    def restart_consumer(self) -> None:
        self.consumer.close()
        self.consumer = self.ring.consumer()
        assert self.consumer.done == self.executed

    @rule()
    def restart_consumer_within_an_entry(self) -> None:
        """What was taken and not completed is executed (again) by the successor."""
        self.take()
        self.restart_consumer()

    @precondition(lambda self: self.operation is None)
    @rule()
    def restart_producer(self) -> None:
        self.producer.close()
        self.producer = self.ring.producer()

    @invariant()
    def answers_are_right(self) -> None:
        done = self.answers[:]
        assert done == self.promised[: len(done)]

    def teardown(self) -> None:
        while self.take():
            self.complete()
        assert self.operation is None
        assert self.expected == []
        assert self.answers == self.promised
        assert self.ring.word(exit_ring.WORD_CONSUMED) == self.executed == self.ring.word(exit_ring.WORD_POSTED)
        assert self.ring.word(exit_ring.WORD_WAITING) == 0
        self.producer.close()
        self.consumer.close()
        self.ring.close()


@pytest.mark.soak("ipc")
def test_ring_behaves_like_a_list(scale):
    run_state_machine_as_test(
        RingMachine, settings=settings(max_examples=scale(40, 2_000), stateful_step_count=30, deadline=None)
    )


# ---------------------------------------------------------------- rules of the consumer's caller


def test_an_answer_that_does_not_fit_leaves_the_entry_taken(ring):
    consumer = ring.consumer()
    with in_thread(lambda: ring.producer().call(exit_ring.KIND_PIO_READ, 1, 1, 0)) as caller:
        entry = wait_for(consumer.take, spin=True)
        for answer in (-1, 1 << 64):
            with pytest.raises(ValueError):
                consumer.complete(answer)
            assert consumer.done == 0
            with pytest.raises(AssertionError):
                consumer.take()
        consumer.complete(77)
        assert entry.kind in READS
    assert caller.result == 77


def test_complete_without_take_and_take_without_complete(ring):
    producer, consumer = ring.producer(), ring.consumer()
    with pytest.raises(AssertionError):
        consumer.complete()
    producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, 1)
    producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, 2)
    consumer.take()
    assert not consumer.idle
    with pytest.raises(AssertionError):
        consumer.take()
    consumer.complete()
    with pytest.raises(AssertionError):
        consumer.complete()


def test_one_wake_up_for_a_full_ring(ring):
    """Behind a full ring the producer's word stays until it gets to run; one write to the eventfd is enough."""
    producer, consumer = ring.producer(), ring.consumer()
    for number in range(ENTRY_COUNT):
        producer.post(exit_ring.KIND_PIO_WRITE, 1, 2, number)
    ring.set_word(exit_ring.WORD_WAITING, 1)
    assert consume_from(ring, consumer, ENTRY_COUNT) == ENTRY_COUNT
    assert os.eventfd_read(ring.completion) == 1


def test_a_napping_consumer_is_woken_only_for_what_cannot_wait(ring):
    producer, consumer = ring.producer(), ring.consumer()
    assert consumer.nap()
    for number in range(ENTRY_COUNT // 2 - 1):
        producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, number & 0xFF, 1)
        assert not ring.rung()
    producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, 0, 1)
    assert ring.rung(), "half full"
    assert not consumer.nap(), "an entry is there: taken first"
    assert consume_from(ring, consumer, ENTRY_COUNT // 2) == ENTRY_COUNT // 2
    assert consumer.nap()
    producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, 0)
    assert ring.rung(), "not lazy"
    assert consume_from(ring, consumer, 1) == 1
    assert consumer.sleep()
    producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, 0, 1)
    assert ring.rung(), "asleep: everything rings"


def test_lingering_sees_an_entry_that_is_there(ring):
    producer, consumer = ring.producer(), ring.consumer()
    assert not consumer.linger()
    producer.post(exit_ring.KIND_PIO_WRITE, 1, 1, 0, 1)
    assert consumer.linger() == (exit_ring.SPINS > 0)


def test_the_string_area_goes_both_ways(ring):
    consumer = ring.consumer()
    producer = ring.producer()
    producer.string[:] = bytes(range(256)) * 16
    with in_thread(lambda: producer.call(exit_ring.KIND_PIO_STRING_WRITE, 0x1F0, 4, 0, 1024)):
        entry = wait_for(consumer.take, spin=True)
        assert bytes(consumer.string[: entry.count * entry.size]) == bytes(range(256)) * 16
        consumer.complete()
    with in_thread(lambda: producer.call(exit_ring.KIND_PIO_STRING_READ, 0x1F0, 2, 0, 3)):
        wait_for(consumer.take, spin=True)
        consumer.string[:6] = b"answer"
        consumer.complete()
    assert bytes(producer.string[:6]) == b"answer"


# ---------------------------------------------------------------- successor of a producer


def test_a_new_producer_goes_on_with_the_numbers(ring):
    consumer = ring.consumer()
    first = ring.producer()
    for number in range(3):
        first.post(exit_ring.KIND_PIO_WRITE, 1, 1, number)
    second = ring.producer()
    second.post(exit_ring.KIND_PIO_WRITE, 1, 1, 3)
    taken = []
    while (entry := consumer.take()) is not None:
        taken.append((entry.sequence, entry.data))
        consumer.complete()
    assert taken == [(1, 0), (2, 1), (3, 2), (4, 3)]


def test_a_producer_killed_in_a_call_leaves_the_entry_open(ring):
    """The journal: posted − consumed tells the successor that an answer was not applied; it is still there."""
    consumer = ring.consumer()
    with Child(lambda: ring.producer().call(exit_ring.KIND_PIO_READ, 0x60, 1, 0)) as victim:
        wait_for(consumer.take, spin=True)
        victim.kill()
        assert victim.wait() == -9
    consumer.complete(0x1C)
    successor = ring.producer()
    assert ring.word(exit_ring.WORD_POSTED) - ring.word(exit_ring.WORD_CONSUMED) == 1
    assert (ring.word(exit_ring.WORD_DONE), ring.word(exit_ring.WORD_ANSWER)) == (1, 0x1C)
    assert ring.word(exit_ring.WORD_WAITING) == 0  # nobody waits: completions need not wake
    successor.applied()
    assert ring.word(exit_ring.WORD_CONSUMED) == 1
    with in_thread(lambda: successor.call(exit_ring.KIND_PIO_READ, 0x60, 1, 0)) as caller:
        wait_for(consumer.take, spin=True)
        consumer.complete(0x2C)
    assert caller.result == 0x2C  # the wake-up for the predecessor did not count as its answer


# ---------------------------------------------------------------- helpers


class Caller:
    """What a blocking call in a thread returned."""

    result: object = None


@contextlib.contextmanager
def in_thread(function: Callable[[], object]):
    """Run the function in a thread during the block, and wait for its end."""
    caller = Caller()

    def work() -> None:
        caller.result = function()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield caller
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
