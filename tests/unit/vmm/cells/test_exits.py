"""The exit executor with real producers in other processes: order, answers, deferrals, breaches, fairness."""

from __future__ import annotations

import os
import signal

import pytest

from base.deferral import Deferral
from ipc.exit_ring import (
    ASLEEP,
    COUNTER_COUNT,
    ENTRY_COUNT,
    KIND_MMIO_READ,
    KIND_MMIO_WRITE,
    KIND_PIO_READ,
    KIND_PIO_STRING_READ,
    KIND_PIO_STRING_WRITE,
    KIND_PIO_WRITE,
    NAPPING,
    STRING_DATA_SIZE,
    WORD_ASLEEP,
    WORD_POSTED,
)
from tests.harness.devices import Recorder
from tests.harness.exits import MMIO, PORT, Endless, Machine, Watch
from vmm.cells.exits import BATCH, ExitExecutor
from vmm.devices.legacy.exerciser import (
    COUNT_POSTED,
    COUNT_SYNCHRONOUS,
    EXERCISER_PORT,
    LAST_COUNT,
    MMIO_COUNT,
    MMIO_LAST,
    STRING,
)


def test_entries_of_every_kind_reach_the_right_device(machine):
    executor = machine.ring()

    def produce():
        producer = machine.producer(executor)
        machine_answers = []
        producer.post(KIND_PIO_WRITE, PORT, 1, 0x11)
        producer.call(KIND_PIO_WRITE, PORT + 1, 2, 0x2222)
        producer.post(KIND_MMIO_WRITE, MMIO + 4, 8, 0x3333_4444_5555_6666)
        machine_answers.append(producer.call(KIND_PIO_READ, PORT + 2, 4, 0))
        machine_answers.append(producer.call(KIND_MMIO_READ, MMIO + 8, 8, 0))
        machine_answers.append(producer.call(KIND_PIO_READ, 0x999, 2, 0))
        machine_answers.append(producer.call(KIND_MMIO_READ, 0x9999, 4, 0))
        return machine_answers

    machine.device.answer = 0xAAAA_BBBB_CCCC_DDDD
    answers = machine.serve_child(machine.child(produce))
    assert answers == [0xCCCC_DDDD, 0xAAAA_BBBB_CCCC_DDDD, 0, 0]
    assert machine.device.accesses == [
        ("write", 0, 1, 0x11),
        ("write", 1, 2, 0x2222),
        ("write", 4, 8, 0x3333_4444_5555_6666),
        ("read", 2, 4, 0),
        ("read", 8, 8, 0),
    ]
    assert machine.failures == []
    assert len(executor.counters()) == COUNTER_COUNT


