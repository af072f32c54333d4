"""The event loop's timers, and calls in its next turn."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest

from base import event_manager
from base.event_manager import IN, EventManagerError
from tests.harness.event_loop import SECOND, Recorder, take


def test_timers_fire_in_order_and_once(manager):
    recorder = Recorder()
    manager.add_subscriber(recorder)
    fired: list[Any] = []
    now = time.monotonic_ns()
    for delay in (30, 10, 20):
        recorder.ops.add_timer(now + delay * 1_000_000, lambda delay=delay: fired.append(delay))
    cancelled = recorder.ops.add_timer(now, lambda: fired.append("cancelled"))
    cancelled.cancel()
    assert manager.run_until(lambda: len(fired) == 3, now + SECOND)
    assert fired == [10, 20, 30]
    assert time.monotonic_ns() >= now + 30 * 1_000_000
    assert manager.run(0) == 0


def test_a_timer_wakes_run(manager):
    recorder = Recorder()
    manager.add_subscriber(recorder)
    fired: list[Any] = []
    recorder.ops.add_timer(time.monotonic_ns() + SECOND // 100, lambda: fired.append(1))
    while not fired:
        manager.run(-1)


def test_a_timer_that_renews_itself_does_not_hold_the_loop(manager, make_eventfd):
    fd = make_eventfd(1)
    recorder = Recorder(fd, action=take)
    manager.add_subscriber(recorder)
    turns: list[int] = []

    def renew():
        turns.append(1)
        recorder.ops.add_timer(0, renew)

    renew()
    assert manager.run_until(lambda: len(turns) > 3, time.monotonic_ns() + SECOND)
    assert len(recorder.seen) == 1


def test_timers_of_a_removed_subscriber_do_not_fire(manager):
    removed, other = Recorder(), Recorder()
    number = manager.add_subscriber(removed)
    manager.add_subscriber(other)
    fired: list[Any] = []

    def first():
        fired.append("other")
        manager.remove_subscriber(number)  # one of its timers is due in this very turn

    other.ops.add_timer(0, first)
    removed.ops.add_timer(1, lambda: fired.append("due"))
    later = removed.ops.add_timer(time.monotonic_ns() + SECOND, lambda: fired.append("later"))
    assert manager.run(0) == 1
    assert not later.pending
    assert manager.run(0) == 0
    assert fired == ["other"]


def test_a_timer_callback_may_run_a_nested_loop_that_needs_another_due_timer(manager):
    recorder = Recorder()
    manager.add_subscriber(recorder)
    fired: list[Any] = []

    def nest():
        fired.append("first")
        assert manager.run_until(lambda: "second" in fired, time.monotonic_ns() + SECOND)

    recorder.ops.add_timer(0, nest)
    recorder.ops.add_timer(1, lambda: fired.append("second"))
    manager.run(0)
    assert fired == ["first", "second"]


def test_a_due_timer_is_not_kept_back_by_one_that_is_set_meanwhile_for_earlier(manager):
    recorder = Recorder()
    manager.add_subscriber(recorder)
    fired: list[Any] = []

    def first():
        fired.append("first")
        recorder.ops.add_timer(0, lambda: fired.append("new"))

    recorder.ops.add_timer(1, first)
    recorder.ops.add_timer(2, lambda: fired.append("second"))
    assert manager.run(0) == 2
    assert fired == ["first", "second"]
    assert manager.run(0) == 1
    assert fired == ["first", "second", "new"]


def test_run_until_fires_no_timer_after_done(manager):
    recorder = Recorder()
    manager.add_subscriber(recorder)
    fired: list[int] = []
    for number in range(3):
        recorder.ops.add_timer(0, lambda number=number: fired.append(number))
    assert manager.run_until(lambda: len(fired) == 2, None)
    assert fired == [0, 1]
    assert manager.run(0) == 1
    assert fired == [0, 1, 2]


def test_there_are_as_many_timers_as_anybody_wants_and_cancelled_ones_take_no_room(manager):
    recorder = Recorder()
    manager.add_subscriber(recorder)
    later = time.monotonic_ns() + 100 * SECOND
    kept = [recorder.ops.add_timer(later, lambda: None) for _ in range(2000)]
    for _ in range(5000):
        recorder.ops.add_timer(later, lambda: None).cancel()
    assert len(manager._timers) < 2 * len(kept) + event_manager.MIN_REBUILD + 1
    assert all(timer.pending for timer in kept)
    for timer in kept:
        timer.cancel()
    assert len(manager._timers) <= event_manager.MIN_REBUILD
    assert manager.run(0) == 0


def test_cancelling_twice_or_too_late_counts_nothing(manager):
    """A wrong count would rebuild for ever, or never."""
    recorder = Recorder()
    manager.add_subscriber(recorder)
    fired: list[int] = []
    timers = [recorder.ops.add_timer(0, lambda: fired.append(1)) for _ in range(3)]
    timers[0].cancel()
    timers[0].cancel()
    assert manager.run(0) == 2
    for timer in timers:
        timer.cancel()
    assert manager._timers._cancelled == 0
    assert len(manager._timers) == 0


@pytest.mark.parametrize("seed", range(20))
def test_timers_agree_with_a_list_that_is_searched(manager, seed):
    """Set, cancel and let fire in any order: the same timers fire, by deadline and then by the order of setting."""
    chance = random.Random(seed)
    recorder = Recorder()
    manager.add_subscriber(recorder)
    fired: list[int] = []
    expected: list[tuple[int, int]] = []
    timers: dict[int, Any] = {}
    for number in range(600):
        deadline = chance.randrange(50)  # long ago: all are due
        timers[number] = recorder.ops.add_timer(deadline, lambda number=number: fired.append(number))
        expected.append((deadline, number))
        while timers and chance.random() < 0.45:
            victim = chance.choice(list(timers))
            timers.pop(victim).cancel()
            expected = [entry for entry in expected if entry[1] != victim]
        if chance.random() < 0.01:
            manager.run(0)
            assert fired == [entry[1] for entry in sorted(expected)]
            fired.clear()
            expected.clear()
            timers.clear()
    manager.run(0)
    assert fired == [entry[1] for entry in sorted(expected)]


# -- calls in the next turn -------------------------------------------------------------------------------------------


def test_a_call_comes_in_the_next_turn_after_what_is_ready_by_then(manager, make_eventfd):
    first, second = make_eventfd(1), make_eventfd()
    order: list[str] = []
    recorder = Recorder()
    manager.add_subscriber(recorder)

    def on_first(_event_set):
        os.eventfd_read(first)
        order.append("first")
        recorder.ops.soon(lambda: order.append("call"))
        os.eventfd_write(second, 1)

    def on_second(_event_set):
        os.eventfd_read(second)
        order.append("second")

    recorder.ops.watch(first, IN, on_first)
    recorder.ops.watch(second, IN, on_second)
    assert manager.run(0) == 1
    assert order == ["first"]
    assert manager.run(-1) == 2  # it does not wait: a call is there
    assert order == ["first", "second", "call"]


@pytest.mark.parametrize("count", [1, 100])
def test_a_flood_of_calls_keeps_nobody_from_their_turn(manager, make_eventfd, count):
    """Each call asks for the next one; descriptors and timers come all the same, and as often as the calls."""
    fd = make_eventfd(1)
    recorder = Recorder()
    manager.add_subscriber(recorder)
    calls, events, timers = [0], [0], [0]

    def go_on():
        calls[0] += 1
        recorder.ops.soon(go_on)

    def on_event(_event_set):  # the descriptor stays ready
        events[0] += 1

    def on_time():
        timers[0] += 1
        recorder.ops.add_timer(0, on_time)

    recorder.ops.watch(fd, IN, on_event)
    recorder.ops.add_timer(0, on_time)
    for _ in range(count):
        recorder.ops.soon(go_on)
    turns = 50
    for _ in range(turns):
        manager.run(0)
    assert (calls[0], events[0], timers[0]) == (turns * count, turns, turns)


def test_calls_of_a_removed_subscriber_are_dropped(manager):
    recorder, other = Recorder(), Recorder()
    number = manager.add_subscriber(recorder)
    manager.add_subscriber(other)
    made: list[str] = []

    def remove_the_other():
        made.append("other")
        manager.remove_subscriber(number)

    other.ops.soon(remove_the_other)
    recorder.ops.soon(lambda: made.append("removed"))
    assert manager.run(0) == 1
    assert made == ["other"]
    with pytest.raises(EventManagerError):
        recorder.ops.soon(lambda: None)


def test_a_call_may_run_a_nested_loop_that_makes_the_others(manager):
    recorder = Recorder()
    manager.add_subscriber(recorder)
    made: list[str] = []

    def nest():
        made.append("first")
        recorder.ops.soon(lambda: made.append("third"))
        assert manager.run_until(lambda: "third" in made, time.monotonic_ns() + SECOND)

    recorder.ops.soon(nest)
    recorder.ops.soon(lambda: made.append("second"))
    assert manager.run(0) == 1
    assert made == ["first", "second", "third"]
    assert manager.run(0) == 0


def test_run_until_makes_no_call_after_done(manager):
    recorder = Recorder()
    manager.add_subscriber(recorder)
    made: list[int] = []
    for number in range(3):
        recorder.ops.soon(lambda number=number: made.append(number))
    assert manager.run_until(lambda: len(made) == 2, None)
    assert made == [0, 1]
    assert manager.run(0) == 1
