"""Looking at a ring before sleeping: when, for how long, and when not any more."""

from __future__ import annotations

import pytest

from virtio import polling
from virtio.polling import LONGEST_PAUSE_NS, SHORTEST_PAUSE_NS, TRIES, AdaptivePolling

LOOK = 50_000


class World:
    """A clock that goes on by 1 µs with each look at it, and a ring whose driver acts at times."""

    def __init__(self) -> None:
        self.now = 10 * LONGEST_PAUSE_NS
        self.moves_at = 1 << 62
        self.next_available = 7

    def clock(self) -> int:
        self.now += 1000
        return self.now

    @property
    def available(self):
        return self

    def __getitem__(self, index: int) -> int:
        assert index == 1
        return 8 if self.now >= self.moves_at else 7


@pytest.fixture
def world(monkeypatch):
    made = World()
    monkeypatch.setattr(polling, "_clock", made.clock)
    return made


def wake_after(world, poll, sleep):
    poll.asleep()
    world.now += sleep
    poll.woken()


def test_it_looks_only_after_a_short_sleep(world):
    poll = AdaptivePolling(LOOK)
    poll.woken()
    assert poll.window_ns == 0  # nobody knows how long it slept
    wake_after(world, poll, 3 * LOOK)
    assert poll.window_ns == 0
    wake_after(world, poll, LOOK)
    assert poll.window_ns == LOOK


def test_a_look_ends_when_the_driver_acts_or_the_time_is_over(world):
    poll = AdaptivePolling(LOOK)
    wake_after(world, poll, LOOK)
    begun = world.now
    world.moves_at = begun + 20_000
    assert poll.look(world)
    assert world.now < begun + 25_000
    world.moves_at = 1 << 62
    begun = world.now
    assert not poll.look(world)
    assert begun + LOOK <= world.now < begun + LOOK + 5000


def test_looks_in_vain_stop_for_ever_longer(world):
    poll = AdaptivePolling(LOOK)
    pause = SHORTEST_PAUSE_NS
    for _ in range(10):
        wake_after(world, poll, LOOK)
        assert poll.window_ns == LOOK
        for _ in range(TRIES):
            assert not poll.look(world)
        assert poll.window_ns == 0
        wake_after(world, poll, LOOK)
        assert poll.window_ns == 0
        world.now += pause
        pause = min(2 * pause, LONGEST_PAUSE_NS)
    wake_after(world, poll, LOOK)
    world.moves_at = world.now + 5000
    assert poll.look(world)  # one that pays, and the pauses are short again
    world.moves_at = 1 << 62
    for _ in range(TRIES):
        poll.look(world)
    world.now += SHORTEST_PAUSE_NS
    wake_after(world, poll, LOOK)
    assert poll.window_ns == LOOK


def test_one_that_pays_in_between_forgives_those_in_vain(world):
    poll = AdaptivePolling(LOOK)
    wake_after(world, poll, LOOK)
    for _ in range(5):
        assert not poll.look(world)
        assert not poll.look(world)
        world.moves_at = world.now + 5000
        assert poll.look(world)
        world.moves_at = 1 << 62
    assert poll.window_ns == LOOK


def test_zero_is_never(world):
    poll = AdaptivePolling(0)
    before = world.now
    for _ in range(3):
        wake_after(world, poll, 0)
        assert poll.window_ns == 0
    assert world.now == before
