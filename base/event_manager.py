"""The loop that drives the controller: one thread, epoll, subscribers with ``init`` and ``process``.

Rules that subscribers rely on:

- Registrations belong to a subscriber; removing it removes its descriptors and timers, and nothing of it is
  delivered afterwards, not even events that were already fetched from the kernel.
- A descriptor is removed before it is closed. Its number may be registered again at once.
- ``run_until`` may be called from inside ``process``. Both loops share one queue of fetched events, so that an
  event is neither lost (edge-triggered ones would be) nor delivered twice.
- Subscribers that are paused keep their registrations; what happens meanwhile is delivered when they go on.
- An event may be out of date when it is delivered (another subscriber read the descriptor): reads must not block.
- Timers cost no system call: the loop waits no longer than until the next one.
- A signal does not end a wait; who wants to be woken by one registers a signalfd or a wake-up descriptor.
"""

from __future__ import annotations

import errno
import select
import time
from _heapq import heapify, heappop, heappush

from base.errors import CellblockError
from base.lean_std import deque
from base.lean_typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Set

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ERROR = select.EPOLLERR
HANG_UP = select.EPOLLHUP
READ_HANG_UP = select.EPOLLRDHUP
EDGE_TRIGGERED = select.EPOLLET

#: Events fetched from the kernel at a time.
MAX_EVENTS = 64
#: Descriptors and timers that one controller may register: a bound against leaks, far above what devices need.
MAX_REGISTRATIONS = 4096
MAX_TIMERS = 1024

_NS_PER_SECOND = 1_000_000_000


class EventManagerError(CellblockError):
    """A registration broke the rules: a descriptor twice, an unknown one, or too many of them."""

    code = "vmm.events"


class Events:
    """What happened on one descriptor: ``event_set`` is a mask of the constants of this module."""

    __slots__ = ("fd", "data", "event_set")

    def __init__(self, fd: int, data: int, event_set: int) -> None:
        self.fd = fd
        self.data = data
        self.event_set = event_set

    def __repr__(self) -> str:
        return f"Events(fd={self.fd}, data={self.data}, event_set={self.event_set:#x})"


class Timer:
    """A call in the future; made by ``EventOps.add_timer``."""

    __slots__ = ("deadline_ns", "callback", "owner", "cancelled", "order")

    def __init__(self, deadline_ns: int, callback: Callable[[], None], owner: _Subscription, order: int) -> None:
        self.deadline_ns = deadline_ns
        self.callback = callback
        self.owner = owner
        self.cancelled = False
        self.order = order

    def __lt__(self, other: Timer) -> bool:
        return (self.deadline_ns, self.order) < (other.deadline_ns, other.order)

    def cancel(self) -> None:
        """Forget the call. Harmless when it was made already."""
        self.cancelled = True


class EventSubscriber(Protocol):
    """Whoever wants events."""

    def init(self, ops: EventOps) -> None:
        """Register what is to be watched; called once, by ``add_subscriber``."""

    def process(self, events: Events, ops: EventOps) -> None:
        """Handle one event. ``events`` is only valid during the call."""


class _Registration:
    __slots__ = ("fd", "data", "event_set", "owner", "active", "parked", "events")

    def __init__(self, fd: int, data: int, event_set: int, owner: _Subscription) -> None:
        self.fd = fd
        self.data = data
        self.event_set = event_set
        self.owner = owner
        self.active = True
        #: Taken out of epoll while the owner is paused.
        self.parked = False
        #: Reused for every delivery, so that an event costs no allocation.
        self.events = Events(fd, data, 0)


class _Subscription:
    __slots__ = ("number", "subscriber", "ops", "registrations", "active")

    def __init__(self, number: int, subscriber: EventSubscriber, manager: EventManager) -> None:
        self.number = number
        self.subscriber = subscriber
        self.registrations: dict[int, _Registration] = {}
        self.active = True
        self.ops = EventOps(manager, self)


