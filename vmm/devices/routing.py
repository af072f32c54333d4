"""Brings device interrupts to the VM of the worker that runs the vCPU they go to.

An eventfd can be the irqfd of one VM only. A GSI that moves is taken away from the old VM first and given to the new
one then; what is signalled between stays in the eventfd and is raised when it is given.
"""

from __future__ import annotations

from base.lean_std import deque
from base.lean_typing import Callable, Protocol, Sequence
from ipc.messages.records import Route

_DESTINATION_SHIFT = 12
_DESTINATION_MASK = 0xFF
_LOGICAL = 1 << 2


class RouteTarget(Protocol):
    """What a worker is for the router."""

    def set_routes(self, routes: Sequence[Route], done: Callable[[], None]) -> None:
        """Put routes into force, then call ``done``."""


class InterruptRouter:
    """Sans-IO: it calls ``set_routes`` of the workers and is called back.

    ``owner`` maps an APIC id to a worker's number, or returns -1 for one that no vCPU has.
    """

    def __init__(self, targets: Sequence[RouteTarget], owner: Callable[[int], int]) -> None:
        self._targets = targets
        self._owner = owner
        #: GSI → worker that has its irqfd, or had it last.
        self._places: dict[int, int] = {}
        self._waiting: deque[tuple[Sequence[Route], Callable[[], None]]] = deque()
        self._busy = False

    def set_routes(self, routes: Sequence[Route], done: Callable[[], None]) -> None:
        """Put routes into force, one call after the other, then call ``done``."""
        self._waiting.append((routes, done))
        if not self._busy:
            self._next()

    def placed(self, target: int) -> set[int]:
        """Return the GSIs whose irqfd is in the VM of this worker, or was there last."""
        return {gsi for gsi, place in self._places.items() if place == target}

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
        before = self._places.get(route.gsi)
        after = self._place(route, before)

        def given() -> None:
            self._carry_out(routes, done)

        def give() -> None:
            self._places[route.gsi] = after
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
