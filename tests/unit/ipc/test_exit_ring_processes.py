"""The exit ring between two real processes: order, exactly once, no lost wake-up, kicks, deaths."""

from __future__ import annotations

import functools
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable

import pytest

from ipc import exit_ring
from ipc.exit_ring import COUNTER_RING_FULL, ENTRY_COUNT, ExitRingConsumer
from tests.harness.processes import PATIENCE_SECONDS, Child, wait_for
from tests.harness.rings import STRINGS, Access, Ring, perform, random_access, seen

U64 = (1 << 64) - 1


def pattern(number: int, length: int) -> bytes:
    """Return the content of the string area for entry ``number``."""
    return bytes([number & 0xFF, number >> 8 & 0xFF, 0x5A, length & 0xFF] * (length // 4 + 1))[:length]


def answer_to(number: int) -> int:
    """Return the answer to entry ``number``."""
    return number * 0x9E37_79B9_7F4A_7C15 & U64


def produce(ring: Ring, seed: int, first: int, last: int, pause: Callable[[], None] = lambda: None) -> int:
    """Make the accesses ``first`` … ``last`` of a seeded sequence; check every answer."""
    chooser = random.Random(seed)
    producer = ring.producer()
    for number in range(1, last + 1):
        access = random_access(chooser)
        if number < first:
            continue
        if access.kind == exit_ring.KIND_PIO_STRING_WRITE:
            producer.string[: access.length] = pattern(number, access.length)
        answer = perform(producer, access, lazy=number < last)
        assert answer == (answer_to(number) if access.synchronous else None), number
        if access.kind == exit_ring.KIND_PIO_STRING_READ:
            assert producer.string[: access.length] == pattern(number, access.length)
        pause()
    return int(producer.counters[COUNTER_RING_FULL])


class Executor:
    """The consumer's process: executes entries, checks them against the same seeded sequence."""

    def __init__(self, ring: Ring, seed: int) -> None:
        self.ring = ring
        self.consumer: ExitRingConsumer = ring.consumer()
        self.chooser = random.Random(seed)
        self.sleeps = 0

    def execute(self, limit: int = 1 << 30) -> int:
        """Execute what is there, at most ``limit`` entries; return their number."""
        consumer = self.consumer
        for executed in range(limit):
            entry = consumer.take()
            if entry is None:
                return executed
            self.check()
            consumer.complete(answer_to(entry.sequence) if entry.flags else 0)
        return limit

    def check(self) -> None:
        entry = self.consumer.entry
        expected = random_access(self.chooser)
        assert seen(entry) == expected, entry.sequence
        if expected.kind == exit_ring.KIND_PIO_STRING_WRITE:
            assert self.consumer.string[: expected.length] == pattern(entry.sequence, expected.length)
        elif expected.kind in STRINGS:
            self.consumer.string[: expected.length] = pattern(entry.sequence, expected.length)

    def run(self, last: int, pause: Callable[[], None] = lambda: None, nap: bool = False) -> None:
        """Execute entries until number ``last``, sleeping by the protocol in between.

        A nap has no end here: what cannot wait must wake it, and the last entry cannot.
        """
        lie_down = self.consumer.nap if nap else self.consumer.sleep
        waiter = select.poll()
        waiter.register(self.ring.doorbell, select.POLLIN)
        while self.consumer.done < last:
            pause()
            if self.execute():
                continue
            pause()
            if not lie_down():
                continue
            self.sleeps += 1
            assert waiter.poll(PATIENCE_SECONDS * 1000), f"no doorbell after entry {self.consumer.done}: wake-up lost"
            os.eventfd_read(self.ring.doorbell)
            pause()
            self.consumer.awake()


@pytest.mark.soak("ipc")
def test_entries_arrive_in_order_and_once(ring, scale, seed):
    count = scale(20_000, 1_000_000)
    with Child(lambda: produce(ring, seed, 1, count)) as producer:
        executor = Executor(ring, seed)
        executor.run(count)
        producer.join()
    assert executor.consumer.idle
    assert ring.word(exit_ring.WORD_CONSUMED) == count
    assert executor.sleeps > 0


@pytest.mark.soak("ipc")
def test_a_full_ring_makes_the_producer_wait(ring, scale):
    count = scale(20, 2_000) * ENTRY_COUNT

    def post() -> int:
        producer = ring.producer()
        for number in range(1, count + 1):
            producer.post(exit_ring.KIND_MMIO_WRITE, number, 8, number ^ U64)
        return int(producer.counters[COUNTER_RING_FULL])

    consumer = ring.consumer()
    with Child(post) as producer:
        for number in range(1, count + 1):
            if number % ENTRY_COUNT == 1:  # let it run into the wall
                wait_for(lambda: ring.word(exit_ring.WORD_POSTED) == min(count, consumer.done + ENTRY_COUNT), spin=True)
            while (entry := consumer.take()) is None:
                time.sleep(0)
            assert (entry.sequence, entry.address, entry.data) == (number, number, number ^ U64)
            consumer.complete()
        # Not each time: it may be off the CPU between its last entry and its look at the wall.
        assert producer.join() > 0


@pytest.mark.soak("ipc")
@pytest.mark.parametrize("nap", [False, True], ids=["sleep", "nap"])
def test_no_wake_up_is_lost(ring, scale, seed, nap):
    """Random pauses in both processes move the two sleeps and the two wake-ups over each other."""
    count = scale(6_000, 500_000)

    def pauses(own_seed: int) -> Callable[[], None]:
        chooser = random.Random(own_seed)

        def pause() -> None:
            kind = chooser.random()
            if kind < 0.02:
                time.sleep(chooser.random() * 1e-4)
            elif kind < 0.5:
                for _ in range(chooser.randrange(300)):
                    pass

        return pause

    with Child(lambda: produce(ring, seed, 1, count, pauses(seed + 1))) as producer:
        executor = Executor(ring, seed)
        executor.run(count, pauses(seed + 2), nap)
        producer.join()
    assert executor.sleeps > count // 200, "the consumer hardly slept: the test shows nothing"


def test_a_consumer_is_replaced_at_any_entry(ring, seed):
    """The new consumer reads how far its predecessor got from the ring; nothing is lost or repeated."""
    count = 3_000
    chooser = random.Random(seed)
    with Child(lambda: produce(ring, seed, 1, count)) as producer:
        executor = Executor(ring, seed)
        while executor.consumer.done < count:
            executor.execute(chooser.randrange(1, 40))
            done = executor.consumer.done
            executor.consumer.close()
            executor.consumer = ring.consumer()
            assert executor.consumer.done == done
        producer.join()


def test_a_producer_is_replaced_between_entries(ring, seed):
    count, part = 3_000, 300
    executor = Executor(ring, seed)
    for first in range(1, count + 1, part):
        with Child(functools.partial(produce, ring, seed, first, first + part - 1)) as producer:
            executor.run(first + part - 1)
            producer.join()
    assert executor.consumer.idle


@pytest.mark.soak("ipc")
def test_a_producer_killed_anywhere_leaves_whole_entries(scale, seed):
    """kill -9 at random moments: what was posted is complete, in order, and the successor's numbers go on."""
    chooser = random.Random(seed)
    for _ in range(scale(20, 500)):
        kill_a_producer(chooser.random() * 3e-3)


def kill_a_producer(after: float) -> None:
    ring = Ring()
    consumer = ring.consumer()

    def post() -> None:
        producer = ring.producer()
        while True:
            number = ring.word(exit_ring.WORD_POSTED) + 1
            producer.post(exit_ring.KIND_MMIO_WRITE, number, 4, number)

    with Child(post) as victim:
        wait_for(lambda: ring.word(exit_ring.WORD_POSTED) > 0, spin=True)
        moment = time.monotonic() + after
        while time.monotonic() < moment:
            drain(consumer)
        victim.kill()
        victim.wait()
    drain(consumer)
    successor = ring.producer()
    following = consumer.done + 1
    successor.post(exit_ring.KIND_MMIO_WRITE, following, 4, following)
    assert drain(consumer) == 1
    ring.close()


def drain(consumer: ExitRingConsumer) -> int:
    """Execute what is there; each entry carries its number as address and data."""
    executed = 0
    while (entry := consumer.take()) is not None:
        assert (entry.address, entry.data) == (entry.sequence, entry.sequence)
        consumer.complete()
        executed += 1
    return executed


@pytest.mark.parametrize("in_main_thread", [True, False], ids=["main thread", "vCPU thread"])
def test_kicks_do_not_end_a_call(ring, in_main_thread):
    """A pause kicks the vCPU's thread with a signal; a call that waits must wait on."""

    def call() -> int:
        signal.signal(signal.SIGRTMIN, lambda *_: None)
        thread = threading.get_ident()
        over = threading.Event()
        answers: list[int] = []

        def kick() -> None:
            while not over.is_set():
                signal.pthread_kill(thread, signal.SIGRTMIN)
                time.sleep(2e-4)

        def work() -> None:
            nonlocal thread
            thread = threading.get_ident()
            producer = ring.producer()
            answers.extend(int(producer.call(exit_ring.KIND_PIO_READ, 0x60, 1, 0)) for _ in range(10))
            over.set()

        if in_main_thread:
            threading.Thread(target=kick, daemon=True).start()
            work()
        else:
            worker = threading.Thread(target=work)
            worker.start()
            kick()
            worker.join()
        assert answers == list(range(10))
        return len(answers)

    consumer = ring.consumer()
    with Child(call) as producer:
        for number in range(10):
            wait_for(lambda: consumer.take() is not None, spin=True)
            time.sleep(0.02)  # some kicks arrive meanwhile
            consumer.complete(number)
        assert producer.join() == 10


def test_access_is_what_random_access_says(seed):
    """The generator of the tests above covers every kind, posted and synchronous."""
    chooser = random.Random(seed)
    made: list[Access] = [random_access(chooser) for _ in range(2_000)]
    assert {access.kind for access in made} == set(range(1, 8))
    assert {access.size for access in made} == {1, 2, 4, 8}
    assert {access.synchronous for access in made} == {True, False}