class EventOps:
    """What a subscriber may do with its registrations; valid as long as the subscriber is."""

    __slots__ = ("_manager", "_subscription")

    def __init__(self, manager: EventManager, subscription: _Subscription) -> None:
        self._manager = manager
        self._subscription = subscription

    def add(self, fd: int, event_set: int, data: int = 0) -> None:
        """Watch a descriptor. Raises EventManagerError if it is watched already or cannot be watched."""
        self._manager._add(self._subscription, fd, event_set, data)

    def modify(self, fd: int, event_set: int) -> None:
        """Watch for something else; ``event_set`` 0 leaves only hang-up and error."""
        self._manager._modify(self._subscription, fd, event_set)

    def remove(self, fd: int) -> None:
        """Stop watching. Events of it that were already fetched are dropped."""
        self._manager._remove(self._subscription, fd)

    def add_timer(self, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once when ``time.monotonic_ns()`` has reached ``deadline_ns``; 0 means in the next turn."""
        return self._manager._add_timer(self._subscription, deadline_ns, callback)


class EventManager:
    """Epoll loop over subscribers. Use from one thread only."""

    def __init__(self) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._subscriptions: dict[int, _Subscription] = {}
        self._registrations: dict[int, _Registration] = {}
        self._fetched: deque[tuple[_Registration, int]] = deque()
        self._timers: list[Timer] = []
        self._timer_order = 0
        self._next_number = 1
        #: How often each subscriber is paused by nested ``run_until`` calls.
        self._paused: dict[int, int] = {}
        self._parked: list[_Registration] = []

    def __repr__(self) -> str:
        return f"EventManager({len(self._subscriptions)} subscribers, {len(self._registrations)} descriptors)"

    def fileno(self) -> int:
        """Return the epoll descriptor."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Forget every subscriber and close the epoll descriptor."""
        for number in list(self._subscriptions):
            self.remove_subscriber(number)
        self._epoll.close()

    def add_subscriber(self, subscriber: EventSubscriber) -> int:
        """Take a subscriber in, call its ``init``, and return its id. If ``init`` raises, nothing of it stays."""
        number = self._next_number
        self._next_number += 1
        subscription = _Subscription(number, subscriber, self)
        self._subscriptions[number] = subscription
        try:
            subscriber.init(subscription.ops)
        except BaseException:
            self.remove_subscriber(number)
            raise
        return number

    def remove_subscriber(self, number: int) -> None:
        """Remove a subscriber with its descriptors and timers. Raises EventManagerError for an unknown id."""
        subscription = self._subscriptions.pop(number, None)
        if subscription is None:
            raise EventManagerError(f"No subscriber {number} is registered")
        subscription.active = False
        for fd in list(subscription.registrations):
            self._remove(subscription, fd)
        for timer in self._timers:
            if timer.owner is subscription:
                timer.cancelled = True

    def run(self, timeout_ms: int = -1) -> int:
        """Wait at most ``timeout_ms`` (-1: forever), deliver what happened, and return how much was delivered."""
        if not self._fetched:
            deadline_ns = None if timeout_ms < 0 else time.monotonic_ns() + timeout_ms * 1_000_000
            self._fetch(deadline_ns)
        delivered = self._fire_timers()
        while self._fetched:
            delivered += self._deliver_next()
        return delivered

    def run_until(self, done: Callable[[], bool], deadline_ns: int | None, paused: Set[int] = frozenset()) -> bool:
        """Run the loop until ``done()`` or until the monotonic deadline (None: without one); returns ``done()``.

        Subscribers in ``paused`` are not called meanwhile. May be nested. Nothing is delivered after ``done()`` has
        turned true: what was fetched by then waits for the next turn.
        """
        for number in paused:
            self._paused[number] = self._paused.get(number, 0) + 1
        try:
            while True:
                while self._fetched:
                    if done():
                        return True
                    self._deliver_next()
                if done():
                    return True
                if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
                    return False
                self._fetch(deadline_ns)
                self._fire_timers()
        finally:
            for number in paused:
                count = self._paused[number] - 1
                if count:
                    self._paused[number] = count
                else:
                    del self._paused[number]
            self._unpark()

    # -- registrations ------------------------------------------------------------------------------------------------

    def _add(self, subscription: _Subscription, fd: int, event_set: int, data: int) -> None:
        if not subscription.active:
            raise EventManagerError("The subscriber was removed")
        if fd in self._registrations:
            raise EventManagerError(f"Descriptor {fd} is watched already; remove it before it is closed or given away")
        if len(self._registrations) >= MAX_REGISTRATIONS:
            raise EventManagerError(f"More than {MAX_REGISTRATIONS} descriptors are watched")
        try:
            self._epoll.register(fd, event_set)
        except (OSError, ValueError) as error:
            raise EventManagerError(f"Descriptor {fd} cannot be watched: {error}") from error
        registration = _Registration(fd, data, event_set, subscription)
        self._registrations[fd] = registration
        subscription.registrations[fd] = registration

    def _modify(self, subscription: _Subscription, fd: int, event_set: int) -> None:
        registration = subscription.registrations.get(fd)
        if registration is None:
            raise EventManagerError(f"Descriptor {fd} is not watched by this subscriber")
        if not registration.parked:
            self._epoll.modify(fd, event_set)
        registration.event_set = event_set

    def _remove(self, subscription: _Subscription, fd: int) -> None:
        registration = subscription.registrations.pop(fd, None)
        if registration is None:
            raise EventManagerError(f"Descriptor {fd} is not watched by this subscriber")
        registration.active = False
        del self._registrations[fd]
        if registration.parked:
            self._parked.remove(registration)
            return
        try:
            self._epoll.unregister(fd)
        except OSError as error:
            # Closed before it was removed: the kernel has forgotten it already.
            if error.errno not in (errno.EBADF, errno.ENOENT):
                raise

    def _add_timer(self, subscription: _Subscription, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        if not subscription.active:
            raise EventManagerError("The subscriber was removed")
        if len(self._timers) >= MAX_TIMERS:
            # Cancelled timers stay in the heap until their time; they do not count.
            self._timers = [timer for timer in self._timers if not timer.cancelled]
            heapify(self._timers)
            if len(self._timers) >= MAX_TIMERS:
                raise EventManagerError(f"More than {MAX_TIMERS} timers are set")
        self._timer_order += 1
        timer = Timer(deadline_ns, callback, subscription, self._timer_order)
        heappush(self._timers, timer)
        return timer

    # -- one turn -----------------------------------------------------------------------------------------------------

    def _fetch(self, deadline_ns: int | None) -> None:
        """Wait for events until the deadline or the next timer, and queue them."""
        next_ns = self._next_timer_ns()
        if deadline_ns is None or (next_ns is not None and next_ns < deadline_ns):
            deadline_ns = next_ns
        if deadline_ns is None:
            timeout = -1.0
        else:
            timeout = max(0.0, (deadline_ns - time.monotonic_ns()) / _NS_PER_SECOND)
        for fd, event_set in self._epoll.poll(timeout, MAX_EVENTS):
            registration = self._registrations.get(fd)
            if registration is not None:
                self._fetched.append((registration, event_set))

    def _deliver_next(self) -> int:
        registration, event_set = self._fetched.popleft()
        if not registration.active:
            return 0
        if registration.owner.number in self._paused:
            self._park(registration)
            return 0
        if registration.parked:  # fetched, then parked by a nested loop that has not ended
            return 0
        events = registration.events
        events.event_set = event_set
        registration.owner.subscriber.process(events, registration.owner.ops)
        return 1

    def _park(self, registration: _Registration) -> None:
        """Take a descriptor of a paused subscriber out of epoll, where it would keep the loop awake."""
        if registration.parked:
            return
        self._epoll.unregister(registration.fd)
        registration.parked = True
        self._parked.append(registration)

    def _unpark(self) -> None:
        """Watch again what belongs to subscribers that are not paused any more. Registering reports what is pending."""
        still: list[_Registration] = []
        for registration in self._parked:
            if registration.owner.number in self._paused:
                still.append(registration)
            else:
                registration.parked = False
                try:
                    self._epoll.register(registration.fd, registration.event_set)
                except OSError:  # closed meanwhile without being removed
                    self._remove(registration.owner, registration.fd)
        self._parked = still

    def _next_timer_ns(self) -> int | None:
        """Return when the next timer of a subscriber that is not paused is due."""
        while self._timers and self._timers[0].cancelled:
            heappop(self._timers)
        if not self._paused:
            return self._timers[0].deadline_ns if self._timers else None
        running = [t.deadline_ns for t in self._timers if not t.cancelled and t.owner.number not in self._paused]
        return min(running, default=None)

    def _fire_timers(self) -> int:
        now = time.monotonic_ns()
        if not self._timers or self._timers[0].deadline_ns > now:
            return 0
        # A callback may set new timers, cancel others, or run a nested loop: look again after each. What is set
        # from now on waits for the next turn, or a timer that renews itself would never let the loop go on.
        newest = self._timer_order
        fired = 0
        while (timer := self._take_due(now, newest)) is not None:
            timer.callback()
            fired += 1
        return fired

    def _take_due(self, now: int, newest: int) -> Timer | None:
        due = [
            timer
            for timer in self._timers
            if timer.deadline_ns <= now
            and not timer.cancelled
            and timer.order <= newest
            and timer.owner.number not in self._paused
        ]
        if not due:
            return None
        timer = min(due)
        timer.cancelled = True  # leaves the heap when it comes to the top
        return timer
