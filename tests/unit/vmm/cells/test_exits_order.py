"""Rings of several vCPUs: what the guest's locks have put in order is executed in that order."""

from __future__ import annotations

import fcntl
import os
import random
import time
from unittest.mock import patch

import pytest

from base.deferral import Deferral
from ipc.exit_ring import ENTRY_COUNT, KIND_ACKNOWLEDGE, KIND_MMIO_WRITE, KIND_PIO_READ, KIND_PIO_WRITE, WORD_POSTED
from ipc.shared_memory import create_shared, map_shared
from tests.harness.exits import MMIO, PORT, Endless
from vmm.cells.exits import BATCH, ExitExecutor


def written(machine) -> list[int]:
    return [value for what, _, _, value in machine.device.accesses if what == "write"]


def test_what_another_vcpu_has_posted_before_comes_first(machine):
    first, second = machine.ring(), machine.ring()
    one, other = machine.producer(first), machine.producer(second)
    one.post(KIND_PIO_WRITE, PORT, 1, 1)
    other.post(KIND_PIO_WRITE, PORT, 1, 2)
    one.post(KIND_PIO_WRITE, PORT, 1, 3)
    second.drain()
    assert written(machine) == [1, 2]
    first.drain()
    assert written(machine) == [1, 2, 3]
    assert not machine.failures and first.idle and second.idle


def test_an_inta_cycle_comes_after_what_was_posted_before(machine):
    """The vCPU that has the line is answered; others hear that nothing asks."""
    cycles = []

    def acknowledge():
        cycles.append(list(machine.device.accesses))
        return 0x121

    first = ExitExecutor(
        machine.ports,
        machine.mmio,
        after_batch=lambda: None,
        failed=machine.failures.append,
        acknowledge=acknowledge,
    )
    machine.events.add_subscriber(first)
    machine.executors.append(first)
    second = machine.ring()

    def produce():
        producers = machine.producer(first), machine.producer(second)
        producers[0].post(KIND_PIO_WRITE, PORT, 1, 0x11)
        return [producer.call(KIND_ACKNOWLEDGE, 0, 1, 0) for producer in producers]

    assert machine.serve_child(machine.child(produce)) == [0x121, 0]
    assert cycles == [[("write", 0, 1, 0x11)]]
    assert machine.failures == []


@pytest.mark.soak("devices")
@pytest.mark.parametrize("vcpus", [2, 3, 8])
def test_the_order_is_that_of_posting_whenever_the_rings_are_looked_at(machine, scale, seed, vcpus):
    generator = random.Random(seed)
    executors = [machine.ring() for _ in range(vcpus)]
    producers = [machine.producer(each) for each in executors]
    total = scale(3_000, 100_000)
    waiting = [0] * vcpus
    for count in range(total):
        vcpu = generator.randrange(vcpus)
        if waiting[vcpu] >= ENTRY_COUNT // 2:
            executors[vcpu].drain()
        producers[vcpu].post(KIND_PIO_WRITE, PORT, 4, count, lazy=1)
        waiting[vcpu] += 1
        while generator.random() < 0.2:
            looked = generator.randrange(vcpus)
            executors[looked].drain()
            waiting = [0 if each.idle else more for each, more in zip(executors, waiting, strict=True)]
    for each in executors:
        each.drain()
    assert written(machine) == list(range(total))
    assert not machine.failures


def test_processes_that_take_turns_by_a_lock_are_executed_in_turn(machine, scale, tmp_path):
    """As a guest's processors do it: each takes the lock, counts, posts the count, releases the lock."""
    executors = [machine.ring() for _ in range(3)]
    counter = create_shared("counter", 4096)
    lock = tmp_path / "lock"
    lock.touch()
    rounds = scale(1_000, 50_000)

    def produce(executor):
        def run():
            producer = machine.producer(executor)
            words = memoryview(map_shared(counter, 4096)).cast("Q")
            descriptor = os.open(lock, os.O_RDWR)
            for _ in range(rounds):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                words[0] += 1
                if words[0] % 7 == 0:
                    producer.call(KIND_PIO_WRITE, PORT, 4, words[0])
                else:
                    producer.post(KIND_PIO_WRITE, PORT, 4, words[0], lazy=1)
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            return rounds

        return run

    children = [machine.child(produce(each)) for each in executors]
    for child in children:
        assert machine.serve_child(child) == rounds
    os.close(counter)
    assert written(machine) == list(range(1, 3 * rounds + 1))
    assert not machine.failures


def test_a_parked_ring_is_passed_over(machine):
    """Its vCPU waits for the deferred access: nothing of the guest can depend on what it would do next."""
    first, second = machine.ring(), machine.ring()
    one, other = machine.producer(first), machine.producer(second)
    deferral = Deferral()
    machine.device.deferral = deferral
    one.post(KIND_PIO_WRITE, PORT, 1, 1)
    first.drain()
    machine.device.deferral = None
    one.post(KIND_PIO_WRITE, PORT, 1, 2)
    other.post(KIND_PIO_WRITE, PORT, 1, 3)
    second.drain()
    assert written(machine) == [1, 3]
    deferral.complete()
    assert written(machine) == [1, 3, 2]


def test_accesses_to_memory_do_not_look_at_other_rings(machine):
    """No write to memory is posted where there are several vCPUs."""
    first, second = machine.ring(), machine.ring()
    machine.producer(first).post(KIND_PIO_WRITE, PORT, 1, 1)
    machine.producer(second).post(KIND_MMIO_WRITE, MMIO, 1, 2)
    second.drain()
    assert written(machine) == [2]


def test_a_breach_in_another_ring_ends_that_one_only(machine):
    first, second = machine.ring(), machine.ring()
    one, other = machine.producer(first), machine.producer(second)
    one.post(KIND_PIO_WRITE, PORT, 1, 1)
    one.words[WORD_POSTED] = ENTRY_COUNT + 9
    other.post(KIND_PIO_WRITE, PORT, 1, 2)
    second.drain()
    assert len(machine.failures) == 1
    other.post(KIND_PIO_WRITE, PORT, 1, 3)
    second.drain()
    assert written(machine) == [2, 3]
    assert len(machine.failures) == 1


class Forger(Endless):
    """As Endless, and each entry claims to be the oldest."""

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        with patch("ipc.exit_ring.monotonic_ns", lambda: 0):
            return super().write(offset, size, value)


def test_a_worker_that_forges_its_time_stamps_does_not_keep_the_controller(machine):
    first, second = machine.ring(), machine.ring()
    forger = Forger(machine.producer(first))
    machine.ports.insert(forger, 0x300, 1)
    other = machine.producer(second)
    other.post(KIND_PIO_WRITE, 0x300, 1, 0)
    for count in range(10):
        other.post(KIND_PIO_WRITE, PORT, 1, count)
    second.drain()
    assert forger.count <= 2 * BATCH
    forger.going = False
    machine.serve(lambda: first.idle and second.idle)
    assert written(machine) == list(range(10))


def test_reads_wait_for_older_writes_of_others_as_well(machine):
    first, second = machine.ring(), machine.ring()
    machine.producer(first).post(KIND_PIO_WRITE, PORT, 1, 1, lazy=1)
    machine.device.answer = 7

    def produce():
        return machine.producer(second).call(KIND_PIO_READ, PORT, 1, 0)

    child = machine.child(produce)
    while second.idle:
        time.sleep(0.001)
    second.drain()  # the first ring's own turn has not come
    assert child.join() == 7
    assert [each[0] for each in machine.device.accesses] == ["write", "read"]
