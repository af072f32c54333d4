"""Litmus test of the fence: Dekker's test between two processes (docs/formats/exit-ring.md, memory order)."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading

import pytest

from ipc import shared_memory
from tests.harness.processes import Child

# Each word in its own cache line.
_FLAGS = (0, 8)
_ROUNDS = (16, 24)
_RESULTS = 4096
_SPINS = 2000


def play(shared: mmap.mmap, side: int, rounds: int, fenced: bool) -> None:
    """In each round: set the own flag, look at the other's. Of two sides at least one must see the other's flag."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[side % len(cpus)]})
    words = memoryview(shared)[:_RESULTS].cast("Q")
    stale = memoryview(shared)[_RESULTS + side * rounds :]
    mine, other = _FLAGS[side], _FLAGS[1 - side]
    my_round, other_round = _ROUNDS[side], _ROUNDS[1 - side]
    # The side that comes last to the barrier leaves it first; small pauses bring both flags together now and then.
    chooser = random.Random(side)
    pauses = [range(chooser.randrange(10)) for _ in range(4096)]
    fence = shared_memory.fence
    for number in range(1, rounds + 1):
        words[my_round] = number
        spins = 0
        while words[other_round] < number:
            spins += 1
            if spins > _SPINS:
                os.sched_yield()
        for _ in pauses[number & 4095]:
            pass
        words[mine] = number
        if fenced:
            fence()
        if words[other] < number:
            stale[number - 1] = 1


def both_stale(rounds: int, fenced: bool) -> int:
    """Return in how many rounds neither side saw the other's flag."""
    size = _RESULTS + 2 * rounds
    shared = mmap.mmap(-1, size)
    with Child(lambda: play(shared, 0, rounds, fenced)) as one, Child(lambda: play(shared, 1, rounds, fenced)) as two:
        one.join()
        two.join()
    first = shared[_RESULTS : _RESULTS + rounds]
    second = shared[_RESULTS + rounds : size]
    return sum(a & b for a, b in zip(first, second, strict=True))


@pytest.mark.soak("ipc")
def test_fence_orders_store_before_load(scale, record_property):
    """The figure without the fence is printed, not asserted: how often a CPU reorders is its own affair."""
    rounds = scale(20_000, 300_000)
    with_fence = both_stale(rounds, True)
    without = both_stale(rounds, False)
    record_property("both_stale_without_fence", without)
    print(f"both sides stale in {rounds} rounds: {with_fence} with fence(), {without} without")
    assert with_fence == 0


def test_fence_takes_and_releases_the_lock(monkeypatch):
    """The litmus test alone would not notice an empty function: a call lasts longer than a store here."""
    lock = threading.Lock()
    events: list[str] = []

    class Watched:
        def __enter__(self) -> None:
            events.append("taken" if lock.acquire(blocking=False) else "busy")

        def __exit__(self, *_: object) -> None:
            lock.release()
            events.append("released")

    assert type(shared_memory.fence_lock) is type(lock)
    monkeypatch.setattr(shared_memory, "fence_lock", Watched())
    shared_memory.fence()
    shared_memory.fence()
    assert events == ["taken", "released"] * 2


def test_fence_may_be_used_in_a_signal_handler():
    """The handler can come at any point of fence(); it must not find the lock taken."""

    def storm() -> int:
        handled = 0

        def handler(*_: object) -> None:
            nonlocal handled
            handled += 1
            shared_memory.fence()

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        while handled < 500:
            shared_memory.fence()
            shared_memory.fence()
            shared_memory.fence()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return handled

    with Child(storm) as child:
        assert child.join() >= 500
