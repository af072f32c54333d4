"""Token buckets: a rate over any window, a burst once, and when there is room again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.token_bucket import TokenBucket, TokenBucketState, restored_bucket

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
        wait = bucket.room_ns(wanted)
        if wait:
            if ask_early:
                now += wait - 1
                assert not bucket.take(wanted)
                wait = bucket.room_ns(wanted)
                assert wait in (1, 2)
            now += wait
        assert bucket.room_ns(wanted) == 0
        assert bucket.take(wanted)


@pytest.mark.parametrize(("size", "refill_time"), [(0, 100), (100, 0)])
def test_without_a_limit_there_is_always_room(size, refill_time):
    bucket = TokenBucket(size, refill_time, 0, lambda: 0)
    assert bucket.room_ns(1 << 64) == 0


def test_what_is_left_of_the_burst_counts():
    bucket = TokenBucket(10, 100, 5, lambda: 0)
    assert bucket.take(4)
    assert bucket.take(2)  # one of the burst, one of the bucket
    assert not bucket.take(10)
    assert bucket.take(9)
    assert not bucket.take(1)


def test_more_than_the_bucket_is_let_through_when_it_is_full_and_paid_afterwards():
    now = 0
    bucket = TokenBucket(10, 100, 0, lambda: now)  # a token in 10 ms
    assert bucket.take(35)
    assert bucket.room_ns(1) == 260_000_000
    now += 250_000_000
    assert not bucket.take(1)
    now += 10_000_000
    assert bucket.take(1)
    assert bucket.room_ns(35) == 100_000_000  # full again
    now += 100_000_000
    assert bucket.take(35)


@given(
    size=st.integers(1, 1000),
    refill_time=st.integers(1, 100),
    wants=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
)
def test_debts_keep_the_rate(size, refill_time, wants):
    """Whatever is wanted, one after the other: what is given keeps to what is refilled, but for the last one."""
    now = 0
    bucket = TokenBucket(size, refill_time, 0, lambda: now)
    given_before_last = 0
    for wanted in wants:
        now += bucket.room_ns(wanted)
        assert given_before_last <= size + now * size // (refill_time * 1_000_000)
        assert bucket.take(wanted)
        given_before_last += wanted


def test_a_bucket_goes_on_from_its_state():
    now = 1_000_000_000
    bucket = TokenBucket(1000, 1000, 7, lambda: now)
    bucket.take(507)
    now += 10_500_000
    bucket.room_ns(2000)
    state = bucket.save()
    assert state == TokenBucketState(1000, 1000, 0, 510, 500_000)
    now += LONG_NS  # stands still
    again = restored_bucket(state, lambda: now)
    assert again.save() == state
    assert again.limits
    assert again.room_ns(511) == 500_000
    now += 500_000
    assert again.take(511)
