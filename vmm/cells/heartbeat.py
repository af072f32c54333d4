"""Tells a worker that stands still (stopped, starved) from one that is well. A dead one is known by its pidfd."""

from __future__ import annotations

import time

from base.event_manager import EventOps, Events
from base.lean_typing import Callable
from vmm import stall_watch
from vmm.cells.lifecycle import SECOND_NS
from vmm.cells.worker import Worker
from vmm.errors import VmmError
from vmm.observe.event_log import EVENTS
from vmm.observe.logger import LOG

INTERVAL_NS = 1 * SECOND_NS
#: A worker that answers no ping for this long is reported as stalled.
STALL_AFTER_NS = 3 * SECOND_NS
#: So many pings without an answer are sent at every beat; afterwards the time between two of them doubles each time.
_PINGS_AT_ONCE = 4
_LAST_DOUBLING = 24


class _Pulse:
    """What is known of one worker process."""

    __slots__ = ("heard", "next_ping", "stalled", "unanswered")

    def __init__(self, now: int) -> None:
        self.heard = now
        self.next_ping = 0
        self.stalled = False
        self.unanswered = 0


class Heartbeat:
    """A subscriber. ``pong`` gets what a worker says of its own state."""

    def __init__(self, workers: list[Worker], is_over: Callable[[], bool], pong: Callable[[Worker, str], None]) -> None:
        self._workers = workers
        self._is_over = is_over
        self._pong = pong
        #: By pid: another worker in the same place is another matter.
        self._pulses: dict[int, _Pulse] = {}
        self._last_beat = 0

    def is_stalled(self, worker: Worker) -> bool:
        """Is it known to stand still?"""
        pulse = self._pulses.get(worker.pid)
        return pulse is not None and pulse.stalled

    def init(self, ops: EventOps) -> None:
        """Subscriber: start."""
        ops.add_timer(time.monotonic_ns() + INTERVAL_NS, lambda: self._beat(ops))

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: nothing is watched here but time."""

    def _beat(self, ops: EventOps) -> None:
        stall_watch.alive()
        now = time.monotonic_ns()
        if now - self._last_beat >= 2 * INTERVAL_NS:
            for pulse in self._pulses.values():
                pulse.heard = now  # it was us who did not run: stopped, or a busy host
        self._last_beat = now
        for worker in self._workers:
            if worker.alive and not self._is_over():
                self._beat_worker(worker, now)
        pids = {worker.pid for worker in self._workers}
        self._pulses = {pid: pulse for pid, pulse in self._pulses.items() if pid in pids}
        ops.add_timer(now + INTERVAL_NS, lambda: self._beat(ops))

    def _beat_worker(self, worker: Worker, now: int) -> None:
        pulse = self._pulses.setdefault(worker.pid, _Pulse(now))
        silent = now - pulse.heard
        if silent >= STALL_AFTER_NS and not pulse.stalled:
            pulse.stalled = True
            EVENTS.emit("worker-stalled", worker=worker.index, pid=worker.pid)
            seconds = silent // SECOND_NS
            LOG.warn(f"Worker vcpu {worker.index} (pid {worker.pid}) is alive but has not answered for {seconds} s.")
        if now < pulse.next_ping:
            return
        pulse.unanswered += 1
        if pulse.unanswered > _PINGS_AT_ONCE:  # less and less often: its queue is bounded
            pulse.next_ping = now + (INTERVAL_NS << min(pulse.unanswered - _PINGS_AT_ONCE, _LAST_DOUBLING))
        try:
            worker.ping(lambda state: self._heard(worker, state))
        except VmmError:
            pass  # the worker's end is reported by itself

    def _heard(self, worker: Worker, state: str) -> None:
        pulse = self._pulses.get(worker.pid)
        if pulse is None:
            return
        pulse.heard = time.monotonic_ns()
        pulse.next_ping = pulse.unanswered = 0
        if pulse.stalled:
            pulse.stalled = False
            EVENTS.emit("worker-answers", worker=worker.index, pid=worker.pid)
            LOG.info(f"Worker vcpu {worker.index} answers again.")
        self._pong(worker, state)
