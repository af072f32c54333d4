"""Controller ↔ worker: what a worker that is replaced hands over to the next one."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.launch_plan import MAX_WORKERS
from ipc.messages.ghosts import OpenIpiTarget
from ipc.messages.records import MAX_GSI, ROUTE_FIELD, VCPU_FIELD, VECTOR_FIELD, WORKER, Route
from ipc.schema import U16, Bytes, Flag, Int, ListOf, RecordOf

#: Paths, and routes, that one TakeOver may bring; there may be more of it.
MAX_PATHS_AT_ONCE = 32
MAX_ROUTES_AT_ONCE = 64


class GhostState(NamedTuple):
    """What a ghost is besides its registers, which are the stub's: ``stub`` if it runs it, the vector of the last SIPI
    that reached it if ``started``, ``waiting`` for a SIPI after an INIT."""

    vcpu: int
    stub: bool
    started: bool
    vector: int
    waiting: bool


class HandOver(NamedTuple):
    """Take every irqfd away, and do not run again before RollBack. Only while paused. Idempotent."""


class HandedOver(NamedTuple):
    """What is signalled from now on waits in the eventfds; the ghosts are as told.

    ``held`` are the worker's own vCPUs that the other workers are not ready for yet (VCPU_STARTING).
    """

    ghosts: tuple[GhostState, ...]
    held: tuple[int, ...]


class RollBack(NamedTuple):
    """Undo HandOver; the other worker has ended. Idempotent."""


class RolledBack(NamedTuple):
    """The irqfds are in force again."""


class LoadState(NamedTuple):
    """Give a vCPU the state that another worker's SavedState told. Only to a worker that goes on for another."""

    vcpu: int
    version: int
    state: bytes


class StateLoaded(NamedTuple):
    """The vCPU is as it was."""


class TakeOver(NamedTuple):
    """Bind these interrupts, whose eventfds were sent (Interrupt, IpiPath).

    After the ``last`` one, with which ``ghosts`` and ``held`` come as HandedOver told them, the worker is paused.
    """

    routes: tuple[Route, ...]
    paths: tuple[OpenIpiTarget, ...]
    ghosts: tuple[GhostState, ...]
    held: tuple[int, ...]
    last: bool


class TakenOver(NamedTuple):
    """They are in force."""


_GHOST_STATE = RecordOf(GhostState, vcpu=VCPU_FIELD, stub=Flag(), started=Flag(), vector=VECTOR_FIELD, waiting=Flag())
_PATH = RecordOf(OpenIpiTarget, vcpu=VCPU_FIELD, vector=VECTOR_FIELD, gsi=Int(MAX_GSI - 1))
WORKER.register(43, HandOver)
WORKER.register(44, HandedOver, ghosts=ListOf(_GHOST_STATE, MAX_WORKERS), held=ListOf(VCPU_FIELD, MAX_WORKERS))
WORKER.register(45, RollBack)
WORKER.register(46, RolledBack)
WORKER.register(47, LoadState, vcpu=VCPU_FIELD, version=Int(U16), state=Bytes(128 << 10))
WORKER.register(48, StateLoaded)
WORKER.register(
    49,
    TakeOver,
    routes=ListOf(ROUTE_FIELD, MAX_ROUTES_AT_ONCE),
    paths=ListOf(_PATH, MAX_PATHS_AT_ONCE),
    ghosts=ListOf(_GHOST_STATE, MAX_WORKERS),
    held=ListOf(VCPU_FIELD, MAX_WORKERS),
    last=Flag(),
)
WORKER.register(50, TakenOver)
