"""The loop that drives a cell: one thread, epoll, subscribers with their descriptors, timers and calls.

Rules that subscribers rely on:

- Registrations belong to a subscriber; removing it removes its descriptors, timers and calls, and nothing of it is
  delivered afterwards, not even events that were already fetched from the kernel.
- A descriptor is removed before it is closed. Its number may be registered again at once.
- A turn is: look at the kernel, then the timers that are due, what was ready, and the calls (``soon``) that waited
  when the kernel was looked at. A handler does a bounded amount of work and calls ``soon`` to go on: whatever renews
  itself, call or timer, waits for the next turn, and keeps nobody from theirs.
- ``run_until`` may be called from inside a handler. Both loops share what was fetched, so that an event is neither lost
  (edge-triggered ones would be) nor delivered twice.
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
    from collections.abc import Callable

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ERROR = select.EPOLLERR
HANG_UP = select.EPOLLHUP
READ_HANG_UP = select.EPOLLRDHUP
EDGE_TRIGGERED = select.EPOLLET

#: Events fetched from the kernel at a time.
MAX_EVENTS = 64
#: Descriptors that one loop may watch: a bound against leaks, far above what devices need.
MAX_REGISTRATIONS = 4096
#: Fewer cancelled timers than this are left where they are: they go when their time comes.
MIN_REBUILD = 64

_NS_PER_SECOND = 1_000_000_000
_REMOVED = "The subscriber was removed"


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

    __slots__ = ("_callback", "_heap", "owner")

    def __init__(self, callback: Callable[[], None], owner: _Subscription, heap: _TimerHeap) -> None:
        self.owner = owner
        self._callback: Callable[[], None] | None = callback
        #: Where it waits; None once it has come up.
        self._heap: _TimerHeap | None = heap

    @property
    def pending(self) -> bool:
        """Whether the call is still to come."""
        return self._callback is not None

    def cancel(self) -> None:
        """Forget the call. Harmless when it was made already."""
        if self._callback is None:
            return
        self._callback = None
        if self._heap is not None:
            self._heap.one_cancelled()
            self._heap = None

    def fire(self) -> bool:
        """Make the call, unless it was cancelled; tells whether it was made."""
        callback, self._callback = self._callback, None
        if callback is None:
            return False
        callback()
        return True


class _TimerHeap:
    """Timers in the order of their deadlines. Cancelled ones stay until they come up, or are more than half."""

    __slots__ = ("_cancelled", "_entries", "_order")

    def __init__(self) -> None:
        #: Deadline, and the order of setting among equal ones: a comparison never gets to the timer.
        self._entries: list[tuple[int, int, Timer]] = []
        self._order = 0
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, deadline_ns: int, callback: Callable[[], None], owner: _Subscription) -> Timer:
        self._order = order = self._order + 1
        timer = Timer(callback, owner, self)
        heappush(self._entries, (deadline_ns, order, timer))
        return timer

    def one_cancelled(self) -> None:
        """Count it. Rebuilding costs each cancelled timer a constant in the mean: more than half of them leave."""
        self._cancelled = cancelled = self._cancelled + 1
        if cancelled > MIN_REBUILD and cancelled * 2 > len(self._entries):
            # In place: somebody further up on the stack may be at work with the list.
            self._entries[:] = [entry for entry in self._entries if entry[2].pending]
            heapify(self._entries)
            self._cancelled = 0

    def next_ns(self) -> int | None:
        """Return the deadline of the next timer; None if none is set."""
        entries = self._entries
        while entries:
            if entries[0][2].pending:
                return entries[0][0]
            heappop(entries)
            self._cancelled -= 1
        return None

    def take_due(self, now_ns: int, due: deque[Timer]) -> None:
        """Move what is due by now to the end of ``due``, in order."""
        entries = self._entries
        while entries and entries[0][0] <= now_ns:
            timer = heappop(entries)[2]
            if timer.pending:
                timer._heap = None  # cancelling it is nothing to us any more
                due.append(timer)
            else:
                self._cancelled -= 1

    def cancel_all(self, owner: _Subscription) -> None:
        """Cancel what belongs to ``owner``."""
        for timer in [entry[2] for entry in self._entries if entry[2].owner is owner]:
            timer.cancel()


class EventSubscriber(Protocol):
    """Whoever wants events."""

    def init(self, ops: EventOps) -> None:
        """Register what is to be watched; called once, by ``add_subscriber``."""

    def process(self, events: Events, ops: EventOps) -> None:
        """Handle an event of a descriptor that was added by ``EventOps.add``. ``events`` is valid during the call."""


class _Subscription:
    __slots__ = ("number", "subscriber", "ops", "descriptors", "active")

    def __init__(self, number: int, subscriber: EventSubscriber, manager: EventManager) -> None:
        self.number = number
        self.subscriber = subscriber
        self.descriptors: set[int] = set()
        self.active = True
        self.ops = EventOps(manager, self)

    def processing(self, fd: int, data: int) -> Callable[[int], None]:
        """Return a handler that calls ``process``, always with the same object: an event costs no allocation."""
        subscriber, ops = self.subscriber, self.ops
        events = Events(fd, data, 0)

        def handler(event_set: int) -> None:
            events.event_set = event_set
            subscriber.process(events, ops)

        return handler


class EventOps:
    """What a subscriber may do with its registrations; valid as long as the subscriber is."""

    __slots__ = ("_calls", "_manager", "_subscription", "_timers")

    def __init__(self, manager: EventManager, subscription: _Subscription) -> None:
        self._manager = manager
        self._subscription = subscription
        self._timers = manager._timers
        self._calls = manager._calls

    def add(self, fd: int, event_set: int, data: int = 0) -> None:
        """Watch a descriptor; its events go to ``process``.

        Raises EventManagerError if it is watched already or cannot be watched.
        """
        self._manager._watch(self._subscription, fd, event_set, self._subscription.processing(fd, data))

    def watch(self, fd: int, event_set: int, handler: Callable[[int], None]) -> None:
        """Watch a descriptor; its events go straight to ``handler(event_set)``. Raises as :meth:`add`."""
        self._manager._watch(self._subscription, fd, event_set, handler)

    def modify(self, fd: int, event_set: int) -> None:
        """Watch for something else; ``event_set`` 0 leaves only hang-up and error."""
        self._manager._modify(self._subscription, fd, event_set)

    def remove(self, fd: int) -> None:
        """Stop watching. Events of it that were already fetched are dropped."""
        self._manager._remove(self._subscription, fd)

    def add_timer(self, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once when ``time.monotonic_ns()`` has reached ``deadline_ns``. Cancelling it is cheap."""
        if not self._subscription.active:
            raise EventManagerError(_REMOVED)
        return self._timers.add(deadline_ns, callback, self._subscription)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once in the next turn, after what is ready by then."""
        if not self._subscription.active:
            raise EventManagerError(_REMOVED)
        self._calls.append((self._subscription, callback))


class EventManager:
    """Epoll loop over subscribers. Use from one thread only."""

    def __init__(self) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._subscriptions: dict[int, _Subscription] = {}
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers = _TimerHeap()
        self._next_number = 1
        # What this turn still has to deliver, in this order; all loops on the stack share it.
        self._due: deque[Timer] = deque()
        self._fetched: deque[tuple[int, int]] = deque()
        self._calls_due = 0
        #: The first ``_calls_due`` are this turn's.
        self._calls: deque[tuple[_Subscription, Callable[[], None]]] = deque()

    def __repr__(self) -> str:
        return f"EventManager({len(self._subscriptions)} subscribers, {len(self._handlers)} descriptors)"

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
        subscription.active = False  # its calls are dropped when their turn comes
        for fd in list(subscription.descriptors):
            self._remove(subscription, fd)
        for timer in self._due:
            if timer.owner is subscription:
                timer.cancel()
        self._timers.cancel_all(subscription)

    def run(self, timeout_ms: int = -1) -> int:
        """Wait at most ``timeout_ms`` (-1: forever), deliver what happened, and return how much was delivered."""
        if not (self._fetched or self._due or self._calls_due):
            deadline_ns = None if timeout_ms < 0 else time.monotonic_ns() + timeout_ms * 1_000_000
            self._fetch(deadline_ns)
        delivered = 0
        while self._due:
            delivered += self._due.popleft().fire()
        fetched, handlers = self._fetched, self._handlers
        while fetched:
            fd, event_set = fetched.popleft()
            handler = handlers.get(fd)
            if handler is not None:
                handler(event_set)
                delivered += 1
        while self._calls_due:
            delivered += self._make_call()
        return delivered

    def run_until(self, done: Callable[[], bool], deadline_ns: int | None) -> bool:
        """Run the loop until ``done()`` or until the monotonic deadline (None: without one); returns ``done()``.

        May be nested. Nothing is delivered after ``done()`` has turned true: what was fetched by then waits for the
        next turn.
        """
        while True:
            if done():
                return True
            if self._due:
                self._due.popleft().fire()
            elif self._fetched:
                fd, event_set = self._fetched.popleft()
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(event_set)
            elif self._calls_due:
                self._make_call()
            elif deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
                return False
            else:
                self._fetch(deadline_ns)

    # -- registrations ------------------------------------------------------------------------------------------------

    def _watch(self, subscription: _Subscription, fd: int, event_set: int, handler: Callable[[int], None]) -> None:
        if not subscription.active:
            raise EventManagerError(_REMOVED)
        if fd in self._handlers:
            raise EventManagerError(f"Descriptor {fd} is watched already; remove it before it is closed or given away")
        if len(self._handlers) >= MAX_REGISTRATIONS:
            raise EventManagerError(f"More than {MAX_REGISTRATIONS} descriptors are watched")
        try:
            self._epoll.register(fd, event_set)
        except (OSError, ValueError) as error:
            raise EventManagerError(f"Descriptor {fd} cannot be watched: {error}") from error
        self._handlers[fd] = handler
        subscription.descriptors.add(fd)

    def _modify(self, subscription: _Subscription, fd: int, event_set: int) -> None:
        if fd not in subscription.descriptors:
            raise EventManagerError(f"Descriptor {fd} is not watched by this subscriber")
        self._epoll.modify(fd, event_set)

    def _remove(self, subscription: _Subscription, fd: int) -> None:
        if fd not in subscription.descriptors:
            raise EventManagerError(f"Descriptor {fd} is not watched by this subscriber")
        subscription.descriptors.remove(fd)
        del self._handlers[fd]
        for number, event in enumerate(self._fetched):
            if event[0] == fd:  # the number may be another descriptor's by the time this event's turn comes
                del self._fetched[number]
                break
        try:
            self._epoll.unregister(fd)
        except OSError as error:
            # Closed before it was removed: the kernel has forgotten it already.
            if error.errno not in (errno.EBADF, errno.ENOENT):
                raise

    # -- one turn -----------------------------------------------------------------------------------------------------

    def _fetch(self, deadline_ns: int | None) -> None:
        """Begin a turn: wait for events until the deadline or the next timer (not at all if calls wait)."""
        next_ns = self._timers.next_ns()
        if deadline_ns is None or (next_ns is not None and next_ns < deadline_ns):
            deadline_ns = next_ns
        if self._calls:
            timeout = 0.0
        elif deadline_ns is None:
            timeout = -1.0
        else:
            timeout = max(0.0, (deadline_ns - time.monotonic_ns()) / _NS_PER_SECOND)
        self._fetched.extend(self._epoll.poll(timeout, MAX_EVENTS))
        self._calls_due = len(self._calls)
        if next_ns is not None:
            self._timers.take_due(time.monotonic_ns(), self._due)

    def _make_call(self) -> bool:
        self._calls_due -= 1
        subscription, callback = self._calls.popleft()
        if subscription.active:
            callback()
        return subscription.active
