"""The ring's sleeping and waking under every kind of interleaving: a scheduler decides who makes the next access.

Both ends run in threads that stop before each access to a shared word and before each sleep; a seeded chooser lets
one of those go on that can. When neither can, a wake-up was lost. (Memory order is not part of this model: see
test_shared_memory_fence.)
"""

from __future__ import annotations

import os
import random
import select
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ipc import exit_ring
from ipc.exit_ring import ENTRY_COUNT, ExitRingConsumer, ExitRingProducer
from tests.harness.processes import PATIENCE_SECONDS
from tests.harness.rings import Ring


class LostWakeUpError(AssertionError):
    """Everybody sleeps and nobody will wake them."""


class Actor:
    """One end of the ring in a thread of its own."""

    def __init__(self, scheduler: Scheduler, work: Callable[[Actor], None]) -> None:
        self.scheduler = scheduler
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.ended = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[Actor], None]) -> None:
        try:
            self.stop()
            work(self)
        except BaseException as error:
            self.error = error
        self.ended = True
        self.scheduler.stopped.release()

    def stop(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let the scheduler decide when to go on; not before ``ready``."""
        self.ready = ready
        self.scheduler.stopped.release()
        assert self.go.acquire(timeout=PATIENCE_SECONDS)


class Scheduler:
    """Runs actors one step at a time."""

    def __init__(self, seed: int) -> None:
        self.stopped = threading.Semaphore(0)
        self.chooser = random.Random(seed)
        self.actors: list[Actor] = []

    def add(self, work: Callable[[Actor], None]) -> None:
        """Add an actor; it stops before its first step."""
        self.actors.append(Actor(self, work))
        self._wait()

    def _wait(self) -> None:
        assert self.stopped.acquire(timeout=PATIENCE_SECONDS)

    def run(self) -> None:
        """Let all actors end. Raises LostWakeUpError when none can go on."""
        while running := [actor for actor in self.actors if not actor.ended]:
            able = [actor for actor in running if actor.ready()]
            if not able:
                raise LostWakeUpError(f"{len(running)} of {len(self.actors)} sleep")
            self.chooser.choice(able).go.release()
            self._wait()
            for actor in running:
                if actor.error is not None:
                    raise actor.error


class SteppedWords:
    """The header words of the ring; an actor stops before each access."""

    def __init__(self, words: memoryview, actor: Actor) -> None:
        self._words = words
        self._actor = actor

    def __getitem__(self, index: int) -> int:
        self._actor.stop()
        return int(self._words[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._actor.stop()
        self._words[index] = value


def signalled(descriptor: int) -> bool:
    """Tell whether an eventfd can be read, without reading it."""
    return bool(select.select([descriptor], [], [], 0)[0])


class SteppedProducer(ExitRingProducer):
    """A producer that stops at each step; a sleeping one goes on when its eventfd is signalled."""

    actor: Actor

    def start(self, actor: Actor) -> None:
        words: Any = SteppedWords(self.words, actor)
        self.actor, self.words = actor, words

    def _sleep(self) -> None:
        self.actor.stop(lambda: signalled(self._completion))
        super()._sleep()


def consume(ring: Ring, consumer: ExitRingConsumer, actor: Actor, last: int, nap: bool) -> None:
    """Execute entries until number ``last``, as the controller does."""
    words: Any = SteppedWords(consumer._words, actor)
    consumer._words = words
    consumer.awake()
    while consumer.done < last:
        entry = consumer.take()
        if entry is not None:
            assert entry.address == entry.sequence
            consumer.complete(entry.sequence * 2)
        elif consumer.nap() if nap else consumer.sleep():
            actor.stop(lambda: signalled(ring.doorbell))
            os.eventfd_read(ring.doorbell)
            consumer.awake()


def play(seed: int, script: str, nap: bool, behind: int) -> None:
    """One schedule. ``script``: p is a post, l a lazy one, c a call; ``behind``: entries that wait already."""
    ring = Ring()
    producer = SteppedProducer(ring.buffer, ring.doorbell, ring.completion)
    consumer = ring.consumer()
    for number in range(1, behind + 1):
        producer.post(exit_ring.KIND_MMIO_WRITE, number, 1, 0)
    last = behind + len(script)

    def produce(actor: Actor) -> None:
        producer.start(actor)
        for number, action in enumerate(script, behind + 1):
            if action == "c":
                assert producer.call(exit_ring.KIND_MMIO_READ, number, 1, 0) == number * 2
            else:
                producer.post(exit_ring.KIND_MMIO_WRITE, number, 1, 0, int(action == "l"))

    scheduler = Scheduler(seed)
    scheduler.add(produce)
    scheduler.add(lambda actor: consume(ring, consumer, actor, last, nap))
    scheduler.run()
    assert consumer.done == last
    assert ring.word(exit_ring.WORD_WAITING) == 0
    ring.close()


@pytest.mark.soak("ipc")
@pytest.mark.parametrize("spins", [0, 2])
@pytest.mark.parametrize(
    "case",
    [
        ("p", False, 0),
        ("pp", False, 0),
        ("c", False, 0),
        ("cpc", False, 0),
        ("pcp", True, 0),
        ("lc", True, 0),
        ("llp", True, 0),
        ("lll", False, 0),
        ("p", False, ENTRY_COUNT),
        ("pc", False, ENTRY_COUNT),
        ("lc", True, ENTRY_COUNT),
    ],
)
def test_no_schedule_loses_a_wake_up(monkeypatch, scale, seed, spins, case):
    monkeypatch.setattr(exit_ring, "_SPIN_RANGE", range(spins))
    script, nap, behind = case
    for number in range(scale(10, 150) if behind else scale(80, 1_000)):
        try:
            play(seed << 32 | number, script, nap, behind)
        except LostWakeUpError as error:
            raise AssertionError(f"schedule {number}: {error}") from None


def test_the_scheduler_finds_a_lost_wake_up(monkeypatch, seed):
    """A consumer that looks before it lies down, instead of after, is caught."""

    def look_first(self: ExitRingConsumer, how: int) -> bool:
        if self._words[exit_ring.WORD_POSTED] != self.done:
            return False
        self._words[exit_ring.WORD_ASLEEP] = how
        return True

    def play_many() -> None:
        for number in range(1_000):
            play(seed << 32 | number, "p", False, 0)

    monkeypatch.setattr(ExitRingConsumer, "_lie_down", look_first)
    with pytest.raises(LostWakeUpError):
        play_many()
