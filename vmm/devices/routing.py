"""Brings device interrupts to the VM of the worker that runs the vCPU they go to.

An eventfd can be the irqfd of one VM only. A GSI that moves is taken away from the old VM first and given to the new
one then; what is signalled between stays in the eventfd and is raised when it is given.
"""

from __future__ import annotations

from base.lean_std import deque
from base.lean_typing import Callable, NamedTuple, Protocol, Sequence
from ipc.messages.records import Route

_DESTINATION_SHIFT = 12
_DESTINATION_MASK = 0xFF
_LOGICAL = 1 << 2


class RouteTarget(Protocol):
    """What a worker is for the router."""

    def set_routes(self, routes: Sequence[Route], done: Callable[[], None]) -> None:
        """Put routes into force, then call ``done``."""


class PlacedRoute(NamedTuple):
    """A route, and the index of the worker whose VM has its irqfd, or had it last."""

    route: Route
    worker: int


class InterruptRouter:
    """Sans-IO: it calls ``set_routes`` of the workers and is called back.

    ``owner`` maps an APIC id to a worker's index, or returns -1 for one that no vCPU has. ``placed`` is where
    the routes of all GSIs are noted: whoever keeps it keeps the only record of them.
    """

    def __init__(
        self, targets: Sequence[RouteTarget], owner: Callable[[int], int], placed: dict[int, PlacedRoute]
    ) -> None:
        self._targets = targets
        self._owner = owner
        self._placed = placed
        self._waiting: deque[tuple[Sequence[Route], Callable[[], None]]] = deque()
        self._busy = False

    def set_routes(self, routes: Sequence[Route], done: Callable[[], None]) -> None:
        """Put routes into force, one call after the other, then call ``done``."""
        self._waiting.append((routes, done))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        if not self._waiting:
            self._busy = False
            return
        self._busy = True
        routes, done = self._waiting.popleft()

        def finished() -> None:
            done()
            self._next()

        self._carry_out(deque(routes), finished)

    def _carry_out(self, routes: deque[Route], done: Callable[[], None]) -> None:
        if not routes:
            done()
            return
        route = routes.popleft()
        placed = self._placed.get(route.gsi)
        before = None if placed is None else placed.worker
        after = self._place(route, before)

        def given() -> None:
            self._carry_out(routes, done)

        def give() -> None:
            self._placed[route.gsi] = PlacedRoute(route, after)
            self._targets[after].set_routes((route,), given)

        if before is None or before == after:
            give()
        else:
            self._targets[before].set_routes((route._replace(masked=True),), give)

    def _place(self, route: Route, before: int | None) -> int:
        """Return the worker that a route belongs to. Logical destinations: any one's ghosts pass the interrupt on."""
        if route.masked and before is not None:
            return before
        if route.address & _LOGICAL:
            return 0
        return max(0, self._owner(route.address >> _DESTINATION_SHIFT & _DESTINATION_MASK))
