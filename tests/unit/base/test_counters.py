"""Counters: what a line shows is what was added since the one before, aggregates merge, unknown keys are errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.counters import Aggregate, Counters


def test_a_line_shows_what_was_added_since_the_last_one_and_what_is_stored_as_it_is():
    counters = Counters("reads =size ~latency *drive")
    counters.add("reads")
    counters.add("reads", 4)
    counters.store("size", 7)
    counters.observe("latency", 30)
    counters.observe("latency", 10)
    first = {"reads": 5, "size": 7, "drive_count": 0, "drive_fails": 0}
    assert counters.shown() == {**first, "latency": {"min_us": 10, "max_us": 30, "sum_us": 40}}
    counters.commit()
    counters.observe("latency", 20)
    assert counters.shown() == {**first, "reads": 0, "latency": {"min_us": 10, "max_us": 30, "sum_us": 20}}


def test_unknown_keys_are_errors():
    counters = Counters("reads")
    for use in (counters.add, lambda key: counters.store(key, 1), lambda key: counters.observe(key, 1)):
        with pytest.raises(KeyError):
            use("writes")


def test_a_sum_starts_from_nothing_and_shows_what_is_new():
    total, one, other = Counters("reads ~wait"), Counters("reads ~wait"), Counters("reads ~wait")
    one.add("reads", 2)
    other.add("reads", 3)
    other.observe("wait", 5)
    for expected in ({"reads": 5, "wait": {"min_us": 5, "max_us": 5, "sum_us": 5}},) * 2:
        total.clear()
        total.merge(one)
        total.merge(other)
        assert total.shown() == expected
    total.commit()
    assert total.shown()["reads"] == 0


@given(st.lists(st.integers(0, 1 << 40)), st.lists(st.integers(0, 1 << 40)))
def test_merged_aggregates_are_as_if_one_had_seen_everything(left, right):
    both, one, other = Aggregate(), Aggregate(), Aggregate()
    for value in left:
        one.observe(value)
        both.observe(value)
    for value in right:
        other.observe(value)
        both.observe(value)
    one.merge(other)
    assert (one.minimum, one.maximum, one.total, one.count) == (both.minimum, both.maximum, both.total, both.count)
