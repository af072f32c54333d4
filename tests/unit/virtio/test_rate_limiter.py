"""Rate limiters: both buckets or none, a call when there is room, rates that hold over a minute."""

from __future__ import annotations

import pytest

from base.event_manager import EventManager
from ipc.schema import RecordOf
from tests.harness.event_loop import run_until
from virtio.rate_limiter import RATE_LIMITER_STATE, Bucket, RateLimiter, RateLimiterState

MS = 1_000_000
MINUTE = 60_000 * MS


class Clock:
    """A clock, and a loop whose timers follow it."""

    def __init__(self) -> None:
        self.now = 1_000_000 * MS
        self.timers: list[list] = []

    def __call__(self) -> int:
        return self.now

    def add_timer(self, deadline_ns, callback):
        entry = [deadline_ns, callback]
        self.timers.append(entry)
        clock = self

        class Timer:
            def cancel(self):
                clock.timers.remove(entry)

        return Timer()

    def advance(self) -> None:
        """Go to the next timer, and make its call."""
        entry = min(self.timers)
        self.timers.remove(entry)
        self.now = max(self.now, entry[0])
        entry[1]()


@pytest.fixture
def clock():
    return Clock()


def limiter(clock, bandwidth=None, ops=None, calls=None):
    made = RateLimiter(bandwidth, ops, now_ns=clock)
    made.attach(clock, (lambda: None) if calls is None else lambda: calls.append(clock.now))
    return made


def test_without_buckets_nothing_is_limited(clock):
    for made in (limiter(clock), limiter(clock, Bucket(0, 100), Bucket(100, 0))):
        assert not made.limits
        assert all(made.take(1, 1 << 40) for _ in range(1000))
    assert not clock.timers


def test_both_or_none(clock):
    calls: list[int] = []
    made = limiter(clock, Bucket(1000, 1000), Bucket(2, 100), calls)
    assert made.take(1, 900)
    assert not made.take(1, 200)  # no bytes: the operation is not taken either
    assert made.is_blocked
    assert not made.take(1, 1)  # nothing at all until there is room
    clock.advance()
    assert calls == [1_000_000 * MS + 100 * MS]
    assert not made.is_blocked
    assert made.take(1, 200)
    assert made.take(1, 0)  # the second operation was still there
    assert not made.take(1, 0)
    assert (made.throttled_count, made.event_count) == (2, 1)


@pytest.mark.parametrize(
    ("size", "bandwidth", "ops"),
    [
        (4096, Bucket(1 << 20, 100), None),
        (4096, Bucket(1 << 20, 100, 64 << 20), None),
        (4096, None, Bucket(100, 50, 1000)),
        (4096, Bucket(10 << 20, 1000, 5 << 20), Bucket(1000, 1000, 500)),
        (1 << 20, Bucket(64 << 10, 10, 300_000), None),  # each larger than the bucket
        (12_345, Bucket(20_000, 7, 1), Bucket(3, 7, 2)),
    ],
)
def test_a_rate_holds_over_a_minute_and_the_burst_is_given_once(clock, size, bandwidth, ops):
    made = limiter(clock, bandwidth, ops)
    end = clock.now + MINUTE
    operations = 0
    while clock.now < end:
        while made.take(1, size):
            operations += 1
        clock.advance()
    allowed = [
        (bucket.size * MINUTE // (bucket.refill_time * MS) + bucket.size + bucket.one_time_burst) / unit
        for bucket, unit in ((bandwidth, size), (ops, 1))
        if bucket
    ]
    assert min(allowed) * 0.9 < operations < min(allowed) * 1.02 + 1


def test_a_request_larger_than_the_bucket_is_let_through_and_paid_afterwards(clock):
    calls: list[int] = []
    made = limiter(clock, Bucket(1000, 100), None, calls)
    assert made.take(1, 5000)
    assert not made.take(1, 1)
    clock.advance()
    assert calls == [1_000_000 * MS + 400 * MS + MS // 10]
    assert made.take(1, 1)


def test_an_update_replaces_buckets_and_lets_who_waits_try_again(clock):
    calls: list[int] = []
    made = limiter(clock, Bucket(100, 1_000_000), Bucket(5, 1_000_000), calls)
    assert made.take(1, 100)
    assert not made.take(1, 100)
    made.update(Bucket(1000, 1000), None)
    clock.advance()
    assert calls == [1_000_000 * MS]
    assert sum(made.take(1, 1) for _ in range(10)) == 4  # one operation of five was taken before
    made.update(None, Bucket(0, 0))
    clock.advance()
    assert made.take(10, 100)
    assert made.limits
    made.update(Bucket(0, 0), None)
    assert not made.limits


def test_it_goes_on_from_its_state(clock):
    made = limiter(clock, Bucket(1000, 1000, 50), Bucket(10, 100))
    made.take(3, 700)
    clock.now += MS // 2
    assert not made.take(1, 800)
    state = made.save()
    assert isinstance(RATE_LIMITER_STATE, RecordOf)
    assert RATE_LIMITER_STATE.check(state, "limiter") == state == RateLimiterState(*state)
    again = RateLimiter(state=state, now_ns=clock)
    again.attach(clock, lambda: None)
    assert again.save() == state
    assert not again.is_blocked
    assert again.take(7, 350)
    assert not again.take(1, 1)


def test_stopped_it_calls_nobody(clock):
    made = limiter(clock, Bucket(100, 100))
    made.take(1, 100)
    assert not made.take(1, 100)
    made.stop()
    made.stop()
    assert not clock.timers
    assert not made.is_blocked


def test_a_real_loop_calls_when_there_is_room():
    events = EventManager()

    class Subscriber:
        rooms = 0

        def init(self, ops):
            self.limiter = RateLimiter(Bucket(1000, 20))
            self.limiter.attach(ops, self.room)

        def room(self):
            assert self.limiter.take(1, 1000)
            self.rooms += 1

    subscriber = Subscriber()
    events.add_subscriber(subscriber)  # type: ignore[arg-type]
    assert subscriber.limiter.take(1, 1000)
    assert not subscriber.limiter.take(1, 1000)
    run_until(events, lambda: subscriber.rooms == 1)
    events.close()