@pytest.mark.soak("devices")
def test_order_is_kept_between_posted_and_synchronous_entries(machine, scale, seed):
    executor = machine.ring()
    total = scale(5_000, 200_000)

    def produce():
        producer = machine.producer(executor)
        random = seed
        for count in range(1, total + 1):
            random = random * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
            choice = random >> 60
            if choice < 9:
                producer.post(KIND_PIO_WRITE, EXERCISER_PORT + COUNT_POSTED, 4, count)
            elif choice < 12:
                producer.post(KIND_MMIO_WRITE, 0x2000 + MMIO_COUNT, 4, count)
            elif choice < 14:
                producer.call(KIND_PIO_WRITE, EXERCISER_PORT + COUNT_SYNCHRONOUS, 4, count)
            else:
                producer.call(KIND_MMIO_WRITE, 0x2000 + MMIO_COUNT, 4, count)
                assert producer.call(KIND_PIO_READ, EXERCISER_PORT + LAST_COUNT, 4, 0) == count
                assert producer.call(KIND_MMIO_READ, 0x2000 + MMIO_LAST, 4, 0) == count
        return total

    assert machine.serve_child(machine.child(produce)) == total
    assert (machine.exerciser.count, machine.exerciser.errors, machine.failures) == (total, 0, [])


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, STRING_DATA_SIZE), (2, 300), (4, STRING_DATA_SIZE // 4)])
def test_string_entries(machine, size, count):
    executor = machine.ring()
    machine.device.answer = 0x1234_5678

    def produce():
        producer = machine.producer(executor)
        length = size * count
        data = bytes(index * 7 & 0xFF for index in range(length))
        producer.string[:length] = data
        producer.call(KIND_PIO_STRING_WRITE, PORT, size, 0, count)
        assert bytes(producer.string[:length]) == data
        producer.call(KIND_PIO_STRING_READ, PORT + 4, size, 0, count)
        return bytes(producer.string[:length]).hex()

    got = bytes.fromhex(machine.serve_child(machine.child(produce)))
    assert got == (0x1234_5678 & (1 << 8 * size) - 1).to_bytes(size, "little") * count
    data = bytes(index * 7 & 0xFF for index in range(size * count))
    values = [int.from_bytes(data[start : start + size], "little") for start in range(0, len(data), size)]
    assert machine.device.accesses[:count] == [("write", 0, size, value) for value in values]
    assert machine.device.accesses[count:] == [("read", 4, size, 0)] * count


def test_string_bytes_continue_what_was_written_one_by_one(machine):
    executor = machine.ring()

    def produce():
        producer = machine.producer(executor)
        for value in range(10):
            producer.call(KIND_PIO_WRITE, EXERCISER_PORT + STRING, 1, value)
        producer.string[:100] = bytes(range(10, 110))
        producer.call(KIND_PIO_STRING_WRITE, EXERCISER_PORT + STRING, 1, 0, 100)
        return producer.call(KIND_PIO_READ, EXERCISER_PORT + STRING, 1, 0)

    assert machine.serve_child(machine.child(produce)) == 0
    assert machine.exerciser.errors == 0


class Deferring(Recorder):
    """Defers every write; reads return the number of writes so far."""

    def __init__(self) -> None:
        super().__init__()
        self.deferrals: list[Deferral] = []

    def read(self, offset: int, size: int) -> int:
        return len(self.accesses)

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        super().write(offset, size, value)
        self.deferrals.append(Deferral())
        return self.deferrals[-1]


def test_a_deferral_parks_its_own_ring_and_no_other(machine):
    first, second = machine.ring(), machine.ring()
    deferring = Deferring()
    machine.ports.insert(deferring, 0x200, 1)

    def wait_for_both():
        producer = machine.producer(first)
        producer.call(KIND_PIO_WRITE, 0x200, 1, 1)
        producer.post(KIND_PIO_WRITE, PORT, 1, 0xAA)
        producer.call(KIND_PIO_WRITE, 0x200, 1, 2)
        return producer.call(KIND_PIO_READ, 0x200, 1, 0)

    def go_on():
        producer = machine.producer(second)
        return [producer.call(KIND_PIO_READ, PORT, 1, 0) for _ in range(100)]

    parked = machine.child(wait_for_both)
    machine.serve(lambda: len(deferring.deferrals) == 1)
    machine.device.answer = 7
    pidfd_child = machine.child(go_on)
    pidfd = os.pidfd_open(pidfd_child.pid)
    ended = Watch(pidfd)
    number = machine.events.add_subscriber(ended)
    machine.serve(lambda: ended.called)
    machine.events.remove_subscriber(number)
    os.close(pidfd)
    assert pidfd_child.join() == [7] * 100
    assert not first.idle
    assert second.idle
    assert ("write", 0, 1, 0xAA) not in machine.device.accesses
    # More doorbells change nothing.
    first.drain()
    assert len(deferring.deferrals) == 1
    deferring.deferrals[0].complete()
    machine.serve(lambda: len(deferring.deferrals) == 2)
    assert ("write", 0, 1, 0xAA) in machine.device.accesses
    deferring.deferrals[1].complete()
    assert machine.serve_child(parked) == 2


def test_a_posted_write_may_be_deferred_as_well(machine):
    executor = machine.ring()
    deferring = Deferring()
    machine.ports.insert(deferring, 0x200, 1)
    producer = machine.producer(executor)
    for value in range(3):
        producer.post(KIND_PIO_WRITE, 0x200, 1, value)
    for expected in range(1, 4):
        executor.drain()
        assert len(deferring.deferrals) == expected
        deferring.deferrals[-1].complete()
    assert executor.idle


def test_a_breach_ends_the_ring(machine):
    executor = machine.ring()
    producer = machine.producer(executor)
    producer.post(KIND_PIO_WRITE, PORT, 1, 1)
    producer._publish(77, PORT, 1, 0, 0, 1, 0)
    producer.post(KIND_PIO_WRITE, PORT, 1, 2)
    batches = machine.batches
    machine.serve(lambda: machine.failures)
    assert machine.batches == batches + 1, "what was executed before must still be flushed"
    assert "kind 77" in machine.failures[0]
    for _ in range(3):
        os.eventfd_write(executor.doorbell, 1)
        machine.events.run(0)
        executor.drain()
    assert machine.device.accesses == [("write", 0, 1, 1)]
    assert len(machine.failures) == 1
    assert not executor.idle


def test_a_breach_while_parked_shows_when_the_ring_goes_on(machine):
    executor = machine.ring()
    deferring = Deferring()
    machine.ports.insert(deferring, 0x200, 1)
    producer = machine.producer(executor)
    producer.post(KIND_PIO_WRITE, 0x200, 1, 1)
    executor.drain()
    producer.words[WORD_POSTED] = 1 << 63
    executor.drain()
    assert machine.failures == []
    deferring.deferrals[0].complete()
    assert len(machine.failures) == 1


def test_a_worker_that_never_stops_posting_does_not_starve_the_others(machine):
    executor = machine.ring()
    endless = Endless(machine.producer(executor))
    machine.ports.insert(endless, 0x300, 1)
    reader, writer = os.pipe()
    other = Watch(reader)
    machine.events.add_subscriber(other)
    os.write(writer, b"x")
    endless.producer.post(KIND_PIO_WRITE, 0x300, 1, 0)
    machine.events.run(0)
    assert endless.count <= 2 * BATCH
    machine.events.run(0)
    assert other.called
    before = endless.count
    machine.events.run(0)
    assert endless.count > before, "the executor must come back by itself"
    endless.going = False
    machine.serve(lambda: executor.idle)
    os.close(reader)
    os.close(writer)


def test_the_elements_of_a_string_count_as_accesses(machine):
    executor = machine.ring()
    producer = machine.producer(executor)
    for _ in range(ENTRY_COUNT):
        producer._publish(KIND_PIO_STRING_WRITE, PORT, 1, 0, 1, STRING_DATA_SIZE, 0)
    executor.drain()
    assert BATCH <= len(machine.device.accesses) <= BATCH + STRING_DATA_SIZE
    machine.serve(lambda: executor.idle)
    assert len(machine.device.accesses) == ENTRY_COUNT * STRING_DATA_SIZE


def test_lazy_entries_need_no_doorbell_while_the_executor_naps(machine):
    executor = machine.ring()
    producer = machine.producer(executor)
    producer.post(KIND_PIO_WRITE, PORT, 1, 1, 1)
    machine.serve(lambda: len(machine.device.accesses) == 1)
    assert producer.words[WORD_ASLEEP] == NAPPING
    for value in range(2, 20):
        producer.post(KIND_PIO_WRITE, PORT, 1, value, 1)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(executor.doorbell)
    machine.serve(lambda: len(machine.device.accesses) == 19)
    machine.serve(lambda: producer.words[WORD_ASLEEP] == ASLEEP)
    assert machine.events.run(0) == 0
    producer.post(KIND_PIO_WRITE, PORT, 1, 20, 1)
    machine.serve(lambda: len(machine.device.accesses) == 20)


def test_a_nap_ends_for_an_entry_that_is_not_lazy(machine):
    executor = machine.ring()
    producer = machine.producer(executor)
    producer.post(KIND_PIO_WRITE, PORT, 1, 1, 1)
    machine.serve(lambda: len(machine.device.accesses) == 1)
    producer.post(KIND_PIO_WRITE, PORT, 1, 2, 1)
    producer.post(KIND_PIO_WRITE, PORT, 1, 3)
    assert os.eventfd_read(executor.doorbell) == 1
    executor.drain()
    assert len(machine.device.accesses) == 3


def test_a_parked_ring_does_not_nap_its_way_on(machine):
    executor = machine.ring()
    deferring = Deferring()
    machine.ports.insert(deferring, 0x200, 1)
    producer = machine.producer(executor)
    producer.post(KIND_PIO_WRITE, PORT, 1, 1, 1)
    machine.serve(lambda: len(machine.device.accesses) == 1)
    producer.post(KIND_PIO_WRITE, 0x200, 1, 1)
    machine.serve(lambda: len(deferring.deferrals) == 1)
    producer.post(KIND_PIO_WRITE, PORT, 1, 2, 1)
    for _ in range(5):
        machine.events.run(2)
    assert len(machine.device.accesses) == 1
    deferring.deferrals[0].complete()
    machine.serve(lambda: len(machine.device.accesses) == 2)


def test_something_runs_around_each_batch_even_if_it_ends_in_a_breach(machine):
    order: list[str] = []
    executor = ExitExecutor(
        machine.ports,
        machine.mmio,
        before_batch=lambda: order.append("before"),
        after_batch=lambda: order.append("after"),
        failed=lambda text: order.append("failed"),
    )
    producer = machine.producer(executor)
    producer.post(KIND_PIO_WRITE, PORT, 1, 1)
    executor.drain()
    producer.words[WORD_POSTED] = 1 << 62
    executor.drain()
    executor.drain()
    assert order == ["before", "after", "before", "failed", "after"]
    machine.executors.append(executor)


def test_full_counters_of_the_eventfds_do_not_block(machine):
    """A taken-over worker holds both eventfds and can fill their counters."""
    executor = machine.ring()
    endless = Endless(machine.producer(executor))
    machine.ports.insert(endless, 0x300, 1)
    endless.producer.post(KIND_PIO_WRITE, 0x300, 1, 0)
    for descriptor in (executor.doorbell, executor.completion):
        try:
            os.eventfd_read(descriptor)
        except BlockingIOError:
            pass
        os.eventfd_write(descriptor, (1 << 64) - 2)
    endless.producer.words[9] = 1  # it waits, so every entry wakes it
    executor.drain()
    executor.drain()
    assert endless.count >= 2 * BATCH
    endless.going = False
    machine.serve(lambda: executor.idle)


def test_descriptors_are_closed():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        machine = Machine()
        machine.ring()
        machine.close()
    assert len(os.listdir("/proc/self/fd")) == before


class Thief(Watch):
    """Empties a doorbell of which the event loop has learned already that it rang, and makes it blocking."""

    def __init__(self, descriptor: int, doorbell: int) -> None:
        super().__init__(descriptor)
        self.doorbell = doorbell
        self.stolen = 0

    def process(self, events, ops) -> None:
        super().process(events, ops)
        if not self.stolen:
            os.set_blocking(self.doorbell, True)
            self.stolen = os.eventfd_read(self.doorbell)


def test_a_doorbell_that_a_worker_makes_blocking_and_empties_does_not_block(machine):
    def blocked(number, frame):
        raise AssertionError("the controller waits for a worker")

    executor = machine.ring()
    thief = Thief(os.eventfd(0, os.EFD_NONBLOCK), executor.doorbell)
    machine.events.add_subscriber(thief)
    before = signal.signal(signal.SIGALRM, blocked)
    signal.alarm(60)
    try:
        os.eventfd_write(thief.descriptor, 1)
        machine.producer(executor).post(KIND_PIO_WRITE, PORT, 1, 1)  # rings second, so it is looked at second
        machine.serve(lambda: machine.device.accesses)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.close(thief.descriptor)
    assert thief.stolen == 1
    assert machine.device.accesses == [("write", 0, 1, 1)]
