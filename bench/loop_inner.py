"""One event loop of one checkout, for `bench/loop.py`: measures the cases that it is asked for on standard input.

Runs with the checkout's folder as the place to import from; knows the loop by the names that it has had.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

MANY = 500
#: Turns of one measurement.
TURNS = 400
LATER_NS = 3600 * 1_000_000_000


def event_loop() -> Any:
    """Return the module of the event loop."""
    for name in ("base.event_manager", "vmm.event_manager"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit("there is no event loop in this checkout")


class Subscriber:
    """Watches eventfds, by a handler of their own or by ``process``, and empties each that is ready."""

    ops: Any = None

    def init(self, ops: Any) -> None:
        """Take the operations."""
        self.ops = ops

    def process(self, events: Any, ops: Any) -> None:
        """Empty it."""
        os.eventfd_read(events.fd)


class Loop:
    """An event loop with ``count`` eventfds."""

    def __init__(self, count: int, straight: bool = False) -> None:
        module = event_loop()
        self.manager = module.EventManager()
        self.subscriber = Subscriber()
        self.manager.add_subscriber(self.subscriber)
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
        for fd in self.fds:
            if straight:
                self.subscriber.ops.watch(fd, module.IN, lambda event_set, fd=fd: os.eventfd_read(fd))
            else:
                self.subscriber.ops.add(fd, module.IN)

    def wait_for_nothing(self, timers: int) -> None:
        """Set timers whose time is far away."""
        later = time.monotonic_ns() + LATER_NS
        for number in range(timers):
            self.subscriber.ops.add_timer(later + number, nothing)

    def turns(self, count: int) -> float:
        """Return the nanoseconds until ``count`` deliveries were made."""
        begin = time.perf_counter_ns()
        while count > 0:
            count -= self.manager.run(0)
        return time.perf_counter_ns() - begin

    def close(self) -> None:
        """Release everything."""
        self.manager.close()
        for fd in self.fds:
            os.close(fd)


def nothing() -> None:
    """What timers and calls do here."""


def descriptors(watched: int, ready: int, straight: bool) -> float:
    """Nanoseconds for each of ``ready`` descriptors that are ready at once, among ``watched``."""
    loop = Loop(watched, straight)
    spent = 0.0
    turns = max(1, TURNS // ready)
    for turn in range(turns):
        for number in range(ready):
            os.eventfd_write(loop.fds[(turn + number) % watched], 1)
        spent += loop.turns(ready)
    loop.close()
    return spent / (turns * ready)


def timers(waiting: int, due: int) -> float:
    """Nanoseconds to set one timer and to have it called, ``due`` at once, while ``waiting`` others wait."""
    loop = Loop(0)
    loop.wait_for_nothing(waiting)
    add = loop.subscriber.ops.add_timer
    turns = max(1, TURNS // due)
    begin = time.perf_counter_ns()
    for _ in range(turns):
        now = time.monotonic_ns()
        for _ in range(due):
            add(now, nothing)
        loop.turns(due)
    spent = time.perf_counter_ns() - begin
    loop.close()
    return spent / (turns * due)


def cancelled(waiting: int) -> float:
    """Nanoseconds to set a timer far away and to cancel it, while others wait: a time-out that nobody meets."""
    loop = Loop(0)
    loop.wait_for_nothing(waiting)
    add = loop.subscriber.ops.add_timer
    later = time.monotonic_ns() + LATER_NS
    begin = time.perf_counter_ns()
    for _ in range(TURNS):
        add(later, nothing).cancel()
        loop.manager.run(0)
    spent = time.perf_counter_ns() - begin
    loop.close()
    return spent / TURNS


def calls(waiting: int) -> float:
    """Nanoseconds for a call in the next turn (a timer of 0 where there is nothing else), while timers wait."""
    loop = Loop(0)
    loop.wait_for_nothing(waiting)
    ops = loop.subscriber.ops
    soon = getattr(ops, "soon", None) or (lambda callback: ops.add_timer(0, callback))
    begin = time.perf_counter_ns()
    for _ in range(TURNS):
        soon(nothing)
        loop.turns(1)
    spent = time.perf_counter_ns() - begin
    loop.close()
    return spent / TURNS


def empty_turn() -> float:
    """Nanoseconds for a turn in which nothing is ready: what a turn costs by itself."""
    loop = Loop(1)
    begin = time.perf_counter_ns()
    for _ in range(TURNS):
        loop.manager.run(0)
    spent = time.perf_counter_ns() - begin
    loop.close()
    return spent / TURNS


#: Name → what is measured. A descriptor's cases run by ``process`` and, under the same name, straight to a handler.
CASES: dict[str, Callable[[bool], float]] = {
    "a turn in which nothing is ready": lambda straight: empty_turn(),
    "ready descriptor, the only one": lambda straight: descriptors(1, 1, straight),
    f"ready descriptor, {MANY} watched": lambda straight: descriptors(MANY, 1, straight),
    f"ready descriptor, {MANY} ready at once": lambda straight: descriptors(MANY, MANY, straight),
    "due timer, the only one": lambda straight: timers(0, 1),
    f"due timer, {MANY} waiting": lambda straight: timers(MANY, 1),
    f"due timer, {MANY} due at once": lambda straight: timers(0, MANY),
    "cancelled timer, the only one": lambda straight: cancelled(0),
    f"cancelled timer, {MANY} waiting": lambda straight: cancelled(MANY),
    "call in the next turn": lambda straight: calls(0),
    f"call in the next turn, {MANY} timers waiting": lambda straight: calls(MANY),
}


def main() -> None:
    """Answer each line (a JSON array: name of a case, straight) with one (a number)."""
    for line in sys.stdin:
        name, straight = json.loads(line)
        print(json.dumps(CASES[name](straight)), flush=True)


if __name__ == "__main__":
    main()
