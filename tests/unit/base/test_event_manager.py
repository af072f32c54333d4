"""The event loop: delivery, removal while events are under way, nesting, pausing, timers."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from base import event_manager
from base.event_manager import EDGE_TRIGGERED, HANG_UP, IN, OUT, EventManager, EventManagerError

SECOND = 1_000_000_000


class Recorder:
    """Watches descriptors, records what comes, and may do something on each event."""

    def __init__(self, *fds, event_set=IN, action=None):
        self.fds = fds
        self.event_set = event_set
        self.action = action
        self.seen: list[tuple[int, int, int]] = []
        self.ops: Any = None

    def init(self, ops):
        self.ops = ops
        for number, fd in enumerate(self.fds):
            ops.add(fd, self.event_set, data=number)

    def process(self, events, ops):
        self.seen.append((events.fd, events.data, events.event_set))
        if self.action is not None:
            self.action(events, ops)


class CountingEpoll:
    """Counts how often a loop waits."""

    def __init__(self, epoll):
        self.epoll = epoll
        self.polls = 0

    def __getattr__(self, name):
        return getattr(self.epoll, name)

    def poll(self, *arguments):
        self.polls += 1
        return self.epoll.poll(*arguments)


def take(events, _ops):
    """Empty an eventfd."""
    os.eventfd_read(events.fd)


@pytest.fixture
def manager() -> Iterator[EventManager]:
    manager = EventManager()
    yield manager
    manager.close()


@pytest.fixture
def make_eventfd() -> Iterator[Callable[..., int]]:
    made: list[int] = []

    def make(value=0):
        made.append(os.eventfd(value, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return made[-1]

    yield make
    for fd in made:
        try:
            os.close(fd)
        except OSError:
            pass


def test_events_are_delivered_with_their_data(manager, make_eventfd):
    first, second = make_eventfd(1), make_eventfd()
    recorder = Recorder(first, second, action=take)
    manager.add_subscriber(recorder)
    assert manager.run(0) == 1
    os.eventfd_write(second, 1)
    assert manager.run(1000) == 1
    assert manager.run(0) == 0
    assert recorder.seen == [(first, 0, IN), (second, 1, IN)]


def test_modify_and_hang_up(manager):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        recorder = Recorder(ours.fileno(), event_set=IN | OUT)
        manager.add_subscriber(recorder)
        manager.run(0)
        assert recorder.seen.pop()[2] == OUT
        recorder.ops.modify(ours.fileno(), 0)
        assert manager.run(0) == 0
        theirs.close()
        manager.run(0)
        assert recorder.seen.pop()[2] == HANG_UP
        recorder.ops.remove(ours.fileno())
        assert manager.run(0) == 0


def test_rules_for_registrations(manager, make_eventfd):
    fd = make_eventfd()
    recorder = Recorder(fd)
    number = manager.add_subscriber(recorder)
    for call in (lambda: recorder.ops.add(fd, IN), lambda: recorder.ops.add(-1, IN), lambda: recorder.ops.remove(99)):
        with pytest.raises(EventManagerError):
            call()
    with pytest.raises(EventManagerError):
        recorder.ops.modify(99, IN)
    with open(__file__) as regular_file, pytest.raises(EventManagerError):
        recorder.ops.add(regular_file.fileno(), IN)
    manager.remove_subscriber(number)
    with pytest.raises(EventManagerError):
        recorder.ops.add(fd, IN)
    with pytest.raises(EventManagerError):
        recorder.ops.add_timer(0, lambda: None)
    with pytest.raises(EventManagerError):
        manager.remove_subscriber(number)


def test_a_subscriber_whose_init_fails_leaves_nothing(manager, make_eventfd):
    fd = make_eventfd(1)
    with pytest.raises(EventManagerError):
        manager.add_subscriber(Recorder(fd, fd))
    assert manager.run(0) == 0
    manager.add_subscriber(Recorder(fd, action=take))
    assert manager.run(0) == 1


def test_bounds(manager, make_eventfd, monkeypatch):
    monkeypatch.setattr(event_manager, "MAX_REGISTRATIONS", 1)
    monkeypatch.setattr(event_manager, "MAX_TIMERS", 2)
    recorder = Recorder(make_eventfd())
    manager.add_subscriber(recorder)
    with pytest.raises(EventManagerError):
        recorder.ops.add(make_eventfd(), IN)
    later = time.monotonic_ns() + 100 * SECOND
    timers = [recorder.ops.add_timer(later, lambda: None) for _ in range(2)]
    with pytest.raises(EventManagerError):
        recorder.ops.add_timer(later, lambda: None)
    timers[0].cancel()
    recorder.ops.add_timer(later, lambda: None)


def test_a_subscriber_removed_during_dispatch_gets_nothing_more(manager, make_eventfd):
    fds = [make_eventfd(1) for _ in range(3)]
    victims: list[Any] = []

    def remove_the_others(events, _ops):
        os.eventfd_read(events.fd)
        for recorder, number in victims:
            if recorder.fds[0] != events.fd:
                manager.remove_subscriber(number)
        victims.clear()

    recorders = [Recorder(fd, action=remove_the_others) for fd in fds]
    victims.extend((recorder, manager.add_subscriber(recorder)) for recorder in recorders)
    assert manager.run(0) == 1
    assert manager.run(0) == 0
    assert sum(len(recorder.seen) for recorder in recorders) == 1


def test_a_subscriber_may_remove_itself(manager, make_eventfd):
    fd = make_eventfd(1)
    recorder = Recorder(fd, action=lambda _events, _ops: manager.remove_subscriber(number))
    number: int = manager.add_subscriber(recorder)
    assert manager.run(0) == 1
    assert manager.run(0) == 0


def test_no_event_of_a_descriptor_reaches_the_one_that_takes_its_number(manager, make_eventfd):
    """The descriptor is removed and closed while its event is queued, and its number is used again."""
    trigger, stale = make_eventfd(1), make_eventfd(1)
    new = Recorder()
    manager.add_subscriber(new)

    def replace(events, _ops):
        os.eventfd_read(events.fd)
        if events.fd in (trigger, stale) and not new.fds:
            other = stale if events.fd == trigger else trigger
            first.ops.remove(other)
            os.close(other)
            assert os.dup(quiet) == other
            new.fds = (other,)
            new.ops.add(other, IN)

    quiet = make_eventfd()
    first = Recorder(trigger, stale, action=replace)
    manager.add_subscriber(first)
    assert manager.run(0) == 1
    assert manager.run(0) == 0
    assert new.seen == []
    new.ops.remove(new.fds[0])


def test_a_descriptor_closed_before_it_was_removed_does_no_harm(manager):
    fd = os.eventfd(0)
    recorder = Recorder(fd)
    manager.add_subscriber(recorder)
    os.close(fd)
    recorder.ops.remove(fd)
    assert manager.run(0) == 0


# -- nested loops -----------------------------------------------------------------------------------------------------


def test_run_until_ends_when_done_and_at_the_deadline(manager, make_eventfd):
    fd = make_eventfd(3)
    recorder = Recorder(fd, action=take)
    manager.add_subscriber(recorder)
    assert manager.run_until(lambda: bool(recorder.seen), None)
    start = time.monotonic_ns()
    assert not manager.run_until(lambda: False, start + SECOND // 50)
    assert time.monotonic_ns() - start >= SECOND // 50
    assert manager.run_until(lambda: True, 0)


@pytest.mark.parametrize("flags", [IN, IN | EDGE_TRIGGERED])
def test_run_until_delivers_nothing_after_done(manager, make_eventfd, flags):
    fds = [make_eventfd(1) for _ in range(4)]
    recorder = Recorder(*fds, event_set=flags, action=take)
    manager.add_subscriber(recorder)
    assert manager.run_until(lambda: len(recorder.seen) == 2, None)
    assert len(recorder.seen) == 2
    assert manager.run(0) == 2
    assert sorted(fd for fd, _, _ in recorder.seen) == sorted(fds)


@pytest.mark.parametrize("flags", [IN, IN | EDGE_TRIGGERED])
def test_a_nested_loop_neither_loses_nor_doubles_events(manager, make_eventfd, flags):
    fds = [make_eventfd(1) for _ in range(5)]
    late = make_eventfd()
    nested: list[bool] = []

    def nest_once(events, _ops):
        os.eventfd_read(events.fd)
        if not nested:
            nested.append(True)
            os.eventfd_write(late, 1)
            assert manager.run_until(lambda: len(recorder.seen) == 6, time.monotonic_ns() + SECOND)

    recorder = Recorder(*fds, late, event_set=flags, action=nest_once)
    manager.add_subscriber(recorder)
    assert manager.run(0) == 1  # the outer loop: all the others were delivered by the nested one
    assert manager.run(0) == 0
    assert sorted(fd for fd, _, _ in recorder.seen) == sorted([*fds, late])


@pytest.mark.parametrize("flags", [IN, IN | EDGE_TRIGGERED])
def test_paused_subscribers_wait_and_lose_nothing(manager, make_eventfd, flags):
    paused_fd, other_fd = make_eventfd(1), make_eventfd()
    paused = Recorder(paused_fd, event_set=flags, action=take)
    other = Recorder(other_fd, action=take)
    number = manager.add_subscriber(paused)
    manager.add_subscriber(other)
    writer = threading.Timer(0.05, os.eventfd_write, (other_fd, 1))
    writer.start()
    counting = manager._epoll = CountingEpoll(manager._epoll)
    assert manager.run_until(lambda: bool(other.seen), None, paused={number})
    assert counting.polls <= 3  # a paused descriptor that is ready does not keep the loop awake
    writer.join()
    assert paused.seen == []
    assert manager.run(0) == 1
    assert paused.seen == [(paused_fd, 0, IN)]


def test_a_paused_descriptor_may_be_changed_and_removed(manager, make_eventfd):
    fds = [make_eventfd(1) for _ in range(3)]
    paused = Recorder(*fds)
    number = manager.add_subscriber(paused)
    assert not manager.run_until(lambda: False, time.monotonic_ns() + SECOND // 100, paused={number})

    def change():
        paused.ops.modify(fds[0], OUT)
        paused.ops.remove(fds[1])
        return True

    assert manager.run_until(change, None, paused={number})
    manager.run(0)
    assert sorted(paused.seen) == sorted([(fds[0], 0, OUT), (fds[2], 2, IN)])


def test_pauses_nest(manager, make_eventfd):
    inner_fd, paused_fd = make_eventfd(1), make_eventfd(1)
    paused = Recorder(paused_fd, action=take)
    number = manager.add_subscriber(paused)
    deadline = time.monotonic_ns() + SECOND

    def nest(events, _ops):
        os.eventfd_read(events.fd)
        assert not manager.run_until(lambda: False, time.monotonic_ns() + SECOND // 100, paused={number})
        assert paused.seen == []

    inner = Recorder(inner_fd, action=nest)
    manager.add_subscriber(inner)
    assert manager.run_until(lambda: bool(inner.seen), deadline, paused={number})
    assert paused.seen == []
    manager.run(0)
    assert len(paused.seen) == 1


def test_a_paused_subscriber_may_be_removed(manager, make_eventfd):
    fd = make_eventfd(1)
    paused = Recorder(fd)
    number = manager.add_subscriber(paused)

    def remove():
        manager.remove_subscriber(number)
        return True

    assert not manager.run_until(lambda: False, time.monotonic_ns() + SECOND // 100, paused={number})
    assert manager.run_until(remove, None, paused={number})
    assert manager.run(0) == 0


def test_an_exception_leaves_the_loop_usable(manager, make_eventfd):
    fds = [make_eventfd(1) for _ in range(3)]

    def fail_once(events, _ops):
        os.eventfd_read(events.fd)
        if len(recorder.seen) == 1:
            raise ValueError("once")

    recorder = Recorder(*fds, action=fail_once)
    manager.add_subscriber(recorder)
    with pytest.raises(ValueError):
        manager.run(0)
    assert manager.run(0) == 2


# -- timers -----------------------------------------------------------------------------------------------------------


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


def test_timers_of_removed_and_of_paused_subscribers(manager):
    removed, paused = Recorder(), Recorder()
    removed_number, paused_number = manager.add_subscriber(removed), manager.add_subscriber(paused)
    fired: list[Any] = []
    removed.ops.add_timer(0, lambda: fired.append("removed"))
    paused.ops.add_timer(0, lambda: fired.append("paused"))
    manager.remove_subscriber(removed_number)
    assert not manager.run_until(lambda: False, time.monotonic_ns() + SECOND // 100, paused={paused_number})
    assert fired == []
    manager.run(0)
    assert fired == ["paused"]


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


def test_the_epoll_descriptor_is_closed(make_eventfd):
    manager = EventManager()
    manager.add_subscriber(Recorder(make_eventfd()))
    fd = manager.fileno()
    assert not os.get_inheritable(fd)
    assert "1 subscribers, 1 descriptors" in repr(manager)
    manager.close()
    with pytest.raises(OSError):
        select.epoll.fromfd(fd).poll(0)
