"""Controller ↔ supervisor, over an inherited socket pair. ``role`` and ``worker`` together name a cell."""

from __future__ import annotations

from base.lean_typing import NamedTuple
from ipc.launch_plan import MAX_AFFINITY, MAX_HOST_CPUS, MAX_MEMORY_BYTES, MAX_WORKERS, ROLE_VCPU, SPAWNED_ROLES
from ipc.messages.records import CODE_FIELD, TEXT_FIELD, VCPU_FIELD, Failed
from ipc.schema import U8, U32, Int, ListOf, Schema, Text

SUPERVISOR = Schema()


class Spawn(NamedTuple):
    """Fork a worker or a device cell (``ipc.launch_plan.Assignment``); its endpoint is bound already."""

    worker: int
    vcpus: tuple[int, ...]
    ghosts: tuple[int, ...]
    affinity: tuple[tuple[int, ...], ...] = ()
    role: str = ROLE_VCPU


class Spawned(NamedTuple):
    """With two descriptors: the cell's pidfd, and our end of its descriptor channel."""

    worker: int
    pid: int
    role: str = ROLE_VCPU


class SignalCell(NamedTuple):
    """Send SIGKILL, SIGSTOP or SIGCONT to a cell; ``pid`` tells it from the one that replaces it."""

    worker: int
    pid: int
    signal: int
    role: str = ROLE_VCPU


class Signalled(NamedTuple):
    """The signal was sent."""


class CreateMemory(NamedTuple):
    """Make the guest memory, at most what the plan allows."""

    size: int


class MemoryCreated(NamedTuple):
    """With one descriptor: a sealed memfd of ``size`` bytes."""

    size: int


class CellEnded(NamedTuple):
    """Supervisor → controller: a cell ended. ``signal`` is 0 when it exited with ``status``.

    ``wall`` names the wall that ended it ("seccomp"), or is empty; ``text`` says why it could not start, or is empty.
    """

    worker: int
    pid: int
    status: int
    signal: int
    wall: str
    text: str = ""
    role: str = ROLE_VCPU


class Shutdown(NamedTuple):
    """Supervisor → controller: end the microVM now, in order; ``code`` is the exit code, ``text`` the log line."""

    code: int
    text: str


class SignalNoticed(NamedTuple):
    """Supervisor → controller: the visible process got a signal that ends nothing; ``text`` is the log line."""

    signal: int
    text: str


#: The supervisor refuses a role that it does not know.
_ROLE_FIELD = Text(max(map(len, SPAWNED_ROLES)))
#: Of one of the cells of a role.
_NUMBER_FIELD = Int(max(SPAWNED_ROLES.values()) - 1)

SUPERVISOR.register(1, Failed, code=CODE_FIELD, text=TEXT_FIELD)
SUPERVISOR.register(
    2,
    Spawn,
    worker=_NUMBER_FIELD,
    vcpus=ListOf(VCPU_FIELD, MAX_WORKERS),
    ghosts=ListOf(VCPU_FIELD, MAX_WORKERS),
    affinity=ListOf(ListOf(Int(MAX_HOST_CPUS - 1), MAX_AFFINITY), MAX_WORKERS),
    role=_ROLE_FIELD,
)
SUPERVISOR.register(3, Spawned, worker=_NUMBER_FIELD, pid=Int(U32, 1), role=_ROLE_FIELD)
SUPERVISOR.register(4, SignalCell, worker=_NUMBER_FIELD, pid=Int(U32, 1), signal=Int(64, 1), role=_ROLE_FIELD)
SUPERVISOR.register(5, Signalled)
SUPERVISOR.register(6, CreateMemory, size=Int(MAX_MEMORY_BYTES, 1))
SUPERVISOR.register(7, MemoryCreated, size=Int(MAX_MEMORY_BYTES, 1))
SUPERVISOR.register(
    8,
    CellEnded,
    worker=_NUMBER_FIELD,
    pid=Int(U32, 1),
    status=Int(U8),
    signal=Int(64),
    wall=Text(64),
    text=TEXT_FIELD,
    role=_ROLE_FIELD,
)
SUPERVISOR.register(9, Shutdown, code=Int(U8), text=TEXT_FIELD)
SUPERVISOR.register(10, SignalNoticed, signal=Int(64, 1), text=TEXT_FIELD)
