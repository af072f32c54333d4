"""The event loop: delivery, removal while events are under way, nesting."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import Any

import pytest

from base import event_manager
from base.event_manager import EDGE_TRIGGERED, HANG_UP, IN, OUT, EventManager, EventManagerError
from tests.harness.event_loop import SECOND, Recorder, take


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


def test_the_number_of_descriptors_is_bounded(manager, make_eventfd, monkeypatch):
    monkeypatch.setattr(event_manager, "MAX_REGISTRATIONS", 1)
    recorder = Recorder(make_eventfd())
    manager.add_subscriber(recorder)
    with pytest.raises(EventManagerError):
        recorder.ops.add(make_eventfd(), IN)


def test_a_descriptor_may_have_a_handler_of_its_own(manager, make_eventfd):
    fd, added = make_eventfd(1), make_eventfd(1)
    recorder = Recorder(added, action=take)
    number = manager.add_subscriber(recorder)
    seen: list[int] = []

    def handler(event_set):
        os.eventfd_read(fd)
        seen.append(event_set)

    recorder.ops.watch(fd, IN, handler)
    with pytest.raises(EventManagerError):
        recorder.ops.watch(fd, IN, handler)
    assert manager.run(0) == 2
    assert (seen, len(recorder.seen)) == ([IN], 1)
    recorder.ops.modify(fd, OUT)
    recorder.ops.remove(fd)
    os.eventfd_write(fd, 1)
    assert manager.run(0) == 0
    recorder.ops.watch(fd, IN, handler)
    manager.remove_subscriber(number)
    assert manager.run(0) == 0


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


def test_the_epoll_descriptor_is_closed(make_eventfd):
    manager = EventManager()
    manager.add_subscriber(Recorder(make_eventfd()))
    fd = manager.fileno()
    assert not os.get_inheritable(fd)
    assert "1 subscribers, 1 descriptors" in repr(manager)
    manager.close()
    with pytest.raises(OSError):
        select.epoll.fromfd(fd).poll(0)
