"""Token buckets: a rate over any window, a burst once, and when there is room again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.token_bucket import TokenBucket

LONG_NS = 60_000_000_000


@given(
    size=st.integers(1, 1000),
    refill_time=st.integers(1, 2000),
    burst=st.integers(0, 200),
    steps=st.lists(st.tuples(st.integers(0, 400_000_000), st.integers(1, 300)), max_size=60),
)
@settings(max_examples=300)
def test_a_bucket_never_gives_more_than_size_and_rate_over_any_window(size, refill_time, burst, steps):
    now = 0
    bucket = TokenBucket(size, refill_time, burst, lambda: now)
    taken: list[tuple[int, int]] = []
    for pause, tries in steps:
        now += pause
        taken.append((now, sum(bucket.take(1) for _ in range(tries))))
    burst_used = 0
    without_burst = []
    for when, count in taken:
        from_burst = min(count, burst - burst_used)
        burst_used += from_burst
        without_burst.append((when, count - from_burst))
    for first, last in itertools.combinations_with_replacement(range(len(taken)), 2):
        window = without_burst[last][0] - without_burst[first][0]
        allowed = size + window * size // (refill_time * 1_000_000) + 1
        assert sum(count for _, count in without_burst[first : last + 1]) <= allowed


@pytest.mark.parametrize("pause", [1, 700_000, 1_000_000, 1_900_000, 3_333_333])
def test_a_bucket_gives_its_whole_rate_however_often_it_is_asked(pause):
    now = 0
    bucket = TokenBucket(1000, 1000, 0, lambda: now)  # a token per ms
    while bucket.take(1):
        pass
    taken = 0
    for _ in range(500):
        now += pause
        while bucket.take(1):
            taken += 1
    assert taken == 500 * pause // 1_000_000


def test_the_burst_is_used_first_and_once():
    now = 0
    bucket = TokenBucket(10, 100, 5, lambda: now)
    assert sum(bucket.take(1) for _ in range(100)) == 15
    now += LONG_NS
    assert sum(bucket.take(1) for _ in range(100)) == 10


@pytest.mark.parametrize(("size", "refill_time"), [(0, 100), (100, 0), (0, 0)])
def test_zero_means_no_limit(size, refill_time):
    bucket = TokenBucket(size, refill_time, 0, lambda: 0)
    assert all(bucket.take(1) for _ in range(10_000))


def test_the_largest_bucket_that_the_api_takes():
    largest = (1 << 64) - 1
    now = 0
    bucket = TokenBucket(largest, largest, largest, lambda: now)
    now += LONG_NS
    assert bucket.take(1)


@given(
    size=st.integers(1, 1000),
    refill_time=st.integers(1, 2000),
    burst=st.integers(0, 50),
    steps=st.lists(st.tuples(st.integers(0, 400_000_000), st.integers(1, 1200)), min_size=1, max_size=30),
    ask_early=st.booleans(),
)
def test_there_is_room_when_it_says_so_and_not_before(size, refill_time, burst, steps, ask_early):
    """Waiting exactly as long as it says lets a take succeed; a nanosecond less does not.

    Asking in between may cost a nanosecond: the time of the tokens that came by then is rounded up.
    """
    now = 0
    bucket = TokenBucket(size, refill_time, burst, lambda: now)
    for pause, wanted in steps:
        now += pause
        tokens = min(wanted, size)
        wait = bucket.room_ns(wanted)
        if wait:
            if ask_early:
                now += wait - 1
                assert not bucket.take(tokens)
                wait = bucket.room_ns(tokens)
                assert wait in (1, 2)
            now += wait
        assert bucket.room_ns(tokens) == 0
        assert bucket.take(tokens)


@pytest.mark.parametrize(("size", "refill_time"), [(0, 100), (100, 0)])
def test_without_a_limit_there_is_always_room(size, refill_time):
    bucket = TokenBucket(size, refill_time, 0, lambda: 0)
    assert bucket.room_ns(1 << 64) == 0
